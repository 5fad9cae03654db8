"""A grammar made of a format lets through what the template would write and nothing else, and what comes through it
is a call whose arguments are valid."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from llmnode.chat.enforce import calls_grammar
from llmnode.chat.format import Format
from llmnode.chat.parse import parser
from llmnode.chat.pieces import Message, gather
from llmnode.engine.grammar import Grammar, Grammars
from llmnode.engine.text import spelled
from llmnode.wire.errors import InvalidRequest
from tests.node.format_rig import OURS, PATHS, TOOLS, answer, format_of, tool
from tests.node.test_answer_parsing import CASES, FILE, NOW, WEATHER

END = 256


class Vocabulary:
    """The bytes, an end token, and the format's markers as control tokens, unless they are to be spelled out."""

    def __init__(self, format: Format, *, control: bool) -> None:
        markers = sorted(format.markers) if control else []
        self.pieces = [bytes([byte]) for byte in range(256)] + [b""] * (1 + len(markers))
        self.specials = {marker: END + 1 + index for index, marker in enumerate(markers)}
        self.end_names = {marker for marker in format.turn_ends if marker in self.specials}
        self.ends = frozenset({END, *(self.specials[name] for name in self.end_names)})
        self.grammars = Grammars(self.pieces, self.ends)
        self.spelled = spelled(self.pieces, self.specials, format.markers)

    def ids(self, text: str) -> list[int]:
        pattern = "|".join(re.escape(marker) for marker in sorted(self.specials, key=len, reverse=True))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        return [id for part in parts for id in ([self.specials[part]] if part in self.specials else part.encode())]

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.spelled[id] for id in ids if id not in self.ends).decode(errors="replace")

    def compile(self, format: Format, tools: Sequence[Mapping[str, Any]] = TOOLS, **given: Any) -> Grammar:
        given = {"required": True, **given}
        return self.grammars.lark(
            calls_grammar(format, tools, specials=self.specials, ends=self.end_names, **given), param="tools"
        )


def accepts(grammar: Grammar, ids: Sequence[int], ends: frozenset[int]) -> bool:
    matcher = grammar.matcher()
    for id in ids:
        if id in ends:
            break
        if not matcher.allows(id):
            return False
        matcher.accept(id)
    return matcher.may_end


@pytest.mark.parametrize("control", [True, False], ids=["control tokens", "spelled out"])
@pytest.mark.parametrize("name", PATHS)
def test_what_the_template_writes_is_allowed(name: str, control: bool) -> None:
    format = format_of(name)
    assert format.calls is not None
    vocabulary = Vocabulary(format, control=control)
    required, auto = vocabulary.compile(format), vocabulary.compile(format, required=False)
    for calls, content, reasoning in CASES.values():
        if len(calls) > 1 and not format.calls.parallel:
            continue
        content = content if format.beside or not calls else ""
        text = answer(name, calls, content, reasoning)
        assert text is not None
        ids = vocabulary.ids(text)
        assert accepts(auto, ids, vocabulary.ends), text
        assert accepts(required, ids, vocabulary.ends) == (bool(calls) and not content), text


@pytest.mark.parametrize("name", sorted(path.stem for path in OURS.glob("*.jinja")))
def test_what_is_not_asked_for_is_refused(name: str) -> None:
    format = format_of(name)
    assert format.calls is not None
    vocabulary = Vocabulary(format, control=True)

    def allowed(grammar: Grammar, calls: Any, content: str = "", change: tuple[str, str] = ("", "")) -> bool:
        text = answer(name, calls, content)
        assert text is not None and change[0] in text
        return accepts(grammar, vocabulary.ids(text.replace(*change) if change[0] else text), vocabulary.ends)

    for required in (True, False):
        grammar = vocabulary.compile(format, required=required)
        assert allowed(grammar, [WEATHER])
        assert not allowed(grammar, [("get_weather", {"days": 3})])  # city is required
        assert not allowed(grammar, [("get_weather", {"city": "Rome", "days": "many"})])
        assert not allowed(grammar, [("get_weather", {"city": "Rome", "zone": "x"})])
        if required or format.calls.trigger:
            assert not allowed(grammar, [("else_where", {})])
            assert not allowed(grammar, [WEATHER], change=("get_weather", "get_wether"))
    required_one = vocabulary.compile(format, parallel=False)
    assert allowed(required_one, [NOW])
    if format.calls.parallel:
        assert allowed(vocabulary.compile(format), [NOW, FILE]) and not allowed(required_one, [NOW, FILE])
    named = vocabulary.compile(format, [TOOLS[0]], parallel=False)
    assert allowed(named, [WEATHER]) and not allowed(named, [NOW])
    assert not accepts(vocabulary.compile(format), vocabulary.ids("Hello"), vocabulary.ends)
    assert not accepts(vocabulary.compile(format), [], vocabulary.ends)


def walk(grammar: Grammar, vocabulary: Vocabulary, seed: int, limit: int = 1500) -> list[int] | None:
    """An answer drawn at random from what the grammar allows. None when it does not end in time."""
    dice = np.random.default_rng(seed)
    likely = np.full(len(vocabulary.pieces), 0.02)
    likely[list(b"abcdefxyz 0123456789")] = 1.0
    likely[list(b'"}]>,:{[<')] = 6.0
    likely[END:] = 25.0
    likely[list(b"\n\r\t")] = 0.1
    matcher, ids = grammar.matcher(), []
    while len(ids) < limit:
        chances = likely * matcher.mask()
        id = int(dice.choice(len(chances), p=chances / chances.sum()))
        if id in vocabulary.ends:
            return ids
        ids.append(id)
        matcher.accept(id)
    return None


def read(format: Format, text: str, tools: Sequence[Mapping[str, Any]], *, opened: bool = False) -> Message:
    reader = parser(format, tools, opened=opened)
    return gather([*reader.feed(text), *reader.flush()])


def check(message: Message, tools: Sequence[Mapping[str, Any]]) -> None:
    schemas = {given["function"]["name"]: given["function"]["parameters"] for given in tools}
    for call in message.calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])


STRICT = [
    *TOOLS,
    tool(
        "plan",
        {
            "mode": {"enum": ["fast", "slow", 'a "b"']},
            "steps": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "what": {"type": "string"},
                        "count": {"type": "integer", "minimum": 1, "maximum": 9},
                    },
                    "required": ["what"],
                    "additionalProperties": False,
                },
                "minItems": 1,
                "maxItems": 2,
            },
            "limit": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
            "exact": {"type": "boolean"},
        },
        ["mode", "steps"],
    ),
]


# Dice do not spell a marker out, such as the one that ends reasoning.
@pytest.mark.parametrize(
    ("name", "control"),
    [
        *((path.stem, True) for path in sorted(OURS.glob("*.jinja"))),
        *((name, False) for name in ("bare", "list", "whole")),
    ],
)
def test_whatever_comes_through_is_a_valid_call(name: str, control: bool) -> None:
    format = format_of(name)
    vocabulary = Vocabulary(format, control=control)
    opened = name == "fenced"
    for parallel in (True, False):
        grammar = vocabulary.compile(format, STRICT, parallel=parallel, opened=opened)
        ended = 0
        for seed in range(5):
            ids = walk(grammar, vocabulary, seed)
            if ids is None:
                continue
            ended += 1
            text = vocabulary.text(ids)
            message = read(format, text, STRICT, opened=opened)
            assert message.calls and not message.content, text
            assert parallel or len(message.calls) == 1
            check(message, STRICT)
        assert ended


@pytest.mark.parametrize("name", sorted(path.stem for path in OURS.glob("*.jinja")))
def test_under_auto_every_call_that_begins_is_valid(name: str) -> None:
    format = format_of(name)
    vocabulary = Vocabulary(format, control=True)
    grammar = vocabulary.compile(format, STRICT, required=False)
    assert accepts(grammar, vocabulary.ids("Hello, <b> {} [1]."), vocabulary.ends) or format.content[0].strip()
    for seed in range(3):
        ids = walk(grammar, vocabulary, seed, 400)
        if ids is not None:
            check(read(format, vocabulary.text(ids), STRICT), STRICT)


def test_a_marker_that_is_a_token_is_not_spelled_out() -> None:
    format = format_of("tagged")
    vocabulary = Vocabulary(format, control=True)
    text = answer("tagged", [NOW])
    assert text is not None
    for required in (True, False):
        grammar = vocabulary.compile(format, required=required)
        assert accepts(grammar, vocabulary.ids(text), vocabulary.ends)
        assert not accepts(grammar, list(text.encode()), vocabulary.ends)


def test_reasoning_may_come_before_a_call_that_must() -> None:
    for name, opened in [("tagged", False), ("fenced", True), ("channels", False)]:
        format = format_of(name)
        vocabulary = Vocabulary(format, control=False)
        text = answer(name, [NOW], "", "Hm." if not opened else "")
        assert text is not None
        text = f"Hm.\n</think>\n\n{text}" if opened else text
        grammar = vocabulary.compile(format, opened=opened)
        assert accepts(grammar, vocabulary.ids(text), vocabulary.ends)
        assert read(format, text, TOOLS, opened=opened).reasoning == "Hm."


def one(schema: Any, **more: Any) -> list[dict[str, Any]]:
    given = tool("probe", {"x": schema})
    given["function"]["parameters"].update(more)
    return [given]


@pytest.mark.parametrize("name", ["parameters", "quoted"])
def test_what_cannot_be_held_in_a_format_is_refused_by_name(name: str) -> None:
    for schema, word in [
        ({"type": "string", "pattern": "a+"}, "pattern"),
        ({"type": "string", "maxLength": 3}, "maxLength"),
        ({"allOf": [{"type": "string"}, {"type": "string"}]}, "allOf"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"$ref": "https://example.org/x"}, "leads out"),
        ({"anyOf": [{"type": "string"}], "minLength": 3}, "minLength"),
    ]:
        with pytest.raises(InvalidRequest, match=word) as caught:
            calls_grammar(format_of(name), one(schema), required=True)
        assert caught.value.param == "tools"
        assert calls_grammar(format_of(name), one(schema), required=True, loose=True)
    with pytest.raises(InvalidRequest, match="leads to itself"):
        calls_grammar(
            format_of(name), one({"$ref": "#/$defs/a"}, **{"$defs": {"a": {"$ref": "#/$defs/a"}}}), required=True
        )
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        loop = {"type": "array", "items": {"$ref": "#/$defs/a"}}
        calls_grammar(format_of("quoted"), one(loop, **{"$defs": {"a": loop}}), required=True)


def test_a_schema_that_cannot_be_compiled_names_the_tools() -> None:
    vocabulary = Vocabulary(format_of("tagged"), control=True)
    with pytest.raises(InvalidRequest, match="uniqueItems") as caught:
        vocabulary.compile(format_of("tagged"), one({"type": "array", "uniqueItems": True}))
    assert caught.value.param == "tools"
    with pytest.raises(InvalidRequest, match="cannot call tools: no way"):
        calls_grammar(Format(why="no way"), TOOLS, required=True)


@pytest.mark.parametrize("name", ["tagged", "parameters", "quoted", "python", "invoked"])
def test_what_schemas_in_the_wild_have_is_held(name: str) -> None:
    wild = one(
        {"$ref": "#/$defs/place", "description": "Where."},
        **{
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "Probe",
            "$defs": {
                "place": {
                    "type": "object",
                    "title": "Place",
                    "properties": {"name": {"type": "string", "default": "x"}, "kind": {"enum": ["a", "b"]}},
                    "required": ["name"],
                    "additionalProperties": False,
                }
            },
        },
    )
    wild.append({"type": "function", "function": {"name": "bare"}})
    wild.append({"type": "function", "function": {"name": "open", "parameters": {"type": "object"}}})
    format = format_of(name)
    vocabulary = Vocabulary(format, control=True)
    for given in wild:
        function = given["function"]
        grammar = vocabulary.compile(format, [given], parallel=False)
        drawn = (walk(grammar, vocabulary, seed, 300) for seed in range(60))
        ids = next(ids for ids in drawn if ids is not None)
        (call,) = read(format, vocabulary.text(ids), wild).calls
        jsonschema.validate(json.loads(call.arguments), function.get("parameters", {"maxProperties": 0}))
