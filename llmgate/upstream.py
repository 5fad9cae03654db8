"""HTTP/1.1 towards the nodes: one request out, one answer in, over connections that are kept and used again.

Owns sockets, their pool, and how long each step may take. Refuses to know what is asked, what an answer means and who
else could be asked. Parses with httptools, as Sanic does; the rest is here because a general client took a third of the
gate's time for a request, most of it for what no node ever sends.

What holds of every request:

- The connection used last is used first, and one that is idle for `idle_s` is closed, long before a node would. A node
  may close one all the same, in the very moment in which it is chosen. That is Broken like any other end: nobody can
  tell from here what the node has made of the request, so it is not sent again, and whoever asked can say so.
- Of an answer, `READ_AHEAD` bytes and one read of the socket (at most 256 KiB) are held. More is read when these have
  been taken, so that a slow client holds its node back.
- What is no body is bounded: the head, chunk extensions, trailers, interim answers (1xx, which are passed over).
  `FRAMING_LIMIT` bytes in a row without a byte of body are too many.
- Closing an answer before its end closes the connection at once, and so does every failure and the end of the asking
  task. That is how a node learns that nobody waits any more.
- A node that sends what nobody asked for loses the connection: the next answer on it could be taken for another's.

Source of the framing: RFC 9112, section 6; of how long a connection lasts: section 9.3.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

READ_AHEAD = 64 * 1024
FRAMING_LIMIT = 64 * 1024


class UpstreamError(ConnectionError):
    """Nothing more comes of a request. Its text says why in a few words, without the node's address."""


class Unreachable(UpstreamError):
    """No connection could be made."""


class Stalled(UpstreamError):
    """The node took nothing, or sent nothing, for too long."""


class Broken(UpstreamError):
    """The connection ended before the answer did, or what came is not an HTTP answer."""


class Late(UpstreamError):
    """The time for the whole of it is over."""


@dataclass(frozen=True)
class Patience:
    """How many seconds things may take.

    connect: until there is a connection.    take: until the node takes some of the request; noticed within twice that.
    silence: until some of the answer comes, counted while it is waited for.    whole: everything together.
    """

    connect: float
    take: float
    silence: float
    whole: float


class Upstream:
    """Connections to all nodes, of one event loop."""

    def __init__(self, *, idle_s: float, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: for addresses with https; where there is none, the system's own trust."""
        self._idle_s = idle_s
        self._tls = tls
        self._places: dict[str, _Place] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    async def ask(
        self, method: str, base: str, path: str, headers: Iterable[tuple[str, str]], body: bytes, patience: Patience
    ) -> Answer:
        """Send a request to `base` (http://host:port) and wait for the head of its answer, which is to be closed.

        Raises UpstreamError, and ValueError for a header that would be read as two.
        """
        place = self._places.get(base)
        if place is None:
            place = self._places[base] = _Place.of(base)
        request = place.head(method, path, headers, body), body
        due = asyncio.get_running_loop().time() + patience.whole
        connection = place.idle.popitem()[0] if place.idle else await self._connect(place, patience.connect, due)
        return await connection.send(request, patience, due).begun()

    async def close(self) -> None:
        """Close what is idle, and keep nothing from now on; an answer that is read still has its connection."""
        self._closed = True
        if self._sweep:
            self._sweep.cancel()
        self._close_idle(since=float("inf"))

    def keep(self, connection: _Connection) -> None:
        """Take back a connection on which all is said. It may be used again."""
        if self._closed:
            connection.transport.abort()
            return
        loop = connection.loop
        connection.idle_since = loop.time()
        connection.place.idle[connection] = None
        if self._sweep is None:
            self._sweep = loop.call_later(self._idle_s, self._look_around)

    def _look_around(self) -> None:
        loop = asyncio.get_running_loop()
        self._close_idle(loop.time() - self._idle_s)
        idle = any(place.idle for place in self._places.values())
        self._sweep = loop.call_later(self._idle_s / 4, self._look_around) if idle else None

    def _close_idle(self, since: float) -> None:
        """Close those that have been idle since then, or for longer."""
        for place in self._places.values():
            for connection in [c for c in place.idle if c.idle_since <= since]:
                del place.idle[connection]
                connection.transport.abort()

    async def _connect(self, place: _Place, limit: float, due: float) -> _Connection:
        loop = asyncio.get_running_loop()
        left = due - loop.time()
        options: dict[str, Any] = {}
        if place.tls:
            self._tls = self._tls or ssl.create_default_context()
            options = {"ssl": self._tls, "server_hostname": place.host}
        made = loop.create_connection(lambda: _Connection(self, place), place.host, place.port, **options)
        # Not `asyncio.wait_for`: before Python 3.12 that lets a cancellation pass which comes with the connection.
        making = asyncio.ensure_future(made)
        try:
            await asyncio.wait({making}, timeout=min(limit, left))
        except asyncio.CancelledError:
            making.add_done_callback(_drop)
            making.cancel()
            raise
        if not making.done():
            making.add_done_callback(_drop)
            making.cancel()
            if left <= limit:
                raise Late("its time was over before there was a connection")
            raise Unreachable("no connection within the connect timeout")
        try:
            return making.result()[1]
        except OSError as error:
            raise Unreachable(_why(error) or "cannot connect") from error


def _drop(making: asyncio.Task[tuple[asyncio.Transport, _Connection]]) -> None:
    """Of a connection that nobody waits for any more."""
    if not making.cancelled() and making.exception() is None:
        making.result()[0].abort()


@dataclass(eq=False)
class _Place:
    """One address, and the connections there that nobody uses, the one used last at the end."""

    host: str
    port: int
    tls: bool
    authority: str
    idle: dict[_Connection, None] = field(default_factory=dict)

    @classmethod
    def of(cls, base: str) -> _Place:
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"an address must look like http://host:port, got {base!r}")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, parts.netloc)

    def head(self, method: str, path: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"host: {self.authority}", "accept-encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers]
        if method != "GET":
            lines.append(f"content-length: {len(body)}")
        lines += ["", ""]
        text = "\r\n".join(lines)
        ends = len(lines) - 1
        if text.count("\n") != ends or text.count("\r") != ends or "\0" in text:
            raise ValueError("a header's value has a line's end or a zero in it")
        # As Sanic decodes: what a client sent goes on byte for byte.
        return text.encode("utf-8", "surrogateescape")


class Answer:
    """A node's answer while it comes in.

    status, headers: once it has `begun`; names in small letters, values of one name joined by commas.
    paused: its connection is not read for now, as enough is here.
    """

    def __init__(self, connection: _Connection, patience: Patience, due: float) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.paused = False
        self._connection: _Connection | None = connection
        self._loop = connection.loop
        self._patience, self._due = patience, due
        self._pieces: list[bytes] = []
        self._held = 0
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._since = self._loop.time()
        self._unsent = 0
        first = min(patience.take, patience.silence, due - self._since)
        self._timer = self._loop.call_later(first, self._look)

    async def begun(self) -> Answer:
        """Wait for the head. Raises UpstreamError."""
        try:
            while not self.status:
                await self._news()
        except BaseException:
            self.close()
            raise
        return self

    async def read(self) -> bytes:
        """What has come of the body, waiting for some; b"" at its end. Raises UpstreamError when all that came before
        has been read."""
        while not self._pieces:
            if self._connection is None and self._error is None:
                return b""
            await self._news()
        pieces = self._pieces
        self._pieces = []
        self._held = 0
        if self.paused and self._connection:
            self.paused = False
            self._connection.transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """No more of it is wanted. Does nothing to an answer that is whole."""
        self.fail(Broken("it was closed on this side"))

    def add(self, data: bytes) -> None:
        """A piece of the body."""
        self._pieces.append(data)
        self._held += len(data)

    def heard(self) -> None:
        """Some of it has come."""
        if self._held > READ_AHEAD and self._connection:
            self.paused = True
            self._connection.transport.pause_reading()
        self._tell()

    def finish(self) -> None:
        """It is whole."""
        self._timer.cancel()
        self._connection = None
        self._tell()

    def fail(self, error: UpstreamError) -> None:
        """Nothing more will come of it."""
        connection = self._connection
        if connection:
            self._error = error
            self.finish()
            connection.hang_up()

    async def _news(self) -> None:
        if self._error:
            raise self._error
        self._since = self._loop.time()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _tell(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _look(self) -> None:
        """See whether it goes on. One timer an answer, set anew when it rings and not with each byte."""
        assert self._connection is not None, "the timer ends with the answer"
        now = self._loop.time()
        unsent = self._connection.transport.get_write_buffer_size()
        if unsent != self._unsent or self._waiter is None:
            # The node takes the request, or waits for our client.
            self._unsent, self._since = unsent, now
        limit = self._patience.take if unsent else self._patience.silence
        if now >= self._due:
            self.fail(Late("its time was over"))
        elif now - self._since >= limit:
            self.fail(Stalled("it did not take the request" if unsent else "nothing came within the timeout"))
        else:
            self._timer = self._loop.call_later(min(self._since + limit, self._due) - now, self._look)


class _Connection(asyncio.Protocol):
    """One connection, and what the parser calls. `idle_since`: by the loop's clock."""

    transport: asyncio.Transport

    def __init__(self, pool: Upstream, place: _Place) -> None:
        self.loop = asyncio.get_running_loop()
        self.place = place
        self.idle_since = 0.0
        self._pool = pool
        self._parser = HttpResponseParser(self)
        self._answer: Answer | None = None
        self._headers: dict[str, str] = {}
        self._interim = self._whole = self._lasts = self._to_the_end = False
        self._framing = 0

    def send(self, request: tuple[bytes, bytes], patience: Patience, due: float) -> Answer:
        self._headers = {}
        self._whole = self._to_the_end = False
        self._framing = 0
        self._answer = Answer(self, patience, due)
        self.transport.writelines(request)
        return self._answer

    def hang_up(self) -> None:
        self._answer = None
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.transport.abort()
            return
        try:
            self._framing += len(data)
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            answer.fail(Broken("it wants to speak another protocol"))
        except HttpParserError as error:
            self._lasts = False
            if not self._whole:
                answer.fail(Broken(f"its answer is no HTTP: {error}"))
        if self._whole:
            self._end(answer)
        elif self._framing > FRAMING_LIMIT:
            answer.fail(Broken(f"its answer has more than {FRAMING_LIMIT} bytes that are no body"))
        else:
            answer.heard()

    def connection_lost(self, exc: Exception | None) -> None:
        self.place.idle.pop(self, None)
        answer, self._answer = self._answer, None
        if answer and self._to_the_end and exc is None:
            answer.finish()
        elif answer:
            answer.fail(Broken(_why(exc) or "it closed the connection"))

    def on_message_begin(self) -> None:
        # One more, right behind the one that was asked for.
        self._lasts = self._lasts and not self._whole

    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        status, headers = self._parser.get_status_code(), self._headers
        self._interim = status < 200
        self._headers = {}
        if not self._interim and self._answer and not self._whole:
            self._answer.status, self._answer.headers = status, headers
            self._to_the_end = "content-length" not in headers and "transfer-encoding" not in headers

    def on_body(self, data: bytes) -> None:
        if self._answer and not self._whole:
            self._framing = 0
            self._answer.add(data)

    def on_message_complete(self) -> None:
        if not self._interim and not self._whole:
            self._whole, self._lasts = True, self._parser.should_keep_alive()

    def _end(self, answer: Answer) -> None:
        self._answer = None
        answer.finish()
        # A node that answers before it has read the request (413) would take the rest for the next one.
        if self._lasts and not answer.paused and not self.transport.get_write_buffer_size():
            self._pool.keep(self)
        else:
            self.transport.abort()


def _why(error: Exception | None) -> str:
    """A failure in a few words; "" where it has none."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not good: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {str(error.reason or error).lower().replace('_', ' ')}"
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    return os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else ""
