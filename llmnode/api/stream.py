"""Engine events to server-sent events: one mailbox a request, and the frames of a stream.

The engine thread hands over all events of a step in one call to the event loop; each lands in its request's mailbox. A
reader takes all that has piled up at once, and most endpoints send what belongs to one choice as one chunk, so a slow
client costs fewer chunks, never a stall of the engine. What a mailbox can hold is bounded by the answers' tokens.

What is written about an event is its teller's to say (narrator.py). Knows nothing of Sanic.

A stream that can be resumed has a commit marker behind what each group of tokens came to (wire/resume.py). Frames and
their marker leave in one piece, and frames only where there are ids to confirm them: so whatever a reader holds up to
the last marker is what these ids say, the chunk that says who speaks included.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llmnode.api.narrator import Answer, Parsers, Teller, answer
from llmnode.engine.types import Done, Event, Failed, Text
from llmnode.metrics import total
from llmnode.wire import sse
from llmnode.wire.dialect import OPENAI, Dialect
from llmnode.wire.errors import ApiError, Overloaded
from llmnode.wire.node import Usage
from llmnode.wire.resume import HANDOVER, marker


class Mailbox:
    """Events of one request's choices on their way from the engine to a client. Belongs to the event loop's thread.

    observe: called with (choice, event) for each event taken in.
    texts, ends: what each choice has said, and how those that have ended well did.
    """

    def __init__(self, observe: Callable[[int, Event], None], choices: int = 1, prompts: int = 1) -> None:
        self._observe = observe
        self.choices, self.prompts = choices, prompts
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

    texts: list[Text] = field(default_factory=list)
    end: Done | None = None

    def text(self) -> Text:
        """All its texts as one."""
        texts = self.texts
        if len(texts) == 1:
            return texts[0]
        parts = tuple(part for text in texts for part in (text.parts or (text.text,)))
        logprobs = tuple(one for text in texts for one in text.logprobs)
        return Text("".join(parts), tuple(id for text in texts for id in text.ids), logprobs, parts)


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
            part.texts.append(event)
        else:
            part.end = event
    return parts, None


async def whole(mailbox: Mailbox, parsers: Parsers | None = None) -> tuple[list[Answer], Usage]:
    """The answers, in the order of their choices, when all are there. Raises the ApiError that one failed with."""
    parts, error = _sort(await mailbox.rest())
    if error is not None:
        raise error
    answers, usages = [], {}
    for index, part in sorted(parts.items()):
        assert part.end is not None  # `rest` waits for it
        said = part.text()
        parser = parsers[index] if parsers else None
        answers.append(answer(said.text, part.end, parser, said.logprobs, said.ids, said.parts))
        usages[index] = part.end.usage
    return answers, total(usages, mailbox.prompts)


@dataclass(frozen=True)
class Style:
    """How a stream is told besides its answer.

    report_usage: end it with what it cost, for the gate.       keepalive_s: seconds of silence after which it shows a
    sign of life.       dialect: the endpoint's words for that, and for errors.
    """

    report_usage: bool
    keepalive_s: float = 10.0
    dialect: Dialect = OPENAI


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
    """The bytes of a stream, from its first event or keepalive to what ends it.

    An ApiError raised before anything was yielded can still become a status. A later failure is yielded as an error
    event, after which nothing comes; where another node could do better, a stream that can be resumed is handed over
    instead.
    """
    teller, marks = telling.teller, telling.marks
    ends: dict[int, Done] = {}
    started = False
    silence = Silence(asyncio.get_running_loop(), telling.style.keepalive_s, mailbox.ring)
    try:
        while len(ends) < mailbox.choices:
            events = await mailbox.take()
            silence.heard()
            if len(events) == 1 and isinstance(event := events[0][1], Text):  # what nearly every token comes to
                index = events[0][0]
                said = teller.piece(index, event)
                if marks is not None:
                    said += marks.behind(index, event.ids)
                if said:
                    started = True
                    yield said
                continue
            parts, error = _sort(events)
            if error is not None and not started:
                raise error
            ids = None if marks is None else _ids(events)
            out = [] if events else [telling.style.dialect.keepalive]
            for index, part in parts.items():
                if part.end is not None:
                    ends[index] = part.end
                if ids is not None and not ids[index]:
                    continue  # an end that was told before this node went on with it
                out.append(teller.piece(index, part.text()))
                if part.end is not None:
                    out.append(teller.last(index, part.end))
                if marks is not None and ids is not None:
                    out.append(marks.behind(index, ids[index]))
            if error is not None:
                handed_over = marks is not None and isinstance(error, Overloaded)
                dialect = OPENAI if marks is not None else telling.style.dialect
                out.append(HANDOVER if handed_over else dialect.error_event(error.body()))
            elif len(ends) == mailbox.choices:
                out += _ending(ends, mailbox.prompts, telling)
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


def _ending(ends: Mapping[int, Done], prompts: int, telling: Telling) -> list[bytes]:
    usage = total({index: end.usage for index, end in ends.items()}, prompts)
    out = [telling.teller.end(usage)]
    if telling.style.report_usage:
        out.append(sse.usage_comment(usage))
    return [*out, telling.teller.terminator]
