"""One client's connection: how long it may take to send and to read, and that its client's leaving is noticed.

Owns three things that Sanic's own protocol leaves open, and knows nothing of what is asked:
- Sanic's REQUEST_TIMEOUT begins anew with each byte, and ends with the request's head. Here it is the time for the
  whole request, head and body, from the moment in which the rest has to be waited for: a client that sends a byte a
  second is answered 408 and hung up on.
- Sanic stops reading from a client that has sent 64 KiB more than was taken yet, and reads on when it wants more. After
  the last piece of a body it wants no more, so that a client that leaves then is not seen to leave, and its answer is
  computed for nobody. Here reading goes on once the body is complete.
- A client that does not read its answer holds its place at a node until RESPONSE_TIMEOUT, which must be longer than the
  longest answer. Here it is hung up on after SEND_TIMEOUT, where the app has one.
"""

from __future__ import annotations

from typing import Any

from sanic.exceptions import BadRequest, RequestTimeout
from sanic.http.constants import Stage
from sanic.http.http1 import Http
from sanic.server.protocols.http_protocol import HttpProtocol


class _Http(Http):
    protocol: Connection

    def init_for_request(self) -> None:
        super().init_for_request()  # type: ignore[no-untyped-call]
        self.protocol.due = None

    async def read(self) -> bytes | None:
        data = await super().read()
        transport = self.protocol.transport
        if not self.request_body and transport and not transport.is_closing():
            transport.resume_reading()
        return data


class Connection(HttpProtocol):
    """Pass it to Sanic as `protocol`.

    The app's REQUEST_TIMEOUT is the time for a request to arrive; SEND_TIMEOUT, which may be missing, the time in which
    the client must take some of what is buffered for it (64 KiB; it goes on at 16). Both in seconds.
    """

    HTTP_CLASS = _Http
    __slots__ = ("due", "send_timeout")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.due: float | None = None
        self.send_timeout: float | None = self.app.config.get("SEND_TIMEOUT")

    async def receive_more(self) -> None:
        """Wait for more of the request. Raises RequestTimeout, or BadRequest where that has been answered before its
        body was there; after either the connection is closed."""
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
