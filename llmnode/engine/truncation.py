"""Which tokens a draw may choose from, and with what weights. Pure functions of a row of logits.

Owns: the order of the truncations. Refuses to know: what was said before, grammars, random numbers.

The order is top_n_sigma, top_k, temperature, typical_p, top_p, min_p, XTC; Mirostat takes the place of all of them but
the temperature. It is llama.cpp's default order (`common_params_sampling`) with one difference: there the temperature
comes last, here every share and every threshold is one of the distribution that is drawn from, as with OpenAI, vLLM and
transformers. (The first two do not depend on the temperature; doing them before it leaves little to exponentiate.)
Each truncation sees what the ones before it have left, made to sum to 1 again.

Ids stay in rising order all the way. Logits depend a little on the shape of the batch, and an order by weight would
turn two near-equal tokens around.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmnode.engine.types import Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Ids = NDArray[np.intp]

_BLOCK, _GROUPS = 256, 1024
_FEW = 512
"""So many of the best tokens nearly always hold the nucleus."""
_MIROSTAT_SAMPLE = 100
"""How many of the best tokens Mirostat 1 estimates Zipf's exponent from, as the paper does."""
_STEEPEST = 1e30
"""The largest factor that a temperature can mean: float32 holds it, and no two logits are equal under it."""


def candidates(
    row: NDArray[np.float32], best: float, sampling: Sampling, coin: float = 1.0
) -> tuple[Ids | None, Floats]:
    """What a draw may choose from: ids in rising order (None: all) and their weights, which are positive or 0.

    best: the largest logit, a finite number. Without typical_p and XTC its weight is 1.
    coin: a number in [0, 1); XTC acts when it is below its probability.
    """
    ids = largest(row, sampling.top_k) if 0 < sampling.top_k < len(row) else None
    if sampling.top_n_sigma > 0:
        near = (row if ids is None else row[ids]) >= best - sampling.top_n_sigma * _deviation(row)
        ids = np.flatnonzero(near) if ids is None else ids[near]
    weights = _weights(row if ids is None else row[ids], best, sampling.temperature)
    highest = 1.0
    if sampling.typical_p < 1:
        ids, weights = _keep(_typical(weights, sampling.typical_p), ids, weights)
        highest = float(weights.max())
    floor = sampling.min_p * highest
    if sampling.top_p < 1:
        floor = max(floor, _nucleus_floor(weights, sampling.top_p))
    if floor > 0:
        ids, weights = _keep(weights >= floor, ids, weights)
    if coin < sampling.xtc_probability and sampling.xtc_threshold <= 0.5:
        ids, weights = _without_top_choices(ids, weights, sampling.xtc_threshold)
    return ids, weights


def mirostat_candidates(
    row: NDArray[np.float32], best: float, sampling: Sampling, mu: float
) -> tuple[Ids | None, Floats]:
    """As `candidates`, for Mirostat with the present maximum surprise `mu`, in bits (Basu et al., 2020)."""
    weights = _weights(row, best, sampling.temperature)
    if sampling.mirostat == 2:
        floor = min(1.0, float(weights.sum(dtype=np.float64)) * 2.0 ** -max(-1000.0, min(mu, 1000.0)))
        return _keep(weights >= floor, None, weights)
    k = _mirostat_k(weights, mu)
    if k >= len(row):
        return None, weights
    ids = largest(row, k)
    return ids, weights[ids]


def surprise(row: NDArray[np.float32], best: float, sampling: Sampling, token: int) -> float:
    """How unlikely the token was before any truncation, in bits; inf for one that was forbidden."""
    total = float(_weights(row, best, sampling.temperature).sum(dtype=np.float64))
    return math.log2(total) + (best - float(row[token])) * min(1 / sampling.temperature, _STEEPEST) / math.log(2)


def place(weights: Floats, share: float) -> int:
    """The index at which the cumulative weights first exceed `share` of their sum: never one of weight 0."""
    total, find = _cumulated(weights)
    at = find(share * total)
    while weights[at] == 0:  # only where a sum's rounding has left the draw beyond the last weight
        at -= 1
    return at


def largest(values: NDArray[np.float32], k: int) -> Ids:
    """Where the k largest values are, in rising order; of values equal to the k-th, those with the lowest ids."""
    ids = _at_least(values, k)
    if len(ids) > k:
        some = values[ids]
        kth = np.partition(some, len(some) - k)[len(some) - k]
        above = some > kth
        spare = k - int(np.count_nonzero(above))
        above[np.flatnonzero(some == kth)[:spare]] = True
        ids = ids[above]
    return ids


def _weights(logits: NDArray[np.float32], best: float, temperature: float) -> Floats:
    """Chances up to a factor: 1 for a logit of `best`."""
    return np.asarray(np.exp((logits - np.float32(best)) * np.float32(min(1 / temperature, _STEEPEST))))


def _keep(which: NDArray[np.bool_], ids: Ids | None, weights: Floats) -> tuple[Ids, Floats]:
    kept = np.flatnonzero(which)
    return (kept if ids is None else ids[kept]), weights[kept]


def _deviation(row: NDArray[np.float32]) -> float:
    """The standard deviation of the logits, forbidden ones left out."""
    return float((row if math.isfinite(row.min()) else row[np.isfinite(row)]).std())


def _typical(weights: Floats, typical_p: float) -> NDArray[np.bool_]:
    """The fewest tokens that make up more than `typical_p`, those first whose surprise is closest to the entropy."""
    chances = weights / weights.sum(dtype=np.float64)
    surprises = -np.log(np.maximum(chances, np.finfo(np.float32).tiny))
    distance = np.abs(surprises - (chances * surprises).sum())
    order = np.argsort(distance)
    total, find = _cumulated(chances[order])
    return np.asarray(distance <= distance[order[find(typical_p * total)]])


def _without_top_choices(ids: Ids | None, weights: Floats, threshold: float) -> tuple[Ids | None, Floats]:
    """XTC: of the tokens that reach the threshold the least probable stays alone, of equals that with the lowest id."""
    above = np.flatnonzero((weights >= threshold * weights.sum(dtype=np.float64)) & (weights > 0))
    if len(above) < 2:
        return ids, weights
    keep = np.ones(len(weights), np.bool_)
    keep[above] = False
    keep[above[weights[above].argmin()]] = True
    return _keep(keep, ids, weights)


def _mirostat_k(weights: Floats, mu: float) -> int:
    """How many of the best tokens to keep, by Zipf's law with an exponent s estimated from neighbouring ranks.

    k = (epsilon * 2**mu / (1 - n**-epsilon)) ** (1/s) with epsilon = s - 1 and n the size of the vocabulary (Basu et
    al., 2020, algorithm 1); in logarithms, since s near 0 (equal chances) asks for a number beyond all floats.
    """
    some = weights[_at_least(weights, _MIROSTAT_SAMPLE)]
    some = np.sort(some.astype(np.float64))[::-1][:_MIROSTAT_SAMPLE]
    some = some[some > 0]
    if len(some) < 2:
        return 1
    ranks = np.arange(1, len(some))
    t, b = np.log((ranks + 1) / ranks), np.log(some[:-1] / some[1:])
    s = float(t @ b / (t @ t))
    n = math.log(len(weights))
    epsilon = s - 1
    ratio = epsilon / -math.expm1(-epsilon * n) if abs(epsilon) > 1e-9 else 1 / n
    log_k = math.log(ratio) + mu * math.log(2)
    if log_k <= 0:
        return 1
    return len(weights) if log_k >= s * n else int(math.exp(log_k / s))


def _nucleus_floor(weights: Floats, top_p: float) -> float:
    """The smallest weight in the nucleus: the fewest largest weights that make up `top_p` of the sum. Equals stay."""
    wanted = top_p * float(weights.sum())
    for some in (_FEW, len(weights)):
        few = weights if some >= len(weights) else weights[_at_least(weights, some)]
        falling = np.sort(few)[::-1]
        total, find = _cumulated(falling)
        if total >= wanted:
            return float(falling[find(np.nextafter(wanted, 0))])
    return 0.0


def _cumulated(weights: Floats) -> tuple[float, Callable[[float], int]]:
    """The sum of the weights, and a function that finds the first index whose cumulative sum exceeds a value.

    Sums of blocks first: cumulating a whole vocabulary would cost more than all else here (0.9 ms for 151,936).
    """
    starts = range(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts, dtype=np.float64) if len(weights) > _BLOCK else weights
    cumulative = np.cumsum(sums, dtype=np.float64)

    def find(value: float) -> int:
        at = min(int(cumulative.searchsorted(value, side="right")), len(sums) - 1)
        if sums is weights:
            return at
        start = starts[at]
        block = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
        before = cumulative[at - 1] if at else 0.0
        return start + min(int(block.searchsorted(value - before, side="right")), len(block) - 1)

    return float(cumulative[-1]), find


def _at_least(values: Floats, k: int) -> Ids:
    """Where some values are, in rising order, among them the k largest and often few more.

    Split into groups, the k-th largest of the groups' maxima is a lower bound of the k-th largest value: k groups have
    one value each at or above it. That is two passes at memory speed instead of a selection over the whole vocabulary:
    a whole draw with top_k=40 of 151,936 takes 0.05 ms, llama.cpp's samplers 0.08 after filling their candidates.
    """
    groups = max(_GROUPS, 4 * k)
    depth = len(values) // groups
    heads = values[: depth * groups].reshape(depth, groups).max(axis=0) if depth > 1 else values
    if k >= len(heads):
        return np.arange(len(values))
    return np.flatnonzero(values >= np.partition(heads, len(heads) - k)[len(heads) - k])
