"""What a client sees when every node is full: it waits its turn, or hears at once why not and when to come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from llmnode.wire import sse
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import WORDS, MockNode
from tests.processes import wait_for

LIMIT = 6


class Queue:
    """A gate before one node of one slot, which holds what it gets. `ask` returns when the request is where it goes."""

    def __init__(self, gate: GateUnderTest, node: MockNode, pool: ThreadPoolExecutor) -> None:
        self.gate, self.node, self.pool = gate, node, pool
        self.keys = {"": gate.secret}

    def length(self) -> int:
        text = httpx.get(self.gate.url + "/metrics").text
        found = [line for line in text.splitlines() if line.startswith('llmgate_queue_length{model="tiny"}')]
        return int(float(found[0].rpartition(" ")[2])) if found else 0

    def ask(self, name: str, key: str = "", **options: str) -> Future[httpx.Response]:
        """Send a request that will have to wait."""
        before = self.length()
        answer = self.send(name, key, **options)
        wait_for(lambda: self.length() > before or answer.done(), f"request {name} to wait")
        return answer

    def send(self, name: str, key: str = "", stream: bool = False, **headers: str) -> Future[httpx.Response]:
        def post() -> httpx.Response:
            with self.gate.client(self.keys[key]) as client:
                body = {"model": "tiny", "messages": [], "user": name, "stream": stream}
                sent = {header.replace("_", "-"): value for header, value in headers.items()}
                return client.post("/v1/chat/completions", json=body, headers=sent | {"x-request-id": name})

        return self.pool.submit(post)

    def fill(self) -> list[Future[httpx.Response]]:
        """Two requests, all that the node gets: one in its slot and one to follow it."""
        self.node.hold = "post"
        first = [self.send(f"first-{number}") for number in range(2)]
        wait_for(lambda: self.gate.node("a")["in_flight"] == 2, "the node to be full")
        return first

    def arrived(self) -> list[str]:
        """Who came to the node, in that order."""
        return [json.loads(request["body"])["user"] for request in self.node.requests]


@pytest.fixture(scope="module")
def running(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GateUnderTest, MockNode]]:
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    with MockNode("a") as node:
        node.say(load={"slots": 1})
        gate.list_nodes(node)
        yield gate.run("--queue-limit", str(LIMIT)), node


@pytest.fixture
def queue(running: tuple[GateUnderTest, MockNode]) -> Iterator[Queue]:
    gate, node = running
    node.requests.clear()
    node.fault = node.hold = ""
    with ThreadPoolExecutor(20) as pool:
        yield Queue(gate, node, pool)
        node.hold = ""
    gate.wait_node("a", lambda seen: seen["in_flight"] == 0)


def test_a_request_waits_for_its_turn_and_its_wait_is_written_down(queue: Queue) -> None:
    first = queue.fill()
    waiting = [queue.ask(name) for name in ("x", "y", "z")]
    assert len(queue.node.requests) <= 2
    queue.node.hold = ""
    for answer in first + waiting:
        assert answer.result().status_code == 200
    assert queue.arrived()[2:] == ["x", "y", "z"]
    assert queue.gate.line("x")["queued_seconds"] > 0
    assert queue.gate.line("first-0")["queued_seconds"] < queue.gate.line("x")["queued_seconds"]
    assert queue.length() == 0


def test_a_client_that_leaves_while_it_waits_never_reaches_a_node(queue: Queue) -> None:
    first = queue.fill()
    ask = {"model": "tiny", "messages": [], "user": "leaver"}
    with queue.gate.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(
            "/v1/chat/completions",
            json=ask,
            headers={"x-request-id": "leaver"},
            timeout=httpx.Timeout(60, read=1),
        )
    line = queue.gate.line("leaver")
    assert (line["status"], line["end"], line["node"], line["queued_seconds"]) == (499, "client_left", None, None)
    assert queue.length() == 0
    stays = queue.ask("stays")
    queue.node.hold = ""
    for answer in [*first, stays]:
        assert answer.result().status_code == 200
    assert "leaver" not in queue.arrived()


def test_a_full_queue_says_when_to_come_back_and_makes_room_for_other_keys(queue: Queue) -> None:
    queue.keys["other"] = queue.gate.create_key("other")
    with queue.gate.client(queue.keys["other"]) as client:
        wait_for(lambda: client.get("/v1/models").status_code == 200, "the new key to work")
    first = queue.fill()
    waiting = [queue.ask(str(number)) for number in range(LIMIT)]
    refused = queue.send("one-too-many").result()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert f"{LIMIT} requests wait" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    other = queue.send("other", "other")
    assert waiting[-1].result().status_code == 503
    assert queue.length() == LIMIT
    queue.node.hold = ""
    for answer in [*first, *waiting[:-1], other]:
        assert answer.result().status_code == 200
    assert queue.arrived().index("other") <= 4
    text = httpx.get(queue.gate.url + "/metrics").text
    assert 'llmgate_queue_refusals_total{model="tiny",reason="full"} 1.0' in text
    assert 'llmgate_queue_refusals_total{model="tiny",reason="displaced"} 1.0' in text
    assert 'llmgate_queue_seconds_count{model="tiny"}' in text


def test_priorities_come_from_the_key_and_a_request_may_ask_for_less(queue: Queue) -> None:
    queue.keys["high"] = queue.gate.create_key("urgent", "--priority", "high")
    with queue.gate.client(queue.keys["high"]) as client:
        wait_for(lambda: client.get("/v1/models").status_code == 200, "the new key to work")
    first = queue.fill()
    waiting = [
        queue.ask("low", "high", x_llmrack_priority="low"),
        queue.ask("normal"),
        queue.ask("high", "high"),
    ]
    too_much = queue.send("x", x_llmrack_priority="high").result()
    assert (too_much.status_code, too_much.json()["error"]["code"]) == (403, "priority_not_allowed")
    unknown = queue.send("x", x_llmrack_priority="urgent").result()
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "x-llmrack-priority")
    queue.node.hold = ""
    for answer in first + waiting:
        assert answer.result().status_code == 200
    assert queue.arrived()[2:] == ["high", "normal", "low"]
    assert "x-llmrack-priority" not in queue.node.requests[-1]["headers"]


def test_a_stream_that_waits_is_kept_awake_after_ten_seconds(queue: Queue) -> None:
    first = queue.fill()
    with queue.gate.client() as client:
        ask = {"model": "tiny", "messages": [], "user": "stream", "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=ask) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            pieces = answer.iter_bytes()
            got = next(pieces)
            assert got == sse.KEEPALIVE
            assert "stream" not in queue.arrived()
            queue.node.hold = ""
            got += b"".join(pieces)
    assert [word for word in WORDS if f'"content":"{word}"'.encode() in got] == list(WORDS)
    assert got.endswith(sse.DONE)
    for answered in first:
        assert answered.result().status_code == 200


def test_who_still_waits_when_its_time_is_up_is_told_so(gate: GateUnderTest, mock: Callable[..., MockNode]) -> None:
    node = mock("a")
    node.say(load={"slots": 1, "running": 1, "waiting": 1})
    gate.list_nodes(node)
    gate.run("--request-timeout-s", "1")
    answer = gate.chat()
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert "no node had room" in answer.json()["error"]["message"]
    assert not node.requests
