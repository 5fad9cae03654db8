"""What a client sees when no node of its model is ready: it waits for one to come back, and then gets its answer or is
told so."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from llmnode.wire import sse
from llmnode.wire.node import State
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import WORDS, MockNode
from tests.processes import wait_for

Mock = Callable[..., MockNode]
LONG = ("--ready-wait-s", "100")
"""Longer than anything here takes."""


def waiting(gate: GateUnderTest) -> int:
    found = re.search(r'^llmgate_queue_length\{model="tiny"\} (\S+)', metrics(gate), re.MULTILINE)
    return int(float(found[1])) if found else 0


def metrics(gate: GateUnderTest) -> str:
    return httpx.get(gate.url + "/metrics").text


def drain(gate: GateUnderTest) -> None:
    with gate.client() as client:
        assert client.post("/admin/nodes/a/drain", json={"owner": "me", "force": True}).status_code == 200


def undrain(gate: GateUnderTest) -> None:
    with gate.client() as client:
        assert client.delete("/admin/nodes/a/drain", params={"owner": "me"}).json()["released"]


@pytest.mark.parametrize("how", ["loading", "drained", "down"])
def test_a_request_waits_until_a_node_is_ready(gate: GateUnderTest, mock: Mock, how: str) -> None:
    node = mock("a")
    gate.list_nodes(node)
    gate.run(*LONG)
    gate.wait_node("a", lambda seen: seen["usable"])
    if how == "loading":
        node.say(state=State.LOADING)
    elif how == "drained":
        drain(gate)
    else:
        node.stop()
    gate.wait_node("a", lambda seen: not seen["usable"])
    with ThreadPoolExecutor() as pool:
        whole, streamed = (pool.submit(gate.chat, stream=stream) for stream in (False, True))
        wait_for(lambda: waiting(gate) == 2, "both to wait")
        assert node.requests == []
        assert gate.chat(model="never").status_code == 404, "an unknown model is no reason to wait"
        if how == "loading":
            node.say(state=State.READY)
        elif how == "drained":
            undrain(gate)
        else:
            mock("a", port=node.port)
        assert whole.result().status_code == streamed.result().status_code == 200
        assert all(f'"content":"{word}"'.encode() in streamed.result().content for word in WORDS)
        assert streamed.result().content.endswith(sse.DONE)
        assert streamed.result().headers["x-llmrack-node"] == "a"
        for answer in (whole.result(), streamed.result()):
            line = gate.line(answer.headers["x-request-id"])
            assert line["queued_seconds"] > 0
            assert (line["end"], [tried["outcome"] for tried in line["attempts"]]) == ("done", ["answered"])
    assert waiting(gate) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_has_waited_long_enough_is_told_with_a_status(gate: GateUnderTest, mock: Mock, stream: bool) -> None:
    node = mock("a")
    gate.list_nodes(node)
    gate.run("--ready-wait-s", "0.5")
    node.say(state=State.LOADING, why="30% of the weights")
    gate.wait_node("a", lambda seen: seen["state"] == "loading")
    answer = gate.chat(stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    error = answer.json()["error"]
    assert error["code"] == "no_ready_node"
    assert "a: 30% of the weights" in error["message"] and "none came within 0.5 s" in error["message"]
    line = gate.line(answer.headers["x-request-id"])
    assert (line["status"], line["end"], line["attempts"]) == (503, "no_ready_node", [])
    assert line["queued_seconds"] > 0.4  # counted from when it came to the queue
    assert 'llmgate_queue_refusals_total{model="tiny",reason="no_node"} 1.0' in metrics(gate)
    assert node.requests == []


@pytest.mark.parametrize("option", [("--ready-wait-s", "0"), ("--queue-limit", "0", *LONG)])
def test_where_nobody_may_wait_the_answer_comes_at_once(
    gate: GateUnderTest, mock: Mock, option: tuple[str, ...]
) -> None:
    node = mock("a")
    gate.list_nodes(node)
    gate.run(*option)
    node.say(state=State.LOADING)
    gate.wait_node("a", lambda seen: seen["state"] == "loading")
    answer = gate.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_ready_node")
    assert gate.line(answer.headers["x-request-id"])["queued_seconds"] is None


def test_the_deadline_bounds_the_wait(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    gate.list_nodes(node)
    gate.run(*LONG, "--request-timeout-s", "0.5")
    node.say(state=State.LOADING)
    gate.wait_node("a", lambda seen: seen["state"] == "loading")
    answer = gate.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_ready_node")


def test_a_client_that_leaves_waits_for_no_node(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    gate.list_nodes(node)
    gate.run(*LONG)
    node.say(state=State.LOADING)
    gate.wait_node("a", lambda seen: seen["state"] == "loading")
    with gate.client() as client, pytest.raises(httpx.ReadTimeout):
        ask = {"model": "tiny", "messages": []}
        client.post("/v1/chat/completions", json=ask, headers={"x-request-id": "leaver"}, timeout=1)
    line = gate.line("leaver")
    assert (line["status"], line["end"]) == (499, "client_left")
    assert waiting(gate) == 0
    node.say(state=State.READY)
    gate.wait_node("a", lambda seen: seen["usable"])
    assert gate.chat().status_code == 200
    assert len(node.requests) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_request_is_lost_while_the_only_node_restarts(
    gate: GateUnderTest, start: Start, number: signal.Signals
) -> None:
    options = ("--name", "a", "--backend", "fake", "--model-id", "tiny", "--fake-step-delay-s", "0.01")
    node = start("llmnode", *options).ready()
    gate.list_nodes(SimpleNamespace(name="a", url=node.url))
    gate.run(*LONG)
    gate.wait_node("a", lambda seen: seen["usable"])
    answers: list[httpx.Response] = []
    over = threading.Event()

    def ask(stream: bool) -> None:
        while not over.is_set():
            answers.append(gate.chat(stream=stream, max_tokens=8, ignore_eos=True))

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask, stream) for stream in (False, True) * 3]
        wait_for(lambda: len(answers) > 20, "answers before the restart")
        node.signal(number)
        node.wait()
        again = start("llmnode", *options, port=node.port).ready()
        count = len(answers)
        wait_for(lambda: len(answers) > count + 20, "answers after it")
        over.set()
        for one in asking:
            one.result()
    assert again.process.poll() is None
    assert {answer.status_code for answer in answers} == {200}, [a.text for a in answers if a.status_code != 200]
    streams = [a.content for a in answers if a.headers["content-type"].startswith("text/event-stream")]
    assert all(content.endswith(sse.DONE) for content in streams)
