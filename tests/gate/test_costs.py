"""What is slow, large or many stays its own cost: whatever one client or node does, others are answered meanwhile."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from llmnode.wire import sse
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import WORDS, MockNode
from tests.processes import wait_for

Mock = Callable[..., MockNode]
Three = tuple[GateUnderTest, MockNode, MockNode, MockNode]

LONG = "word " * 80_000
"""About 100k tokens, 400 KB."""
IDLE = 1000


@pytest.fixture(scope="module")
def shared(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    with MockNode("a") as a, MockNode("b") as b, MockNode("c", model="slow") as c:
        gate.list_nodes(a, b, c)
        gate.run()
        yield gate, a, b, c


@pytest.fixture
def three(shared: Three) -> Three:
    """A gate in front of three nodes, idle and well-behaved; the third serves the model "slow"."""
    gate, *nodes = shared
    for node in nodes:
        node.fault = node.hold = ""
        node.requests.clear()
        node.closed = node.sent_bytes = 0
        gate.wait_node(node.name, lambda seen: seen["usable"] and not seen["in_flight"])
    return shared


@pytest.fixture(scope="module")
def hasty(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GateUnderTest]:
    """A gate that gives clients a second to send a request, to read, and to do nothing. A node floods "flood"."""
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("hasty"))
    with MockNode("a") as node, MockNode("b", model="flood") as flooding:
        flooding.fault = "huge"
        gate.list_nodes(node, flooding)
        yield gate.run("--receive-timeout-s", "1", "--send-timeout-s", "1", "--idle-timeout-s", "1")


def connect(gate: GateUnderTest) -> socket.socket:
    assert gate.program is not None
    return socket.create_connection(("127.0.0.1", gate.program.port), timeout=60)


def post(gate: GateUnderTest, body: bytes, length: int | None = None) -> bytes:
    """A whole chat request as bytes; `length`: what its head says of its body."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gate.secret}\r\n"
    return f"{head}content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def chat_body(**fields: object) -> bytes:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}).encode()


def status(client: socket.socket) -> bytes:
    """The status line of what comes next; b"" when the gate has hung up."""
    return client.makefile("rb").readline().strip()


def others_are_answered(gate: GateUnderTest, count: int = 5) -> None:
    for number in range(count):
        answer = gate.chat(stream=bool(number % 2))
        assert answer.status_code == 200, answer.text


def test_prompts_of_100k_tokens_delay_nobody(three: Three) -> None:
    gate, a, b, _ = three
    a.hold = b.hold = "post"
    body = chat_body(messages=[{"role": "user", "content": LONG}])
    with ThreadPoolExecutor(4) as pool:

        def ask() -> httpx.Response:
            with gate.client() as client:
                return client.post("/v1/chat/completions", content=body)

        long = [pool.submit(ask) for _ in range(4)]
        wait_for(lambda: len(a.requests) + len(b.requests) == 4, "the long prompts to reach their nodes")
        # On their way through the gate others are answered by the gate itself, and by nodes once these go on.
        assert httpx.get(gate.url + "/health").status_code == 200
        a.hold = b.hold = ""
        others_are_answered(gate)
        assert [answer.result().status_code for answer in long] == [200] * 4
    assert sum(request["body"] == body for request in a.requests + b.requests) == 4


def test_a_prompt_of_100k_tokens_that_never_ends_delays_nobody(three: Three) -> None:
    gate, *_ = three
    body = chat_body(messages=[{"role": "user", "content": LONG}])
    with connect(gate) as client:
        client.sendall(post(gate, body[:-1], len(body)))
        others_are_answered(gate)
        client.sendall(body[-1:])
        assert status(client) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("size", [1_000, 400_000, 4_000_000])
def test_a_client_that_leaves_is_noticed_whatever_it_had_sent(three: Three, size: int) -> None:
    gate, a, b, _ = three
    a.fault = b.fault = "stall"
    with connect(gate) as client:
        client.sendall(post(gate, chat_body(padding="x" * size)))
        wait_for(lambda: a.requests or b.requests, "the request to reach its node")
    wait_for(lambda: a.closed + b.closed == 1, "the node to see its connection closed")
    for name in "ab":
        gate.wait_node(name, lambda node: node["in_flight"] == 0)


def test_a_client_that_sends_byte_by_byte_is_answered_and_delays_nobody(three: Three) -> None:
    gate, a, b, _ = three
    whole = post(gate, chat_body())
    with connect(gate) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(whole)):
            client.sendall(whole[at : at + 1])
            if at % 40 == 0:
                assert gate.chat().status_code == 200
        assert status(client) == b"HTTP/1.1 200 OK"
    assert chat_body() in [request["body"] for request in a.requests + b.requests]


@pytest.mark.parametrize("part", ["head", "body", "body of an unknown path"])
def test_a_request_that_does_not_arrive_in_time_is_refused_and_hung_up_on(hasty: GateUnderTest, part: str) -> None:
    gate = hasty
    whole = post(gate, b"{" + b" " * 10_000)
    if part == "body of an unknown path":
        whole = whole.replace(b"/v1/chat", b"/v1/chit")
    begins = 20 if part == "head" else whole.index(b"{")
    with connect(gate) as client:
        answers = client.makefile("rb")
        client.sendall(whole[:begins])
        over = threading.Event()

        def drip() -> None:
            """A byte now and then, so that the connection is never silent."""
            for at in range(begins, len(whole)):
                try:
                    client.sendall(whole[at : at + 1])
                except OSError:
                    return
                if over.wait(0.05):
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        said = b""
        with contextlib.suppress(ConnectionResetError):
            said = answers.read()  # until the gate hangs up
        over.set()
        dripping.join()
    if part == "body of an unknown path":
        assert said.startswith(b"HTTP/1.1 404")
    else:
        assert said.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in said
        assert b"1 s" in said
    others_are_answered(gate)


def test_requests_behind_one_another_on_a_connection_have_their_time_each(hasty: GateUnderTest) -> None:
    whole = post(hasty, chat_body())
    with connect(hasty) as client:
        answers = client.makefile("rb")
        client.sendall(whole[:-1])
        # The second one's beginning comes with the first one's end.
        client.sendall(whole[-1:] + whole[:-1])
        assert answers.readline().startswith(b"HTTP/1.1 200")
        client.sendall(whole[-1:])
        assert any(b"HTTP/1.1 200" in line for line in iter(answers.readline, b""))


@contextlib.contextmanager
def open_files(allowed: int) -> Iterator[None]:
    """The lower limit of open files, for this process and those that it starts meanwhile."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * IDLE, reason="too few open files are allowed")
def test_a_thousand_idle_connections_delay_nobody(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    # As many a shell has it: the gate takes what it may have.
    with open_files(256):
        gate.run()
    with open_files(2 * IDLE), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(gate)) for _ in range(IDLE)]
        # Each has had an answer, so that it is the gate that keeps it.
        for client in idle:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        for client in idle:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        others_are_answered(gate)
        for client in idle:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)


def test_an_idle_connection_is_closed_in_the_end(hasty: GateUnderTest) -> None:
    with connect(hasty) as client:
        answers = client.makefile("rb")
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answers.read().startswith(b"HTTP/1.1 200")  # until the gate hangs up


def test_a_node_that_answers_byte_by_byte_delays_nobody(three: Three) -> None:
    gate, _, _, c = three
    c.fault = "drip"
    c.hold = "stream"
    with ThreadPoolExecutor(1) as pool:
        dripping = pool.submit(gate.chat, stream=True, model="slow")
        wait_for(lambda: c.sent_bytes, "the first frame to be out")
        others_are_answered(gate)
        assert not dripping.done()
        c.hold = ""
        answer = dripping.result()
    assert [word for word in WORDS if f'"content":"{word}"' in answer.text] == list(WORDS)
    assert answer.content.endswith(sse.DONE)


STUCK = 8
PER_STREAM = 8 * 1024 * 1024
"""Bytes of memory that a stream may take at the gate, as docs/operations.md says."""


def test_memory_of_streams_that_nobody_reads_is_bounded(three: Three) -> None:
    gate, a, b, _ = three
    a.fault = b.fault = "huge"
    assert gate.program is not None
    process = psutil.Process(gate.program.pid)
    before = process.memory_info().rss
    with contextlib.ExitStack() as stack:
        for _ in range(STUCK):
            client = stack.enter_context(connect(gate))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.sendall(post(gate, chat_body(stream=True)))
        wait_for(lambda: a.open + b.open == STUCK, "all streams to run")
        settled = [-1]

        def held_back() -> bool:
            settled.append(a.sent_bytes + b.sent_bytes)
            time.sleep(0.25)
            return settled[-1] == settled[-2] > 0

        wait_for(held_back, "the nodes to be held back")
        assert process.memory_info().rss - before < STUCK * PER_STREAM
        # What the kernel's buffers of two loopback connections hold is the kernel's.
        assert settled[-1] < STUCK * (PER_STREAM + 16 * 1024 * 1024)
        a.fault = b.fault = ""
        others_are_answered(gate)
    wait_for(lambda: a.closed + b.closed == STUCK, "the nodes' connections to be closed")


def test_a_client_that_does_not_read_is_hung_up_on(hasty: GateUnderTest) -> None:
    with connect(hasty) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(post(hasty, chat_body(model="flood", stream=True)))
        hasty.wait_node("b", lambda node: node["in_flight"] == 1)
        hasty.wait_node("b", lambda node: node["in_flight"] == 0)
    assert hasty.line_with(end="client_left", model="flood")


def test_a_client_that_reads_slowly_but_reads_is_not(hasty: GateUnderTest) -> None:
    with connect(hasty) as client:
        client.sendall(post(hasty, chat_body(model="flood", stream=True)))
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert client.recv(256 * 1024)
            time.sleep(0.02)
        assert hasty.node("b")["in_flight"] == 1
    hasty.wait_node("b", lambda node: node["in_flight"] == 0)
