"""A body of Anthropic's Messages API comes to a chat that says the same, or to an error that has the client's names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmnode.api import translation
from llmnode.api.anthropic import request
from llmnode.api.rules import Rules
from llmnode.api.schema import ChatRequest
from llmnode.wire.errors import InvalidRequest

RULES = Rules(models=("m",), n_vocab=300, max_tokens=0, strict=False, max_choices=4)
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return request.translate({"messages": HELLO, **fields}).body


def read(rules: Rules = RULES, **fields: Any) -> ChatRequest:
    return translation.read(request.translate, {"messages": HELLO, **fields}, rules, seed=1)


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message or "contradict" in caught.value.message
    return caught.value


def test_a_conversation_with_tools_comes_to_the_same_conversation() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "it warm?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I ask.", "signature": "x"},
                {"type": "redacted_thinking", "data": "zz"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "20 °C"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "no city"}]},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    translated = request.translate({"system": [{"type": "text", "text": "Be brief."}], "messages": messages})
    assert translated.body["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "it warm?"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "reasoning_content": "I ask.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
                },
                {"id": "toolu_2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "20 °C"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": [{"type": "text", "text": "no city"}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    assert translated.ignored == ("messages[1].content[1]",)


def test_fields_come_to_those_of_chat() -> None:
    said = chat(
        model="m",
        max_tokens=9,
        stop_sequences=["END"],
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        stream=True,
        tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    )
    assert said == {
        "messages": HELLO,
        "model": "m",
        "max_tokens": 9,
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "stream": True,
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
            }
        ],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "output", "schema": {"type": "object"}}},
    }


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_choices_of_tools_have_chats_names(choice: dict[str, Any], expected: Any) -> None:
    assert chat(tool_choice=choice)["tool_choice"] == expected


def test_an_answer_that_the_client_has_begun_is_gone_on_with() -> None:
    begun = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    assert read(messages=begun).prompting.continued
    assert not read().prompting.continued


def test_max_tokens_may_be_missing() -> None:
    assert read().options.max_tokens is None


def test_advice_is_accepted_and_named() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    asked = read(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=abc;"},
            {"type": "text", "text": "Be brief.", **mark},
        ],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hello", **mark}]}],
        metadata={"user_id": "u"},
        service_tier="auto",
        min_p=0.1,
        never_heard_of=1,
    )
    assert asked.messages[0] == {"role": "system", "content": "Be brief."}
    assert asked.options.sampling.min_p == 0.1
    assert set(asked.options.ignored) == {
        "messages[0].content[0].cache_control",
        "metadata",
        "never_heard_of",
        "service_tier",
        "system[0]",
        "system[1].cache_control",
    }
    with pytest.raises(InvalidRequest, match="metadata has no effect"):
        read(replace(RULES, strict=True), metadata={"user_id": "u"})


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}]}
                ]
            },
            "messages[0].content[0].content[0].type",
        ),
        ({"system": [IMAGE]}, "system[0].type"),
        ({"system": 5}, "system"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": 5}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "perhaps"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_format": {"type": "text"}}, "output_format.type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"name": "s"}]}, "mcp_servers"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_own_name(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("messages[1]", "messages[0].content[2]"),
        ("messages[1].content", "messages[0].content[2]"),
        ("messages[7]", "messages[7]"),
        ("messages", "messages"),
        ("stop", "stop_sequences"),
        ("tools[2].function.parameters.properties", "tools[2].input_schema.properties"),
        ("tools[2].function.name", "tools[2].name"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("reasoning_effort", "output_config.effort"),
    ],
)
def test_errors_of_chat_get_the_name_that_the_client_wrote(name: str, own: str) -> None:
    said = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
        {"type": "tool_result", "tool_use_id": "1", "content": "c"},
    ]
    names = request.translate({"messages": [{"role": "user", "content": said}]}).names
    assert names.own(name) == own
    with pytest.raises(InvalidRequest) as caught, names.speaking():
        raise InvalidRequest(f"{name} is wrong", param=name)
    assert (caught.value.param, caught.value.message) == (own, f"{own} is wrong")
