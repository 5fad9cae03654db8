"""Everything that a model can be asked goes through the gate, to a node whose model is for that."""

from __future__ import annotations

import base64
import json
import signal
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from llmnode.wire import chain
from llmnode.wire.chain import of_request
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.processes import Program

KINDS = {"a": ("generate", "tiny"), "b": ("generate", "tiny"), "e": ("embed", "vectors"), "r": ("rerank", "scores")}
SLOTS = 3


class Fleet:
    """A gate in front of two nodes that generate, one that embeds, one that ranks."""

    def __init__(self, gate: GateUnderTest, nodes: dict[str, Program]) -> None:
        self.gate, self.nodes = gate, nodes
        self.client = gate.client()

    def post(self, path: str, body: dict[str, Any], status: int = 200) -> httpx.Response:
        answer = self.client.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer

    def direct(self, node: str, path: str, body: dict[str, Any]) -> Any:
        answer = httpx.post(self.nodes[node].url + path, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def fleet(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    nodes = {
        name: start_module(
            "llmnode", "--name", name, "--backend", "fake", "--kind", kind, "--model-id", model, "--slots", str(SLOTS)
        )
        for name, (kind, model) in KINDS.items()
    }
    for node in nodes.values():
        node.ready()
    gate.list_nodes(*(SimpleNamespace(name=name, url=node.url) for name, node in nodes.items()), models="")
    gate.run("--ready-wait-s", "0")
    for name in nodes:
        gate.wait_node(name, lambda seen: seen["usable"])
    return Fleet(gate, nodes)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/embeddings": ("e", {"model": "vectors", "input": ["hello", [1, 2, 3]]}),
    "/embeddings": ("e", {"model": "vectors", "content": "hello"}),
    "/embedding": ("e", {"model": "vectors", "content": "hello"}),
    "/v1/rerank": ("r", {"model": "scores", "query": "q", "documents": ["a", "b", "c"], "top_n": 2}),
    "/v1/reranking": ("r", {"model": "scores", "query": "q", "documents": ["a", "b", "c"]}),
    "/rerank": ("r", {"model": "scores", "query": "q", "texts": ["a", "b", "c"]}),
    "/reranking": ("r", {"model": "scores", "query": "q", "documents": ["a", "b", "c"]}),
    "/tokenize": ("a", {"model": "tiny", "content": "hello", "with_pieces": True}),
    "/detokenize": ("a", {"model": "tiny", "tokens": [104, 105]}),
    "/apply-template": ("a", {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}),
    "/completion": ("a", {"model": "tiny", "prompt": ["x", [1, 2]], "n_predict": 9, "seed": 2}),
    "/completions": ("a", {"model": "tiny", "prompt": "x", "n_predict": 9, "seed": 2, "return_tokens": True}),
    "/infill": ("a", {"model": "tiny", "input_prefix": "x", "input_suffix": "y", "n_predict": 9, "seed": 2}),
    "/v1/completions": ("a", {"model": "tiny", "prompt": ["x", "y"], "suffix": "", "echo": True, "seed": 2}),
}


def comparable(value: Any) -> Any:
    """Without what each answer, or each node, has of its own."""
    if isinstance(value, list):
        return [comparable(one) for one in value]
    if isinstance(value, dict):
        own = ("timings", "tokens_cached", "id", "created", "prompt_tokens_details") if "tokens" not in value else ()
        own = own or ("timings", "tokens_cached")
        return {name: comparable(one) for name, one in value.items() if name not in own}
    return value


@pytest.mark.parametrize("path", CASES)
def test_the_gate_passes_it_on_and_writes_it_down(fleet: Fleet, path: str) -> None:
    node, body = CASES[path]
    body = {**body, "max_tokens": 12} if path == "/v1/completions" else body
    answer = fleet.post(path, body)
    assert comparable(answer.json()) == comparable(fleet.direct(node, path, body))
    line = fleet.gate.line(answer.headers["x-request-id"])
    assert (line["status"], line["model"], line["path"]) == (200, KINDS[node][1], path)
    assert KINDS[answer.headers["x-llmrack-node"]][1] == KINDS[node][1]
    if path not in ("/tokenize", "/detokenize", "/apply-template"):
        assert line["prompt_tokens"] > 0


def test_base64_through_the_gate_equals_numbers(fleet: Fleet) -> None:
    asked = {"model": "vectors", "input": "hello"}
    numbers = fleet.post("/v1/embeddings", asked).json()["data"][0]["embedding"]
    packed = fleet.post("/v1/embeddings", {**asked, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.array(numbers, np.float32))


@pytest.mark.parametrize("path", ["/completion", "/infill"])
def test_llama_servers_streams_end_as_its_own_do(fleet: Fleet, path: str) -> None:
    body = {**CASES["/infill"][1], "prompt": "z", "stream": True, "ignore_eos": True}
    answer = fleet.post(path, body)
    assert "[DONE]" not in answer.text
    assert ": t " not in answer.text
    events = [json.loads(frame[6:]) for frame in answer.text.split("\n\n") if frame.startswith("data: ")]
    whole = fleet.post(path, {**body, "stream": False}).json()
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


@pytest.mark.parametrize(
    ("path", "model", "serves"),
    [
        ("/v1/embeddings", "tiny", "chat, completion, infill"),
        ("/v1/rerank", "vectors", "embedding"),
        ("/infill", "scores", "rerank"),
        ("/v1/chat/completions", "vectors", "embedding"),
    ],
)
def test_a_model_for_something_else_says_what_it_serves(fleet: Fleet, path: str, model: str, serves: str) -> None:
    error = fleet.post(path, {"model": model}, 400).json()["error"]
    assert (error["code"], error["param"]) == ("wrong_kind", "model")
    assert error["message"] == f"the model {model!r} cannot answer {path}; it serves: {serves}"


def test_the_only_model_for_an_endpoint_need_not_be_named(fleet: Fleet) -> None:
    assert fleet.post("/v1/embeddings", {"input": "hello"}).json()["model"] == "vectors"
    assert fleet.post("/v1/rerank", {"query": "q", "documents": ["a"]}).json()["model"] == "scores"
    assert fleet.post("/completion", {"prompt": "x", "n_predict": 1}).json()["model"] == "tiny"
    error = fleet.post("/tokenize", {"content": "x"}, 400).json()["error"]
    assert error["message"] == "model is missing; models served: scores, tiny, vectors"


def test_an_error_of_the_node_names_the_field(fleet: Fleet) -> None:
    error = fleet.post("/v1/embeddings", {"model": "vectors", "input": ""}, 400).json()["error"]
    assert error["param"] == "input"
    error = fleet.post("/v1/rerank", {"model": "scores", "query": "q"}, 400).json()["error"]
    assert error["param"] == "documents"


def test_props_and_slots_are_of_the_model_that_is_named(fleet: Fleet) -> None:
    props = fleet.client.get("/props", params={"model": "tiny"}).json()
    assert props["total_slots"] == 2 * SLOTS
    assert props["model_alias"] == "tiny"
    slots = fleet.client.get("/slots", params={"model": "tiny"}).json()
    assert [slot["id"] for slot in slots] == list(range(2 * SLOTS))
    assert {slot["node"] for slot in slots} == {"a", "b"}
    assert fleet.client.get("/slots", params={"model": "scores", "fail_on_no_slot": "1"}).status_code == 200
    error = fleet.client.get("/props").json()["error"]
    assert (error["param"], "model is missing" in error["message"]) == ("model", True)
    assert fleet.client.get("/props", params={"model": "nobody"}).status_code == 404
    assert httpx.get(fleet.gate.url + "/props").status_code == 401


def test_models_are_listed_with_what_they_are_for(fleet: Fleet) -> None:
    listed = fleet.client.get("/v1/models").json()
    assert listed == fleet.client.get("/models").json()
    cards = {card["id"]: card for card in listed["data"]}
    assert {name: card["kinds"] for name, card in cards.items()} == {
        "tiny": ["chat", "completion", "infill"],
        "vectors": ["embedding"],
        "scores": ["rerank"],
    }
    assert fleet.client.get("/v1/models/vectors").json() == cards["vectors"]
    assert cards["vectors"]["n_ctx"] == 512
    assert cards["vectors"]["modalities"] == ["text"]
    assert set(cards["vectors"]["meta"]) == {
        "vocab_type", "n_vocab", "n_ctx", "n_ctx_train", "n_embd", "n_params", "size",
    }  # fmt: skip


def test_a_gap_is_routed_by_what_is_before_it() -> None:
    """An editor's next request has the same files and more before the gap: it shares all but the end."""
    files = [{"filename": f"{number}.py", "text": "x = 1\n" * 100} for number in range(3)]
    body = {"input_extra": files, "input_prefix": "def f():\n" * 100, "input_suffix": "end"}
    typed = {**body, "input_prefix": body["input_prefix"] + "    return"}
    first, second = (of_request(one, "salt") for one in (body, typed))
    assert first.root == second.root
    assert first.depth(set(second.blocks)) >= (first.size - 300) // chain.BLOCK
    other = of_request({**typed, "input_extra": files[::-1]}, "salt")
    assert other.root != first.root
    assert other.depth(set(first.blocks)) == 0
    assert of_request({"input_prefix": 5}, "salt").size > 0, "what makes no sense has a chain too"


@pytest.mark.parametrize("path", ["/infill", "/completion"])
def test_what_an_editor_sends_again_goes_where_it_is_held(fleet: Fleet, path: str) -> None:
    long = "x = some_function(1, 2)\n" * 40
    body: dict[str, Any] = {"model": "tiny", "n_predict": 4, "ignore_eos": True}
    body |= {"input_prefix": long, "input_suffix": "end"} if path == "/infill" else {"prompt": long}
    field = "prompt" if path == "/completion" else "input_prefix"
    first = fleet.post(path, body)
    again = fleet.post(path, {**body, field: long + "y = "})
    assert again.headers["x-llmrack-node"] == first.headers["x-llmrack-node"]
    line = fleet.gate.line(again.headers["x-request-id"])
    assert line["cached_tokens"] > 0.9 * len(long)
    assert line["predicted_cached_tokens"] > 0, line["route"]


def test_a_dead_node_costs_nothing(start: Start, gate: GateUnderTest) -> None:
    """A stream goes on at the other node, and what comes in one body begins there."""
    options = ("--backend", "fake", "--model-id", "tiny", "--fake-step-delay-s", "0.1")
    nodes = {name: start("llmnode", "--name", name, *options) for name in "ab"}
    for node in nodes.values():
        node.ready()
    gate.list_nodes(*(SimpleNamespace(name=name, url=node.url) for name, node in nodes.items()))
    gate.run("--poll-interval-s", "5")
    for name in nodes:
        gate.wait_node(name, lambda seen: seen["usable"])
    body = {**CASES["/infill"][1], "prompt": "z", "n_predict": 40, "ignore_eos": True, "n_probs": 1, "stream": True}
    with gate.client() as client:
        undisturbed = native(client.post("/infill", json=body).text)
        with client.stream("POST", "/infill", json=body) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            nodes[answer.headers["x-llmrack-node"]].signal(signal.SIGKILL)
            text += "".join(pieces)
        assert native(text) == undisturbed
        line = gate.line(answer.headers["x-request-id"])
        assert [tried.get("resume", False) for tried in line["attempts"]] == [False, True]
        for _ in range(3):
            again = client.post("/tokenize", json={"model": "tiny", "content": "hello"})
            assert again.status_code == 200, again.text
            assert again.headers["x-llmrack-node"] != answer.headers["x-llmrack-node"]


def native(text: str) -> Any:
    """What a client of llama-server can tell of a stream, but for timings and for how it was cut."""
    events = [json.loads(frame[6:]) for frame in text.split("\n\n") if frame.startswith("data: ")]
    *chunks, last = events
    del last["timings"], last["tokens_cached"]
    said = "".join(chunk["content"] for chunk in chunks)
    ids = [token for chunk in chunks for token in chunk["tokens"]]
    return said, ids, [one for chunk in chunks for one in chunk["completion_probabilities"]], last
