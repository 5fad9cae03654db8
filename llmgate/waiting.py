"""Where requests wait for a node that has room: one queue for each model, on the gate's event loop.

Owns the requests that wait and those that have had their turn and are being answered. Of the order knows
`core/queue.py`, of the time it takes `core/pace.py`, of who has room `core/room.py`. Refuses to know how nodes are
ranked or tried: each request brings a function that ranks them for it.

A request goes at once while a candidate has room. Else it waits here, where it can still go to whichever node is free
first, in an order that is fair; in a queue at a node it could do neither. Looked at again when something has happened
to a node: an answer has ended, a report has come. Whoever has waited for a turn has a place kept at the node from that
moment on, so that the next in line finds it taken; who goes at once is counted there before anybody else can look.

A request for which no node is ready waits in the same line, for a while: a node that is being started again is back in
seconds, and who asks again meanwhile only asks more often. Until there is a node, nobody is called late: how fast the
line moved before says nothing of when it will move again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from llmgate.core.fleet import Dispatched, Event, Kept, Released, View
from llmgate.core.pace import Pace
from llmgate.core.policy import Choice
from llmgate.core.queue import Priority, Queue, Ticket
from llmgate.core.room import placed, roomy
from llmnode.wire.errors import DeadlineExceeded, Overloaded

_FIRST_COST_S = 1.0
_LEAST_COST_S = 0.01
"""What an answer costs its key at least while it lasts, or a key whose requests all failed would go for nothing."""
_COST_WEIGHT = 0.1
"""Of the latest answer in the mean time that one takes."""
_RANK_AGAIN_S = 1.0
"""A waiting request's candidates are looked up again after so long: there may be new ones."""
_LOOK_AGAIN_S = 0.25
"""The same where there were none."""


class TurnedAway(Overloaded):
    """503: this request does not wait, or no longer.    reason: `full`, `displaced` or `late`, for the metrics."""

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.reason = reason


class NobodyReady(Exception):
    """No node that could take the request was ready in time.    waited: seconds."""

    def __init__(self, waited: float) -> None:
        super().__init__(f"no node was ready within {waited:.1f} s")
        self.waited = waited


@dataclass(frozen=True)
class Visit:
    """A request that wants a turn.

    deadline: reading of the clock by which its answer must be complete.
    ready_by: one by which some node must have been ready for it.
    choice: the nodes for it as of now, maybe none.    rank: the same by the latest snapshot, whenever it might go.
    beat: awaited every `beat_s` seconds while it waits, to tell its client.
    """

    model: str
    key: str
    priority: Priority
    deadline: float
    ready_by: float
    choice: Choice
    rank: Callable[[], Choice]
    beat: Callable[[], Awaitable[None]]


class Turn:
    """A request's turn. `choice`: nodes, best first.    waited: seconds.

    kept: whether the first node keeps a place for it. Otherwise it is to be sent there before the event loop runs
    anything else.
    """

    def __init__(self, choice: Choice, waited: float, view: View, *, kept: bool) -> None:
        self.choice, self.waited = choice, waited
        self._view, self._kept = view, kept

    def begin(self) -> None:
        """Let go of the place that is kept, as the request is about to be counted there itself. Idempotent."""
        if self._kept:
            self._kept = False
            self._view.apply(Released(self.choice.ranked[0].name))


@dataclass(eq=False)
class _Waiter:
    """turn: the choice, once it has one.    waits: whether it had to.    nodes: its candidates, as of `ranked`.

    homeless: there has been no candidate yet.
    """

    visit: Visit
    turn: asyncio.Future[Choice]
    homeless: bool
    waits: bool = False
    nodes: frozenset[str] = frozenset()
    ranked: float | None = None


@dataclass
class _Line:
    """All of one model. `cost`: seconds that an answer takes, a moving average."""

    queue: Queue = field(default_factory=Queue)
    pace: Pace = field(default_factory=Pace)
    waiters: dict[Ticket, _Waiter] = field(default_factory=dict)
    cost: float = _FIRST_COST_S


class _Stay:
    """One request's time in line and in turn. A class, since a generator for each request took twice the time."""

    __slots__ = ("_began", "_line", "_ticket", "_turn", "_visit", "_waiting")

    def __init__(self, waiting: Waiting, visit: Visit) -> None:
        self._waiting, self._visit = waiting, visit

    async def __aenter__(self) -> Turn:
        self._line, self._ticket = self._waiting.line_of(self._visit)
        self._turn = await self._waiting.enter(self._visit, self._line, self._ticket)
        self._began = self._waiting.clock()
        return self._turn

    async def __aexit__(self, *_: object) -> None:
        self._turn.begin()
        took = self._waiting.clock() - self._began
        self._line.queue.settle(self._ticket, took)
        self._line.cost += _COST_WEIGHT * (took - self._line.cost)


class Waiting:
    """The queues of all models."""

    def __init__(self, view: View, clock: Callable[[], float], *, limit: int, beat_s: float) -> None:
        """`limit`: requests that may wait for one model in this process."""
        self._view, self.clock, self._limit, self._beat_s = view, clock, limit, beat_s
        self._lines: dict[str, _Line] = {}
        self._woken = False
        view.follow(self._heard)

    def lengths(self) -> dict[str, int]:
        """How many wait, by model."""
        return {model: len(line.waiters) for model, line in self._lines.items()}

    def turn(self, visit: Visit) -> _Stay:
        """Wait for a turn, and hold it while the request is answered: `async with waiting.turn(visit) as turn`. Raises
        TurnedAway, NobodyReady, DeadlineExceeded.

        A request whose task is cancelled, or whose `beat` fails, is out of the queue at once.
        """
        return _Stay(self, visit)

    async def enter(self, visit: Visit, line: _Line, ticket: Ticket) -> Turn:
        """The turn, once it is this one's."""
        at_once = None if line.waiters else placed(visit.choice, self._view.fleet)
        if at_once:
            line.queue.pass_by(ticket)
            return Turn(at_once, 0.0, self._view, kept=False)
        came = self.clock()
        choice = await self._admitted(line, ticket, visit)
        return Turn(choice, self.clock() - came, self._view, kept=True)

    def line_of(self, visit: Visit) -> tuple[_Line, Ticket]:
        """Where it stands in line, and what it shows there."""
        line = self._lines.get(visit.model)
        if line is None:
            line = self._lines[visit.model] = _Line()
        return line, Ticket(visit.key, visit.priority, max(line.cost, _LEAST_COST_S))

    async def _admitted(self, line: _Line, ticket: Ticket, visit: Visit) -> Choice:
        """The choice, once it is this one's turn, with a place kept at the first node of it."""
        waiter = _Waiter(visit, asyncio.get_running_loop().create_future(), homeless=not visit.choice.ranked)
        line.queue.push(ticket)
        line.waiters[ticket] = waiter
        self._admit(line)
        if not waiter.turn.done():
            waiter.waits = True
            if len(line.waiters) == 1 and not waiter.homeless:
                line.pace.formed(self.clock())
            self._bound(line, ticket, waiter)
        try:
            await self._wait(line, waiter)
        except BaseException:
            if ticket in line.waiters:
                self._take_out(line, ticket)
            elif waiter.turn.exception() is None:
                # Its client left in the very moment in which it got its turn.
                self._view.apply(Released(waiter.turn.result().ranked[0].name))
                line.queue.settle(ticket, 0.0)
            raise
        return waiter.turn.result()

    async def _wait(self, line: _Line, waiter: _Waiter) -> None:
        """Until its turn has come or it was turned away."""
        visit, came = waiter.visit, self.clock()
        while not waiter.turn.done():
            left = (visit.ready_by if waiter.homeless else visit.deadline) - self.clock()
            if left > 0:
                await asyncio.wait({waiter.turn}, timeout=min(self._beat_s, left))
                # Not when the time is up: what has gone out is no status any more.
                if not waiter.turn.done() and left > self._beat_s:
                    await visit.beat()
            elif not waiter.homeless:
                raise DeadlineExceeded("no node had room for this request in the time that it had")
            else:
                waiter.ranked = -math.inf
                self._admit(line)
                if waiter.homeless:
                    raise NobodyReady(self.clock() - came)

    def _admit(self, line: _Line) -> None:
        """Give turns until nobody that waits has a node with room."""
        fit: Choice | Exception | None = None

        def may_go(ticket: Ticket) -> bool:
            nonlocal fit
            fit = self._fit(line.waiters[ticket], open_nodes)
            return fit is not None

        while line.waiters:
            open_nodes = roomy(self._view.fleet)
            ticket = line.queue.take(may_go)
            if ticket is None:
                break
            waiter = line.waiters.pop(ticket)
            if waiter.waits:
                line.pace.went(self.clock())
            if isinstance(fit, Choice):
                self._view.apply(Kept(fit.ranked[0].name))
                waiter.turn.set_result(fit)
            elif fit is not None:
                waiter.turn.set_exception(fit)
        if not line.waiters:
            line.pace.emptied()

    def _fit(self, waiter: _Waiter, open_nodes: frozenset[str]) -> Choice | Exception | None:
        """Where this one would go now; None for nowhere. An error is its own and must not hold up the others."""
        now = self.clock()
        first = waiter.ranked is None
        again_s = _RANK_AGAIN_S if waiter.nodes else _LOOK_AGAIN_S
        if waiter.ranked is not None and waiter.nodes.isdisjoint(open_nodes) and now - waiter.ranked < again_s:
            return None
        try:
            choice = waiter.visit.choice if first else waiter.visit.rank()
        except Exception as error:
            return error
        waiter.nodes, waiter.ranked = frozenset(candidate.name for candidate in choice.ranked), now
        waiter.homeless = waiter.homeless and not waiter.nodes
        return placed(choice, self._view.fleet)

    def _bound(self, line: _Line, ticket: Ticket, waiter: _Waiter) -> None:
        """Turn away whom waiting would not help: this one when it would be late, or one when there are too many."""
        now = self.clock()
        ahead = line.queue.ahead(ticket)
        wait, left = line.pace.wait(ahead, now), waiter.visit.deadline - now
        if ahead and wait > left and not waiter.homeless:
            # The first in line is never late by a guess: while one waits, the pace goes on being measured.
            message = f"{ahead} requests for this model go before, about {wait:.0f} s, and this one has {left:.0f} s"
            self._turn_away(line, ticket, "late", message, wait)
        elif len(line.waiters) > self._limit:
            surplus = line.queue.surplus()
            reason = "full" if surplus is ticket else "displaced"
            message = f"{self._limit} requests wait for this model, which is the most that may in one worker"
            self._turn_away(line, surplus, reason, message, line.pace.wait(line.queue.ahead(surplus), now))

    def _turn_away(self, line: _Line, ticket: Ticket, reason: str, message: str, wait: float) -> None:
        waiter = line.waiters[ticket]
        self._take_out(line, ticket)
        waiter.turn.set_exception(TurnedAway(reason, message, wait))

    def _take_out(self, line: _Line, ticket: Ticket) -> None:
        line.queue.remove(ticket)
        del line.waiters[ticket]
        if not line.waiters:
            line.pace.emptied()

    def _heard(self, event: Event) -> None:
        """Something has happened to a node. One look for all that happens before the event loop comes round."""
        if (
            self._woken
            or isinstance(event, (Kept, Dispatched))
            or not any(line.waiters for line in self._lines.values())
        ):
            return
        self._woken = True
        asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._woken = False
        for line in self._lines.values():
            if line.waiters:
                self._admit(line)
