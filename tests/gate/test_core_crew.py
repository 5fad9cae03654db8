"""The rules for the gate's workers: by cases, and by a world in which processes come and go at any time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmgate.core import crew as rules
from llmgate.core.crew import (
    Begin,
    Close,
    Crew,
    Ended,
    Exit,
    Generation,
    Hurry,
    Kill,
    Leave,
    Leaving,
    NotSpawned,
    Ready,
    Refuse,
    Rush,
    Serve,
    Spawn,
    Spawned,
    Spoke,
    State,
    Stop,
    Tick,
)


class World:
    """Carries out orders as the supervisor would, with process ids from 1."""

    def __init__(self) -> None:
        self.crew = Crew()
        self.now = 0.0
        self.alive: set[int] = set()
        self.left: set[int] = set()
        self.orders: list[rules.Order] = []
        self._next = 0

    def feed(self, event: rules.Event) -> list[rules.Order]:
        """The orders that came of it, those of what it led to included."""
        self.crew, orders = self.crew.step(event)
        came: list[rules.Order] = []
        for order in orders:
            came.append(order)
            self.orders.append(order)
            if isinstance(order, Spawn):
                self._next += 1
                self.alive.add(self._next)
                came += self.feed(Spawned(self._next, order, self.now))
            elif isinstance(order, (Leave, Close)):
                assert order.pid in self.alive and order.pid not in self.left, "nobody is told to leave twice"
                self.left.add(order.pid)
            elif isinstance(order, Kill):
                assert order.pid in self.alive
        return came

    def begin(self, number: int, workers: int = 2) -> list[rules.Order]:
        return self.feed(Begin(Generation(number, workers, 60.0), self.now))

    def ready(self, *pids: int) -> list[rules.Order]:
        return [order for pid in pids for order in self.feed(Ready(pid, self.now))]

    def ended(self, pid: int, code: int = 1) -> list[rules.Order]:
        self.alive.discard(pid)
        return self.feed(Ended(pid, code, f"code {code}", self.now))

    def tick(self, seconds: float = 0.0) -> list[rules.Order]:
        self.now += seconds
        return self.feed(Tick(self.now))


def serving(workers: int = 2) -> World:
    """Generation 1 serves, with process ids from 1."""
    world = World()
    world.begin(1, workers)
    world.ready(*range(1, workers + 1))
    return world


def test_a_generation_serves_when_all_its_workers_are_ready() -> None:
    world = World()
    assert world.begin(1) == [Spawn(0, 1), Spawn(1, 1)]
    assert world.ready(1) == []
    assert world.ready(2) == [Serve(1)]


def test_the_old_workers_leave_in_the_step_that_makes_the_new_serve() -> None:
    world = serving()
    world.begin(2, workers=1)
    assert world.ready(3) == [Serve(2), Leave(1), Leave(2)]
    assert world.ended(1, 0) == world.ended(2, 0) == []


def test_a_generation_of_which_one_worker_ends_is_refused_and_the_old_one_stays() -> None:
    world = serving()
    world.begin(2)
    world.ready(3)
    assert world.ended(4, 2) == [Refuse(2, "code 2"), Leave(3)]
    assert world.crew.count(State.READY, Generation(1, 2, 60.0)) == 2
    world.ended(3, 0)
    assert world.begin(3) == [Spawn(0, 3), Spawn(1, 3)]


def test_a_generation_that_takes_too_long_is_refused() -> None:
    world = serving()
    world.begin(2)
    world.ready(3)
    for pid in (1, 2, 3):
        world.feed(Spoke(pid))
    orders = world.tick(rules.START_S + 1)
    assert [type(order) for order in orders] == [Kill, Refuse, Leave, Leave]
    assert orders[0] == Kill(4, "it was not ready after 60 s")


def test_a_generation_whose_program_is_missing_is_refused() -> None:
    world = serving()
    world.crew, _ = world.crew.step(Begin(Generation(2, 2, 60.0), 0.0))
    assert world.feed(NotSpawned(Spawn(0, 2), "no such file", 0.0)) == [Refuse(2, "no such file")]
    world.alive.add(9)
    assert world.feed(Spawned(9, Spawn(1, 2), 0.0)) == [Leave(9)], "one that was started in vain"


def test_when_the_first_generation_fails_the_gate_ends_with_the_workers_exit_code() -> None:
    world = World()
    world.begin(1)
    assert world.ended(1, 5) == [Refuse(1, "code 5"), Leave(2), Hurry(2)]
    assert world.ended(2, 0) == [Exit(5)]
    world = World()
    world.begin(1, workers=1)
    assert world.ended(1, -9) == [Refuse(1, "code -9"), Exit(1)]


def test_a_steady_worker_that_dies_is_replaced_at_once_and_one_that_cannot_live_ever_later() -> None:
    world = serving(workers=1)
    world.now = rules.STEADY_S
    assert world.ended(1, -9) == [Spawn(0, 1)]
    pauses = []
    for pid in range(2, 12):
        assert world.ended(pid, 1) == []
        (vacancy,) = world.crew.vacancies
        pauses.append(vacancy.due - world.now)
        assert world.tick() == []
        assert [type(order) for order in world.tick(pauses[-1])] == [Spawn]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]


def test_a_worker_that_leaves_on_its_own_is_replaced_before_it_has_gone() -> None:
    world = serving(workers=1)
    world.now = 100.0
    assert world.feed(Leaving(1, world.now)) == [Spawn(0, 1)]
    world.ready(2)
    assert world.ended(1) == []


def test_a_silent_worker_is_killed_and_a_sleeping_machine_silences_nobody() -> None:
    world = serving()
    world.now = 100_000.0
    assert world.tick() == []
    for _ in range(rules.SILENT_TICKS):
        world.feed(Spoke(2))
        orders = world.tick()
    assert orders == [Kill(1, "its event loop has stood still for 15 s")]


def test_a_worker_that_does_not_leave_in_time_is_killed() -> None:
    world = serving(workers=1)
    world.feed(Stop(False, 0.0))
    for _ in range(3):
        world.feed(Spoke(1))
        assert world.tick(25.0) == []
    assert [type(order) for order in world.tick(1.0)] == [Kill]


def test_the_end_is_said_once_and_may_be_hurried() -> None:
    world = serving()
    world.begin(2, workers=1)
    assert world.feed(Stop(False, 0.0)) == [Close(1), Close(2), Close(3)]
    assert world.feed(Stop(False, 0.0)) == []
    assert world.feed(Rush()) == [Hurry(1), Hurry(2), Hurry(3)]
    assert world.ready(3) == world.begin(3) == world.ended(1, 0) == world.ended(2, -9) == []
    assert world.ended(3, 1) == [Exit(0)]


def test_with_a_socket_that_outlives_the_gate_nobody_is_refused_at_its_end() -> None:
    world = serving()
    assert world.feed(Stop(True, 0.0)) == [Leave(1), Leave(2)]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "ready", "ready", "ready", "end", "leave", "tick", "wait", "speak"]),
        st.integers(min_value=0, max_value=9),
    ),
    max_size=60,
)


@given(ACTIONS)
@settings(deadline=None)
def test_whatever_dies_whenever_each_place_has_one_worker_or_one_to_come(actions: list[tuple[str, int]]) -> None:
    world = World()
    world.begin(1, 3)
    number = 1
    for action, choice in actions:
        crew = world.crew
        pids = sorted(world.alive)
        pid = pids[choice % len(pids)] if pids else 0
        before = crew.serving
        if action == "begin" and crew.coming is None and crew.ending is None:
            number += 1
            world.begin(number, 1 + choice % 3)
        elif action == "ready":
            world.ready(pid)
        elif action == "end" and pid:
            world.ended(pid, choice - 5)
        elif action == "leave":
            world.feed(Leaving(pid, world.now))
        elif action == "tick":
            world.tick(0.5)
        elif action == "wait":
            world.tick(31.0)
        elif action == "speak":
            world.feed(Spoke(pid))
        crew = world.crew
        if crew.serving and crew.ending is None:
            staying = [w for w in crew.workers if w.state is not State.LEAVING]
            ours = [w.place for w in staying if w.generation == crew.serving.number]
            assert sorted([*ours, *(v.place for v in crew.vacancies)]) == list(range(crew.serving.workers))
            others = {w.generation for w in staying} - {crew.serving.number}
            assert others <= {crew.coming.number if crew.coming else 0}
        if before and crew.serving != before:
            assert crew.serving and crew.serving.number > before.number
        assert {w.pid for w in crew.workers} == world.alive
    ended = world.crew.ending is not None
    world.feed(Stop(False, world.now))
    for pid in sorted(world.alive):
        world.ended(pid, 0)
    exits = [order for order in world.orders if isinstance(order, Exit)]
    assert len(exits) == 1
    assert ended or exits == [Exit(0)]
