"""The last truncation of a text that fills a gap: it should end when it may, and not go on with what is improbable.

A model that fills a gap often gives a good part of its chances to an end, and the rest to many ways of going on, each
of them less probable than the end. So, of the candidates that other truncations have left, with chances that sum to 1:

1. When the ends together are worth more than a third of what the other chances come to for each candidate, one of the
   ends comes.
2. Tokens of which one is the beginning of another are one candidate: the more probable of them, with the chances of
   both.
3. Those below `FLOOR` fall away, but for ends; and when all do, the most probable end comes.
4. Of n that are left, those below 1 / (n + 1) fall away, but for ends.

Source: llama.cpp's sampler of that name (llama.h, `llama_sampler_init_infill`), by its description and thresholds.
There, too, it comes after top_k and top_p. Refuses to know: what was said before, random numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llmnode.engine.penalties import Vocabulary

    Floats = NDArray[np.floating]
    Ids = NDArray[np.intp]

FLOOR = 0.2
_ENDS_WEIGH = 3
_MOST = 256
"""Candidates that are looked at: `top_k` leaves fewer where this sampler is used as it is meant to be."""


def narrowed(row: NDArray[np.float32], ids: Ids | None, weights: Floats, vocabulary: Vocabulary) -> tuple[Ids, Floats]:
    """What is left of candidates, as `truncation.candidates` gives them: ids in rising order and their weights.

    row: the logits, of which the best end is found where no candidate is one."""
    found = np.arange(len(weights)) if ids is None else ids
    if len(found) > _MOST:
        best = np.sort(np.argpartition(-weights, _MOST)[:_MOST])
        found, weights = found[best], weights[best]
    chances = weights / weights.sum(dtype=np.float64)
    ends = np.fromiter((int(id) in vocabulary.end_tokens for id in found), np.bool_, len(found))
    end = float(chances[ends].sum())
    if _ENDS_WEIGH * end * len(found) > 1 - end:  # (1)
        return found[ends], chances[ends]
    chances = _united(found, chances, vocabulary.pieces)  # (2)
    kept = (chances >= FLOOR) | ends  # (3)
    going_on = int((kept & ~ends).sum())
    if not going_on:
        return np.array([_best_end(row, vocabulary)]), np.ones(1)
    found, chances, ends = found[kept], chances[kept], ends[kept]
    kept = (chances / chances.sum() >= 1 / (going_on + 1)) | ends  # (4)
    return found[kept], chances[kept]


def _united(ids: Ids, chances: Floats, pieces: Sequence[bytes]) -> Floats:
    """The chances with those of each token given to a more probable one that begins it or that it begins."""
    united = chances.copy()
    heads: list[int] = []
    for at in np.argsort(-chances, kind="stable").tolist():
        piece = pieces[ids[at]]
        if not piece:
            continue
        for head in heads:
            other = pieces[ids[head]]
            if piece.startswith(other) or other.startswith(piece):
                united[head] += united[at]
                united[at] = 0
                break
        else:
            heads.append(at)
    return united


def _best_end(row: NDArray[np.float32], vocabulary: Vocabulary) -> int:
    return max(sorted(vocabulary.end_tokens), key=row.__getitem__)
