"""What a client has got, read as strictly as can be. Two answers are equal when a client cannot tell them apart.

Owns: the rules of an answer that is whole. Refuses to know: who gave it, and whether it is the right one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmnode.wire import sse


class Broken(Exception):
    """The bytes are no whole answer; the message says what is wrong."""


@dataclass(frozen=True)
class Choice:
    """logprobs: as they came, the pieces of a stream put together; None where none were asked for."""

    text: str
    finish: str
    logprobs: Any = None


@dataclass(frozen=True)
class Answer:
    """One whole answer, streamed or not. Tokens by its `usage`."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int

    def __str__(self) -> str:
        texts = ", ".join(f"{choice.text[:200]!r} ({choice.finish})" for choice in self.choices)
        return f"{texts}, {self.prompt_tokens} + {self.completion_tokens} tokens"


def whole(body: bytes, choices: int) -> Answer:
    """An answer in one body. Raises Broken."""
    try:
        fields = json.loads(body)
        found = [
            Choice(
                choice["message"]["content"] if "message" in choice else choice["text"],
                choice["finish_reason"],
                choice.get("logprobs"),
            )
            for choice in sorted(fields["choices"], key=lambda choice: choice["index"])
        ]
        return _answer(found, fields["usage"], choices)
    except (ValueError, LookupError, TypeError) as error:
        raise Broken(f"{type(error).__name__}: {error} in {body[:300]!r}") from error


def streamed(body: bytes, choices: int) -> Answer:
    """An answer in events: nothing twice, nothing between nodes, nothing after the end. Raises Broken."""
    frames = sse.Frames()
    events = frames.feed(body)
    if frames.rest:
        raise Broken(f"it ends within an event: {frames.rest[-200:]!r}")
    if not events or events[-1] != sse.DONE:
        raise Broken(f"it ends without [DONE]: {b''.join(events[-2:])[-400:]!r}")
    if events.count(sse.DONE) != 1:
        raise Broken("[DONE] came more than once")
    try:
        return _put_together([_chunk(event) for event in events[:-1] if event != sse.KEEPALIVE], choices)
    except (ValueError, LookupError, TypeError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


def _chunk(event: bytes) -> dict[str, Any]:
    if not event.startswith(b"data: "):
        raise Broken(f"what is between gate and node has reached the client: {event[:200]!r}")
    fields: dict[str, Any] = json.loads(event[len(b"data: ") :])
    if "error" in fields:
        raise Broken(f"an error event: {fields['error']}")
    return fields


def _put_together(chunks: Iterable[Mapping[str, Any]], choices: int) -> Answer:
    same: tuple[Any, ...] | None = None
    usage: Mapping[str, Any] | None = None
    parts: dict[int, _Part] = {}
    for chunk in chunks:
        about = tuple(chunk[name] for name in ("id", "created", "model", "object"))
        if same is not None and about != same:
            raise Broken(f"{about} goes on with {same}")
        same = about
        if chunk.get("usage"):
            if usage:
                raise Broken("usage came more than once")
            usage = chunk["usage"]
        for choice in chunk["choices"]:
            parts.setdefault(choice["index"], _Part()).add(choice)
    if usage is None:
        raise Broken("there is no usage")
    return _answer([part.choice() for _, part in sorted(parts.items())], usage, choices)


class _Part:
    """What has come of one choice."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: list[Any] = []
        self._introduced = False
        self._finish: str | None = None

    def add(self, choice: Mapping[str, Any]) -> None:
        if self._finish is not None:
            raise Broken(f"a choice goes on after its end: {choice}")
        delta = choice.get("delta")
        if delta is not None and delta.get("role"):
            if self._introduced:
                raise Broken("a choice is introduced twice")
            self._introduced = True
        self._texts.append((delta.get("content") if delta is not None else choice["text"]) or "")
        if choice.get("logprobs"):
            self._logprobs.append(choice["logprobs"])
        self._finish = choice["finish_reason"]

    def choice(self) -> Choice:
        if self._finish is None:
            raise Broken(f"a choice has no end: {''.join(self._texts)[-100:]!r}")
        return Choice("".join(self._texts), self._finish, _joined(self._logprobs))


def _joined(pieces: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The logprobs of a stream as the whole answer would have them: every list put together."""
    if not pieces:
        return None
    return {
        name: [one for piece in pieces for one in piece[name]] if isinstance(pieces[0][name], list) else pieces[0][name]
        for name in pieces[0]
    }


def _answer(found: Sequence[Choice], usage: Mapping[str, Any], choices: int) -> Answer:
    if len(found) != choices:
        raise Broken(f"{len(found)} choices came, {choices} were asked for")
    prompt, completion = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    if usage["total_tokens"] != prompt + completion:
        raise Broken(f"usage does not add up: {usage}")
    return Answer(tuple(found), prompt, completion)
