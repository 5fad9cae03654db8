"""A body of the Responses API comes to a chat that says the same, or to an error that names what the client wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmnode.api import translation
from llmnode.api.responses import request
from llmnode.api.rules import Rules
from llmnode.api.schema import ChatRequest
from llmnode.wire.errors import BodyTooLarge, InvalidRequest

RULES = Rules(models=("m",), n_vocab=300, max_tokens=0, strict=False, max_choices=4)


def chat(**fields: Any) -> dict[str, Any]:
    return request.translate({"input": "Hello", **fields}).body


def read(rules: Rules = RULES, **fields: Any) -> ChatRequest:
    return translation.read(request.translate, {"input": "Hello", **fields}, rules, seed=1)


def test_a_conversation_with_tools_comes_to_the_same_conversation() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Where is it warm?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "I ask."}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"city": "Köln"}'},
        {"type": "function_call", "id": "fc_2", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "20 °C"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "no city"}]},
        {"role": "assistant", "content": "In Köln."},
        {"role": "assistant", "content": "Go there."},
    ]
    translated = request.translate({"instructions": "Speak.", "input": items})
    assert translated.body["messages"] == [
        {"role": "system", "content": "Speak."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Where is it warm?"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "reasoning_content": "I ask.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
                {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "20 °C"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "no city"}]},
        {"role": "assistant", "content": "In Köln."},
        {"role": "assistant", "content": "Go there."},
    ]
    assert translated.ignored == ()
    assert translated.names.own("messages[3].tool_calls[1]") == "input[2]"


def test_fields_come_to_those_of_chat() -> None:
    schema = {"type": "object"}
    said = chat(
        model="m",
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        stream=True,
        tools=[{"type": "function", "name": "f", "description": "d", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}, "verbosity": "low"},
        include=["message.output_text.logprobs"],
        top_logprobs=3,
    )
    assert said == {
        "messages": [{"role": "user", "content": "Hello"}],
        "model": "m",
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "stream": True,
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": schema, "strict": True},
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        "verbosity": "low",
        "logprobs": True,
        "top_logprobs": 3,
    }


def test_advice_is_accepted_and_named() -> None:
    asked = read(
        store=True,
        truncation="auto",
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="flex",
        metadata={"a": "b"},
        reasoning={"summary": "auto"},
        include=["reasoning.encrypted_content"],
        stream=True,
        stream_options={"include_obfuscation": True},
        max_tool_calls=3,
        never_heard_of=1,
    )
    assert set(asked.options.ignored) == {
        "include[0]",
        "max_tool_calls",
        "never_heard_of",
        "prompt_cache_key",
        "reasoning.summary",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_options.include_obfuscation",
        "truncation",
        "user",
    }
    with pytest.raises(InvalidRequest, match="user has no effect"):
        read(replace(RULES, strict=True), user="u")


def test_what_is_done_anyway_is_not_named_as_ignored() -> None:
    asked = read(
        store=False,
        truncation="disabled",
        service_tier="auto",
        background=False,
        metadata={},
        stream=True,
        stream_options={"include_obfuscation": False},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        tool_choice="auto",
        top_logprobs=0,
    )
    assert asked.options.ignored == ()


IMAGE = {"type": "input_image", "image_url": "https://x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": ["Hello"]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "f"}]}, "input[0].output"),
        ({"instructions": 5}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_own_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    assert caught.value.param == param
    assert param in caught.value.message


def test_limits_of_chats_are_told_in_the_clients_words() -> None:
    items = [{"role": "user", "content": "Hello"}] * 3
    with pytest.raises(BodyTooLarge, match=r"^input may hold 2 messages at most, got 3$") as caught:
        read(replace(RULES, max_messages=2), input=items)
    assert caught.value.param == "input"
