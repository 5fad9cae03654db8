"""The re-scoring rule: whether an answer is one that the model could have given, judged alone and after the fact.

Logits depend a little on the shape of a batch, so an answer out of a mixed batch, or one that moved between nodes, is
not compared letter by letter. It is computed again alone, and each of its tokens must be near what the model says
there. A token that was skipped or came twice fails that.
"""

from __future__ import annotations

import numpy as np

from llmnode.engine.backend import OK, Chunk
from llmnode.engine.llama import LlamaBackend
from llmnode.engine.sampler import candidates, uniform
from llmnode.engine.types import Sampling


def rescored(scorer: LlamaBackend, prompt: tuple[int, ...], ids: tuple[int, ...]) -> np.ndarray:
    """The logits before each id of an answer, computed alone: shape (len(ids), n_vocab)."""
    rows = []
    assert scorer.decode([Chunk(0, 0, prompt, 1)]) == OK
    for position, id in enumerate(ids):
        rows.append(scorer.logits()[0].copy())
        assert scorer.decode([Chunk(0, len(prompt) + position, [id], 1)]) == OK
    assert scorer.seq_remove(0)
    return np.stack(rows)


def is_credible(rows: np.ndarray, ids: tuple[int, ...]) -> bool:
    """Greedy ids: each within 0.5 logit of the best, and 95% the best itself, or all but one of a short answer."""
    gaps = rows.max(axis=1) - rows[np.arange(len(ids)), list(ids)]
    return bool(gaps.max() <= 0.5 and np.count_nonzero(gaps) <= max(1, 0.05 * len(ids)))


def is_credible_draw(rows: np.ndarray, ids: tuple[int, ...], sampling: Sampling) -> bool:
    """Seeded ids: each the redraw, or within 0.05 of its place in the distribution, and no worse than may be drawn."""
    for position, (row, id) in enumerate(zip(rows, ids, strict=True)):
        kept, _ = candidates(row, float(row.max()), sampling)
        if kept is None or row[id] <= row[kept].min() - 0.5:
            return False
        kept = np.union1d(kept, [id])
        weights = np.exp((row[kept].astype(np.float64) - row.max()) / sampling.temperature)
        upper = np.cumsum(weights) / weights.sum()
        at = int(np.flatnonzero(kept == id)[0])
        lower = upper[at - 1] if at else 0.0
        if not lower - 0.05 <= uniform(sampling.seed, position) <= upper[at] + 0.05:
            return False
    return True
