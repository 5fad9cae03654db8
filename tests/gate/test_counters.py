"""The stores of keys' counters beside a model of them: one file of a host, and a real Redis."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmgate.core.limits import Counts, Hold, Limits, Moment, State, moment, month_of, refusal
from llmgate.counters import HOLD_MS, Counters, Reserved, Seed, StoreDown, Unseeded
from llmgate.counters.local import Local
from llmgate.counters.shared import COMMIT_MS, RECALL_MS, Shared
from tests.databases import Redis

NOON = 1_772_280_000_000 // 60_000 * 60_000
WIDE = Limits(10**6, 10**9, 10**6, 10**10, 10**11)


def wipe(server: Redis) -> None:
    """An empty Redis whose epoch began long ago, as one that has been running all the time."""
    server.flush()
    with redis_client.Redis.from_url(server.url) as client:
        client.hset("{llmgate}:epoch", mapping={"run": client.info("server")["run_id"], "at": 0})


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def seeded(counters: Counters, key: str, limits: Limits, tokens: int, id: int) -> Reserved:
    """A reservation, with a seed of nothing where the store wants one."""
    found = await counters.reserve(key, limits, tokens, id)
    if isinstance(found, Unseeded):
        found = await counters.reserve(key, limits, tokens, id, Seed(found.at, 0, 0))
    assert isinstance(found, Reserved)
    return found


@dataclass
class Entry:
    """One request that was let in, as the model remembers it for ever."""

    minute: int
    day: int
    tokens: int
    requests: int = 1


@dataclass
class Model:
    """What a store should say: adds up every request there ever was, each time anew. Slow and plain."""

    entries: dict[int, Entry] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)

    def state(self, at: Moment) -> State:
        def total(what: str, where: Callable[[Entry], bool]) -> int:
            return sum(getattr(entry, what) for entry in self.entries.values() if where(entry))

        now, before = (lambda e: e.minute == at.minute), (lambda e: e.minute == at.minute - 1)
        return State(
            Counts(
                at.minute,
                total("requests", now),
                total("requests", before),
                total("tokens", now),
                total("tokens", before),
                at.day,
                total("tokens", lambda e: e.day == at.day),
                at.month,
                total("tokens", lambda e: month_of(e.day) == at.month),
            ),
            sum(end > at.ms for end in self.places.values()),
            at,
        )

    def reserve(self, limits: Limits, tokens: int, id: int, at: Moment) -> bool:
        if id in self.places:
            return True
        self.places = {held: end for held, end in self.places.items() if end > at.ms}
        if refusal(limits, self.state(at), tokens):
            return False
        self.entries[id] = Entry(at.minute, at.day, tokens)
        self.places[id] = at.ms + HOLD_MS
        return True

    def settle(self, id: int, spent: int, requests: int) -> None:
        if self.places.pop(id, None) is not None:
            self.entries[id].tokens, self.entries[id].requests = spent, requests

    def renew(self, ids: list[int], at: Moment) -> None:
        self.places.update(dict.fromkeys(ids, at.ms + HOLD_MS))


LIMIT = st.none() | st.integers(1, 8)
TOKENS = st.none() | st.integers(1, 300)
STEP = st.one_of(
    st.tuples(st.just("later"), st.sampled_from([1, 999, 20_000, 59_999, 60_000, 61_000, 3_600_000, 86_400_000 * 3])),
    st.tuples(st.just("reserve"), st.integers(0, 60)),
    st.tuples(st.just("again"), st.integers(0, 5)),
    st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 90), st.integers(0, 1)),
    st.tuples(st.just("renew")),
    st.tuples(st.just("look")),
)


class Clocked:
    """A store whose time stands still until the test moves it."""

    def __init__(self, kind: str, where: Any, hour: int) -> None:
        self.ms, self.hour = NOON, hour
        self._shared = Shared(where.url, hour=hour) if kind == "redis" else None
        self.store: Counters = self._shared or Local(where, lambda: self.ms, hour=hour)
        self.later(0)

    def later(self, ms: int) -> None:
        self.ms += ms
        if self._shared:
            self._shared.now = self.ms

    @property
    def at(self) -> Moment:
        return moment(self.ms, self.hour)


async def same(kind: str, where: Any, hour: int, limits: Limits, steps: list[tuple[Any, ...]]) -> None:
    """Do the same to the store and to the model, and compare all that they say."""
    clocked, model, holds = Clocked(kind, where, hour), Model(), list[Hold]()
    store = clocked.store

    def recent(hold: Hold) -> bool:
        """Only so long would anybody repeat a reservation whose answer was lost."""
        return hold.minute >= clocked.at.minute - 1

    try:
        for number, (what, *how) in enumerate(steps):
            last = holds[-1 - how[0] :][0] if what in ("again", "settle") and holds else None
            if what == "later":
                clocked.later(how[0])
            elif what == "reserve":
                found = await seeded(store, "k", limits, how[0], number)
                assert (found.hold is not None) == model.reserve(limits, how[0], number, clocked.at)
                assert found.state == model.state(clocked.at)
                holds += [found.hold] if found.hold else []
            elif what == "again" and last and recent(last) and model.places.get(last.id, 0) > clocked.ms:
                found = await seeded(store, "k", limits, last.tokens, last.id)
                assert (found.hold, found.state) == (last, model.state(clocked.at))
            elif what == "settle" and last:
                assert await store.settle(last, how[1], how[2])
                model.settle(last.id, how[1], how[2])
                assert await store.settle(last, how[1] + 7, how[2])
            elif what == "renew":
                living = [hold for hold in holds if model.places.get(hold.id, 0) > clocked.ms]
                assert (await store.renew(living, {})).wanting == {}
                model.renew([hold.id for hold in living], clocked.at)
            assert await store.look("k") == model.state(clocked.at)
    finally:
        await store.close()


PLAIN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ARGUMENTS = (
    st.sampled_from([0, 0, 7]),
    st.builds(Limits, LIMIT, TOKENS, LIMIT, TOKENS, TOKENS),
    st.lists(STEP, max_size=30),
)


@PLAIN
@given(*ARGUMENTS)
def test_the_file_does_what_the_model_does(hour: int, limits: Limits, steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(same("file", Path(folder), hour, limits, steps))


@PLAIN
@given(*ARGUMENTS)
def test_redis_does_what_the_model_does(
    redis_server: Redis, hour: int, limits: Limits, steps: list[tuple[Any, ...]]
) -> None:
    wipe(redis_server)
    run(same("redis", redis_server, hour, limits, steps))


def test_the_calendar_of_redis_is_pythons(redis_server: Redis) -> None:
    wipe(redis_server)

    async def look() -> None:
        clocked = Clocked("redis", redis_server, 0)
        for day in [*range(0, 120_000, 97), *range(19_700, 20_500)]:
            clocked.ms = clocked._shared.now = day * 86_400_000 + 1  # type: ignore[union-attr]
            assert (await clocked.store.look("k")).counts.month == month_of(day)
        await clocked.store.close()

    run(look())


@pytest.fixture(params=["file", "redis"])
def clocked(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Clocked]:
    """Makes a store, in the event loop that is to use it."""
    if request.param == "file":
        return lambda: Clocked("file", tmp_path, 0)
    server = request.getfixturevalue("redis_server")
    wipe(server)
    return lambda: Clocked("redis", server, 0)


def test_a_budget_begins_with_what_the_ledger_says(clocked: Callable[[], Clocked]) -> None:
    async def work() -> None:
        it = clocked()
        asked = await it.store.reserve("k", WIDE, 10, 1)
        assert asked == Unseeded(it.at)
        yesterday = moment(it.ms - 86_400_000)
        assert await it.store.reserve("k", WIDE, 10, 1, Seed(yesterday, 5, 6)) == asked
        found = await it.store.reserve("k", WIDE, 10, 1, Seed(it.at, 5, 600))
        assert isinstance(found, Reserved)
        assert (found.state.counts.day_tokens, found.state.counts.month_tokens) == (15, 610)
        again = await it.store.reserve("k", WIDE, 10, 2, Seed(it.at, 500, 600))
        assert isinstance(again, Reserved) and again.state.counts.day_tokens == 25
        await it.store.close()

    run(work())


def test_a_place_that_nobody_renews_is_free_again_and_its_tokens_stay_counted(clocked: Callable[[], Clocked]) -> None:
    async def work() -> None:
        it, one = clocked(), Limits(concurrent_requests=1, tokens_per_day=1000)
        kept = (await seeded(it.store, "k", one, 10, 1)).hold
        assert kept is not None
        it.later(HOLD_MS - 1)
        assert (await seeded(it.store, "k", one, 10, 2)).hold is None
        await it.store.renew([kept], {})
        it.later(HOLD_MS - 1)
        assert (await seeded(it.store, "k", one, 10, 3)).hold is None
        it.later(1)
        assert (await seeded(it.store, "k", one, 10, 4)).hold is not None
        assert (await it.store.look("k")).counts.day_tokens == 20
        await it.store.close()

    run(work())


async def persistent(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Whatever a slow machine does: an operation may be repeated."""
    while True:
        try:
            return await work()
        except StoreDown:
            await asyncio.sleep(0.01)


def _hammer(folder: str, number: int, times: int) -> None:
    async def work() -> None:
        store = Local(Path(folder), lambda: NOON)
        for i in range(times):
            found = await persistent(lambda i=i: seeded(store, "k", WIDE, 3, number * times + i))
            await persistent(lambda hold=found.hold: store.settle(hold, 2, 1))
        await store.close()

    run(work())


def test_workers_that_share_the_file_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hammer, args=(str(tmp_path), number, 200)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    state = run(Local(tmp_path, lambda: NOON).look("k"))
    assert (state.counts.requests, state.counts.tokens, state.running) == (800, 1600, 0)


def _seize(folder: str) -> None:
    """Hold the lock until killed."""

    def for_ever(_: object) -> None:
        (Path(folder) / "seized").touch()
        time.sleep(600)

    run(Local(Path(folder), lambda: NOON)._alone(for_ever))


def test_a_worker_that_stopped_with_the_lock_holds_up_nobody_for_long(tmp_path: Path) -> None:
    holder = multiprocessing.get_context("spawn").Process(target=_seize, args=(str(tmp_path),))
    holder.start()

    async def others() -> int:
        """How often somebody else had the event loop while the store was waited for in vain."""
        turns, asked = 0, asyncio.ensure_future(Local(tmp_path, lambda: NOON).look("k"))
        while not asked.done():
            turns += 1
            await asyncio.sleep(0.001)
        with pytest.raises(StoreDown, match="locked"):
            await asked
        return turns

    try:
        while not (tmp_path / "seized").exists():
            assert holder.is_alive()
            time.sleep(0.01)
        assert run(others()) > 10
    finally:
        os.kill(holder.pid or 0, signal.SIGKILL)
        holder.join()
    assert run(Local(tmp_path, lambda: NOON).look("k")).running == 0


def test_the_file_of_another_boot_is_left_behind(tmp_path: Path) -> None:
    old = tmp_path / "limits.01234567.db"
    old.write_bytes(b"half a file")
    found = run(Local(tmp_path, lambda: NOON).reserve("k", WIDE, 1, 1))
    assert isinstance(found, Unseeded) and not old.exists()
    [made] = tmp_path.glob("limits.*.db")
    assert made.stat().st_mode & 0o777 == 0o600


def test_a_redis_that_lost_everything_lets_nothing_in_twice(redis_server: Redis) -> None:
    wipe(redis_server)
    limits = Limits(requests_per_minute=100, concurrent_requests=3, tokens_per_day=1000)

    async def work() -> None:
        it = Clocked("redis", redis_server, 0)
        it.later(30_000)
        running = [hold for id in (1, 2) if (hold := (await seeded(it.store, "k", limits, 300, id)).hold)]
        ended = (await seeded(it.store, "k", limits, 100, 3)).hold
        assert ended and len(running) == 2
        await it.store.settle(ended, 90, 1)

        redis_server.kill()
        with pytest.raises(StoreDown):
            await it.store.look("k")
        redis_server.start()
        it.later(1000)
        with pytest.raises(StoreDown, match="lost") as recalling:
            await seeded(it.store, "k", limits, 1, 4)
        assert recalling.value.retry_after == RECALL_MS / 1000
        early = await it.store.renew(running, {"k": Seed(it.at, 90, 90)})
        it.later(COMMIT_MS)
        assert await it.store.settle(running[0], 310, 1) is False
        wanting = await it.store.renew(running, {})
        assert (early.holds, wanting.holds, *wanting.wanting) == ([], [], "k")
        renewed = await it.store.renew(running, {"k": Seed(it.at, 90, 90)})
        assert renewed.wanting == {}
        running = renewed.holds
        assert await it.store.renew(running, {}) == renewed
        it.later(RECALL_MS)
        full = await seeded(it.store, "k", limits, 1, 5)
        assert full.hold is None, "the minute in which it was lost counts as used up"
        assert (full.state.counts.day_tokens, full.state.running) == (90 + 600, 2)

        it.later(100_000)
        await it.store.renew(running, {})
        assert (await seeded(it.store, "k", limits, 311, 6)).hold is None, "budget"
        third = (await seeded(it.store, "k", limits, 310, 7)).hold
        assert third and (await seeded(it.store, "k", limits, 0, 8)).hold is None, "places"
        assert await it.store.settle(running[0], 310, 1)
        assert await it.store.settle(running[0], 310, 1)
        assert (await it.store.look("k")).counts.day_tokens == 90 + 310 + 300 + 310
        await it.store.close()

    run(work())


def test_a_redis_that_kept_everything_counts_nothing_twice(redis_server: Redis) -> None:
    """A restart with all data still there: told by the run id alone."""
    wipe(redis_server)

    async def work() -> None:
        it = Clocked("redis", redis_server, 0)
        budget = Limits(tokens_per_day=1000)
        hold = (await seeded(it.store, "k", budget, 300, 1)).hold
        assert hold
        with redis_client.Redis.from_url(redis_server.url) as client:
            client.hset("{llmgate}:epoch", "run", "another")
        it.later(RECALL_MS)
        assert (await it.store.renew([hold], {})).wanting == {}
        it.later(RECALL_MS)
        found = await it.store.reserve("k", budget, 10, 2, Seed(it.at, 100, 100))
        assert isinstance(found, Reserved)
        assert (found.state.counts.day_tokens, found.state.running) == (310, 2)
        await it.store.close()

    run(work())


def test_who_is_cancelled_while_redis_is_asked_has_reserved_nothing(redis_server: Redis) -> None:
    wipe(redis_server)

    async def work() -> None:
        store = Shared(redis_server.url)
        await seeded(store, "k", WIDE, 1, 1)
        for id in range(2, 30):
            asked = asyncio.create_task(store.reserve("k", WIDE, 10, id))
            await asyncio.sleep(0 if id % 2 else 0.0002)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await asyncio.gather(*store._undoing)
        got = await store.look("k")
        assert got.running == 1 + sum(not task.done() for task in store._undoing)
        assert got.counts.tokens <= 1 + 10 * 28
        await store.close()

    run(work())
