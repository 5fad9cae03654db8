"""Answers in Anthropic's words and in those of the Responses API: what a stream adds up to is the whole, and an answer
that goes on elsewhere has the same bytes.

Answers are made of random runs of text, thinking and calls, whose text is cut into random tokens.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.api import stream
from llmnode.api.anthropic.narrator import SIGNATURE, Messages
from llmnode.api.logprobs import LogprobWriter
from llmnode.api.narrator import Body, Narrator, Told, answer, call_id
from llmnode.api.responses.narrator import Responses
from llmnode.api.stream import Mailbox, Marks, Style, Telling
from llmnode.chat.pieces import Arguments, CallBegun, Content, Piece, Reasoning
from llmnode.engine.types import Done, Event, Finish, Logprob, Text
from llmnode.wire.node import Usage
from llmnode.wire.resume import read_marker

THOUGHT, SAID, CALL, ARGUMENTS = "\x01\x02\x03\x04"
ID = "resp_x"
FRAME = {"id": ID, "object": "response", "status": "in_progress", "output": [], "usage": None}


class Marked:
    """The parser of a text in which each run begins with one of four characters; a name is held back until it ends."""

    def __init__(self) -> None:
        self._state, self._calls, self._name = SAID, 0, ""

    def feed(self, text: str) -> list[Piece]:
        found: list[Piece] = []
        for part in re.findall("[\x01-\x04]|[^\x01-\x04]+", text):
            if part in (THOUGHT, SAID, CALL):
                self._state = part
            elif part == ARGUMENTS:
                found.append(CallBegun(self._calls, self._name))
                self._state, self._calls, self._name = part, self._calls + 1, ""
            elif self._state == CALL:
                self._name += part
            elif self._state == ARGUMENTS:
                found.append(Arguments(self._calls - 1, part))
            else:
                found.append(Content(part) if self._state == SAID else Reasoning(part))
        return found

    def flush(self) -> list[Piece]:
        return []


@dataclass(frozen=True)
class Script:
    """What a model says. `words`: the text that each id makes certain."""

    words: tuple[str, ...]
    finish: Finish
    stop: str

    def text(self, ids: Sequence[int]) -> Text:
        parts = tuple(self.words[id] for id in ids)
        logprobs = tuple(Logprob(id, -0.25) for id in ids)
        return Text("".join(parts), tuple(ids), logprobs, parts if len(ids) > 1 else ())

    @property
    def end(self) -> Done:
        return Done(self.finish, self.usage, 0.0, 0.0, 0.0, stop=self.stop)

    @property
    def usage(self) -> Usage:
        return Usage(9, 4, len(self.words))

    def writer(self) -> LogprobWriter:
        return LogprobWriter([word.encode() for word in self.words], chat=True, top=0, ends=())


letters = st.text(st.sampled_from('ab é€😀"\n\u2028'), min_size=1, max_size=9)
arguments = st.dictionaries(letters, letters, max_size=2).map(json.dumps)
runs = st.one_of(
    letters.map(lambda text: SAID + text),
    letters.map(lambda text: THOUGHT + text),
    st.tuples(st.sampled_from(["f", "get_it"]), arguments).map(lambda call: CALL + call[0] + ARGUMENTS + call[1]),
)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    text = "".join(draw(st.lists(runs, max_size=5)))
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=20))
    at = [0, *sorted(cuts), len(text)]
    words = tuple(text[a:b] for a, b in pairwise(at))
    finish = draw(st.sampled_from([Finish.STOP, Finish.STOP, Finish.LENGTH]))
    return Script(words, finish, draw(st.sampled_from(["", "END"])) if finish is Finish.STOP else "")


NARRATORS: dict[str, Callable[[Script], Narrator]] = {
    "messages": lambda script: Messages(ID, "m", prompt_tokens=9),
    "responses": lambda script: Responses(FRAME),
    "responses with logprobs": lambda script: Responses(FRAME, script.writer()),
}


def told(name: str, script: Script, sizes: Sequence[int], out: int = 0) -> bytes:
    """A stream with markers, whose ids come `sizes` at a time.      out: ids that are out already."""
    narrator, logged = NARRATORS[name](script), "logprobs" in name

    async def main() -> bytes:
        box = Mailbox(lambda choice, event: None, 1)
        marks = Marks([tuple(range(out))], retold=True)
        telling = Telling(Told(narrator, [Marked()], [out]), Style(report_usage=False), marks)

        async def collect() -> bytes:
            return b"".join([frame async for frame in stream.frames(box, telling)])

        reader = asyncio.ensure_future(collect())
        for batch in batches(script, sizes, logged):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for event in batch:
                box.put(0, event)
        return await reader

    return asyncio.run(asyncio.wait_for(main(), 60))


def batches(script: Script, sizes: Sequence[int], logged: bool) -> list[list[Event]]:
    """As from the engine: the last ids come with the end, and what has no text waits for what has, or for the end,
    unless it is `logged`."""
    found: list[list[Event]] = []
    count, at = len(script.words), 0
    ends = [end for end in accumulate(sizes) if end < count] + [count]
    for end in ends:
        text = script.text(range(at, end))
        if text.text or (logged and text.ids):
            found.append([text])
            at = end
    rest = tuple(range(at, count))
    done = Done(script.finish, script.usage, 0.0, 0.0, 0.0, ids=rest, stop=script.stop)
    if found and not rest:
        found[-1].append(done)
    else:
        found.append([done])
    return found


def whole(narrator: Narrator, script: Script) -> dict[str, Any]:
    text = script.text(range(len(script.words)))
    return narrator.whole([answer(text.text, script.end, Marked(), text.logprobs, parts=text.parts)], script.usage)


def events(said: bytes) -> list[dict[str, Any]]:
    found = []
    for frame in said.decode().split("\n\n")[:-1]:
        if not frame.startswith(":"):
            name, data = frame.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def message_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that Anthropic's events add up to, as its SDK puts it together."""
    begun, *middle, last, stop = events
    assert (begun["type"], last["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = begun["message"]
    blocks: list[dict[str, Any]] = message["content"]
    open_at = None
    for event in middle:
        if event["type"] == "content_block_start":
            assert open_at is None
            assert event["index"] == len(blocks)
            open_at = event["index"]
            blocks.append(
                event["content_block"] | ({"json": ""} if event["content_block"]["type"] == "tool_use" else {})
            )
            continue
        assert event["index"] == open_at
        if event["type"] == "content_block_stop":
            open_at = None
            continue
        delta = event["delta"]
        where = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "json"}.get(delta["type"])
        if where is None:
            blocks[-1]["signature"] = delta["signature"]
        else:
            blocks[-1][where] += delta[where if where != "json" else "partial_json"]
    assert open_at is None
    for block in blocks:
        if "json" in block:
            block["input"] = json.loads(block.pop("json"))
    return message | last["delta"] | {"usage": message["usage"] | last["usage"]}


def response_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The output that the events of a response add up to; every number and place is checked on the way."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    output: list[dict[str, Any]] = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
            continue
        item = output[event["output_index"]]
        assert event["output_index"] == len(output) - 1
        if kind == "output_item.done":
            assert item | {"status": event["item"]["status"]} == event["item"]
            output[-1] = event["item"]
            continue
        assert event["item_id"] == item["id"]
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind.endswith("text.delta"):
            item["content"][event["content_index"]]["text"] += event["delta"]
            if "logprobs" in event:
                item["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind.endswith("text.done"):
            assert event["text"] == item["content"][0]["text"]
            assert event.get("logprobs") == item["content"][0].get("logprobs")
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == item["arguments"]
        else:
            assert kind == "content_part.done"
            assert event["part"] == item["content"][0]
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["output"] == output
    return last["response"]


ADDED_UP = {"messages": message_of, "responses": response_of, "responses with logprobs": response_of}


@pytest.mark.parametrize("name", NARRATORS)
@settings(deadline=None, max_examples=60)
@given(script=scripts(), sizes=st.lists(st.integers(1, 4), max_size=20))
def test_a_stream_adds_up_to_the_body(name: str, script: Script, sizes: list[int]) -> None:
    new = NARRATORS[name]
    said = told(name, script, sizes)
    body = whole(new(script), script)
    assert ADDED_UP[name](events(said)) == body
    assert said.endswith(b": end\n\n")

    collected = Body(new(script), [Marked()])
    text = script.text(range(len(script.words)))
    assert collected.piece(0, text) + collected.last(0, script.end) == b""
    assert json.loads(collected.end(script.usage).removeprefix(b"data: ")) == body


@pytest.mark.parametrize("name", NARRATORS)
@settings(deadline=None, max_examples=40)
@given(script=scripts(), sizes=st.lists(st.integers(1, 4), max_size=20), other=st.lists(st.integers(1, 4), max_size=20))
def test_an_answer_that_goes_on_elsewhere_is_told_as_if_nothing_had_happened(
    name: str, script: Script, sizes: list[int], other: list[int]
) -> None:
    """At every cut, whatever ids came together here and there."""
    undisturbed = told(name, script, sizes)
    expected = joined(undisturbed)
    out, held, frames = [], [], undisturbed.split(b"\n\n")[:-1]
    for frame in frames:
        mark = read_marker(frame + b"\n\n")
        if mark is None:
            held.append(frame + b"\n\n")
            continue
        out += held
        held = []
        rest = told(name, script, [mark.count, *other], out=mark.count)
        assert joined(b"".join(out) + rest) == expected, mark.count


def joined(said: bytes) -> list[dict[str, Any]]:
    """The events, with neighbouring deltas of one block put together where the client cannot count them."""
    found: list[dict[str, Any]] = []
    for event in events(b"".join(f + b"\n\n" for f in said.split(b"\n\n")[:-1])):
        before = found[-1] if found else {}
        if event["type"] == before.get("type") == "content_block_delta":
            (field,) = set(event["delta"]) - {"type"}
            if before["delta"]["type"] == event["delta"]["type"]:
                before["delta"][field] += event["delta"][field]
                continue
        found.append(event)
    return found


def said(pieces: str, finish: Finish = Finish.STOP, stop: str = "") -> Script:
    return Script(tuple(pieces), finish, stop)


EVERYTHING = f'{THOUGHT}Hm.{SAID}I look.{CALL}find{ARGUMENTS}{{"a": 1}}{CALL}find{ARGUMENTS}{{}}'


def test_a_message_has_blocks_of_anthropics_shape() -> None:
    script = said(EVERYTHING)
    assert whole(NARRATORS["messages"](script), script) == {
        "id": ID,
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": call_id(ID, 0, 0), "name": "find", "input": {"a": 1}},
            {"type": "tool_use", "id": call_id(ID, 0, 1), "name": "find", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": len(script.words),
        },
    }


def test_a_response_has_items_of_openais_shape() -> None:
    script = said(EVERYTHING)
    body = whole(NARRATORS["responses"](script), script)
    assert body["output"] == [
        {
            "id": "rs_x_0",
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
            "status": "completed",
        },
        {
            "id": "msg_x_1",
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
            "status": "completed",
        },
        *(
            {
                "id": f"fc_x_{2 + call}",
                "type": "function_call",
                "call_id": call_id(ID, 0, call),
                "name": "find",
                "arguments": text,
                "status": "completed",
            }
            for call, text in enumerate(('{"a": 1}', "{}"))
        ),
    ]
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 4}, "three letters and what began them"


@pytest.mark.parametrize(
    ("script", "reason", "stop"),
    [
        (said("Yes"), "end_turn", None),
        (said("Yes", Finish.LENGTH), "max_tokens", None),
        (said("Yes", stop="END"), "stop_sequence", "END"),
        (said(f"{CALL}f{ARGUMENTS}{{}}"), "tool_use", None),
        (said(f"{CALL}f{ARGUMENTS}{{", Finish.LENGTH), "max_tokens", None),
        (said(""), "end_turn", None),
    ],
)
def test_a_message_says_why_it_ended(script: Script, reason: str, stop: str | None) -> None:
    message = whole(NARRATORS["messages"](script), script)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, stop)


def test_what_was_cut_off_is_incomplete() -> None:
    script = said(f"{SAID}I look.{CALL}f{ARGUMENTS}{{", Finish.LENGTH)
    body = whole(NARRATORS["responses"](script), script)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in body["output"]] == ["completed", "incomplete"]
    assert whole(NARRATORS["messages"](script), script)["content"][1]["input"] == {}


def test_thinking_can_be_left_out() -> None:
    script = said(f"{THOUGHT}Hm.{SAID}Yes")
    message = Messages(ID, "m", omits_thinking=True)
    assert whole(message, script)["content"] == [
        {"type": "thinking", "thinking": "", "signature": SIGNATURE},
        {"type": "text", "text": "Yes"},
    ]


def test_logprobs_are_those_of_the_message() -> None:
    script = said(f"{THOUGHT}Hm.{SAID}Yes{CALL}f{ARGUMENTS}{{}}")
    body = whole(NARRATORS["responses with logprobs"](script), script)
    told = body["output"][1]["content"][0]["logprobs"]
    assert [entry["token"] for entry in told] == [SAID, "Y", "e", "s"]
    assert told[1] == {"token": "Y", "logprob": -0.25, "bytes": [89], "top_logprobs": []}
