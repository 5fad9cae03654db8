"""Engine events to wire chunks: one mailbox an answer, and the frames of a stream.

The engine thread hands over all events of a step in one call to the event loop; each lands in its answer's mailbox. A
reader takes all that has piled up at once and sends it as one chunk, so a slow client costs fewer chunks, never a stall
of the engine. What a mailbox can hold is bounded by the answer's tokens. Knows nothing of Sanic.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from llmnode.api.schema import Shape
from llmnode.engine.types import Done, Event, Failed, Text
from llmnode.wire import sse
from llmnode.wire.errors import ApiError


class Mailbox:
    """Events of one answer on their way from the engine to a client. Belongs to the event loop's thread."""

    def __init__(self, observe: Callable[[Event], None]) -> None:
        self._observe = observe
        self._text: list[str] = []
        self._end: Done | Failed | None = None
        self._wake = asyncio.Event()

    def put(self, event: Event) -> None:
        """Take in an event. What comes after the end is dropped: a drain may end an answer before the engine does."""
        if self._end is not None:
            return
        self._observe(event)
        if isinstance(event, Text):
            if not event.text:  # tokens whose text is held back
                return
            self._text.append(event.text)
        else:
            self._end = event
        self._wake.set()

    async def take(self, patience_s: float | None = None) -> tuple[str, Done | Failed | None]:
        """Wait for something, then give all the text there is and the end if it has come.

        ("", None) after `patience_s` seconds of silence. A timer is used, since `wait_for` would make a task a token.
        """
        timer = None if patience_s is None else asyncio.get_running_loop().call_later(patience_s, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()
        text = "".join(self._text)
        self._text.clear()
        if self._end is None:
            self._wake.clear()
        return text, self._end


async def whole(mailbox: Mailbox) -> tuple[str, Done]:
    """The answer when all of it is there. Raises the ApiError it failed with."""
    parts: list[str] = []
    while True:
        text, end = await mailbox.take()
        parts.append(text)
        if isinstance(end, Failed):
            raise end.error
        if end is not None:
            return "".join(parts), end


@dataclass(frozen=True)
class Style:
    """What a client asked of its stream. `keepalive_s`: seconds of silence after which a comment is sent."""

    include_usage: bool
    report_usage: bool
    keepalive_s: float = 10.0


async def frames(mailbox: Mailbox, shape: Shape, style: Style) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream, from its first event or keepalive to `[DONE]`.

    An ApiError raised before anything was yielded can still become a status; a later failure is yielded as an error
    event, after which the stream ends without `[DONE]`.
    """
    started = spoke = False
    while True:
        text, end = await mailbox.take(style.keepalive_s)
        if not text and end is None:
            started = True
            yield sse.KEEPALIVE
            continue
        if isinstance(end, Failed) and not started and not text:
            raise end.error
        out: list[bytes] = []
        if not spoke:
            spoke = True
            first = shape.first()
            if first is not None:
                out.append(_event(first, style))
        if text:
            out.append(_event(shape.piece(text), style))
        if isinstance(end, Failed):
            out.append(error_event(end.error))
        elif end is not None:
            out += _ending(end, shape, style)
        started = True
        yield b"".join(out)
        if end is not None:
            return


def error_event(error: ApiError) -> bytes:
    """A failure after the first byte, when the status is spent."""
    return sse.event(error.body())


def _ending(done: Done, shape: Shape, style: Style) -> list[bytes]:
    out = [_event(shape.last(done.finish), style)]
    if style.include_usage:
        out.append(sse.event(shape.usage(done.usage)))
    if style.report_usage:
        out.append(sse.usage_comment(done.usage))
    return [*out, sse.DONE]


def _event(chunk: dict[str, Any], style: Style) -> bytes:
    """With include_usage every chunk but the last says `usage: null`, as OpenAI's reference has it."""
    return sse.event({**chunk, "usage": None} if style.include_usage else chunk)
