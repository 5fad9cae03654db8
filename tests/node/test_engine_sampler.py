"""The sampler keeps what its settings say, draws in proportion, and needs only (seed, position) to draw again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.engine.sampler import MAX_SEED, Drawn, Sampler, Vocabulary, candidates, choice_seed, uniform
from llmnode.engine.truncation import place
from llmnode.engine.types import Sampling

LETTERS = Vocabulary([bytes([97 + number]) for number in range(26)], frozenset())


def row_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2.5, size).astype(np.float32)


def vocabulary_of(size: int) -> Vocabulary:
    return Vocabulary([b"%d " % number for number in range(size)], frozenset())


def sampler_of(size: int, logprobs: int | None = None, **fields: object) -> Sampler:
    return Sampler(Sampling(**fields), (), vocabulary=vocabulary_of(size), logprobs=logprobs)  # type: ignore[arg-type]


def draws(row: np.ndarray, positions: range, **fields: object) -> list[int]:
    sampler, best = sampler_of(len(row), **fields), int(row.argmax())
    drawn = [sampler.draw(row, best, position) for position in positions]
    return [one.token for one in drawn if one is not None]


def kept(row: np.ndarray, coin: float = 1.0, **fields: object) -> set[int]:
    ids, weights = candidates(row, float(row.max()), Sampling(**fields), coin)  # type: ignore[arg-type]
    ids = np.arange(len(row)) if ids is None else ids
    assert (np.diff(ids) > 0).all(), "ids must stay in rising order"
    return set(ids[weights > 0].tolist())


def truncated(row: np.ndarray, sampling: Sampling, coin: float) -> dict[int, float]:
    """The chance of each token that is left: what truncation.py says, slowly and in 64 bits."""
    logits = row.astype(np.float64)
    ids = np.argsort(-logits, kind="stable")
    if sampling.top_n_sigma > 0:
        ids = ids[logits[ids] >= logits.max() - sampling.top_n_sigma * logits[np.isfinite(logits)].std()]
    if sampling.top_k > 0:
        ids = ids[: sampling.top_k]

    def shares() -> np.ndarray:
        weights = np.exp((logits[ids] - logits.max()) / sampling.temperature)
        return np.asarray(weights / weights.sum())

    if sampling.typical_p < 1:
        p = shares()
        surprise = -np.log(np.maximum(p, 1e-300))
        order = np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable")
        count = int(np.argmax(np.cumsum(p[order]) > sampling.typical_p)) + 1
        ids = ids[np.sort(order[:count])]
    if sampling.top_p < 1:
        ids = ids[: int(np.argmax(np.cumsum(shares()) >= sampling.top_p)) + 1]
    if sampling.min_p > 0:
        ids = ids[shares() >= sampling.min_p * shares()[0]]
    if coin < sampling.xtc_probability and sampling.xtc_threshold <= 0.5:
        above = int((shares() >= sampling.xtc_threshold).sum())
        ids = ids[max(0, above - 1) :]
    return dict(zip(ids.tolist(), shares().tolist(), strict=True))


def test_temperature_zero_and_top_k_one_take_the_best() -> None:
    row = row_of(5000, 1)
    for fields in ({"temperature": 0.0}, {"top_k": 1, "seed": 9}):
        assert draws(row, range(3), **fields) == [int(row.argmax())] * 3
        assert sampler_of(5000, **fields).plain


def test_whatever_needs_more_than_the_best_token_is_not_plain() -> None:
    assert not sampler_of(9).plain
    for fields in (
        {"repeat_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"dry_multiplier": 0.8},
        {"logit_bias": ((3, 1.0),)},
    ):
        assert not sampler_of(9, temperature=0, **fields).plain
    assert not sampler_of(9, temperature=0, logprobs=0).plain
    assert not sampler_of(9, top_k=1, mirostat=2).plain


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


def test_top_n_sigma_counts_from_the_best_and_over_what_is_not_forbidden() -> None:
    row = np.array([4.0, 2.0, 0.0, -2.0, -np.inf], np.float32)
    deviation = math.sqrt(5)
    assert kept(row, top_n_sigma=1.9 / deviation) == {0}
    assert kept(row, top_n_sigma=2.1 / deviation) == {0, 1}
    assert kept(row, top_n_sigma=2.1 / deviation, temperature=100) == {0, 1}, "the temperature has no part in it"


def test_typical_p_keeps_what_is_as_surprising_as_the_whole() -> None:
    row = np.log(np.array([0.7, 0.1, 0.1, 0.1], np.float32))
    # The entropy is 0.94; the surprises are 0.36 (0.58 away) and 2.3 (1.36 away).
    assert kept(row, typical_p=0.5) == {0}
    row = np.log(np.array([0.4, 0.15, 0.15, 0.15, 0.15], np.float32))
    # The entropy is 1.50: 0.59 away from the best token, 0.39 from the others.
    assert kept(row, typical_p=0.5) == {1, 2, 3, 4}
    assert kept(row, typical_p=0.5, min_p=0.9) == {1, 2, 3, 4}, "the best that is left is the measure"


def test_xtc_drops_the_top_choices_but_the_least_of_them_when_its_coin_says_so() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))
    fields = {"xtc_probability": 0.5, "xtc_threshold": 0.1}
    assert kept(row, 0.49, **fields) == {2, 3, 4}
    assert kept(row, 0.5, **fields) == {0, 1, 2, 3, 4}
    assert kept(row, 0.0, xtc_probability=0.5, xtc_threshold=0.35) == {0, 1, 2, 3, 4}
    assert kept(row, 0.0, xtc_probability=0.5, xtc_threshold=0.51) == {0, 1, 2, 3, 4}
    assert kept(np.zeros(4, np.float32), 0.0, **fields) == {0}


def test_xtc_acts_as_often_as_asked() -> None:
    row = np.log(np.array([0.5, 0.5], np.float32))
    tokens = draws(row, range(4000), xtc_probability=0.3, xtc_threshold=0.1, seed=4)
    # Of two equals the first stays: it is drawn half the time without XTC and always with it.
    assert abs(tokens.count(0) / 4000 - (0.3 + 0.7 / 2)) < 0.03


def test_temperature_comes_before_the_nucleus() -> None:
    row = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    assert kept(row, top_p=0.9, temperature=0.25) == {0}
    assert kept(row, top_p=0.9, temperature=4.0) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(150))
def test_truncations_together_leave_what_one_after_the_other_would(seed: int) -> None:
    dice = np.random.default_rng(seed)
    row = row_of(int(dice.choice([3, 40, 700, 3000])), seed)

    def sometimes(value: float, neutral: float) -> float:
        return float(value) if dice.random() < 0.5 else neutral

    sampling = Sampling(
        temperature=float(dice.uniform(0.3, 2)),
        top_k=int(sometimes(dice.integers(1, 60), 0)),
        top_p=sometimes(dice.uniform(0.05, 1), 1),
        min_p=sometimes(dice.uniform(0, 0.3), 0),
        typical_p=sometimes(dice.uniform(0.05, 1), 1),
        top_n_sigma=sometimes(dice.uniform(0.2, 3), 0),
        xtc_probability=0.5,
        xtc_threshold=float(dice.uniform(0.01, 0.5)),
    )
    coin = float(dice.random())
    expected = truncated(row, sampling, coin)
    ids, weights = candidates(row, float(row.max()), sampling, coin)
    ids = np.arange(len(row)) if ids is None else ids
    assert ids.tolist() == sorted(expected)
    assert np.allclose(weights / weights.sum(), [expected[id] for id in ids.tolist()], rtol=1e-4, atol=1e-7)


@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=40),
    temperature=st.floats(1e-310, 1e6),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0.001, 1),
    top_n_sigma=st.floats(0, 5),
    xtc=st.floats(0, 0.6),
    mirostat=st.integers(0, 2),
    tau=st.floats(0, 30),
    forbidden=st.integers(0, 39),
)
@settings(max_examples=300, deadline=None)
def test_any_settings_draw_a_token_that_is_not_forbidden(
    logits: list[float], forbidden: int, xtc: float, tau: float, **fields: float
) -> None:
    row = np.array(logits, np.float32)
    bias = ((forbidden % len(row), -math.inf),)
    sampling = Sampling(logit_bias=bias, xtc_probability=0.5, xtc_threshold=xtc, mirostat_tau=tau, **fields)  # type: ignore[arg-type]
    sampler = Sampler(sampling, (), vocabulary=vocabulary_of(len(row)))
    for position in range(5):
        drawn = sampler.draw(row, int(row.argmax()), position)
        assert drawn is not None
        assert drawn.token != forbidden % len(row)
        sampler.accept(drawn.token, row)


def test_draws_follow_the_distribution() -> None:
    chances = np.array([0.5, 0.25, 0.15, 0.1])
    row = np.log(chances).astype(np.float32)
    shares = np.bincount(draws(row, range(20_000), seed=3), minlength=4) / 20_000
    assert np.abs(shares - chances).max() < 0.02


def test_a_draw_never_falls_on_a_token_without_a_chance() -> None:
    dice = np.random.default_rng(0)
    for _ in range(300):
        weights = (dice.random(1000) ** 3).astype(np.float32)
        for start in range(0, 1000, 256):  # the sums are made in blocks of 256, and rounded
            weights[start + int(dice.integers(20, 230)) : start + 256] = 0
        cumulative = np.cumsum(np.add.reduceat(weights, range(0, 1000, 256), dtype=np.float64))
        for border in cumulative / cumulative[-1]:
            for share in (np.nextafter(border, 0), border, np.nextafter(border, 1)):
                if share < 1:
                    assert weights[place(weights, share)] > 0


def test_the_same_seed_and_position_draw_the_same_token_whatever_came_before() -> None:
    row = row_of(32064)
    once = draws(row, range(50), seed=5)
    sampler, best = sampler_of(32064, seed=5), int(row.argmax())
    back = [sampler.draw(row, best, position) for position in reversed(range(50))]
    assert back[::-1] == [Drawn(token, None) for token in once]
    assert once != draws(row, range(50), seed=6)
    assert len(set(once)) > 25


def test_numbers_of_neighbouring_seeds_positions_and_attempts_are_independent() -> None:
    table = np.array([[[uniform(s, p, a) for a in range(3)] for p in range(100)] for s in range(100)])
    assert 0.48 < table.mean() < 0.52
    for one, two in ((table[:-1], table[1:]), (table[:, :-1], table[:, 1:]), (table[..., :-1], table[..., 1:])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.05
    assert len(np.unique(table)) == table.size


def test_choices_have_seeds_of_their_own_and_the_first_has_the_requests() -> None:
    for seed in (0, 7, MAX_SEED):
        seeds = [choice_seed(seed, index) for index in range(128)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 128
        assert all(0 <= one <= MAX_SEED for one in seeds)


@pytest.mark.parametrize("mirostat", [1, 2])
@pytest.mark.parametrize("tau", [3.5, 5.0])
def test_mirostat_holds_the_mean_surprise_at_its_target(mirostat: int, tau: float) -> None:
    # Zipf's law with an exponent of 1.1: 7.9 bits a token, and no less than 2.7 for any.
    logits = (-1.1 * np.log(np.arange(1, 5001))).astype(np.float32)
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    sampler = sampler_of(5000, mirostat=mirostat, mirostat_tau=tau, seed=1)
    surprises = []
    for position in range(1500):
        drawn = sampler.draw(logits, 0, position)
        assert drawn is not None
        sampler.accept(drawn.token, logits)
        surprises.append(-math.log2(chances[drawn.token]))
    assert abs(np.mean(surprises[200:]) - tau) < 0.1


def test_mirostat_2_drops_what_is_more_surprising_than_mu() -> None:
    row = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    assert set(draws(row, range(300), mirostat=2, mirostat_tau=0.45)) == {0}, "mu is twice the target: 0.9 bits"
    assert set(draws(row, range(300), mirostat=2, mirostat_tau=1.05)) == {0, 1}
    assert set(draws(row, range(300), mirostat=2, mirostat_tau=0.01)) == {0}, "the best always stays"
    assert set(draws(row, range(300), mirostat=2, mirostat_tau=1.55)) == {0, 1, 2, 3}


def test_mirostat_takes_the_surprise_of_the_logits_that_the_token_was_drawn_from() -> None:
    row = np.array([0, 0, -0.3], np.float32)
    sampler = sampler_of(3, mirostat=2, mirostat_tau=1.0, mirostat_eta=1.0, presence_penalty=20.0)
    # 1.45 bits: mu goes from 2 to 1.55, and both others, of 0.8 and 1.2 bits then, may follow.
    sampler.accept(0, row)
    following = {drawn.token for position in range(100) if (drawn := sampler.draw(row, 0, position)) is not None}
    assert following == {1, 2}


def test_mirostat_replaces_the_truncations_and_is_off_without_a_temperature() -> None:
    row = row_of(200)
    assert len(set(draws(row, range(300), mirostat=2, mirostat_tau=6, top_k=1, min_p=1.0))) > 5
    sampler = sampler_of(200, mirostat=2, temperature=0)
    assert sampler.plain
    sampler.accept(3)
    with pytest.raises(ValueError, match="Mirostat needs the logits"):
        sampler_of(200, mirostat=2).accept(3)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = row_of(5000, 3)
    exact = row.astype(np.float64) - math.log(np.exp(row.astype(np.float64)).sum())
    best = int(row.argmax())
    sampler = sampler_of(5000, logprobs=5, temperature=0.2, top_k=3, logit_bias=((best, -math.inf), (17, 90.0)))
    drawn = sampler.draw(row, best, 0)
    assert drawn is not None and drawn.logprob is not None
    assert drawn.token == drawn.logprob.token == 17
    assert drawn.logprob.logprob == pytest.approx(exact[17], abs=1e-4)
    order = np.argsort(-row, kind="stable")[:5]
    assert [id for id, _ in drawn.logprob.top] == order.tolist()
    assert [value for _, value in drawn.logprob.top] == pytest.approx(exact[order].tolist(), abs=1e-4)


def test_logprobs_of_none_is_no_report_and_of_zero_one_without_others() -> None:
    row = row_of(50)
    best = int(row.argmax())
    bare = sampler_of(50, temperature=0).draw(row, best, 0)
    own = sampler_of(50, temperature=0, logprobs=0).draw(row, best, 0)
    assert bare == Drawn(best, None)
    assert own is not None and own.logprob is not None and own.logprob.top == ()
    many = sampler_of(50, temperature=0, logprobs=20).draw(np.zeros(7, np.float32), 0, 0)
    assert many is not None and many.logprob is not None
    assert many.logprob.top == tuple((id, pytest.approx(-math.log(7))) for id in range(7))


def test_a_row_without_numbers_gives_no_token() -> None:
    bad = np.full(100, np.nan, np.float32)
    some = row_of(100)
    some[40] = np.nan
    for row in (bad, some, np.full(100, -np.inf, np.float32), np.full(100, np.inf, np.float32)):
        for fields in ({"temperature": 0}, {}, {"repeat_penalty": 1.2}):
            assert sampler_of(100, **fields).draw(row, int(row.argmax()), 0) is None


def test_a_row_is_never_written_to() -> None:
    row = row_of(26)
    row.flags.writeable = False
    sampler = Sampler(
        Sampling(repeat_penalty=1.3, frequency_penalty=0.5, dry_multiplier=1, logit_bias=((1, 2.0),), mirostat=1),
        (1, 2, 3, 1, 2),
        vocabulary=LETTERS,
        logprobs=3,
    )
    for position in range(10):
        drawn = sampler.draw(row, int(row.argmax()), position)
        assert drawn is not None
        sampler.accept(drawn.token, row)
