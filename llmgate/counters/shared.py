"""Counters in Redis or Valkey, for several gates that share keys.

One Lua script (shared.lua) does each operation in one atomic step. Its arithmetic is that of `core/limits.py`, by the
clock of the Redis server, so that gates whose clocks differ agree. Of a key there are a hash of counts and a sorted set
of places by their ends.

**What was lost.** A Redis that was restarted or flushed may have forgotten what it had confirmed. Its `run_id` tells:
the script keeps it in an epoch marker, and where it finds another or none, a new epoch begins. From then on

- nothing is let in for `RECALL_MS` (StoreDown): each gate renews its places every `allowances.RENEW_S`, and what the
  store has lost of them is counted again;
- budgets are seeded from the ledger, the larger of both counts stands; not before `COMMIT_MS`, by when the ledger has
  committed what ended just before;
- minutes that began before the epoch count as used up.

So nothing is let in twice, at the price of a minute or two in which keys with limits a minute are held back. An empty
Redis at the very first start is no different from one that lost everything. With `strict` off (limits_when_down is
"open") the first and the last are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from llmgate.core.limits import Counts, Hold, Limits, State, moment
from llmgate.counters import HOLD_MS, Renewed, Reserved, Seed, StoreDown, Unseeded

RECALL_MS = 8_000
COMMIT_MS = 2_000
TIMEOUT_S = 1.0
"""For connecting, and for an answer."""
_CONNECTIONS = 16
_KEEP_MS = 40 * 24 * 3600 * 1000
"""A key that nobody has used for so long is forgotten, which is longer than a month's budget counts."""
_LUA = Path(__file__).with_name("shared.lua")
_RUN_ID = re.compile(rb"run_id:(\w+)")
_NO_SEED = (-1, -1, 0, 0)


class Shared:
    """`url`: redis://, rediss:// or unix://, with its password.    hour: at which budgets turn.    now: for tests, the
    time in milliseconds instead of the server's."""

    def __init__(self, url: str, *, hour: int = 0, strict: bool = True, now: int = 0) -> None:
        self._hour, self._strict, self.now = hour, strict, now
        self._run = b""
        self._undoing: set[asyncio.Task[None]] = set()
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # Each operation may be repeated. What a restart has closed is found out by the first one after it.
            retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
            redis_connect_func=self._connected,
        )
        self._redis = redis.Redis(connection_pool=pool)
        self._script = self._redis.register_script(_script())

    async def reserve(
        self, key: str, limits: Limits, tokens: int, id: int, seed: Seed | None = None
    ) -> Reserved | Unseeded:
        """Who is cancelled meanwhile has reserved nothing."""
        asked = asyncio.ensure_future(self._reserve(key, limits, tokens, id, seed))
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            self._undoing = {task for task in self._undoing if not task.done()} | {
                asyncio.create_task(self._undo(asked))
            }
            raise

    async def _undo(self, asked: asyncio.Future[Reserved | Unseeded]) -> None:
        with contextlib.suppress(StoreDown):
            found = await asked
            if isinstance(found, Reserved) and found.hold:
                await self.settle(found.hold, 0, 0)

    async def _reserve(self, key: str, limits: Limits, tokens: int, id: int, seed: Seed | None) -> Reserved | Unseeded:
        most = (-1 if limit is None else limit for limit in vars(limits).values())
        status, state, epoch, again = await self._do("reserve", key, f"{id:x}", tokens, *_told(seed), *most)
        if status == "recalling":
            left = epoch + RECALL_MS - state.at.ms
            raise StoreDown("Redis has lost what it held, and gates are telling it again", left / 1000)
        if status == "unseeded":
            return Unseeded(state.at)
        minute = state.counts.minute if again is None else again
        return Reserved(state, Hold(key, id, minute, tokens, epoch) if status == "ok" else None)

    async def settle(self, hold: Hold, spent: int, requests: int) -> bool:
        status, *_ = await self._do("settle", hold.key, *_place(hold), spent, requests)
        return status != "lost"

    async def renew(self, holds: Sequence[Hold], seeds: Mapping[str, Seed]) -> Renewed:
        """With nothing to renew, only see whether the store still knows what it did."""
        renewed = Renewed([], {})
        if not holds:
            await self._do("look", "")
        for key in {hold.key for hold in holds}:
            mine = [hold for hold in holds if hold.key == key]
            places = [part for hold in mine for part in _place(hold)]
            status, state, epoch, _ = await self._do("renew", key, *_told(seeds.get(key)), *places)
            if status == "unseeded":
                renewed.wanting[key] = state.at
            else:
                renewed.holds.extend(hold._replace(epoch=epoch) for hold in mine)
        return renewed

    async def look(self, key: str) -> State:
        _, state, *_ = await self._do("look", key)
        return state

    async def close(self) -> None:
        await self._redis.aclose()

    async def _do(self, op: str, key: str, *arguments: Any) -> tuple[str, State, int, int | None]:
        """One run of the script -> (status, the key's state, the store's epoch, and of a reservation that was there
        already its minute)."""
        keys = ["{llmgate}:epoch", f"{{llmgate}}:key:{key}", f"{{llmgate}}:held:{key}"]
        try:
            if not self._run:
                await self._redis.ping()
            head = (op, self._run, self._hour, int(self._strict), self.now)
            said = await self._script(keys=keys, args=[*head, *arguments])
        except (RedisError, OSError) as error:
            raise StoreDown(f"the counters in Redis cannot be used: {error}") from error
        status, now, epoch, *counts = said[:12]
        at = moment(int(now), self._hour)
        state = State(Counts(*map(int, counts)), int(said[12]), at, int(epoch) if self._strict else 0)
        return status.decode(), state, int(epoch), int(said[13]) if len(said) > 13 else None

    async def _connected(self, connection: Any) -> None:
        """Learn which run of the server this connection is with."""
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        found = _RUN_ID.search(await connection.read_response())
        self._run = found[1] if found else b"unknown"


def _place(hold: Hold) -> tuple[str, int, int, int]:
    return f"{hold.id:x}", hold.minute, hold.tokens, hold.epoch


def _script() -> str:
    figures = {"KEEP_MS": _KEEP_MS, "RECALL_MS": RECALL_MS, "COMMIT_MS": COMMIT_MS, "HOLD_MS": HOLD_MS}
    return f"local {', '.join(figures)} = {', '.join(map(str, figures.values()))}\n" + _LUA.read_text()


def _told(seed: Seed | None) -> tuple[int, int, int, int]:
    return (seed.at.day, seed.at.month, seed.day_tokens, seed.month_tokens) if seed else _NO_SEED
