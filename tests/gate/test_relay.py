"""What a client may count on: a good answer while any node can give one, and the truth when none can."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping

import httpx
import pytest

from llmgate.core.plan import Kind, Outcome
from llmgate.relay import Exchange, Relay
from llmnode.wire import sse
from llmnode.wire.node import Load
from llmnode.wire.resume import Fixed, Origin
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import WORDS, MockNode
from tests.processes import wait_for

Two = tuple[GateUnderTest, MockNode, MockNode]
Mock = Callable[..., MockNode]


def stream(gate: GateUnderTest, **headers: str) -> httpx.Response:
    with gate.client() as client:
        return client.post("/v1/chat/completions", json={"model": "tiny", "stream": True}, headers=headers)


def words(answer: httpx.Response) -> list[str]:
    return [word for word in WORDS if f'"content":"{word}"' in answer.text]


def test_a_stream_arrives_whole_and_its_cost_is_logged_not_sent(two: Two) -> None:
    gate, a, _ = two
    answer = stream(gate, **{"x-request-id": "my-id.1"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"] == "my-id.1"
    assert answer.headers["x-llmrack-node"] == "a"
    assert answer.headers["x-llmrack-ignored"] == "store"
    assert words(answer) == list(WORDS)
    assert answer.content.endswith(sse.KEEPALIVE + sse.DONE)
    assert b": u " not in answer.content
    assert a.requests[-1]["headers"]["x-request-id"] == "my-id.1"
    line = gate.line("my-id.1")
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (11, 3, 5)


class Kept:
    """A client that keeps what it is sent."""

    begun = False

    def __init__(self) -> None:
        self.data = b""

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.begun = True

    async def send(self, data: bytes) -> None:
        self.data += data


@pytest.mark.parametrize(
    ("text", "told"), [('{"slots":4,"running":3,"news":1}', 3), ("{", None), ('{"slots":-1}', None)]
)
def test_who_routes_hears_how_busy_a_node_is_and_an_answer_does_not_depend_on_it(
    mock: Mock, text: str, told: int | None
) -> None:
    node = mock("a", resume=True)
    node.load = text
    heard: list[Load] = []

    async def main() -> Outcome:
        relay = Relay("", time.monotonic, connect_timeout_s=60, stall_timeout_s=60, request_timeout_s=60)
        exchange = Exchange(
            request_id="r", path="/v1/chat/completions", body=b'{"model": "tiny", "messages": []}', headers={},
            stream=False, fixed=Fixed("id", 1, 2), deadline=time.monotonic() + 60, sent=0.0,
            origin=Origin("tiny", "d1", "t1"), busy=heard.append,
        )  # fmt: skip
        try:
            return await relay.begin(node.url, exchange, Kept())
        finally:
            await relay.close()

    assert asyncio.run(main()).kind is Kind.ANSWERED
    assert [load.running for load in heard] == ([] if told is None else [told])


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("held", ["stream", ""], ids=["by and by", "at once"])
def test_who_routes_hears_once_that_a_prompt_is_computed(mock: Mock, streamed: bool, held: str) -> None:
    """Not of an answer that comes whole: that it ends says the same."""
    node = mock("a", resume=True)
    node.fault, node.at, node.hold = "sleep" if held else "", 2, held
    heard = asyncio.Event()
    told: list[int] = []

    def tell() -> None:
        told.append(1)
        heard.set()

    async def main() -> Outcome:
        relay = Relay("", time.monotonic, connect_timeout_s=60, stall_timeout_s=60, request_timeout_s=60)
        body = json.dumps({"model": "tiny", "stream": streamed, "messages": []}).encode()
        exchange = Exchange(
            request_id="r", path="/v1/chat/completions", body=body, headers={}, stream=streamed,
            fixed=Fixed("id", 1, 2), deadline=time.monotonic() + 60, sent=0.0,
            origin=Origin("tiny", "d1", "t1"), heard=tell,
        )  # fmt: skip
        asking = asyncio.create_task(relay.begin(node.url, exchange, Kept()))
        if held:
            await asyncio.wait_for(heard.wait(), 60)
            assert not asking.done()
            node.hold = ""
        try:
            return await asking
        finally:
            await relay.close()

    assert asyncio.run(main()).kind is Kind.ANSWERED
    assert len(told) <= 1 and (told or not held)


def test_the_body_reaches_the_node_byte_for_byte(two: Two) -> None:
    gate, a, _ = two
    body = b'{ "model" :\n"tiny-alias", "x": 1.0e3, "u": "\\u00e9\xc3\xa9", "messages": [] }'
    with gate.client() as client:
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert a.requests[-1]["body"] == body


def test_the_clients_key_and_llmracks_own_headers_do_not_reach_the_node(two: Two) -> None:
    gate, a, _ = two
    stream(
        gate, **{"x-llmrack-report-usage": "9", "x-llmrack-resume": "1", "cookie": "c=1", "traceparent": "00-ab-cd-01"}
    )
    sent = a.requests[-1]["headers"]
    assert gate.secret not in str(sent)
    assert "authorization" not in sent
    assert "cookie" not in sent
    assert sent["x-llmrack-report-usage"] == "1"
    assert "x-llmrack-resume" not in sent
    assert sent["traceparent"] == "00-ab-cd-01"


@pytest.mark.parametrize("end", ["\n", "\r", "\0"])
def test_a_header_that_hides_another_stays_behind(two: Two, end: str) -> None:
    """A single line's end inside a value may pass for the end of the header at whoever reads it next."""
    gate, a, _ = two
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: gate",
        "connection: close",
        f"authorization: Bearer {gate.secret}",
        f"traceparent: 00-ab-cd-01{end}x-hidden: 1{end}x-more: 2",
        "tracestate: open",
        "content-length: 16",
    ]
    with socket.create_connection(("127.0.0.1", int(gate.url.rsplit(":", 1)[1])), timeout=60) as client:
        client.sendall("\r\n".join([*lines, "", '{"model":"tiny"}']).encode())
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200 ")
    sent = a.requests[-1]["headers"]
    assert sent["tracestate"] == "open"
    assert "traceparent" not in sent and "x-hidden" not in str(sent)


@pytest.mark.parametrize("fault", ["refuse_503", "error_500", "error_401", "not_found", "hang_up"])
@pytest.mark.parametrize("streamed", [True, False])
def test_another_node_answers_when_the_first_cannot(two: Two, fault: str, streamed: bool) -> None:
    gate, a, _ = two
    a.fault = fault
    answer = gate.chat(stream=streamed)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-llmrack-node"] == "b"
    line = gate.lines(1)[-1]
    assert [attempt["node"] for attempt in line["attempts"]] == ["a", "b"]
    assert line["node"] == "b"


@pytest.mark.parametrize("fault", ["keepalive_then_die", "error_event"])
def test_a_keepalive_does_not_tie_a_request_to_its_node(two: Two, fault: str) -> None:
    gate, a, _ = two
    a.fault = fault
    answer = stream(gate)
    assert answer.status_code == 200
    assert words(answer) == list(WORDS)
    assert answer.content.count(sse.DONE) == 1
    assert b"error" not in answer.content


def test_a_node_that_dies_in_a_json_answer_is_replaced(two: Two) -> None:
    gate, a, _ = two
    a.fault = "die_in_body"
    answer = gate.chat()
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"].endswith("from b")


def test_a_node_that_is_gone_is_skipped_at_once(two: Two) -> None:
    gate, a, _ = two
    a.stop()
    assert gate.chat().headers["x-llmrack-node"] == "b"


def test_nothing_is_sent_twice_once_content_is_out(two: Two) -> None:
    gate, a, b = two
    a.fault = "die_mid_stream"
    answer = stream(gate)
    assert answer.status_code == 200
    assert words(answer) == ["one", "two"]
    assert answer.content.count(b'data: {"error":') == 1
    assert b"[DONE]" not in answer.content
    assert not b.requests
    assert gate.lines(1)[-1]["end"] == "stream_broken"


def test_a_nodes_own_error_event_is_passed_on_alone(two: Two) -> None:
    gate, a, _ = two
    a.fault = "error_event_late"
    answer = stream(gate)
    assert answer.content.count(b'data: {"error":') == 1
    assert b"the mock node says" in answer.content
    assert b"[DONE]" not in answer.content


def test_a_client_error_is_handed_on_and_tried_once(two: Two) -> None:
    gate, a, b = two
    a.fault = b.fault = "bad_request"
    answer = gate.chat()
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the mock node says invalid_value"
    assert len(a.requests) + len(b.requests) == 1
    assert "x-should-retry" not in answer.headers


def test_a_prompt_too_long_for_one_node_goes_to_a_larger_one(gate: GateUnderTest, mock) -> None:  # type: ignore[no-untyped-def]
    small, large = mock("a", n_ctx=100), mock("b", n_ctx=1000)
    small.fault = "too_long"
    gate.list_nodes(small, large)
    gate.run()
    gate.wait_node("b", lambda node: node["usable"])
    gate.wait_node("a", lambda node: node["usable"])
    assert gate.chat().headers["x-llmrack-node"] == "b"
    large.fault = "too_long"
    answer = gate.chat()
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_all_full_is_503_with_the_smallest_wait_and_no_more_retries(two: Two) -> None:
    gate, a, b = two
    a.fault = b.fault = "refuse_503"
    answer = gate.chat()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded"
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["x-should-retry"] == "false"
    assert len(a.requests) == len(b.requests) == 1


def test_tries_are_bounded(gate: GateUnderTest, mock) -> None:  # type: ignore[no-untyped-def]
    nodes = [mock(name) for name in "abcd"]
    for node in nodes:
        node.fault = "error_500"
    gate.list_nodes(*nodes)
    gate.run("--tries", "2")
    for node in nodes:
        gate.wait_node(node.name, lambda seen: seen["usable"])
    answer = gate.chat()
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert sum(len(node.requests) for node in nodes) == 2


@pytest.mark.parametrize("fault", ["endless", "stall"])
def test_a_client_that_leaves_frees_the_node_at_once(two: Two, fault: str) -> None:
    gate, a, b = two
    a.fault = fault
    with gate.client() as client:
        try:
            request = {"model": "tiny", "stream": True}
            headers = {"x-request-id": "leaver"}
            timeout = httpx.Timeout(60, read=1.0)
            with client.stream(
                "POST", "/v1/chat/completions", json=request, headers=headers, timeout=timeout
            ) as answer:
                next(answer.iter_bytes())
        except httpx.ReadTimeout:
            assert fault == "stall"
    wait_for(lambda: a.closed == 1, "the node to see its connection closed")
    line = gate.line("leaver")
    assert line["end"] == "client_left"
    assert line["status"] == (200 if fault == "endless" else 499)
    gate.wait_node("a", lambda node: node["in_flight"] == 0)
    assert not b.requests


def test_a_silent_node_is_given_up_before_content_and_cut_after_it(gate: GateUnderTest, mock) -> None:  # type: ignore[no-untyped-def]
    a, b = mock("a"), mock("b")
    gate.list_nodes(a, b)
    gate.run("--stall-timeout-s", "0.5")
    gate.wait_node("a", lambda node: node["usable"])
    gate.wait_node("b", lambda node: node["usable"])
    a.fault = "stall"
    assert stream(gate).headers["x-llmrack-node"] == "b"
    wait_for(lambda: a.closed == 1, "the silent node's connection to be closed")
    b.fault = "stall_mid_stream"
    a.say(load={"running": 4})
    gate.wait_node("a", lambda node: node["load"]["running"] == 4)
    answer = stream(gate)
    assert words(answer) == ["one", "two"]
    assert answer.content.count(b'data: {"error":') == 1
    assert b"[DONE]" not in answer.content


def test_a_request_has_a_deadline_over_all_its_attempts(gate: GateUnderTest, mock) -> None:  # type: ignore[no-untyped-def]
    a = mock("a")
    a.fault = "stall"
    gate.list_nodes(a)
    gate.run("--request-timeout-s", "0.5")
    answer = gate.chat()
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    wait_for(lambda: a.closed == 1, "the node's connection to be closed")


def test_a_slow_reader_holds_its_node_back_and_nobody_else(two: Two) -> None:
    gate, a, _ = two
    a.fault = "huge"
    body = b'{"model":"tiny","stream":true}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gate.secret}\r\n"
    assert gate.program is not None
    with socket.create_connection(("127.0.0.1", gate.program.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        slow.recv(1000)
        settled = [-1]

        def stopped_growing() -> bool:
            settled.append(a.sent_bytes)
            time.sleep(0.25)
            return settled[-1] == settled[-2] > 0

        wait_for(stopped_growing, "the node to be held back")
        # Kernel buffers of two loopback connections, and a few of 64 KiB between them: megabytes, no flood.
        assert a.sent_bytes < 64 * 1024 * 1024
        assert gate.chat().headers["x-llmrack-node"] == "b"
    wait_for(lambda: a.closed == 1, "the node's connection to be closed")


def test_a_slow_request_does_not_delay_others(two: Two) -> None:
    gate, a, _ = two
    a.hold = "post"
    slow = threading.Thread(target=gate.chat)
    slow.start()
    wait_for(lambda: a.requests, "the slow request to reach its node")
    for _ in range(5):
        assert gate.chat().headers["x-llmrack-node"] == "b"
    a.hold = ""
    slow.join()


def test_metrics_count_what_happened(two: Two) -> None:
    gate, a, _ = two
    a.fault = "refuse_503"
    gate.chat()
    gate.chat(model="nobody-has-this")
    text = httpx.get(gate.url + "/metrics").text
    assert 'llmgate_requests_total{model="tiny",status="200"} 1.0' in text
    assert 'llmgate_requests_total{model="unknown",status="404"} 1.0' in text
    assert 'llmgate_upstream_attempts_total{node="a",outcome="refused"} 1.0' in text
    assert 'llmgate_upstream_attempts_total{node="b",outcome="answered"} 1.0' in text
    assert 'llmgate_time_to_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'llmgate_nodes{state="ready"} 2.0' in text
    assert 'llmgate_in_flight{node="a"} 0.0' in text
    assert "nobody-has-this" not in text
