"""Promises of the parts of `make bench-gate`: what counts as an answer, what the mock node says, when a row fails."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmnode.wire import resume, sse
from tests.bench import upstream, volley
from tests.bench.doors import Cores, start_upstream
from tests.bench.figures import CPU_TIME, REQUESTS_PER_S, STREAMS_PER_CORE, STREAMS_PER_S, Bar
from tests.bench.gate_rows import ROWS, Closed, Open, Row
from tests.bench.servers import Server
from tests.bench.volley import Load, Reply, Volley, requests

PLAIN = b"".join(upstream.Answers("node").streams[False, False])
MARKED = b"".join(upstream.Answers("node").streams[True, True])
JSON = upstream.Answers("node").wholes[False, False]
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server, _ = start_upstream(tmp_path_factory.mktemp("upstream"), frozenset())
    with server:
        yield server


def fired(**load: object) -> Volley:
    """A load from a process of its own."""
    command = [sys.executable, "-m", volley.__name__, json.dumps(load)]
    return Volley(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout))


def read(data: bytes, step: int) -> Reply:
    """A reply whose bytes came `step` at a time; AssertionError unless it is complete with the last of them only."""
    reply = Reply()
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    assert [reply.add(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    return reply


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_an_answer_is_complete_with_its_last_byte_however_it_was_cut(step: int) -> None:
    assert not read(PLAIN, step).trouble(stream=True)
    assert not read(JSON, step).trouble(stream=False)


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    reply = Reply()
    assert not reply.add(HEAD + b'{"choices":[],"usage":{}}')
    assert reply.closed() and reply.closes
    assert not reply.trouble(stream=False)


@pytest.mark.parametrize(
    ("gone", "what"),
    [(b'"content":" word"', "49 of 50 chunks"), (b"[DONE]", "no [DONE]"), (b"200 OK", "HTTP/1.1")],
    ids=["a chunk", "the end", "the status"],
)
def test_an_answer_that_lacks_something_is_no_answer(gone: bytes, what: str) -> None:
    replaced = PLAIN.replace(gone, b"X" * len(gone), 1)
    assert what in read(replaced, 1 << 20).trouble(stream=True)


def test_what_the_mock_node_says_follows_the_contract_of_resumes() -> None:
    frames = sse.Frames().feed(volley.unchunked(MARKED.partition(b"\r\n\r\n")[2]))
    committed = resume.Committed()
    events = 0
    for frame in frames:
        mark = resume.read_marker(frame)
        if mark:
            committed.add(mark)
        events += frame.startswith(b"data: {")
    assert committed.size == upstream.CHUNKS + 1
    assert events == upstream.CHUNKS + 2
    assert frames[-1] == sse.DONE
    assert sse.read_usage(frames[-2])
    assert b": t " not in PLAIN and b": u " not in PLAIN


def test_a_closed_load_is_answered_on_connections_that_stay(node: Server) -> None:
    for stream in (False, True):
        came = fired(url=node.url, stream=stream, connections=4, seconds=0.2)
        assert not came.troubles
        assert came.answered >= 4
        assert not came.reopened


def test_an_open_load_sends_what_its_seed_says(node: Server) -> None:
    first, second = (fired(url=node.url, stream=False, rate=200.0, seconds=0.3, seed=7) for _ in range(2))
    assert first.answered == second.answered > 20


def test_a_proxy_that_closes_connections_gets_new_ones() -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
        writer.write(JSON)  # says nothing of it, and closes
        await writer.drain()
        writer.close()

    async def main() -> Volley:
        server = await asyncio.start_server(closing, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            return await volley.Shooter(Load(url, stream=False, connections=2, seconds=0.2)).run()

    came = asyncio.run(main())
    assert not came.troubles
    assert came.answered > 4
    assert came.reopened >= came.answered - 4


def test_requests_are_the_same_for_the_same_seed_and_carry_the_key() -> None:
    load = Load("http://127.0.0.1:1", stream=True, key="sk-1")
    assert requests(load) == requests(load)
    assert len(set(requests(load))) == volley.KINDS
    assert b"authorization: Bearer sk-1\r\n" in requests(load)[0]


class Fake:
    """A range whose proxy answers `through` times a second, 10 times in 0.5 s of its own; the upstream `straight`."""

    def __init__(self, straight: float, through: float, latency: tuple[float, float] = (0.0, 0.0)) -> None:
        self.rates, self.latency = (straight, through), latency
        self.spent = 0.0

    def fire(self, *, straight: bool = False, **load: object) -> Volley:
        took = {f"p{p}": self.latency[not straight] for p in (50, 99)}
        return Volley(10, 0, self.rates[not straight], took, took)

    def cpu_s(self) -> float:
        self.spent += 0.5
        return self.spent

    def hold(self, streams: int) -> float:
        return 0.0


def test_a_proxy_is_measured_by_what_it_used_and_not_by_what_the_load_could_send() -> None:
    for through in (100, 1000):
        found = Closed(stream=True)(Fake(straight=1000, through=through), 1)
        assert found[STREAMS_PER_CORE] == 10 / 0.5
        assert found[CPU_TIME] == 0.5 / 10
        assert found[STREAMS_PER_S] == through


def test_added_latency_is_what_the_proxy_adds() -> None:
    found = Open(200)(Fake(1, 1, latency=(0.25, 1.0)), 1)
    assert set(found.values()) >= {0.75}


def test_half_of_the_cores_are_the_proxys() -> None:
    assert Cores.of([3]) == Cores(frozenset({3}), frozenset({3}))
    assert Cores.of([0, 1]) == Cores(frozenset({0}), frozenset({1}))
    assert Cores.of([0, 1, 2, 3, 4]) == Cores(frozenset({0, 1}), frozenset({2, 3, 4}))


def test_a_bar_of_our_own_is_no_ratio() -> None:
    bar = Bar(at_most=0.005, own=True)
    assert bar.met([0.004, 0.009, 0.001], [1.0, 1.0, 1.0])
    assert not bar.met([0.004, 0.009, 0.006], [9.0, 9.0, 9.0])
    assert bar.words(CPU_TIME) == "at most 5 ms"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_bar_of_a_row_belongs_to_a_figure_that_is_shown(row: Row) -> None:
    assert set(row.bars) <= set(row.figures)


def test_the_rows_are_those_that_the_page_explains() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert all(f"`{row.name}`" in page for row in ROWS)
    assert REQUESTS_PER_S in page
