"""Anthropic's own Python SDK, at a node and through the gate."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from tests.system.conftest import CALLING, COMPACT, LONG, Door

HELLO: Any = [{"role": "user", "content": "Hello"}]


ADD: Any = {
    "name": "add",
    "description": "Says whether it is late.",
    "input_schema": {
        "type": "object",
        "properties": {"late": {"type": "boolean"}},
        "required": ["late"],
        "additionalProperties": False,
    },
}


class Verdict(BaseModel):
    late: bool
    mood: bool


@pytest.fixture(scope="module")
def client(door: Door) -> Anthropic:
    return Anthropic(base_url=door.url, api_key=door.key, max_retries=0)


def test_a_message_is_answered(client: Anthropic) -> None:
    whole = client.messages.create(model="test", messages=HELLO, system="Be brief.", max_tokens=6, extra_body=LONG)
    assert whole._request_id
    assert whole.id.startswith("msg_")
    assert (whole.role, whole.stop_reason, whole.usage.output_tokens) == ("assistant", "max_tokens", 6)
    assert whole.content[0].type == "text" and whole.content[0].text
    assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) > 6


def test_a_message_is_streamed(client: Anthropic) -> None:
    asked: Any = {"model": "test", "messages": HELLO, "max_tokens": 8, "extra_body": {"seed": 3}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in client.messages.create(**asked, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stop_sequence_is_named(client: Anthropic) -> None:
    """Half of the alphabet: one of them comes."""
    letters = list("abcdefghijklmnop")
    whole = client.messages.create(model="test", messages=HELLO, max_tokens=200, stop_sequences=letters)
    assert (whole.stop_reason, whole.stop_sequence in letters) == ("stop_sequence", True)


def test_a_tool_is_used_and_its_result_sent_back(client: Anthropic) -> None:
    asked: Any = {"model": "test", "tools": [ADD], "max_tokens": 200, "extra_body": CALLING}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    whole = client.messages.create(messages=HELLO, tool_choice=choice, **asked)
    (use,) = whole.content
    assert whole.stop_reason == "tool_use"
    assert use.type == "tool_use" and use.name == "add" and set(use.input) == {"late"}
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "yes"}]}
    messages = [*HELLO, {"role": "assistant", "content": whole.content}, result]
    answer = client.messages.create(
        model="test", messages=messages, tools=[ADD], max_tokens=4, extra_body={"logit_bias": {"257": -100}}
    )
    assert answer.content


def test_the_use_of_a_tool_is_streamed(client: Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
    with client.messages.stream(
        model="test", messages=HELLO, tools=[ADD], tool_choice=choice, max_tokens=200, extra_body=CALLING
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    (use,) = final.content
    assert use.type == "tool_use" and use.input == json.loads("".join(pieces))
    assert final.stop_reason == "tool_use"


def test_thinking_is_a_block_of_its_own(client: Anthropic) -> None:
    asked: Any = {"model": "test", "messages": HELLO, "max_tokens": 40}
    asked |= {
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "extra_body": {"seed": 3, "logit_bias": {"257": -100}},
    }
    whole = client.messages.create(**asked)
    thinking, text = whole.content
    assert thinking.type == "thinking" and thinking.thinking and thinking.signature
    assert text.type == "text" and text.text
    with client.messages.stream(**asked) as stream:
        told = "".join(event.thinking for event in stream if event.type == "thinking")
        final = stream.get_final_message()
    assert told == thinking.thinking
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
    turn: Any = [*HELLO, {"role": "assistant", "content": whole.content}, *HELLO]
    assert client.messages.create(model="test", messages=turn, max_tokens=2, extra_body=LONG).content


def test_a_form_is_kept(client: Anthropic) -> None:
    schema: Any = {**Verdict.model_json_schema(), "additionalProperties": False}
    whole = client.messages.create(
        model="test",
        messages=HELLO,
        max_tokens=100,
        output_config={"format": {"type": "json_schema", "schema": schema}},
        extra_body=COMPACT,
    )
    assert whole.content[0].type == "text"
    assert isinstance(Verdict.model_validate_json(whole.content[0].text), Verdict)
    parsed = client.messages.parse(
        model="test", messages=HELLO, max_tokens=100, output_format=Verdict, extra_body=COMPACT
    )
    assert isinstance(parsed.parsed_output, Verdict)


def test_tokens_are_counted(client: Anthropic) -> None:
    asked: Any = {"model": "test", "messages": HELLO, "system": "Be brief."}
    usage = client.messages.create(**asked, max_tokens=1).usage
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_tokens_from_the_cache_are_counted_apart(client: Anthropic) -> None:
    asked: Any = {"model": "test", "messages": [{"role": "user", "content": "cache " * 60}], "max_tokens": 1}
    first, second = client.messages.create(**asked).usage, client.messages.create(**asked).usage
    assert second.cache_read_input_tokens
    assert first.input_tokens + (first.cache_read_input_tokens or 0) == (
        second.input_tokens + second.cache_read_input_tokens
    )


def test_asynchronous_clients_are_answered(door: Door) -> None:
    async def main() -> None:
        async with AsyncAnthropic(base_url=door.url, api_key=door.key, max_retries=0) as client:
            asked: Any = {"model": "test", "messages": HELLO, "max_tokens": 4, "extra_body": LONG}
            whole = await client.messages.create(**asked)
            assert whole.content
            async with client.messages.stream(**asked) as stream:
                assert (await stream.get_final_message()).content

    asyncio.run(main())


def test_the_beta_client_is_answered(client: Anthropic) -> None:
    whole = client.beta.messages.create(
        model="test", messages=HELLO, max_tokens=4, betas=["context-1m-2025-08-07"], extra_body=LONG
    )
    assert whole.content


def test_errors_are_typed_and_name_the_request(client: Anthropic, door: Door) -> None:
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://x"}}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]\.type must be") as caught:
        client.messages.create(model="test", messages=image, max_tokens=4)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert caught.value.request_id and body["request_id"] == caught.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="context holds"):
        client.messages.create(model="test", messages=[{"role": "user", "content": "x" * 20_000}], max_tokens=4)
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="unknown", messages=HELLO, max_tokens=4)
    body = missing.value.body
    assert body["error"]["type"] == "not_found_error"
    wrong = Anthropic(base_url=door.url, api_key="sk-wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        wrong.messages.create(model="test", messages=HELLO, max_tokens=4)
    body = refused.value.body
    assert body["error"]["type"] == "authentication_error"
    with pytest.raises(anthropic.AuthenticationError) as refused:
        wrong.models.list()
    body = refused.value.body
    assert body["type"] == "error"


def test_models_are_listed_in_anthropics_shape(client: Anthropic, door: Door) -> None:
    (model,) = [model for model in client.models.list() if model.id == "test"]
    assert (model.type, model.display_name) == ("model", "test")
    assert model.created_at.year >= 2024
    plain = httpx.get(door.url + "/v1/models", headers={"authorization": f"Bearer {door.key}"}).json()
    assert plain["object"] == "list"
