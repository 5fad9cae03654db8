"""What clients are promised of answers, asked of the real program with the fake backend and with a real GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Start
from tests.processes import Program

MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def fake(start_module: Start) -> Program:
    return start_module("llmnode", "--backend", "fake", "--model-id", "one", "--aliases", "two").ready()


@pytest.fixture(scope="module")
def real(start_module: Start, tiny_model: Path) -> Program:
    return start_module("llmnode", "--model", str(tiny_model), "--model-id", "tiny", "--n-ctx", "256").ready()


@pytest.fixture(params=["fake", "real"])
def node(request: pytest.FixtureRequest) -> Program:
    program: Program = request.getfixturevalue(request.param)
    return program


def post(node: Program, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(node.url + path, json=body, headers=headers, timeout=60)


def model_of(node: Program) -> str:
    return str(httpx.get(node.url + "/v1/models", timeout=10).json()["data"][0]["id"])


def events(body: str) -> list[Any]:
    """The payloads of a stream, `[DONE]` as text; comments are left out."""
    found = [frame[6:] for frame in body.split("\n\n") if frame.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


def test_a_chat_answer_has_openais_shape(node: Program) -> None:
    body = post(node, "/v1/chat/completions", {"model": model_of(node), "messages": MESSAGES, "max_tokens": 8}).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == model_of(node)
    assert isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 <= usage["completion_tokens"] <= 8
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0} or usage["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_stream_and_a_body_say_the_same(fake: Program) -> None:
    asked = {"model": "one", "messages": MESSAGES, "max_tokens": 60, "seed": 7, "ignore_eos": True}
    whole = post(fake, "/v1/chat/completions", asked).json()
    chunks = events(post(fake, "/v1/chat/completions", {**asked, "stream": True}).text)
    assert chunks.pop() == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == 60
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]} == {None}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_has_the_headers_that_proxies_need(node: Program) -> None:
    response = post(
        node,
        "/v1/chat/completions",
        {"model": model_of(node), "messages": MESSAGES, "max_tokens": 4, "stream": True},
        **{"x-request-id": "mine-1"},
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "mine-1"


def test_usage_ends_a_stream_that_asks_for_it(fake: Program) -> None:
    asked = {"model": "one", "messages": MESSAGES, "max_tokens": 5, "ignore_eos": True, "stream": True}
    *chunks, last, done = events(
        post(fake, "/v1/chat/completions", {**asked, "stream_options": {"include_usage": True}}).text
    )
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in events(post(fake, "/v1/chat/completions", asked).text)[:-1])


def test_the_gate_gets_the_usage_as_a_comment(fake: Program) -> None:
    asked = {"model": "one", "messages": MESSAGES, "max_tokens": 5, "ignore_eos": True, "stream": True}
    text = post(fake, "/v1/chat/completions", asked, **{"x-llmrack-report-usage": "1"}).text
    comment = next(frame for frame in text.split("\n\n") if frame.startswith(": u "))
    assert comment.split()[-1] == "5"
    assert text.index(comment) < text.index("data: [DONE]")
    assert ": u " not in post(fake, "/v1/chat/completions", asked).text


def test_completions_answer_whole_and_streamed(node: Program) -> None:
    asked = {"model": model_of(node), "prompt": "Once upon", "max_tokens": 6, "temperature": 0}
    whole = post(node, "/v1/completions", asked).json()
    assert whole["object"] == "text_completion"
    assert whole["id"].startswith("cmpl-")
    chunks = events(post(node, "/v1/completions", {**asked, "stream": True}).text)
    assert chunks.pop() == "[DONE]"
    said = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    # On a real model the same prompt may be computed in another batch shape, so only the length is promised there.
    if model_of(node) == "one":
        assert said == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_token_ids_are_taken_as_a_prompt(fake: Program) -> None:
    body = post(fake, "/v1/completions", {"model": "one", "prompt": [104, 105], "max_tokens": 2}).json()
    assert body["usage"]["prompt_tokens"] == 2
    by_text = post(fake, "/v1/completions", {"model": "one", "prompt": "hi", "max_tokens": 2}).json()
    assert by_text["usage"]["prompt_tokens"] == 3  # the model wants BOS in front of a text


def test_bos_is_not_doubled(node: Program) -> None:
    """The fake model's template writes BOS itself; the tiny one's leaves it to us."""
    chat = post(node, "/v1/chat/completions", {"messages": [{"role": "user", "content": ""}], "max_tokens": 1}).json()
    expected = {"one": len(["bos", "user", "end", "assistant"]), "tiny": None}[model_of(node)]
    if expected is not None:
        assert chat["usage"]["prompt_tokens"] == expected
    else:
        raw = post(
            node,
            "/v1/completions",
            {"prompt": "<s><|user|>\n<|end|>\n<|assistant|>\n", "max_tokens": 1},
        ).json()
        assert chat["usage"]["prompt_tokens"] == raw["usage"]["prompt_tokens"]


def test_inference_is_the_smallest_call(node: Program) -> None:
    response = post(node, "/inference", {"prompt": "Hello", "max_tokens": 4})
    assert response.status_code == 200
    assert set(response.json()) == {"result"}
    assert isinstance(response.json()["result"], str)


def test_the_same_seed_gives_the_same_answer_and_none_gives_another(fake: Program) -> None:
    asked = {"model": "one", "messages": MESSAGES, "max_tokens": 40, "ignore_eos": True}

    def say(**more: Any) -> str:
        return str(post(fake, "/v1/chat/completions", {**asked, **more}).json()["choices"][0]["message"]["content"])

    assert say(seed=1) == say(seed=1)
    assert say(seed=1) != say(seed=2)
    assert say() != say()
    assert say(temperature=0) == say(temperature=0)


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(fake: Program) -> None:
    asked = {"model": "one", "messages": MESSAGES, "max_tokens": 60, "seed": 3, "ignore_eos": True}
    full = post(fake, "/v1/chat/completions", asked).json()["choices"][0]["message"]["content"]
    stop = full[20:23]
    choice = post(fake, "/v1/chat/completions", {**asked, "stop": ["not there", stop]}).json()["choices"][0]
    assert choice["message"]["content"] == full[: full.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_aliases_answer_and_are_listed(fake: Program) -> None:
    listed = httpx.get(fake.url + "/v1/models", timeout=10).json()
    assert [model["id"] for model in listed["data"]] == ["one", "two"]
    assert listed["object"] == "list"
    body = post(fake, "/v1/chat/completions", {"model": "two", "messages": MESSAGES, "max_tokens": 1}).json()
    assert body["model"] == "two"


def test_advice_is_accepted_and_named(fake: Program) -> None:
    asked = {"model": "one", "messages": MESSAGES, "max_tokens": 1, "store": True, "nobody_knows": 1}
    for stream in (False, True):
        response = post(fake, "/v1/chat/completions", {**asked, "stream": stream})
        assert response.status_code == 200
        assert response.headers["x-llmrack-ignored"] == "nobody_knows, store"
    plain = post(fake, "/v1/chat/completions", {"model": "one", "messages": MESSAGES, "max_tokens": 1})
    assert "x-llmrack-ignored" not in plain.headers


def test_strict_fields_refuses_advice(start: Start) -> None:
    node = start("llmnode", "--backend", "fake", "--strict-fields").ready()
    response = post(node, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, "store": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "store"
