"""Routing by table: which nodes may answer, in which order, and what is said when none may."""

from __future__ import annotations

from typing import Any

import pytest

from llmgate.core.fleet import (
    Dispatched,
    Event,
    Finished,
    Fleet,
    Lease,
    Leased,
    Listed,
    Lost,
    Reported,
)
from llmgate.core.policy import Ask, Choice, choose, refusal
from llmgate.listing import Address
from llmnode.wire.errors import ModelNotFound, Overloaded
from llmnode.wire.node import Load, Model, Report, State

ASK = Ask("tiny", frozenset({"chat"}))
NOW, STALE = 100.0, 3.0


def report(state: State = State.READY, model: str = "tiny", **fields: Any) -> Report:
    load = Load(slots=fields.pop("slots", 4), running=fields.pop("running", 0), waiting=fields.pop("waiting", 0))
    models = (Model(id=model, aliases=fields.pop("aliases", ()), **fields),)
    return Report(boot="b", release="r", config="c", state=state, models=models, load=load)


def fleet(*names: str, events: tuple[Event, ...] = ()) -> Fleet:
    """A fleet of idle ready nodes, then the events."""
    made = Fleet().apply(Listed(tuple(Address(name, f"http://{name}") for name in names)))
    for event in (*(Reported(name, report(), NOW) for name in names), *events):
        made = made.apply(event)
    return made


def least_loaded(made: Fleet, ask: Ask = ASK, now: float = NOW) -> Choice:
    return choose(made, ask, now, STALE, "least-loaded")


def ranked(made: Fleet, ask: Ask = ASK, now: float = NOW) -> list[str]:
    return [candidate.name for candidate in least_loaded(made, ask, now).ranked]


@pytest.mark.parametrize(
    ("events", "order"),
    [
        ((), "ab"),
        ((Reported("a", report(running=1), NOW),), "ba"),
        ((Reported("a", report(waiting=1), NOW),), "ba"),
        # Half of eight slots is less than three of four.
        ((Reported("a", report(slots=8, running=4), NOW), Reported("b", report(running=3), NOW)), "ab"),
        ((Dispatched("a", NOW),), "ba"),
        ((Dispatched("a", NOW), Dispatched("b", NOW)), "ab"),
        # Idle again: who rested longer comes first.
        ((Dispatched("a", NOW), Finished("a")), "ba"),
        ((Dispatched("a", NOW), Finished("a"), Dispatched("b", NOW), Finished("b")), "ab"),
        # A node that does not say how many slots it has is taken to have one.
        ((Reported("a", report(slots=0, running=1), NOW), Reported("b", report(running=3), NOW)), "ba"),
    ],
)
def test_the_least_loaded_comes_first(events: tuple[Event, ...], order: str) -> None:
    assert ranked(fleet("a", "b", events=events)) == list(order)


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (Lost("a", "connection refused", NOW), "connection refused"),
        (Reported("a", report(State.DRAINING), NOW), "it is draining"),
        (Reported("a", report(State.LOADING), NOW), "it is loading"),
        (Reported("a", report(State.FAILED), NOW), "it is failed"),
        (Reported("a", report(State.STARTING), NOW), "it is starting"),
        (Reported("a", report(), NOW - 3.5), "its last report is 3.5 s old"),
        (Leased((Lease("a", "bob", "disk", 0.0, None),)), "drained by bob: disk"),
        (Reported("a", report(), NOW), None),
    ],
)
def test_nodes_that_cannot_take_work_are_passed_over_with_the_reason(event: Event, why: str | None) -> None:
    choice = least_loaded(fleet("a", "b", events=(event,)))
    if why is None:
        assert [c.name for c in choice.ranked] == ["a", "b"]
    else:
        assert [c.name for c in choice.ranked] == ["b"]
        assert choice.passed_over == (("a", why),)
        assert choice.why == f"least-loaded (only): b 0/4; not a ({why})"


def test_only_nodes_with_the_model_for_this_use_are_asked() -> None:
    made = fleet("a", "b", "c", "d")
    made = made.apply(Reported("a", report(model="other"), NOW))
    made = made.apply(Reported("b", report(kinds=("embedding",)), NOW))
    made = made.apply(Reported("c", report(aliases=("nick",)), NOW))
    made = made.apply(Reported("d", report(state=State.READY), NOW))
    assert ranked(made) == ["c", "d"]
    assert ranked(made, Ask("nick", ASK.kinds)) == ["c"]
    assert ranked(made, Ask("other", ASK.kinds)) == ["a"]


def test_work_is_counted_once_from_dispatch_to_the_last_byte() -> None:
    made = fleet("a")
    busy = []
    for event in (
        Dispatched("a", NOW),  # 1: ours, not reported yet
        Dispatched("a", NOW),  # 2
        Reported("a", report(running=2), NOW),  # 2: the report counts the same two
        Dispatched("a", NOW),  # 3: one more since
        Finished("a"),  # 2
        Finished("a"),  # 1
        Reported("a", report(running=3), NOW),  # 3: two are another gate's
        Finished("a"),  # 2: ours has ended, the others run
        Finished("a"),  # 2: nothing of ours was left to end
    ):
        made = made.apply(event)
        busy.append(made.nodes["a"].busy)
    assert busy == [1, 2, 2, 3, 2, 1, 3, 2, 2]


def test_an_unchanged_report_makes_a_node_fresh_again() -> None:
    made = fleet("a")
    assert ranked(made, now=NOW + 10) == []
    assert ranked(made.apply(Reported("a", None, NOW + 9)), now=NOW + 10) == ["a"]


def test_a_lost_node_comes_back_with_its_next_report() -> None:
    made = fleet("a", events=(Lost("a", "gone", NOW),))
    assert ranked(made) == []
    assert ranked(made.apply(Reported("a", None, NOW))) == ["a"]


def test_listing_again_keeps_what_is_known_unless_the_address_changed() -> None:
    lease = Lease("b", "bob", "", 0.0, None)
    made = fleet("a", "b", "c", events=(Dispatched("a", NOW), Leased((lease,))))
    made = made.apply(Listed((Address("a", "http://a"), Address("b", "http://elsewhere"))))
    assert list(made.nodes) == ["a", "b"]
    assert made.nodes["a"].in_flight == 1
    assert made.nodes["b"].report is None
    assert made.nodes["b"].lease == lease


def test_events_about_strangers_change_nothing() -> None:
    made = fleet("a")
    for event in (Reported("x", report(), NOW), Lost("x", "", NOW), Dispatched("x", NOW), Finished("x")):
        assert made.apply(event) is made


def test_a_snapshot_never_changes() -> None:
    made = fleet("a")
    before = repr(made.nodes["a"])
    made.apply(Dispatched("a", NOW)).apply(Lost("a", "gone", NOW))
    assert repr(made.nodes["a"]) == before == "<a up, 0/4 busy>"


def test_404_only_when_every_node_has_spoken() -> None:
    ask = Ask("nope", ASK.kinds)

    def said(made: Fleet) -> Exception:
        return refusal(made, ask, least_loaded(made, ask), ["tiny"])

    assert isinstance(said(fleet("a")), ModelNotFound)
    assert isinstance(said(Fleet()), Overloaded)
    silent = Fleet().apply(Listed((Address("a", "http://a"), Address("b", "http://b"))))
    assert isinstance(said(silent.apply(Reported("a", report(), NOW))), Overloaded)
