"""What the gate keeps in memory of its database, and the thread on which it is read and written.

`Ledger` holds what the hot path needs and runs the store on a thread of its own, so that the event loop never waits for
a disk. Another process (another worker, another gate, `llmgate keys`) may change the database at any time: that is
looked for about twice a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from llmgate.core.fleet import Lease
from llmgate.core.keys import Key, Keyring
from llmgate.database import Database, StoreError
from llmgate.store import Contents, Store

T = TypeVar("T")


class Ledger:
    """The store on its own thread, and its contents in memory.

    `keyring` is what the hot path reads; `on_change` is called on the event loop with the contents after each change,
    whoever made it. `on_write` is called there after each change that was made through this object.
    """

    def __init__(self, where: Database, on_change: Callable[[Contents], None], on_write: Callable[[], None]) -> None:
        self.keyring = Keyring()
        self._where = where
        self._on_change, self._on_write = on_change, on_write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._store: Store | None = None
        self._version = -1

    async def open(self) -> None:
        """Raises StoreError."""
        self._store = await self._run(lambda: Store(self._where))
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

    async def add_key(self, key: Key) -> None:
        """Raises KeyTaken."""
        await self._write(lambda store: store.add_key(key))

    async def change_key(self, name: str, decide: Callable[[Key], Key]) -> Key | None:
        """`decide` runs on the store's thread, alone with the key, and may raise. None: there is no such live key."""
        return await self._write(lambda store: store.change_key(name, decide))

    async def revoke_key(self, name: str, when: float) -> bool:
        """Whether there was a live key of that name."""
        return await self._write(lambda store: store.revoke_key(name, when))

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
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
