"""Penalties change the logits that they should, by the amount that they should, whatever the way the answer came."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.engine.penalties import Dry, Penalties, Tally, Vocabulary
from llmnode.engine.types import Sampling
from llmnode.wire.errors import InvalidRequest

PIECES = [b"a", b"b", b"c", b"d", b" ", b"\n", b": ", b"en", b"d!", b"", b""]
TOKENS = Vocabulary(PIECES, frozenset({10}))
SIZE = len(PIECES)
ROW = np.random.default_rng(1).normal(0, 3, SIZE).astype(np.float32)

CHUNKS = [(0,), (0,), (1,), (2, 3), (4, 1), (7, 8), (7, 8, 0), (5,), (6,), (9,), (10,)]

tokens = st.lists(st.integers(0, SIZE - 1), max_size=30)


def altered(prompt: Sequence[int], answer: Sequence[int], **fields: object) -> np.ndarray:
    penalties = Penalties(Sampling(**fields), tuple(prompt), TOKENS)  # type: ignore[arg-type]
    for token in answer:
        penalties.accept(token)
    return penalties.applied(ROW)


def repetitions(text: Sequence[int], sampling: Sampling) -> dict[int, float]:
    """DRY by its definition: for each earlier place, how far it and the end agree backwards, up to the last break."""
    breakers = [breaker.encode() for breaker in sampling.dry_breakers]
    first = 0
    for at, token in enumerate(text):
        start = max((i for i in range(at + 1) if not PIECES[text[i]]), default=-1) + 1
        before = b"".join(PIECES[t] for t in text[start:at])
        here = before + PIECES[token]
        ends = [i + len(b) for b in breakers for i in range(len(here)) if here[i:].startswith(b)]
        if not PIECES[token] or any(end > len(before) for end in ends):
            first = at + 1
    window = list(text) if sampling.dry_last_n < 0 else list(text)[max(0, len(text) - sampling.dry_last_n) :]
    limit = len(text) - first
    longest: dict[int, int] = {}
    for end in range(len(window) - 1):
        length = 0
        while length <= end and length < limit and window[end - length] == window[-1 - length]:
            length += 1
        if length >= sampling.dry_allowed_length:
            longest[window[end + 1]] = max(length, longest.get(window[end + 1], 0))
    return {
        token: sampling.dry_multiplier * sampling.dry_base ** (length - sampling.dry_allowed_length)
        for token, length in longest.items()
        if PIECES[token] and not any(breaker in PIECES[token] for breaker in breakers)
    }


def test_nothing_to_do_leaves_the_row_itself() -> None:
    penalties = Penalties(Sampling(), (1, 2), TOKENS)
    assert not penalties.active
    assert penalties.applied(ROW) is ROW
    assert Penalties(Sampling(frequency_penalty=1.0), (1, 2), TOKENS).applied(ROW) is ROW, "nothing was said yet"


def test_bias_is_added_and_minus_infinity_forbids() -> None:
    row = altered((), (), logit_bias=((2, 1.5), (3, -np.inf), (2, 1.0)))
    assert row[2] == ROW[2] + np.float32(2.5)
    assert row[3] == -np.inf
    assert (np.delete(row, [2, 3]) == np.delete(ROW, [2, 3])).all()


def test_bias_on_a_token_that_does_not_exist_is_refused() -> None:
    for token in (-1, SIZE):
        with pytest.raises(InvalidRequest, match=f"logit_bias names the token {token}; ids are from 0 to 10") as error:
            altered((), (), logit_bias=((token, 1.0),))
        assert error.value.param == "logit_bias"


@given(tokens, tokens, st.integers(-1, 12), st.floats(0.5, 2))
def test_the_repeat_penalty_sees_the_last_of_prompt_and_answer(
    prompt: list[int], answer: list[int], span: int, penalty: float
) -> None:
    row = altered(prompt, answer, repeat_penalty=penalty, repeat_last_n=span)
    said = prompt + answer
    recent = set(said if span < 0 else said[max(0, len(said) - span) :])
    for token, (new, old) in enumerate(zip(row, ROW, strict=True)):
        expected = (old / np.float32(penalty) if old > 0 else old * np.float32(penalty)) if token in recent else old
        assert new == expected


@given(tokens, tokens, st.floats(-2, 2), st.floats(-2, 2))
def test_frequency_and_presence_penalties_see_the_answer_alone(
    prompt: list[int], answer: list[int], frequency: float, presence: float
) -> None:
    row = altered(prompt, answer, frequency_penalty=frequency, presence_penalty=presence)
    for token, count in Counter(answer).items():
        assert row[token] == pytest.approx(ROW[token] - count * frequency - presence, abs=1e-4)
    others = [token for token in range(SIZE) if token not in answer]
    assert (row[others] == ROW[others]).all()


def test_bias_comes_before_the_repeat_penalty_and_that_before_the_others() -> None:
    row = altered((), (0,), logit_bias=((0, 100.0),), repeat_penalty=2.0, frequency_penalty=1.0, presence_penalty=0.5)
    assert row[0] == pytest.approx((ROW[0] + 100) / 2 - 1.5)


@given(st.lists(st.integers(0, 40), max_size=200), st.integers(0, 20), st.sampled_from([-1, 0, 1, 3, 50]))
def test_a_tally_counts_what_is_in_its_window(stream: list[int], begun: int, span: int) -> None:
    tally = Tally(stream[:begun], span)
    for token in stream[begun:]:
        tally.accept(token)
    window = stream if span < 0 else stream[max(0, len(stream) - span) :]
    assert dict(zip(tally.ids.tolist(), tally.counts.tolist(), strict=True)) == Counter(window)


@given(
    text=st.lists(st.sampled_from(CHUNKS), max_size=25),
    cut=st.integers(0, 40),
    base=st.sampled_from([1.0, 1.1, 1.75]),
    allowed=st.integers(0, 4),
    last=st.sampled_from([-1, 0, 1, 2, 5, 20]),
    breakers=st.sampled_from([(), ("\n",), ("\n", ":", "end"), (" b", "d!"), ("a",), ("nd",)]),
)
@settings(max_examples=400)
def test_dry_is_what_its_definition_says_wherever_the_prompt_ends(
    text: list[tuple[int, ...]], cut: int, base: float, allowed: int, last: int, breakers: tuple[str, ...]
) -> None:
    sampling = Sampling(
        dry_multiplier=0.8, dry_base=base, dry_allowed_length=allowed, dry_last_n=last, dry_breakers=breakers
    )
    tokens = list(itertools.chain(*text))
    dry = Dry(sampling, tokens[:cut], PIECES)
    for token in tokens[cut:]:
        dry.accept(token)
    assert dry.penalties() == pytest.approx(repetitions(tokens, sampling))


def test_dry_takes_from_the_token_that_would_go_on() -> None:
    # "abc" was followed by "d", and the end is "abc" again: three tokens, one more than allowed.
    penalty = ROW - altered((0, 1, 2, 3), (0, 1, 2), dry_multiplier=0.8)
    assert penalty[3] == pytest.approx(0.8 * 1.75, abs=1e-5)
    assert (np.delete(penalty, 3) == 0).all()


def test_dry_never_keeps_an_answer_from_ending() -> None:
    turn = [0, 1, 2, 10]
    assert Dry(Sampling(dry_multiplier=1.0), [*turn, 9, *turn[:3]], PIECES).penalties() == {}


def test_a_breaker_counts_across_the_borders_of_tokens() -> None:
    text = [7, 8, 0, 1, 7, 8, 0, 1]  # "end!abend!ab"
    sampling = Sampling(dry_multiplier=1.0, dry_allowed_length=1)
    assert Dry(sampling, text, PIECES).penalties()[7] == pytest.approx(1.75**3)
    broken = Sampling(dry_multiplier=1.0, dry_allowed_length=1, dry_breakers=("end",))
    assert Dry(broken, text, PIECES).penalties()[7] == pytest.approx(1.75)
    begun = Dry(broken, text[:5], PIECES)
    for token in text[5:]:
        begun.accept(token)
    assert begun.penalties()[7] == pytest.approx(1.75)


def test_a_penalty_of_dry_stays_a_number_however_long_the_repetition() -> None:
    penalty = Dry(Sampling(dry_multiplier=0.8, dry_base=8.0), [0] * 3000, PIECES).penalties()
    assert 1e6 <= penalty[0] <= 1e7
    row = altered([0] * 3000, (), dry_multiplier=0.8, dry_base=8.0)
    assert np.isfinite(row).all()


@pytest.mark.parametrize("base", [1.0, 1.0000000000000002, 1.75])
def test_a_penalty_of_dry_may_be_as_small_as_a_float_can_be(base: float) -> None:
    dry = Dry(Sampling(dry_multiplier=5e-324, dry_base=base), [1, 2, 3] * 5, [b"", b"a", b"b", b"c"])
    assert set(dry.penalties()) == {1}
