"""Requests that wait at the gate: none is lost, none goes twice, and who leaves is gone at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llmgate.core import policy
from llmgate.core.fleet import Dispatched, Finished, Listed, Lost, Reported, View
from llmgate.core.policy import Ask, Choice
from llmgate.core.queue import Priority
from llmgate.listing import Address
from llmgate.waiting import NobodyReady, Turn, TurnedAway, Visit, Waiting
from llmnode.wire.errors import DeadlineExceeded
from llmnode.wire.node import Load, Model, Report, State

BEAT_S = 0.01
HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


class Rig:
    """A view of idle nodes of one slot each, a queue in front of them, and a clock that the test moves."""

    def __init__(self, *names: str, limit: int = 100, slots: int = 1) -> None:
        self.now = 100.0
        self.view = View()
        self.slots = slots
        self.view.apply(Listed(tuple(Address(name, f"http://{name}") for name in names)))
        for name in names:
            self.report(name)
        self.waiting = Waiting(self.view, lambda: self.now, limit=limit, beat_s=BEAT_S)
        self.beaten = asyncio.Event()
        self.went: list[str] = []
        self.turns: dict[str, Turn] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    def report(self, name: str, **load: int) -> None:
        report = Report(
            boot="b",
            release="r",
            config="c",
            state=State.READY,
            models=(Model(id="tiny"),),
            load=Load(slots=self.slots, **load),
        )
        self.view.apply(Reported(name, report, self.now))

    def rank(self) -> Choice:
        return policy.choose(self.view.fleet, Ask("tiny", policy.CHAT), self.now, 1000.0, "least-loaded")

    async def ask(
        self,
        name: str,
        key: str = "k",
        priority: Priority = NORMAL,
        left: float = 600.0,
        rank: Callable[[], Choice] | None = None,
        ready_s: float = 30.0,
    ) -> None:
        """Start a request that is answered until `end(name)`."""
        self._ends[name] = asyncio.Event()
        visit = self.visit(key, priority, left, rank, ready_s)
        self._tasks[name] = asyncio.create_task(self._answer(name, visit))
        await settled()

    def visit(
        self,
        key: str = "k",
        priority: Priority = NORMAL,
        left: float = 600.0,
        rank: Callable[[], Choice] | None = None,
        ready_s: float = 30.0,
    ) -> Visit:
        rank = rank or self.rank
        return Visit("tiny", key, priority, self.now + left, self.now + ready_s, rank(), rank, self._beat)

    async def _beat(self) -> None:
        self.beaten.set()

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
            await self._tasks[name]
        await settled()

    async def leave(self, name: str) -> None:
        self._tasks[name].cancel()
        await settled()

    async def refused(self, name: str) -> TurnedAway:
        with pytest.raises(TurnedAway) as caught:
            await self._tasks[name]
        return caught.value

    @property
    def in_flight(self) -> dict[str, int]:
        return {node.name: node.in_flight for node in self.view.fleet.nodes.values()}

    @property
    def length(self) -> int:
        return self.waiting.lengths().get("tiny", 0)

    async def _answer(self, name: str, visit: Visit) -> None:
        async with self.waiting.turn(visit) as turn:
            self.went.append(name)
            self.turns[name] = turn
            node = turn.choice.ranked[0].name
            turn.begin()
            self.view.apply(Dispatched(node, self.now))
            try:
                await self._ends[name].wait()
            finally:
                self.view.apply(Finished(node))


async def settled() -> None:
    """Let every task and callback run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[Any]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


def test_a_request_goes_at_once_while_a_node_has_room_and_waits_when_none_has() -> None:
    async def test() -> None:
        rig = Rig("a", "b")
        for name in "1234":
            await rig.ask(name)
        assert rig.in_flight == {"a": 2, "b": 2}
        await rig.ask("5")
        assert rig.went == list("1234")
        assert rig.length == 1
        rig.now += 3.0
        await rig.end("2")
        assert rig.went[-1] == "5"
        assert rig.turns["5"].waited == 3.0
        assert rig.turns["1"].waited == 0.0
        assert rig.length == 0
        assert rig.in_flight == {"a": 2, "b": 2}
        await rig.end("1", "3", "4", "5")
        assert rig.in_flight == {"a": 0, "b": 0}

    run(test)


def test_it_goes_to_whichever_node_is_free_first() -> None:
    async def test() -> None:
        rig = Rig("a", "b")
        for name in "12345":
            await rig.ask(name)
        on_b = next(name for name in "1234" if rig.turns[name].choice.ranked[0].name == "b")
        await rig.end(on_b)
        assert rig.turns["5"].choice.ranked[0].name == "b"

    run(test)


def test_a_report_of_room_wakes_who_waits() -> None:
    async def test() -> None:
        rig = Rig("a")
        rig.report("a", running=1, waiting=4)
        await rig.ask("1")
        assert rig.went == []
        rig.report("a", running=1)
        await settled()
        assert rig.went == ["1"]

    run(test)


def test_a_node_that_joins_takes_from_the_queue() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "123":
            await rig.ask(name)
        assert rig.length == 1
        rig.view.apply(Listed((Address("a", "http://a"), Address("b", "http://b"))))
        rig.now += 1.0
        rig.report("b")
        await settled()
        assert rig.turns["3"].choice.ranked[0].name == "b"

    run(test)


def test_places_are_taken_at_once_so_that_nobody_gets_one_twice() -> None:
    """All in one turn of the event loop, before any of them could have been dispatched."""

    async def test() -> None:
        rig = Rig("a", slots=4)
        rig.report("a", running=4, waiting=4)
        for number in range(20):
            await rig.ask(str(number))
        assert rig.length == 20
        rig.report("a")
        await settled()
        assert len(rig.went) == 5
        assert rig.in_flight == {"a": 5}

    run(test)


def test_a_client_that_leaves_is_out_of_the_queue_at_once() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "12345":
            await rig.ask(name)
        await rig.leave("3")
        assert rig.length == 2
        await rig.end("1")
        assert rig.went == ["1", "2", "4"]
        await rig.end("2", "4", "5")
        assert rig.went == ["1", "2", "4", "5"]
        assert rig.in_flight == {"a": 0}

    run(test)


@pytest.mark.parametrize("leaves_first", [True, False])
def test_a_client_that_leaves_as_its_turn_comes_keeps_no_place(leaves_first: bool) -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "123":
            await rig.ask(name)
        # Both in the same turn of the event loop, in either order.
        if leaves_first:
            rig._tasks["3"].cancel()
            rig.report("a")
            rig.view.apply(Finished("a"))
        else:
            rig.view.apply(Finished("a"))
            rig.waiting._look()
            rig._tasks["3"].cancel()
        await settled()
        assert rig.went == ["1", "2"]
        assert rig.length == 0
        assert rig.in_flight == {"a": 1}
        assert rig.view.fleet.nodes["a"].kept == 0

    run(test)


def test_a_client_that_leaves_between_its_turn_and_its_dispatch_keeps_no_place() -> None:
    async def test() -> None:
        rig = Rig("a")
        rig._ends["1"] = asyncio.Event()
        task = asyncio.create_task(rig._answer("1", rig.visit()))
        task.cancel()
        await settled()
        assert rig.view.fleet.nodes["a"].busy == 0
        with pytest.raises(RuntimeError):
            async with rig.waiting.turn(rig.visit()):
                raise RuntimeError
        assert rig.view.fleet.nodes["a"].busy == 0

    run(test)


def test_who_has_waited_has_a_place_until_it_is_dispatched() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "12":
            await rig.ask(name)
        kept = []

        async def third() -> None:
            async with rig.waiting.turn(rig.visit()) as turn:
                kept.append(rig.view.fleet.nodes["a"].kept)
                turn.begin()
                kept.append(rig.view.fleet.nodes["a"].kept)

        waits = asyncio.create_task(third())
        await settled()
        assert not kept
        await rig.end("1")
        await waits
        assert kept == [1, 0]

    run(test)


def test_a_flood_does_not_delay_another_key_by_more_than_one_turn() -> None:
    async def test() -> None:
        rig = Rig("a")
        for number in range(12):
            await rig.ask(f"f{number}", key="flood")
        await rig.ask("b", key="b")
        await rig.end("f0")
        await rig.end("f1")
        assert "b" in rig.went[-2:]

    run(test)


def test_the_important_go_first() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name, priority in (("1", NORMAL), ("2", NORMAL), ("low", LOW), ("normal", NORMAL), ("high", HIGH)):
            await rig.ask(name, priority=priority)
        for name in ("1", "2", "high"):
            await rig.end(name)
        assert rig.went == ["1", "2", "high", "normal", "low"]

    run(test)


def test_a_full_queue_refuses_the_one_too_many_and_says_when_to_come_back() -> None:
    async def test() -> None:
        rig = Rig("a", limit=3)
        for name in "12345":
            await rig.ask(name)
        rig.now += 4.0
        await rig.end("1")
        await rig.ask("6")
        rig.now += 6.0
        await rig.ask("7")
        refused = await rig.refused("7")
        assert (refused.status, refused.code, refused.reason) == (503, "overloaded", "full")
        assert "3 requests wait" in refused.message
        # One turn took 4 s, the next is not over after 6 s, and three are ahead.
        assert refused.retry_after == pytest.approx((3 + 1) * (4 + 6) / 2)
        assert rig.length == 3

    run(test)


def test_a_flood_that_has_filled_the_queue_makes_room_for_another_key() -> None:
    async def test() -> None:
        rig = Rig("a", limit=4)
        for number in range(6):
            await rig.ask(f"f{number}", key="flood")
        await rig.ask("b", key="b")
        assert (await rig.refused("f5")).reason == "displaced"
        assert rig.length == 4
        await rig.end("f0")
        await rig.end("f1")
        assert "b" in rig.went[-2:]

    run(test)


def test_a_queue_without_places_lets_nobody_wait() -> None:
    async def test() -> None:
        rig = Rig("a", limit=0)
        for name in "123":
            await rig.ask(name)
        assert rig.went == ["1", "2"]
        assert (await rig.refused("3")).retry_after == 0.0

    run(test)


def test_who_would_be_late_is_told_at_once_but_never_the_first_in_line() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "1234":
            await rig.ask(name)
        rig.now += 20.0
        await rig.end("1")
        assert rig.went == ["1", "2", "3"]
        # One turn in 20 s, and "4" is ahead: two turns as if the next were now.
        await rig.ask("5", left=19.0)
        refused = await rig.refused("5")
        assert refused.reason == "late"
        assert refused.retry_after == pytest.approx(20.0)
        await rig.ask("6", left=21.0)
        assert rig.length == 2
        await rig.leave("4")
        await rig.leave("6")
        await rig.ask("7", left=0.1)
        assert rig.length == 1

    run(test)


def test_one_without_a_candidate_waits_and_holds_up_nobody() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "12":
            await rig.ask(name)
        await rig.ask("nowhere", rank=lambda: Choice((), (), "none", "nobody", "tiny", "tiny"))
        await rig.ask("3")
        await rig.end("1")
        assert rig.went == ["1", "2", "3"]
        assert rig.length == 1

    run(test)


def test_a_ranking_that_fails_is_its_own_requests_trouble() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "12":
            await rig.ask(name)
        broken = False

        def rank() -> Choice:
            if broken:
                raise LookupError
            return rig.rank()

        await rig.ask("3", rank=rank)
        await rig.ask("4")
        broken = True
        await rig.end("1")
        with pytest.raises(LookupError):
            await rig._tasks["3"]
        assert rig.went == ["1", "2", "4"]

    run(test)


def test_when_no_node_is_left_it_waits_for_one() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "123":
            await rig.ask(name)
        rig.view.apply(Lost("a", "gone", rig.now))
        await rig.end("1", "2")
        assert rig.went == ["1", "2"]
        rig.now += 5.0
        rig.report("a")
        await settled()
        assert rig.went == ["1", "2", "3"]

    run(test)


def away(*, limit: int = 100) -> Rig:
    """A rig whose only node has gone."""
    rig = Rig("a", limit=limit)
    rig.view.apply(Lost("a", "gone", rig.now))
    return rig


def test_one_that_comes_while_no_node_is_ready_waits_for_one() -> None:
    async def test() -> None:
        rig = away()
        for name in "123":
            await rig.ask(name)
        assert (rig.went, rig.length) == ([], 3)
        rig.now += 5.0
        rig.report("a")
        await settled()
        assert (rig.went, rig.length) == (["1", "2"], 1)
        assert rig.turns["1"].waited == 5.0
        rig.now += 1.0
        await rig.end("1")
        assert rig.went == ["1", "2", "3"]

    run(test)


def test_one_for_which_no_node_gets_ready_is_told_so_in_time() -> None:
    async def test() -> None:
        rig = away()
        await rig.ask("1", ready_s=5.0)
        await rig.ask("2", ready_s=6.0)
        rig.now += 5.0
        with pytest.raises(NobodyReady) as caught:
            await rig._tasks["1"]
        assert caught.value.waited == 5.0
        assert (rig.went, rig.length) == ([], 1)

    run(test)


def test_one_whose_node_is_back_and_full_waits_on() -> None:
    async def test() -> None:
        rig = away()
        await rig.ask("1", ready_s=5.0)
        rig.now += 4.0
        rig.report("a", running=1, waiting=4)
        await settled()
        rig.now += 60.0
        await asyncio.sleep(3 * BEAT_S)
        assert (rig.went, rig.length) == ([], 1)
        rig.report("a")
        await settled()
        assert rig.went == ["1"]

    run(test)


def test_nobody_is_given_up_without_a_last_look() -> None:
    """A node that got ready right after a look would else be seen too late."""

    async def test() -> None:
        rig = away()
        await rig.ask("1", ready_s=0.1)
        rig.report("a")
        await settled()
        assert rig.went == []
        rig.now += 0.1
        await asyncio.sleep(3 * BEAT_S)
        assert rig.went == ["1"]

    run(test)


def test_while_no_node_is_ready_nobody_is_late_but_the_line_is_bounded() -> None:
    async def test() -> None:
        rig = Rig("a", limit=3)
        for name in "123":
            await rig.ask(name)
        rig.now += 100.0
        await rig.end("1", "2", "3")
        rig.view.apply(Lost("a", "gone", rig.now))
        for name in "456":
            await rig.ask(name, left=50.0)
        assert rig.length == 3
        await rig.ask("7", left=50.0)
        assert (await rig.refused("7")).reason == "full"
        await rig.leave("4")
        assert rig.length == 2

    run(test)


def test_a_ranking_may_prefer_a_busy_node_but_not_beyond_twice_its_slots() -> None:
    async def test() -> None:
        rig = Rig("a", "b", slots=4)

        def prefers_a() -> Choice:
            choice = rig.rank()
            return dataclasses.replace(choice, ranked=tuple(sorted(choice.ranked, key=lambda c: c.name)))

        for number in range(10):
            await rig.ask(str(number), rank=prefers_a)
        assert rig.in_flight == {"a": 8, "b": 2}

    run(test)


def test_who_waits_is_told_so_every_now_and_then() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "12":
            await rig.ask(name)
        await asyncio.sleep(3 * BEAT_S)
        assert not rig.beaten.is_set()
        await rig.ask("3")
        for _ in range(3):
            rig.beaten.clear()
            await rig.beaten.wait()
        await rig.end("1")
        assert rig.went == ["1", "2", "3"]

    run(test)


def test_one_whose_client_cannot_be_told_leaves() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "12":
            await rig.ask(name)

        async def broken() -> None:
            raise ConnectionResetError

        visit = dataclasses.replace(rig.visit(), beat=broken)
        with pytest.raises(ConnectionResetError):
            async with rig.waiting.turn(visit):
                pass
        assert rig.length == 0

    run(test)


def test_one_whose_time_is_up_leaves() -> None:
    async def test() -> None:
        rig = Rig("a")
        for name in "12":
            await rig.ask(name)
        await rig.ask("3", left=5.0)
        rig.now += 5.0
        with pytest.raises(DeadlineExceeded):
            await rig._tasks["3"]
        assert rig.length == 0

    run(test)
