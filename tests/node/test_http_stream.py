"""From engine events to bytes, without an engine: what a client can rely on whatever the timing."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

import pytest

from llmnode.api import stream
from llmnode.api.chunks import Chunks, OpenAI
from llmnode.api.logprobs import LogprobWriter
from llmnode.api.shape import Shape
from llmnode.api.stream import Mailbox, Marks, Style, Telling
from llmnode.engine.types import Done, Event, Failed, Finish, Logprob, Text
from llmnode.wire import sse
from llmnode.wire.errors import ApiError, DeadlineExceeded, Overloaded
from llmnode.wire.node import Usage
from llmnode.wire.resume import HANDOVER, read_marker

T = TypeVar("T")
CHAT, TEXT = Shape("id", 1, "m", chat=True), Shape("id", 1, "m", chat=False)
PLAIN = Style(report_usage=False)
PIECES = [b"a", b"b", b"c"]
IMPATIENT = Style(report_usage=False, keepalive_s=0.01)


def say(text: str, *ids: int) -> Text:
    return Text(text, ids)


def done(tokens: int = 1, cached: int = 0, finish: Finish = Finish.STOP) -> Done:
    return Done(finish, Usage(5, cached, tokens), 0.0, 0.0, 0.0)


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 60))


def mailbox(choices: int = 1) -> Mailbox:
    return Mailbox(lambda choice, event: None, choices)


async def collect(frames: AsyncGenerator[bytes, None]) -> list[bytes]:
    return [frame async for frame in frames]


def payloads(frames: Sequence[bytes]) -> list[Any]:
    """The events of a stream, `[DONE]` and comments as text."""
    found = []
    for frame in b"".join(frames).decode().split("\n\n")[:-1]:
        data = frame.removeprefix("data: ")
        found.append(data if frame == data or data == "[DONE]" else json.loads(data))
    return found


def streamed(batches: Sequence[Sequence[tuple[int, Event]]], shape: Shape = CHAT, style: Style = PLAIN,
             include_usage: bool = False,
             choices: int = 1, top: int | None = None, marks: Marks | None = None) -> list[bytes]:  # fmt: skip
    """The frames of a stream whose reader sees the events in these batches."""

    async def main() -> list[bytes]:
        box = mailbox(choices)
        writers = (
            [LogprobWriter(PIECES, chat=shape.chat, top=top, ends=()) for _ in range(choices)]
            if top is not None
            else []
        )
        reader = asyncio.ensure_future(
            collect(
                stream.frames(box, Telling(Chunks(shape, include_usage=include_usage, writers=writers), style, marks))
            )
        )
        for batch in batches:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for choice, event in batch:
                box.put(choice, event)
        return await reader

    return run(main())


@pytest.mark.parametrize("shape", [CHAT, TEXT])
@pytest.mark.parametrize("style", [PLAIN, Style(True)])
@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize(
    "text",
    ["hello", "", 'quote " and \\ slash', "\0\x1f\x7f", "line\nfeed\r", "é €", "\x85\u2028\u2029", "😀", "</data>"],
)
def test_a_chunk_is_what_json_makes_of_the_shape(shape: Shape, style: Style, include_usage: bool, text: str) -> None:
    """Its constant parts are written once for a stream: the bytes must be those of writing each chunk anew."""
    usage = {"usage": None} if include_usage else {}
    first = shape.first(0)
    expected = [] if first is None else [sse.event({**first, **usage})]
    for piece in ("x", text, text):
        expected += [sse.event({**shape.piece(0, piece), **usage})] if piece else []
    expected.append(sse.event({**shape.last(0, "stop"), **usage}))
    expected += [sse.event(shape.usage(Usage(5, 0, 1)))] if include_usage else []
    expected += [sse.usage_comment(Usage(5, 0, 1))] if style.report_usage else []
    expected.append(sse.DONE)
    batches: list[list[tuple[int, Event]]] = [
        [(0, say("x", 0))],
        [(0, say(text, 0))],
        [(0, say(text, 0))],
        [(0, done())],
    ]
    assert b"".join(streamed(batches, shape, style, include_usage)) == b"".join(expected)


def test_what_has_piled_up_is_one_chunk() -> None:
    batches = [[(0, say("a", 0)), (0, say("b", 1)), (0, say("é", 2))], [(0, say("d", 0)), (0, done())]]
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in payloads(streamed(batches))[:-1]]
    assert contents == ["", "abé", "d", None]


def test_an_answer_without_text_still_says_who_speaks_and_how_it_ended() -> None:
    first, last, end = payloads(streamed([[(0, done(0, finish=Finish.LENGTH))]]))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"], end) == ({}, "length", "[DONE]")


def test_choices_are_told_apart_and_the_stream_ends_with_the_last_of_them() -> None:
    batches = [
        [(1, say("x", 0)), (0, say("a", 0)), (1, say("y", 1))],
        [(0, say("b", 1)), (0, done(2, cached=4))],
        [(2, done(0, cached=4))],
        [(1, say("z", 2)), (1, done(3, cached=1))],
    ]
    *chunks, usage, done_ = payloads(streamed(batches, include_usage=True, choices=3))
    assert done_ == "[DONE]"
    said: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert chunk["usage"] is None
        said[choice["index"]].append(choice["delta"].get("content", choice["finish_reason"]))
    assert said == {0: ["", "a", "b", "stop"], 1: ["", "xy", "z", "stop"], 2: ["", "stop"]}
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == 5
    assert usage["usage"]["completion_tokens"] == 5
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


@pytest.mark.parametrize("shape", [CHAT, TEXT])
def test_a_stream_and_a_body_report_the_same_logprobs(shape: Shape) -> None:
    one, two, three = (Logprob(token, -float(token), ((0, -0.5),)) for token in range(3))
    events = [
        Text("a", (0,), (one,)),
        Text("", (1,), (two,)),  # its text is held back, the report is not lost
        Text("bc", (2,), (three,)),
    ]

    async def whole() -> Any:
        box = mailbox()
        for event in [*events, done(3)]:
            box.put(0, event)
        answers, usage = await stream.whole(box)
        writers = [LogprobWriter(PIECES, chat=shape.chat, top=1, ends=())]
        return OpenAI(shape, writers=writers).whole(answers, usage)["choices"][0]["logprobs"]

    expected = run(whole())
    one_by_one = [[(0, event)] for event in [*events, done(3)]]
    at_once = [[(0, event) for event in [*events, done(3)]]]
    for batches in (one_by_one, at_once):
        parts = [chunk["choices"][0]["logprobs"] for chunk in payloads(streamed(batches, shape, top=1))[:-1]]
        for name, value in expected.items():
            if isinstance(value, list):
                assert [one for part in parts if part for one in part[name]] == value
                assert len(value) == 3


def test_a_failure_before_the_first_byte_is_still_a_status() -> None:
    for batch in ([(0, Failed(Overloaded("full")))], [(0, say("a", 0)), (0, Failed(Overloaded("full")))]):
        with pytest.raises(Overloaded, match="full"):
            streamed([batch])


def test_a_later_failure_comes_behind_the_text_before_it_and_ends_the_stream() -> None:
    batches = [
        [(0, say("a", 0))],
        [(1, say("x", 0)), (0, say("b", 0)), (1, Failed(ApiError("broken"))), (0, say("c", 0))],
    ]
    *chunks, error = payloads(streamed(batches, choices=2))
    said = [(c["choices"][0]["index"], c["choices"][0]["delta"]["content"]) for c in chunks]
    assert said == [(0, ""), (0, "a"), (1, ""), (1, "x"), (0, "b")]
    assert error["error"]["message"] == "broken"


def test_one_failed_choice_fails_the_body_at_once() -> None:
    async def main() -> None:
        box = mailbox(2)
        box.put(0, say("a", 0))
        box.put(1, Failed(Overloaded("full")))
        await stream.whole(box)

    with pytest.raises(Overloaded):
        run(main())


def test_what_comes_after_the_end_is_dropped() -> None:
    seen: list[tuple[int, Event]] = []
    box = Mailbox(lambda choice, event: seen.append((choice, event)), choices=2)
    box.put(0, done())
    box.put(0, say("late", 0))
    box.put(1, say("a", 0))
    box.fail(Overloaded("stopping"))
    box.fail(Overloaded("again"))
    box.put(1, say("late", 0))
    failed = mailbox(2)
    failed.put(1, Failed(ApiError("broken")))
    failed.put(0, say("late", 0))
    assert [type(event) for _, event in run(failed.take())] == [Failed]
    kinds = [(choice, type(event)) for choice, event in seen]
    assert kinds == [(0, Done), (1, Text), (1, Failed)]


def test_a_reader_of_a_body_is_woken_once() -> None:
    """Each wake costs the thread that the model computes beside; only the end is of use to it."""

    class Counting(Mailbox):
        rings = 0

        def ring(self) -> None:
            self.rings += 1
            super().ring()

    async def main() -> int:
        box = Counting(lambda choice, event: None, choices=2)
        reader = asyncio.ensure_future(stream.whole(box))
        await asyncio.sleep(0)
        for _ in range(50):
            box.put(0, say("a", 0))
            box.put(1, say("b", 1))
        box.put(1, done())
        box.put(0, done())
        answers, _ = await reader
        assert [answer.message.content for answer in answers] == ["a" * 50, "b" * 50]
        return box.rings

    assert run(main()) == 1


def test_silence_is_broken_by_comments_which_do_not_end_the_stream() -> None:
    async def main() -> list[bytes]:
        box, got = mailbox(), []
        async for frame in stream.frames(box, Telling(Chunks(CHAT, include_usage=False), IMPATIENT)):
            got.append(frame)
            if len(got) == 3:
                box.put(0, say("a", 0))
                box.put(0, done())
        return got

    *comments, last = run(main())
    assert comments == [sse.KEEPALIVE] * 3
    assert payloads([last])[-1] == "[DONE]"


def test_a_failure_after_a_comment_is_an_event() -> None:
    async def main() -> list[bytes]:
        box, got = mailbox(), []
        async for frame in stream.frames(box, Telling(Chunks(CHAT, include_usage=False), IMPATIENT)):
            got.append(frame)
            box.fail(Overloaded("full"))
        return got

    comment, error = run(main())
    assert comment == sse.KEEPALIVE
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "full"


class Loop:
    """A loop whose time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, after_s: float, call: Any) -> None:
        self._due.append((self.now + after_s, call))

    def pass_to(self, moment: float) -> None:
        while self._due and min(self._due, key=lambda due: due[0])[0] <= moment:
            due = min(self._due, key=lambda due: due[0])
            self._due.remove(due)
            self.now = due[0]
            due[1]()
        self.now = moment


def test_a_stream_that_speaks_gets_no_comments() -> None:
    """Silence begins anew at each word."""
    loop, rings = Loop(), []
    silence = stream.Silence(loop, 10.0, lambda: rings.append(loop.now))  # type: ignore[arg-type]
    for moment in (4.0, 9.0, 18.0):
        loop.pass_to(moment)
        silence.heard()
    loop.pass_to(27.9)
    assert rings == []
    loop.pass_to(50.0)
    assert rings == [28.0, 38.0, 48.0]


def test_each_word_of_a_stream_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    class Recorder(stream.Silence):
        def heard(self) -> None:
            heard.append(1)
            super().heard()

    monkeypatch.setattr(stream, "Silence", Recorder)
    streamed([[(0, say("a", 0))], [(0, say("b", 0))], [(0, done())]])
    assert len(heard) == 1 + 3


def test_frames_and_their_marker_leave_in_one_piece() -> None:
    end = dataclasses.replace(done(3), ids=(0,))
    batches = [[(0, say("a", 0))], [(0, say("b", 1, 2)), (1, say("x", 2)), (0, say("c", 1))], [(1, end)], [(0, done())]]
    pieces = streamed(batches, choices=2, marks=Marks([(), ()]))
    assert pieces[0].endswith(b"\n\n: t 0 1 0\n\n")
    assert pieces[1].endswith(b"\n\n: t 1 1 2\n\n")
    assert b"\n\n: t 0 4 1,2,1\n\ndata: " in pieces[1]
    last = pieces[2].split(b"\n\n")
    assert b'"finish_reason":"stop"' in last[0]
    assert last[1] == b": t 1 2 0"


def test_a_choice_that_had_ended_elsewhere_is_not_ended_again() -> None:
    batches = [[(0, done(2))], [(1, say("y", 1))], [(1, dataclasses.replace(done(2), ids=(2,)))]]
    for order in (batches, [batches[1], batches[0], batches[2]], [[*batches[0], *batches[1], *batches[2]]]):
        frames = b"".join(streamed(order, choices=2, marks=Marks([(5, 6), (7,)]))).split(b"\n\n")
        assert [frame.count(b'"index":0') for frame in frames] == [0] * len(frames)
        assert [frame for frame in frames if frame.startswith(b":")][-1] in (b": t 1 3 2", b": t 1 3 1,2")
        assert frames[-2] == b"data: [DONE]"


def test_ids_that_are_told_again_are_marked_once() -> None:
    marks = Marks([(1, 2, 3), ()], retold=True)
    assert [marks.behind(0, ids) for ids in ((1, 2), (3, 4, 5), (6,))] == [b"", b": t 0 5 4,5\n\n", b": t 0 6 6\n\n"]
    assert marks.behind(1, (1,)) == b": t 1 1 1\n\n"


def test_a_stream_that_can_be_resumed_is_handed_over_where_another_node_can_do_better() -> None:
    for error in (Overloaded("stopping"), DeadlineExceeded("late")):
        *_, last = streamed([[(0, say("a", 0))], [(0, say("b", 1)), (0, Failed(error))]], marks=Marks([()]))
        text, mark, end = last.split(b"\n\n")[:3]
        assert b'"b"' in text
        assert read_marker(mark + b"\n\n")
        assert (end + b"\n\n" == HANDOVER) == isinstance(error, Overloaded)
        assert (b"timeout_error" in end) == isinstance(error, DeadlineExceeded)
        assert last.count(b"\n\n") == 3
    with pytest.raises(Overloaded):  # nothing is out: a status says it better
        streamed([[(0, say("a", 0)), (0, Failed(Overloaded("stopping")))]], marks=Marks([()]))
