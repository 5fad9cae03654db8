"""The nouns of the engine. Everything else in this package moves these about.

A request enters as an `Ask`, lives in the engine as a `Sequence` (scheduler.py), and leaves as `Event`s. Asks and
events are frozen, so that they may cross threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from llmnode.wire.errors import ApiError
from llmnode.wire.node import Load, Usage

if TYPE_CHECKING:
    from llmnode.engine.grammar import Grammar


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The neutral value of each field leaves the distribution as it is.

    The order, and with it the meaning of each combination, is sampler.py's to tell.

    temperature: 0 is greedy (always the most probable token); 1 is neutral.
    top_k: keep the k most probable tokens; 0 is off.       top_p: nucleus, (0, 1]; 1 is off.
    min_p: drop tokens below min_p times the most probable; 0 is off.
    typical_p: locally typical sampling, (0, 1]; 1 is off (Meister et al., 2022).
    top_n_sigma: keep logits within n standard deviations of the largest; 0 is off (Tang et al., 2024).
    xtc_probability, xtc_threshold: with that chance, drop all tokens above the threshold but the least probable of
        them; 0 is off, and so is a threshold above 0.5.
    dry_multiplier, dry_base, dry_allowed_length, dry_last_n, dry_breakers: the DRY penalty on tokens that would go on
        with a repetition; a multiplier of 0 is off. dry_last_n: tokens looked back upon, -1 is all. Breakers are texts.
    repeat_penalty, repeat_last_n: divides the logits of tokens among the last n of prompt and answer (n: -1 is all);
        1 is off (Keskar et al., 2019).
    frequency_penalty, presence_penalty: taken from the logits of tokens in the answer, for each time or once; 0 is off
        (OpenAI's API).
    logit_bias: (token id, amount added to its logit); -inf forbids a token.
    mirostat: 1 or 2 takes the place of all truncations with Mirostat (Basu et al., 2020); 0 is off.
    infill: the answer fills a gap, and ends when it may (infill.py); without Mirostat only.
    mirostat_tau, mirostat_eta: target surprise in bits, and rate of learning.
    seed: 0 to 2**32 - 2. Randomness is a function of (seed, position), never of how many draws this process made.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    infill: bool = False

    @property
    def needs_replayed_logits(self) -> bool:
        """Whether the state of an answer cannot be had from its token ids alone: Mirostat's comes from the logits."""
        return self.mirostat != 0 and self.temperature > 0


class Forcing(Protocol):
    """Tokens that must come, whatever the model would rather say. Belongs to one answer.

    What it wants must follow from the tokens of the answer alone, so that another node can go on with it.
    """

    def wanted(self) -> int | None:
        """The token that must come next, None where it is free. Changes nothing."""

    def accept(self, token: int) -> None:
        """The token is part of the answer now."""


@dataclass(frozen=True)
class Ask:
    """One answer wanted from the engine.

    prompt: token ids, at least one.        max_tokens: answer tokens at most, None for "until the context is full".
    stop: texts that end the answer and are not part of it.
    deadline: on the clock `time.monotonic()`, in seconds; None for no deadline.
    ignore_eos: go on past the end-of-turn token (benchmarks need answers of a known length).
    grammar: what the answer must match, compiled; None for no constraint.
    forcing: makes what forces tokens on the answer, anew for each; one that the grammar does not allow is not forced.
    pieces: the text of each token as the answer's reader wants it (text.spelled); None for the model's own.
    logprobs: how many of the most probable tokens to report beside each token drawn; None for no report, 0 for the
        drawn token's own only.
    replayed: the first ids of the answer, generated elsewhere: they count as part of the answer (max_tokens, usage,
        stop strings, grammar, penalties) but are not emitted again.
    retold: emit them all the same, with their text and logprobs, for a reader that has heard nothing yet.
    tag: what the asker knows this sequence by. The engine looks at none; `Stats.held` tells which are resident.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    deadline: float | None = None
    ignore_eos: bool = False
    grammar: Grammar | None = None
    forcing: Callable[[], Forcing] | None = field(default=None, repr=False)
    pieces: Sequence[bytes] | None = field(default=None, repr=False, compare=False)
    logprobs: int | None = None
    replayed: tuple[int, ...] = ()
    retold: bool = False
    tag: object = None

    @property
    def retells_logprobs(self) -> bool:
        """Whether replayed ids are reported with logprobs, which only their logits can tell."""
        return self.retold and self.logprobs is not None

    @property
    def needs_replayed_logits(self) -> bool:
        """Whether the positions of replayed ids must be computed, even where somebody else's cells hold them."""
        return self.sampling.needs_replayed_logits or self.retells_logprobs


class Finish(str, Enum):
    """Why an answer ended, in OpenAI's words where they have one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Logprob:
    """Natural logarithms of probabilities under the model's own distribution, before any penalty or truncation.

    top: (token id, logprob) of the most probable tokens, falling.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Text:
    """A piece of the answer: whole UTF-8 characters, no part of a stop string. `ids`: tokens since the last event.

    logprobs: one for each id, where the ask wanted them.
    parts: what each id has made certain, which together is the text; empty for a single id.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """The answer ended well. Seconds: `queued` until a slot was free, `prefill` from then to the first token.

    ids: tokens since the last `Text`, which had no text to tell; most often the one that ended the answer.
    stop: the stop string that ended it, "" for any other end.
    """

    finish: Finish
    usage: Usage
    queued_s: float
    prefill_s: float
    decode_s: float
    ids: tuple[int, ...] = ()
    stop: str = ""


@dataclass(frozen=True)
class Failed:
    """The answer ended badly. The error has the wire's shape already."""

    error: ApiError


Event = Text | Done | Failed
Sink = Callable[[Event], None]


@dataclass(frozen=True)
class Timings:
    """Counters since the engine started: the truth behind /metrics.

    decode_s, sample_s, other_s: where the time of its steps went, in seconds; `other` is our own Python.
    prompt_tokens, completion_tokens: computed; cached_tokens: of prompts, found resident or in host RAM instead.
    evicted: idle prefixes that gave their cells back; compacted: times that running answers were moved to lower cells.
    saved, restored: sequences taken to host RAM and back.
    swapped, dropped: running answers that had to give way, and went to host RAM or are computed again.
    drafted, accepted: tokens that prompt lookup proposed, and those of them that were drawn.
    """

    steps: int = 0
    decode_s: float = 0.0
    sample_s: float = 0.0
    other_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    evicted: int = 0
    compacted: int = 0
    saved: int = 0
    restored: int = 0
    swapped: int = 0
    dropped: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Stats:
    """A frozen snapshot of the engine, made by its thread after each step.

    prefixes, cells_idle: idle prefixes in the cache, and the cells that only they hold.
    host_prefixes, host_bytes: sequences in host RAM, and what they take.
    held: (tag, tokens) of sequences that others can go on from, in the cache or in host RAM: the first so many tokens
        of that ask's prompt and answer. Those used last first, and not all where they are very many. The same object as
        before while nothing has changed.
    heartbeat: `time.monotonic()` of the last finished step or idle tick.
    step_deadline: by when the step now running should have ended; None while idle.
    """

    load: Load
    timings: Timings
    heartbeat: float
    step_deadline: float | None = None
    prefixes: int = 0
    cells_idle: int = 0
    host_prefixes: int = 0
    host_bytes: int = 0
    held: tuple[tuple[object, int], ...] = ()

    def stuck(self, now: float, idle_limit_s: float = 10.0) -> str:
        """Why the engine's thread must be taken for stuck at `now`, or nothing: the one judgement behind /health and
        the watchdog. A long step is not stuck before its own deadline; an idle engine ticks twice a second."""
        if self.step_deadline is not None:
            late = now - self.step_deadline
            return f"a step should have ended {late:.1f} s ago" if late > 0 else ""
        silent = now - self.heartbeat
        return f"the engine's last sign of life was {silent:.1f} s ago" if silent > idle_limit_s else ""


@dataclass(frozen=True)
class InfillTokens:
    """The control tokens that stand before the parts of a text with a gap (fill in the middle, Bavarian et al., 2022).

    repository, file: before the name of each, of models that were trained on whole repositories; None for others.
    """

    prefix: int
    suffix: int
    middle: int
    repository: int | None = None
    file: int | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What the loaded GGUF says of itself. `n_ctx_train` in tokens; `chat_template` is Jinja or empty.

    cell_bytes: what one token takes in the cache, 0 when unknown.
    window: how many of the last tokens its sliding-window layers can see; 0 when it has none.
    digest: what tells its weights from another model's, as hex; empty when unknown.
    n_embd: values in a token's vector.      vocab_type: by llama.cpp's number (llama.h, enum llama_vocab_type).
    infill: None for a model that was not trained to fill in.
    """

    name: str
    architecture: str
    n_vocab: int
    n_ctx_train: int
    n_params: int
    size_bytes: int
    chat_template: str
    bos: str
    eos: str
    add_bos: bool
    cell_bytes: int = 0
    window: int = 0
    digest: str = ""
    n_embd: int = 0
    vocab_type: int = 0
    infill: InfillTokens | None = None
