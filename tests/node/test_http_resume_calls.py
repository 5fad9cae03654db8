"""Answers that are more than content, on a model that thinks first: streams equal bodies, and both go on elsewhere."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from llmnode.wire import chain
from llmnode.wire.node import Report
from tests.conftest import Start
from tests.node.stitching import FIXED, begun, finish_everywhere, heard
from tests.node.test_narrators import added_up
from tests.processes import Program

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for message in messages %}"
    "<|{{ message.role }}|>{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}"
)
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me of the fox"}], "stream": True, "seed": 5}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "é": {"enum": ["x", "€"]}},
    "required": ["a", "é"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = {
    "tools": [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in (("add", SCHEMA), ("look", NOTHING))
    ]
}
THOUGHT = {"thinking_budget_tokens": 9}
NO_SPACES = {"logit_bias": {"32": -30, "9": -30, "10": -30, "13": -30}}
CALLED = {**ASKED, **TOOLS, **NO_SPACES, "tool_choice": "required", "max_tokens": 64}
IN_FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}}

CASES: dict[str, dict[str, Any]] = {
    "calls after a thought": {**CALLED, **THOUGHT},
    "one call in each of three choices": {**CALLED, "enable_thinking": False, "n": 3, "parallel_tool_calls": False},
    "calls with logprobs": {**CALLED, **THOUGHT, "logprobs": True, "top_logprobs": 1, "max_tokens": 40},
    "whole with calls": {**CALLED, **THOUGHT, "stream": False},
    "a thought that its budget ends": {**ASKED, **TOOLS, **THOUGHT, "max_tokens": 30},
    "a schema after a thought": {**ASKED, **THOUGHT, **IN_FORM, **NO_SPACES, "max_tokens": 50},
    "a message to go on with": {
        **ASKED,
        "messages": [*ASKED["messages"], {"role": "assistant", "content": "The fox "}],
        "max_tokens": 20,
    },
}


@pytest.fixture(scope="module")
def nodes(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> list[Program]:
    """A slow one, whose tokens come one by one so that each has a marker, and another."""
    path = tmp_path_factory.mktemp("template") / "thinking.jinja"
    path.write_text(TEMPLATE)
    fake = ("--backend", "fake", "--model-id", "m", "--slots", "16", "--chat-template-file", str(path))
    programs = [start_module("llmnode", *fake, "--fake-step-delay-s", "0.01"), start_module("llmnode", *fake)]
    return [program.ready() for program in programs]


@pytest.fixture(scope="module")
def undisturbed(nodes: list[Program]) -> dict[str, list[bytes]]:
    with ThreadPoolExecutor(len(CASES)) as clients:
        answers = clients.map(lambda body: begun(nodes[0], CHAT, body), CASES.values())
        return dict(zip(CASES, answers, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_an_answer_cut_at_any_marker_is_finished_elsewhere(
    name: str, nodes: list[Program], undisturbed: dict[str, list[bytes]]
) -> None:
    finish_everywhere(nodes[1], CHAT, CASES[name], undisturbed[name])


def choices(nodes: list[Program], body: dict[str, Any]) -> list[dict[str, Any]]:
    response = httpx.post(
        nodes[1].url + CHAT, json={**body, "stream": False}, headers={"x-llmrack-resumable": FIXED.header()}, timeout=60
    )
    (answer, *_) = [f for f in response.content.split(b"\n\n") if f.startswith(b"data: ")]
    found: list[dict[str, Any]] = json.loads(answer[len(b"data: ") :])["choices"]
    return found


@pytest.mark.parametrize("name", [name for name, body in CASES.items() if body["stream"]])
def test_a_stream_adds_up_to_the_body(name: str, nodes: list[Program], undisturbed: dict[str, list[bytes]]) -> None:
    frames = heard(undisturbed[name]).frames
    for index, expected in enumerate(choices(nodes, CASES[name])):
        own = b"".join(frame for frame in frames if b'"index":%d,"delta"' % index in frame)
        assert added_up(own) == expected


def test_calls_are_calls_of_the_tools_and_keep_to_their_schemas(
    nodes: list[Program], undisturbed: dict[str, list[bytes]]
) -> None:
    (choice,) = choices(nodes, CASES["calls after a thought"])
    assert len(choice["message"]["reasoning_content"]) == 9
    for choice in choices(nodes, {**CASES["one call in each of three choices"], "max_tokens": 200}):
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        schema = {"add": SCHEMA, "look": NOTHING}[call["function"]["name"]]
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    (choice,) = choices(nodes, {**CASES["a schema after a thought"], "max_tokens": 200})
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert choice["finish_reason"] == "stop"


def test_a_call_and_its_result_can_be_sent_back(nodes: list[Program]) -> None:
    """As the SDKs send them: with everything that came, null where there was nothing."""
    body = {**CASES["one call in each of three choices"], "n": 1, "max_tokens": 200}
    (choice,) = choices(nodes, body)
    message = choice["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "42"}
    response = httpx.post(
        nodes[1].url + CHAT,
        json={"messages": [*ASKED["messages"], message, result], **TOOLS, "max_tokens": 5},
        timeout=60,
    )
    assert response.status_code == 200, response.text
    assert "x-llmrack-ignored" not in response.headers


def test_the_next_turn_finds_what_a_call_left_in_the_cache(nodes: list[Program]) -> None:
    body = {**CASES["one call in each of three choices"], "n": 1, "stream": False, "max_tokens": 200}
    body["messages"] = [{"role": "user", "content": "A long question. " * 40}]
    response = httpx.post(nodes[1].url + CHAT, json=body, timeout=60)
    message = response.json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "7 " * 300}
    turn = {**body, "messages": [*body["messages"], message, result]}
    report = Report.parse(httpx.get(nodes[1].url + "/node", timeout=10).json())
    (model,) = report.models
    salt = chain.salt(model.id, model.template, CHAT)
    held = chain.unpack(report.cache.blocks)
    whole = chain.of_request({**turn, "messages": turn["messages"][:2]}, salt)
    assert whole.depth(held) == len(whole.blocks), "the reply is in the chain as it comes back"
    assert chain.of_request(turn, salt).depth(held) >= len(whole.blocks)


def test_fields_of_a_chat_that_must_be_refused_are_named(nodes: list[Program]) -> None:
    user = ASKED["messages"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({**TOOLS, "tool_choice": {"type": "function", "function": {"name": "?"}}}, "tool_choice.function"),
        ({**CALLED, **IN_FORM}, "tool_choice"),
        ({**TOOLS, "grammar": 'root ::= "a"'}, "grammar"),
        ({"messages": [*user, {"role": "function", "name": "f", "content": "x"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {
                "messages": [
                    *user,
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template": "x"}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"thinking_budget_tokens": 1, "reasoning_budget": 2}, "thinking_budget_tokens"),
    ]
    for fields, param in wrong:
        response = httpx.post(nodes[1].url + CHAT, json={"messages": user, "max_tokens": 1, **fields}, timeout=60)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
