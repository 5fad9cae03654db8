"""Grammars that hold an answer to the calls of its tools, written out of the model's format.

Owns: what may come where, as a text in llguidance's notation (engine/grammar.py compiles it). Refuses to know: how it
is compiled, tokens beyond the ids of markers.

Two kinds:

- *Required*: perhaps reasoning, then calls and nothing else, exactly as the template writes them. A named function is
  the same with one tool.
- *Auto*: any text. Where the marker comes with which calls begin, the rest of the call is held to its tool; after it
  text may follow, or more calls. Without a marker (bare JSON) that holds for an answer that begins like a call.

Arguments are held to the schema of their tool, strict or not, with its properties in the schema's order. Where they are
one JSON object the grammar takes the schema as it is. Where they are written one by one (`Members`) it is taken apart
here, and a keyword that cannot be held so is refused by name.

A marker that the vocabulary has as a token must come as that token: spelled out of letters it would not be what the
model was trained on. Free text never has a marker in it that would begin something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from llmnode.chat.closed import closed
from llmnode.chat.format import Calls, Channels, Format, Members, Slot, Thinking, Values
from llmnode.wire.errors import InvalidRequest

_ANY = r"(.|\n)"
_WHITESPACE = r"[ \n\r\t]{1,40}"
_SPACE = r"/[ \n\r\t]{1,4}/"
_KEY = r"/[A-Za-z_][A-Za-z0-9_.-]{0,63}/"
_ID = r"/[A-Za-z0-9]{9}/"
_INDEX = r"/[0-9]{1,3}/"
_WORDS = {"boolean": ("true", "false", "True", "False"), "null": ("null", "None")}
"""Where values are not JSON: templates write these as Python does, or as JSON does, or one so and the other so."""
_KINDS: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
_DEPTH = 32
"""Of schemas that are taken apart."""
_NOTES = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$comment", "$defs", "definitions"}
)
"""Keywords that say nothing of what is valid."""
_STRUCTURE = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "nullable"})
_OF_OBJECTS = frozenset(["properties", "required", "additionalProperties"])
_OF_ARRAYS = frozenset(["items", "minItems", "maxItems"])


def calls_grammar(
    format: Format,
    tools: Sequence[Mapping[str, Any]],
    *,
    required: bool,
    parallel: bool = True,
    opened: bool = False,
    loose: bool = False,
    specials: Mapping[str, int] | None = None,
    ends: Collection[str] = (),
) -> str:
    """The grammar of an answer, for Grammars.lark.

    tools: those that may be called, in OpenAI's shape.     required: whether the answer must be calls.
    parallel: whether more than one call may come.          opened: whether the prompt has begun the reasoning.
    loose: take any JSON object for arguments, where schemas cannot be held and need not be.
    specials: the tokens that are more than a text, by their spelling.
    ends: spellings of end tokens: where one is due, the answer ends.
    Raises InvalidRequest naming `tools` when the format has no calls or a schema cannot be held.
    """
    if format.calls is None:
        raise InvalidRequest(f"this model cannot call tools: {format.why or 'its format has no calls'}", param="tools")
    writer = _Writer(format, {} if specials is None else specials, frozenset(ends))
    functions = [tool["function"] for tool in tools]
    schemas = {
        function["name"]: _ANY_OBJECT if loose else _object_schema(function.get("parameters")) for function in functions
    }
    if format.channels is not None:
        writer.channels(format.calls, format.channels, schemas, required=required)
    else:
        writer.plain(
            format.calls, schemas, required=required, parallel=parallel and format.calls.parallel, opened=opened
        )
    return writer.text()


def schema_grammar(
    format: Format,
    schema: Any,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    parallel: bool = True,
    opened: bool = False,
    specials: Mapping[str, int] | None = None,
    ends: Collection[str] = (),
) -> str:
    """The grammar of an answer whose content a schema describes: perhaps reasoning, then that, or calls instead where
    there are tools. Parameters and errors as of `calls_grammar`."""
    writer = _Writer(format, {} if specials is None else specials, frozenset(ends))
    functions = [tool["function"] for tool in tools]
    schemas = {function["name"]: _object_schema(function.get("parameters")) for function in functions}
    if schemas and format.calls is None:
        raise InvalidRequest(f"this model cannot call tools: {format.why or 'its format has no calls'}", param="tools")
    if schemas and format.calls is not None and not format.calls.trigger:
        # Both are bare objects: one schema says which there may be, since a lexer could not tell their beginnings.
        schema, schemas = _either(schema, format.calls, schemas), {}
    content = writer.content(schema)
    if format.channels is not None:
        writer.channels(format.calls, format.channels, schemas, required=True, content=content)
    else:
        parallel = parallel and format.calls is not None and format.calls.parallel
        writer.plain(format.calls, schemas, required=True, parallel=parallel, opened=opened, content=content)
    return writer.text()


def _either(schema: Any, calls: Calls, schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or a call as the object that it is. Raises InvalidRequest where that cannot be said in one schema."""
    keys = calls.keys
    plain = keys is not None and len(keys.name) == len(keys.arguments) == 1
    if not plain or keys is None or '"$ref"' in json.dumps([schema, schemas]):
        raise InvalidRequest(
            "response_format and tools cannot be held together in the format in which this model calls tools",
            param="response_format",
        )
    (name,), (arguments,) = keys.name, keys.arguments
    objects = [
        {
            "type": "object",
            "properties": {name: {"const": tool}, arguments: parameters},
            "required": [name, arguments],
            "additionalProperties": False,
        }
        for tool, parameters in schemas.items()
    ]
    return {"anyOf": [schema, *objects]}


_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def _object_schema(parameters: Any) -> Mapping[str, Any]:
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest("the parameters of a function must be a JSON schema, which is an object", param="tools")
    return closed({**parameters, "type": "object"} if "$ref" not in parameters else parameters)


class _Writer:
    """The rules of one grammar. Each method gives an expression that stands for what it is named after."""

    def __init__(self, format: Format, specials: Mapping[str, int], ends: frozenset[str]) -> None:
        self._format, self._ends = format, ends
        self._ids = {marker: specials[marker] for marker in format.markers if marker in specials}
        known = sorted({*self._ids, *(ends & format.markers)}, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, known)) + ")") if known else None
        self._rules: list[str] = []
        self._named: dict[tuple[str, str], str] = {}
        self._any: str | None = None

    def text(self) -> str:
        return "\n".join(self._rules) + "\n"

    # The whole.

    def content(self, schema: Any) -> str:
        """A schema's JSON where the answer's content stands."""
        channels, around = self._format.channels, self._format.content
        if channels is not None:
            return " ".join([*self._fixed(channels.channel + channels.content + channels.message), self._json(schema)])
        return " ".join([*self._fixed(around[0].lstrip()), self._json(schema), *self._fixed(around[1].rstrip())])

    def plain(
        self,
        calls: Calls | None,
        schemas: Mapping[str, Any],
        *,
        required: bool,
        parallel: bool,
        opened: bool,
        content: str = "",
    ) -> None:
        """content: what the answer may be in place of calls."""
        if calls is None or not schemas:
            self._start(content, self._format.thinking, opened=opened, must=True)
            return
        bodies = [self._parts(calls, name, schema) for name, schema in schemas.items()]
        one = self._rule("call", " | ".join(" ".join(body) for body in bodies))
        start, end = self._begun(calls.section[0]), self._fixed(calls.section[1])
        lead = calls.lead.lstrip()
        more = f" ({' '.join([*self._fixed(calls.separator), one])})*" if parallel else ""
        whole = " ".join([*start, one]) + more + " " + " ".join(end)
        thinking = self._format.thinking
        gap = self._format.content[0]
        if required:
            if gap and not gap.strip():
                whole = f"{json.dumps(gap)}? {whole}"
            whole = f"{whole} | {content}" if content else whole
            self._start(whole, thinking, opened=opened, must=True)
            return
        trigger = calls.trigger
        if not trigger:
            # A bare object: what begins like one of the calls must be one.
            first = calls.call[0] if isinstance(calls.call[0], str) else ""
            free = f"/{_ANY}+/ & ~/[ \\n]*{_pattern(first)}{_ANY}*/"
            self._start(f"{self._terminal(free)} | {whole} |", thinking, opened=opened, must=False)
            return
        marker = self._leading(lead) or trigger
        text = self._free(marker)
        # The marker is taken off the first call's fixed text, since the text before it ends with it.
        begun = self._until(marker)
        rest = self._after_marker(calls, marker, bodies, one, parallel=parallel)
        answer = f"({begun} {rest}){'*' if parallel else '?'} {text}?"
        wrapped = self._format.content
        if wrapped[0].strip():
            inner = f"{' '.join(self._fixed(wrapped[0]))} {self._until(wrapped[1]) if wrapped[1] else text + '?'}"
            answer = f"({inner})? {answer}"
        self._start(answer, thinking, opened=opened, must=False)

    def _start(self, answer: str, thinking: Thinking | None, *, opened: bool, must: bool) -> None:
        if thinking is None or thinking.end in self._ends:
            self._rules.insert(0, f"start: {answer}")
            return
        body = self._rule("answer", answer)
        thought = self._until(thinking.end)
        after = f"{thought} {_SPACE}? {body}"
        if opened:
            # Without a call that must come, an answer may end within its reasoning.
            cut = "" if must else f" | {self._free(thinking.end)}?"
            self._rules.insert(0, f"start: {after}{cut}")
            return
        begin = " ".join(self._fixed(thinking.start))
        self._rules.insert(0, f"start: {body} | {_SPACE}? {begin} {after}")

    def _after_marker(
        self, calls: Calls, marker: str, bodies: Sequence[Sequence[str]], one: str, *, parallel: bool
    ) -> str:
        """Calls of which the first marker has come."""
        start, end = calls.section
        if start.strip():
            rest = self._fixed(start.lstrip()[len(marker) :])
            more = f"({' '.join([*self._fixed(calls.separator), one])})*" if parallel else ""
            return " ".join([*rest, one, more, *self._fixed(end)])
        first = calls.call[0]
        assert isinstance(first, str)
        head = " ".join(self._fixed(first.lstrip()[len(marker) :]))
        tails = [" ".join(body[len(self._begun(first)) :]) for body in bodies]
        return f"{head} {self._rule('begun', ' | '.join(tails))}"

    # Fixed and free text.

    def _fixed(self, text: str) -> list[str]:
        """A text as it stands. Where it has an end token, the answer ends.

        Whitespace around words is a terminal of its own: the lexer takes the longest one and never goes back, so of a
        new line before one text and a text that begins with a new line it would only see the second."""
        if not text:
            return []
        parts: list[str] = []
        for piece in self._split.split(text) if self._split else [text]:
            if piece in self._ends:
                break
            if piece in self._ids:
                parts.append(f"<[{self._ids[piece]}]>")
            elif piece:
                inner = piece.strip()
                around = piece.partition(inner) if inner else (piece, "", "")
                parts += [json.dumps(part, ensure_ascii=False) for part in around if part]
        return parts

    def _begun(self, text: str) -> list[str]:
        """A text whose whitespace at the beginning may be missing: something else may have brought it."""
        space = text[: len(text) - len(text.lstrip())]
        return [*([f"{json.dumps(space)}?"] if space else []), *self._fixed(text.lstrip())]

    def _leading(self, text: str) -> str:
        """The token with which a text begins, if it is one."""
        return next((marker for marker in sorted(self._ids, key=len, reverse=True) if text.startswith(marker)), "")

    def _free(self, marker: str) -> str:
        """A text of one character at least that does not have the marker in it."""
        return self._terminal(f"/{_ANY}+/ & ~/{_ANY}*{_pattern(marker)}{_ANY}*/")

    def _until(self, marker: str) -> str:
        """Any text, and the marker."""
        if marker in self._ids:
            return f"{self._free(marker)}? <[{self._ids[marker]}]>"
        return self._named_rule("until", f"[suffix={json.dumps(marker, ensure_ascii=False)}]: /{_ANY}*/")

    # Calls.

    def _parts(self, calls: Calls, name: str, schema: Mapping[str, Any]) -> list[str]:
        parts: list[str] = []
        skipped = False
        for index, part in enumerate(calls.call):
            following = calls.call[index + 1] if index + 1 < len(calls.call) else None
            if isinstance(part, str):
                if following is Slot.ID and calls.keys is None:
                    parts.append(f"({' '.join([*self._fixed(part), _ID])})?")
                    skipped = True
                else:
                    parts += self._fixed(part) if index else self._begun(part)
            elif part is Slot.NAME:
                parts.append(json.dumps(name, ensure_ascii=False))
            elif part is Slot.INDEX:
                parts.append(_INDEX)
            elif part is Slot.ID:
                parts += [] if skipped else [_ID]
            elif calls.members is None:
                parts.append(self._json(schema))
            else:
                parts.append(self._members(calls.members, schema, name))
        return parts

    def _json(self, schema: Any, root: Any = None) -> str:
        """JSON of a schema. root: where it finds what it refers to."""
        if schema is True or schema == {}:
            given: dict[str, Any] = {}
        elif isinstance(schema, Mapping):
            given = dict(schema)
        else:
            raise InvalidRequest("a schema of the tools is false: nothing is valid", param="tools")
        for word in ("$defs", "definitions"):
            if isinstance(root, Mapping) and word in root:
                given.setdefault(word, root[word])
        if "x-guidance" in given:
            raise InvalidRequest("x-guidance in a schema of the tools is not supported", param="tools")
        given = {"x-guidance": {"whitespace_pattern": _WHITESPACE}, **given}
        return self._rule("json", f"%json {json.dumps(given, ensure_ascii=False)}")

    def _members(self, members: Members, schema: Mapping[str, Any], tool: str) -> str:
        """Arguments that are written one by one."""
        schema = self._resolved(schema, schema)
        self._refuse(schema, _OF_OBJECTS, f"the parameters of {tool}")
        properties = schema.get("properties") or {}
        needed = schema.get("required") or []
        where = f"a parameter of {tool}"
        items = [
            (
                [
                    *self._fixed(members.key_start + key + ("" if members.kinds else members.key_end)),
                    self._value(members, part, schema, f"{key}, {where}"),
                ],
                key in needed,
            )
            for key, part in (sorted(properties.items()) if members.ordered else properties.items())
        ]
        unknown = set(needed) - set(properties)
        if unknown:
            raise InvalidRequest(f"{min(unknown)} is required of {tool} and not among its properties", param="tools")
        if not items and schema.get("additionalProperties", True) is not False:
            value = self._value(members, {}, schema, where)
            between = [] if members.kinds else self._fixed(members.key_end)
            item = " ".join([*self._fixed(members.key_start), _KEY, *between, value])
            one = self._rule("argument", item)
            return self._rule("arguments", f"({one} ({' '.join([*self._fixed(members.separator), one])})*)?")
        return self._sequence(items, self._fixed(members.separator))

    def _sequence(self, items: Sequence[tuple[Sequence[str], bool]], separator: Sequence[str]) -> str:
        """Items in order, of which some may be left out, with separators between those that are there."""
        first, later = '""', '""'
        for item, needed in reversed(items):
            body, rest = " ".join(item), later
            with_it = f"{body} {rest}" if rest != '""' else body
            between = " ".join(separator)
            one = self._rule("item", with_it)
            first = one if needed else self._rule("first", f"{one} | {first}")
            later = self._rule("later", f"{between} {one}" if needed else f"{between} {one} | {rest}")
        return first

    # One argument.

    def _value(self, members: Members, schema: Any, root: Any, where: str) -> str:
        """A value, and what ends it."""
        end = " ".join(self._fixed(members.value_end))
        if members.values is Values.JSON:
            return f"{self._json(schema, root)} {end}"
        if members.values is Values.LITERAL:
            return f"{self._literal(members, schema, root, where, _DEPTH)} {end}"
        options = [
            f"{option} {end}" if closed is None else closed
            for option, closed in self._texts(members, schema, root, where, _DEPTH)
        ]
        return self._rule("value", " | ".join(options))

    def _texts(self, members: Members, schema: Any, root: Any, where: str, depth: int) -> list[tuple[str, str | None]]:
        """The ways to write a value as text: an expression that its end follows, or None and one that includes it."""
        if depth == 0:
            raise InvalidRequest(f"the schema of {where} is nested too deeply", param="tools")
        found: list[tuple[str, str | None]] = []
        core = members.value_end.strip()
        marker = core.split()[0] if core else core
        ends = dict(members.kinds)

        def add(kind: str, body: str, closed: str | None = None) -> None:
            """A way to write it, after what tells the type where something does."""
            told = " ".join(self._fixed(ends[kind])) + " " if kind in ends else ""
            found.append((told + body, None if closed is None else told + closed))

        for option in self._options(schema, root, where, depth):
            kind = option.get("type", "")
            if "enum" in option:
                for choice in option["enum"]:
                    written = choice if isinstance(choice, str) else json.dumps(choice, ensure_ascii=False)
                    if marker and marker in written:
                        raise InvalidRequest(f"a value of {where} holds {marker}, which would end it", param="tools")
                    add(_KINDS[type(choice)], json.dumps(written, ensure_ascii=False) if written else '""')
            elif kind == "string":
                self._refuse(option, frozenset(), where)
                rest = self._fixed(members.value_end[members.value_end.find(marker) + len(marker) :])
                add(kind, "", " ".join([self._until(marker), *rest]))
            elif kind in _WORDS:
                for word in _WORDS[kind][:2] if ends and kind == "boolean" else _WORDS[kind][: 1 if ends else None]:
                    add(kind, json.dumps(word))
            else:
                add(kind, self._json(option, root))
        return found

    def _literal(self, members: Members, schema: Any, root: Any, where: str, depth: int) -> str:
        """A value in the model's own notation."""
        if depth == 0:
            raise InvalidRequest(f"the schema of {where} is nested too deeply", param="tools")
        if schema is True or (isinstance(schema, Mapping) and _NOTES.issuperset(schema)):
            return self._anything(members, "value")
        options = []
        for option in self._options(schema, root, where, depth):
            kind = option.get("type")
            if "enum" in option:
                options += [self._written(members, choice) for choice in option["enum"]]
            elif kind == "string":
                self._refuse(option, frozenset(), where)
                options.append(self._string(members))
            elif kind == "array":
                self._refuse(option, _OF_ARRAYS, where)
                item = self._rule("element", self._literal(members, option.get("items", {}), root, where, depth - 1))
                low, high = option.get("minItems", 0), option.get("maxItems")
                more = f'("," " "? {item}){{{max(low - 1, 0)},{"" if high is None else max(high - 1, 0)}}}'
                inner = f"{item} {more}" if low else f"({item} {more})?"
                options.append(f'"[" {inner if high != 0 else ""} "]"')
            elif kind == "object" and option.get("properties"):
                self._refuse(option, _OF_OBJECTS, where)
                needed = option.get("required") or []
                items = [
                    (
                        [
                            self._key(members, key),
                            '":" " "?',
                            self._literal(members, part, root, f"{key} of {where}", depth - 1),
                        ],
                        key in needed,
                    )
                    for key, part in (
                        sorted(option["properties"].items()) if members.ordered else option["properties"].items()
                    )
                ]
                options.append(
                    f'"{{" {self._sequence(items, [chr(34) + "," + chr(34), chr(34) + " " + chr(34) + "?"])} "}}"'
                )
            elif kind == "object":
                self._refuse(option, _OF_OBJECTS, where)
                closed = option.get("additionalProperties") is False
                options.append('"{" "}"' if closed else self._anything(members, "object"))
            elif kind in _WORDS:
                options += [json.dumps(word) for word in _WORDS[kind]]
            else:
                options.append(self._json(option, root))
        return self._rule("literal", " | ".join(options))

    def _anything(self, members: Members, kind: str) -> str:
        """Any value, or any object."""
        if self._any is None:
            self._any = "anything"
            key = _KEY if len(members.quote) > 1 else self._string(members)
            pair = f'{key} ":" " "? anything'
            self._rules.append(f'anyobject: "{{" ({pair} ("," " "? {pair})*)? "}}"')
            self._rules.append(
                f"anything: {self._string(members)} | {self._json({'type': 'number'})} "
                '| "true" | "false" | "null" | anyobject | "[" (anything ("," " "? anything)*)? "]"'
            )
        return "anyobject" if kind == "object" else "anything"

    def _string(self, members: Members) -> str:
        if len(members.quote) == 1:
            return self._json({"type": "string"})
        return " ".join([*self._fixed(members.quote), self._until(members.quote)])

    def _written(self, members: Members, value: Any) -> str:
        if isinstance(value, str) and len(members.quote) > 1:
            return " ".join([*self._fixed(members.quote), *self._fixed(value), *self._fixed(members.quote)])
        return json.dumps(json.dumps(value, ensure_ascii=False), ensure_ascii=False)

    def _key(self, members: Members, key: str) -> str:
        return json.dumps(key if len(members.quote) > 1 else json.dumps(key, ensure_ascii=False), ensure_ascii=False)

    # Schemas.

    def _options(self, schema: Any, root: Any, where: str, depth: int) -> Iterable[Mapping[str, Any]]:
        """The schema as alternatives, each with one type, or with `enum`."""
        if schema is True or schema == {}:
            schema = {"type": ["string", "number", "boolean", "null", "object", "array"]}
        if not isinstance(schema, Mapping) or depth == 0:
            raise InvalidRequest(f"the schema of {where} cannot be held in this model's format", param="tools")
        schema = self._resolved(schema, root)
        if "const" in schema:
            yield {"enum": [schema["const"]]}
        elif "enum" in schema:
            yield {"enum": schema["enum"]}
        elif "anyOf" in schema or "oneOf" in schema:
            word = "anyOf" if "anyOf" in schema else "oneOf"
            rest = {key for key in schema if key not in _NOTES} - {word, "type"}
            if rest:
                raise self._unheld(f"{min(rest)} beside {word}", where)
            for option in schema[word]:
                yield from self._options(option, root, where, depth - 1)
        elif "allOf" in schema:
            rest = {key for key in schema if key not in _NOTES} - {"allOf"}
            if rest or len(schema["allOf"]) != 1:
                raise self._unheld("allOf", where)
            yield from self._options(schema["allOf"][0], root, where, depth - 1)
        else:
            kinds = schema.get("type")
            if kinds is None:
                kinds = "object" if "properties" in schema else "array" if "items" in schema else None
            if kinds is None:
                if {key for key in schema if key not in _NOTES}:
                    raise self._unheld(min(key for key in schema if key not in _NOTES), where)
                yield from self._options({}, root, where, depth - 1)
                return
            kinds = [kinds] if isinstance(kinds, str) else list(kinds)
            if schema.get("nullable") is True and "null" not in kinds:
                kinds.append("null")
            for kind in kinds:
                yield {**_of_kind(schema, kind), "type": kind}

    def _resolved(self, schema: Mapping[str, Any], root: Any) -> Mapping[str, Any]:
        for _ in range(_DEPTH):
            reference = schema.get("$ref")
            if reference is None:
                return schema
            if not isinstance(reference, str) or not reference.startswith("#"):
                raise InvalidRequest(f"the reference {reference} leads out of the schema", param="tools")
            target: Any = root
            for step in reference[1:].split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                target = target.get(step) if isinstance(target, Mapping) else None
            if not isinstance(target, Mapping):
                raise InvalidRequest(f"the reference {reference} leads nowhere", param="tools")
            schema = target
        raise InvalidRequest("a reference in a schema of the tools leads to itself", param="tools")

    def _refuse(self, schema: Mapping[str, Any], known: frozenset[str], where: str) -> None:
        unknown = set(schema) - known - _NOTES - _STRUCTURE
        if unknown:
            raise self._unheld(min(unknown), where)
        if "additionalProperties" in known and isinstance(schema.get("additionalProperties"), Mapping):
            raise self._unheld("additionalProperties with a schema", where)

    def _unheld(self, keyword: str, where: str) -> InvalidRequest:
        return InvalidRequest(
            f"{keyword} in the schema of {where} cannot be held in the format in which this model calls tools",
            param="tools",
        )

    # Channels.

    def channels(
        self,
        calls: Calls | None,
        channels: Channels,
        schemas: Mapping[str, Any],
        *,
        required: bool,
        content: str = "",
    ) -> None:
        bodies = [content] if content else []
        for name, schema in schemas.items():
            if calls is not None:
                bodies.append(" ".join(self._parts(calls, name, schema)))
            header = f"{channels.channel}{channels.calls} to={channels.namespace}{name} "
            # What models write, beside what templates do (exceptions.py).
            written = self._fixed(f"{header}{channels.constraint}json{channels.message}")
            bodies.append(" ".join([*written, self._json(schema), *self._fixed(channels.ends[1])]))
        call = self._rule("call", " | ".join(bodies))
        end, message = channels.ends[0], self._fixed(channels.message)
        again = self._fixed(channels.start)

        def begun(word: str) -> str:
            return " ".join([*self._fixed(channels.channel + word), *message])

        thought = self._rule("thought", " ".join([begun(channels.reasoning), self._until(end), *again]))
        if required:
            self._rules.insert(0, f"start: {thought}* {call}")
            return
        aside = self._rule("aside", " ".join([begun(channels.calls), self._until(end), *again]))
        words = (channels.content, channels.calls, channels.reasoning)
        last = self._rule("last", " | ".join(f"{begun(word)} {self._free(end)}?" for word in words))
        self._rules.insert(0, f"start: ({thought} | {aside})* ({call} | {last})")

    # Rules.

    def _rule(self, name: str, body: str) -> str:
        return self._named_rule(name, f": {body}")

    def _named_rule(self, name: str, body: str) -> str:
        key = (name, body)
        if key not in self._named:
            self._named[key] = f"{name}_{len(self._named)}"
            self._rules.append(f"{self._named[key]}{body}")
        return self._named[key]

    def _terminal(self, body: str) -> str:
        return self._named_rule("TEXT", f": {body}")


def _of_kind(schema: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What of a schema with several types is about one of them."""
    if isinstance(schema.get("type"), str):
        return dict(schema)
    about = {
        "string": {"minLength", "maxLength", "pattern", "format"},
        "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
        "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
        "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"},
        "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties"},
    }
    others = set().union(*(words for other, words in about.items() if other != kind)) - about.get(kind, set())
    return {key: value for key, value in schema.items() if key not in others}


def _pattern(text: str) -> str:
    """A regular expression for exactly this text."""
    return re.escape(text).replace("/", "\\/").replace("\n", "\\n").replace("\\\\n", "\\n")
