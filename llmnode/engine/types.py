"""The nouns of the engine. Everything else in this package moves these about.

A request enters as an `Ask`, lives in the engine as a `Sequence` (scheduler.py), and leaves as `Event`s. Asks and
events are frozen, so that they may cross threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from llmnode.wire.errors import ApiError
from llmnode.wire.node import Load, Usage


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The neutral value of each field leaves the distribution as it is.

    temperature: 0 is greedy (always the most probable token); 1 is neutral.
    top_k: keep the k most probable tokens; 0 is off.       top_p: nucleus, (0, 1]; 1 is off.
    min_p: drop tokens below min_p times the most probable; 0 is off.
    seed: 0 to 2**32 - 2. Randomness is a function of (seed, position), never of how many draws this process made.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Ask:
    """One answer wanted from the engine.

    prompt: token ids, at least one.        max_tokens: answer tokens at most, None for "until the context is full".
    stop: texts that end the answer and are not part of it.
    deadline: on the clock `time.monotonic()`, in seconds; None for no deadline.
    ignore_eos: go on past the end-of-turn token (benchmarks need answers of a known length).
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    deadline: float | None = None
    ignore_eos: bool = False


class Finish(str, Enum):
    """Why an answer ended, in OpenAI's words where they have one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Text:
    """A piece of the answer: whole UTF-8 characters, no part of a stop string. `ids`: tokens since the last event."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Done:
    """The answer ended well. Seconds: `queued` until a slot was free, `prefill` from then to the first token."""

    finish: Finish
    usage: Usage
    queued_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Failed:
    """The answer ended badly. The error has the wire's shape already."""

    error: ApiError


Event = Text | Done | Failed
Sink = Callable[[Event], None]


@dataclass(frozen=True)
class Timings:
    """Where the engine's time went since it started, in seconds, and how often: the counters behind /metrics."""

    steps: int = 0
    decode_s: float = 0.0
    sample_s: float = 0.0
    other_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Stats:
    """A frozen snapshot of the engine, made by its thread after each step.

    heartbeat: `time.monotonic()` of the last finished step or idle tick.
    step_deadline: by when the step now running should have ended; None while idle.
    """

    load: Load
    timings: Timings
    heartbeat: float
    step_deadline: float | None = None

    def stuck(self, now: float, idle_limit_s: float = 10.0) -> str:
        """Why the engine's thread must be taken for stuck at `now`, or nothing: the one judgement behind /health and
        the watchdog. A long step is not stuck before its own deadline; an idle engine ticks twice a second."""
        if self.step_deadline is not None:
            late = now - self.step_deadline
            return f"a step should have ended {late:.1f} s ago" if late > 0 else ""
        silent = now - self.heartbeat
        return f"the engine's last sign of life was {silent:.1f} s ago" if silent > idle_limit_s else ""


@dataclass(frozen=True)
class ModelInfo:
    """What the loaded GGUF says of itself. `n_ctx_train` in tokens; `chat_template` is Jinja or empty.

    cell_bytes: what one token takes in the cache, 0 when unknown.
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
