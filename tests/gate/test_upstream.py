"""What the gate's HTTP client promises of connections, bounds and time, over real sockets, on both event loops."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from llmgate.upstream import (
    FRAMING_LIMIT,
    READ_AHEAD,
    Answer,
    Broken,
    Late,
    Patience,
    Stalled,
    Unreachable,
    Upstream,
    UpstreamError,
)

LONG = Patience(connect=30, take=30, silence=30, whole=60)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Work = Callable[[], Awaitable[None]]
Run = Callable[[Work], None]
Script = Callable[["Visitor"], Awaitable[None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a test's coroutine on an event loop of its own, and find nothing that it has left behind."""
    loop = uvloop.new_event_loop() if request.param == "uvloop" else asyncio.new_event_loop()
    troubles: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: troubles.append(context))

    async def whole(work: Work) -> None:
        await asyncio.wait_for(work(), 60)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    yield lambda work: loop.run_until_complete(whole(work))
    loop.close()
    assert not troubles


class Visitor:
    """The node's side of one connection: `heads` are those of the requests read from it so far."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.heads: list[str] = []

    async def request(self) -> bytes:
        """Read one request -> its body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        sizes = [line for line in head.lower().split("\r\n") if line.startswith("content-length:")]
        return await self.reader.readexactly(int(sizes[0].split(":")[1]) if sizes else 0)

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def gone(self) -> None:
        """Wait until the other side has hung up."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass


class Node:
    """What is at the other end. `visitors`: one for each connection so far, in their order."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.visitors: list[Visitor] = []
        self.left = 0

    @property
    def port(self) -> int:
        return int(self.base.rsplit(":", 1)[1])


@asynccontextmanager
async def node(script: Script, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[Node]:
    """A server that does with each connection what `script` says, and then closes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitor = Visitor(reader, writer)
        found.visitors.append(visitor)
        try:
            await script(visitor)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            found.left += 1
            writer.transport.abort()

    server = await asyncio.start_server(serve, host, 0, ssl=tls)
    name = f"[{host}]" if ":" in host else host
    found = Node(f"http{'s' if tls else ''}://{name}:{server.sockets[0].getsockname()[1]}")
    try:
        yield found
    finally:
        server.close()


@asynccontextmanager
async def client(idle_s: float = 15.0, tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    upstream = Upstream(idle_s=idle_s, tls=tls)
    try:
        yield upstream
    finally:
        await upstream.close()
        await asyncio.sleep(0.01)  # what was closed is gone


async def ask(upstream: Upstream, base: str, patience: Patience = LONG, body: bytes = b"{}") -> Answer:
    return await upstream.ask("POST", base, "/x", [("x-a", "1")], body, patience)


async def whole(answer: Answer) -> bytes:
    parts = []
    while piece := await answer.read():
        parts.append(piece)
    answer.close()
    return b"".join(parts)


async def until(what: Callable[[], object]) -> None:
    while not what():  # noqa: ASYNC110  (what it waits for is on the other side of a socket)
        await asyncio.sleep(0.005)


async def answering(visitor: Visitor) -> None:
    """A node as it should be."""
    while True:
        await visitor.request()
        await visitor.say(OK)


def saying(data: bytes, *, stay: bool = True) -> Script:
    """A node that answers a request with these bytes, and then waits to be left, or leaves."""

    async def script(visitor: Visitor) -> None:
        await visitor.request()
        await visitor.say(data)
        if stay:
            await visitor.gone()
        else:
            visitor.writer.write_eof()

    return script


def test_a_request_goes_out_as_asked_and_its_answer_comes_whole(run: Run) -> None:
    bodies = []

    async def script(visitor: Visitor) -> None:
        bodies.append(await visitor.request())
        await visitor.say(b"HTTP/1.1 201 Made\r\nX-Two: a\r\nx-two: b\r\nContent-Length: 5\r\n\r\nhe")
        await asyncio.sleep(0.01)
        await visitor.say(b"llo")

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            headers = [("x-one", "\xe9"), ("x-raw", b"\xff".decode(errors="surrogateescape"))]
            answer = await upstream.ask("POST", there.base, "/a?b", headers, b"body", LONG)
            assert (answer.status, answer.headers["x-two"]) == (201, "a, b")
            assert await whole(answer) == b"hello"
            assert there.visitors[0].heads == [
                f"POST /a?b HTTP/1.1\r\nhost: 127.0.0.1:{there.port}\r\naccept-encoding: identity\r\n"
                "x-one: \xc3\xa9\r\nx-raw: \xff\r\ncontent-length: 4\r\n\r\n"
            ]

    run(work)
    assert bodies == [b"body"]


@pytest.mark.parametrize("value", ["a\r\nx-b: 2", "a\nx-b: 2", "a\rb", "a\0b"])
def test_a_value_cannot_become_a_header_of_its_own(run: Run, value: str) -> None:
    async def work() -> None:
        async with node(answering) as there, client() as upstream:
            with pytest.raises(ValueError, match="header"):
                await upstream.ask("POST", there.base, "/", [("x-a", value)], b"", LONG)
            assert not there.visitors

    run(work)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n3\r\ndef\r\n0\r\nx-trailer: 1\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n"
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabcdef",
    ],
)
def test_however_an_answer_is_framed_it_is_read_and_its_connection_used_again(run: Run, raw: bytes) -> None:
    async def script(visitor: Visitor) -> None:
        while True:
            await visitor.request()
            for at in range(len(raw)):  # each byte by itself
                await visitor.say(raw[at : at + 1])
                await asyncio.sleep(0)

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            for _ in range(3):
                answer = await ask(upstream, there.base)
                assert (answer.status, await whole(answer)) == (200, b"abcdef")
                assert "x-trailer" not in answer.headers
            assert len(there.visitors) == 1

    run(work)


def test_an_answer_without_a_length_ends_with_its_connection(run: Run) -> None:
    async def work() -> None:
        async with node(saying(b"HTTP/1.1 200 OK\r\n\r\nabc", stay=False)) as there, client() as upstream:
            assert await whole(await ask(upstream, there.base)) == b"abc"

    run(work)


@pytest.mark.parametrize("raw", [b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n"])
def test_an_answer_without_a_body_is_whole_with_its_head(run: Run, raw: bytes) -> None:
    async def work() -> None:
        async with node(saying(raw)) as there, client() as upstream:
            assert await whole(await ask(upstream, there.base)) == b""
            assert there.left == 0

    run(work)


def test_connections_are_kept_and_as_many_made_as_are_needed_at_once(run: Run) -> None:
    async def work() -> None:
        async with node(answering) as there, client() as upstream:
            for _ in range(3):
                answers = await asyncio.gather(*(ask(upstream, there.base) for _ in range(4)))
                assert [await whole(answer) for answer in answers] == [b"ok"] * 4
            assert len(there.visitors) == 4

    run(work)


def test_an_idle_connection_is_closed_after_its_time(run: Run) -> None:
    async def work() -> None:
        async with node(answering) as there, client(idle_s=0.1) as upstream:
            await whole(await ask(upstream, there.base))
            await until(lambda: there.left)
            await whole(await ask(upstream, there.base))
            assert len(there.visitors) == 2

    run(work)


def test_closing_the_pool_closes_what_is_idle_and_lets_the_rest_end(run: Run) -> None:
    hold = asyncio.Event()

    async def script(visitor: Visitor) -> None:
        if await visitor.request() == b"slow":
            await hold.wait()
        await visitor.say(OK)
        await visitor.gone()

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            slow = asyncio.ensure_future(ask(upstream, there.base, body=b"slow"))
            await until(lambda: there.visitors)
            await whole(await ask(upstream, there.base))
            await upstream.close()
            await until(lambda: there.left == 1)
            hold.set()
            assert await whole(await slow) == b"ok"
            await until(lambda: there.left == 2)

    run(work)


@pytest.mark.parametrize("how", ["close: header", "closed", "spoke", "surplus", "HTTP/1.0"])
def test_a_connection_that_is_over_or_not_clean_is_not_used_again(run: Run, how: str) -> None:
    async def script(visitor: Visitor) -> None:
        await visitor.request()
        if how == "close: header":
            await visitor.say(OK.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
            await visitor.gone()
        elif how == "HTTP/1.0":
            await visitor.say(OK.replace(b"1.1", b"1.0"))
            await visitor.gone()
        elif how == "surplus":
            await visitor.say(OK + b"HTTP/1.1 500 Not Asked For\r\ncontent-length: 2\r\n\r\nno")
            await visitor.gone()
        else:
            await visitor.say(OK)
            if how == "spoke":
                await asyncio.sleep(0.02)
                await visitor.say(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
                await visitor.gone()

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            for count in (1, 2):
                answer = await ask(upstream, there.base)
                assert (answer.status, await whole(answer)) == (200, b"ok")
                await until(lambda count=count: there.left == count)
                await asyncio.sleep(0.02)
            assert len(there.visitors) == 2

    run(work)


@pytest.mark.parametrize("said", [b"", b"H"])
def test_a_request_is_sent_once_whatever_becomes_of_its_connection(run: Run, said: bytes) -> None:
    """The node's end and the request may have crossed on the way. Whoever asked decides what is to be done."""

    async def script(visitor: Visitor) -> None:
        await visitor.request()
        await visitor.say(OK)
        await visitor.request()
        await visitor.say(said)

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            for count in (1, 2):
                assert await whole(await ask(upstream, there.base)) == b"ok"
                with pytest.raises(Broken, match=r"closed the connection|reset"):
                    await ask(upstream, there.base)
                assert [len(visitor.heads) for visitor in there.visitors] == [2] * count

    run(work)


def test_where_nobody_listens_is_unreachable(run: Run) -> None:
    async def work() -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            async with client() as upstream:
                with pytest.raises(Unreachable, match="connection refused"):
                    await ask(upstream, f"http://127.0.0.1:{silent.getsockname()[1]}")

    run(work)


def test_a_connection_that_cannot_be_made_is_unreachable_in_time(run: Run) -> None:
    async def work() -> None:
        with socket.socket() as full:  # whose queue is full, so that it answers no more
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            base = f"http://127.0.0.1:{full.getsockname()[1]}"
            fillers = [socket.socket() for _ in range(3)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            async with client() as upstream:
                with pytest.raises(Unreachable, match="connect timeout"):
                    await ask(upstream, base, Patience(connect=0.1, take=30, silence=30, whole=60))
                with pytest.raises(Late):
                    await ask(upstream, base, Patience(connect=30, take=30, silence=30, whole=0.1))
            for filler in fillers:
                filler.close()

    run(work)


def test_silence_before_and_in_an_answer_ends_it(run: Run) -> None:
    async def work() -> None:
        short = Patience(connect=30, take=30, silence=0.1, whole=60)
        async with client() as upstream:
            async with node(saying(b"")) as there:
                with pytest.raises(Stalled, match="nothing came"):
                    await ask(upstream, there.base, short)
                await until(lambda: there.left)
            async with node(saying(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")) as there:
                answer = await ask(upstream, there.base, short)
                assert await answer.read() == b"abc"
                with pytest.raises(Stalled):
                    await answer.read()
                await until(lambda: there.left)

    run(work)


def test_an_answer_that_goes_on_slowly_is_not_silent(run: Run) -> None:
    async def script(visitor: Visitor) -> None:
        await visitor.request()
        await visitor.say(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n")
        for _ in range(8):
            await asyncio.sleep(0.1)
            await visitor.say(b"x")

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            answer = await ask(upstream, there.base, Patience(connect=30, take=30, silence=0.5, whole=60))
            assert await whole(answer) == b"x" * 8

    run(work)


def test_while_nobody_reads_no_silence_is_counted(run: Run) -> None:
    async def script(visitor: Visitor) -> None:
        await visitor.request()
        await visitor.say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na")
        await go_on.wait()
        await visitor.say(b"b")
        await visitor.gone()

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            answer = await ask(upstream, there.base, Patience(connect=30, take=30, silence=0.2, whole=60))
            await asyncio.sleep(0.7)
            go_on.set()
            assert await whole(answer) == b"ab"

    go_on = asyncio.Event()
    run(work)


def test_the_time_for_the_whole_ends_an_answer_that_goes_on(run: Run) -> None:
    async def script(visitor: Visitor) -> None:
        await visitor.request()
        await visitor.say(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            await visitor.say(b"1\r\nx\r\n")
            await asyncio.sleep(0.01)

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            answer = await ask(upstream, there.base, Patience(connect=30, take=30, silence=30, whole=0.3))
            with pytest.raises(Late):
                await whole(answer)
            await until(lambda: there.left)

    run(work)


def test_a_node_that_does_not_take_the_request_has_stalled(run: Run) -> None:
    async def script(visitor: Visitor) -> None:
        visitor.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(30)

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            patience = Patience(connect=30, take=0.2, silence=30, whole=60)
            with pytest.raises(Stalled, match="did not take the request"):
                await ask(upstream, there.base, patience, b"x" * 64_000_000)

    run(work)


def test_a_large_request_arrives_whole_however_slowly_it_is_taken(run: Run) -> None:
    body = bytes(range(256)) * 160_000
    got = []

    async def script(visitor: Visitor) -> None:
        await visitor.reader.readuntil(b"\r\n\r\n")
        parts = []
        while sum(map(len, parts)) < len(body):
            parts.append(await visitor.reader.read(1_000_000))
            await asyncio.sleep(0.005)
        got.append(b"".join(parts))
        await visitor.say(OK)

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            patience = Patience(connect=30, take=0.5, silence=30, whole=60)
            assert await whole(await ask(upstream, there.base, patience, body)) == b"ok"

    run(work)
    assert got == [body]


def test_a_refusal_before_the_whole_request_is_read_and_ends_the_connection(run: Run) -> None:
    async def script(visitor: Visitor) -> None:
        await visitor.reader.readuntil(b"\r\n\r\n")
        await visitor.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        visitor.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await enough.wait()

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            answer = await ask(upstream, there.base, body=b"x" * 64_000_000)
            assert (answer.status, await whole(answer)) == (413, b"no")
            assert (await ask(upstream, there.base, body=b"x" * 64_000_000)).status == 413
            assert len(there.visitors) == 2
            enough.set()

    enough = asyncio.Event()
    run(work)


def test_who_does_not_read_holds_the_node_back(run: Run) -> None:
    size = 200_000_000

    async def script(visitor: Visitor) -> None:
        nonlocal sent
        await visitor.request()
        visitor.writer.transport.set_write_buffer_limits(0)
        await visitor.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            await visitor.say(b"x" * 100_000)
            sent += 100_000
        await visitor.gone()

    async def work() -> None:
        async with node(script) as there, client() as upstream:
            answer = await ask(upstream, there.base)
            before = -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.2)
            assert answer._held <= READ_AHEAD + 256 * 1024
            assert sent < size / 4  # the kernel's buffers
            count = 0
            while piece := await answer.read():
                count += len(piece)
            assert count == size
            # The connection reads again, as its next answer shows.
            assert there.left == 0

    sent = 0
    run(work)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 2 * FRAMING_LIMIT,
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * FRAMING_LIMIT,
        b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n" * FRAMING_LIMIT,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n1;" + b"y" * 8 * FRAMING_LIMIT,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"y: z\r\n" * 2 * FRAMING_LIMIT,
    ],
    ids=["value", "headers", "interim", "extension", "trailers"],
)
def test_what_is_no_body_is_bounded(run: Run, raw: bytes) -> None:
    async def work() -> None:
        async with node(saying(raw)) as there, client() as upstream:
            with pytest.raises(Broken, match=r"no body|no HTTP"):
                await whole(await ask(upstream, there.base))
            await until(lambda: there.left)

    run(work)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "no HTTP"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "another protocol"),
    ],
)
def test_an_answer_that_is_cut_or_none_is_broken_and_says_so(run: Run, raw: bytes, why: str) -> None:
    async def work() -> None:
        async with node(saying(raw, stay=False)) as there, client() as upstream:
            with pytest.raises(Broken, match=why):
                await whole(await ask(upstream, there.base))

    run(work)


def test_what_came_before_a_failure_is_read_first(run: Run) -> None:
    async def work() -> None:
        raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\nde"
        async with node(saying(raw, stay=False)) as there, client() as upstream:
            answer = await ask(upstream, there.base)
            await until(lambda: there.left)
            await asyncio.sleep(0.05)
            assert await answer.read() == b"abcde"
            with pytest.raises(Broken):
                await answer.read()

    run(work)


@pytest.mark.parametrize("when", ["head", "body", "close"])
def test_leaving_an_answer_closes_its_connection_at_once(run: Run, when: str) -> None:
    head = b"" if when == "head" else b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc"

    async def all_of_it(upstream: Upstream, base: str) -> None:
        answer = await ask(upstream, base)
        try:
            while await answer.read():
                pass
        finally:
            answer.close()

    async def work() -> None:
        async with node(saying(head)) as there, client() as upstream:
            if when == "close":
                (await ask(upstream, there.base)).close()
            else:
                task = asyncio.ensure_future(all_of_it(upstream, there.base))
                await until(lambda: there.visitors and there.visitors[0].heads)
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await until(lambda: there.left)

    run(work)


def test_a_connection_that_is_made_for_nobody_any_more_is_closed(run: Run) -> None:
    async def work() -> None:
        async with node(answering) as there, client() as upstream:
            for turns in range(6):
                task = asyncio.ensure_future(ask(upstream, there.base))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
                if not task.cancelled():
                    (await task).close()
            await asyncio.sleep(0.05)
            await until(lambda: there.left == len(there.visitors))

    run(work)


def test_ipv6_is_an_address_like_others(run: Run) -> None:
    async def work() -> None:
        async with node(answering, "::1") as there, client() as upstream:
            assert await whole(await ask(upstream, there.base)) == b"ok"
            assert f"host: [::1]:{there.port}\r\n" in there.visitors[0].heads[0]

    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    run(work)


def test_a_name_that_nobody_knows_is_unreachable(run: Run) -> None:
    async def work() -> None:
        async with client() as upstream:
            with pytest.raises(Unreachable):
                await ask(upstream, "http://nobody.invalid:1")

    run(work)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=node", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
         "-keyout", str(key), "-out", str(made)],
        check=True, capture_output=True,
    )  # fmt: skip
    return made, key


def test_both_sides_show_certificates_where_the_context_asks_for_it(run: Run, certificate: tuple[Path, Path]) -> None:
    made, key = certificate
    there_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there_tls.load_cert_chain(made, key)
    there_tls.load_verify_locations(made)
    there_tls.verify_mode = ssl.CERT_REQUIRED
    here = ssl.create_default_context(cafile=str(made))
    here.load_cert_chain(made, key)
    big = b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n" + b"x" * 3_000_000

    async def script(visitor: Visitor) -> None:
        while True:
            await visitor.request()
            await visitor.say(big)

    async def work() -> None:
        async with node(script, tls=there_tls) as there, client(tls=here) as upstream:
            for _ in range(3):
                assert len(await whole(await ask(upstream, there.base, body=b"y" * 1_000_000))) == 3_000_000
            assert len(there.visitors) == 1

    run(work)


def test_a_certificate_that_is_not_trusted_is_unreachable_and_says_why(
    run: Run, certificate: tuple[Path, Path]
) -> None:
    there_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there_tls.load_cert_chain(*certificate)

    async def work() -> None:
        async with node(answering, tls=there_tls) as there, client() as upstream:
            with pytest.raises(Unreachable, match="certificate is not good: self"):
                await ask(upstream, there.base)
            with pytest.raises(UpstreamError):
                await ask(upstream, there.base.replace("https", "http"))

    run(work)
