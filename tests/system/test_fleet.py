"""A gate and two nodes with a real GGUF, over real sockets: what a client and an operator were promised."""

from __future__ import annotations

import concurrent.futures
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import Start
from tests.processes import wait_for
from tests.system.fleet import Fleet, build

NODES = ("a", "b")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, start_module: Start, tiny_model: Path) -> Iterator[Fleet]:
    arguments = ["--model", str(tiny_model), "--slots", "4", "--n-ctx", "512", "--threads", "1"]
    yield build(tmp_path_factory.mktemp("fleet"), start_module, arguments, NODES)


def test_a_streamed_answer_equals_the_whole_one(fleet: Fleet) -> None:
    whole = fleet.chat("Tell me a story", temperature=0, max_tokens=16)
    assert whole.status_code == 200, whole.text
    choice = whole.json()["choices"][0]
    text, chunks, headers = fleet.stream("Tell me a story", temperature=0, max_tokens=16)
    assert headers["content-type"].startswith("text/event-stream")
    assert text == choice["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_comes_when_asked_for_and_is_logged_either_way(fleet: Fleet) -> None:
    whole = fleet.chat("Count", temperature=0, max_tokens=12).json()["usage"]
    _, asked, _ = fleet.stream("Count", temperature=0, max_tokens=12, stream_options={"include_usage": True})
    _, plain, headers = fleet.stream("Count", temperature=0, max_tokens=12)
    assert asked[-1]["usage"]["prompt_tokens"] == whole["prompt_tokens"]
    assert asked[-1]["usage"]["completion_tokens"] == whole["completion_tokens"] == 12
    assert all(not chunk.get("usage") for chunk in plain)
    line = wait_for(
        lambda: next((x for x in fleet.lines() if x["id"] == headers["x-request-id"]), None), "the request's log line"
    )
    assert line["completion_tokens"] == 12
    assert line["prompt_tokens"] == whole["prompt_tokens"]
    assert line["node"] in NODES and line["key"] == "client" and line["status"] == 200


def test_load_is_spread_over_both_nodes(fleet: Fleet) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: fleet.chat(f"Question {n}", max_tokens=24), range(16)))
    assert [a.status_code for a in answers] == [200] * 16
    assert {a.headers["x-llmrack-node"] for a in answers} == set(NODES)


def test_the_same_seed_says_the_same(fleet: Fleet) -> None:
    said = {fleet.chat("Dice", seed=7, temperature=1.0, max_tokens=12).json()["choices"][0]["message"]["content"]
            for _ in range(3)}  # fmt: skip
    other = fleet.chat("Dice", seed=8, temperature=1.0, max_tokens=12).json()["choices"][0]["message"]["content"]
    assert len(said) == 1
    assert other not in said


def test_inference_is_the_smallest_call_that_works(fleet: Fleet) -> None:
    answer = fleet.post("/inference", {"prompt": "Hello", "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json()["result"], str)


def test_models_are_listed_once(fleet: Fleet) -> None:
    answer = httpx.get(fleet.gate.url + "/v1/models", headers={"authorization": f"Bearer {fleet.key}"})
    assert [model["id"] for model in answer.json()["data"]] == ["test"]


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(fleet: Fleet) -> None:
    answer = fleet.chat("word " * 2000)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"] and any(int(w) > 2000 for w in error["message"].split() if w.isdigit())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": "hello"}, "messages"),
        ({"n": 40}, "n"),
        ({"stop": 5}, "stop"),
    ],
)
def test_a_bad_field_is_named(fleet: Fleet, fields: dict[str, object], param: str) -> None:
    answer = fleet.chat(**fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert param in answer.json()["error"]["message"]


def test_a_wrong_key_and_an_unknown_model_are_named(fleet: Fleet) -> None:
    body = {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}
    assert fleet.post("/v1/chat/completions", body, key="sk-llmrack-wrong").status_code == 401
    answer = fleet.post("/v1/chat/completions", body)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "nobody" in answer.json()["error"]["message"] and "test" in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_the_slot_behind_the_gate(fleet: Fleet) -> None:
    body = {"model": "test", "messages": [{"role": "user", "content": "long"}], "stream": True, "ignore_eos": True}
    with httpx.stream(
        "POST", fleet.gate.url + "/v1/chat/completions", json=body, timeout=60,
        headers={"authorization": f"Bearer {fleet.key}"},
    ) as answer:  # fmt: skip
        next(answer.iter_lines())
    wait_for(
        lambda: all(n["load"]["running"] == 0 and n["in_flight"] == 0 for n in fleet.view().values()), "free slots"
    )


def test_a_drained_node_gets_no_work_until_undrained(fleet: Fleet) -> None:
    assert fleet.drain("a", ttl_seconds=60).status_code == 200
    try:
        assert fleet.view()["a"]["lease"]["owner"] == "test"
        assert {fleet.chat().headers["x-llmrack-node"] for _ in range(6)} == {"b"}
        refused = fleet.drain("b", ttl_seconds=60)
        assert refused.status_code == 409, "the last ready node of a model is not given away"
    finally:
        assert fleet.undrain("a").status_code in (200, 204)
    assert {fleet.chat(f"question {n}").headers["x-llmrack-node"] for n in range(16)} == set(NODES)


def test_no_secret_and_no_prompt_is_in_any_log(fleet: Fleet) -> None:
    fleet.chat("a very private sentence")
    logs = [program.output() for program in (fleet.gate, *fleet.nodes.values())]
    everything = "\n".join(logs) + fleet.request_log.read_text()
    for secret in (fleet.key, fleet.admin, "fleet-token-of-the-tests", "a very private sentence"):
        assert secret not in everything


def test_a_killed_node_costs_new_requests_nothing(tmp_path: Path, start: Start, tiny_model: Path) -> None:
    fleet = build(tmp_path, start, ["--model", str(tiny_model), "--n-ctx", "256", "--threads", "1"], NODES)
    fleet.nodes["a"].signal(signal.SIGKILL)
    answers = [fleet.chat() for _ in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 12
    assert {answer.headers["x-llmrack-node"] for answer in answers} == {"b"}
    fleet.usable(1)
    listed = fleet.view()["a"]
    assert listed["state"] == "unreachable" and listed["why"]


def test_sigterm_lets_running_streams_end(tmp_path: Path, start: Start) -> None:
    fleet = build(tmp_path, start, ["--backend", "fake", "--fake-step-delay-s", "0.02"], NODES)

    def ask(number: int) -> str:
        return fleet.stream(f"s{number}", seed=number, max_tokens=60, ignore_eos=True)[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(ask, number) for number in range(4)]
        wait_for(lambda: sum(n["load"]["running"] for n in fleet.view().values()) == 4, "four running streams")
        fleet.nodes["a"].signal(signal.SIGTERM)
        after = [pool.submit(fleet.chat, f"n{n}") for n in range(4)]
        texts = [stream.result() for stream in streams]
        assert {a.result().headers["x-llmrack-node"] for a in after} == {"b"}
    assert texts == [ask(number) for number in range(4)], "a drained stream says what an undisturbed one says"
    assert fleet.nodes["a"].wait() == 0
