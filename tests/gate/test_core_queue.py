"""Who goes next: nobody lost, nobody twice, keys share, the important first, the unimportant too."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmgate.core import keys as access
from llmgate.core.keys import Key
from llmgate.core.pace import Pace
from llmgate.core.queue import PASSES, Priority, Queue, Ticket
from llmnode.wire.errors import Forbidden, InvalidRequest

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW
KEYS = st.sampled_from("abc")
PRIORITIES = st.sampled_from(Priority)


def anyone(_: Ticket) -> bool:
    return True


def filled(*asks: tuple[str, Priority, int], cost: float = 1.0) -> Queue:
    """A queue of so many tickets for each (key, priority, how many), in that order."""
    queue = Queue()
    for key, priority, count in asks:
        for _ in range(count):
            queue.push(Ticket(key, priority, cost))
    return queue


def keys(queue: Queue, turns: int) -> str:
    """Whose the next so many turns are."""
    went = [queue.take(anyone) for _ in range(turns)]
    return "".join(ticket.key if ticket else "-" for ticket in went)


def test_one_key_goes_in_order_of_arrival() -> None:
    queue = Queue()
    tickets = [Ticket("a", NORMAL, 1.0) for _ in range(5)]
    for ticket in tickets:
        queue.push(ticket)
    assert [queue.take(anyone) for _ in range(6)] == [*tickets, None]


@given(st.lists(st.tuples(KEYS, PRIORITIES, st.floats(0.1, 10.0), st.booleans()), max_size=20))
def test_going_at_once_is_charged_like_going_through_the_queue(asks: list[tuple[str, Priority, float, bool]]) -> None:
    through, by = Queue(), Queue()
    for key, priority, cost, settled in asks:
        ticket = Ticket(key, priority, cost)
        through.push(ticket)
        assert through.take(anyone) is ticket
        by.pass_by(ticket)
        if settled:
            through.settle(ticket, 1.0)
            by.settle(ticket, 1.0)
        assert vars(by) == vars(through)


@pytest.mark.parametrize("took", [0.0, 0.1, 1.0, 10.0])
def test_a_flood_delays_another_keys_single_request_by_one_turn_at_most(took: float) -> None:
    """Also where the flood was charged too much or too little at first, and has many answers under way."""
    queue = filled(("f", NORMAL, 50))
    went = [queue.take(anyone) for _ in range(8)]
    queue.push(Ticket("b", NORMAL, 1.0))
    for ticket in went:
        assert ticket
        queue.settle(ticket, took)
    assert "b" in keys(queue, 2)


def test_who_holds_many_places_gives_way_to_who_holds_none() -> None:
    queue = filled(("f", NORMAL, 10))
    assert keys(queue, 4) == "ffff"
    for _ in range(10):
        queue.push(Ticket("b", NORMAL, 1.0))
    assert Counter(keys(queue, 6)) == {"b": 5, "f": 1}


@given(st.lists(KEYS, min_size=1, max_size=60), st.integers(0, 60))
def test_keys_with_backlog_get_equal_shares_within_one_request(order: list[str], turns: int) -> None:
    queue = Queue()
    for key in order:
        queue.push(Ticket(key, NORMAL, 1.0))
    waiting = Counter(order)
    got: Counter[str] = Counter()
    for _ in range(min(turns, len(order))):
        ticket = queue.take(anyone)
        assert ticket
        got[ticket.key] += 1
        backlog = [got[key] for key in waiting if got[key] < waiting[key]]
        assert not backlog or max(got.values()) - min(backlog) <= 1


@given(st.floats(1.0, 5.0), st.floats(1.0, 5.0))
def test_keys_share_seconds_and_not_turns(long: float, short: float) -> None:
    queue = Queue()
    for _ in range(200):
        queue.push(Ticket("a", NORMAL, long))
        queue.push(Ticket("b", NORMAL, short))
    served = {"a": 0.0, "b": 0.0}
    for _ in range(100):
        ticket = queue.take(anyone)
        assert ticket
        served[ticket.key] += ticket.cost
        assert abs(served["a"] - served["b"]) <= max(long, short) + 1e-6


def test_what_an_answer_really_took_counts_and_not_the_estimate() -> None:
    queue = filled(("a", NORMAL, 40), ("b", NORMAL, 40))
    served = {"a": 0.0, "b": 0.0}
    for _ in range(40):
        ticket = queue.take(anyone)
        assert ticket
        took = 3.0 if ticket.key == "a" else 1.0
        queue.settle(ticket, took)
        served[ticket.key] += took
        assert abs(served["a"] - served["b"]) <= 3.0


def test_who_used_an_idle_fleet_pays_nothing_for_it_later() -> None:
    queue = Queue()
    for _ in range(100):
        queue.push(Ticket("a", NORMAL, 1.0))
        ticket = queue.take(anyone)
        assert ticket
        queue.settle(ticket, 1.0)
    queue.push(Ticket("b", NORMAL, 1.0))
    for _ in range(3):
        queue.push(Ticket("b", NORMAL, 1.0))
        queue.push(Ticket("a", NORMAL, 1.0))
    # One turn is on its account from before, no hundred.
    assert "a" in keys(queue, 3)


def test_higher_classes_go_first_and_lower_ones_are_passed_a_bounded_number_of_times() -> None:
    queue = filled(("a", LOW, 3), ("b", NORMAL, 3), ("c", HIGH, 40))
    assert keys(queue, 2 * PASSES + 4) == "c" * PASSES + "ba" + "c" * PASSES + "ba"


@given(st.lists(st.tuples(PRIORITIES, st.booleans()), max_size=200))
def test_no_class_starves(steps: list[tuple[Priority, bool]]) -> None:
    queue = Queue()
    passed = dict.fromkeys(Priority, 0)
    for priority, push in steps:
        if push:
            queue.push(Ticket("k", priority, 1.0))
            continue
        ticket = queue.take(anyone)
        waiting = {t.priority for t in queue}
        for other in Priority:
            starving = ticket is not None and other in waiting and other > ticket.priority
            passed[other] = passed[other] + 1 if starving else (passed[other] if other in waiting else 0)
            if ticket is not None and other == ticket.priority:
                passed[other] = 0
            assert passed[other] <= PASSES + 1


def test_those_that_cannot_go_hold_up_nobody() -> None:
    queue = filled(("a", HIGH, 2), ("b", NORMAL, 1))
    went = queue.take(lambda ticket: ticket.key == "b")
    assert went
    assert went.key == "b"
    assert queue.take(lambda _: False) is None
    assert keys(queue, 3) == "aa-"


@pytest.mark.parametrize(
    ("asks", "leaves"),
    [
        ([("a", NORMAL, 5), ("b", NORMAL, 2)], ("a", NORMAL)),
        ([("a", HIGH, 5), ("b", LOW, 4)], ("a", HIGH)),
        ([("a", HIGH, 3), ("b", LOW, 3)], ("b", LOW)),
        ([("a", NORMAL, 3), ("b", NORMAL, 3)], ("b", NORMAL)),
        # One key in two classes stands in two lines.
        ([("a", NORMAL, 3), ("a", LOW, 2), ("b", NORMAL, 4)], ("b", NORMAL)),
    ],
)
def test_the_newest_of_the_longest_line_leaves_a_queue_that_is_too_long(
    asks: list[tuple[str, Priority, int]], leaves: tuple[str, Priority]
) -> None:
    queue = filled(*asks)
    before = list(queue)
    surplus = queue.surplus()
    assert (surplus.key, surplus.priority) == leaves
    assert surplus == [ticket for ticket in before if (ticket.key, ticket.priority) == leaves][-1]


def test_how_many_are_ahead() -> None:
    queue = filled(("a", NORMAL, 5), ("b", LOW, 4), ("c", HIGH, 2))
    mine = Ticket("d", NORMAL, 1.0)
    queue.push(mine)
    assert queue.ahead(mine) == 2 + 1
    second = Ticket("d", NORMAL, 1.0)
    queue.push(second)
    assert queue.ahead(second) == 2 + 1 + 2


@pytest.mark.parametrize("priority", list(Priority))
def test_priorities_are_words(priority: Priority) -> None:
    assert Priority.of(priority.word) is priority


def test_a_word_that_is_no_priority_is_named() -> None:
    with pytest.raises(ValueError, match="one of high, normal, low, got 'urgent'"):
        Priority.of("urgent")


class Turns(RuleBasedStateMachine):
    """The queue beside a plain list of what should be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.inside: list[Ticket] = []
        self.out: list[Ticket] = []
        self.ended: list[Ticket] = []

    @rule(key=KEYS, priority=PRIORITIES, cost=st.floats(0.01, 100))
    def push(self, key: str, priority: Priority, cost: float) -> None:
        ticket = Ticket(key, priority, cost)
        self.queue.push(ticket)
        self.inside.append(ticket)

    @rule(allowed=st.sets(KEYS))
    def take(self, allowed: set[str]) -> None:
        may = [ticket for ticket in self.inside if ticket.key in allowed]
        ticket = self.queue.take(lambda ticket: ticket.key in allowed)
        if ticket is None:
            assert not may
            return
        # The oldest of its key and class.
        assert ticket == next(t for t in may if (t.key, t.priority) == (ticket.key, ticket.priority))
        self._gone(ticket)
        self.ended.append(ticket)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.inside))
        self.queue.remove(ticket)
        self._gone(ticket)
        with pytest.raises(KeyError):
            self.queue.remove(ticket)

    @precondition(lambda self: self.inside)
    @rule()
    def drop(self) -> None:
        lines = Counter((ticket.key, ticket.priority) for ticket in self.inside)
        ticket = self.queue.surplus()
        assert lines[ticket.key, ticket.priority] == max(lines.values())
        self.queue.remove(ticket)
        self._gone(ticket)

    @precondition(lambda self: self.ended)
    @rule(cost=st.floats(0, 1000))
    def settle(self, cost: float) -> None:
        self.queue.settle(self.ended.pop(), cost)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def look_ahead(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.inside))
        assert 0 <= self.queue.ahead(ticket) < len(self.inside)

    @invariant()
    def nothing_is_lost_and_nothing_is_there_twice(self) -> None:
        assert len(self.queue) == len(self.inside)
        assert Counter(self.queue) == Counter(self.inside)
        assert not set(self.out) & set(self.queue)

    def _gone(self, ticket: Ticket) -> None:
        assert ticket not in self.out
        self.out.append(ticket)
        self.inside.remove(ticket)


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_empty_queue_has_nobody_to_drop() -> None:
    with pytest.raises(IndexError):
        Queue().surplus()


def test_the_wait_is_the_mean_time_between_turns_for_each_one_ahead() -> None:
    pace = Pace()
    pace.formed(100.0)
    for turn in range(1, 9):
        pace.went(100.0 + 2.0 * turn)
    assert pace.wait(0, 116.0) == pytest.approx(16 / 9)
    assert pace.wait(9, 118.0) == pytest.approx(10 * 18 / 9)


def test_a_queue_that_stands_still_says_so() -> None:
    pace = Pace()
    assert pace.wait(3, 5.0) == 0.0
    pace.formed(10.0)
    assert pace.wait(3, 20.0) == 40.0


def test_time_in_which_nobody_waits_is_not_counted() -> None:
    pace = Pace()
    pace.formed(0.0)
    pace.went(1.0)
    pace.emptied()
    assert pace.wait(0, 30.0) == 0.5
    pace.formed(30.0)
    assert pace.wait(0, 30.0) == 0.5
    pace.went(31.0)
    assert pace.wait(0, 31.0) == pytest.approx(2 / 3)


def test_samples_of_other_times_are_forgotten() -> None:
    pace = Pace()
    pace.formed(0.0)
    pace.went(500.0)
    pace.emptied()
    pace.formed(600.0)
    assert pace.wait(9, 600.0) == 0.0


@pytest.mark.parametrize(
    ("own", "asked", "gets"),
    [
        (NORMAL, None, NORMAL),
        (HIGH, "", HIGH),
        (HIGH, "high", HIGH),
        (HIGH, " Low ", LOW),
        (LOW, "low", LOW),
    ],
)
def test_a_request_may_ask_for_less_than_its_keys_priority(own: Priority, asked: str | None, gets: Priority) -> None:
    assert access.priority(Key("k", "d", priority=own), asked) is gets


def test_a_request_may_not_ask_for_more_than_its_keys_priority() -> None:
    with pytest.raises(Forbidden, match="low priority at most, not high") as caught:
        access.priority(Key("k", "d", priority=LOW), "high")
    assert caught.value.code == "priority_not_allowed"
    with pytest.raises(InvalidRequest, match="x-llmrack-priority must be one of high, normal, low, got '5'"):
        access.priority(Key("k", "d"), "5")
