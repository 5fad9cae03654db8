"""Guesses come from earlier text, their chance is known before any was made, and only those that pay are made."""

from __future__ import annotations

import random
from array import array

from llmnode.engine.lookup import Lookup
from llmnode.engine.pace import Pace


def lookup_of(tokens: list[int]) -> tuple[Lookup, array[int]]:
    held = array("i", tokens)
    lookup = Lookup(held)
    lookup.advance()
    return lookup, held


def test_what_stood_after_the_last_tokens_is_guessed() -> None:
    lookup, _ = lookup_of([1, 2, 3, 4, 5, 6, 9, 2, 3])
    assert lookup.draft(3).tolist() == [4, 5, 6]
    assert lookup.draft(0).tolist() == []


def test_the_longer_match_is_believed_before_the_later_one() -> None:
    lookup, _ = lookup_of([7, 8, 1, 2, 50, 9, 9, 1, 2, 60, 7, 8, 1, 2])
    assert lookup.draft(1).tolist() == [50]


def test_a_loop_is_gone_round_again() -> None:
    lookup, _ = lookup_of([1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert lookup.draft(7).tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_text_that_repeats_nothing_has_no_guess_and_no_chance() -> None:
    lookup, tokens = lookup_of(list(range(100)))
    assert lookup.chance == 0.0
    assert lookup.draft(5).tolist() == []
    tokens.append(1000)
    lookup.advance()
    assert lookup.chance == 0.0


def test_the_chance_follows_how_often_guesses_would_have_been_right() -> None:
    lookup, tokens = lookup_of([*range(200), 0, 1])
    for token in range(2, 60):
        tokens.append(token)
        lookup.advance()
    assert lookup.chance > 0.95
    dice = random.Random(1)
    for _ in range(60):
        tokens.extend((dice.randrange(3), dice.randrange(3)))
        lookup.advance()
    assert lookup.fresh < 0.6


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    lookup, _ = lookup_of([*range(3000), 5, 6])
    calls = 1
    while not lookup.chance:
        lookup.advance()
        calls += 1
        assert calls < 10
    assert calls == 3
    assert lookup.draft(2).tolist() == [7, 8]


def pace(parted: bool = False) -> Pace:
    return Pace(0.1, grace_s=10, tolerance=10, slowest_tps=2, parted=parted)


def test_a_guess_pays_from_the_chance_at_which_it_brings_more_than_it_takes() -> None:
    costly, cheap = pace(), pace()
    for tokens in (1, 2, 4, 8) * 10:
        costly.record(tokens, 0, 0.010 + 0.010 * tokens)
        cheap.record(tokens, 0, 0.010 + 0.0001 * tokens)
    assert abs(costly.worth(1) - 1.1 * 0.010 / 0.020) < 0.01
    assert cheap.worth(1) < 0.02
    assert costly.worth(8) > costly.worth(1)


def test_prompts_hold_up_running_answers_for_the_stall_target_and_not_longer() -> None:
    learnt = pace()
    assert learnt.prefill_limit(0, 512) == 512
    assert learnt.prefill_limit(4, 512) == 65
    for _ in range(20):
        learnt.record(4, 0, 0.02)
        learnt.record(4, 100, 0.02 + 100 * 0.0005)
    assert learnt.prefill_limit(4, 512) == 193, "200 fit, and 192 and one are whole tiles"
    assert abs(learnt.seconds(4, 100) - 0.07) < 0.01
    for _ in range(20):
        learnt.record(4, 50, 0.02 + 50 * 0.002)
    assert learnt.prefill_limit(4, 512) == 65, "a whole tile of rows rather than 50 tokens"
    for _ in range(40):
        learnt.record(4, 20, 0.02 + 20 * 0.02)
    assert learnt.prefill_limit(4, 512) == 5
    assert learnt.prefill_limit(4, 4) == 4
    for _ in range(40):
        learnt.record(4, 1, 5.0)
    assert learnt.prefill_limit(4, 512) == 1


def test_a_pass_over_the_weights_is_not_taken_for_what_a_prompts_tokens_cost() -> None:
    """In a parted cache a prompt needs one of its own, which is as long as the stall may be here."""
    learnt = pace(parted=True)
    for tokens in (1, 4, 8) * 10:
        learnt.record(tokens, 0, 0.1 + 0.01 * tokens)
    sizes = []
    for _ in range(50):
        sizes.append(learnt.prefill_limit(4, 512))
        learnt.record(4, sizes[-1], 2 * 0.1 + 4 * 0.01 + sizes[-1] * 0.02)
    assert sizes[0] == 65 and set(sizes[1:]) <= {14, 15}, "three times as long as the pass, and never fewer"
    assert abs(learnt.seconds(4, 15) - 0.54) < 0.02
    assert abs(learnt.seconds(0, 15) - 0.40) < 0.02


def test_a_prompt_gets_fewer_tokens_the_more_it_has_behind_it() -> None:
    learnt = pace()

    def cost(tokens: int, start: int) -> float:
        return tokens * (0.0002 + 1e-7 * (start + tokens / 2))

    for start in (0, 500, 1000):
        learnt.record(4, 500, cost(500, start), start + 250)
    for start in (0, 1000, 4000, 16000):
        tokens = learnt.prefill_limit(4, 512, start)
        assert tokens == 512 or tokens % 64 == 1
        assert tokens == 65 or cost(tokens, start) <= 0.103
        assert tokens == 512 or cost(tokens + 64, start) > 0.097
    limits = [learnt.prefill_limit(4, 512, start) for start in (0, 1000, 2000, 4000)]
    assert limits == sorted(limits, reverse=True) and limits[0] > 2 * limits[-1]


def test_a_step_is_due_after_what_it_should_take() -> None:
    learnt = pace()
    assert learnt.due(2, 40) == 10 + 10 * (2 / 2 + 40 / 2)
    learnt.record(0, 40, 4.0)
    for _ in range(3):
        learnt.record(2, 0, 0.5)
    assert abs(learnt.due(2, 40) - (10 + 10 * (0.5 + 4.0))) < 1e-6
