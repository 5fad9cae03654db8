"""Finds out how a model writes answers by rendering its chat template and reading the differences.

Owns: the probes, and what their traces mean. Refuses to know: Jinja, files, models by name. `render` runs foreign code,
so the caller runs this where that may do no harm (a worker process), and sends the Format back.

Theory of operation. What a template writes for an earlier answer of the assistant is what the model was trained to
write. So conversations are rendered that hold words found nowhere else, and the text around those words is the format:

1. The generation prompt is what `add_generation_prompt` adds. Where the texts of a prompt and of a finished answer
   part, the answer begins.
2. Reasoning: a message with reasoning is rendered, under each of the keys in use. Templates that drop earlier
   reasoning show its markers at the end of the prompt, when thinking is turned on and off.
3. Calls: one call and two calls are rendered. Of the text before the first name, between the calls, and after the
   last, the common end of the first two begins each call, the common beginning of the last two ends each, the rest
   stands around all and between. A digit that counts up is an index.
4. Arguments: a JSON text that equals those given is an object. Otherwise calls without arguments, with one and with
   two, with a text and with a number, show how each is written.

No cut is made inside of what looks like a control token, since `<tool_call>` and `<tool_calls>` would have `<tool_call`
in common. What templates do not show is in exceptions.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmnode.chat import exceptions, generic
from llmnode.chat.format import (
    Calls,
    Format,
    Keys,
    Members,
    Part,
    Slot,
    Thinking,
    Values,
    marker_spans,
    markers_in,
)

Render = Callable[..., str]
"""(messages, tools=None, add_generation_prompt=True, **keywords) -> prompt. Raises whatever for what it refuses."""

_USER, _CONTENT, _THOUGHT = "Quokka asks something", "Wombat says something", "Numbat ponders something"
_NAMES = ("fetch_zebra", "paint_yak")
_KEYS, _VALUES = ("keyone", "keytwo"), ("vixen", "walrus")
_IDS = ("idQone001", "idQtwo002")
_NUMBER = 70707
_OF_KINDS = {
    "number": _NUMBER,
    "integer": _NUMBER,
    "boolean": True,
    "array": ["gnu", 1],
    "object": {"gnu": 1},
    "null": None,
}
_LISTED = {
    "type": "function",
    "function": {
        "name": "listed_tool",
        "description": "Lists ibexes.",
        "parameters": {
            "type": "object",
            "properties": {"herd": {"type": "string", "description": "Which herd."}},
            "required": ["herd"],
        },
    },
}
_FIELDS = ("reasoning_content", "thinking", "reasoning")
_THINK_ON = {"enable_thinking": True, "thinking": True}
_THINK_OFF = {"enable_thinking": False, "thinking": False}
_SWITCHES: Mapping[str, tuple[Any, Any]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning_effort": ("low", "high"),
}

# What stands for slots while texts are compared: characters for private use, which no template writes.
_HOLES = {Slot.NAME: "\ue000", Slot.ARGUMENTS: "\ue001", Slot.ID: "\ue002", Slot.INDEX: "\ue003"}
_SLOTS = {hole: slot for slot, hole in _HOLES.items()}
_HOLE = re.compile("[\ue000-\ue002]")


def derive(render: Render, source: str = "") -> Format:
    """The format of a template's answers. source: the template's text, looked at only for a marker that no rendering
    shows. Never raises for what a template does; `why` tells what could not be found."""
    return _Derivation(render, source).format()


class Underivable(Exception):
    """A call is rendered in a way that none of this can read; says how far it came."""


@dataclass(frozen=True)
class _Style:
    """In which of the ways that templates want them arguments and empty content are given."""

    text: bool = False
    none: bool = False


class _Derivation:
    def __init__(self, render: Render, source: str) -> None:
        self._render, self._source = render, source
        self._prompts: list[str] = []

    def format(self) -> Format:
        user = [_message("user", _USER)]
        plain = self._try(user)
        if plain is None:
            return Format(system=False, why="the template cannot render a message of a user")
        variants = [self._try(user, **keywords) for keywords in (_THINK_ON, _THINK_OFF)]
        tooled = self._try(user, tools=[_LISTED])
        tools = tooled is not None and "listed_tool" in tooled and "listed_tool" not in plain
        self._tools = [_LISTED] if tools else None
        self._prompts = [text for text in (plain, *variants, tooled) if text is not None]
        bare = self._try(user, add_generation_prompt=False)
        generation_prompt = "" if bare is None else plain[_common_prefix(plain, bare) :]
        self._header = ""
        answered = self._try([*user, _message("assistant", _CONTENT)], add_generation_prompt=False)
        lead, trail = self._around(answered)
        if answered is not None and not generation_prompt:
            self._header = answered[answered.find(_USER) + len(_USER) : self._start(answered)]
            trail = self._cut_header(trail)
        thinking = self._thinking()
        content, turn_end = _content(_without_thought(lead, thinking), trail)
        format = Format(
            generation_prompt=generation_prompt,
            system=self._takes_system(),
            tools=tools,
            thinking=thinking,
            content=content,
            turn_ends=(turn_end,) if turn_end else (),
            switches=self._switches(),
        )
        return self._with_calls(format, trail)

    # Rendering.

    def _try(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str | None:
        try:
            return self._render([dict(message) for message in messages], **given)
        except Exception:
            return None

    def _answer(self, style: _Style, calls: Sequence[tuple[str, Any]], **more: Any) -> str | None:
        """A conversation that ends with calls of (name, arguments)."""
        content = more.pop("content", None if style.none else "")
        written = [
            {
                "id": more.get("ids", _IDS)[index],
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments) if style.text else arguments},
            }
            for index, (name, arguments) in enumerate(calls)
        ]
        message = {"role": "assistant", "content": content, "tool_calls": written, **more.get("fields", {})}
        user = _message("user", _USER)
        keywords = more.get("keywords", {})
        return self._try([user, message], tools=self._tools, add_generation_prompt=False, **keywords)

    def _start(self, text: str) -> int:
        """Where the answer begins: where the text parts from all prompts, of what follows the user's words.

        Prompts that go on with something else than answers do (`/nothink`) are left out."""
        at = text.rfind(_USER) + len(_USER)
        if at < len(_USER):
            return 0
        rest = text[at:]
        tails = (prompt[prompt.rfind(_USER) + len(_USER) :] for prompt in self._prompts)
        return at + min((size for tail in tails if (size := _common_prefix(tail, rest))), default=0)

    def _around(self, answered: str | None) -> tuple[str, str]:
        """What stands before and after the content of an answer."""
        if answered is None or _CONTENT not in answered:
            return "", ""
        at = answered.rindex(_CONTENT)
        return answered[self._start(answered) : at], answered[at + len(_CONTENT) :]

    def _cut_header(self, text: str) -> str:
        """The text without the generation prompt that some templates always add, and what ends a turn before it."""
        at = text.find(self._header) if self._header.strip() else -1
        if at < 0:
            return text
        ends = markers_in(self._header)
        return text[:at] + (ends[0] if ends else "")

    # What is supported.

    def _takes_system(self) -> bool:
        text = self._try([_message("system", "Bilby rules"), _message("user", _USER)])
        return text is not None and "Bilby rules" in text

    def _switches(self) -> tuple[str, ...]:
        user = [_message("user", _USER)]
        changing = []
        for keyword, (one, other) in _SWITCHES.items():
            if self._try(user, **{keyword: one}) != self._try(user, **{keyword: other}):
                changing.append(keyword)
        return tuple(changing)

    # Reasoning.

    def _thinking(self) -> Thinking | None:
        for field in _FIELDS:
            for style in (_Style(), _Style(none=True)):
                for calls in ((), ((_NAMES[0], {_KEYS[0]: _VALUES[0]}),)):
                    found = self._shown_thinking(field, style, calls)
                    if found is not None:
                        return found
        return self._prompted_thinking()

    def _shown_thinking(
        self, field: str, style: _Style, calls: Sequence[tuple[str, dict[str, str]]]
    ) -> Thinking | None:
        fields = {field: _THOUGHT}
        if calls:
            text = self._answer(style, calls, fields=fields, keywords=_THINK_ON)
        else:
            message = {"role": "assistant", "content": _CONTENT, **fields}
            text = self._try([_message("user", _USER), message], add_generation_prompt=False, **_THINK_ON)
        if text is None or _THOUGHT not in text:
            return None
        at = text.rindex(_THOUGHT)
        start = text[self._start(text) : at]
        if not start.strip():
            # The prompt has begun it. Then its marker is known by the one that ends it.
            before = markers_in(text[:at].rstrip())[-1:]
            start = before[0] if before and _mirrored(before[0]) in text[at:] else ""
        rest = text[at + len(_THOUGHT) :]
        marker = next(iter(marker_spans(rest)), None)
        if not start.strip() or marker is None:
            return None
        end, after = rest[: marker[1]], rest[marker[1] :]
        space = after[: len(after) - len(after.lstrip())]
        if not calls and not after.lstrip().startswith(_CONTENT):
            space = ""
        return Thinking(start.strip(), end.strip(), space, field)

    def _prompted_thinking(self) -> Thinking | None:
        for prompt in self._prompts:
            tail = prompt[prompt.rfind(_USER) + len(_USER) :].rstrip()
            pair = re.search(r"(<[^<>\s]+>)\s*(<[^<>\s]+>)(\s*)$", tail)
            if pair and _mirrored(pair[1]) == pair[2]:
                after = prompt[len(prompt.rstrip()) :]
                return Thinking(pair[1], pair[2], after)
        texts = [*self._prompts, self._source]
        for prompt in self._prompts:
            tail = prompt[prompt.rfind(_USER) + len(_USER) :].rstrip()
            last = markers_in(tail)[-1:]
            if last and tail.endswith(last[0]) and any(_mirrored(last[0]) in text for text in texts):
                return Thinking(last[0], _mirrored(last[0]), "\n\n")
        return exceptions.thinking_of(self._source)

    # Calls.

    def _with_calls(self, format: Format, trail: str) -> Format:
        try:
            found, style, ends = self._calls(format, trail)
        except Underivable as error:
            # The template would tell of tools and leave out what was called, so all of it goes the generic way.
            return _replaced(format, tools=False, calls=generic.CALLS, generic=True, why=str(error))
        one = [(_NAMES[0], {_KEYS[0]: _VALUES[0]})]
        long = self._answer(style, one, ids=("call_0123456789abcdef",))
        beside = self._answer(style, one, content=_CONTENT)
        format = _replaced(
            format,
            calls=found,
            results=self._takes_results(style),
            arguments_text=style.text,
            content_none=style.none,
            id_length=None if long is not None else len(_IDS[0]),
            beside=self._stands_in_turn(beside, format),
            turn_ends=(*format.turn_ends, *ends),
        )
        return exceptions.applied(format)

    def _stands_in_turn(self, text: str | None, format: Format) -> bool:
        """Whether content is written in the turn that has the calls, not left out nor given a turn of its own."""
        if text is None or _CONTENT not in text:
            return False
        before = text[self._start(text) : text.rindex(_CONTENT)]
        return not any(end in before for end in format.turn_ends)

    def _takes_results(self, style: _Style) -> bool:
        call = {"id": _IDS[0], "type": "function"}
        arguments: Any = {_KEYS[0]: _VALUES[0]}
        call["function"] = {"name": _NAMES[0], "arguments": json.dumps(arguments) if style.text else arguments}  # type: ignore[assignment]
        text = self._try(
            [
                _message("user", _USER),
                {"role": "assistant", "content": None if style.none else "", "tool_calls": [call]},
                {"role": "tool", "content": "Potoroo results", "tool_call_id": _IDS[0], "name": _NAMES[0]},
            ],
            tools=self._tools,
        )
        return text is not None and "Potoroo results" in text

    def _calls(self, format: Format, trail: str) -> tuple[Calls, _Style, tuple[str, ...]]:
        """The calls, how a template wants them given, and what ends a turn with them where that is something else."""
        given = {_KEYS[0]: _VALUES[0]}
        style = self._style(given)
        one = self._answer(style, [(_NAMES[0], given)])
        assert one is not None
        members = None
        if _json_span(one, self._start(one), given) is None:
            members = self._members(style)
        single = self._marked(one, [given], members, style)
        call, tail = _split(single, self._start(one))
        lead = _without_thought(call[0], format.thinking).removeprefix(format.content[0])
        double = self._answer(style, [(_NAMES[0], given), (_NAMES[1], {_KEYS[1]: _VALUES[1]})])
        second: list[str] = []
        if double is not None:
            marked = self._marked(double, [given, {_KEYS[1]: _VALUES[1]}], members, style)
            texts, last = _split(marked, self._start(double))
            if len(texts) == 2 * len(call) and _HOLE.sub("", texts[0]) == _HOLE.sub("", call[0]):
                second, tail = texts, last if last.endswith(tail) else tail
        tail = self._cut_header(tail)
        for end in (trail, *format.turn_ends):
            if end.strip() and end.rstrip() in tail:
                tail = tail[: tail.index(end.rstrip())]
        holes = _holes(single[self._start(one) :])
        if not second:
            return self._assembled(lead, call[1:], holes, tail, members), style, ()
        between = second[len(call)]
        begin = _common_suffix(lead, between)
        section_start, start = lead[: len(lead) - len(begin)], begin
        left = between[: len(between) - len(begin)]
        size = _common_prefix(tail, left)
        end, separator, section_end = tail[:size], left[size:], tail[size:]
        ends: tuple[str, ...] = ()
        if not section_start:
            ends, section_end = tuple(markers_in(section_end)[:1]), ""
        inner = [_counted(a, b) for a, b in zip(second[1 : len(call)], second[len(call) + 1 :], strict=True)]
        calls = self._assembled(start, inner, holes, end, members)
        return (
            Calls(calls.call, (section_start, section_end), separator, True, calls.keys, members),
            style,
            ends,
        )

    def _style(self, given: Mapping[str, str]) -> _Style:
        """The way of giving arguments that shows them. Raises Underivable when none does."""
        rendered = {}
        for style in (_Style(none=none, text=text) for text in (False, True) for none in (False, True)):
            text = self._answer(style, [(_NAMES[0], given)])
            if text is not None and _NAMES[0] in text:
                rendered[style] = text
        if not rendered:
            raise Underivable("the template does not render calls of tools")
        objects = {style: text for style, text in rendered.items() if not style.text and str(given) not in text}
        texts = {style: text for style, text in rendered.items() if style.text}
        chosen = objects or texts
        if not chosen:
            raise Underivable("the template writes arguments in a way that cannot be read back")
        # The shorter one: "None" for no content, or an empty turn after the calls, are more than was asked for.
        return min(chosen, key=lambda style: (len(chosen[style]), style.none))

    def _marked(self, text: str, given: Sequence[Mapping[str, str]], members: Members | None, style: _Style) -> str:
        """The text with holes where slots are."""
        start = self._start(text)
        head, body = text[:start], text[start:]
        for index, arguments in enumerate(given):
            if _NAMES[index] not in body:
                break
            at = 0
            if members is None:
                span = _json_span(body, at, arguments)
                if span is None:
                    raise Underivable("the arguments of a call are not where they could be read")
            else:
                written = _written(members, arguments)
                found = body.find(written, body.index(_NAMES[index]))
                if found < 0:
                    raise Underivable("the arguments of a call are written differently from call to call")
                span = (found, found + len(written))
            body = body[: span[0]] + _HOLES[Slot.ARGUMENTS] + body[span[1] :]
            body = body.replace(_NAMES[index], _HOLES[Slot.NAME], 1).replace(_IDS[index], _HOLES[Slot.ID], 1)
        return head + body

    def _assembled(
        self, start: str, inner: Sequence[str], holes: Sequence[Slot], end: str, members: Members | None
    ) -> Calls:
        parts: list[Part] = [*_parts(start)]
        for slot, text in zip(holes, [*inner, ""], strict=False):
            parts.append(slot)
            parts += _parts(text)
        parts += _parts(end)
        if Slot.ARGUMENTS not in parts or Slot.NAME not in parts:
            raise Underivable("a call has no place for a name and arguments")
        keys = None if members else _keys(parts)
        if keys is None and parts.index(Slot.ARGUMENTS) < parts.index(Slot.NAME):
            raise Underivable("the arguments of a call come before its name, and no JSON object is around them")
        return Calls(tuple(parts), keys=keys, members=members)

    def _members(self, style: _Style) -> Members:
        """How arguments are written that are not one JSON object."""
        one, two = _KEYS
        first, second = _VALUES
        texts = [
            self._answer(style, [(_NAMES[0], arguments)])
            for arguments in (
                {},
                {one: first},
                {one: first, two: second},
                {one: _NUMBER},
                {one: True},
                {one: [{"a": 1}]},
            )
        ]
        rests = [None if text is None or _NAMES[0] not in text else text.split(_NAMES[0], 1)[1] for text in texts]
        none, single, double, number, boolean, nested = rests
        if none is None or single is None or double is None or number is None:
            raise Underivable("the template does not render calls with any arguments")
        if one not in single or first not in single or str(_NUMBER) not in number:
            raise Underivable("the arguments of a call cannot be found")
        before, rest = single.split(one, 1)
        middle, after = rest.split(first, 1)
        head = none[: _common_prefix(none, before)]
        while head and not after.endswith(none[len(head) :]):
            head = head[:-1]
        tail = none[len(head) :]
        key_start, value_end = before[len(head) :], after[: len(after) - len(tail)]
        between = double.split(first, 1)[1].split(two, 1)[0]
        separator = between[len(value_end) :]
        separator = separator[: len(separator) - len(key_start)] if key_start else separator
        turned = self._answer(style, [(_NAMES[0], {two: second, one: first})]) or ""
        ordered = 0 <= turned.rfind(one) < turned.rfind(two)
        bare = number.split(one, 1)[1].split(str(_NUMBER), 1)
        key_end, bare_end = bare[0], bare[1][: len(bare[1]) - len(tail)]
        quote = middle[len(key_end) :] if middle.startswith(key_end) else ""
        if not quote:
            kinds = () if key_end == middle else (("string", middle), *self._kinds(style, one))
            return Members(key_start, middle, value_end, separator, Values.TEXT, ordered=ordered, kinds=kinds)
        if value_end != quote + bare_end:
            raise Underivable("texts among the arguments begin and end with different quotes")
        like_json = quote == '"' and boolean and f"{key_end}true" in boolean and nested and '[{"a": 1}]' in nested
        values = Values.JSON if like_json else Values.LITERAL
        return Members(key_start, key_end, bare_end, separator, values, quote, ordered)

    def _kinds(self, style: _Style, key: str) -> list[tuple[str, str]]:
        """What stands between a key and its value, by the value's type, where that is written out."""
        found = []
        for kind, value in _OF_KINDS.items():
            text = self._answer(style, [(_NAMES[0], {key: value})]) or ""
            rest = text.rpartition(_NAMES[0])[2].partition(key)[2]
            written = json.dumps(value)
            if written not in rest:
                raise Underivable(f"a value of type {kind} is not written as JSON, and its type is written out")
            found.append((kind, rest[: rest.index(written)]))
        return found


# Texts.


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _replaced(format: Format, **changes: Any) -> Format:
    return Format(**{**{name: getattr(format, name) for name in format.__dataclass_fields__}, **changes})


def _mirrored(marker: str) -> str:
    """The marker that ends what this one begins, as such markers are made up: `</think>` for `<think>`."""
    if marker[:1] in "<[":
        return f"{marker[0]}/{marker[1:]}"
    return ""


def _outside(text: str, at: int, *, back: bool) -> int:
    """The place `at`, moved out of a marker."""
    for start, end in marker_spans(text):
        if start < at < end:
            return start if back else end
    return at


def _common_prefix(a: str, b: str) -> int:
    """How many characters both begin with; a marker is common as a whole or not at all."""
    size = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        size += 1
    return min(_outside(a, size, back=True), _outside(b, size, back=True))


def _common_suffix(a: str, b: str) -> str:
    """What both end with, where a digit and its successor are a hole for an index."""
    written: list[str] = []
    for one, other in zip(reversed(a), reversed(b), strict=False):
        if one == other:
            written.append(one)
        elif one.isdigit() and other.isdigit() and int(other) == int(one) + 1:
            written.append(_HOLES[Slot.INDEX])
        else:
            break
    size = len(written)
    for text in (a, b):
        size = min(size, len(text) - _outside(text, len(text) - size, back=False))
    return "".join(reversed(written[:size]))


def _counted(a: str, b: str) -> str:
    """Texts of two calls that may differ in an index."""
    found = _common_suffix(a, b)
    if len(a) != len(b) or len(found) != len(a):
        raise Underivable("a text within calls differs from call to call")
    return found


def _without_thought(text: str, thinking: Thinking | None) -> str:
    """A text that leads up to something, without the reasoning before it, which was empty."""
    if thinking is None:
        return text
    for marker in (thinking.end, thinking.start):
        if marker in text:
            return text[text.rindex(marker) + len(marker) :].removeprefix(thinking.after)
    return text


def _content(lead: str, trail: str) -> tuple[tuple[str, str], str]:
    """What stands around content, and what ends a turn."""
    ends = markers_in(trail)
    start = lead.strip()
    if not start or not markers_in(start):
        return ("" if start else lead, ""), ends[0] if ends else trail
    inner = trail[: trail.rindex(ends[-1])].strip() if len(ends) > 1 else ""
    return (start, inner), ends[-1] if ends else trail


def _json_span(text: str, start: int, given: Mapping[str, Any]) -> tuple[int, int] | None:
    """Where the text has JSON that equals what was given."""
    key = text.find(next(iter(given)), start)
    decoder = json.JSONDecoder()
    at = key
    while at > start:
        at = text.rfind("{", start, at)
        if at < 0:
            return None
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            continue
        if value == given:
            return at, end
    return None


def _written(members: Members, arguments: Mapping[str, str]) -> str:
    quote = members.quote if members.values is not Values.TEXT else ""
    return members.separator.join(
        f"{members.key_start}{key}{members.key_end}{quote}{value}{quote}{members.value_end}"
        for key, value in arguments.items()
    )


def _split(marked: str, start: int) -> tuple[list[str], str]:
    """The texts before each hole, and the text after the last."""
    texts = _HOLE.split(marked[start:])
    return texts[:-1], texts[-1]


def _holes(marked: str) -> list[Slot]:
    return [_SLOTS[hole] for hole in _HOLE.findall(marked)]


def _parts(text: str) -> list[Part]:
    pieces = text.split(_HOLES[Slot.INDEX])
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(Slot.INDEX)
        if piece:
            parts.append(piece)
    return parts


def _keys(parts: Sequence[Part]) -> Keys | None:
    """The paths of name and arguments, where the parts make up a JSON object."""
    fills = {Slot.NAME: _NAMES[0], Slot.ARGUMENTS: '{"a": "b"}', Slot.ID: _IDS[0], Slot.INDEX: "0"}
    text = "".join(part if isinstance(part, str) else fills[part] for part in parts)
    first = parts[0] if isinstance(parts[0], str) else ""
    at = first.find("{")
    if at < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text, at)
    except ValueError:
        return None
    name, arguments = _path(value, _NAMES[0]), _path(value, {"a": "b"})
    if name is None or arguments is None:
        return None
    return Keys(name, arguments, tuple(value))


def _path(value: Any, wanted: Any) -> tuple[str, ...] | None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if inner == wanted:
                return (key,)
            deeper = _path(inner, wanted)
            if deeper is not None:
                return (key, *deeper)
    return None
