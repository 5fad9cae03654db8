"""What the gate keeps in memory of its database, and the threads on which it is read and written.

`Ledger` holds what the hot path needs and runs the store on threads of its own, so that the event loop never waits for
a disk. Another process (another worker, another gate, `llmgate keys`) may change the database at any time: that is
looked for about twice a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from llmgate.core.fleet import Lease
from llmgate.core.keys import Key, Keyring
from llmgate.core.usage import Question, Selection
from llmgate.database import Database, StoreError
from llmgate.store import Contents, Store
from llmgate.usage import UsageWriter

T = TypeVar("T")
_READERS = 2


class Ledger:
    """The store on its own threads, and what of it is kept in memory.

    `keyring` is what the hot path reads; `on_change` is called on the event loop with the contents after each change,
    whoever made it. `on_write` is called there after each change that was made through this object. `usage` writes
    what `note` is told, unless there is none.
    """

    def __init__(
        self,
        where: Database,
        on_change: Callable[[Contents], None],
        on_write: Callable[[], None],
        usage: UsageWriter | None = None,
    ) -> None:
        self.keyring = Keyring()
        self._usage = usage
        self._where = where
        self._on_change, self._on_write = on_change, on_write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        # What is asked of usage may take seconds, which no change of keys and leases should wait for.
        self._readers = ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="ledger-read")
        self._store: Store | None = None
        self._version = -1

    async def open(self) -> None:
        """Raises StoreError."""
        self._store = await self._run(lambda: Store(self._where))
        if self._usage:
            self._usage.start(self._store)
        await self.refresh()

    async def close(self) -> None:
        if self._store:
            if self._usage:
                await self._run(self._usage.close)
            await self._run(self._store.close)
        self._readers.shutdown()
        self._thread.shutdown()

    def note(self, line: Mapping[str, Any]) -> None:
        """Take a line of the request log (core/record.py) for the usage ledger; never blocks.

        Of requests without a good key there is nothing to account for, and anybody could fill the database with them.
        """
        if self._usage and line["key"] is not None:
            self._usage.note(line)

    @property
    def unwritten(self) -> int:
        """Rows of usage that are not in the database yet."""
        return self._usage.waiting if self._usage else 0

    async def spent(self, key: str, since: float, until: float) -> int:
        """Tokens, prompts and answers together, of a key's requests in the database that ended in that time.

        Times in seconds since the epoch; `until` is not part of it.
        """
        return await self._read(lambda store: store.spent(key, since, until))

    async def usage(self, asked: Question) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Usage added up -> rows, and the total of all."""
        return await self._read(lambda store: store.usage(asked))

    async def requests(self, asked: Selection) -> list[dict[str, Any]]:
        """Rows of usage, newest first."""
        return await self._read(lambda store: store.requests(asked))

    async def request(self, name: str) -> dict[str, Any] | None:
        """One row of usage, by its id or the request's."""
        return await self._read(lambda store: store.request(name))

    async def newest_request(self) -> int:
        return await self._read(lambda store: store.newest_request())

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

    async def add_key(self, key: Key) -> None:
        """Raises KeyTaken."""
        await self._write(lambda store: store.add_key(key))

    async def change_key(self, name: str, decide: Callable[[Key, tuple[Key, ...]], Key]) -> Key | None:
        """`decide` gets the key and all others, runs on the store's thread, alone with them, and may raise. None: there
        is no such live key."""
        return await self._write(lambda store: store.change_key(name, decide))

    async def all_keys(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        return await self._read(lambda store: store.all_keys())

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

    async def _read(self, work: Callable[[Store], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: work(self._opened()))

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
