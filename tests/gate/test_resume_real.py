"""Real nodes that are killed, put to sleep or drained in the middle of answers: no client can tell.

The model is the fake backend, whose answers are exact: a stream that moved must equal its undisturbed run, but for the
ids and times that the gate gives each answer.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from llmnode.wire import sse
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.node.stitching import joined
from tests.processes import Program, wait_for

OPTIONS = (
    "--backend",
    "fake",
    "--model-id",
    "tiny",
    "--slots",
    "16",
    "--fake-step-delay-s",
    "0.04",
    "--drain-seconds",
    "0",
)
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me of the fox"}], "max_tokens": 40}
TOOLS = [{"type": "function", "function": {"name": "fetch_fox", "parameters": {"type": "object", "properties": {}}}}]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {"seed": 7, "top_p": 0.9, "ignore_eos": True, "stream_options": {"include_usage": True}},
    {"seed": 8, "n": 3, "repeat_penalty": 1.3, "frequency_penalty": 0.4},
    {"seed": 9, "logit_bias": {"195": 9, "169": 9}, "ignore_eos": True},
    {"seed": 10, "response_format": {"type": "json_object"}},
    {"seed": 11, "logprobs": True, "top_logprobs": 2, "ignore_eos": True},
    {"seed": 12, "ignore_eos": True, "stream": False},
    {"seed": 13, "n": 2, "ignore_eos": True, "stream": False, "mirostat": 2},
    {"seed": 14, "tools": TOOLS, "tool_choice": "required", "max_tokens": 60},
    {"seed": 15, "tools": TOOLS, "tool_choice": "required", "max_tokens": 60, "stream": False},
]


class Fleet:
    """A gate and four nodes, of which the tests here end two; and what clients are told when nothing goes wrong."""

    def __init__(self, gate: GateUnderTest, nodes: dict[str, Program]) -> None:
        self.gate, self.nodes = gate, nodes
        self.undisturbed = [told(answer) for answer in ask_all(gate)]


@pytest.fixture(scope="module")
def fleet(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    nodes = {name: start_module("llmnode", "--name", name, *OPTIONS) for name in "abcd"}
    for node in nodes.values():
        node.ready()
    gate.list_nodes(*(SimpleNamespace(name=name, url=node.url) for name, node in nodes.items()))
    gate.run("--stall-timeout-s", "3", "--stale-after-s", "1", "--slow-start-s", "0")
    for name in nodes:
        gate.wait_node(name, lambda seen: seen["usable"])
    return Fleet(gate, nodes)


def ask_all(gate: GateUnderTest, disturb: Callable[[], None] = lambda: None) -> list[httpx.Response]:
    """Ask all kinds at once; `disturb` when all of them are under way."""
    answers: dict[int, httpx.Response] = {}

    def ask(number: int) -> None:
        answers[number] = gate.chat(**{**ASKED, "stream": True, **KINDS[number]})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(KINDS))]
    for thread in threads:
        thread.start()
    disturb()
    for thread in threads:
        thread.join()
    return [answers[number] for number in range(len(KINDS))]


def told(answer: httpx.Response) -> Any:
    """What the client can tell of an answer: one id, one time, one end, and what it says."""
    assert answer.status_code == 200, answer.text
    for name in (rb'"id":"(chatcmpl-[^"]+)"', rb'"created":(\d+)'):
        assert len(set(re.findall(name, answer.content))) == 1
    plain = re.sub(rb'"id":"[^"]+"', b'"id":""', answer.content)
    plain = re.sub(rb'"created":\d+', b'"created":0', plain).replace(sse.KEEPALIVE, b"")
    if not answer.headers["content-type"].startswith("text/event-stream"):
        whole: dict[str, Any] = json.loads(plain)
        del whole["id"], whole["created"], whole["usage"]["prompt_tokens_details"]
        return whole
    assert plain.count(sse.DONE) == 1
    assert plain.endswith(sse.DONE)
    return joined(frame + b"\n\n" for frame in plain.split(b"\n\n")[:-1])


def said(node: Program) -> int:
    """Answer tokens that a node has computed since it started."""
    page = node.get("/metrics")
    row = (
        re.search(r'^llmnode_engine_tokens_total\{kind="completion"\} (\S+)', page.text, re.MULTILINE) if page else None
    )
    return int(float(row[1])) if row else 0


def resumed(gate: GateUnderTest, answers: list[httpx.Response]) -> list[list[dict[str, Any]]]:
    lines = [gate.line(answer.headers["x-request-id"]) for answer in answers]
    return [line["attempts"] for line in lines if any(tried.get("resume") for tried in line["attempts"])]


@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL", "SIGTERM"])
def test_answers_survive_their_node(fleet: Fleet, how: str) -> None:
    gate, nodes = fleet.gate, fleet.nodes
    before = {name: said(node) for name, node in nodes.items()}
    hit: list[str] = []

    def disturb() -> None:
        hit.append(wait_for(lambda: next((n for n in nodes if said(nodes[n]) > before[n] + 20), ""), "answers"))
        nodes[hit[0]].signal(signal.Signals[how])

    answers = ask_all(gate, disturb)
    assert [told(answer) for answer in answers] == fleet.undisturbed
    moved = resumed(gate, answers)
    assert moved
    assert hit[0] not in {tried["node"] for attempts in moved for tried in attempts if tried.get("resume")}
    if how == "SIGSTOP":
        nodes[hit[0]].signal(signal.SIGCONT)
        gate.wait_node(hit[0], lambda seen: seen["usable"] and seen["load"]["running"] == 0)
        assert [told(answer) for answer in ask_all(gate)] == fleet.undisturbed
