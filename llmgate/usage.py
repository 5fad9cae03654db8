"""The pen of the usage ledger: rows that requests leave behind, written together, from a thread of their own.

Owns what happens between the end of a request and the database: at most about half a second passes (GATHER_S), so that
is what a crash loses. While the database cannot be written to, rows are kept, `limit` of them at most; those that come
then are dropped and counted, and are in the request log alone. Refuses to know what a row means.

It also drops what is older than it is to be kept, a little at a time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from llmgate.core.usage import DAY_S, row
from llmgate.database import StoreError
from llmgate.store import Store

log = logging.getLogger("llmgate.usage")

GATHER_S = 0.5
"""How long a row may wait for others, in seconds."""
LIMIT = 20_000
"""Rows that wait at most, about a kilobyte each."""
_APART_S = 1e-6
"""Between the ends of two requests of one worker, at least."""
_AT_ONCE = 1000
_AGAIN_S = 1.0
"""How long after a failure it is tried again."""
_SWEEP_S = 60.0
_BITE = 500
"""Old rows that are dropped in one transaction, between which others write."""

Line = Mapping[str, Any]


class UsageWriter:
    """Takes lines of the request log (core/record.py) and writes them as rows of usage."""

    def __init__(
        self,
        gate: str,
        wall: Callable[[], float],
        count: Callable[[str, int], None],
        *,
        keep_days: int = 0,
        limit: int = LIMIT,
    ) -> None:
        """`gate`: this one's name. `count`: told "written" or "dropped", and how many; from any thread.

        keep_days: older rows are dropped; 0 drops none.
        """
        self._gate, self._wall, self._count = gate, wall, count
        self._keep_s, self._limit = keep_days * DAY_S, limit
        self._lines: deque[tuple[float, Line]] = deque()
        self._batch: list[dict[str, Any]] = []
        self._filled, self._closing = threading.Event(), threading.Event()
        self._noted = self._settled = 0  # each is counted by one thread alone
        self._last = 0.0
        self._lost = 0
        self._failing = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        return self._noted - self._settled

    def note(self, line: Line) -> None:
        """Take a line; never blocks."""
        if self.waiting >= self._limit:
            self._drop(1)
            return
        # With its id it says which request it is, and a client may send the same id again at once.
        self._last = max(self._wall(), self._last + _APART_S)
        self._noted += 1
        self._lines.append((self._last, line))
        if not self._filled.is_set():
            self._filled.set()

    def start(self, store: Store) -> None:
        self._thread = threading.Thread(target=self._work, args=(store,), name="usage", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what waits, if that is possible at once, and stop."""
        self._closing.set()
        self._filled.set()
        if self._thread:
            self._thread.join()

    def _work(self, store: Store) -> None:
        closing, swept = False, 0.0
        while not closing:
            if self._filled.wait(_SWEEP_S):
                self._closing.wait(GATHER_S)
                self._filled.clear()  # before the lines are taken: one that comes after them wakes the thread again
                closing = self._closing.is_set()  # after it: a close() just before would not wake the thread again
                self._write(store)
            if self._keep_s and not closing and abs(self._wall() - swept) >= _SWEEP_S:
                swept = self._wall() if self._sweep(store) else swept
        if self.waiting:
            log.error("%d requests are in the request log alone: the database could not be written", self.waiting)
            self._drop(self.waiting)

    def _write(self, store: Store) -> None:
        """Write all that waits. What fails is tried again until the writer is closed."""
        while self._take():
            try:
                store.add_usage(self._batch)
            except StoreError as error:
                self._say(error)
                if self._closing.wait(_AGAIN_S):
                    return
                continue
            self._count("written", len(self._batch))
            self._settled += len(self._batch)
            self._batch = []
            if self._failing:
                log.warning("usage is written again; that of %d requests is lost", self._lost)
                self._failing, self._lost = False, 0

    def _sweep(self, store: Store) -> bool:
        """Drop some of what is too old, and more while there is nothing to be written; whether that is all for now."""
        try:
            while store.forget_usage(self._wall() - self._keep_s, _BITE) == _BITE:
                if self._filled.is_set():
                    return False
        except StoreError as error:
            self._say(error)
        return True

    def _take(self) -> bool:
        """Make the next batch, unless there is one that failed; whether there is one now."""
        if not self._batch:
            lines = [self._lines.popleft() for _ in range(min(len(self._lines), _AT_ONCE))]
            self._batch = [row(line, at, self._gate) for at, line in lines]
        return bool(self._batch)

    def _say(self, error: StoreError) -> None:
        if not self._failing:
            log.error("usage cannot be written, requests go on, and %d of them are kept: %s", self._limit, error)
        self._failing = True

    def _drop(self, rows: int) -> None:
        self._lost += rows
        self._count("dropped", rows)
