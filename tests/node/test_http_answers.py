"""What clients are promised of answers, asked of the real program with the fake backend and with a real GGUF."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnode.engine.fake import END
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


LIMITS = {"max_tokens": 12, "seed": 7, "ignore_eos": True}
SAMPLERS = [
    {"temperature": 0},
    {"top_k": 3, "top_p": 0.9, "min_p": 0.05},
    {"typical_p": 0.5},
    {"top_n_sigma": 1.0},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"dry_multiplier": 5.0, "dry_allowed_length": 1, "dry_sequence_breakers": []},
    {"repeat_penalty": 1.8},
    {"repetition_penalty": 1.8},
    {"frequency_penalty": 2.0, "presence_penalty": 2.0},
    {"mirostat": 1},
    {"mirostat": 2, "mirostat_tau": 1.0},
]


@pytest.mark.parametrize("fields", SAMPLERS, ids=lambda fields: "+".join(fields))
def test_each_sampler_answers_the_same_whole_and_streamed(fake: Program, fields: Any) -> None:
    asked = {"messages": MESSAGES, **LIMITS, **fields}
    whole = post(fake, "/v1/chat/completions", asked)
    assert whole.status_code == 200, whole.text
    chunks = events(post(fake, "/v1/chat/completions", {**asked, "stream": True}).text)[:-1]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == whole.json()["choices"][0]["message"]["content"]
    assert whole.json()["usage"]["completion_tokens"] == 12
    assert len(said) > 6  # control tokens have no text


def test_a_bias_bans_and_forces_tokens(fake: Program) -> None:
    asked = {"messages": MESSAGES, **LIMITS}
    said = str(post(fake, "/v1/chat/completions", asked).json()["choices"][0]["message"]["content"])
    banned = {str(byte): -100 for byte in set(said.encode())}
    other = post(fake, "/v1/chat/completions", {**asked, "logit_bias": banned}).json()
    assert not set(other["choices"][0]["message"]["content"]) & set(said)
    forced = post(fake, "/v1/chat/completions", {**asked, "logit_bias": {str(ord("Z")): 100}}).json()
    assert forced["choices"][0]["message"]["content"] == "Z" * 12
    never = post(fake, "/v1/chat/completions", {**asked, "logit_bias": [[byte, False] for byte in set(said.encode())]})
    assert not set(never.json()["choices"][0]["message"]["content"]) & set(said)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_choices_are_the_answers_to_their_own_seeds(fake: Program, path: str) -> None:
    text = {"messages": MESSAGES} if "chat" in path else {"prompt": "Say"}

    def texts(body: Any) -> list[str]:
        choices = sorted(body["choices"], key=lambda choice: choice["index"])
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["message"]["content"] if "chat" in path else choice["text"] for choice in choices]

    whole = post(fake, path, {**text, **LIMITS, "n": 3}).json()
    said = texts(whole)
    assert len(set(said)) == 3
    one = post(fake, path, {**text, **LIMITS}).json()
    assert said[0] == texts(one)[0]
    assert whole["usage"]["completion_tokens"] == 36
    assert whole["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]

    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(post(fake, path, {**text, **LIMITS, "n": 3, **options}).text)
    streamed, finished, roles = ["", "", ""], [], []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index, delta = choice["index"], choice.get("delta", {})
        streamed[index] += delta.get("content", "") if "chat" in path else choice["text"]
        roles += [index] if "role" in delta else []
        finished += [index] if choice["finish_reason"] else []
    assert streamed == said
    assert sorted(finished) == [0, 1, 2]
    assert sorted(roles) == ([0, 1, 2] if "chat" in path else [])
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["usage"]["completion_tokens"] == 36
    assert usage["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_more_choices_than_slots_are_answered_all(fake: Program) -> None:
    body = post(fake, "/v1/chat/completions", {"messages": MESSAGES, **LIMITS, "n": 16}).json()
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 16
    assert body["usage"]["completion_tokens"] == 16 * 12


def test_a_prompt_asked_again_is_counted_as_cached(node: Program) -> None:
    words = " ".join(f"word{number}" for number in range(15))
    asked = {"prompt": f"{words} of {model_of(node)}", "max_tokens": 1, "temperature": 0}
    first, second = (post(node, "/v1/completions", asked).json()["usage"] for _ in range(2))
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] < 10
    # All but the last token, whose logits are needed, can have been kept.
    assert second["prompt_tokens_details"]["cached_tokens"] > second["prompt_tokens"] // 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_chat_reports_logprobs_of_each_token(node: Program, stream: bool) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    response = post(node, "/v1/chat/completions", {**asked, "stream": stream})
    if stream:
        chunks = events(response.text)[:-1]
        content = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    else:
        choice = response.json()["choices"][0]
        content, text = choice["logprobs"]["content"], choice["message"]["content"]
        assert set(choice["logprobs"]) == {"content", "refusal"}
    said = b"".join(bytes(one["bytes"]) for one in content)
    assert said.decode("utf-8", "replace").startswith(text)
    assert 1 <= len(content) <= 8
    for one in content:
        assert set(one) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(one["top_logprobs"]) == 3
        falling = [other["logprob"] for other in one["top_logprobs"]]
        assert falling == sorted(falling, reverse=True)
        # Greedy: the drawn token is the most probable one.
        assert one["logprob"] == falling[0] <= 0
        assert (one["token"], one["bytes"]) == (one["top_logprobs"][0]["token"], one["top_logprobs"][0]["bytes"])


def test_logprobs_streamed_are_those_of_the_body(fake: Program) -> None:
    asked = {"prompt": "Say", "logprobs": 2, "n": 2, **LIMITS}
    whole = post(fake, "/v1/completions", asked).json()["choices"]
    chunks = events(post(fake, "/v1/completions", {**asked, "stream": True}).text)[:-1]
    for choice in whole:
        parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        for name, expected in choice["logprobs"].items():
            assert [one for part in parts if part for one in part[name]] == expected
        assert len(choice["logprobs"]["tokens"]) == LIMITS["max_tokens"]
        text, places = "", []
        for token in choice["logprobs"]["tokens"]:
            places.append(len(text))
            text += "" if token.startswith("token_id:") else token
        assert text == choice["text"]
        assert choice["logprobs"]["text_offset"] == places
        assert all(2 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_logprobs_list_each_token_but_the_one_that_ends_the_answer(fake: Program, ignore_eos: bool) -> None:
    likely = {str(END): 7.0}  # the model's end, about every other token
    asked = {"messages": MESSAGES, "logprobs": True, "logit_bias": likely, "max_tokens": 30, "ignore_eos": ignore_eos}
    for seed in range(5):
        whole = post(fake, "/v1/chat/completions", {**asked, "seed": seed}).json()
        (choice,) = whole["choices"]
        listed = [one["token"] for one in choice["logprobs"]["content"]]
        assert "".join(token for token in listed if token != f"token_id:{END}") == choice["message"]["content"]
        assert (f"token_id:{END}" in listed) == ignore_eos
        assert choice["finish_reason"] == ("length" if ignore_eos else "stop")
        assert whole["usage"]["completion_tokens"] - len(listed) == (0 if ignore_eos else 1)


def test_an_answer_matches_its_grammar(node: Program) -> None:
    asked = {"messages": MESSAGES, "grammar": 'root ::= ("yes" | "no") [0-9] [0-9]', "max_tokens": 50}
    for seed in range(5):
        choice = post(node, "/v1/chat/completions", {**asked, "seed": seed}).json()["choices"][0]
        assert re.fullmatch("(yes|no)[0-9][0-9]", choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
    chunks = events(post(node, "/v1/chat/completions", {**asked, "stream": True}).text)[:-1]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert re.fullmatch("(yes|no)[0-9][0-9]", said)


SCHEMA = {
    "type": "object",
    "properties": {"fine": {"type": "boolean"}, "size": {"enum": ["s", "m", "l"]}},
    "required": ["fine", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": SCHEMA},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
    ],
)
def test_an_answer_matches_its_schema(node: Program, fields: Any) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 1000, "n": 3, **fields}
    response = post(node, "/v1/chat/completions", asked)
    assert "x-llmrack-ignored" not in response.headers
    for choice in response.json()["choices"]:
        assert choice["finish_reason"] == "stop", choice
        found = json.loads(choice["message"]["content"])
        assert set(found) == {"fine", "size"}
        assert isinstance(found["fine"], bool) and found["size"] in ("s", "m", "l")


def test_a_json_object_is_one(fake: Program) -> None:
    """A model of random letters seldom ends an object by itself, so what is there when it is cut off is looked at."""
    asked = {"messages": MESSAGES, "max_tokens": 60, "response_format": {"type": "json_object"}}
    choice = post(fake, "/v1/chat/completions", asked).json()["choices"][0]
    assert choice["message"]["content"].lstrip().startswith("{")


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
