"""The door: whether the gate takes work, under which id a request goes, and whose it is."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sanic import Request

from llmgate.core import keys
from llmgate.core.keys import Key, Keyring
from llmnode.wire import headers as names
from llmnode.wire.errors import Overloaded

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_COME_BACK_S = 2.0
_CUT_AGAIN_S = 0.5


class Door:
    """Lets requests in, and in the end puts them out. `active` counts those inside.

    draining: set once; no more come in.   closed: set once; those still inside are being cut.
    leaving: set once; other workers take what is new, and each connection is closed with its next answer.
    """

    def __init__(self, keyring: Callable[[], Keyring], wall: Callable[[], float], *, require_keys: bool) -> None:
        self._keyring, self._wall = keyring, wall
        self._require_keys = require_keys
        self.draining = False
        self.closed = False
        self._inside: set[asyncio.Task[Any]] = set()
        self.leaving = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def active(self) -> int:
        return len(self._inside)

    def who(self, request: Request) -> Key:
        """The key that a request shows. Raises Unauthorized."""
        secret = keys.presented(request.headers.get("authorization"), request.headers.get("x-api-key"))
        if secret is None and not self._require_keys:
            return keys.ANONYMOUS
        return self._keyring().find(secret, self._wall())

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Hold the gate open for one request. Raises Overloaded while the gate drains."""
        if self.draining:
            raise Overloaded("this gate is shutting down", retry_after=_COME_BACK_S, code="draining")
        task = asyncio.current_task()
        assert task is not None, "a request has a task"
        self._inside.add(task)
        self._empty.clear()
        try:
            yield
        finally:
            self._inside.remove(task)
            if not self._inside:
                self._empty.set()

    async def empty(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()

    async def close(self) -> None:
        """Cut those that are still inside, and wait until they have gone.

        Asked more than once: libraries have been seen to let a cancellation pass that comes at an unlucky moment.
        """
        self.closed = True
        while self._inside:
            for task in self._inside:
                task.cancel()
            await asyncio.wait(self._inside, timeout=_CUT_AGAIN_S)


def request_id(request: Request) -> str:
    """The client's `x-request-id` when it is one, else a new one; the same for the whole request."""
    known = getattr(request.ctx, "request_id", None)
    if isinstance(known, str):
        return known
    sent = request.headers.get(names.REQUEST_ID) or ""
    made = sent if _ID.fullmatch(sent) else f"req-{os.urandom(16).hex()}"
    request.ctx.request_id = made
    return made
