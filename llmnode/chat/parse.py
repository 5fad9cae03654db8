"""Reads an answer by its format: text in, pieces out (pieces.py), bit by bit.

Owns: what belongs to reasoning, to content and to calls, and what is said when an answer is not as it should be.
Refuses to know: templates, tokens, endpoints.

Text is held back only while it may still turn out to be something else: whitespace before a call, the beginning of a
marker, a call up to its name. Then:

- A call whose name is none of the tools, or that is malformed before its name is complete, is content, as it stands.
- A call that goes wrong after its name has been said ends there; what follows is content.
- An answer that is cut off gives what came: reasoning without an end, arguments without their closing brace.
- Whitespace around reasoning and between content and calls belongs to neither. Content is otherwise left as it is.
- Without a marker (Llama 3.1's bare JSON) a call is only looked for at the very beginning of the content, and only an
  object whose first keys are those of a call is held back.
- Reasoning is only looked for at the beginning, and calls within it are not looked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmnode.chat.format import Calls, Channels, Format, Keys, Members, Slot, Values
from llmnode.chat.pieces import Arguments, CallBegun, Content, Piece, Plain, Reasoning
from llmnode.chat.reading import (
    SPACES,
    CutOff,
    Malformed,
    Reading,
    Tape,
    literal,
    match,
    overlap,
    string,
    until,
    value,
)

_LONGEST_NAME = 256
_LONGEST_HEADER = 1000


def parser(format: Format, tools: Iterable[Mapping[str, Any]], *, opened: bool = False) -> AnswerParser | Plain:
    """Reads one answer.

    tools: those that may be called, as in OpenAI's API; without any, calls are not looked for.
    opened: whether the prompt has begun the reasoning (`Format.opened`).
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    calls = format.calls if schemas else None
    if calls is None and format.thinking is None and format.channels is None and not format.content[0]:
        return Plain()
    return AnswerParser(format, calls, schemas, opened=opened)


class AnswerParser:
    """See `parser`. Obeys the law of parsers: it looks at nothing but the text so far."""

    def __init__(self, format: Format, calls: Calls | None, schemas: Mapping[str, Any], *, opened: bool) -> None:
        self._format, self._calls, self._schemas = format, calls, schemas
        self._tape = Tape()
        self._out: list[Piece] = []
        self._begun = 0
        self._run = self._channels(format.channels) if format.channels else self._answer(opened)

    def feed(self, text: str) -> list[Piece]:
        self._tape.add(text)
        return self._resume()

    def flush(self) -> list[Piece]:
        self._tape.final = True
        return self._resume()

    def _resume(self) -> list[Piece]:
        next(self._run, None)
        out, self._out = self._out, []
        return _joined(out)

    # What is said.

    def _say(self, kind: Callable[[str], Piece]) -> Callable[[str], None]:
        return lambda text: self._out.append(kind(text)) if text else None

    def _begin(self, name: str) -> Callable[[str], None]:
        """The name of a call is complete. Raises Malformed when no tool has it."""
        if name not in self._schemas:
            raise Malformed
        index = self._begun
        self._begun += 1
        self._tape.drop_mark()
        self._out.append(CallBegun(index, name))
        return self._say(lambda text: Arguments(index, text))

    # The whole.

    def _answer(self, opened: bool) -> Reading[None]:
        tape, (start, end) = self._tape, self._format.content
        reasoned = opened
        if self._format.thinking is not None and not opened:
            tape.set_mark()
            yield from tape.skip_spaces()
            reasoned = yield from tape.take(self._format.thinking.start)
            # An end without a beginning: no reasoning, as some templates write it.
            closed = not reasoned and (yield from tape.take(self._format.thinking.end))
            if closed:
                yield from tape.skip_spaces()
            if reasoned or closed:
                tape.drop_mark()
            else:
                tape.go_back()
        if reasoned:
            assert self._format.thinking is not None
            yield from self._trimmed(self._format.thinking.end, self._say(Reasoning))
            yield from tape.skip_spaces()
        if start and not start.strip():
            yield from tape.take(start, loose=False)
        elif start:
            tape.set_mark()
            yield from tape.skip_spaces()
            if (yield from tape.take(start)):
                tape.drop_mark()
                yield from self._content(end)
                return
            tape.go_back()
        yield from self._content("")

    def _trimmed(self, end: str, emit: Callable[[str], None]) -> Reading[bool]:
        """The text before a marker, without whitespace around it. False when the marker never came."""
        tape = self._tape
        yield from tape.skip_spaces()
        while True:
            found = tape.text.find(end, tape.at)
            last = found if found >= 0 else len(tape.text)
            if found < 0 and not tape.final:
                last -= overlap(tape.text, tape.at, end)
            said = len(tape.text[tape.at : last].rstrip(SPACES)) if found >= 0 or not tape.final else last - tape.at
            emit(tape.text[tape.at : tape.at + said])
            tape.at += said
            if found >= 0:
                tape.at = found + len(end)
                return True
            if tape.final:
                return False
            yield

    def _content(self, end: str) -> Reading[None]:
        """Content and calls, until there is no more or `end` comes, after which calls may still follow."""
        tape, calls, say = self._tape, self._calls, self._say(Content)
        trigger = calls.trigger if calls else ""
        if calls is not None and not trigger:
            yield from self._attempt(calls)
        while (yield from tape.more()):
            places = [
                (at, marker) for marker in (trigger, end) if marker and (at := tape.text.find(marker, tape.at)) >= 0
            ]
            if places:
                at, marker = min(places)
                spoken = len(tape.text[tape.at : at].rstrip(SPACES)) if marker == trigger else at - tape.at
                say(tape.text[tape.at : tape.at + spoken])
                tape.at += spoken
                if marker == end:
                    tape.at += len(end)
                    end = ""
                    yield from tape.skip_spaces()
                    continue
                assert calls is not None
                if (yield from self._attempt(calls)):
                    continue
                # What begins like a call is none: its marker's first character, and whitespace before, is content.
                at = tape.text.index(trigger, tape.at) + 1
                say(tape.text[tape.at : at])
                tape.at = at
                continue
            last = len(tape.text)
            if not tape.final:
                last -= max((overlap(tape.text, tape.at, marker) for marker in (trigger, end) if marker), default=0)
                if trigger:
                    last = tape.at + len(tape.text[tape.at : last].rstrip(SPACES))
            say(tape.text[tape.at : last])
            tape.at = last
            if tape.final:
                return
            yield

    # Calls.

    def _attempt(self, calls: Calls) -> Reading[bool]:
        """Calls, perhaps after whitespace. False when there are none: then the text is where it was."""
        tape, begun = self._tape, self._begun
        tape.set_mark()
        try:
            yield from tape.skip_spaces()
            yield from self._section(calls)
        except (Malformed, CutOff):
            if self._begun == begun:
                tape.go_back()
                return False
        tape.drop_mark()
        yield from tape.skip_spaces()
        return True

    def _section(self, calls: Calls) -> Reading[None]:
        tape, (start, end) = self._tape, calls.section
        if start.strip() and not (yield from tape.take(start)):
            raise Malformed
        yield from self._call(calls)
        while True:
            tape.set_mark()
            if end.strip() and (yield from tape.take(end)):
                return
            if not (start.strip() or calls.separator.strip()):
                return  # the next call has a trigger of its own
            try:
                if calls.separator.strip() and not (yield from tape.take(calls.separator)):
                    raise Malformed
                yield from self._call(calls)
            except (Malformed, CutOff):
                if tape.marked:
                    tape.go_back()
                return

    def _call(self, calls: Calls) -> Reading[None]:
        if calls.keys is not None:
            yield from self._object(calls, calls.keys)
        else:
            yield from self._parts(calls)

    def _object(self, calls: Calls, keys: Keys) -> Reading[None]:
        """A call that is a JSON object, whatever the order of its members."""
        tape, first, last = self._tape, calls.call[0], calls.call[-1]
        assert isinstance(first, str) and isinstance(last, str)
        before = first[: first.index("{")].strip()
        if before and not (yield from tape.take(before)):
            raise Malformed
        yield from tape.skip_spaces()
        yield from _ObjectCall(tape, keys, self._begin).read()
        after = last[last.rindex("}") + 1 :]
        if after.strip():
            yield from tape.take(after)

    def _parts(self, calls: Calls) -> Reading[None]:
        tape, parts = self._tape, calls.call
        name, emit = "", None
        at = 0
        while at < len(parts):
            part = parts[at]
            at += 1
            following = _first(parts[at:], calls)
            if isinstance(part, str):
                if at < len(parts) and parts[at] is Slot.ID and at + 1 < len(parts):
                    # Models leave ids out, as nobody told them of any.
                    if not (yield from tape.take(part)):
                        at += 1
                elif part.strip() and not (yield from tape.take(part)) and Slot.ARGUMENTS in parts[at:]:
                    raise Malformed
            elif part is Slot.NAME:
                yield from tape.skip_spaces()
                name = yield from tape.take_until(SPACES + following, _LONGEST_NAME)
                if Slot.ARGUMENTS not in parts[at:]:
                    raise Malformed
                if name not in self._schemas:
                    raise Malformed
            elif part is Slot.ARGUMENTS:
                emit = self._begin(name)
                if calls.members is None:
                    yield from tape.skip_spaces()
                    if (yield from tape.peek()) != "{":
                        raise Malformed
                    yield from value(tape, emit)
                else:
                    rest = "".join(part for part in parts[at:] if isinstance(part, str))
                    yield from self._members(calls.members, rest, self._schemas[name], emit)
            else:
                yield from tape.skip_spaces()
                yield from tape.take_until(SPACES + following, _LONGEST_NAME)

    def _members(self, members: Members, after: str, schema: Any, emit: Callable[[str], None]) -> Reading[None]:
        """Arguments that are written one by one, up to the text after them."""
        tape, count = self._tape, 0
        emit("{")
        while True:
            if not (yield from tape.skip_spaces()):
                raise CutOff
            if (yield from self._comes(after)):
                break
            if count and members.separator.strip() and not (yield from tape.take(members.separator)):
                raise Malformed
            if members.key_start and not (yield from tape.take(members.key_start)):
                raise Malformed
            yield from tape.skip_spaces()
            marker = members.key_end.split()[0]
            key = (yield from tape.take_until(marker[0], _LONGEST_NAME)).strip().strip("'\"")
            allowed = yield from self._key_end(members)
            emit(f"{', ' if count else ''}{json.dumps(key, ensure_ascii=False)}: ")
            count += 1
            if members.values is Values.TEXT:
                kinds = _kinds(_property(schema, key))
                yield from self._text(members, after, kinds & allowed or allowed, emit)
                continue
            yield from tape.skip_spaces()
            if members.values is Values.JSON:
                yield from value(tape, emit)
            else:
                yield from literal(tape, members.quote, emit)
            if members.value_end.strip() and not (yield from tape.take(members.value_end)):
                raise Malformed
        emit("}")

    def _key_end(self, members: Members) -> Reading[frozenset[str]]:
        """Go past what stands between key and value. Returns the types that the value can have."""
        for end in dict.fromkeys([members.key_end, *(end for _, end in members.kinds)]):
            if (yield from self._tape.take(end)):
                return frozenset(kind for kind, written in members.kinds if written == end) or _ALL
        raise Malformed

    def _comes(self, after: str) -> Reading[bool]:
        """Whether the text after the arguments comes next, which is left where it is."""
        word = after.split()[0] if after.split() else ""
        while True:
            end = match(self._tape.text, self._tape.at, word)
            if end is not None:
                return end >= 0
            if self._tape.final:
                return False
            yield

    def _text(self, members: Members, after: str, kinds: frozenset[str], emit: Callable[[str], None]) -> Reading[None]:
        """An argument as plain text. It ends at an end marker that is followed by what may follow one."""
        tape = self._tape
        spaced = members.key_end[len(members.key_end.rstrip(SPACES)) :]
        if spaced:
            yield from tape.take(spaced, loose=False)
        lead = members.value_end[: len(members.value_end) - len(members.value_end.lstrip())]
        if kinds == {"string"}:
            emit('"')
            yield from self._until_end(members, after, lead, lambda text: emit(_escaped(text)))
            emit('"')
        else:
            whole: list[str] = []
            yield from self._until_end(members, after, lead, whole.append)
            emit(_typed("".join(whole), kinds))

    def _until_end(self, members: Members, after: str, lead: str, emit: Callable[[str], None]) -> Reading[None]:
        tape, end = self._tape, members.value_end.strip()
        following = [text.split()[0] for text in (members.separator, members.key_start, after) if text.split()]
        searched = 0  # from tape.at
        while True:
            found = tape.text.find(end, tape.at + searched)
            if found >= 0:
                ends = [match(tape.text, found + len(end), word) for word in following]
                if tape.final:
                    ends = [-1 if place is None else place for place in ends]
                    if not tape.text[found + len(end) :].strip():
                        ends.append(found)
                if any(place is not None and place >= 0 for place in ends):
                    text = tape.text[tape.at : found]
                    emit(text.removesuffix(lead))
                    tape.at = found + len(end)
                    return
                if all(place == -1 for place in ends):
                    searched = found + 1 - tape.at
                    continue
                last = found
            else:
                last = len(tape.text)
                if not tape.final:
                    last -= overlap(tape.text, tape.at, end)
            if not tape.final:
                held = tape.text[tape.at : last]
                last -= len(lead) if held.endswith(lead) else overlap(held, 0, lead)
            if last > tape.at:
                emit(tape.text[tape.at : last])
                searched = max(0, searched - (last - tape.at))
                tape.at = last
            if tape.final:
                raise CutOff
            yield

    # Channels.

    def _channels(self, channels: Channels) -> Reading[None]:
        """Messages with headers. One without a header is content."""
        tape = self._tape
        beginnings = [text for text in (channels.channel, "to=", channels.start, channels.constraint) if text]
        while (yield from tape.more()):
            tape.set_mark()
            yield from tape.skip_spaces()
            if not (yield from self._begins(beginnings)):
                tape.go_back()
                yield from self._message(channels, self._say(Content))
                continue
            try:
                header = yield from self._header(channels)
            except (Malformed, CutOff):
                tape.go_back()
                yield from self._message(channels, self._say(Content))
                continue
            recipient = re.search(r"to=([^\s<]+)", header)
            if recipient:
                try:
                    yield from self._channel_call(channels, recipient[1])
                except CutOff:
                    return
                except Malformed:
                    if tape.marked:
                        tape.go_back()
                    yield from self._message(channels, self._say(Content))
            else:
                tape.drop_mark()
                word = re.search(re.escape(channels.channel) + r"\s*(\w+)", header)
                thought = word is not None and word[1] == channels.reasoning
                yield from self._message(channels, self._say(Reasoning if thought else Content))

    def _begins(self, beginnings: Iterable[str]) -> Reading[bool]:
        while True:
            ends = [match(self._tape.text, self._tape.at, text, loose=False) for text in beginnings]
            if any(end is not None and end >= 0 for end in ends):
                return True
            if self._tape.final or all(end == -1 for end in ends):
                return False
            yield

    def _header(self, channels: Channels) -> Reading[str]:
        """What stands before the marker of a message."""
        header: list[str] = []
        size = 0

        def add(text: str) -> None:
            nonlocal size
            size += len(text)
            if size > _LONGEST_HEADER:
                raise Malformed
            header.append(text)

        yield from until(self._tape, channels.message, add)
        self._tape.at += len(channels.message)
        text = "".join(header)
        if any(end in text for end in channels.ends):
            raise Malformed
        return text

    def _message(self, channels: Channels, emit: Callable[[str], None]) -> Reading[None]:
        """A text, up to what ends it."""
        tape = self._tape
        tape.drop_mark()
        while True:
            places = [(at, end) for end in channels.ends if (at := tape.text.find(end, tape.at)) >= 0]
            if places:
                at, end = min(places)
                emit(tape.text[tape.at : at])
                tape.at = at + len(end)
                return
            last = len(tape.text)
            if not tape.final:
                last -= max(overlap(tape.text, tape.at, end) for end in channels.ends)
            emit(tape.text[tape.at : last])
            tape.at = last
            if tape.final:
                return
            yield

    def _channel_call(self, channels: Channels, recipient: str) -> Reading[None]:
        tape = self._tape
        emit = self._begin(recipient.removeprefix(channels.namespace))
        yield from tape.skip_spaces()
        if (yield from tape.peek()) != "{":
            raise Malformed
        yield from value(tape, emit)
        yield from tape.skip_spaces()
        for end in channels.ends:
            if (yield from tape.take(end)):
                return


class _ObjectCall:
    """A JSON object with a name and arguments somewhere in it. Arguments that come before the name wait for it."""

    def __init__(self, tape: Tape, keys: Keys, begin: Callable[[str], Callable[[str], None]]) -> None:
        self._tape, self._keys, self._begin = tape, keys, begin
        self._emit: Callable[[str], None] | None = None
        self._waiting: list[str] = []

    def read(self) -> Reading[None]:
        yield from self._object(())
        if self._emit is None:
            raise Malformed

    def _say(self, text: str) -> None:
        if self._emit is None:
            self._waiting.append(text)
        else:
            self._emit(text)

    def _object(self, path: tuple[str, ...]) -> Reading[None]:
        tape = self._tape
        if (yield from tape.peek()) != "{":
            raise Malformed
        tape.at += 1
        yield from tape.skip_spaces()
        if (yield from tape.peek()) == "}":
            tape.at += 1
            return
        while True:
            yield from tape.skip_spaces()
            key = yield from string(tape, _ignore)
            yield from tape.skip_spaces()
            if (yield from tape.peek()) != ":":
                raise Malformed
            tape.at += 1
            yield from tape.skip_spaces()
            yield from self._member((*path, key))
            yield from tape.skip_spaces()
            character = yield from tape.peek()
            tape.at += 1
            if character == "}":
                return
            if character != ",":
                tape.at -= 1
                raise Malformed

    def _member(self, path: tuple[str, ...]) -> Reading[None]:
        tape, keys = self._tape, self._keys
        if path == keys.name and self._emit is None:
            name = yield from string(tape, _ignore)
            self._emit = self._begin(name)
            self._say("".join(self._waiting))
        elif path == keys.arguments:
            if (yield from tape.peek()) == '"':  # JSON written as a text, as in OpenAI's API
                self._say((yield from string(tape, _ignore)))
            elif (yield from tape.peek()) == "{":
                yield from value(tape, self._say)
            else:
                raise Malformed
        elif path in (keys.name[: len(path)], keys.arguments[: len(path)]):
            yield from self._object(path)
        else:
            if self._emit is None and len(path) == 1 and path[0] not in keys.others:
                raise Malformed
            yield from value(tape, _ignore)


def _ignore(_: str) -> None:
    pass


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The same said in fewer pieces."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        match (last, piece):
            case (Content(a), Content(b)):
                joined[-1] = Content(a + b)
            case (Reasoning(a), Reasoning(b)):
                joined[-1] = Reasoning(a + b)
            case (Arguments(i, a), Arguments(j, b)) if i == j:
                joined[-1] = Arguments(i, a + b)
            case _:
                joined.append(piece)
    return joined


def _first(parts: tuple[Any, ...], calls: Calls) -> str:
    """The characters with which what follows a slot may begin."""
    firsts = ""
    for part in parts:
        if isinstance(part, str):
            firsts += part.strip()[:1]
        elif part is Slot.ARGUMENTS and calls.members is None:
            firsts += "{"
        elif part is Slot.ARGUMENTS and calls.members is not None:
            firsts += calls.members.key_start.strip()[:1]
    return firsts


# The types of arguments that are written as text.


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _property(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return {} if found is None else _resolved(found, schema)


def _resolved(schema: Any, root: Any) -> Any:
    """The schema that a reference within the root leads to, one step."""
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#/"):
        for step in schema["$ref"][2:].split("/"):
            root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
        return {} if root is None else root
    return schema


_NAMES: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
_ALL = frozenset(_NAMES.values())


def _kinds(schema: Any, depth: int = 8) -> frozenset[str]:
    """The types of JSON that a schema allows."""
    if not isinstance(schema, Mapping) or depth == 0:
        return _ALL
    kinds = _ALL
    given = schema.get("type")
    if isinstance(given, str):
        kinds = frozenset({given})
    elif isinstance(given, list):
        kinds = frozenset(kind for kind in given if isinstance(kind, str))
    if "const" in schema:
        kinds &= _kinds_of([schema["const"]])
    if isinstance(schema.get("enum"), list):
        kinds &= _kinds_of(schema["enum"])
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            kinds &= frozenset().union(*(_kinds(option, depth - 1) for option in schema[word]))
    return kinds


def _kinds_of(values: list[Any]) -> frozenset[str]:
    kinds = {_NAMES.get(type(value), "string") for value in values}
    return frozenset(kinds | ({"number"} if "integer" in kinds else set()))


def _typed(text: str, kinds: frozenset[str]) -> str:
    """The text as JSON of one of these types: as a text only where it is no JSON of another."""
    words = {"True": "true", "False": "false", "None": "null"}
    written = words.get(text.strip(), text.strip())
    try:
        kind = _NAMES[type(json.loads(written, parse_constant=_refuse))]
    except (ValueError, RecursionError):
        kind = "string"
        if written[:1] in ("{", "[") and kinds & {"array", "object"} and (found := _converted(written)):
            return found
    if kind != "string" and (kind in kinds or (kind == "integer" and "number" in kinds) or "string" not in kinds):
        return written
    return json.dumps(text, ensure_ascii=False)


def _converted(text: str) -> str:
    """A list or a dictionary as Python writes it, as JSON. Empty when it is none."""
    tape, found = Tape(), list[str]()
    tape.add(text)
    tape.final = True
    try:
        for _ in literal(tape, '"', found.append):
            return ""
    except (Malformed, CutOff):
        return ""
    return "".join(found) if tape.at == len(text) else ""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
