"""The gate in front of real llmnode processes, whose model is the deterministic fake backend."""

from __future__ import annotations

import json
import signal
import threading
from types import SimpleNamespace

import httpx
import pytest

from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.processes import Program, wait_for

TOKEN = "fleet-token-for-the-tests-0001"


@pytest.fixture
def fleet(gate: GateUnderTest, start: Start) -> tuple[GateUnderTest, dict[str, Program]]:
    token = gate.folder / "fleet-token"
    token.write_text(TOKEN + "\n")
    options = ("--backend", "fake", "--model-id", "tiny", "--fleet-token-file", str(token))
    nodes = {name: start("llmnode", "--name", name, *options) for name in ("a", "b")}
    for node in nodes.values():
        node.ready()
    gate.list_nodes(*(SimpleNamespace(name=name, url=node.url) for name, node in nodes.items()))
    gate.run("--fleet-token-file", str(token))
    for name in nodes:
        gate.wait_node(name, lambda seen: seen["usable"])
    return gate, nodes


Fleet = tuple[GateUnderTest, dict[str, Program]]


def text_of(stream: httpx.Response) -> str:
    events = [line[len("data: ") :] for line in stream.text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_streamed_and_whole_answers_are_the_same_and_cost_the_same(fleet: Fleet) -> None:
    gate, nodes = fleet
    whole = gate.chat(max_tokens=8, temperature=0)
    streamed = gate.chat(max_tokens=8, temperature=0, stream=True)
    assert whole.status_code == streamed.status_code == 200, whole.text + streamed.text
    assert text_of(streamed) == whole.json()["choices"][0]["message"]["content"]
    lines = [gate.line(answer.headers["x-request-id"]) for answer in (whole, streamed)]
    usage = whole.json()["usage"]
    for line in lines:
        assert line["prompt_tokens"] == usage["prompt_tokens"] > 0
        assert line["completion_tokens"] == usage["completion_tokens"] > 0
    assert {line["node"] for line in lines} == set(nodes)


def test_a_killed_node_costs_no_request_that_had_not_begun(fleet: Fleet) -> None:
    gate, nodes = fleet
    nodes["a"].signal(signal.SIGKILL)
    nodes["a"].wait()
    for _ in range(4):
        assert gate.chat(max_tokens=4).headers["x-llmrack-node"] == "b"
    assert gate.wait_node("a", lambda seen: not seen["usable"])["state"] == "unreachable"


def test_a_client_that_leaves_frees_the_slot_of_a_real_node(fleet: Fleet) -> None:
    gate, nodes = fleet
    body = {"model": "tiny", "stream": True, "ignore_eos": True, "messages": [{"role": "user", "content": "x"}]}
    with gate.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        next(answer.iter_bytes())
        name = answer.headers["x-llmrack-node"]
    headers = {"authorization": f"Bearer {TOKEN}"}

    def idle() -> bool:
        report = nodes[name].get("/node", headers=headers)
        return report is not None and report.json()["load"]["running"] == 0

    wait_for(idle, "the slot to be free")


def test_requests_are_spread_over_the_nodes_and_all_answered(fleet: Fleet) -> None:
    gate, nodes = fleet
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(gate.chat(max_tokens=16))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 12
    assert {answer.headers["x-llmrack-node"] for answer in answers} == set(nodes)


def test_an_error_of_the_node_is_the_clients_to_read(fleet: Fleet) -> None:
    gate, _ = fleet
    answer = gate.chat(temperature=99)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"
