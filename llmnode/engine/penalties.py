"""What an answer's past does to the next logits: bias, repetition, frequency and presence penalties, DRY.

Owns: the account of which tokens were said, and what is added to or taken from their logits. Refuses to know: chances,
draws, grammars.

The order is the table below, which is also llama.cpp's (`common_sampler_init`). Each changes a handful of logits of a
row; the row itself is copied, never written to.

  logit_bias          added as it is; -inf forbids
  repeat_penalty      over the last `repeat_last_n` tokens of prompt and answer: a positive logit is divided by it, any
                      other multiplied (dividing a negative one, as Keskar et al. 2019 do, would favour it)
  frequency, presence over the answer alone, as in OpenAI's API: `count * frequency + presence` is taken away
  DRY                 `multiplier * base ** (length - allowed_length)` is taken from a token that would go on with a
                      repetition of `length` tokens, if that is at least `allowed_length` (pi6am, koboldcpp pull 982)

DRY compares the end of the text with everything before it. A breaker ends a repetition: nothing is compared across the
place where its text ends, wherever the borders of tokens fall, and a token that holds a breaker is never penalised. So
are tokens without a text: turns of a conversation end alike, and an answer that may not end would be worse than one
that ends as the last did. (llama.cpp knows breakers as tokens and penalises end tokens like any other.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmnode.engine.types import Sampling
from llmnode.wire.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int32]

_ENOUGH = 1e6
"""A penalty on a logit that no larger one can outdo: DRY's grows no further."""


@dataclass(frozen=True)
class Vocabulary:
    """What samplers know of a model's tokens; one for all answers.

    pieces: bytes of each token as text; control tokens are empty. Length n_vocab.
    end_tokens: ids that end an answer.
    """

    pieces: Sequence[bytes]
    end_tokens: frozenset[int]


class Penalties:
    """All that changes single logits, for one answer.

    Raises InvalidRequest when a biased token does not exist.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocabulary: Vocabulary) -> None:
        bias: dict[int, float] = {}
        for token, amount in sampling.logit_bias:
            if not 0 <= token < len(vocabulary.pieces):
                raise InvalidRequest(
                    f"logit_bias names the token {token}; ids are from 0 to {len(vocabulary.pieces) - 1}",
                    param="logit_bias",
                )
            bias[token] = bias.get(token, 0.0) + amount
        self._biased = np.array(list(bias), np.intp)
        self._bias = np.array(list(bias.values()), np.float32)

        self._repeat = np.float32(sampling.repeat_penalty)
        self._window: Tally | None = None
        if sampling.repeat_penalty != 1 and sampling.repeat_last_n != 0:
            self._window = Tally(prompt, sampling.repeat_last_n)

        self._frequency = np.float32(sampling.frequency_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._answer = Tally((), -1) if sampling.frequency_penalty or sampling.presence_penalty else None

        self._dry: Dry | None = None
        if sampling.dry_multiplier > 0 and sampling.dry_base >= 1 and sampling.dry_last_n != 0:
            self._dry = Dry(sampling, prompt, vocabulary.pieces)

        self.active = bool(bias or self._window or self._answer or self._dry)
        """Whether there is anything to do for this answer, now or later."""

    def applied(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits with everything taken into account: a copy, or `row` itself when nothing changes. Changes no
        state."""
        repeated = self._window.ids if self._window is not None else ()
        said = self._answer.ids if self._answer is not None else ()
        looping = self._dry.penalties() if self._dry is not None else {}
        if not (len(self._biased) or len(repeated) or len(said) or looping):
            return row
        row = row.copy()
        if len(self._biased):
            row[self._biased] += self._bias
        if len(repeated):
            logits = row[repeated]
            row[repeated] = np.where(logits > 0, logits / self._repeat, logits * self._repeat)
        if self._answer is not None and len(said):
            row[said] -= self._answer.counts * self._frequency + self._presence
        if looping:
            row[list(looping)] -= np.fromiter(looping.values(), np.float32, len(looping))
        return row

    def accept(self, token: int) -> None:
        """The token is part of the answer now."""
        for account in (self._window, self._answer, self._dry):
            if account is not None:
                account.accept(token)


class Tally:
    """How often each token occurs among the last `span` of a sequence; a span of -1 is all of it.

    Ids and counts are kept in arrays, ready to index a row with: collecting 64 ids anew for each draw would take longer
    than the draw.
    """

    def __init__(self, tokens: Sequence[int], span: int) -> None:
        self._recent: deque[int] | None = None
        if span >= 0:
            tokens = tokens[max(0, len(tokens) - span) :]
            self._recent = deque(tokens)
        self._span = span
        ids, counts = np.unique(np.asarray(tokens, np.intp), return_counts=True)
        self._size = len(ids)
        self._ids = np.resize(ids, max(64, 2 * len(ids)))
        self._counts = np.resize(counts.astype(np.float32), len(self._ids))
        self._place = {token: at for at, token in enumerate(ids.tolist())}

    def accept(self, token: int) -> None:
        self._add(token)
        if self._recent is not None:
            self._recent.append(token)
            if len(self._recent) > self._span:
                self._take(self._recent.popleft())

    @property
    def ids(self) -> NDArray[np.intp]:
        """Each token once, in no particular order."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` occurs."""
        return self._counts[: self._size]

    def _add(self, token: int) -> None:
        at = self._place.setdefault(token, self._size)
        if at < self._size:
            self._counts[at] += 1
            return
        if at == len(self._ids):
            self._ids = np.resize(self._ids, 2 * at)
            self._counts = np.resize(self._counts, 2 * at)
        self._ids[at], self._counts[at] = token, 1
        self._size += 1

    def _take(self, token: int) -> None:
        at = self._place[token]
        self._counts[at] -= 1
        if self._counts[at]:
            return
        del self._place[token]
        self._size -= 1
        if at < self._size:  # the last one moves into the gap
            self._ids[at], self._counts[at] = self._ids[self._size], self._counts[self._size]
            self._place[int(self._ids[at])] = at


class Dry:
    """The DRY penalty of one answer."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], pieces: Sequence[bytes]) -> None:
        self._multiplier, self._base = sampling.dry_multiplier, sampling.dry_base
        self._allowed, self._span = max(0, sampling.dry_allowed_length), sampling.dry_last_n
        steep = self._base > 1 and self._multiplier < _ENOUGH
        # The difference of logarithms, since a quotient by the least of floats is infinite.
        self._steepest = 0
        if steep:
            self._steepest = math.ceil((math.log(_ENOUGH) - math.log(self._multiplier)) / math.log(self._base))
        self._pieces = pieces
        self._breakers = [text.encode() for text in sampling.dry_breakers if text]
        self._reach = max(map(len, self._breakers), default=1) - 1
        self._tokens = np.array(prompt, np.int32)
        self._length = len(prompt)
        self._tail = b""
        self._unbroken = self._since_break(prompt)

    def accept(self, token: int) -> None:
        if self._length == len(self._tokens):
            self._tokens = np.resize(self._tokens, max(256, 2 * self._length))
        self._tokens[self._length] = token
        self._length += 1
        piece = self._pieces[token]
        text = self._tail + piece
        # A breaker that ends in this piece begins at the earliest its own length less one before it.
        broken = not piece or any(
            text.find(breaker, max(0, len(self._tail) - len(breaker) + 1)) >= 0 for breaker in self._breakers
        )
        self._unbroken = 0 if broken else self._unbroken + 1
        self._tail = text[len(text) - self._reach :] if piece and self._reach < len(text) else text if piece else b""

    def penalties(self) -> dict[int, float]:
        """What to take from the logits of which tokens.

        Positions where the text's last token occurs are followed backwards together, one array operation for each
        token of the repetition. A position drops out when it differs, and tells how long a repetition the token after
        it would continue.
        """
        span = self._length if self._span < 0 else min(self._length, self._span)
        past = self._tokens[self._length - span : self._length]
        longest = min(self._unbroken, span - 1, self._allowed + self._steepest)
        if span <= self._allowed or longest < self._allowed:
            return {}
        if self._allowed:
            length, ends = 1, np.flatnonzero(past[:-1] == past[-1])
        else:
            length, ends = 0, np.arange(span - 1)
        lengths: dict[int, int] = {}
        while len(ends):
            going = np.zeros(len(ends), np.bool_)
            if length < longest:
                long_enough = ends >= length
                going[long_enough] = past[ends[long_enough] - length] == past[span - 1 - length]
            if length >= self._allowed:
                lengths.update(dict.fromkeys(past[ends[~going] + 1].tolist(), length))
            ends = ends[going]
            length += 1
        return {
            token: self._multiplier * self._base ** min(length - self._allowed, self._steepest)
            for token, length in lengths.items()
            if self._pieces[token] and not any(breaker in self._pieces[token] for breaker in self._breakers)
        }

    def _since_break(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's last tokens come after its last break. Sets the tail that `accept` goes on from."""
        pieces = [self._pieces[token] for token in prompt]
        silent = len(pieces)
        while silent and pieces[silent - 1]:
            silent -= 1
        text = b"".join(pieces[silent:])
        self._tail = text[max(0, len(text) - self._reach) :]
        ends = [text.rfind(breaker) + len(breaker) for breaker in self._breakers if breaker in text]
        if not ends:
            return len(pieces) - silent
        after, count = len(text), 0
        for piece in reversed(pieces):
            after -= len(piece)
            if after < max(ends):
                break
            count += 1
        return count
