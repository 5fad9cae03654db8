"""What fills a gap ends when it may, and goes on with what is probable alone."""

from __future__ import annotations

import numpy as np
import pytest

from llmnode.engine.infill import narrowed
from llmnode.engine.penalties import Vocabulary
from llmnode.engine.sampler import Sampler
from llmnode.engine.types import Sampling

PIECES = [b"hel", b"hell", b"hello", b"dummy", b"other", b"", b""]
ENDS = frozenset({5, 6})
VOCABULARY = Vocabulary(PIECES, ENDS)


def left(chances: dict[int, float]) -> dict[int, float]:
    """The tokens that are left, with their shares."""
    ids = np.array(sorted(chances))
    row = np.full(len(PIECES), -9, np.float32)
    row[6] = -8
    found, weights = narrowed(row, ids, np.array([chances[int(id)] for id in ids]), VOCABULARY)
    assert list(found) == sorted(found)
    return dict(zip(found.tolist(), (weights / weights.sum()).round(3).tolist(), strict=True))


@pytest.mark.parametrize(
    ("chances", "expected"),
    [
        ({0: 0.5, 1: 0.2, 2: 0.1, 3: 0.2}, {0: 1.0}),  # 0.8 for what begins with hel, and 0.2 is below 1/3
        ({0: 0.3, 1: 0.25, 3: 0.45}, {0: 0.55, 3: 0.45}),
        ({1: 0.3, 0: 0.25, 3: 0.45}, {1: 0.55, 3: 0.45}),
        ({0: 0.8, 5: 0.1, 3: 0.1}, {5: 1.0}),  # 3 ends of 0.1 each would weigh more than the others' mean
        ({0: 0.8, 5: 0.2}, {5: 1.0}),
        ({0: 0.9, 3: 0.06, 5: 0.04}, {0: 0.957, 5: 0.043}),  # 0.36 of an end against 0.96: it may still come
        ({3: 0.3, 4: 0.3, 0: 0.4, 5: 0.0}, {0: 0.4, 3: 0.3, 4: 0.3, 5: 0.0}),  # 1 / (3 + 1)
        ({3: 0.22, 4: 0.38, 0: 0.4}, {0: 0.513, 4: 0.487}),
    ],
)
def test_it_keeps_what_is_probable_and_an_end(chances: dict[int, float], expected: dict[int, float]) -> None:
    assert left(chances) == expected


def test_where_nothing_is_probable_the_best_end_comes() -> None:
    vocabulary = Vocabulary([bytes([97 + number]) for number in range(20)] + [b"", b""], frozenset({20, 21}))
    row = np.zeros(22, np.float32)
    row[20], row[21] = -7, -6
    found, _ = narrowed(row, np.arange(20), np.ones(20), vocabulary)
    assert found.tolist() == [21]


def test_the_sampler_draws_from_what_is_left() -> None:
    row = np.log(np.array([0.5, 0.2, 0.1, 0.19, 0.0001, 0.003, 0.001], np.float32))
    drawn = [
        Sampler(Sampling(seed=seed, infill=True), (), vocabulary=VOCABULARY).draw(row, 0, seed) for seed in range(200)
    ]
    assert {one.token for one in drawn if one} <= {0, 5, 6}
    plain = [Sampler(Sampling(seed=seed), (), vocabulary=VOCABULARY).draw(row, 0, seed) for seed in range(200)]
    assert {one.token for one in plain if one} >= {0, 1, 2, 3}
