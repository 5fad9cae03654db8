"""What a worker does with its reservations while their store comes and goes; clock and store are in the test's hand."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llmgate import allowances
from llmgate.allowances import Allowances
from llmgate.core.fleet import Fleet
from llmgate.core.keys import Key
from llmgate.core.limits import Hold, Limits, State
from llmgate.core.ratelimit import LimitsUnavailable, OverLimit
from llmgate.counters import Renewed, Reserved, Seed, StoreDown, Unseeded
from llmgate.counters.local import Local
from llmgate.metrics import Metrics

KEY = Key("k", "d", limits=Limits(concurrent_requests=2, tokens_per_day=1000))
NOON = 1_772_280_000_000


class Moody:
    """A store that fails when told to, and may be made to wait in the middle of a renewal."""

    def __init__(self, folder: Path) -> None:
        self.local = Local(folder, lambda: NOON)
        self.down = False
        self.lost: set[int] = set()
        self.pause: asyncio.Event | None = None
        self.renewed: list[int] = []

    def _check(self) -> None:
        if self.down:
            raise StoreDown("it is down", 1.0)

    async def reserve(
        self, key: str, limits: Limits, tokens: int, id: int, seed: Seed | None = None
    ) -> Reserved | Unseeded:
        self._check()
        return await self.local.reserve(key, limits, tokens, id, seed)

    async def settle(self, hold: Hold, spent: int, requests: int) -> bool:
        self._check()
        return hold.id not in self.lost and await self.local.settle(hold, spent, requests)

    async def renew(self, holds: Sequence[Hold], seeds: Mapping[str, Seed]) -> Renewed:
        self._check()
        if self.pause:
            await self.pause.wait()
        self.renewed += [hold.id for hold in holds]
        self.lost -= {hold.id for hold in holds}
        return await self.local.renew(holds, seeds)

    async def look(self, key: str) -> State:
        self._check()
        return await self.local.look(key)

    async def close(self) -> None:
        await self.local.close()


class Desk:
    """Allowances with what they need. `now`: their clock."""

    def __init__(self, folder: Path, *, closed: bool = True) -> None:
        self.store, self.now, self.seeds = Moody(folder), 0.0, list[tuple[str, float, float]]()
        self.metrics = Metrics(Fleet, dict, lambda: self.now, 3.0)
        numbers = count(1)
        self.it = Allowances(
            self.store,
            self._spent,
            self.metrics,
            closed=closed,
            needed=lambda: True,
            clock=lambda: self.now,
            dice=lambda: next(numbers),
        )

    async def _spent(self, key: str, since: float, until: float) -> int:
        self.seeds.append((key, since, until))
        return 100 if until - since < 100_000 else 700

    async def counts(self) -> tuple[int, int]:
        """Places held, and tokens of the day."""
        state = await self.store.local.look("k")
        return state.running, state.counts.day_tokens


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(allowances, "RENEW_S", 0.001)
    yield


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def until(desk: Desk, wanted: tuple[int, int]) -> None:
    """Let it tend until the counts are these."""
    tending = asyncio.create_task(desk.it.tend())
    while await desk.counts() != wanted:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    tending.cancel()
    await asyncio.gather(tending, return_exceptions=True)


def test_a_budget_begins_with_the_ledger_once(tmp_path: Path) -> None:
    async def work() -> None:
        desk = Desk(tmp_path)
        await desk.it.reserve(KEY, 10)
        await desk.it.reserve(KEY, 10)
        day = NOON // 86_400_000 * 86_400
        month = 1_769_904_000  # 2026-02-01
        assert desk.seeds == [("k", day, day + 86_400), ("k", month, day + 86_400)]
        state = await desk.store.local.look("k")
        assert (state.counts.day_tokens, state.counts.month_tokens) == (120, 720)

    run(work())


def test_what_could_not_be_settled_is_settled_when_the_store_is_back(tmp_path: Path) -> None:
    async def work() -> None:
        desk = Desk(tmp_path)
        one = await desk.it.reserve(KEY, 200)
        desk.store.down = True
        await desk.it.settle(one, 50)
        await desk.it.settle(one, 70)  # only the first time
        assert await desk.counts() == (1, 300)
        desk.store.down = False
        await until(desk, (0, 150))

    run(work())


def test_a_hold_that_was_lost_is_told_again_before_it_is_settled(tmp_path: Path) -> None:
    async def work() -> None:
        desk = Desk(tmp_path)
        one = await desk.it.reserve(KEY, 200)
        assert one.hold
        desk.store.lost = {one.hold.id}
        await desk.it.settle(one, 50)
        assert await desk.counts() == (1, 300)
        await until(desk, (0, 150))
        assert desk.store.renewed == [1]

    run(work())


def test_what_ends_while_it_is_renewed_does_not_come_back(tmp_path: Path) -> None:
    async def work() -> None:
        desk = Desk(tmp_path)
        desk.store.pause = asyncio.Event()
        one = await desk.it.reserve(KEY, 200)
        tending = asyncio.create_task(desk.it.tend())
        await asyncio.sleep(0.05)  # it is in the middle of a renewal now
        await desk.it.settle(one, 50)
        desk.store.pause.set()
        while not desk.store.renewed:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        tending.cancel()
        await asyncio.gather(tending, return_exceptions=True)
        assert await desk.counts() == (0, 150)

    run(work())


def test_while_the_store_is_down_the_policy_decides_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        for closed in (True, False):
            desk = Desk(tmp_path / str(closed), closed=closed)
            desk.store.down = True
            for _ in range(3):
                desk.now += 10
                if closed:
                    with pytest.raises(LimitsUnavailable):
                        await desk.it.reserve(KEY, 1)
                else:
                    assert (await desk.it.reserve(KEY, 1)).hold is None
            assert (await desk.it.reserve(Key("free", "d"), 1)).hold is None
            assert await desk.it.use(KEY) is None
            desk.store.down = False
            desk.now += 10
            assert (await desk.it.reserve(KEY, 1)).hold

    run(work())
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"] * 2


def test_after_a_failure_clients_hear_it_at_once_and_the_store_is_still_tended(tmp_path: Path) -> None:
    async def work() -> None:
        desk = Desk(tmp_path)
        one = await desk.it.reserve(KEY, 200)
        desk.store.down = True
        with pytest.raises(LimitsUnavailable):
            await desk.it.reserve(KEY, 1)
        desk.store.down = False
        with pytest.raises(LimitsUnavailable):
            await desk.it.reserve(KEY, 1)
        await desk.it.settle(one, 50)
        assert await desk.counts() == (0, 150)

    run(work())


def test_a_refusal_holds_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        desk = Desk(tmp_path)
        with pytest.raises(OverLimit) as refused:
            await desk.it.reserve(KEY, 901)
        assert refused.value.refusal.limit == "tokens_per_day"
        assert await desk.counts() == (0, 100)

    run(work())
