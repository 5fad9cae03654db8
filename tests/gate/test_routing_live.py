"""Routing as clients and operators see it: real gates, real sockets, nodes that say what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnode.wire import chain
from llmnode.wire.node import Cache, Usage
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import wait_for

Mock = Callable[..., MockNode]
Three = tuple[GateUnderTest, dict[str, MockNode]]

LONG = "word " * 1000
"""5,000 bytes: 1,250 tokens, of which 1,216 are whole blocks."""


@pytest.fixture
def three(gate: GateUnderTest, mock: Mock) -> Three:
    """A running gate with the default policy, in front of three idle nodes that know their speed."""
    nodes = {name: mock(name) for name in "abc"}
    for node in nodes.values():
        node.say(load={"prefill_tps": 1000.0, "bytes_per_token": 4.0})
    gate.list_nodes(*nodes.values(), models="")
    gate.run()
    for name in nodes:
        gate.wait_node(name, lambda node: node["usable"])
    return gate, nodes


def body(*turns: str, model: str = "tiny") -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"model": model, "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def ask(gate: GateUnderTest, *turns: str) -> httpx.Response:
    answer = gate.chat(**body(*turns))
    assert answer.status_code == 200, answer.text
    return answer


def asked(gate: GateUnderTest, *turns: str) -> str:
    return ask(gate, *turns).headers["x-llmrack-node"]


def tell(gate: GateUnderTest, node: MockNode, *turns: str, **load: Any) -> None:
    """Let the node say that it holds this conversation, and wait until the gate has heard it."""
    model = node.report.models[0]
    held = chain.of_request(body(*turns), chain.salt(model.id, model.template, "/v1/chat/completions"))
    seen = node.report.load.kv_cells + 1
    node.say(cache=Cache(chain.pack(held.blocks)), load={"kv_cells": seen, **load})
    gate.wait_node(node.name, lambda shown: shown["load"]["kv_cells"] == seen)


def test_a_conversation_goes_back_to_the_node_that_holds_it(three: Three) -> None:
    gate, nodes = three
    for name, node in nodes.items():
        tell(gate, node, f"{name} {LONG}", "answer")
    for name in nodes:
        answer = ask(gate, f"{name} {LONG}", "answer", "next")
        assert answer.headers["x-llmrack-node"] == name
        line = gate.line(answer.headers["x-request-id"])
        assert line["route"].startswith(f"prefix (held): {name} 0/4 (0.0")
        assert line["predicted_cached_tokens"] == 1216


def test_a_conversation_stays_where_it_began_before_any_report_says_so(three: Three) -> None:
    gate, _ = three
    for number in range(8):
        first = asked(gate, f"{number} {LONG}")
        assert asked(gate, f"{number} {LONG}", "answer", "next") == first


def test_a_busy_holder_loses_when_waiting_costs_more(three: Three) -> None:
    gate, nodes = three
    tell(gate, nodes["b"], LONG, running=4, wait_s=0.5)
    assert asked(gate, LONG) == "b"
    tell(gate, nodes["b"], LONG, running=4, wait_s=9.0)
    answer = ask(gate, LONG)
    assert answer.headers["x-llmrack-node"] != "b"
    assert gate.line(answer.headers["x-request-id"])["route"].startswith("prefix (moved): ")


def test_two_gates_agree_without_a_word_between_them(three: Three, start: Start, tmp_path: Path) -> None:
    gate, nodes = three
    other = GateUnderTest(start, tmp_path / "other")
    other.folder.mkdir()
    other.list_nodes(*nodes.values(), models="")
    other.run()
    for name in nodes:
        other.wait_node(name, lambda node: node["usable"])
    tell(gate, nodes["c"], "held " + LONG)
    other.wait_node("c", lambda shown: shown["load"]["kv_cells"] == nodes["c"].report.load.kv_cells)
    turns = [f"{number} {LONG}" for number in range(8)] + ["held " + LONG]
    homes = [asked(gate, turn) for turn in turns]
    assert [asked(other, turn) for turn in turns] == homes
    assert len(set(homes)) > 1
    assert homes[-1] == "c"


def test_an_answer_that_found_less_corrects_the_gate(three: Three) -> None:
    gate, nodes = three
    liar = nodes["b"]
    tell(gate, liar, LONG)
    liar.usage = Usage(1253, 0, 5)
    assert asked(gate, LONG) == "b"
    metrics = httpx.get(gate.url + "/metrics").text
    assert _value(metrics, 'llmgate_routed_total{policy="prefix",reason="held"}') == 1
    assert _value(metrics, 'llmgate_predicted_cached_tokens_total{model="tiny"}') == 1216
    assert _value(metrics, 'llmgate_tokens_total{kind="cached",model="tiny"}') == 0
    line = gate.line(ask(gate, LONG).headers["x-request-id"])
    assert line["route"].startswith("prefix (cold): ")
    assert line["predicted_cached_tokens"] == 0


def test_an_alias_reaches_the_node_as_the_models_id_and_nothing_else_changes(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    gate.list_nodes(node, models='[models.tiny]\naliases = ["gpt-4o"]\n')
    gate.run()
    sent = (
        b'{ "messages": [ {"role":"user", "content":"\\"model\\":\\"gpt-4o\\""} ],\n "model" : "gpt-4o", "x": 1.0e3 }'
    )
    with gate.client() as client:
        answer = client.post("/v1/chat/completions", content=sent)
        assert answer.status_code == 200, answer.text
        assert client.get("/v1/models/gpt-4o").json()["id"] == "tiny"
    assert node.requests[-1]["body"] == sent.replace(b'"model" : "gpt-4o"', b'"model" : "tiny"')
    assert gate.line(answer.headers["x-request-id"])["model"] == "tiny"


def test_a_key_for_an_alias_may_use_that_model_by_it(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"), models='[models.tiny]\naliases = ["gpt-4o"]\n')
    gate.run()
    narrow = gate.create_key("narrow", "--models", "gpt-4o")
    wait_for(lambda: gate.chat(narrow, model="gpt-4o").status_code == 200, "the new key to work")
    assert gate.chat(narrow, model="tiny").status_code == 403


def test_a_full_model_falls_back_and_says_so(gate: GateUnderTest, mock: Mock) -> None:
    big, small = mock("a", model="big"), mock("b", model="small")
    gate.list_nodes(big, small, models='[models.big]\nfallback = ["small"]\n')
    gate.run()
    gate.wait_node("b", lambda node: node["usable"])
    assert gate.chat(model="big").headers["x-llmrack-node"] == "a"
    big.say(load={"running": 4})
    gate.wait_node("a", lambda node: node["load"]["running"] == 4)
    answer = gate.chat(model="big")
    assert answer.headers["x-llmrack-node"] == "b"
    assert json.loads(small.requests[-1]["body"])["model"] == "small"
    line = gate.line(answer.headers["x-request-id"])
    assert line["model"] == "small"
    assert line["route"].startswith("prefix (only, fallback from big): b 0/4")


def test_new_routes_are_taken_without_a_restart(three: Three) -> None:
    gate, nodes = three
    labelled = "".join(
        f'[[nodes]]\nname = "{n.name}"\nurl = "{n.url}"\nlabels = {{at = "{n.name}"}}\n' for n in nodes.values()
    )
    gate.nodes_file.write_text(labelled + '[models.tiny]\nlabels = {at = "b"}\n')
    wait_for(lambda: {asked(gate, f"{number}") for number in range(8)} == {"b"}, "the new route")


def test_explain_says_what_the_gate_does(three: Three) -> None:
    gate, nodes = three
    tell(gate, nodes["b"], LONG)
    tell(gate, nodes["c"], "more " + LONG, queued_prompt_tokens=3000)
    files = ("--nodes-file", str(gate.nodes_file))
    for turn in (LONG, "more " + LONG, "cold " + LONG):
        told = gate.cli("explain", "-", *files, said=json.dumps(body(turn)))
        assert told.returncode == 0, told.stderr
        answer = ask(gate, turn)
        chosen = next(line for line in told.stdout.splitlines() if line.startswith("prefix *"))
        assert chosen.split()[2] == answer.headers["x-llmrack-node"]
        assert chosen.endswith(gate.line(answer.headers["x-request-id"])["route"])
    for name in ("least-loaded", "round-robin", "random", "rendezvous"):
        assert f"\n{name} " in told.stdout


def test_explain_refuses_what_it_cannot_explain(three: Three, tmp_path: Path) -> None:
    gate, nodes = three

    def refused(code: int, *arguments: str, said: str = "") -> str:
        done = gate.cli("explain", *arguments, "--nodes-file", str(gate.nodes_file), said=said)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr + done.stdout

    assert "cannot read" in refused(2, str(tmp_path / "none.json"))
    assert "not valid JSON" in refused(2, "-", said="{")
    assert "must be a JSON object" in refused(2, "-", said="[]")
    assert "model must be a string of one character or more, got 5" in refused(2, "-", said='{"model":5}')
    assert "--path" in refused(2, "-", "--path", "/v1/nothing", said="{}")
    assert "No node can take this request." in refused(1, "-", said='{"model":"none"}')
    nodes["a"].stop()
    told = gate.cli("explain", "-", "--nodes-file", str(gate.nodes_file), said='{"prompt":"x"}')
    assert told.returncode == 0
    assert "not a choice: connection refused" in told.stdout


def _value(metrics: str, series: str) -> float:
    return next(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(series))
