"""Engine events to wire chunks: one mailbox a request, and the frames of a stream.

The engine thread hands over all events of a step in one call to the event loop; each lands in its request's mailbox. A
reader takes all that has piled up at once and sends what belongs to one choice as one chunk, so a slow client costs
fewer chunks, never a stall of the engine. What a mailbox can hold is bounded by the answers' tokens.

This path is walked at every token, on the thread that shares the processor with the model: what is the same in every
chunk of a stream is written once, and only the text between is encoded anew. Knows nothing of Sanic.

A stream that can be resumed has a commit marker behind what each group of tokens came to (wire/resume.py). Frames and
their marker leave in one piece, and frames only where there are ids to confirm them: so whatever a reader holds up to
the last marker is what these ids say, the chunk that says who speaks included.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Protocol

from llmnode.api.shape import Answer, LogprobWriter, Shape
from llmnode.engine.types import Done, Event, Failed, Logprob, Text
from llmnode.metrics import total
from llmnode.wire import sse
from llmnode.wire.errors import ApiError, Overloaded
from llmnode.wire.node import Usage
from llmnode.wire.resume import HANDOVER, marker

_MARK = "\0"


class Mailbox:
    """Events of one request's choices on their way from the engine to a client. Belongs to the event loop's thread.

    observe: called with (choice, event) for each event taken in.
    texts, ends: what each choice has said, and how those that have ended well did.
    """

    def __init__(self, observe: Callable[[int, Event], None], choices: int = 1) -> None:
        self._observe = observe
        self.choices = choices
        self.texts: list[list[str]] = [[] for _ in range(choices)]
        self.ends: dict[int, Done] = {}
        self._open = set(range(choices))
        self._events: list[tuple[int, Event]] = []
        self._reader: asyncio.Future[None] | None = None
        self._until_end = False

    def put(self, choice: int, event: Event) -> None:
        """Take in an event. What comes after the end is dropped: a drain may end an answer before the engine does.

        A choice that failed ends the others: half of the answers is no answer.
        """
        if choice not in self._open:
            return
        self._observe(choice, event)
        if isinstance(event, Text):
            if not event.text and not event.logprobs:  # tokens whose text is held back
                return
            self.texts[choice].append(event.text)
        elif isinstance(event, Done):
            self._open.remove(choice)
            self.ends[choice] = event
        else:
            self._open.clear()
        self._events.append((choice, event))
        if not self._until_end or not self._open:
            self.ring()

    def fail(self, error: ApiError) -> None:
        """End what has not ended yet."""
        if self._open:
            self.put(min(self._open), Failed(error))

    def ring(self) -> None:
        """Wake the reader, if one waits, whether there is something to read or not."""
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def take(self) -> list[tuple[int, Event]]:
        """Wait for something, or for a ring, then give all there is."""
        if not self._events:
            await self._wait()
        events, self._events = self._events, []
        return events

    async def rest(self) -> list[tuple[int, Event]]:
        """All there is once every choice has ended: the reader is not woken before."""
        self._until_end = True
        while self._open:
            await self._wait()
        return await self.take() if self._events else []

    async def _wait(self) -> None:
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None


@dataclass(slots=True)
class _Part:
    """What has come of one choice since the last look."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    end: Done | None = None


def _sort(events: Sequence[tuple[int, Event]]) -> tuple[dict[int, _Part], ApiError | None]:
    """Events by choice, in the order in which the choices spoke first, and the error that one of them failed with."""
    parts: dict[int, _Part] = {}
    for choice, event in events:
        if isinstance(event, Failed):
            return parts, event.error
        part = parts.get(choice)
        if part is None:
            part = parts[choice] = _Part()
        if isinstance(event, Text):
            part.texts.append(event.text)
            part.logprobs += event.logprobs
        else:
            part.end = event
    return parts, None


async def whole(mailbox: Mailbox) -> tuple[list[Answer], Usage]:
    """The answers, in the order of their choices, when all are there. Raises the ApiError that one failed with."""
    parts, error = _sort(await mailbox.rest())
    if error is not None:
        raise error
    answers, usages = [], []
    for _, part in sorted(parts.items()):
        assert part.end is not None  # `rest` waits for it
        answers.append(Answer("".join(part.texts), part.end.finish, tuple(part.logprobs)))
        usages.append(part.end.usage)
    return answers, total(usages)


@dataclass(frozen=True)
class Style:
    """What a client asked of its stream. `keepalive_s`: seconds of silence after which a comment is sent."""

    include_usage: bool
    report_usage: bool
    keepalive_s: float = 10.0


class Teller(Protocol):
    """Writes down what comes of the choices, and what ends it all. Empty bytes: nothing to say now."""

    def piece(self, index: int, text: str, logprobs: Sequence[Logprob] = ()) -> bytes: ...

    def last(self, index: int, end: Done) -> bytes: ...

    def end(self, usage: Usage) -> bytes: ...


class Chunks:
    """The bytes of one stream's chunks.

    writers: one for each choice, where logprobs were asked for.
    begun: choices of which some is out already, so that it is known who speaks.
    """

    def __init__(
        self, shape: Shape, style: Style, writers: Sequence[LogprobWriter] = (), begun: Collection[int] = ()
    ) -> None:
        self._shape = shape
        self._style = style
        self._usage = {"usage": None} if style.include_usage else {}
        self._writers = writers
        self._begun = begun
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def piece(self, index: int, text: str, logprobs: Sequence[Logprob] = ()) -> bytes:
        """A piece of a choice, which may be empty, behind the chunk that says who speaks where it is the first."""
        around = self._around.get(index)
        if around is None:
            return self._begin(index) + self.piece(index, text, logprobs)
        if not text and not logprobs:
            return b""
        if logprobs and self._writers:
            chunk = self._shape.piece(index, text, self._writers[index].write(logprobs))
            return sse.event({**chunk, **self._usage})
        head, tail = around
        if text.isascii():
            return head + encode_basestring(text).encode() + tail
        return head + _literal(text) + tail

    def last(self, index: int, end: Done) -> bytes:
        return sse.event({**self._shape.last(index, end.finish), **self._usage})

    def end(self, usage: Usage) -> bytes:
        return sse.event(self._shape.usage(usage)) if self._style.include_usage else b""

    def _begin(self, index: int) -> bytes:
        example = sse.event({**self._shape.piece(index, _MARK), **self._usage})
        head, _, tail = example.partition(_literal(_MARK))
        self._around[index] = head, tail
        first = None if index in self._begun else self._shape.first(index)
        return b"" if first is None else sse.event({**first, **self._usage})


def _literal(text: str) -> bytes:
    """A text as the JSON of an event spells it."""
    return sse.event(text)[len(b"data: ") : -len(b"\n\n")]


class Body:
    """An answer that its client does not stream, inside a stream that can be resumed: one event, at the end.

    write: makes the body of the answers, in the order of their choices.
    """

    def __init__(self, write: Callable[[Sequence[Answer], Usage], dict[str, Any]]) -> None:
        self._write = write
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[Logprob]] = {}
        self._answers: dict[int, Answer] = {}

    def piece(self, index: int, text: str, logprobs: Sequence[Logprob] = ()) -> bytes:
        self._texts.setdefault(index, []).append(text)
        self._logprobs.setdefault(index, []).extend(logprobs)
        return b""

    def last(self, index: int, end: Done) -> bytes:
        self._answers[index] = Answer("".join(self._texts[index]), end.finish, tuple(self._logprobs[index]))
        return b""

    def end(self, usage: Usage) -> bytes:
        return sse.event(self._write([answer for _, answer in sorted(self._answers.items())], usage))


class Marks:
    """The commit markers of one answer.

    committed: for each choice the ids that are out already.
    retold: whether the events begin with these ids all the same.
    """

    def __init__(self, committed: Sequence[Sequence[int]], *, retold: bool = False) -> None:
        self._out = [len(ids) for ids in committed]
        self._heard = [0 if retold else size for size in self._out]

    def behind(self, index: int, ids: Sequence[int]) -> bytes:
        """The marker for these ids, which come after those of the calls before; nothing where all are out already."""
        self._heard[index] += len(ids)
        new = self._heard[index] - self._out[index]
        if new <= 0:
            return b""
        self._out[index] += new
        return marker(index, self._out[index], ids[-new:])


@dataclass(frozen=True)
class Telling:
    """How a stream is told. `marks`: of one that can be resumed."""

    teller: Teller
    style: Style
    marks: Marks | None = None


class Silence:
    """Calls `ring` after each `after_s` seconds in which nothing was heard.

    One timer for the whole stream, which looks at the clock when it is due: setting one for each token took 0.8 us,
    twice what writing the token's chunk takes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, after_s: float, ring: Callable[[], None]) -> None:
        self._loop, self._after_s, self._ring = loop, after_s, ring
        self._timer = self._loop.call_later(after_s, self._due)
        self.heard()

    def heard(self) -> None:
        self._last = self._loop.time()

    def end(self) -> None:
        self._timer.cancel()

    def _due(self) -> None:
        left = self._last + self._after_s - self._loop.time()
        if left <= 0:
            left = self._after_s
            self.heard()
            self._ring()
        self._timer = self._loop.call_later(left, self._due)


async def frames(mailbox: Mailbox, telling: Telling) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream, from its first event or keepalive to `[DONE]`.

    An ApiError raised before anything was yielded can still become a status. A later failure is yielded as an error
    event, after which the stream ends without `[DONE]`; where another node could do better, a stream that can be
    resumed is handed over instead.
    """
    teller, marks = telling.teller, telling.marks
    ends: list[Done] = []
    started = False
    silence = Silence(asyncio.get_running_loop(), telling.style.keepalive_s, mailbox.ring)
    try:
        while len(ends) < mailbox.choices:
            events = await mailbox.take()
            silence.heard()
            if len(events) == 1 and isinstance(event := events[0][1], Text):  # what nearly every token comes to
                started = True
                index = events[0][0]
                piece = teller.piece(index, event.text, event.logprobs)
                yield piece if marks is None else piece + marks.behind(index, event.ids)
                continue
            parts, error = _sort(events)
            if error is not None and not started:
                raise error
            ids = None if marks is None else _ids(events)
            out = [] if events else [sse.KEEPALIVE]
            for index, part in parts.items():
                if part.end is not None:
                    ends.append(part.end)
                if ids is not None and not ids[index]:
                    continue  # an end that was told before this node went on with it
                out.append(teller.piece(index, "".join(part.texts), part.logprobs))
                if part.end is not None:
                    out.append(teller.last(index, part.end))
                if marks is not None and ids is not None:
                    out.append(marks.behind(index, ids[index]))
            if error is not None:
                handed_over = marks is not None and isinstance(error, Overloaded)
                out.append(HANDOVER if handed_over else error_event(error))
            elif len(ends) == mailbox.choices:
                out += _ending(ends, telling)
            if said := b"".join(out):
                started = True
                yield said
            if error is not None:
                return
    finally:
        silence.end()


def _ids(events: Sequence[tuple[int, Event]]) -> dict[int, list[int]]:
    """The ids of each choice that these events stand for."""
    found: dict[int, list[int]] = {}
    for choice, event in events:
        if not isinstance(event, Failed):
            found.setdefault(choice, []).extend(event.ids)
    return found


def _ending(ends: Sequence[Done], telling: Telling) -> list[bytes]:
    usage = total([end.usage for end in ends])
    out = [telling.teller.end(usage)]
    if telling.style.report_usage:
        out.append(sse.usage_comment(usage))
    return [*out, sse.DONE]


def error_event(error: ApiError) -> bytes:
    """A failure after the first byte, when the status is spent."""
    return sse.event(error.body())
