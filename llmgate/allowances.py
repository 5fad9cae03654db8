"""What stands between requests and the counters: reserves for a request, settles what it used, and holds on meanwhile.

Owns the reservations of this worker's requests: it renews their places while they live, tells the store again what it
has lost, and settles later what could not be settled at once. Decides what happens while the store is down. What fits
is `core/limits.py`'s to say, what is counted is the store's (`counters/`).

A key without limits never comes to the store, so it does not notice when that is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from llmgate.core.keys import Key
from llmgate.core.limits import NO_LIMITS, Hold, Moment, Use, day_begins, month_begins, refusal, use
from llmgate.core.ratelimit import LimitsUnavailable, OverLimit, headers
from llmgate.counters import Counters, Reserved, Seed, StoreDown
from llmgate.database import StoreError
from llmgate.metrics import Metrics

log = logging.getLogger("llmgate.limits")

RENEW_S = 2.0
"""How often places are renewed, and what could not be settled is tried again."""
_REST_S = 0.5
"""After a failure no request asks the store for so long, since each would have to wait for it to fail again."""
_FOR_CLIENTS = ("reserve", "look")
_ID_BITS = 2**63 - 1

Spent = Callable[[str, float, float], Awaitable[int]]
"""Tokens that a key has used between two Unix times, by the ledger."""


@dataclass
class Allowance:
    """What one request may use. hold None: nothing is counted for it.    headers: for its answer."""

    hold: Hold | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Allowances:
    """One worker's reservations."""

    def __init__(
        self,
        counters: Counters,
        spent: Spent,
        metrics: Metrics,
        *,
        closed: bool,
        needed: Callable[[], bool],
        clock: Callable[[], float],
        dice: Callable[[], int],
    ) -> None:
        """closed: while the store is down, keys with limits are turned away; else they go uncounted.    needed: whether
        any key has limits now."""
        self._counters, self._spent, self._metrics = counters, spent, metrics
        self._closed, self._needed, self._clock, self._dice = closed, needed, clock, dice
        self._held: dict[int, Hold] = {}
        self._due: dict[int, tuple[int, int]] = {}  # what was used, of those held that have ended
        self._lost: set[int] = set()  # of these, those that the store has to be told of again first
        self._busy: set[int] = set()  # those being settled or renewed: never both at once
        self._down = ""
        self._rest_until = 0.0

    async def reserve(self, key: Key, tokens: int) -> Allowance:
        """Take one request and so many tokens of what a key may use. Raises OverLimit and LimitsUnavailable."""
        if key.limits is NO_LIMITS or key.limits == NO_LIMITS:
            return Allowance()
        try:
            found = await self._reserved(key, tokens)
        except StoreDown as error:
            self._metrics.limits_unavailable.labels("closed" if self._closed else "open").inc()
            if self._closed:
                raise LimitsUnavailable(error.retry_after) from error
            return Allowance()
        told = headers(key.limits, found.state)
        if found.hold is None:
            refused = refusal(key.limits, found.state, tokens)
            assert refused, "a store refuses what core/limits.py does"
            self._metrics.limit_refusals.labels(refused.limit).inc()
            raise OverLimit(refused, told)
        self._held[found.hold.id] = found.hold
        return Allowance(found.hold, told)

    async def settle(self, allowance: Allowance, spent: int, requests: int = 1) -> None:
        """Count what was used in place of what was reserved; only the first time. It may take until the store is back.

        requests: 0 for one that the gate itself turned away.
        """
        hold, allowance.hold = allowance.hold, None
        if hold is not None:
            self._due[hold.id] = (spent, requests)
            with contextlib.suppress(StoreDown):
                await self._settle(hold.id)

    async def use(self, key: Key) -> Use | None:
        """What counts against a key's limits now; None for one without, and while the store is down."""
        if key.limits == NO_LIMITS:
            return None
        with contextlib.suppress(StoreDown), self._asking("look"):
            return use(await self._counters.look(key.name), key.limits)
        return None

    async def tend(self) -> None:
        """Renew and settle for ever."""
        while True:
            await asyncio.sleep(RENEW_S)
            with contextlib.suppress(StoreDown):
                await self._renew()
                for id in list(self._due):
                    await self._settle(id)

    async def close(self) -> None:
        """Settle what is left, if that can be done at once. The rest stays counted as it was reserved."""
        with contextlib.suppress(StoreDown):
            for id in list(self._due):
                await self._settle(id)
        await self._counters.close()

    async def _reserved(self, key: Key, tokens: int) -> Reserved:
        id, seed = self._dice() & _ID_BITS, None
        for _ in range(3):  # the day may turn while the ledger is asked
            with self._asking("reserve"):
                found = await self._counters.reserve(key.name, key.limits, tokens, id, seed)
            if isinstance(found, Reserved):
                return found
            seed = await self._seed(key.name, found.at)
        raise StoreDown("the ledger has just begun to be asked what the key has used")

    async def _settle(self, id: int) -> None:
        if id not in self._due or id in self._busy:
            return
        self._busy.add(id)
        try:
            with self._asking("settle"):
                if await self._counters.settle(self._held[id], *self._due[id]):
                    del self._held[id], self._due[id]
                else:
                    self._lost.add(id)
        finally:
            self._busy.discard(id)

    async def _renew(self) -> None:
        ended = self._due.keys() - self._lost
        holds = [hold for id, hold in self._held.items() if id not in ended and id not in self._busy]
        if not holds and not self._needed():
            return
        ids = {hold.id for hold in holds}
        self._busy |= ids
        try:
            wanting = await self._renewed(holds, {})
            if wanting:
                seeds = {key: await self._seed(key, at) for key, at in wanting.items()}
                await self._renewed([hold for hold in holds if hold.key in seeds], seeds)
        finally:
            self._busy -= ids

    async def _renewed(self, holds: Sequence[Hold], seeds: Mapping[str, Seed]) -> Mapping[str, Moment]:
        with self._asking("renew"):
            done = await self._counters.renew(holds, seeds)
        for hold in done.holds:
            self._held[hold.id] = hold
            self._lost.discard(hold.id)
        return done.wanting

    async def _seed(self, key: str, at: Moment) -> Seed:
        day, month, end = day_begins(at.day, at.hour), month_begins(at.month, at.hour), day_begins(at.day + 1, at.hour)
        try:
            return Seed(at, *[await self._spent(key, since / 1000, end / 1000) for since in (day, month)])
        except StoreError as error:
            raise StoreDown(f"the ledger cannot say what a key has used: {error}") from error

    @contextmanager
    def _asking(self, operation: str) -> Iterator[None]:
        """One operation of the store: timed, and what it shows of the store's health noticed."""
        now = self._clock()
        if now < self._rest_until and operation in _FOR_CLIENTS:
            raise StoreDown(self._down, self._rest_until - now)
        try:
            yield
        except StoreDown as error:
            self._metrics.limit_store_failures.labels(operation).inc()
            self._rest_until = self._clock() + _REST_S
            if not self._down:
                what = "are refused" if self._closed else "go UNCOUNTED"
                log.error("%s; requests of keys with limits %s until it is back", error, what)
            self._down = str(error)
            raise
        self._metrics.limit_store.labels(operation).observe(self._clock() - now)
        if self._down:
            log.warning("keys' counters can be used again")
        self._down = ""
