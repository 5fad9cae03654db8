"""The sampler keeps what its settings say, draws in proportion, and needs only (seed, position) to draw again."""

from __future__ import annotations

import numpy as np
import pytest

from llmnode.engine.sampler import candidates, choose, uniform
from llmnode.engine.types import Sampling


def row_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2.5, size).astype(np.float32)


def kept(row: np.ndarray, **settings: float) -> set[int]:
    ids, _ = candidates(row, float(row.max()), Sampling(**settings))
    return set(range(len(row))) if ids is None else set(ids.tolist())


def test_temperature_zero_and_top_k_one_take_the_best() -> None:
    rows = np.stack([row_of(5000, 1), row_of(5000, 2)])
    draws = [(Sampling(temperature=0), 0), (Sampling(top_k=1, seed=9), 5)]
    assert choose(rows, draws) == rows.argmax(axis=1).tolist()


@pytest.mark.parametrize("size", [7, 300, 5000, 32064, 151_936])
@pytest.mark.parametrize("k", [2, 40, 1000])
def test_top_k_keeps_the_k_largest(size: int, k: int) -> None:
    row = row_of(size, k)
    best = set(np.argsort(-row)[:k].tolist())
    assert kept(row, top_k=k) == best


def test_top_k_keeps_the_lowest_ids_of_equals() -> None:
    row = np.zeros(10_000, np.float32)
    row[[77, 5000, 9999]] = 1
    assert kept(row, top_k=5) == {0, 1, 77, 5000, 9999}


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("size", [50, 32064])
def test_top_p_keeps_the_fewest_that_make_up_p(size: int, top_p: float, spread: float) -> None:
    row = row_of(size) * np.float32(spread)
    order = np.argsort(-row.astype(np.float64))
    chances = np.exp(row[order].astype(np.float64) - row.max())
    chances /= chances.sum()
    wanted = int(np.searchsorted(np.cumsum(chances), top_p)) + 1
    got = kept(row, top_p=top_p)
    # Sums of 32-bit weights differ in the last digits, so flat logits may move the border by a few tokens.
    assert abs(len(got) - wanted) <= max(1, size // 2000)
    assert got == set(np.argsort(-row, kind="stable")[: len(got)].tolist())


def test_min_p_drops_what_is_less_than_its_share_of_the_best() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert kept(row, min_p=0.29) == {0, 1, 2}
    assert kept(row, min_p=0.31) == {0, 1}


def test_temperature_comes_before_the_nucleus() -> None:
    row = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    assert kept(row, top_p=0.9, temperature=0.25) == {0}
    assert kept(row, top_p=0.9, temperature=4.0) == {0, 1, 2}


def test_draws_follow_the_distribution() -> None:
    chances = np.array([0.5, 0.25, 0.15, 0.1])
    row = np.log(chances).astype(np.float32)
    drawn = [choose(row[None], [(Sampling(seed=3), position)])[0] for position in range(20_000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.abs(shares - chances).max() < 0.02


def test_the_same_seed_and_position_draw_the_same_token_whatever_came_before() -> None:
    row = row_of(32064)[None]
    once = [choose(row, [(Sampling(seed=5), position)])[0] for position in range(50)]
    back = [choose(row, [(Sampling(seed=5), position)])[0] for position in reversed(range(50))]
    assert once == back[::-1]
    assert once != [choose(row, [(Sampling(seed=6), position)])[0] for position in range(50)]
    assert len(set(once)) > 25


def test_neighbouring_seeds_and_positions_draw_independently() -> None:
    table = np.array([[uniform(seed, position) for position in range(100)] for seed in range(100)])
    assert 0.48 < table.mean() < 0.52
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.05
    assert len(np.unique(table)) == table.size


def test_a_row_without_numbers_gives_no_token_and_spares_the_others() -> None:
    rows = np.stack([row_of(100), np.full(100, np.nan, np.float32)])
    assert choose(rows, [(Sampling(temperature=0), 0)] * 2) == [int(rows[0].argmax()), None]
