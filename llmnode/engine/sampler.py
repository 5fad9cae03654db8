"""Logits to a token. The same logits, settings, history and position give the same token, on any node, in any process.

Owns: the one draw, the state that an answer's past leaves for its next tokens, what is reported of a draw, and how a
grammar takes part. Refuses to know: sequences, backends, text, random state.

Each token goes through, in this order: logit_bias, repeat_penalty, frequency and presence penalty, DRY (penalties.py);
top_n_sigma, top_k, temperature, typical_p, top_p, min_p, XTC, or Mirostat in their place (truncation.py); what a filled
gap wants (infill.py); one draw. The
draw walks the cumulative weights in order of token id, not of weight: logits depend a little on the shape of the batch,
and an order by weight would turn two near-equal tokens around. Temperature 0 takes the best of the altered logits.

No random numbers are kept: each is a hash of (seed, position, attempt), so a stream can go on elsewhere and say the
same. The attempts: 0 the draw, 1 the draw after a grammar's refusal, 2 XTC's coin.

A grammar sees the token first and is asked for all that it allows only when it refuses that one: the check takes less
than a microsecond, the mask up to half a millisecond. Say q is what the truncations leave and Q the share of it that is
allowed. A token t that is allowed comes out at once with chance q(t), or after a refusal, with chance 1 - Q, as q(t)/Q
by a number independent of the first: q(t) + (1 - Q) q(t)/Q = q(t)/Q in all, which is exactly a draw from q under the
mask. Where q holds nothing that is allowed, the mask is laid over the logits and the truncations start again from
there. Where that leaves nothing either, the answer has come to a DeadEnd.

Mirostat's maximum surprise moves by how unlikely each token was before any truncation, as in its paper (llama.cpp takes
the chance after it), under the altered logits and the temperature; a grammar's mask does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmnode.engine.grammar import DeadEnd
from llmnode.engine.infill import narrowed
from llmnode.engine.penalties import Penalties, Vocabulary
from llmnode.engine.truncation import candidates, largest, mirostat_candidates, place, surprise
from llmnode.engine.types import Logprob, Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmnode.engine.grammar import Matcher
    from llmnode.engine.types import Forcing

    Floats = NDArray[np.floating]
    Ids = NDArray[np.intp]

__all__ = ["Drawn", "Sampler", "Vocabulary", "candidates", "choice_seed", "uniform"]

MAX_SEED = 2**32 - 2
_DRAW, _REDRAW, _COIN = 0, 1, 2


class Drawn(NamedTuple):
    """A token, and what is to be reported of it where that is wanted."""

    token: int
    logprob: Logprob | None


class Sampler:
    """Draws the tokens of one answer, in order.

    prompt: the tokens before the answer, for the penalties that look at them.
    vocabulary: what is known of the model's tokens.
    matcher: the grammar's place in this answer, which the sampler moves on; None without one.
    forcing: tokens that must come, which are taken undrawn where the grammar allows them; None without any.
    logprobs: how many of the most probable tokens to report beside each; None for no report.

    Raises InvalidRequest when logit_bias names a token that does not exist.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        vocabulary: Vocabulary,
        matcher: Matcher | None = None,
        forcing: Forcing | None = None,
        logprobs: int | None = None,
    ) -> None:
        self._sampling, self._vocabulary = sampling, vocabulary
        self._matcher, self._forcing, self._logprobs = matcher, forcing, logprobs
        self._penalties = Penalties(sampling, prompt, vocabulary)
        self._greedy = sampling.temperature <= 0 or (sampling.top_k == 1 and not sampling.mirostat)
        self._mirostat = sampling.needs_replayed_logits
        self._mu = 2 * sampling.mirostat_tau
        bound = matcher is not None or forcing is not None
        self.plain = self._greedy and not self._penalties.active and not bound and logprobs is None
        """Greedy and nothing else to do: the largest logit is the token, and `accept` is all that must be called."""

    @property
    def finished(self) -> bool:
        """Whether the grammar allows nothing but an end of the answer."""
        return self._matcher is not None and self._matcher.finished

    def draw(self, row: NDArray[np.float32], best: int, position: int, known: int | None = None) -> Drawn | None:
        """The token at `position` of the answer, from 0. Changes no state: asked again, it says the same.

        row: logits, shape (n_vocab,), not written to.      best: where the largest is, `row.argmax()`.
        known: the token that was drawn here elsewhere, which is only reported.
        None when the row holds no usable number. Raises DeadEnd when grammar and bias together allow no token.
        """
        if not math.isfinite(row[best]):
            return None
        token = self._forced() if known is None else known
        if token is None:
            token = best if self.plain else self._token(row, best, position)
        return Drawn(token, None if self._logprobs is None else _report(row, best, token, self._logprobs))

    def accept(self, token: int, row: NDArray[np.float32] | None = None) -> None:
        """The token is part of the answer now, drawn here or replayed from elsewhere.

        row: the logits it was drawn from; needed when `sampling.needs_replayed_logits`.
        Raises DeadEnd when the grammar does not allow the token here.
        """
        if self._mirostat:
            if row is None:
                raise ValueError("Mirostat needs the logits that each token was drawn from")
            altered = self._penalties.applied(row)
            bits = surprise(altered, float(altered.max()), self._sampling, token)
            if math.isfinite(bits):
                self._mu -= self._sampling.mirostat_eta * (bits - self._sampling.mirostat_tau)
        if self._penalties.active:
            self._penalties.accept(token)
        if self._forcing is not None:
            self._forcing.accept(token)
        if self._matcher is not None:
            self._matcher.accept(token)
            if token in self._vocabulary.end_tokens:
                self._matcher = None  # the grammar has got what it asked for; whoever goes on is free to

    def _forced(self) -> int | None:
        token = self._forcing.wanted() if self._forcing is not None else None
        return token if token is None or self._matcher is None or self._matcher.allows(token) else None

    def _token(self, row: NDArray[np.float32], best: int, position: int) -> int:
        altered = self._penalties.applied(row)
        if altered is not row:
            best = int(altered.argmax())
            if altered[best] == -np.inf:
                raise DeadEnd("logit_bias forbids every token", param="logit_bias")
        ids, weights = self._candidates(altered, best, position)
        token = self._pick(ids, weights, position, _DRAW)
        if self._matcher is None or self._matcher.allows(token):
            return token
        mask = self._matcher.mask()
        left = np.flatnonzero(mask if ids is None else mask[ids])
        if weights[left].any():
            return self._pick(left if ids is None else ids[left], weights[left], position, _REDRAW)
        allowed = np.flatnonzero(mask)
        altered = altered[allowed]
        if not len(allowed) or altered[best := int(altered.argmax())] == -np.inf:
            raise DeadEnd("the grammar allows no token here that the model has and logit_bias does not forbid")
        ids, weights = self._candidates(altered, best, position)
        return int(allowed[self._pick(ids, weights, position, _REDRAW)])

    def _candidates(self, row: NDArray[np.float32], best: int, position: int) -> tuple[Ids | None, Floats]:
        sampling, height = self._sampling, float(row[best])
        if self._greedy:
            return np.array([best]), np.ones(1, np.float32)
        if self._mirostat:
            return mirostat_candidates(row, height, sampling, self._mu)
        coin = uniform(sampling.seed, position, _COIN) if sampling.xtc_probability > 0 else 1.0
        ids, weights = candidates(row, height, sampling, coin)
        if sampling.infill and self._vocabulary.end_tokens:
            return narrowed(row, ids, weights, self._vocabulary)
        return ids, weights

    def _pick(self, ids: Ids | None, weights: Floats, position: int, attempt: int) -> int:
        at = place(weights, uniform(self._sampling.seed, position, attempt)) if len(weights) > 1 else 0
        return at if ids is None else int(ids[at])


def uniform(seed: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) that depends on (seed, position, attempt) only: the finaliser of SplitMix64 (Steele et al.,
    2014), which maps different keys to different numbers. Positions are below 2**28, attempts below 16."""
    x = ((seed << 32) + (attempt << 28) + position + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return ((x ^ x >> 31) >> 11) / (1 << 53)


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of several to one request: `seed` itself for the first, different for each other one.

    Steps of a number without a common divisor with the range: they come back to the start after all of it.
    """
    return (seed + index * 0x9E3779B1) % (MAX_SEED + 1)


def _report(row: NDArray[np.float32], best: int, token: int, count: int) -> Logprob:
    """Logarithms of the model's own chances: of the token, and of the `count` most probable ones."""
    height = float(row[best])
    norm = height + math.log(float(np.exp(row - row[best]).sum(dtype=np.float64)))
    ids = largest(row, min(count, len(row))) if count else np.array([], np.intp)
    ids = ids[np.argsort(-row[ids], kind="stable")]
    top = tuple((id, logit - norm) for id, logit in zip(ids.tolist(), row[ids].tolist(), strict=True))
    return Logprob(token, float(row[token]) - norm, top)
