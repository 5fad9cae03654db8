"""How many may be connected: floods of connections push out themselves, and no running answer."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import wait_for

Mock = Callable[..., MockNode]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
IDLE = 1000


@contextlib.contextmanager
def open_files(allowed: int) -> Iterator[None]:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def connect(gate: GateUnderTest, sent: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    assert gate.program is not None
    client = socket.create_connection(("127.0.0.1", gate.program.port), timeout=60, source_address=(source, 0))
    client.sendall(sent)
    return client


def hung_up(client: socket.socket) -> bool:
    """Whether the gate has ended a connection, by now."""
    client.setblocking(False)
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        client.settimeout(60)


def closed(gate: GateUnderTest, reason: str) -> float:
    page = httpx.get(gate.url + "/metrics", timeout=60).text
    found = re.search(rf'^llmgate_connections_closed_total{{reason="{reason}"}} (\S+)$', page, re.MULTILINE)
    return float(found[1]) if found else 0


def stream(gate: GateUnderTest, **fields: object) -> socket.socket:
    body = json.dumps(CHAT | {"stream": True} | fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gate.secret}\r\n"
    return connect(gate, f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4 * IDLE, reason="too few open files are allowed")
def test_a_flood_pushes_out_those_that_ask_for_nothing_and_cuts_no_stream(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    gate.list_nodes(node)
    gate.run("--connections-limit", str(IDLE))
    node.fault, node.hold = "wait", "stream"
    with open_files(4 * IDLE), contextlib.ExitStack() as stack:
        running = stack.enter_context(stream(gate))
        wait_for(lambda: node.open == 1, "the stream to run")
        node.fault = ""
        # Some have had an answer, some have sent half a request, some nothing.
        half = HEALTH[:10]
        idle = [stack.enter_context(connect(gate, (HEALTH, half, b"")[n % 3])) for n in range(IDLE - 10)]
        for client in idle[::3]:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        assert not any(map(hung_up, idle))
        flood = [stack.enter_context(connect(gate)) for _ in range(IDLE)]
        for _ in range(5):
            assert gate.chat().status_code == 200, "others still get in"
        wait_for(lambda: sum(map(hung_up, idle + flood)) >= IDLE - 10, "as many to be closed as were too many")
        assert closed(gate, "spare") >= IDLE - 10
        assert sum(map(hung_up, idle)) > sum(map(hung_up, flood)), "those that have been there longest go first"
        node.hold = ""
        assert running.makefile("rb").read().rstrip().endswith(b"data: [DONE]\n\n\r\n0")
    assert gate.program is not None
    said = re.findall(r"too many connections .*", gate.program.output())
    assert len(said) == 1 and "said once a minute" in said[0], "not a line for each"


def test_when_a_request_runs_on_every_connection_a_new_one_is_reset(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    gate.list_nodes(node)
    gate.run("--connections-limit", "3")
    node.fault, node.hold = "wait", "stream"
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(stream(gate)) for _ in range(3)]
        wait_for(lambda: node.open == 3, "three streams to run")
        with contextlib.closing(connect(gate)) as late:
            wait_for(lambda: hung_up(late), "the fourth to be reset")
        node.hold = node.fault = ""
        for client in running:
            assert b"data: [DONE]" in client.makefile("rb").read()
    wait_for(lambda: closed(gate, "full") >= 1, "the figure")
    assert gate.chat().status_code == 200


def test_an_address_has_so_many_connections_and_others_have_theirs(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.run("--connections-per-address", "5")
    with contextlib.ExitStack() as stack:
        mine = [stack.enter_context(connect(gate, HEALTH, "127.0.0.2")) for _ in range(5)]
        for client in mine:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            with contextlib.closing(connect(gate, source="127.0.0.2")) as more:
                wait_for(lambda: hung_up(more), "one more to be reset")
        assert gate.chat().status_code == 200, "another address"
        assert not any(map(hung_up, mine))
        mine[0].close()

        def another() -> bool:
            with contextlib.suppress(ConnectionResetError), connect(gate, HEALTH, "127.0.0.2") as again:
                return again.recv(4096).startswith(b"HTTP/1.1 200")
            return False

        wait_for(another, "the place of the one that left")
    assert closed(gate, "address") >= 3


def test_clients_that_send_a_byte_now_and_then_hold_their_places_for_a_time_and_others_are_answered(
    gate: GateUnderTest, mock: Mock
) -> None:
    gate.list_nodes(mock("a"))
    gate.run("--receive-timeout-s", "3")
    over = threading.Event()
    body = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\nauthorization: Bearer "
    body += gate.secret.encode() + b"\r\n\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(gate, (b"GET / HT", body)[n % 2])) for n in range(100)]

        def drip() -> None:
            while not over.wait(0.2):
                for client in slow:
                    with contextlib.suppress(OSError):
                        client.sendall(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            answered = 0
            while not all(map(hung_up_after_answer, slow)):
                assert gate.chat().status_code == 200
                answered += 1
            assert answered
        finally:
            over.set()
            dripping.join()


def hung_up_after_answer(client: socket.socket) -> bool:
    """Whether the gate has said 408 and ended the connection, by now."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    finally:
        client.settimeout(60)
    return True


def test_without_open_files_connections_wait_and_are_answered_later(gate: GateUnderTest, mock: Mock) -> None:
    """The limit is set above what the process may open, as an operator might."""
    gate.list_nodes(mock("a"))
    before, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    gate.run("--connections-limit", "100000")
    assert gate.program is not None
    (worker,) = workers(gate.program.pid)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (60, before))
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(connect(gate, HEALTH)) for _ in range(80)]
        wait_for(lambda: "cannot accept a connection: Too many open files" in gate.program.output(), "the complaint")  # type: ignore[union-attr]
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (before, before))
        for client in many:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")


def workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
