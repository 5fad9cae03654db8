"""What the gate writes down: keys and drain leases in SQLite, and one line a request in the request log.

`Store` is the database (`state_dir/llmgate.db`, WAL), used from one thread. `Ledger` keeps in memory what the hot path
needs of it and runs the store on a thread of its own, so that the event loop never waits for a disk. `RequestLog`
writes lines the same way. Prompts, answers and secrets are never written; a key is kept as its digest.

Another process (another worker, `llmgate keys`) may change the database at any time: `PRAGMA data_version` says so in
microseconds, and is asked about twice a second.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmgate.core.fleet import Lease
from llmgate.core.keys import Key, Keyring
from llmgate.core.queue import Priority

T = TypeVar("T")
log = logging.getLogger("llmgate.ledger")

FILE = "llmgate.db"
GATHER_S = 0.05
"""How long a line of the request log may wait for others, in seconds."""
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_PIECE = 4096
"""Bytes that reach a pipe in one piece (PIPE_BUF of pipe(7)). A file takes any one write as a whole."""
SCHEMA_VERSION = 2
_BUSY_MS = 5000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    admin INTEGER NOT NULL,
    models TEXT NOT NULL,
    created REAL NOT NULL,
    revoked REAL,
    priority TEXT NOT NULL DEFAULT 'normal'
);
CREATE UNIQUE INDEX IF NOT EXISTS live_name ON keys (name) WHERE revoked IS NULL;
CREATE UNIQUE INDEX IF NOT EXISTS live_digest ON keys (digest) WHERE revoked IS NULL;
CREATE TABLE IF NOT EXISTS leases (
    node TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    reason TEXT NOT NULL,
    taken REAL NOT NULL,
    expires REAL
);
"""
_STEPS = {1: "ALTER TABLE keys ADD COLUMN priority TEXT NOT NULL DEFAULT 'normal';"}
"""By schema version, what makes it the next one."""


class StoreError(Exception):
    """The database cannot be opened or used; the message names the file."""


class KeyTaken(Exception):
    """A live key of that name, or with that secret, exists already."""


@dataclass(frozen=True)
class Contents:
    """All that the gate keeps in memory of the database."""

    keys: tuple[Key, ...]
    leases: tuple[Lease, ...]


class Store:
    """The database. Every method is one transaction. Use it from the thread that made it."""

    def __init__(self, folder: Path) -> None:
        """Open or make `folder/llmgate.db`, readable by its owner alone. Raises StoreError."""
        path = folder / FILE
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives its -wal and -shm files the mode of the database.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(path, timeout=_BUSY_MS / 1000, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._migrate(path)
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error
        except sqlite3.Error as error:
            raise StoreError(f"cannot use the database {path}: {error}") from error

    def close(self) -> None:
        self._db.close()

    def version(self) -> int:
        """A number that changes when another connection has written to the database."""
        row = self._db.execute("PRAGMA data_version").fetchone()
        return int(row[0])

    def contents(self) -> Contents:
        return Contents(tuple(self.all_keys()), self.leases())

    def all_keys(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        columns = "name, digest, admin, models, created, revoked, priority"
        rows = self._db.execute(f"SELECT {columns} FROM keys ORDER BY id").fetchall()
        return [Key(n, d, bool(a), tuple(json.loads(m)), c, r, Priority.of(p)) for n, d, a, m, c, r, p in rows]

    def add_key(self, key: Key) -> None:
        """Raises KeyTaken."""
        try:
            self._db.execute(
                "INSERT INTO keys (name, digest, admin, models, created, priority) VALUES (?, ?, ?, ?, ?, ?)",
                (key.name, key.digest, key.admin, json.dumps(key.models), key.created, key.priority.word),
            )
        except sqlite3.IntegrityError as error:
            what = "of that name" if "keys.name" in str(error) else "with that secret"
            raise KeyTaken(f"a live key {what} exists already") from error

    def set_rights(self, name: str, *, admin: bool, models: Sequence[str], priority: Priority) -> None:
        """Change what a live key may do."""
        self._db.execute(
            "UPDATE keys SET admin = ?, models = ?, priority = ? WHERE name = ? AND revoked IS NULL",
            (admin, json.dumps(tuple(models)), priority.word, name),
        )

    def revoke_key(self, name: str, when: float) -> bool:
        """Whether there was a live key of that name."""
        done = self._db.execute("UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL", (when, name))
        return done.rowcount > 0

    def leases(self) -> tuple[Lease, ...]:
        rows = self._db.execute("SELECT node, owner, reason, taken, expires FROM leases ORDER BY node").fetchall()
        return tuple(Lease(*row) for row in rows)

    def take_lease(self, decide: Callable[[tuple[Lease, ...]], Lease]) -> Lease:
        """Store what `decide` makes of the leases there are. Nobody changes them meanwhile. Raises what it does."""
        with self._alone():
            lease = decide(self.leases())
            self._db.execute(
                "INSERT OR REPLACE INTO leases (node, owner, reason, taken, expires) VALUES (?, ?, ?, ?, ?)",
                (lease.node, lease.owner, lease.reason, lease.taken, lease.expires),
            )
        return lease

    def release_lease(self, node: str, check: Callable[[tuple[Lease, ...]], None]) -> bool:
        """Remove a node's lease if `check` does not raise; whether there was one."""
        with self._alone():
            check(self.leases())
            return self._db.execute("DELETE FROM leases WHERE node = ?", (node,)).rowcount > 0

    def drop_expired(self, wall: float) -> None:
        self._db.execute("DELETE FROM leases WHERE expires <= ?", (wall,))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A transaction that other processes' writes wait for."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _migrate(self, path: Path) -> None:
        """Make the tables, or bring those of an older release up to date; in one transaction, since others may try."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found > SCHEMA_VERSION:
                known = f"schema {found}, this one knows {SCHEMA_VERSION}"
                raise StoreError(f"{path} was made by a newer llmgate ({known})")
            work = [_STEPS[at] for at in range(found, SCHEMA_VERSION)] if found else _SCHEMA.split(";")
            for statement in work:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


class Ledger:
    """The store on its own thread, and its contents in memory.

    `keyring` is what the hot path reads; `on_change` is called on the event loop with the contents after each change,
    whoever made it. `on_write` is called there after each change that was made through this object.
    """

    def __init__(self, folder: Path, on_change: Callable[[Contents], None], on_write: Callable[[], None]) -> None:
        self.keyring = Keyring()
        self._folder = folder
        self._on_change, self._on_write = on_change, on_write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._store: Store | None = None
        self._version = -1

    async def open(self) -> None:
        """Raises StoreError."""
        self._store = await self._run(lambda: Store(self._folder))
        await self.refresh()

    async def close(self) -> None:
        if self._store:
            await self._run(self._store.close)
        self._thread.shutdown()

    async def refresh(self) -> None:
        """Read the database again if another process has written to it."""
        contents = await self._run(self._changed)
        if contents:
            self._take(contents)

    async def take_lease(self, decide: Callable[[tuple[Lease, ...]], Lease]) -> Lease:
        """`decide` runs on the store's thread, alone with the leases, and may raise."""
        return await self._write(lambda store: store.take_lease(decide))

    async def release_lease(self, node: str, check: Callable[[tuple[Lease, ...]], None]) -> bool:
        """`check` runs on the store's thread, alone with the leases, and may raise."""
        return await self._write(lambda store: store.release_lease(node, check))

    async def drop_expired(self, wall: float) -> None:
        await self._write(lambda store: store.drop_expired(wall))

    async def _write(self, change: Callable[[Store], T]) -> T:
        def work() -> tuple[T, Contents]:
            store = self._opened()
            done = change(store)
            return done, store.contents()

        done, contents = await self._run(work)
        self._take(contents)
        self._on_write()
        return done

    def _changed(self) -> Contents | None:
        store = self._opened()
        version = store.version()
        if version == self._version:
            return None
        self._version = version
        return store.contents()

    def _take(self, contents: Contents) -> None:
        self.keyring = Keyring(contents.keys)
        self._on_change(contents)

    def _opened(self) -> Store:
        if self._store is None:
            raise StoreError("the ledger is not open")
        return self._store

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StoreError(f"the database {self._folder / FILE} cannot be used: {error}") from error


class RequestLog:
    """Appends one JSON line a request to a file, or to standard output, from a thread of its own.

    The thread wakes at most every `GATHER_S` and writes all that came meanwhile: to wake it for each line took a tenth
    of the processor time of a request. The file is opened anew for each batch, so that it may be rotated by renaming.
    Several workers write to it: each write is of whole lines and appends, so that no line is torn by another's
    (_PIECE). When it cannot be written, lines are dropped and counted, and the log says so once; requests go on.
    """

    def __init__(self, target: str, limit: int = 10_000) -> None:
        """`target` is a path or "-". At most `limit` lines wait to be written."""
        self._target = target
        self._limit = limit
        self._lines: deque[bytes] = deque()
        self._filled, self._closing = threading.Event(), threading.Event()
        self.dropped = 0
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Queue a line; never blocks."""
        if len(self._lines) >= self._limit:
            self.dropped += 1
            return
        self._lines.append(_ENCODE(line).encode() + b"\n")
        if not self._filled.is_set():
            self._filled.set()

    def close(self) -> None:
        """Write what is queued and stop."""
        self._closing.set()
        self._filled.set()
        self._thread.join()

    def _work(self) -> None:
        closing = False
        while not closing:
            self._filled.wait()
            closing = self._closing.wait(GATHER_S)
            self._filled.clear()  # before the lines are taken: one that comes after them wakes the thread again
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if lines:
                self._append(lines)

    def _append(self, lines: list[bytes]) -> None:
        try:
            if self._target == "-":
                _write_whole(sys.stdout.fileno(), lines)
            else:
                out = os.open(self._target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    _write_whole(out, lines)
                finally:
                    os.close(out)
        except OSError as error:
            self.dropped += len(lines)
            if not self._failing:
                log.error("cannot write the request log %s: %s; requests go on unlogged", self._target, error.strerror)
            self._failing = True
            return
        if self._failing:
            log.warning("the request log can be written again; %d lines were lost", self.dropped)
        self._failing = False


def _write_whole(out: int, lines: list[bytes]) -> None:
    """Write whole lines at a time, as many as fit into a piece; a longer line goes alone."""
    piece = b""
    for line in [*lines, b""]:
        if piece and (not line or len(piece) + len(line) > _PIECE):
            while piece:
                piece = piece[os.write(out, piece) :]
        piece += line
