"""Health by table, over every state and signal; and by hypothesis, what no sequence of signals may do to a fleet."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgate.core import evidence
from llmgate.core.fleet import (
    Attempted,
    Dispatched,
    Event,
    Finished,
    Fleet,
    Lease,
    Leased,
    Listed,
    Lost,
    Missed,
    Node,
    Reported,
    View,
)
from llmgate.core.health import (
    LEVELS,
    MISSES,
    OUT,
    SERVING,
    SHARE_FLOOR,
    WINDOW_S,
    Condition,
    Health,
    Rules,
    Signal,
    target,
)
from llmgate.core.plan import Kind, Outcome
from llmgate.core.policy import Ask, choose
from llmgate.listing import Address
from llmgate.settings import Settings
from llmnode.wire.node import Load, Model, Report, State

RULES = Rules(eject_after=3, eject_s=5.0, slow_start_s=10.0, stale_after_s=3.0)
STALE = RULES.stale_after_s
STRANGE = {Signal.RENEWED: "joining", Signal.AWAY: "away", Signal.GONE: "unreachable"}
"""What moves a node whatever its state."""
EXPECTED: dict[str, dict[str, str]] = {
    "unknown": {"ready": "up", "missed": "unreachable"},
    "joining": {"ready": "slow-start", "missed": "unreachable"},
    "slow-start": {"elapsed": "up", "tripped": "ejected"},
    "up": {"tripped": "ejected"},
    "ejected": {"elapsed": "half-open", "needed": "slow-start"},
    "half-open": {"sent": "probing", "passed": "slow-start", "failed": "ejected", "needed": "slow-start"},
    "probing": {
        "passed": "slow-start",
        "failed": "ejected",
        "ended": "half-open",
        "elapsed": "half-open",
        "needed": "slow-start",
    },
    "unreachable": {"ready": "slow-start"},
    "away": {"ready": "slow-start"},
}


@pytest.mark.parametrize("signal", Signal, ids=lambda signal: signal.word)
@pytest.mark.parametrize("state", Condition, ids=lambda state: state.word)
def test_every_state_answers_every_signal(state: Condition, signal: Signal) -> None:
    moved = EXPECTED[state.word] | {signal.word: to for signal, to in STRANGE.items()}
    assert target(state, signal).word == moved.get(signal.word, state.word)


def test_a_state_that_ends_by_itself_leads_to_one_that_does_not() -> None:
    for state in Condition:
        after = target(state, Signal.ELAPSED)
        assert target(after, Signal.ELAPSED) is after


def test_every_state_can_be_left_for_full_service() -> None:
    for state in set(Condition) - SERVING:
        reached = {state}
        for _ in Condition:
            reached |= {target(one, signal) for one in reached for signal in Signal}
        assert reached >= SERVING


# One node -----------------------------------------------------------------------------------------------------------


def after(health: Health, *steps: tuple[Signal, float], rules: Rules = RULES) -> Health:
    for signal, now in steps:
        health = health.after(signal, now, rules)
    return health


UP = after(Health(), (Signal.READY, 0.0))
EJECTED = after(UP, *[(Signal.FAILED, 1.0)] * 3)


def test_failures_in_a_row_trip_and_an_answer_between_them_does_not() -> None:
    assert after(UP, *[(Signal.FAILED, 1.0)] * 2).state is Condition.UP
    mixed = (Signal.FAILED, Signal.FAILED, Signal.PASSED, Signal.FAILED, Signal.FAILED)
    assert after(UP, *[(signal, 1.0) for signal in mixed]).state is Condition.UP
    assert EJECTED.state is Condition.EJECTED
    assert EJECTED.until == 1.0 + RULES.eject_s


def test_half_of_the_recent_requests_failing_trips_while_they_are_recent() -> None:
    flaky = [Signal.PASSED, Signal.FAILED] * 3
    assert after(UP, *[(signal, 1.0) for signal in flaky]).state is Condition.EJECTED
    assert after(UP, *[(signal, 1.0) for signal in flaky[:-1]]).state is Condition.UP
    slow = [(signal, WINDOW_S * number) for number, signal in enumerate(flaky)]
    assert after(UP, *slow).state is Condition.UP


def test_an_ejection_ends_in_one_request_at_a_time() -> None:
    assert EJECTED.at(5.9).state is Condition.EJECTED
    assert EJECTED.at(6.0).state is Condition.HALF_OPEN
    probing = EJECTED.after(Signal.SENT, 7.0, RULES)
    assert probing.state is Condition.PROBING
    assert probing.after(Signal.ENDED, 8.0, RULES).state is Condition.HALF_OPEN
    # A probe that streams for minutes keeps no other from passing.
    assert probing.at(7.0 + RULES.eject_s).state is Condition.HALF_OPEN
    answered = probing.after(Signal.PASSED, 8.0, RULES)
    assert answered.state is Condition.SLOW_START
    assert answered.failures == 0


def test_ejections_grow_to_a_bound_and_good_conduct_shortens_the_next() -> None:
    health, now, lengths = EJECTED, 1.0, []
    for _ in range(LEVELS + 2):
        assert health.until is not None
        lengths.append(health.until - now)
        now = health.until
        health = after(health, (Signal.SENT, now), (Signal.FAILED, now))
    assert lengths == [5, 10, 20, 40, 80, 160, 160, 160]

    assert health.until is not None and health.level == LEVELS
    now = health.until
    health = after(health, (Signal.SENT, now), (Signal.PASSED, now))
    up = now + RULES.slow_start_s
    health = health.after(Signal.PASSED, up + 159, RULES)
    assert health.level == LEVELS
    health = health.after(Signal.PASSED, up + 160, RULES)
    assert health.level == LEVELS - 1
    health = health.after(Signal.PASSED, up + 239, RULES)
    assert health.level == LEVELS - 1
    assert health.after(Signal.PASSED, up + 240, RULES).level == LEVELS - 2


def test_a_slow_start_grows_from_the_floor_to_a_full_share() -> None:
    started = after(Health(Condition.JOINING), (Signal.READY, 100.0))
    assert [round(started.share(now), 3) for now in (100.0, 105.0, 110.0, 200.0)] == [SHARE_FLOOR, 0.55, 1.0, 1.0]
    at_once = dataclasses.replace(RULES, slow_start_s=0.0)
    assert after(Health(Condition.JOINING), (Signal.READY, 100.0), rules=at_once).state is Condition.UP


def test_a_missed_poll_is_forgiven_to_a_node_that_answers_and_a_refused_one_is_not() -> None:
    assert UP.after(Signal.GONE, 1.0, RULES).state is Condition.UNREACHABLE
    missed = UP.after(Signal.MISSED, 1.0, RULES)
    assert missed.state is Condition.UP
    assert missed.after(Signal.MISSED, 2.0, RULES).state is Condition.UNREACHABLE
    for life in (Signal.PASSED, Signal.READY):
        alive = after(missed, (life, 1.5), (Signal.MISSED, 2.0))
        assert alive.state is Condition.UP
        assert alive.missed == 1 < MISSES


def test_a_node_that_stays_unreachable_says_why_it_is_so_now() -> None:
    gone = UP.after(Signal.GONE, 1.0, RULES, why="connection refused")
    strange = gone.after(Signal.MISSED, 2.0, RULES, why="its certificate is not good")
    assert (strange.state, strange.why, strange.since) == (gone.state, "its certificate is not good", 1.0)
    assert strange.after(Signal.FAILED, 3.0, RULES, why="an answer broke off").why == strange.why


def test_another_process_starts_with_a_clean_record() -> None:
    new = EJECTED.after(Signal.RENEWED, 2.0, RULES, turns=7)
    assert new == Health(Condition.JOINING, since=2.0, counts_from=8)


# What an attempt says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "signal"),
    [
        (Outcome(Kind.ANSWERED), Signal.PASSED),
        (Outcome(Kind.HANDOVER), Signal.ENDED),
        (Outcome(Kind.LATE), Signal.ENDED),
        (Outcome(Kind.FAILED, 500), Signal.FAILED),
        (Outcome(Kind.FAILED, 503), Signal.ENDED),
        (Outcome(Kind.BROKE), Signal.FAILED),
        (Outcome(Kind.STALLED), Signal.FAILED),
        (Outcome(Kind.UNREACHABLE), Signal.GONE),
        (Outcome(Kind.REFUSED, 500), Signal.FAILED),
        (Outcome(Kind.REFUSED, 502), Signal.FAILED),
        (Outcome(Kind.REFUSED, 503), Signal.ENDED),
        (Outcome(Kind.REFUSED, 504), Signal.ENDED),
        (Outcome(Kind.REFUSED, 429), Signal.ENDED),
        (Outcome(Kind.REFUSED, 401), Signal.ENDED),
        (Outcome(Kind.REFUSED, 400), Signal.ENDED),
    ],
    ids=str,
)
def test_only_what_is_the_nodes_fault_counts_against_it(outcome: Outcome, signal: Signal) -> None:
    assert evidence.attempted("a", 1, outcome, 0.0).signal is signal


def test_every_way_to_end_says_something_of_health() -> None:
    assert set(evidence.SAYS) == set(Kind)


# Several nodes ------------------------------------------------------------------------------------------------------


def report(*models: str, boot: str = "b", state: State = State.READY) -> Report:
    return Report(boot, "r", "c", state, models=tuple(Model(m) for m in models or ("tiny",)), load=Load(slots=4))


def fleet(*names: str, now: float = 0.0) -> Fleet:
    """Idle nodes of one model that a starting gate found ready."""
    made = Fleet(rules=RULES).apply(Listed(tuple(Address(name, f"http://{name}") for name in names)))
    return apply(made, *(Reported(name, report(), now) for name in names))


def apply(made: Fleet, *events: Event) -> Fleet:
    for event in events:
        made = made.apply(event)
    return made


def fail(made: Fleet, name: str, now: float, times: int = RULES.eject_after) -> Fleet:
    for _ in range(times):
        made = made.apply(Dispatched(name, now))
        made = apply(made, Finished(name), Attempted(name, made.turns, Signal.FAILED, "refused 500", now))
    return made


def state(made: Fleet, name: str, now: float) -> Condition:
    return made.nodes[name].health.at(now).state


def test_an_ejected_node_gets_no_work_and_says_why_and_for_how_long() -> None:
    made = fail(fleet("a", "b"), "a", 1.0)
    choice = choose(made, Ask("tiny", frozenset({"chat"})), 2.0, STALE, "least-loaded")
    assert [c.name for c in choice.ranked] == ["b"]
    assert choice.passed_over == (("a", "refused 500; out for another 4.0 s"),)
    assert not made.nodes["a"].admits(2.0)
    assert made.nodes["a"].admits(6.0)
    assert not made.apply(Dispatched("a", 6.0)).nodes["a"].admits(6.0)


def test_the_last_node_is_never_ejected_and_at_most_half_of_them_are() -> None:
    assert state(fail(fleet("a"), "a", 1.0, times=20), "a", 1.0) is Condition.UP
    alone = fail(fleet("a", "b").apply(Lost("b", "gone", 0.5)), "a", 1.0, times=20).nodes["a"].health
    assert (alone.state, alone.ejections, alone.level) == (Condition.UP, 0, 0)
    made = fleet("a", "b", "c", "d")
    for name in "abcd":
        made = fail(made, name, 1.0)
    assert [state(made, name, 1.0) in OUT for name in "abcd"] == [True, True, False, False]


def test_a_node_is_ejected_only_if_each_of_its_models_can_spare_it() -> None:
    made = fleet("a", "b").apply(Reported("a", report("tiny", "only-here"), 0.0))
    assert state(fail(made, "a", 1.0), "a", 1.0) is Condition.UP
    assert state(fail(made, "b", 1.0), "b", 1.0) is Condition.EJECTED


@pytest.mark.parametrize(
    "event",
    [
        Lost("b", "connection refused", 2.0),
        Reported("b", report(state=State.DRAINING), 2.0),
        Leased((Lease("b", "bob", "", 0.0, None),)),
    ],
)
def test_an_ejected_node_is_called_back_when_nobody_else_is_left(event: Event) -> None:
    made = fail(fleet("a", "b"), "a", 1.0)
    made = apply(made, event, Reported("a", None, 2.0))
    assert state(made, "a", 2.0) is Condition.SLOW_START
    assert made.nodes["a"].standing(2.0, STALE).usable


def test_a_drained_node_is_not_called_back() -> None:
    lease = Lease("a", "bob", "", 0.0, None)
    made = apply(fail(fleet("a", "b"), "a", 1.0), Leased((lease,)), Lost("b", "gone", 2.0))
    assert state(made, "a", 2.0) is Condition.EJECTED


def test_answers_from_before_an_ejection_or_a_restart_are_old_news() -> None:
    made = apply(fleet("a", "b"), Dispatched("a", 0.5))
    old = made.turns
    made = fail(made, "a", 1.0)
    made = made.apply(Dispatched("a", 7.0))
    for signal in (Signal.PASSED, Signal.FAILED, Signal.GONE):
        assert state(made.apply(Attempted("a", old, signal, "", 8.0)), "a", 8.0) is Condition.PROBING
    assert state(made.apply(Attempted("a", made.turns, Signal.PASSED, "", 8.0)), "a", 8.0) is Condition.SLOW_START

    probe = made.turns
    made = made.apply(Reported("a", report(boot="another"), 8.0))
    for _ in range(5):
        made = made.apply(Attempted("a", probe, Signal.FAILED, "", 8.0))
    assert made.nodes["a"].health.failures == 0


def test_a_node_with_another_boot_starts_slowly_and_clean() -> None:
    made = fail(fleet("a", "b"), "a", 1.0).apply(Reported("a", report(boot="another"), 2.0))
    health = made.nodes["a"].health
    assert (health.state, health.level, health.ejections) == (Condition.SLOW_START, 0, 0)
    assert made.nodes["a"].share(2.0) == SHARE_FLOOR


def test_who_joins_starts_slowly_and_who_was_there_at_the_start_does_not() -> None:
    made = fleet("a")
    made = made.apply(Listed((Address("a", "http://a"), Address("b", "http://b"))))
    made = made.apply(Reported("b", report(), 0.0))
    assert [state(made, name, 0.0) for name in "ab"] == [Condition.UP, Condition.SLOW_START]


def test_a_node_that_starts_slowly_is_filled_later_and_never_refused() -> None:
    made = fleet("a").apply(Listed((Address("a", "http://a"), Address("b", "http://b"))))
    made = made.apply(Reported("b", report(), 0.0))
    got = []
    for _ in range(8):
        got.append(choose(made, Ask("tiny", frozenset({"chat"})), 0.0, STALE, "least-loaded").ranked[0].name)
        made = made.apply(Dispatched(got[-1], 0.0))
    assert got[:5].count("b") == 1
    assert "b" in got[5:]


def test_an_answered_request_is_a_sign_of_life_while_polls_are_missed() -> None:
    made = apply(fleet("a"), Dispatched("a", 2.0), Missed("a", "no answer within 3 s", 2.5))
    made = made.apply(Attempted("a", made.turns, Signal.PASSED, "", 2.9))
    assert made.nodes["a"].standing(5.8, STALE).usable
    assert made.nodes["a"].standing(6.0, STALE).state == "stale"


def test_each_move_is_told_once_with_the_snapshot_that_shows_it() -> None:
    told: list[str] = []
    view = View(
        fleet("a", "b"), lambda node: told.append(f"{node.name} {view.fleet.nodes[node.name].health.state.word}")
    )
    for event in (Lost("a", "gone", 1.0), Lost("a", "gone", 1.1), Dispatched("b", 1.2), Reported("a", None, 2.0)):
        view.apply(event)
    view.apply(Reported("a", report(boot="another"), 3.0))
    assert told == ["a unreachable", "a slow-start", "a slow-start"]


def test_the_settings_give_the_rules() -> None:
    values = Settings(eject_after=7, eject_s=2.0, slow_start_s=1.0, stale_after_s=9.0)
    assert Rules.of(values) == Rules(7, 2.0, 1.0, 9.0)


# Any sequence of signals --------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
MODELS = (("tiny",), ("tiny", "big"), ("big",))


@dataclass(frozen=True)
class Step:
    """One thing that happens `wait` seconds after the one before."""

    what: str
    name: str
    wait: float
    detail: Any = None


def _steps() -> st.SearchStrategy[list[Step]]:
    name, wait = st.sampled_from(NAMES), st.sampled_from([0.0, 0.1, 1.0, 2.9, 6.0, 11.0])
    outcome = st.sampled_from([Signal.PASSED, Signal.FAILED, Signal.FAILED, Signal.ENDED, Signal.GONE])
    return st.lists(
        st.one_of(
            st.builds(Step, st.just("request"), name, wait, outcome),
            st.builds(Step, st.just("failures"), name, wait),
            st.builds(Step, st.just("late"), name, wait, outcome),
            st.builds(Step, st.just("report"), name, wait, st.sampled_from([*State, State.READY, State.READY])),
            st.builds(Step, st.just("restart"), name, wait),
            st.builds(Step, st.just("polls"), name, wait),
            st.builds(Step, st.sampled_from(["missed", "lost", "lease", "lift", "leave", "join"]), name, wait),
        ),
        max_size=40,
    )


class World:
    """Runs steps against a fleet, and after each event looks whether a promise was broken."""

    def __init__(self) -> None:
        self.now = 0.0
        self.fleet = Fleet(rules=RULES)
        self.boots = 0
        self.leases: dict[str, Lease] = {}
        self.listed = list(NAMES)
        self.old: dict[str, int] = {}
        self.apply(self._list())
        for name in NAMES:
            self.apply(self._report(name))

    def run(self, step: Step) -> None:
        self.now += step.wait
        name = step.name
        if step.what == "request":
            self._request(name, step.detail)
        elif step.what == "failures":
            for _ in range(RULES.eject_after):
                self._request(name, Signal.FAILED)
        elif step.what == "late":
            # The end of a request that has been running for an unknown time.
            self.apply(Attempted(name, self.old.get(name, 0), step.detail, "late", self.now))
        elif step.what == "report":
            self.apply(self._report(name, step.detail))
        elif step.what == "restart":
            self.boots += 1
            self.apply(self._report(name))
        elif step.what == "polls":
            for each in NAMES:
                self.apply(self._report(each))
        elif step.what == "missed":
            self.apply(Missed(name, "no answer", self.now))
        elif step.what == "lost":
            self.apply(Lost(name, "connection refused", self.now))
        elif step.what in ("lease", "lift"):
            self.leases.pop(name, None)
            if step.what == "lease":
                self.leases[name] = Lease(name, "bob", "", 0.0, None)
            self.apply(Leased(tuple(self.leases.values())))
        else:
            self.listed = [n for n in NAMES if (n in self.listed and n != name) or (n == name and step.what == "join")]
            self.apply(self._list())

    def _list(self) -> Listed:
        return Listed(tuple(Address(name, f"http://{name}") for name in self.listed))

    def _report(self, name: str, said: State = State.READY) -> Reported:
        models = MODELS[NAMES.index(name)]
        return Reported(name, report(*models, boot=f"{name}{self.boots}", state=said), self.now)

    def _request(self, name: str, signal: Signal) -> None:
        node = self.fleet.nodes.get(name)
        if node is None or not node.standing(self.now, STALE).usable:
            return
        assert node.admits(self.now)
        self.apply(Dispatched(name, self.now))
        turn = self.fleet.turns
        self.old.setdefault(name, turn)
        self.apply(Finished(name))
        self.apply(Attempted(name, turn, signal, "because", self.now))

    def apply(self, event: Event) -> None:
        before = self.fleet
        self.fleet = before.apply(event)
        for node in self.fleet.nodes.values():
            old = before.nodes.get(node.name)
            self._look(node)
            if old and old is not node and old.url == node.url:
                self._compare(old, node, event)
        if hasattr(event, "now") and event.name in self.fleet.nodes:
            self._nobody_is_kept_out_of_need()

    def _full(self, node: Node) -> bool:
        return node.standing(self.now, STALE).full

    def _look(self, node: Node) -> None:
        standing, health = node.standing(self.now, STALE), node.health.at(self.now)
        assert not (node.lease and standing.usable), "a drained node is usable"
        assert standing.usable is False or node.share(self.now) >= SHARE_FLOOR
        assert 0.0 <= node.share(self.now) <= 1.0
        if health.state is Condition.EJECTED:
            assert health.since is not None and health.until is not None
            assert 0 < health.until - health.since <= RULES.sentence(LEVELS)
            assert health.at(health.until).state is Condition.HALF_OPEN, "an ejection has no end"
        assert health.since is None or health.since <= self.now

    def _compare(self, old: Node, node: Node, event: Event) -> None:
        was, health = old.health.at(self.now), node.health.at(self.now)
        if was.since is not None and health.since is not None:
            assert was.since <= health.since, "time went back"
        if was.heard is not None and health.heard is not None:
            assert was.heard <= health.heard
        if isinstance(event, Attempted) and event.signal is Signal.ENDED:
            assert (health.failures, health.level, health.recent) == (was.failures, was.level, was.recent)
            assert health.state in (was.state, Condition.HALF_OPEN), "a refusal tripped the breaker"
        if health.state is Condition.EJECTED and was.state in SERVING:
            self._was_spared_for_good_reason(node)

    def _was_spared_for_good_reason(self, node: Node) -> None:
        assert node.report is not None
        for model in node.report.models:
            nodes = [n for n in self.fleet.nodes.values() if n.report and n.model(model.id)]
            assert any(self._full(other) for other in nodes), "the last usable node was ejected"
            assert 2 * sum(n.health.at(self.now).state in OUT for n in nodes) <= len(nodes), "over half are out"

    def _nobody_is_kept_out_of_need(self) -> None:
        for node in self.fleet.nodes.values():
            if node.health.at(self.now).state not in OUT or node.report is None:
                continue
            back = dataclasses.replace(node, health=node.health.after(Signal.NEEDED, self.now, RULES))
            for model in node.report.models if self._full(back) else ():
                nodes = [n for n in self.fleet.nodes.values() if n.model(model.id)]
                assert any(self._full(other) for other in nodes), f"{model.id} has nobody, and {node.name} is kept out"


@settings(max_examples=300, deadline=None)
@given(_steps())
def test_no_sequence_of_signals_breaks_a_promise(steps: list[Step]) -> None:
    world = World()
    for step in steps:
        world.run(step)
