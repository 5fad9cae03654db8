"""Counters in a SQLite file of this host, for one gate: shared by its workers, by the generations of a reload and with
whoever starts after a crash.

One row a key, one short transaction an operation, on the event loop: 9 us each, where a thread would take 60 to be
woken. Nothing is synced to the disk, which would take longer than all the rest. A process that dies loses nothing by
that; a machine that does may leave half a file, so each boot has a file of its own, whose budgets begin with what the
ledger says. An operation waits for another worker's at most `BUSY_S` on the event loop, then beside it; who holds the
lock for longer than `PATIENCE_S` (a worker that was stopped) makes the store count as down.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from struct import Struct
from typing import TypeVar

from llmgate.core.limits import Counts, Hold, Limits, State, added, moment, refusal, seeded, settled, turned
from llmgate.counters import HOLD_MS, Renewed, Reserved, Seed, StoreDown, Unseeded

T = TypeVar("T")

BUSY_S = 0.02
PATIENCE_S = 1.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SCHEMA = "CREATE TABLE IF NOT EXISTS counters (key TEXT PRIMARY KEY, counts BLOB, held BLOB) WITHOUT ROWID"
_FIND = "SELECT counts, held FROM counters WHERE key = ?"
_KEEP = "UPDATE counters SET counts = ?, held = ? WHERE key = ?"
_MAKE = "INSERT INTO counters (counts, held, key) VALUES (?, ?, ?)"
_COUNTS = Struct(f"={len(Counts._fields)}q")
_PLACE = 4
"""Numbers that are kept of a place: id, end, minute, tokens."""


class Local:
    """`clock`: milliseconds since the epoch.    hour: at which budgets turn."""

    def __init__(self, folder: Path, clock: Callable[[], int], *, hour: int = 0) -> None:
        """Opens nothing yet: a gate whose keys have no limits needs no file."""
        self._path = folder / f"limits.{_BOOT.read_text()[:8]}.db"
        self._clock, self._hour = clock, hour
        self._db: sqlite3.Connection | None = None

    async def reserve(
        self, key: str, limits: Limits, tokens: int, id: int, seed: Seed | None = None
    ) -> Reserved | Unseeded:
        def work(db: sqlite3.Connection) -> Reserved | Unseeded:
            at = moment(self._clock(), self._hour)
            counts, held = _found(db, key)
            if counts is None:
                if seed is None or (seed.at.day, seed.at.month) != (at.day, at.month):
                    return Unseeded(at)
                counts = seeded(turned(Counts(), at), seed.day_tokens, seed.month_tokens)
            counts, held = turned(counts, at), _living(held, at.ms)
            state = State(counts, len(held) // _PLACE, at)
            place = _place(held, id)
            if place is not None:
                return Reserved(state, Hold(key, id, *held[place + 2 : place + 4]))
            hold = None
            if refusal(limits, state, tokens) is None:
                hold = Hold(key, id, counts.minute, tokens)
                held.extend((id, at.ms + HOLD_MS, hold.minute, tokens))
                state = State(added(counts, tokens), state.running + 1, at)
            _keep(db, key, state.counts, held)
            return Reserved(state, hold)

        return await self._alone(work)

    async def settle(self, hold: Hold, spent: int, requests: int) -> bool:
        def work(db: sqlite3.Connection) -> None:
            counts, held = _found(db, hold.key)
            place = _place(held, hold.id)
            if counts is not None and place is not None:
                del held[place : place + _PLACE]
                counts = turned(counts, moment(self._clock(), self._hour))
                _keep(db, hold.key, settled(counts, hold, spent, requests, self._hour), held)

        await self._alone(work)
        return True

    async def renew(self, holds: Sequence[Hold], seeds: Mapping[str, Seed]) -> Renewed:
        def work(db: sqlite3.Connection) -> None:
            ends = self._clock() + HOLD_MS
            for key in {hold.key for hold in holds}:
                counts, held = _found(db, key)
                if counts is None:
                    continue
                for hold in holds:
                    if hold.key == key and (place := _place(held, hold.id)) is not None:
                        held[place + 1] = ends
                    elif hold.key == key:
                        held.extend((hold.id, ends, hold.minute, hold.tokens))
                _keep(db, key, counts, held)

        if holds:
            await self._alone(work)
        return Renewed(list(holds), {})

    async def look(self, key: str) -> State:
        at = moment(self._clock(), self._hour)
        counts, held = await self._alone(lambda db: _found(db, key))
        return State(turned(counts or Counts(), at), len(_living(held, at.ms)) // _PLACE, at)

    async def close(self) -> None:
        if self._db:
            self._db.close()
        self._db = None

    async def _alone(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do it in a transaction that nobody else's overlaps."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                db = self._db = self._db or self._open()
                db.execute("BEGIN IMMEDIATE")
                break
            except (OSError, sqlite3.Error) as error:
                busy = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
                if not busy or time.monotonic() > end:
                    raise self._down(error) from error
            await asyncio.sleep(BUSY_S)
        try:
            done = work(db)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            db.close()  # which ends the transaction, whatever state it was in
            self._db = None
            raise self._down(error) from error
        return done

    def _down(self, error: Exception) -> StoreDown:
        return StoreDown(f"the counters in {self._path} cannot be used: {error}")

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in self._path.parent.glob("limits.*.db*"):
            if not old.name.startswith(self._path.name):
                old.unlink(missing_ok=True)
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        db = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        db.execute(_SCHEMA)
        return db


def _found(db: sqlite3.Connection, key: str) -> tuple[Counts | None, array[int]]:
    row = db.execute(_FIND, (key,)).fetchone()
    held = array("q", row[1] if row else b"")
    return (Counts._make(_COUNTS.unpack(row[0])) if row else None), held


def _keep(db: sqlite3.Connection, key: str, counts: Counts, held: array[int]) -> None:
    row = (_COUNTS.pack(*counts), held.tobytes(), key)
    if not db.execute(_KEEP, row).rowcount:
        db.execute(_MAKE, row)


def _living(held: array[int], now: int) -> array[int]:
    """The places that have not run out."""
    if not held or min(held[1::_PLACE]) > now:
        return held
    places = (held[i : i + _PLACE] for i in range(0, len(held), _PLACE))
    return array("q", chain.from_iterable(place for place in places if place[1] > now))


def _place(held: array[int], id: int) -> int | None:
    """Where the place with this id begins."""
    try:
        return held[::_PLACE].index(id) * _PLACE
    except ValueError:
        return None
