"""OpenAI's own Python SDK, at a node and through the gate."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.system.conftest import CALLING, COMPACT, LONG, Door

HELLO: Any = [{"role": "user", "content": "Hello"}]


ADD: Any = {
    "type": "function",
    "name": "add",
    "description": "Says whether it is late.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"late": {"type": "boolean"}},
        "required": ["late"],
        "additionalProperties": False,
    },
}


class Verdict(BaseModel):
    late: bool
    mood: Literal["good", "bad"]


@pytest.fixture(scope="module")
def client(door: Door) -> OpenAI:
    return OpenAI(base_url=door.url + "/v1", api_key=door.key, max_retries=0)


def test_a_chat_is_answered(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="test", messages=HELLO, max_tokens=6, seed=1)
    assert whole._request_id
    stream = client.chat.completions.create(
        model="test", messages=HELLO, max_tokens=6, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage and whole.usage and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_chat_is_parsed(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="test", messages=HELLO, response_format=Verdict, max_tokens=100, extra_body=COMPACT
    )
    assert isinstance(parsed.choices[0].message.parsed, Verdict)


def test_a_response_is_answered(client: OpenAI) -> None:
    whole = client.responses.create(
        model="test",
        input="Hello",
        instructions="Be brief.",
        max_output_tokens=6,
        metadata={"a": "b"},
        store=False,
        extra_body=LONG,
    )
    assert whole.id.startswith("resp_")
    assert (whole.status, whole.metadata, whole.instructions) == ("incomplete", {"a": "b"}, "Be brief.")
    assert whole.incomplete_details and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output_text
    assert whole.usage and whole.usage.output_tokens == 6
    again = client.responses.create(model="test", input=[*HELLO, *whole.output, *HELLO], max_output_tokens=6)  # type: ignore[list-item]
    assert again.usage and again.usage.input_tokens > whole.usage.input_tokens


def test_a_response_is_streamed(client: OpenAI) -> None:
    asked: Any = {
        "model": "test",
        "input": "Hello",
        "max_output_tokens": 8,
        "extra_body": {"seed": 3, "ignore_eos": True},
    }
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert last.response.output_text == whole.output_text
    assert last.response.usage and whole.usage
    assert last.response.usage.output_tokens == whole.usage.output_tokens


def test_a_response_is_parsed_streamed_or_not(client: OpenAI) -> None:
    asked: Any = {"model": "test", "input": "Is it late?", "text_format": Verdict, "max_output_tokens": 100}
    asked["extra_body"] = COMPACT
    parsed = client.responses.parse(**asked)
    assert isinstance(parsed.output_parsed, Verdict)
    with client.responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.completed"} <= kinds
    assert isinstance(final.output_parsed, Verdict)


def test_a_function_is_called_and_its_result_sent_back(client: OpenAI) -> None:
    asked: Any = {"model": "test", "tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    asked["extra_body"] = CALLING
    items: list[Any] = [{"role": "user", "content": "Is it late?"}]
    whole = client.responses.create(input=items, **asked)
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "add"
    assert set(json.loads(call.arguments)) == {"late"}
    items += [*whole.output, {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}]
    answer = client.responses.create(
        model="test", input=items, tools=[ADD], max_output_tokens=4, tool_choice="none", extra_body=LONG
    )
    assert answer.output_text


def test_a_call_of_a_function_is_streamed(client: OpenAI) -> None:
    asked: Any = {"model": "test", "input": "Is it late?", "tools": [ADD], "extra_body": CALLING}
    asked["parallel_tool_calls"] = False
    with client.responses.stream(**asked, tool_choice={"type": "function", "name": "add"}) as stream:
        events = list(stream)
        final = stream.get_final_response()
    call = final.output[0]
    assert call.type == "function_call" and call.parsed_arguments is not None
    told = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert told == call.arguments
    (done,) = [e for e in events if e.type == "response.output_item.done" and e.output_index == 0]
    assert done.item.type == "function_call" and done.item.call_id == call.call_id


def test_tools_of_a_chat_are_called(client: OpenAI) -> None:
    function: Any = {key: value for key, value in ADD.items() if key != "type"}
    asked: Any = {"model": "test", "messages": HELLO, "tools": [{"type": "function", "function": function}]}
    whole = client.chat.completions.create(
        **asked, tool_choice="required", parallel_tool_calls=False, extra_body=CALLING
    )
    call = (whole.choices[0].message.tool_calls or [])[0]
    assert whole.choices[0].finish_reason == "tool_calls"
    assert call.type == "function" and set(json.loads(call.function.arguments)) == {"late"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "yes"}
    asked["messages"] = [*HELLO, whole.choices[0].message, result]
    assert client.chat.completions.create(**asked, max_tokens=4).choices


def test_reasoning_is_an_item_of_its_own(client: OpenAI) -> None:
    asked: Any = {"model": "test", "input": "Hello", "reasoning": {"effort": "low"}, "max_output_tokens": 40}
    asked["extra_body"] = {"thinking_budget_tokens": 5, "seed": 3, "logit_bias": {"257": -100}}
    whole = client.responses.create(**asked)
    reasoning, message = whole.output
    assert reasoning.type == "reasoning" and reasoning.content and reasoning.content[0].text
    assert message.type == "message" and whole.output_text
    assert whole.usage and 0 < whole.usage.output_tokens_details.reasoning_tokens <= 6
    events = list(client.responses.create(**asked, stream=True))
    told = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    assert told == reasoning.content[0].text
    again = client.responses.create(
        model="test", input=[*HELLO, *whole.output, *HELLO], max_output_tokens=2, extra_body=LONG
    )  # type: ignore[list-item]
    assert again.output_text


def test_logprobs_of_a_response_are_told(client: OpenAI) -> None:
    whole = client.responses.create(
        model="test",
        input="Hello",
        max_output_tokens=4,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        extra_body={"logit_bias": {"257": -100}},
    )
    (part,) = whole.output[0].content  # type: ignore[union-attr]
    assert part.type == "output_text" and part.logprobs
    assert "".join(one.token for one in part.logprobs) == part.text
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)


def test_the_tokens_of_a_response_are_counted(client: OpenAI) -> None:
    asked: Any = {"model": "test", "input": "Hello"}
    usage = client.responses.create(**asked, max_output_tokens=1).usage
    assert usage and client.responses.input_tokens.count(**asked).input_tokens == usage.input_tokens


def test_asynchronous_clients_are_answered(door: Door) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=door.url + "/v1", api_key=door.key, max_retries=0) as client:
            whole, stream = await asyncio.gather(
                client.responses.create(model="test", input="Hello", max_output_tokens=4, extra_body=LONG),
                client.chat.completions.create(model="test", messages=HELLO, max_tokens=4, stream=True),
            )
            assert whole.output_text
            assert [chunk async for chunk in stream]
            asked: Any = {"model": "test", "input": "Hello", "text_format": Verdict, "extra_body": COMPACT}
            async with client.responses.stream(**asked) as told:
                assert isinstance((await told.get_final_response()).output_parsed, Verdict)

    asyncio.run(main())


def test_errors_are_typed_and_name_the_field(client: OpenAI, door: Door) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="test", input="Hello", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="test", input=[{"role": "user", "content": [{"type": "input_file"}]}])  # type: ignore[list-item, misc]
    assert caught.value.param == "input[0].content[0].type"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="test", input="x" * 20_000)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="unknown", input="Hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=door.url + "/v1", api_key="sk-wrong", max_retries=0).responses.create(model="test", input="x")


def test_models_are_listed(client: OpenAI) -> None:
    assert "test" in [model.id for model in client.models.list()]
