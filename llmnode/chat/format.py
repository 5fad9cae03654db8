"""How a model writes its answers: where it reasons, where it answers, how it calls tools.

Owns: the words for it, as data. derive.py finds them in a chat template, parse.py reads answers by them, enforce.py
makes grammars of them. Refuses to know: templates, tokens, requests. All of it can be pickled and written as JSON,
since templates are looked into in another process.

An answer is `[reasoning] [content] [calls]`, with text between them. Markers are compared word by word: where a marker
has whitespace the answer may have other whitespace or none, since models are not as exact as templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any


class Slot(Enum):
    """What stands in a call between the fixed texts.

    INDEX: the number of the call, from 0. ID: the call's id, which a reader makes anew and ignores here.
    """

    NAME = "name"
    ARGUMENTS = "arguments"
    INDEX = "index"
    ID = "id"


Part = str | Slot


@dataclass(frozen=True)
class Keys:
    """Where the call is a JSON object: the paths of its members. What stands in other members does not matter."""

    name: tuple[str, ...]
    arguments: tuple[str, ...]
    others: tuple[str, ...] = ()
    """Further keys at the top. An object that begins with an unknown one is no call."""


class Values(str, Enum):
    """How one argument is written where they are not one JSON object."""

    TEXT = "text"
    """As it is, when it is a string: the tool's schema tells `5` from `"5"`."""
    JSON = "json"
    LITERAL = "literal"
    """Much like JSON, with bare keys, other quotes or the words of Python."""


@dataclass(frozen=True)
class Members:
    """Arguments that are written one by one: `key_start KEY key_end VALUE value_end`, with a separator between them.

    quote: what stands around strings in literals.      ordered: whether the template sorts the keys.
    kinds: (type of JSON, key_end) where what stands between key and value tells the type; empty where it does not.
    """

    key_start: str
    key_end: str
    value_end: str
    separator: str
    values: Values
    quote: str = '"'
    ordered: bool = False
    kinds: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Calls:
    """How calls of tools are written.

    section: the texts around all calls.        separator: between two.
    call: one call, fixed texts and slots.      parallel: whether the template writes several in one message.
    keys: where a call is a JSON object.        members: where arguments are not; None for one JSON object.
    """

    call: tuple[Part, ...]
    section: tuple[str, str] = ("", "")
    separator: str = ""
    parallel: bool = False
    keys: Keys | None = None
    members: Members | None = None

    @property
    def lead(self) -> str:
        """The fixed text that every answer with calls has before what varies; for a JSON object, before its brace.
        Empty where a call begins like any text could."""
        first = self.call[0] if isinstance(self.call[0], str) else ""
        if self.keys is not None:
            first = first[: _brace(self.call)]
        return self.section[0] + first

    @property
    def trigger(self) -> str:
        """What a reader looks for in the text: the first marker or word of it. Empty where there is none."""
        words = (self.section[0] if self.section[0].strip() else self.lead).split()
        if not words:
            return ""
        found = _MARKER.match(words[0])
        return found[0] if found else words[0]


@dataclass(frozen=True)
class Thinking:
    """The markers around reasoning. after: what stands between the end and the answer, by habit.

    field: the key of a message under which the template reads what was reasoned before; empty when it reads none.
    """

    start: str
    end: str
    after: str = ""
    field: str = ""


@dataclass(frozen=True)
class Channels:
    """Answers in several messages, each with a header that says what it is (OpenAI's harmony).

    A message is `header message text end`, a header is `channel WORD`, and `to=NAME` in it makes a call of it.
    start: what stands before a header; the prompt has the first.   message: what ends a header.
    ends: what ends a text.     reasoning, content, calls: words of channels.   namespace: before the names of tools.
    constraint: what may stand before the word that says in which language arguments are.
    """

    start: str
    channel: str
    message: str
    ends: tuple[str, ...]
    reasoning: str
    content: str
    calls: str
    namespace: str
    constraint: str


@dataclass(frozen=True)
class Format:
    """All that is known of a template.

    system, tools, results: whether it takes a system message, tells the model of tools, and writes their results.
    calls: None where the model has no way to call.
    generic: the template writes no calls, so they and their results go into plain messages (generic.py).
    content: the texts around an answer, mostly none.
    turn_ends: what ends a turn without and with calls, where those differ; mostly end tokens.
    beside: whether the template writes content beside calls.
    switches: keywords that change the prompt, of those that turn thinking on, off, up and down.
    arguments_text: whether the template wants the arguments of earlier calls as JSON text, not as an object.
    content_none: whether a message with calls and no content must have none, instead of an empty text.
    id_length: of the ids of calls, where the template takes one only.
    why: why there are no calls, or why they could not be derived.
    """

    generation_prompt: str = ""
    system: bool = True
    tools: bool = False
    results: bool = False
    calls: Calls | None = None
    generic: bool = False
    thinking: Thinking | None = None
    content: tuple[str, str] = ("", "")
    turn_ends: tuple[str, ...] = ()
    beside: bool = True
    channels: Channels | None = None
    switches: tuple[str, ...] = ()
    arguments_text: bool = False
    content_none: bool = False
    id_length: int | None = None
    why: str = ""

    @property
    def markers(self) -> frozenset[str]:
        """Texts that, where a vocabulary has them as control tokens, must be spelled in what a parser reads."""
        texts: list[str] = [*self.content, *self.turn_ends]
        if self.thinking is not None:
            texts += [self.thinking.start, self.thinking.end]
        if self.calls is not None:
            texts += [*self.calls.section, self.calls.separator]
            texts += [part for part in self.calls.call if not isinstance(part, Slot)]
            if (members := self.calls.members) is not None:
                texts += [members.key_start, members.key_end, members.value_end, members.separator, members.quote]
        if (channels := self.channels) is not None:
            texts += [channels.start, channels.channel, channels.message, channels.constraint, *channels.ends]
        return frozenset(marker for text in texts for marker in markers_in(text))

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end a turn where a vocabulary does not know them as end tokens."""
        return tuple(end for end in self.turn_ends if markers_in(end))

    def opened(self, prompt: str) -> bool:
        """Whether the prompt has begun the reasoning, so that the answer starts within it."""
        if self.thinking is None or self.channels is not None:
            return False
        return prompt.rstrip().endswith(self.thinking.start)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Format:
        """What `to_json` wrote."""
        given = dict(value)
        for name, kind in (("calls", _calls), ("thinking", _made(Thinking)), ("channels", _channels)):
            if given.get(name) is not None:
                given[name] = kind(given[name])
        given["content"] = tuple(given["content"])
        given["switches"] = tuple(given["switches"])
        given["turn_ends"] = tuple(given["turn_ends"])
        return cls(**given)


_MARKER = re.compile(r"<[^<>\s]+>|<\|\S+?\|>|\[/?[A-Z][A-Z_]*\]")


def markers_in(text: str) -> list[str]:
    """What looks like control tokens in a text, in order: `<|call|>`, `</think>`, `[ARGS]`, `<|"|>`."""
    return _MARKER.findall(text)


def marker_spans(text: str) -> Iterable[tuple[int, int]]:
    """Where they are."""
    return (found.span() for found in _MARKER.finditer(text))


def _brace(call: Sequence[Part]) -> int:
    """Where the JSON object begins in the first part of a call."""
    first = call[0] if isinstance(call[0], str) else ""
    return max(first.find("{"), 0)


def _plain(value: Any) -> Any:
    if isinstance(value, Slot):
        return {"slot": value.value}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _made(kind: Any) -> Any:
    return lambda given: kind(**given)


def _calls(given: Mapping[str, Any]) -> Calls:
    keys, members = given["keys"], given["members"]
    return Calls(
        call=tuple(Slot(part["slot"]) if isinstance(part, Mapping) else part for part in given["call"]),
        section=(given["section"][0], given["section"][1]),
        separator=given["separator"],
        parallel=given["parallel"],
        keys=keys and Keys(*(tuple(keys[name]) for name in ("name", "arguments", "others"))),
        members=members and _members(members),
    )


def _members(given: Mapping[str, Any]) -> Members:
    kinds = tuple((kind, end) for kind, end in given["kinds"])
    return Members(**{**given, "values": Values(given["values"]), "kinds": kinds})


def _channels(given: Mapping[str, Any]) -> Channels:
    return Channels(**{**given, "ends": tuple(given["ends"])})
