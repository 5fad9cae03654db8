"""The cost rule by table: figures, who wins and why; and what a gate predicts between two reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgate.core import cost, prediction
from llmgate.core.candidate import Candidate
from llmgate.core.cost import Cost
from llmgate.core.fleet import Begun, Dispatched, Event, Finished, Fleet, Lost, Reported, Told
from llmgate.core.policy import COLD, COLD_S, NEAR, NEAR_S, Ask, Draw, prefix
from llmgate.core.prediction import PREDICTED_S, Sent
from llmgate.listing import Address
from llmnode.wire.chain import BLOCK, Chain
from tests.gate.fleets import NOW, ask, chain_of, choice, fleet, names, report, reported

SYSTEM = "system " * 500
LONG = "word " * 1297
ASK = ask(LONG, system=SYSTEM)
"""10,007 bytes: 2,502 tokens, 39 blocks, of which 13 are the system's."""
HELD = chain_of(LONG, system=SYSTEM)


def sent(name: str, asked: Ask = ASK, made: Fleet | None = None, now: float = NOW, request: str = "r") -> Dispatched:
    """The dispatch of a request to a node, as the gate would make it."""
    chosen = choice(made or fleet(name), asked, "prefix", now)
    candidate = next(c for c in chosen.ranked if c.name == name)
    return Dispatched(name, now, chosen.sent(candidate, request, now))


def cost_of(made: Fleet, name: str = "a", asked: Ask = ASK, now: float = NOW) -> Cost:
    found = next(c for c in choice(made, asked, "prefix", now).ranked if c.name == name).cost
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("event", "wait_s", "backlog", "cached", "seconds"),
    [
        (reported("a"), 0, 0, 0, 2.502),
        (reported("a", HELD), 0, 0, 2496, 0.006),
        (reported("a", HELD, prefill_tps=0.0), 0, 0, 2496, 0.006),
        (reported("a", HELD, prefill_tps=100.0), 0, 0, 2496, 0.060),
        (reported("a", queued_prompt_tokens=500), 0, 500, 0, 3.002),
        # 5 bytes a token: fewer tokens of the same bytes.
        (reported("a", HELD, bytes_per_token=5.0), 0, 0, 1996, 0.006),
        (reported("a", HELD, bytes_per_token=0.0), 0, 0, 2496, 0.006),
        # What it says of waiting counts only while it has no slot.
        (reported("a", HELD, running=3, wait_s=9.0), 0, 0, 2496, 0.006),
        (reported("a", HELD, running=4, wait_s=1.5), 1.5, 0, 2496, 1.506),
        (reported("a", HELD, running=4, waiting=3, wait_s=4.0), 4.0, 0, 2496, 4.006),
    ],
)
def test_a_cost_is_the_wait_and_what_is_to_be_computed(
    event: Reported, wait_s: float, backlog: int, cached: int, seconds: float
) -> None:
    found = cost_of(fleet("a", events=(event,)))
    assert (found.wait_s, found.backlog, found.cached) == (wait_s, backlog, cached)
    assert found.seconds == pytest.approx(seconds, abs=0.001)


def test_a_node_that_says_nothing_of_itself_costs_what_is_assumed() -> None:
    found = cost_of(fleet("a", events=(reported("a", prefill_tps=0.0, bytes_per_token=0.0),)))
    assert found.prefill_tps == cost.PREFILL_TPS
    assert found.prompt == -(-HELD.size // cost.BYTES_PER_TOKEN)


@pytest.mark.parametrize(
    ("running", "dispatched", "wait_s"),
    [
        (0, 3, 0.0),
        (0, 4, 1.0),  # four took the slots, so this one waits for the first to end
        (0, 6, 3.0),
        (3, 1, 1.0),
        (4, 0, 2.0),  # the report speaks for this one
        (4, 2, 4.0),
    ],
)
def test_dispatches_since_the_report_make_the_next_one_wait(running: int, dispatched: int, wait_s: float) -> None:
    wait = 2.0 if running == 4 else 0.0
    made = fleet("a", events=(reported("a", running=running, wait_s=wait), *[Dispatched("a", NOW)] * dispatched))
    assert cost_of(made).wait_s == wait_s


@pytest.mark.parametrize(
    ("events", "order", "reason"),
    [
        # Somebody holds it.
        ((reported("a", HELD),), "ab", "held"),
        ((reported("b", HELD),), "ba", "held"),
        # A part of it is better than nothing, all of it better than a part.
        ((reported("a", chain_of(system=SYSTEM)),), "ab", "held"),
        ((reported("a", chain_of(system=SYSTEM)), reported("b", HELD)), "ba", "held"),
        # The holder is busy: 2 s of waiting are less than 2.5 s of prefill, 3 s are more.
        ((reported("a", HELD, running=4, wait_s=1.8),), "ab", "held"),
        ((reported("a", HELD, running=4, wait_s=3.2),), "ba", "moved"),
        # It has more to compute first than the prompt has tokens.
        ((reported("a", HELD, queued_prompt_tokens=4000),), "ba", "moved"),
        # It would take longer, but not by more than the figures are out: what is held need not be computed again.
        ((reported("a", HELD, queued_prompt_tokens=2600),), "ab", "held"),
        ((reported("b", HELD, queued_prompt_tokens=2600),), "ba", "held"),
        # The other one is ten times as fast.
        ((reported("a", HELD, running=4, wait_s=1.0), reported("b", prefill_tps=10_000.0)), "ba", "moved"),
        # Cold, and one of them is three times as fast.
        ((reported("a", prefill_tps=3000.0),), "ab", "cold"),
        ((reported("b", prefill_tps=3000.0),), "ba", "cold"),
        # Cold, and one has no slot.
        ((reported("a", running=4, wait_s=9.0),), "ba", "cold"),
        # Cold, and one has as much to compute first: that is no matter of speed.
        ((reported("a", queued_prompt_tokens=2000),), "ba", "cold"),
        ((reported("b", queued_prompt_tokens=2000),), "ab", "cold"),
        # Cold, and the busy one is so much faster that it is there first.
        ((reported("a", queued_prompt_tokens=20_000, prefill_tps=1e4), reported("b", prefill_tps=400.0)), "ab", "cold"),
        ((reported("b", queued_prompt_tokens=20_000, prefill_tps=1e4), reported("a", prefill_tps=400.0)), "ba", "cold"),
    ],
)
def test_the_cheapest_wins(events: tuple[Event, ...], order: str, reason: str) -> None:
    made = choice(fleet("a", "b", events=events), ASK)
    assert (names(made), made.reason) == (list(order), reason)


@given(
    st.lists(
        st.builds(
            Cost,
            wait_s=st.sampled_from([0.0, 0.5, 10.0]),
            backlog=st.integers(0, 10_000),
            prompt=st.just(3000),
            cached=st.integers(0, 3000) | st.just(0),
            prefill_tps=st.floats(1.0, 1e5),
            depth=st.just(0),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**64 - 1),
)
def test_whatever_they_cost_all_are_ranked_and_the_first_is_a_good_one(costs: list[Cost], root: int) -> None:
    candidates = [Candidate(str(n), 0, 4, 4096, 0, cost=one) for n, one in enumerate(costs)]
    ranking = prefix(candidates, Draw(root, root, 0))
    assert sorted(c.name for c in ranking.order) == [c.name for c in candidates]
    ratio, slack = (COLD, COLD_S) if ranking.reason == "cold" else (NEAR, NEAR_S)
    lowest = min(one.seconds for one in costs)
    assert ranking.order[0].seconds <= max(ratio * lowest, lowest + slack)


def test_gates_that_know_nothing_of_each_other_send_what_begins_alike_the_same_way() -> None:
    made = fleet("a", "b", "c")
    first = {names(choice(made, ask(f"question {number}", system=SYSTEM)))[0] for number in range(30)}
    assert len(first) == 1
    systems = {names(choice(made, ask("question", system=f"{number} {SYSTEM}")))[0] for number in range(30)}
    assert systems == {"a", "b", "c"}


def test_a_short_beginning_that_one_node_holds_does_not_gather_everybody_there() -> None:
    """What is left to compute is about the same at each."""
    held = chain_of(system="system " * 50)
    made = fleet("a", "b", events=(reported("a", held), reported("b")))
    asked = [ask(f"{number} {LONG}", system="system " * 50) for number in range(30)]
    assert all(choice(made, one).ranked for one in asked)
    assert cost_of(made, "a", asked[0]).cached and not cost_of(made, "b", asked[0]).cached
    assert {names(choice(made, one))[0] for one in asked} == {"a", "b"}


def test_those_that_come_after_come_by_their_cost() -> None:
    waits = {"a": 9.0, "b": 5.0, "c": 7.0}
    made = fleet("a", "b", "c", "d", events=tuple(reported(n, running=4, wait_s=wait) for n, wait in waits.items()))
    assert names(choice(made, ASK)) == ["d", "b", "c", "a"]


def test_one_candidate_needs_no_reason() -> None:
    made = choice(fleet("a", "b", events=(Lost("b", "gone", NOW),)), ASK)
    assert made.why == "prefix (only): a 0/4 (2.502 s, 0 of 2502 cached); not b (gone)"


def test_speeds_that_waver_do_not_move_a_cold_prompt() -> None:
    """Its next turn would look for it where the hash says."""
    turns = [ask(f"{number} " + LONG) for number in range(20)]
    even = fleet("a", "b", "c")
    uneven = even.apply(reported("a", prefill_tps=1500.0)).apply(reported("c", prefill_tps=900.0))
    homes = [names(choice(even, turn))[0] for turn in turns]
    assert [names(choice(uneven, turn))[0] for turn in turns] == homes
    assert len(set(homes)) == 3


def test_cold_prompts_go_where_their_root_says_but_past_crowded_nodes() -> None:
    made = fleet("a", "b", "c")
    home, second, _ = names(choice(made, ASK))
    assert names(choice(made, ask(LONG, "answer", "more", system=SYSTEM)))[0] == home
    crowded = made.apply(reported(home, running=2)).apply(reported(second, running=2))
    assert names(choice(crowded, ASK))[0] not in (home, second)
    # All equally busy: nobody is above the mean.
    for name in "abc":
        crowded = crowded.apply(reported(name, running=2))
    assert names(choice(crowded, ASK))[0] == home


def test_equal_holders_share_conversations_by_their_roots() -> None:
    questions = [ask(f"question {number}", system=SYSTEM) for number in range(30)]
    held = chain_of(system=SYSTEM)
    made = fleet("a", "b", events=(reported("a", held), reported("b", held)))
    assert {names(choice(made, question))[0] for question in questions} == {"a", "b"}


def test_weights_share_out_cold_prompts() -> None:
    made = fleet(Address("a", "http://a", weight=3.0), "b")
    won = sum(names(choice(made, ask(f"{number} x")))[0] == "a" for number in range(2000))
    assert 0.70 < won / 2000 < 0.80


def test_a_dispatch_is_work_until_it_ends_or_a_report_counts_it() -> None:
    made = fleet("a")
    backlog = []
    first, second = sent("a", now=NOW + 0.1, request="1"), sent("a", now=NOW + 0.2, request="2")
    assert first.sent and second.sent
    for event in (
        first,  # 2502: not reported yet
        second,  # 5004
        Begun("a", first.sent),  # 2502: it is computed once its answer begins
        Finished("a", first.sent, 0),  # 2502
        Reported("a", report(queued_prompt_tokens=3000), NOW + 1),  # 3000: the report counts the second one
        Begun("a", second.sent),  # 0
        Finished("a", second.sent, 0),  # 0
        Reported("a", report(queued_prompt_tokens=7), NOW + 2),  # 7: of others
    ):
        made = made.apply(event)
        backlog.append(made.nodes["a"].backlog)
    assert backlog == [2502, 5004, 2502, 2502, 3000, 0, 0, 7]


@pytest.mark.parametrize(
    ("running", "queued", "left"),
    [
        (1, 3000, 0),  # all that runs is ours, and so are tokens that were not foreseen
        (1, 7, 0),  # most of it was done when the report came
        (2, 3000, 498),  # others' stay
        (2, 7, 0),
    ],
)
def test_what_a_report_counts_is_over_once_its_answer_begins(running: int, queued: int, left: int) -> None:
    gone = sent("a", now=NOW + 0.1)
    assert gone.sent
    counted = Reported("a", report(queued_prompt_tokens=queued, running=running), NOW + 1)
    made = fleet("a", events=(gone, counted))
    assert made.nodes["a"].backlog == queued
    assert made.apply(Begun("a", gone.sent)).nodes["a"].backlog == left


def test_what_a_node_tells_with_an_answer_counts_until_its_next_report() -> None:
    """Others' requests are known sooner than by a poll, and ours are not counted twice."""
    gone = sent("a", now=NOW + 0.1)
    assert gone.sent
    made = fleet("a", events=(gone,))
    busy, backlog = [made.nodes["a"].busy], [made.nodes["a"].backlog]
    crowd = report(running=3, waiting=2, queued_prompt_tokens=900).load
    for event in (
        Told("a", crowd, NOW + 0.5),  # ours is one of the five, and nothing of it is owed twice
        sent("a", now=NOW + 0.6, request="2"),  # a sixth, and its 2502 tokens
        Finished("a", gone.sent, 0),
        Reported("a", None, NOW + 1),  # nothing has changed since the first report: idle, but for ours
        Told("b", crowd, NOW + 1),  # whom nobody has listed
    ):
        made = made.apply(event)
        busy.append(made.nodes["a"].busy)
        backlog.append(made.nodes["a"].backlog)
    assert busy == [1, 5, 6, 5, 1, 1]
    assert backlog[1:3] == [900, 3402] and backlog[4] == 0


def test_a_node_is_taken_to_hold_what_was_just_sent_there_for_a_while() -> None:
    made = fleet("a", "b")
    home, other = names(choice(made, ASK))
    gone = sent(other, made=made)
    made = made.apply(gone).apply(Finished(other, gone.sent))
    again = ask(LONG, "answer", "next", system=SYSTEM)
    made = made.apply(Reported("a", None, NOW + 4)).apply(Reported("b", None, NOW + 4))
    assert cost_of(made, other, again, NOW + 4).cached == 2496
    assert names(choice(made, again, now=NOW + 4))[0] == other
    made = made.apply(Reported("a", None, NOW + 6)).apply(Reported("b", None, NOW + 6))
    assert PREDICTED_S < 6
    assert names(choice(made, again, now=NOW + 6))[0] == home
    assert made.nodes[other].sent == ()


def test_a_node_that_did_not_take_it_will_not_hold_it() -> None:
    made = fleet("a")
    gone = sent("a")
    made = made.apply(gone).apply(Finished("a", gone.sent, None, computed=False))
    assert cost_of(made).cached == 0


def test_a_wrong_claim_is_dropped_until_the_next_report() -> None:
    other = chain_of("something else " * 100)
    made = fleet("a", events=(reported("a", HELD, other),))
    gone = sent("a", made=made)
    assert gone.sent is not None and gone.sent.cached == 2496
    made = made.apply(gone).apply(Finished("a", gone.sent, cached=640))
    assert cost_of(made).cached == 640
    assert cost_of(made, asked=ask("something else " * 100)).cached > 0
    # The same report again says nothing new; another one does.
    made = made.apply(Reported("a", None, NOW + 1))
    assert cost_of(made, now=NOW + 1).cached == 640
    assert cost_of(made.apply(reported("a", HELD, at=NOW + 2)), now=NOW + 2).cached == 2496


@pytest.mark.parametrize(("cached", "kept"), [(2496, True), (2432, True), (1300, True), (1200, False), (0, False)])
def test_a_claim_is_wrong_when_less_than_half_was_there(cached: int, kept: bool) -> None:
    made = fleet("a", events=(reported("a", HELD),))
    gone = sent("a", made=made)
    made = made.apply(gone).apply(Finished("a", gone.sent, cached))
    assert (cost_of(made).cached == 2496) is kept


def test_a_restarted_node_holds_nothing() -> None:
    made = fleet("a", events=(sent("a"),))
    assert cost_of(made).cached == 2496
    fresh = report()
    made = made.apply(Reported("a", type(fresh)(**{**vars(fresh), "boot": "another"}), NOW + 1))
    assert cost_of(made, now=NOW + 1).cached == 0


def test_a_cache_that_cannot_be_read_is_no_cache() -> None:
    broken = report()
    broken = type(broken)(**{**vars(broken), "cache": type(broken.cache)("no base64!")})
    assert cost_of(fleet("a", events=(Reported("a", broken, NOW),))).cached == 0


def test_predictions_are_bounded() -> None:
    made = fleet("a")
    for number in range(3 * prediction.MOST):
        made = made.apply(sent("a", now=NOW + number / 1000, request=str(number)))
    assert len(made.nodes["a"].sent) == prediction.MOST


@given(shared=st.integers(0, 300), a=st.integers(0, 300), b=st.integers(0, 300))
def test_shared_blocks_are_found_by_halving(shared: int, a: int, b: int) -> None:
    one = (*range(shared), *range(1000, 1000 + a))
    two = (*range(shared), *range(2000, 2000 + b))
    assert prediction.common(one, two) == shared
    assert prediction.common(one, one) == len(one)


@given(
    paths=st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=5), st.floats(0, 2 * prediction.PREDICTED_S))),
    asked=st.lists(st.integers(0, 1), max_size=5),
)
def test_what_was_sent_lately_is_found_whoever_sent_it(paths: list[tuple[list[int], float]], asked: list[int]) -> None:
    def chain(path: list[int]) -> tuple[int, ...]:
        return tuple(hash(tuple(path[: at + 1])) for at in range(len(path)))

    lately = sorted(paths, key=lambda one: -one[1])
    sents = tuple(Sent("r", chain(path), 0, 0, 0, NOW - age) for path, age in lately)
    shared = [prediction.common(s.blocks, chain(asked)) for s in sents if NOW - s.now <= prediction.PREDICTED_S]
    assert prediction.depth(sents, Chain(chain(asked), 0, 0), NOW) == max(shared, default=0)


@given(predicted=st.integers(0, 5000), actual=st.integers(0, 5000))
def test_a_correction_never_claims_more_blocks_than_before(predicted: int, actual: int) -> None:
    depth = predicted * 4 // BLOCK
    one = Sent("r", Chain(tuple(range(1, depth + 3)), 0, 0).blocks, depth, predicted, 0, NOW)
    if one.missed(actual):
        assert 0 <= one.really(actual) <= depth / 2
        assert prediction.corrected((one,), one, actual) == ()
