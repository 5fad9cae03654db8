"""A grammar lets an answer say what it stands for and end exactly where it may, and leaves the draw its chances."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.engine.grammar import DeadEnd, Grammar, Grammars, Matcher
from llmnode.engine.sampler import Sampler, Vocabulary
from llmnode.engine.types import Sampling
from llmnode.wire.errors import InvalidRequest

WORDS = [
    *(bytes([byte]) for byte in range(256)),
    *(
        b"true",
        b'{"',
        b'":',
        b"a",
        b" }",
        b'"}',
        b"\xc3\xa9",
        b"\xa9x",
        b"12",
        b"hello",
        b"hel",
        b"lo",
        b"}\n",
        b'{"a"',
    ),
]
EMPTY, END, END2 = len(WORDS), len(WORDS) + 1, len(WORDS) + 2
PIECES = [*WORDS, b"", b"", b""]
ENDS = frozenset({END, END2})
GRAMMARS = Grammars(PIECES, ENDS)
VOCABULARY = Vocabulary(PIECES, ENDS)
BRACKETS = 'root ::= ("(" root ")" | [a-zé]+ | "{" [^}]* "}")+'


def after(grammar: Grammar, text: str | bytes) -> Matcher | None:
    matcher = grammar.matcher()
    for byte in text.encode() if isinstance(text, str) else text:
        if not matcher.allows(byte):
            return None
        matcher.accept(byte)
    return matcher


def matches(grammar: Grammar, text: str) -> bool:
    matcher = after(grammar, text)
    return matcher is not None and matcher.may_end


def allowed(matcher: Matcher) -> list[int]:
    return np.flatnonzero(matcher.mask()).tolist()


def schema(schema: Any) -> Grammar:
    return GRAMMARS.json_schema(schema)


@given(st.sampled_from(["json", "brackets", "hello", "empty"]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_mask_holds_exactly_the_tokens_that_pass_alone(name: str, seed: int) -> None:
    grammar = {
        "json": GRAMMARS.json_object(),
        "brackets": GRAMMARS.gbnf(BRACKETS),
        "hello": GRAMMARS.gbnf('root ::= "hello" | "hel" "p"*'),
        "empty": GRAMMARS.gbnf('root ::= "a"?'),
    }[name]
    dice = np.random.default_rng(seed)
    matcher = grammar.matcher()
    for _ in range(25):
        assert allowed(matcher) == [token for token in range(len(PIECES)) if matcher.allows(token)]
        assert not matcher.allows(EMPTY)
        assert matcher.allows(END) == matcher.allows(END2) == matcher.may_end
        text = [token for token in allowed(matcher) if token not in ENDS]
        assert matcher.finished == (not text)
        if not text:
            break
        matcher.accept(int(dice.choice(text)))


def test_every_way_to_spell_a_text_is_allowed() -> None:
    matcher = GRAMMARS.gbnf('root ::= "hello"').matcher()
    assert [PIECES[token] for token in allowed(matcher)] == [b"h", b"hello", b"hel"]
    matcher.accept(PIECES.index(b"hel"))
    assert [PIECES[token] for token in allowed(matcher)] == [b"l", b"lo"]
    assert not matcher.may_end and not matcher.finished
    matcher.accept(PIECES.index(b"lo"))
    assert allowed(matcher) == [END, END2]
    assert matcher.may_end and matcher.finished


def test_half_characters_are_followed() -> None:
    matcher = GRAMMARS.gbnf("root ::= [é-ê] [a-z]").matcher()
    assert [PIECES[token] for token in allowed(matcher)] == [b"\xc3", b"\xc3\xa9"]
    matcher.accept(0xC3)
    assert [PIECES[token] for token in allowed(matcher)] == [b"\xa9", b"\xaa", b"\xa9x"]


def test_tokens_of_the_same_text_are_alike() -> None:
    assert PIECES.index(b"a") == 97 and PIECES[259] == b"a"
    matcher = GRAMMARS.gbnf('root ::= "a"').matcher()
    assert allowed(matcher) == [97, 259]
    matcher.accept(259)
    assert matcher.finished


def test_after_an_end_nothing_is_allowed() -> None:
    matcher = GRAMMARS.gbnf('root ::= "a"*').matcher()
    matcher.accept(97)
    matcher.accept(END2)
    assert matcher.finished and matcher.may_end
    assert allowed(matcher) == []
    assert not matcher.allows(97) and not matcher.allows(END)


@pytest.mark.parametrize("token", [ord("b"), END, EMPTY])
def test_a_token_that_is_not_allowed_is_refused_and_leaves_the_place(token: int) -> None:
    matcher = GRAMMARS.gbnf('root ::= "aa"').matcher()
    matcher.accept(97)
    with pytest.raises(DeadEnd, match=f"token {token} is not one that the grammar allows here"):
        matcher.accept(token)
    matcher.accept(97)
    assert matcher.finished


def test_the_place_depends_on_the_tokens_alone() -> None:
    grammar = GRAMMARS.gbnf(BRACKETS)
    text = b"(ab({x y}c)(d))\xc3\xa9("
    asked, left_alone = grammar.matcher(), grammar.matcher()
    for byte in text:
        asked.mask(), asked.allows(byte), asked.allows(3), asked.may_end, asked.finished
        asked.accept(byte)
        left_alone.accept(byte)
    assert allowed(asked) == allowed(left_alone)


def test_matchers_of_one_grammar_do_not_share_a_place() -> None:
    grammar = GRAMMARS.gbnf('root ::= "a" "b" | "c"')
    one, other = grammar.matcher(), grammar.matcher()
    one.accept(97)
    assert other.allows(ord("c")) and not one.allows(ord("c"))


def test_grammars_are_kept_and_the_oldest_dropped() -> None:
    grammars = Grammars(PIECES, ENDS, kept=2)
    one, two = grammars.gbnf('root ::= "1"'), grammars.gbnf('root ::= "2"')
    assert grammars.gbnf('root ::= "1"') is one
    grammars.gbnf('root ::= "3"')
    assert grammars.gbnf('root ::= "1"') is one
    assert grammars.gbnf('root ::= "2"') is not two
    assert repr(one) == "<Grammar gbnf of 12 bytes>"


def test_grammars_may_be_used_by_many_threads() -> None:
    grammars = Grammars(PIECES, ENDS, kept=3)
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(40):
            digit = str((number + turn) % 7)
            matcher = after(grammars.gbnf(f'root ::= "{digit}" root "." | "!"'), digit * 5 + "!" + "." * 5)
            if matcher is None or not matcher.finished:
                wrong.append(digit)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_without_an_end_token_has_grammars_too() -> None:
    matcher = Grammars(WORDS, frozenset()).gbnf('root ::= "ab"').matcher()
    for byte in b"ab":
        matcher.accept(byte)
    assert matcher.finished and not matcher.mask().any()


# JSON.


def test_any_json_object_is_one() -> None:
    grammar = GRAMMARS.json_object()
    for text in ("{}", '{"a": [1, -2.5e3, true, null, {"b": "é\\n"}]}', '{\n  "a":\t1\n}'):
        assert matches(grammar, text), text
    for text in ("[]", "1", '{"a"}', "{,}", ' {"a": 1}', '{"a": 01}', "{'a': 1}", '{"a": "\n"}'):
        assert not matches(grammar, text), text


def test_whitespace_in_json_has_an_end() -> None:
    assert matches(GRAMMARS.json_object(), '{"a":' + "\n" + " " * 39 + "1}")
    assert after(GRAMMARS.json_object(), '{"a":' + " " * 41) is None


def test_a_schema_is_honoured() -> None:
    person = schema(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 5},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
                "when": {"type": "string", "format": "date"},
                "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"},
                "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    )
    good = {"name": "Ann", "age": 41, "tags": ["x", "y"], "when": "2024-02-29", "code": "AB12", "next": None}
    assert matches(person, json.dumps(good))
    assert matches(person, json.dumps({"name": "A", "age": 0, "next": {"name": "B", "age": 1}}))
    for change in (
        {"name": ""},
        {"name": "Johann"},
        {"age": 151},
        {"age": 1.5},
        {"tags": ["z"]},
        {"tags": ["x"] * 3},
        {"when": "today"},
        {"code": "A1"},
        {"next": 3},
        {"more": 1},
    ):
        assert not matches(person, json.dumps({**good, **change})), change
    assert not matches(person, '{"age": 1}')


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"not": {}}, "Unimplemented keys"),
        ({"if": {}, "then": {}}, "Unimplemented keys"),
        ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ({"unevaluatedProperties": False}, "Unimplemented keys"),
        ({"dependentRequired": {"a": ["b"]}}, "Unimplemented keys"),
        ({"type": "string", "format": "made-up"}, "Unknown format: made-up"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "http://elsewhere.example/schema"}, "http://elsewhere.example/schema"),
        ({"$ref": "#/missing"}, "'/missing' does not exist"),
        ({"type": "thing"}, "Invalid type: thing"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater than maximum (2)"),
        ({"enum": []}, "Unsatisfiable"),
        (False, "schema is false"),
        ({"$ref": "#"}, "nothing that the model can say matches it"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ('{"type": ', "must hold a JSON schema"),
        ("[]", "must hold a JSON schema, which is an object"),
        ('"object"', "must hold a JSON schema, which is an object"),
        ('{"items": ' * 2000 + "{}" + "}" * 2000, "must hold a JSON schema"),
        ({"enum": ["x" * 70_000]}, "response_format may hold 65536 bytes at most, got"),
    ],
    ids=str,
)
def test_what_a_schema_cannot_be_given_is_refused_by_name(what: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        schema(what)
    assert reason in error.value.message
    assert "%llguidance" not in error.value.message, "its author has not written that"
    assert error.value.param == "response_format"


def test_a_refusal_names_the_field_that_the_schema_came_in() -> None:
    with pytest.raises(InvalidRequest, match="tools cannot be used") as error:
        GRAMMARS.json_schema({"not": {}}, param="tools")
    assert error.value.param == "tools"


@pytest.mark.parametrize("what", [True, {}, {"title": "x", "unheard-of": 3}, '{"type": "object"}'], ids=str)
def test_a_schema_may_ask_for_little(what: Any) -> None:
    assert matches(schema(what), '{"a": 1}')


def test_a_text_in_a_schema_is_a_text_and_no_grammar() -> None:
    text = 'x"\nstart: "y" <|end|> }} /[a-z]/ // \\'
    assert matches(schema({"const": text}), json.dumps(text))
    assert not matches(schema({"const": text}), '"y"')


# The limits.


def test_an_answer_that_reaches_a_limit_comes_to_a_dead_end() -> None:
    # Every place in "aaa..." may be the end of every earlier part.
    matcher = GRAMMARS.gbnf('root ::= a b c\na ::= a a | "a"\nb ::= "a" b b | "a"\nc ::= c c c | "a"').matcher()
    with pytest.raises(DeadEnd, match="the grammar cannot be followed any further") as error:
        for _ in range(3000):
            matcher.accept(97)
    assert error.value.status == 400
    assert error.value.code == "dead_end"
    assert len(error.value.message) < 500
    with pytest.raises(DeadEnd):
        matcher.mask()


# The draw.


def drawn(sampler: Sampler, row: np.ndarray, positions: range) -> list[int]:
    best = int(row.argmax())
    return [one.token for position in positions if (one := sampler.draw(row, best, position)) is not None]


def row_of(chances: dict[int, float]) -> np.ndarray:
    row = np.full(len(PIECES), -30, np.float32)
    for token, chance in chances.items():
        row[token] = np.log(chance)
    return row


@pytest.mark.parametrize("sampling", [Sampling(seed=5), Sampling(seed=5, top_p=0.97), Sampling(seed=5, mirostat=2)])
def test_draws_under_a_grammar_have_the_chances_of_the_mask(sampling: Sampling) -> None:
    # More than half of the draws are refused; what follows must not lean on the number that was refused.
    row = row_of({97: 0.45, 98: 0.1, 99: 0.25, 100: 0.1, 101: 0.1})
    sampler = Sampler(sampling, (), vocabulary=VOCABULARY, matcher=GRAMMARS.gbnf("root ::= [bce]").matcher())
    tokens = Counter(drawn(sampler, row, range(20_000)))
    assert set(tokens) == {98, 99, 101}
    for token, chance in {98: 0.1, 99: 0.25, 101: 0.1}.items():
        assert abs(tokens[token] / 20_000 - chance / 0.45) < 0.015


def test_a_draw_that_is_allowed_is_the_one_without_a_grammar() -> None:
    row = row_of({97: 0.4, 98: 0.6})
    free = drawn(Sampler(Sampling(seed=1), (), vocabulary=VOCABULARY), row, range(200))
    matcher = GRAMMARS.gbnf("root ::= [ac]").matcher()
    bound = drawn(Sampler(Sampling(seed=1), (), vocabulary=VOCABULARY, matcher=matcher), row, range(200))
    assert set(free) == {97, 98} and set(bound) == {97}
    matcher = GRAMMARS.gbnf("root ::= [a-z]").matcher()
    assert drawn(Sampler(Sampling(seed=1), (), vocabulary=VOCABULARY, matcher=matcher), row, range(200)) == free


def test_where_the_truncations_leave_nothing_allowed_they_start_again_under_the_mask() -> None:
    row = row_of({98: 0.9, 100: 0.05, 97: 0.03, 99: 0.015, 101: 0.005})
    grammar = GRAMMARS.gbnf("root ::= [ace]")
    sampler = Sampler(Sampling(top_k=2), (), vocabulary=VOCABULARY, matcher=grammar.matcher())
    tokens = Counter(drawn(sampler, row, range(6000)))
    assert set(tokens) == {97, 99}
    assert abs(tokens[97] / 6000 - 2 / 3) < 0.03
    greedy = Sampler(Sampling(temperature=0), (), vocabulary=VOCABULARY, matcher=grammar.matcher())
    assert set(drawn(greedy, row, range(5))) == {97}


def test_a_mask_is_asked_for_only_when_the_draw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    mask = Matcher.mask
    monkeypatch.setattr(Matcher, "mask", lambda self: asked.append(1) or mask(self))
    sampler = Sampler(Sampling(temperature=0), (), vocabulary=VOCABULARY, matcher=GRAMMARS.json_object().matcher())
    for byte in b'{"a": tr':
        assert drawn(sampler, row_of({byte: 0.9, 98: 0.1}), range(1)) == [byte]
        sampler.accept(byte)
    assert asked == []
    assert drawn(sampler, row_of({122: 0.9, 117: 0.1}), range(1)) == [117]
    assert asked == [1]


def test_an_answer_under_a_grammar_ends_and_is_then_free() -> None:
    sampler = Sampler(
        Sampling(temperature=0), (), vocabulary=VOCABULARY, matcher=GRAMMARS.gbnf('root ::= "ab"').matcher()
    )
    row = row_of({98: 0.5, 97: 0.3, END2: 0.2})
    said = []
    for position in range(5):
        said += drawn(sampler, row, range(position, position + 1))
        assert sampler.finished == (position == 2)
        sampler.accept(said[-1])
    assert said == [97, 98, END2, 98, 98], "after its end, whoever ignores it says what the model likes best"


def test_a_grammar_and_a_bias_that_leave_nothing_are_a_dead_end() -> None:
    sampling = Sampling(logit_bias=((97, -np.inf), (259, -np.inf)))
    matcher = GRAMMARS.gbnf('root ::= "a"').matcher()
    sampler = Sampler(sampling, (), vocabulary=VOCABULARY, matcher=matcher)
    with pytest.raises(DeadEnd, match="allows no token here that the model has and logit_bias does not forbid"):
        drawn(sampler, row_of({97: 0.9, 98: 0.1}), range(1))
    everything = Sampling(logit_bias=tuple((token, -np.inf) for token in range(len(PIECES))))
    with pytest.raises(DeadEnd, match="logit_bias forbids every token") as error:
        drawn(Sampler(everything, (), vocabulary=VOCABULARY), row_of({97: 1.0}), range(1))
    assert error.value.param == "logit_bias"


def test_a_vocabulary_that_cannot_spell_a_text_is_told_before_the_answer_begins() -> None:
    with pytest.raises(InvalidRequest, match="nothing that the model can say matches it"):
        Grammars([b"a", b"b", b""], frozenset({2})).gbnf('root ::= "c"')


def test_a_vocabulary_that_cannot_go_on_is_a_dead_end() -> None:
    matcher = Grammars([b"a", b"b", b""], frozenset({2})).gbnf('root ::= "ac"').matcher()
    matcher.accept(0)
    with pytest.raises(DeadEnd, match="nothing that the model can say"):
        matcher.mask()
