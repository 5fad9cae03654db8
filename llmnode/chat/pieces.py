"""What an answer says, once its text has been read: content, reasoning, calls of tools.

A model writes one text. A parser that knows the model's format reads it as pieces, and each endpoint writes pieces in
its own words. Owns the pieces, the seam between the two, and how pieces add up to a message. Refuses to know: any
format, any endpoint.

The law of parsers: what was said is never taken back, and what all pieces after some text add up to does not depend on
how the text was cut. So an answer can move to another node, which reads the text so far in one go, says none of it, and
goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote to itself before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool, of which the name is known. `index` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Content | Reasoning | CallBegun | Arguments


class Parser(Protocol):
    """Reads one answer. Belongs to one answer and one thread."""

    def feed(self, text: str) -> list[Piece]:
        """What can be said now that this text has come; what may still turn out to be something else is held back."""

    def flush(self) -> list[Piece]:
        """What was held back, now that no more will come."""


class Plain:
    """The parser of a text that is all content."""

    def feed(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def flush(self) -> list[Piece]:
        return []


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call. `arguments`: JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """All pieces of one answer, put together. Empty texts: the answer has none of that."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


def gather(pieces: Iterable[Piece]) -> Message:
    """The message that the pieces add up to."""
    content: list[str] = []
    reasoning: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for piece in pieces:
        match piece:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallBegun(_, name):
                names.append(name)
                arguments.append([])
            case Arguments(index, text):
                arguments[index].append(text)
    calls = tuple(Call(name, "".join(texts)) for name, texts in zip(names, arguments, strict=True))
    return Message("".join(content), "".join(reasoning), calls)
