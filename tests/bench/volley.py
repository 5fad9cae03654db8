"""The load of `make bench-gate`: requests to one address, from one process that costs as little as it can.

Owns: sockets and the reading of what came: a whole HTTP/1.1 answer (by length, in chunks, or until the connection is
closed), its status, and whether it says all that it should. Refuses to know: who answers, and what figure would do. A
connection is used again until its server closes it; then the next request opens a new one.

Three kinds of load:

- closed: `connections` clients, each of which asks again as soon as it has its answer
- open: requests at moments that a seed has fixed before (exponential gaps), whether answers come or not, each on an
  idle connection or a new one: a server that falls behind cannot slow the load down
- held: streams that stay open after their first chunk, until standard input is closed

While a load lasts, reads are kept as they come; an answer is looked at when it is complete.

    python -m tests.bench.volley '{"url": ..., "stream": true, "connections": 64, "seconds": 5}'    prints JSON
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

from tests.bench.figures import percentile
from tests.bench.upstream import CHUNKS, HOLD, MODEL

KINDS = 64
"""Different requests, sent in turn."""
WORDS = 200
"""Words of a request's messages: a short chat of some 1.2 KB."""
_LAST_CHUNK = b"0\r\n\r\n"
_DRAIN_S = 30.0


@dataclass(frozen=True)
class Load:
    """One load. url: base address.   key: sent as `Authorization: Bearer`, nothing where it is empty.

    connections: of a closed or held load.  rate: requests a second of an open one, 0 for a closed one.
    hold: whether streams stay open after their first chunk.
    """

    url: str
    stream: bool
    seconds: float = 0.0
    connections: int = 0
    rate: float = 0.0
    hold: bool = False
    key: str = ""
    seed: int = 1


@dataclass(frozen=True)
class Volley:
    """What came of a load. Times in seconds, over the requests that were answered well.

    answered: good answers.     failed: the others, with what was wrong with the first few.
    per_s: good answers a second, until the last of them.
    latency: from the request to the last byte, first_byte: to the first, each as {"p50", "p99"}.
    reopened: connections that a server had closed.
    """

    answered: int
    failed: int
    per_s: float
    latency: Mapping[str, float] = field(default_factory=dict)
    first_byte: Mapping[str, float] = field(default_factory=dict)
    reopened: int = 0
    troubles: tuple[str, ...] = ()


def requests(load: Load) -> list[bytes]:
    """The bytes of KINDS different requests."""
    dice, where = random.Random(load.seed), urlsplit(load.url)
    key = f"authorization: Bearer {load.key}\r\n" if load.key else ""
    out = []
    for _ in range(KINDS):
        text = " ".join("".join(dice.choices("abcdefghij", k=5)) for _ in range(WORDS))
        system = HOLD if load.hold else "You are brief."
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": CHUNKS, "stream": load.stream}
        data = json.dumps(body).encode()
        out.append(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {where.netloc}\r\n{key}"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode()
            + data
        )
    return out


class Reply:
    """One HTTP/1.1 answer as it comes in. `add` says whether it is complete. Source of the framing: RFC 9112, 6."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._head = b""
        self._size = self._left = 0
        self._chunked = self._until_close = False
        self._tail = b""
        self.first: float | None = None

    @property
    def begun(self) -> bool:
        return bool(self._parts)

    @property
    def closes(self) -> bool:
        """Whether the server will close the connection after it."""
        return self._until_close or b"\r\nconnection: close" in self._head.lower()

    def add(self, data: bytes) -> bool:
        if not self._parts:
            self.first = time.perf_counter()
        self._parts.append(data)
        if not self._head:
            whole = b"".join(self._parts)
            head, found, body = whole.partition(b"\r\n\r\n")
            if not found:
                return False
            self._begin(head)
            self._parts, data = [body], body
        if self._chunked:
            self._tail = (self._tail + data)[-len(_LAST_CHUNK) - 2 :]
            return self._tail.endswith(b"\r\n" + _LAST_CHUNK) or self._tail == _LAST_CHUNK
        self._left -= len(data)
        return self._left <= 0 and not self._until_close

    def closed(self) -> bool:
        """The server has closed the connection: whether that makes the answer complete."""
        return bool(self._head) and self._until_close

    def _begin(self, head: bytes) -> None:
        self._head = head
        fields = {}
        for line in head.lower().split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            fields[name] = value.strip()
        self._chunked = fields.get(b"transfer-encoding") == b"chunked"
        self._left = int(fields.get(b"content-length", b"0"))
        self._until_close = not self._chunked and b"content-length" not in fields

    def body(self) -> bytes:
        data = b"".join(self._parts)
        return unchunked(data) if self._chunked else data

    def trouble(self, stream: bool) -> str:
        """What is wrong with the complete answer, nothing when all is well."""
        status = self._head[: self._head.find(b"\r\n")]
        body = self.body()
        if b" 200 " not in status:
            return f"{status.decode(errors='replace')}: {body[:200].decode(errors='replace')}"
        if not stream:
            return "" if b'"choices"' in body and b'"usage"' in body else f"no completion: {body[:200]!r}"
        said = body.count(b'"content":" word"') + body.count(b'"content": " word"')
        if said != CHUNKS:
            return f"{said} of {CHUNKS} chunks of text came"
        return "" if b"data: [DONE]" in body[-40:] else f"no [DONE] at the end: {body[-100:]!r}"


def unchunked(data: bytes) -> bytes:
    """The body that chunks carry. Raises ValueError when they are none."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end].split(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(data[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


class _Connection(asyncio.Protocol):
    """A connection on which one request at a time is asked. `done(connection, reply)` is called once for each: with a
    complete reply, or with one that broke off."""

    def __init__(self, done: Callable[[_Connection, Reply, bool], None], held: Callable[[], None]) -> None:
        self._done, self._held = done, held
        self._reply: Reply | None = None
        self.asked = 0
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it
        self.open = True

    def ask(self, data: bytes) -> None:
        self._reply = Reply()
        self.asked += 1
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            return
        if not reply.begun:
            self._held()
        if reply.add(data):
            self._reply = None
            if reply.closes:
                self.close()
            self._done(self, reply, True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        reply, self._reply = self._reply, None
        if reply is not None:
            self._done(self, reply, reply.closed())

    def close(self) -> None:
        self.open = False
        self._transport.close()


class Shooter:
    """Sends the requests of one load and keeps what came of them."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._requests = requests(load)
        self._sent = 0
        self._latencies: list[float] = []
        self._firsts: list[float] = []
        self._began = self._last = 0.0
        self._troubles: list[str] = []
        self._reopened = 0
        self._idle: deque[_Connection] = deque()
        self._waiting: dict[_Connection, tuple[asyncio.Future[bool], float]] = {}
        self._holding = 0

    async def run(self) -> Volley:
        self._began = time.perf_counter()
        self._end = self._began + self._load.seconds
        await (self._open() if self._load.rate else self._closed())
        return self.result()

    async def hold(self) -> None:
        """Open all streams and wait until each has its first bytes; they stay open."""
        tasks = [asyncio.ensure_future(self._one(time.perf_counter())) for _ in range(self._load.connections)]
        while self._holding < len(tasks):
            for task in tasks:
                if task.done():
                    raise RuntimeError(f"a stream that should stay open ended: {self._troubles[:1]}")
            await asyncio.sleep(0.01)

    def result(self) -> Volley:
        def shares(values: list[float]) -> dict[str, float]:
            return {f"p{p}": percentile(values, p) for p in (50, 99)} if values else {}

        return Volley(
            answered=len(self._latencies),
            failed=len(self._troubles),
            per_s=len(self._latencies) / (self._last - self._began) if self._latencies else 0.0,
            latency=shares(self._latencies),
            first_byte=shares(self._firsts),
            reopened=self._reopened,
            troubles=tuple(self._troubles[:3]),
        )

    async def _closed(self) -> None:
        async def client() -> None:
            while time.perf_counter() < self._end:
                await self._one(time.perf_counter())

        await asyncio.gather(*(client() for _ in range(self._load.connections)))

    async def _open(self) -> None:
        dice = random.Random(self._load.seed)
        moment, tasks = time.perf_counter(), []
        while moment < self._end:
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            # Timers are a millisecond late at times: that is the load's own lateness, no proxy's.
            tasks.append(asyncio.ensure_future(self._one(time.perf_counter())))
            moment += dice.expovariate(self._load.rate)
        _, late = await asyncio.wait(tasks, timeout=_DRAIN_S)
        for task in late:
            task.cancel()
            self._troubles.append(f"no answer within {_DRAIN_S:g} s")

    async def _one(self, began: float) -> None:
        """One request, from `began` on, on an idle connection or a new one."""
        data = self._requests[self._sent % KINDS]
        self._sent += 1
        while True:
            connection = self._idle.pop() if self._idle else None
            while connection is not None and not connection.open:
                self._reopened += 1
                connection = self._idle.pop() if self._idle else None
            try:
                connection = connection or await self._connect()
            except OSError as error:
                self._troubles.append(f"cannot connect: {error}")
                return
            answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._waiting[connection] = answered, began
            connection.ask(data)
            if await answered:
                return
            self._reopened += 1

    async def _connect(self) -> _Connection:
        where = urlsplit(self._load.url)
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._done, self._held), str(where.hostname), where.port or 80
        )
        return connection

    def _held(self) -> None:
        self._holding += 1

    def _done(self, connection: _Connection, reply: Reply, complete: bool) -> None:
        now = time.perf_counter()
        answered, began = self._waiting.pop(connection)
        if answered.done():
            return
        if not complete and not reply.begun and connection.asked > 1:
            answered.set_result(False)  # closed while idle: the request has not been looked at
            return
        trouble = reply.trouble(self._load.stream) if complete else "the connection was closed before the end"
        if trouble:
            self._troubles.append(trouble)
        else:
            self._latencies.append(now - began)
            self._firsts.append((reply.first or now) - began)
            self._last = now
        if connection.open:
            self._idle.append(connection)
        answered.set_result(True)


async def main(load: Load) -> None:
    shooter = Shooter(load)
    if load.hold:
        await shooter.hold()
        print("held", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    else:
        print(json.dumps(asdict(await shooter.run())))


if __name__ == "__main__":
    uvloop.run(main(Load(**json.loads(sys.argv[1]))))
