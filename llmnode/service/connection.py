"""One client's connection: how long it may take to send and to read, and that its client's leaving is noticed.

Owns what Sanic's own protocol leaves open, and knows nothing of what is asked:
- Sanic's REQUEST_TIMEOUT begins anew with each byte, and ends with the request's head. Here it is the time for the
  whole request, head and body, from the moment in which the rest has to be waited for: a client that sends a byte a
  second is answered 408 and hung up on.
- Sanic stops reading from a client that has sent 64 KiB more than was taken yet, and reads on when it wants more. After
  the last piece of a body it wants no more, so that a client that leaves then is not seen to leave, and its answer is
  computed for nobody. Here reading goes on once the body is complete.
- A client that does not read its answer holds its place at a node until RESPONSE_TIMEOUT, which must be longer than the
  longest answer. Here it is hung up on after SEND_TIMEOUT, where the app has one.
- What Sanic's parser makes of heads and chunks that are none is refused (framing.py).
- Requests that are sent behind one another, without waiting for answers, are answered in one go: thousands fit into one
  read. Here the others have their turn between two of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sanic.exceptions import BadRequest, PayloadTooLarge, RequestTimeout, SanicException
from sanic.http.constants import Stage
from sanic.http.http1 import HTTP_CONTINUE, Http
from sanic.server.protocols.http_protocol import HttpProtocol

from llmnode.service import framing


class HeadTooLarge(SanicException):
    """431 (RFC 6585): the request's line and fields are longer than the app's REQUEST_MAX_HEADER_SIZE."""

    status_code = 431
    quiet = True


class _Http(Http):
    protocol: Connection
    request_body: Any
    """"chunked", True, or None once it is there."""
    request_bytes: int
    _chunks: int
    __slots__ = ("_chunks",)

    _safe_int = staticmethod(framing.number)

    def init_for_request(self) -> None:
        super().init_for_request()  # type: ignore[no-untyped-call]
        self.protocol.due = None
        self._chunks = 0

    async def http1_request_header(self) -> None:
        if not self.protocol.waited:
            await asyncio.sleep(0)
        self.protocol.waited = False
        try:
            await super().http1_request_header()  # type: ignore[no-untyped-call]
        except PayloadTooLarge:
            raise HeadTooLarge(f"the request's head is larger than {self.HEADER_MAX_SIZE} bytes") from None
        request = self.request
        if not framing.is_head(request.head):
            self._give_up("the request's head is not as RFC 9112 has it")
        if request.version == "1.0" and self.request_body == "chunked":
            self._give_up("a request of HTTP/1.0 cannot be chunked")

    def create_empty_request(self) -> None:
        # It stands for a request that could not be made, perhaps because of its URL: then it could not be made either.
        self.url = None
        super().create_empty_request()

    async def read(self) -> bytes | None:
        if self.request_body == "chunked" and not self.request_bytes_left:
            await self._chunk_line()
        data = await super().read()
        transport = self.protocol.transport
        if not self.request_body and transport and not transport.is_closing():
            transport.resume_reading()
        return data

    async def _chunk_line(self) -> None:
        """Wait for the size line of the next chunk, which Sanic reads. Raises BadRequest."""
        if self.expecting_continue:
            self.expecting_continue = False
            await self._send(HTTP_CONTINUE)
        buf = self.recv_buffer
        while (end := buf.find(b"\r\n", 2)) < 0 and len(buf) <= framing.LONGEST_CHUNK_LINE:
            await self._receive_more()
        self._chunks += 1
        if end > framing.LONGEST_CHUNK_LINE or not framing.is_chunk_line(bytes(buf[: max(end, 0)])):
            self._give_up("the body is not in chunks as RFC 9112 has them")
        if framing.too_fine(self._chunks, self.request_bytes):
            self._give_up("the body comes in chunks that are too small")

    def _give_up(self, why: str) -> None:
        self.request_body, self.keep_alive = None, False
        raise BadRequest(why)


class Connection(HttpProtocol):
    """Pass it to Sanic as `protocol`.

    The app's REQUEST_TIMEOUT is the time for a request to arrive; SEND_TIMEOUT, which may be missing, the time in which
    the client must take some of what is buffered for it (64 KiB; it goes on at 16). Both in seconds.

    entrance: which of the program's addresses it came to.      left: called once, when the connection has gone.
    due: when the request that is on its way must be there, in the loop's time.     waited: since the last request there
    was nothing to read for a while.
    """

    HTTP_CLASS = _Http
    __slots__ = ("due", "entrance", "left", "send_timeout", "waited")

    def __init__(self, *, entrance: str = "", left: Callable[[], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.due: float | None = None
        self.waited = True
        self.entrance, self.left = entrance, left
        self.send_timeout: float | None = self.app.config.get("SEND_TIMEOUT")

    @property
    def spare_since(self) -> float | None:
        """Since when nothing has come on it, in seconds of the monotonic clock, while nobody works for it: no request
        has arrived whole, or the last one has been answered. None while somebody does."""
        http = self.http
        return self._time if http is None or http.stage in (Stage.IDLE, Stage.REQUEST) else None

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)  # type: ignore[no-untyped-call]
        if self.left:
            self.left()
            self.left = None

    async def receive_more(self) -> None:
        """Wait for more of the request. Raises RequestTimeout, or BadRequest where that has been answered before its
        body was there; after either the connection is closed."""
        self.waited = True
        http = self._http
        if http is None or (http.stage is Stage.IDLE and not http.request_body):
            await super().receive_more()  # type: ignore[no-untyped-call]
            return
        if self.due is None:
            self.due = self.loop.time() + self.request_timeout
        late = self.loop.call_at(self.due, self._data_received.set)
        try:
            await super().receive_more()  # type: ignore[no-untyped-call]
        finally:
            late.cancel()
        if self.loop.time() >= self.due:
            # What is still to come of the body is not waited for.
            http.request_body, http.keep_alive = None, False
            late_request = BadRequest if http.stage is Stage.IDLE else RequestTimeout
            raise late_request(f"the request was not complete within {self.request_timeout:g} s")

    async def send(self, data: bytes) -> None:
        """Write to the client, once it has taken what was written before. Cancelled when it does not."""
        if self.send_timeout is not None and not self._can_write.is_set():
            stuck = self.loop.call_later(self.send_timeout, self._hang_up)
            try:
                await self._can_write.wait()
            finally:
                stuck.cancel()
        await super().send(data)  # type: ignore[no-untyped-call]

    def _hang_up(self) -> None:
        if self.transport:
            self.transport.abort()
