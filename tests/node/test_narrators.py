"""What a narrator is told, and that an answer which goes on elsewhere is told without a gap or a repeat."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from llmnode.api import stream
from llmnode.api.chunks import OpenAI
from llmnode.api.logprobs import LogprobWriter
from llmnode.api.narrator import Answer, Body, Ending, Narrator, Teller, Told, answer, call_id
from llmnode.api.shape import Shape
from llmnode.api.stream import Mailbox, Marks, Style, Telling
from llmnode.chat.pieces import Arguments, CallBegun, Content, Parser, Piece, Reasoning, gather
from llmnode.engine.types import Done, Event, Finish, Logprob, Text
from llmnode.wire import dialect, sse
from llmnode.wire.errors import ApiError
from llmnode.wire.node import Usage
from llmnode.wire.resume import read_marker

WORDS = [
    "<think>",
    "so",
    " it",
    " is",
    "</think>",
    "Hel",
    "lo",
    "",
    "<call>",
    "add",
    "\n",
    '{"a"',
    ":1}",
    "</call>",
    "!",
]
"""The text that each id makes certain: ids are places in this list."""
USAGE = Usage(5, 2, len(WORDS))
SHAPE = Shape("chatcmpl-x", 1, "m", chat=True, parsed=True)


class Tagged:
    """A parser for <think>...</think> and <call>NAME\\nARGUMENTS</call>, each tag in one feed."""

    def __init__(self) -> None:
        self._state, self._calls = "content", 0

    def feed(self, text: str) -> list[Piece]:
        found: list[Piece] = []
        for part in text.replace("<", "\0<").replace(">", ">\0").replace("\n", "\0\n\0").split("\0"):
            found += self._part(part)
        return found

    def flush(self) -> list[Piece]:
        return []

    def _part(self, part: str) -> list[Piece]:
        states = {
            "<think>": "thought",
            "</think>": "content",
            "<call>": "name",
            "</call>": "content",
            "\n": "arguments",
        }
        if part in states:
            self._state = states[part]
            return []
        if not part:
            return []
        if self._state == "name":
            self._calls += 1
            return [CallBegun(self._calls - 1, part)]
        if self._state == "arguments":
            return [Arguments(self._calls - 1, part)]
        return [Reasoning(part)] if self._state == "thought" else [Content(part)]


class Counting:
    """A narrator whose events are numbered, and whose last one holds all: it goes on only by telling again."""

    singly = True
    terminator = sse.END

    def __init__(self) -> None:
        self._number, self._all = 0, []  # type: int, list[Piece]

    def say(self, index: int, pieces: Sequence[Piece], logprobs: Sequence[Logprob]) -> bytes:
        said = b"" if self._number else self._event("begun")
        self._all += pieces
        return said + b"".join([self._event(repr(piece)) for piece in pieces])

    def finish(self, index: int, ending: Ending) -> bytes:
        return self._event(f"{ending.finish} {ending.stop}")

    def end(self, usage: Usage) -> bytes:
        return self._event(repr(gather(self._all)))

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        return {"message": repr(answers[0].message), "ending": repr(answers[0].ending)}

    def plain(self, begun: Collection[int]) -> Teller | None:
        return None

    def _event(self, text: str) -> bytes:
        self._number += 1
        return sse.event({"number": self._number, "text": text}, "said")


def text_of(ids: Sequence[int]) -> Text:
    parts = tuple(WORDS[id] for id in ids)
    logprobs = tuple(Logprob(id, -0.5, ()) for id in ids)
    return Text("".join(parts), tuple(ids), logprobs, parts if len(ids) > 1 else ())


def batched(dice: random.Random, *, first: int = 0) -> list[list[Event]]:
    """The events of the whole answer, cut by chance; the first `first` ids come together, as after a resume."""
    batches: list[list[Event]] = []
    at = 0
    while at < len(WORDS):
        size = max(first if not at else 0, dice.randint(1, 5))
        batches.append([text_of(range(at, min(len(WORDS), at + size)))])
        at += size
    end = Done(Finish.STOP, USAGE, 0.0, 0.0, 0.0, stop="?")
    batches[-1].append(end)
    return batches


def told(narrator: Narrator, batches: list[list[Event]], out: int = 0) -> bytes:
    """A stream with markers. out: ids that are out already."""

    async def main() -> bytes:
        box = Mailbox(lambda choice, event: None, 1)
        teller = Told(narrator, [Tagged()], [out])
        marks = Marks([tuple(range(out))], retold=True)

        async def collect() -> bytes:
            return b"".join(
                [frame async for frame in stream.frames(box, Telling(teller, Style(report_usage=True), marks))]
            )

        reader = asyncio.ensure_future(collect())
        for batch in batches:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for event in batch:
                box.put(0, event)
        return await reader

    return asyncio.run(asyncio.wait_for(main(), 60))


def committed(stream: bytes, ids: int) -> bytes:
    """What a gate has passed on when so many ids are committed. Markers are left out."""
    out, held = [], []
    for frame in stream.split(b"\n\n")[:-1]:
        mark = read_marker(frame + b"\n\n")
        if mark is None:
            held.append(frame + b"\n\n")
        elif mark.count <= ids:
            out += held
            held = []
    return b"".join(out)


def bare(stream: bytes) -> bytes:
    return b"".join(f + b"\n\n" for f in stream.split(b"\n\n")[:-1] if not f.startswith(b": t "))


def test_an_answer_that_goes_on_elsewhere_is_told_as_if_nothing_had_happened() -> None:
    """At every cut, whatever ids came together here and there, byte for byte, numbers and the last event included."""
    dice = random.Random(7)
    undisturbed = told(Counting(), batched(dice))
    whole = bare(undisturbed)
    singles = told(Counting(), [[text_of([id])] for id in range(len(WORDS) - 1)]
                   + [[text_of([len(WORDS) - 1]), Done(Finish.STOP, USAGE, 0.0, 0.0, 0.0, stop="?")]])  # fmt: skip
    assert bare(singles) == whole
    for cut in range(1, len(WORDS) + 1):
        rest = told(Counting(), batched(dice, first=cut), out=cut)
        assert committed(singles, cut) + bare(rest) == whole, cut


def test_a_chat_that_goes_on_elsewhere_adds_up_to_the_same_message() -> None:
    dice = random.Random(3)
    singles = told(OpenAI(SHAPE), [[text_of([id])] for id in range(len(WORDS) - 1)]
                   + [[text_of([len(WORDS) - 1]), Done(Finish.STOP, USAGE, 0.0, 0.0, 0.0)]])  # fmt: skip
    expected = added_up(bare(singles))
    assert expected["finish_reason"] == "tool_calls"
    for cut in range(1, len(WORDS) + 1):
        rest = told(OpenAI(SHAPE), batched(dice, first=cut), out=cut)
        assert added_up(committed(singles, cut) + bare(rest)) == expected, cut


def added_up(stream: bytes) -> dict[str, Any]:
    """The choice that the chunks of a stream add up to."""
    message: dict[str, Any] = {"role": None, "content": None, "refusal": None}
    choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, "finish_reason": None}
    for frame in stream.split(b"\n\n"):
        if not frame.startswith(b"data: {"):
            continue
        (chunk,) = json.loads(frame[len(b"data: ") :])["choices"]
        choice["index"] = chunk["index"]
        delta = chunk["delta"]
        if "role" in delta:
            assert message["role"] is None, "who speaks is said once"
            message["role"] = delta["role"]
        for name in ("content", "reasoning_content"):
            if delta.get(name) is not None:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if chunk["logprobs"]:
            found = choice["logprobs"] or {"content": [], "refusal": None}
            choice["logprobs"] = {**found, "content": found["content"] + chunk["logprobs"]["content"]}
        choice["finish_reason"] = chunk["finish_reason"] or choice["finish_reason"]
    return choice


def writers() -> list[LogprobWriter]:
    return [LogprobWriter([word.encode() for word in WORDS], chat=True, top=0, ends=())]


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_of_calls_and_reasoning_adds_up_to_the_body(seed: int) -> None:
    """Logprobs too, of which each token has one, whatever the parser made of its text."""
    batches = batched(random.Random(seed))
    said = told(OpenAI(SHAPE, writers=writers()), batches)
    everything = text_of(range(len(WORDS)))
    end = Done(Finish.STOP, USAGE, 0.0, 0.0, 0.0)
    found = answer(everything.text, end, Tagged(), everything.logprobs)
    body = OpenAI(SHAPE, writers=writers()).whole([found], USAGE)
    assert body["choices"] == [added_up(said)]
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("so it is", "Hello!")
    assert message["tool_calls"] == [
        {"id": call_id("chatcmpl-x", 0, 0), "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    ]
    assert len(body["choices"][0]["logprobs"]["content"]) == len(WORDS)

    collected = Body(OpenAI(SHAPE, writers=writers()), [Tagged()])
    assert collected.piece(0, everything) + collected.last(0, end) == b""
    assert json.loads(collected.end(USAGE)[len(b"data: ") :]) == body


def test_a_call_that_was_cut_off_ended_by_length() -> None:
    parser: Parser = Tagged()
    assert answer("<call>add", Done(Finish.LENGTH, USAGE, 0.0, 0.0, 0.0), parser).ending == Ending("length")


def test_ids_of_calls_are_nine_letters_and_digits_and_differ() -> None:
    ids = {call_id(f"chatcmpl-{a}", b, c) for a in range(20) for b in range(4) for c in range(8)}
    assert len(ids) == 20 * 4 * 8
    assert all(len(id) == 9 and id.isascii() and id.isalnum() for id in ids)


def test_each_endpoint_hears_errors_and_signs_of_life_in_its_own_words() -> None:
    error = ApiError("no", code="model_not_found", param="model").body()
    assert dialect.of("/v1/chat/completions").error(error) == error
    assert dialect.of("/v1/messages/count_tokens").error(error) == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "no", "param": "model", "code": "model_not_found"},
    }
    words = dialect.of("/v1/messages")
    assert words.keepalive == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert words.error(words.error(error)) == words.error(error)
    assert words.error_event(error).startswith(b'event: error\ndata: {"type":"error","error":{')
    assert dialect.of("/v1/responses").error_event(error).startswith(b'event: error\ndata: {"type":"error","code":')


def test_an_endpoint_without_done_ends_in_a_comment() -> None:
    said = told(Counting(), batched(random.Random(1)))
    assert said.endswith(b": u 5 2 15\n\n: end\n\n")
    assert b"[DONE]" not in said
