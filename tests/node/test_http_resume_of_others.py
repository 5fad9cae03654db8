"""Answers in Anthropic's words and in those of the Responses API that their node cannot finish are finished by another
one, and their clients cannot tell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnode.wire import headers, sse
from llmnode.wire.resume import read_marker
from tests.conftest import Start
from tests.node.stitching import FIXED, begun, envelope, heard, resumed
from tests.processes import Program

TEMPLATE = Path(__file__).parents[1] / "data" / "agent.jinja"
FAKE = ("--backend", "fake", "--model-id", "m", "--slots", "16", "--chat-template-file", str(TEMPLATE))
SLOW = (*FAKE, "--fake-step-delay-s", "0.02")
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
ASKED = {"messages": [{"role": "user", "content": "Tell me of the fox"}], "max_tokens": 20, "stream": True}
INPUT = {"input": "Tell me of the fox", "max_output_tokens": 20, "stream": True}
BYTES = {"logit_bias": {str(byte): 12 for byte in "é€".encode()} | {"255": 8}, "ignore_eos": True}
STOPS = {"grammar": 'root ::= [a-z]{4} "ST" [a-z]{3} "STO" [0-9] "STOP" [a-z]*'}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
FORM = {"type": "object", "properties": {"a": {"enum": [1, 23]}}, "required": ["a"], "additionalProperties": False}

COMPACT = {"logit_bias": {str(byte): -100 for byte in b" \t\r\nh"}}
THINKING = {"thinking_budget_tokens": 5, "logit_bias": {"257": -100}, "seed": 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a message": (MESSAGES, {**ASKED, "seed": 7}),
    "a message with halves of characters": (MESSAGES, {**ASKED, **BYTES}),
    "a message with a stop sequence": (MESSAGES, {**ASKED, **STOPS, "stop_sequences": ["STOP"], "max_tokens": 40}),
    "a message of thought and text": (
        MESSAGES,
        {**ASKED, **THINKING, "thinking": {"type": "enabled", "budget_tokens": 5}, "max_tokens": 24},
    ),
    "a message of two uses of tools": (
        MESSAGES,
        {
            **ASKED,
            **COMPACT,
            "tools": [{"name": "f", "input_schema": FORM}],
            "tool_choice": {"type": "any"},
            "max_tokens": 120,
            "seed": 2,
        },
    ),
    "a response of thought and text": (
        RESPONSES,
        {**INPUT, **THINKING, "reasoning": {"effort": "low"}, "max_output_tokens": 24},
    ),
    "a response of calls": (
        RESPONSES,
        {
            **INPUT,
            **COMPACT,
            "tools": [{"type": "function", "name": "f", "parameters": FORM, "strict": True}],
            "tool_choice": "required",
            "max_output_tokens": 120,
        },
    ),
    "a whole message": (MESSAGES, {**ASKED, "stream": False}),
    "a response": (RESPONSES, {**INPUT, "temperature": 0}),
    "a response with halves of characters": (RESPONSES, {**INPUT, **BYTES}),
    "a response with logprobs": (RESPONSES, {**INPUT, **LOGPROBS, **BYTES}),
    "a response of a given form": (
        RESPONSES,
        {**INPUT, "text": {"format": {"type": "json_schema", "name": "n", "schema": FORM}}, "max_output_tokens": 40},
    ),
    "a whole response with logprobs": (RESPONSES, {**INPUT, **LOGPROBS, "stream": False}),
}


@pytest.fixture(scope="module")
def second(start_module: Start) -> Program:
    return start_module("llmnode", *FAKE).ready()


@pytest.fixture(scope="module")
def undisturbed(start_module: Start) -> dict[str, list[bytes]]:
    """Every case's frames. Steps of the first node are slow, so that tokens come one by one and each has a marker."""
    node = start_module("llmnode", *SLOW).ready()
    with ThreadPoolExecutor(len(CASES)) as clients:
        answers = clients.map(lambda case: begun(node, *case), CASES.values())
        return dict(zip(CASES, answers, strict=True))


def told(frames: Iterable[bytes]) -> list[dict[str, Any]]:
    """What a client reads: every event, but that deltas which it cannot count are put together, and that how much of a
    prompt was reused is a node's own affair."""
    found: list[dict[str, Any]] = []
    for frame in frames:
        if frame.startswith(b":") or frame == sse.DONE:
            continue
        event = json.loads(frame.decode().partition("data: ")[2])
        before = found[-1] if found else {}
        if event.get("type") == before.get("type") == "content_block_delta":
            (name,) = set(event["delta"]) - {"type"}
            if name in before["delta"]:
                before["delta"][name] += event["delta"][name]
                continue
        whole = event.get("response") or event.get("message") or event
        _forget_reuse(whole.get("usage"))
        found.append(event)
    return found


def _forget_reuse(usage: dict[str, Any] | None) -> None:
    if usage and "cache_read_input_tokens" in usage:
        usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    elif usage:
        del usage["input_tokens_details"]


@pytest.mark.parametrize("name", CASES)
def test_an_answer_cut_at_a_marker_is_finished_elsewhere(
    name: str, second: Program, undisturbed: dict[str, list[bytes]]
) -> None:
    path, body = CASES[name]
    frames = undisturbed[name]
    whole = heard(frames)
    assert whole.ended
    expected, ids = told(whole.frames), whole.committed.ids()
    assert len(expected) > 5 or not body["stream"]
    cuts = [0] + [at + 1 for at, frame in enumerate(frames) if read_marker(frame)]
    assert len(cuts) > 2
    cuts = cuts[:: max(1, len(cuts) // 6)] + cuts[-2:]  # narrators are tested at all of them

    def finished(cut: int) -> None:
        client = heard(frames[:cut])
        heard(resumed(second, envelope(path, body, client.committed.ids())), client)
        assert client.ended
        assert told(client.frames) == expected, cut
        assert client.committed.ids() == ids

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(finished, cuts))


@pytest.mark.parametrize("name", CASES)
def test_a_stream_and_a_body_say_the_same(name: str, second: Program, undisturbed: dict[str, list[bytes]]) -> None:
    """Of one request, whose response id, time and seed a gate has fixed."""
    path, body = CASES[name]
    fixed = {headers.RESUMABLE: FIXED.header()}
    streamed = told(heard(begun(second, path, {**body, "stream": True})).frames)
    response = httpx.post(second.url + path, json={**body, "stream": False}, headers=fixed, timeout=60)
    frames = [frame + b"\n\n" for frame in response.content.split(b"\n\n")[:-1]]
    (whole,) = told(heard(frames).frames)
    if path == RESPONSES:
        assert streamed[-1]["response"] == whole
    else:
        message = streamed[0]["message"] | {"content": content(streamed)} | streamed[-2]["delta"]
        assert message | {"usage": streamed[-2]["usage"]} == whole


def content(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that a message's events add up to."""
    blocks = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            (name,) = set(event["delta"]) - {"type"}
            told = event["delta"][name]
            blocks[-1] |= {"input": json.loads(told)} if name == "partial_json" else {name: told}
    return blocks
