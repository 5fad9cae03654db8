"""The gate's worker processes: who serves, who comes, who leaves. Every rule about that is in this file.

Events go in, orders come out; the supervisor gives the one and carries out the other. Refuses to know processes,
sockets and clocks: times are a monotonic clock's seconds, and a tick is TICK_S of them.

A worker:

    Spawned ──> starting ── Ready ──> ready ── Leaving, or told to ──> leaving ── Ended ──> gone

A generation is the workers that were started from one release and one reading of the settings:

    Begin ──> coming ── (1) all its workers are ready ──> serving ── (1) for the next one ──> its workers leave
                └── (2) one of them ends, or START_S pass: refused, and the serving generation stays

1. The old workers are told to leave in the same step that makes the new ones serve: at no time does nobody accept.
2. In the very first generation there is none to stay, so the crew ends with the worker's exit code.
3. A worker of the serving generation that ends, or leaves on its own, is replaced: at once if it has served for
   STEADY_S, else after a pause that doubles from PAUSE_S to LONGEST_PAUSE_S. So a worker that cannot live costs little.
4. One that says nothing for SILENT_TICKS has an event loop that stands still: it is killed, and (3) applies. Ticks are
   counted, not seconds: a machine that was asleep has silenced its workers for no tick at all.
5. One that leaves and is not gone after its drain time and GRACE_S is killed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

TICK_S = 0.5
SILENT_TICKS = 30
START_S = 60.0
STEADY_S = 30.0
PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
GRACE_S = 15.0


class State(str, Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"


@dataclass(frozen=True)
class Generation:
    """What the crew must know of one: its number, how many workers it has, how long these may take to leave."""

    number: int
    workers: int
    drain_s: float


@dataclass(frozen=True)
class Worker:
    """One process.

    place: which of its generation, from 0.      since: when it came to its state.
    failures: how many in a row have ended early at its place before it.     silent: ticks since its last word.
    """

    pid: int
    place: int
    generation: int
    drain_s: float
    state: State
    since: float
    failures: int = 0
    silent: int = 0


@dataclass(frozen=True)
class Vacancy:
    """A place of the serving generation that is filled again when `due`."""

    place: int
    due: float
    failures: int


# Events.


@dataclass(frozen=True)
class Begin:
    """Start a generation. The caller asks for none while one is coming."""

    generation: Generation
    now: float


@dataclass(frozen=True)
class Spawned:
    """A Spawn was carried out."""

    pid: int
    spawn: Spawn
    now: float


@dataclass(frozen=True)
class NotSpawned:
    """A Spawn could not be carried out."""

    spawn: Spawn
    why: str
    now: float


@dataclass(frozen=True)
class Spoke:
    """A worker said something."""

    pid: int


@dataclass(frozen=True)
class Ready:
    """A worker takes requests."""

    pid: int
    now: float


@dataclass(frozen=True)
class Leaving:
    """A worker ends on its own account."""

    pid: int
    now: float


@dataclass(frozen=True)
class Ended:
    """A process is gone. `code`: its exit code, or minus the signal that killed it."""

    pid: int
    code: int
    why: str
    now: float


@dataclass(frozen=True)
class Tick:
    """TICK_S have passed."""

    now: float


@dataclass(frozen=True)
class Stop:
    """End the gate. `kept`: the listening socket outlives it, so that connections may wait for the next one."""

    kept: bool
    now: float


@dataclass(frozen=True)
class Rush:
    """End it now."""


Event = Begin | Spawned | NotSpawned | Spoke | Ready | Leaving | Ended | Tick | Stop | Rush


# Orders.


@dataclass(frozen=True)
class Spawn:
    """Start a worker."""

    place: int
    generation: int
    failures: int = 0


@dataclass(frozen=True)
class Leave:
    """Tell a worker to take no more connections and end."""

    pid: int


@dataclass(frozen=True)
class Close:
    """Tell a worker to refuse new work and end."""

    pid: int


@dataclass(frozen=True)
class Hurry:
    """Tell a worker that ends not to wait."""

    pid: int


@dataclass(frozen=True)
class Kill:
    """Kill a worker."""

    pid: int
    why: str


@dataclass(frozen=True)
class Serve:
    """This generation serves from now on."""

    generation: int


@dataclass(frozen=True)
class Refuse:
    """This generation has come to nothing."""

    generation: int
    why: str


@dataclass(frozen=True)
class Exit:
    """Nobody is left: end with this exit code."""

    code: int


Order = Spawn | Leave | Close | Hurry | Kill | Serve | Refuse | Exit


@dataclass(frozen=True)
class Crew:
    """All workers at one instant. `ending`: the exit code, once the gate is to end."""

    workers: tuple[Worker, ...] = ()
    serving: Generation | None = None
    coming: Generation | None = None
    coming_since: float = 0.0
    vacancies: tuple[Vacancy, ...] = ()
    ending: int | None = None

    def step(self, event: Event) -> tuple[Crew, tuple[Order, ...]]:
        """The crew after the event, and what is to be done. News of a worker that is gone changes nothing."""
        match event:
            case Begin():
                return self._begin(event)
            case Spawned():
                return self._spawned(event)
            case NotSpawned():
                return self._not_spawned(event)
            case Spoke(pid):
                return self._with(pid, silent=0), ()
            case Ready(pid, now):
                return self._ready(pid, now)
            case Leaving(pid, now):
                return self._leaving(pid, now)
            case Ended():
                return self._ended(event)
            case Tick(now):
                return self._tick(now)
            case Stop(kept, now):
                return self._stop(0, kept=kept, now=now)
            case Rush():
                return self, tuple(Hurry(worker.pid) for worker in self.workers)

    def of(self, pid: int) -> Worker | None:
        return next((worker for worker in self.workers if worker.pid == pid), None)

    def count(self, state: State, generation: Generation | None = None) -> int:
        """Workers in a state: of one generation, or of all."""
        found = [worker for worker in self.workers if worker.state is state]
        return sum(generation is None or worker.generation == generation.number for worker in found)

    def _begin(self, event: Begin) -> tuple[Crew, tuple[Order, ...]]:
        if self.ending is not None:
            return self, ()
        assert self.coming is None, "one generation comes at a time"
        crew = dataclasses.replace(self, coming=event.generation, coming_since=event.now)
        return crew, tuple(Spawn(place, event.generation.number) for place in range(event.generation.workers))

    def _spawned(self, event: Spawned) -> tuple[Crew, tuple[Order, ...]]:
        spawn = event.spawn
        generation = self._generation(spawn.generation)
        wanted = generation is not None and self.ending is None
        worker = Worker(
            event.pid,
            spawn.place,
            spawn.generation,
            generation.drain_s if generation else 0.0,
            State.STARTING if wanted else State.LEAVING,
            event.now,
            spawn.failures,
        )
        crew = dataclasses.replace(self, workers=(*self.workers, worker))
        return crew, () if wanted else (Leave(event.pid),)

    def _not_spawned(self, event: NotSpawned) -> tuple[Crew, tuple[Order, ...]]:
        spawn = event.spawn
        if self.coming and spawn.generation == self.coming.number:
            return self._refuse(1, event.why, event.now)
        if self.ending is None and self.serving and spawn.generation == self.serving.number:
            return self._vacant(spawn.place, spawn.failures + 1, event.now)
        return self, ()

    def _ready(self, pid: int, now: float) -> tuple[Crew, tuple[Order, ...]]:
        worker = self.of(pid)
        if worker is None or worker.state is not State.STARTING:
            return self, ()
        crew = self._with(pid, state=State.READY, since=now, silent=0)
        coming = crew.coming
        if coming is None or crew.count(State.READY, coming) < coming.workers:
            return crew, ()
        # (1)
        old = [w for w in crew.workers if w.generation != coming.number and w.state is not State.LEAVING]
        crew = dataclasses.replace(crew, serving=coming, coming=None, vacancies=())
        for other in old:
            crew = crew._with(other.pid, state=State.LEAVING, since=now)
        return crew, (Serve(coming.number), *(Leave(other.pid) for other in old))

    def _leaving(self, pid: int, now: float) -> tuple[Crew, tuple[Order, ...]]:
        worker = self.of(pid)
        if worker is None or worker.state is State.LEAVING:
            return self, ()
        crew = self._with(pid, state=State.LEAVING, since=now)
        return crew._lost(worker, 1, "it left", now)

    def _ended(self, event: Ended) -> tuple[Crew, tuple[Order, ...]]:
        worker = self.of(event.pid)
        if worker is None:
            return self, ()
        crew = dataclasses.replace(self, workers=tuple(w for w in self.workers if w.pid != event.pid))
        if worker.state is not State.LEAVING:
            return crew._lost(worker, event.code if event.code > 0 else 1, event.why, event.now)
        over = crew.ending is not None and not crew.workers
        return crew, (Exit(crew.ending or 0),) if over else ()

    def _lost(self, worker: Worker, code: int, why: str, now: float) -> tuple[Crew, tuple[Order, ...]]:
        """A worker that should have stayed does not."""
        if self.coming and worker.generation == self.coming.number:
            return self._refuse(code, why, now)
        if self.ending is not None or self.serving is None or worker.generation != self.serving.number:
            return self, ()
        steady = worker.state is State.READY and now - worker.since >= STEADY_S
        return self._vacant(worker.place, 0 if steady else worker.failures + 1, now)

    def _vacant(self, place: int, failures: int, now: float) -> tuple[Crew, tuple[Order, ...]]:
        """(3)"""
        assert self.serving is not None
        if not failures:
            return self, (Spawn(place, self.serving.number),)
        pause = min(LONGEST_PAUSE_S, PAUSE_S * 2.0 ** (failures - 1))
        return dataclasses.replace(self, vacancies=(*self.vacancies, Vacancy(place, now + pause, failures))), ()

    def _refuse(self, code: int, why: str, now: float) -> tuple[Crew, tuple[Order, ...]]:
        coming = self.coming
        assert coming is not None
        refuse = Refuse(coming.number, why)
        if self.serving is None:  # (2)
            crew, orders = dataclasses.replace(self, coming=None)._stop(code, kept=True, now=now)
            hurry = tuple(Hurry(worker.pid) for worker in crew.workers)
            return crew, (refuse, *orders, *hurry)
        crew = dataclasses.replace(self, coming=None)
        theirs = [w for w in crew.workers if w.generation == coming.number and w.state is not State.LEAVING]
        for worker in theirs:
            crew = crew._with(worker.pid, state=State.LEAVING, since=now)
        return crew, (refuse, *(Leave(worker.pid) for worker in theirs))

    def _tick(self, now: float) -> tuple[Crew, tuple[Order, ...]]:
        crew = dataclasses.replace(
            self, workers=tuple(dataclasses.replace(w, silent=w.silent + 1) for w in self.workers)
        )
        orders: list[Order] = []
        for worker in crew.workers:
            why = _overdue(worker, now)
            if why:
                orders.append(Kill(worker.pid, why))
        if crew.coming and now - crew.coming_since > START_S:
            crew, refused = crew._refuse(1, f"not all its workers were ready after {START_S:g} s", now)
            orders += refused
        if crew.ending is None and crew.serving:
            due = [vacancy for vacancy in crew.vacancies if vacancy.due <= now]
            orders += [Spawn(vacancy.place, crew.serving.number, vacancy.failures) for vacancy in due]
            crew = dataclasses.replace(crew, vacancies=tuple(v for v in crew.vacancies if v.due > now))
        return crew, tuple(orders)

    def _stop(self, code: int, *, kept: bool, now: float) -> tuple[Crew, tuple[Order, ...]]:
        if self.ending is not None:
            return self, ()
        crew = dataclasses.replace(self, ending=code, coming=None, vacancies=())
        orders: list[Order] = []
        for worker in self.workers:
            if worker.state is not State.LEAVING:
                crew = crew._with(worker.pid, state=State.LEAVING, since=now)
                orders.append(Leave(worker.pid) if kept else Close(worker.pid))
        return crew, tuple(orders) if crew.workers else (*orders, Exit(code))

    def _generation(self, number: int) -> Generation | None:
        return next((g for g in (self.serving, self.coming) if g and g.number == number), None)

    def _with(self, pid: int, **changes: object) -> Crew:
        workers = (dataclasses.replace(w, **changes) if w.pid == pid else w for w in self.workers)  # type: ignore[arg-type]
        return dataclasses.replace(self, workers=tuple(workers))


def _overdue(worker: Worker, now: float) -> str:
    """(4), (5): why a worker is to be killed; "" when it is not."""
    age = now - worker.since
    if worker.state is State.STARTING:
        return f"it was not ready after {START_S:g} s" if age > START_S else ""
    if worker.silent > SILENT_TICKS:
        return f"its event loop has stood still for {SILENT_TICKS * TICK_S:g} s"
    if worker.state is State.LEAVING and age > worker.drain_s + GRACE_S:
        return f"it was still there {GRACE_S:g} s after its drain time"
    return ""
