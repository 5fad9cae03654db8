"""A grammar in GBNF allows the texts that it stands for and no others, as llama.cpp reads it; or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.engine import lark
from llmnode.engine.gbnf import parse
from llmnode.engine.grammar import DeadEnd, Grammar, Grammars, Matcher
from llmnode.engine.llama.native import native
from llmnode.wire.errors import InvalidRequest

BYTES = [bytes([byte]) for byte in range(256)]
END = 256
GRAMMARS = Grammars([*BYTES, b""], frozenset({END}), kept=1)

ARITHMETIC = """
root  ::= (expr "=" ws number "\\n")+
expr  ::= term ([-+*/] term)*
term  ::= name | number | "(" ws expr ")" ws
name  ::= [a-z] [a-z0-9_]* ws
number ::= [0-9]+ ws
ws    ::= [ \\t\\n]*
"""
JSON = r"""
# JSON, with bounded whitespace
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,4})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
PROGRAM = """
root      ::= (statement "\\n"?)+
statement ::= ("if" | "while") " (" test ") {" root "}" | "return" " "+ value ";" | name " = " value ";"
test      ::= value (" " ("==" | "<" | "<=" | ">=") " " value)?
value     ::= name | [0-9]+ | name "(" (value ("," " "* value)*)? ")" | "\\"" [^"\\n]* "\\""
name      ::= [a-zA-Z_] [a-zA-Z_0-9]*
"""

# name: grammar, texts that match, texts that do not.
EXAMPLES: dict[str, tuple[str, list[str], list[str]]] = {
    "arithmetic": (
        ARITHMETIC,
        ["1=1\n", "a+b*(c -2)=3\n", "x_1 \n+2 =  7\n\nb=2\n"],
        ["", "1=1", "1=a\n", "(1=1\n", "1+=2\n", "A=1\n"],
    ),
    "json": (
        JSON,
        ["{}", '{ "a": [1, -2.5e+3, {"b": null}], "é\\u00e9": "x\\"" }', '{"a":\n  true}'],
        ["", "[]", '{"a"}', "{,}", '{"a":01x}', '{"a":\n\n1}', '{"a": "\n"}'],
    ),
    "a program": (
        PROGRAM,
        ["a = 1;", "if (a == b) {return  f(1, g());}\nx = y;", 'iff = "if (";', "while (while1) {x = if1;}"],
        ["a = ;", "if (a) {}", "return1;", "a = 1", "if (a == ) {a = 1;}"],
    ),
    "a keyword beside a class": ('root ::= [a-z]* | "true!"', ["true!", "trx", "true", ""], ["true!x", "tr!"]),
    "a class and then one of its own": ('root ::= [a-z]+ "x"', ["ax", "xx", "abxx"], ["x", "a", "xa"]),
    "the same among rules that recurse": (
        'root ::= "(" root ")" | [a-z]+ "x" | [a-z] "tr" | "true!" root',
        ["ax", "(((xx)))", "true!(ax)", "ttr", "true!atr"],
        ["x", "(ax", "true!", "truetr!", "(ax))"],
    ),
    "the rest begins like more of the same": (
        'root ::= [a-z]+ rest\nrest ::= "x" root "y" | "!"',
        ["a!", "xx!", "abxc!y", "axbxc!yy"],
        ["x", "ax", "a!y", "ax!yy"],
    ),
    "characters that begin with the same byte": (
        'root ::= [à-ã]+ rest\nrest ::= "é" root "è" | "!"',
        ["àã!", "àéã!è"],
        ["é!", "àéã!"],
    ),
    "any character": ("root ::= . .", ["ab", "\n\n", "é🙂", "\x00\x01"], ["a", "abc"]),
    "negated": ("root ::= [^a\\n]+", ["bé🙂\r"], ["", "a", "b\n"]),
    "escapes": (
        r'root ::= "\x41\u00e9\U0001F642\t\r\n\\\"\[\]\-" [\x61-\x63\]\[\\\-^"]{2}',
        ['Aé🙂\t\r\n\\"[]-a^', 'Aé🙂\t\r\n\\"[]-]\\', 'Aé🙂\t\r\n\\"[]--"'],
        ['Aé🙂\t\r\n\\"[]-dd', 'Aé🙂\t\r\n\\"[]-a'],
    ),
    "a dash at the end of a class": ("root ::= [a-c-]+ [+--]", ["a-,", "--", "b+"], ["d+", "a."]),
    "scripts": ("root ::= ([ぁ-ゟ] | [一-龯])+ [。…]?", ["ひらがな漢字。", "漢"], ["abc", "漢。。", "カ"]),
    "repetitions": (
        'root ::= "a"{2} "b"{1,} "c"{0,2} ("d" "e"?){2,3} "f"* [g]+ "h"? "i"{0}',
        ["aabdedg", "aabbccddedffgggh"],
        ["aabdg", "abddg", "aabcccddg", "aabddddg", "aabddgi"],
    ),
    "a repetition of a repetition": (
        'root ::= ("ab"{2}){1,2} [c]+?',
        ["abab", "ababababc", "ababccc"],
        ["ab", "ababab"],
    ),
    "comments and lines": (
        '# 1\r\nroot ::= a | # 2\n  b\n\n# 3\na ::= (\n  "x"\n  # 4\n  "y" |\n  [z]\n)\nb ::= "w" # 5',
        ["xy", "z", "w"],
        ["x", "xyz", ""],
    ),
    "a bar that begins a line": ('root ::= "a"\n  | "b"\n  | root-2\nroot-2 ::= "c"', ["a", "b", "c"], ["ab", ""]),
    "nothing at all": ('root ::= "" | ("")* other\nother ::= "" ""?', [""], ["a"]),
    "calls at the end": ('root ::= "a" root | "b" root | "c"', ["c", "ababc"], ["", "ab", "cc"]),
    "calls at the beginning": ('root ::= root "+" [0-9] | [0-9]', ["1", "1+2+3"], ["+1", "1+", "12"]),
    "calls in the middle": ('root ::= "a" root "a" | "b" root "b" | ""', ["", "abba", "aaaa"], ["aba", "ab"]),
    "calls of each other": (
        'root ::= "a" p? "z"\np ::= "b" root | "c" p',
        ["az", "abazz", "accbabazzz"],
        ["abz", "acz"],
    ),
    "many readings": ('root ::= root root | "a" | "b"?', ["", "a", "abab"], ["c", "ac"]),
    "a way without end is left out": ('root ::= "a" | "b" more\nmore ::= "x" more | "y" more', ["a"], ["b", "bx"]),
    "a rule that can be empty": (
        'root ::= x x root2\nroot2 ::= "(" x root2 ")" | x\nx ::= "a"?',
        ["", "aa(a)", "(a())"],
        ["aaaa", "(aa"],
    ),
}


def after(grammar: Grammar, text: str) -> Matcher | None:
    """The place after the text, None when the grammar does not allow it. Checks and masks must agree on the way."""
    matcher = grammar.matcher()
    for byte in text.encode():
        allowed = matcher.allows(byte)
        assert allowed == matcher.mask()[byte]
        if not allowed:
            return None
        matcher.accept(byte)
    return matcher


def matches(grammar: Grammar, text: str) -> bool:
    matcher = after(grammar, text)
    return matcher is not None and matcher.allows(END)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_grammar_allows_its_texts_and_no_others(name: str) -> None:
    source, good, bad = EXAMPLES[name]
    grammar = GRAMMARS.gbnf(source)
    assert [text for text in good if not matches(grammar, text)] == []
    assert [text for text in bad if matches(grammar, text)] == []


def test_a_way_without_end_is_not_begun() -> None:
    matcher = GRAMMARS.gbnf(EXAMPLES["a way without end is left out"][0]).matcher()
    assert np.flatnonzero(matcher.mask()).tolist() == [ord("a")]


# Random grammars, with all their texts up to a length.

ALPHABET, LONGEST = "abxéè", 4
NAMES = ("root", "p", "q")
Tree = tuple[Any, ...]


def trees(depth: int) -> st.SearchStrategy[Tree]:
    leaf = st.one_of(
        st.tuples(st.just("text"), st.text(ALPHABET, max_size=3)),
        st.tuples(st.just("class"), st.sets(st.sampled_from(ALPHABET), min_size=1, max_size=4)),
        st.tuples(st.just("rule"), st.sampled_from(NAMES)),
    )
    if not depth:
        return leaf
    inner = trees(depth - 1)
    bounds = st.sampled_from([(0, None), (1, None), (0, 1), (2, 2), (1, 3), (2, None), (0, 0)])
    return st.one_of(
        leaf,
        st.tuples(st.just("sequence"), st.lists(inner, min_size=2, max_size=3)),
        st.tuples(st.just("choice"), st.lists(inner, min_size=2, max_size=3)),
        st.tuples(st.just("repeat"), inner, bounds),
        st.tuples(st.just("sequence"), st.tuples(inner, st.tuples(st.just("rule"), st.sampled_from(NAMES)), inner)),
    )


def written(tree: Tree) -> str:
    kind, what = tree[:2]
    if kind == "text":
        return f'"{what}"'
    if kind == "class":
        return f"[{''.join(sorted(what))}]"
    if kind == "rule":
        return str(what)
    if kind == "repeat":
        low, high = tree[2]
        return f"({written(what)}){{{low},{'' if high is None else high}}}"
    return "(" + (" " if kind == "sequence" else " | ").join(map(written, what)) + ")"


def joined(one: set[str], two: set[str]) -> set[str]:
    return {a + b for a in one for b in two if len(a) + len(b) <= LONGEST}


def texts(tree: Tree, known: dict[str, set[str]]) -> set[str]:
    kind, what = tree[:2]
    if kind == "text":
        return {what}
    if kind == "class":
        return set(what)
    if kind == "rule":
        return known[what]
    if kind == "choice":
        return set().union(*(texts(option, known) for option in what))
    if kind == "sequence":
        found = {""}
        for item in what:
            found = joined(found, texts(item, known))
        return found
    item, (low, high) = texts(what, known), tree[2]
    found, so_far = set(), {""}
    for count in range(LONGEST + 4 if high is None else high + 1):
        found |= so_far if count >= low else set()
        so_far = joined(so_far, item)
    return found


def language(rules: dict[str, Tree]) -> set[str]:
    known: dict[str, set[str]] = {name: set() for name in rules}
    while (more := {name: texts(rule, known) for name, rule in rules.items()}) != known:
        known = more
    return {text for text in known["root"] if len(text) <= LONGEST}


def said(grammar: Grammar) -> set[str]:
    """All texts over the alphabet that the grammar allows, by trying."""
    found: set[str] = set()
    todo = [""]
    while todo:
        text = todo.pop()
        matcher = after(grammar, text)
        if matcher is not None:
            found |= {text} if matcher.may_end else set()
            todo += [text + letter for letter in (ALPHABET if len(text) < LONGEST else "")]
    return found


@given(st.fixed_dictionaries({name: trees(3) for name in NAMES}))
@settings(max_examples=300, deadline=None)
def test_a_random_grammar_says_what_enumeration_says(rules: dict[str, Tree]) -> None:
    source = "\n".join(f"{name} ::= {written(rule)}" for name, rule in rules.items())
    expected = language(rules)
    try:
        grammar = GRAMMARS.gbnf(source)
    except InvalidRequest as error:
        assert "no text can match the grammar" in error.message
        assert not expected
        return
    assert said(grammar) == expected


@given(st.fixed_dictionaries({name: trees(2) for name in NAMES}))
@settings(max_examples=60, deadline=None)
def test_single_characters_as_terminals_say_the_same(rules: dict[str, Tree]) -> None:
    source = "\n".join(f"{name} ::= {written(rule)}" for name, rule in rules.items())
    try:
        expected = said(GRAMMARS.gbnf(source))
    except InvalidRequest:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lark, "_LONGEST_REGEX", 0)
        patch.setattr(lark, "_LONGEST", 0)
        assert said(Grammars([*BYTES, b""], frozenset({END})).gbnf(source)) == expected


def test_a_grammar_without_recursion_is_one_terminal_and_strings_are_not_torn_apart() -> None:
    for name in ("scripts", "calls at the end", "calls at the beginning"):
        assert lark.lark_of(EXAMPLES[name][0]).count("\nT") == 1
    text = lark.lark_of(JSON)
    assert text.count("\nT") <= 12, "strings and numbers must stay whole, or masks take thirty times as long"
    assert any(r"\x{22}" in line and "*" in line for line in text.splitlines() if line.startswith("T"))


# llama.cpp itself.


@pytest.fixture(scope="module")
def vocabulary(tiny_model: Path) -> Iterator[tuple[Any, list[bytes], frozenset[int]]]:
    """llama.cpp's vocabulary of the tiny model, the pieces of its tokens, and those that end an answer."""
    api = native().api
    parameters = api.llama_model_default_params()
    parameters.vocab_only = True
    model = api.llama_model_load_from_file(str(tiny_model).encode(), parameters)
    assert model
    vocab = api.llama_model_get_vocab(model)
    buffer = bytearray(256)
    pieces = []
    for token in range(api.llama_vocab_n_tokens(vocab)):
        raw = (api.ctypes.c_char * 256).from_buffer(buffer)
        length = api.llama_token_to_piece(vocab, token, raw, 256, 0, False)
        pieces.append(bytes(buffer[:length]))
    ends = frozenset(token for token in range(len(pieces)) if api.llama_vocab_is_eog(vocab, token))
    yield vocab, [b"" if token in ends else piece for token, piece in enumerate(pieces)], ends
    api.llama_model_free(model)


def allowed_by_llama_cpp(api: Any, sampler: Any, size: int) -> np.ndarray:
    array = (api.llama_token_data * size)(*(api.llama_token_data(token, 0.0, 0.0) for token in range(size)))
    candidates = api.llama_token_data_array(array, size, -1, False)
    api.llama_sampler_apply(sampler, api.ctypes.byref(candidates))
    mask = np.zeros(size, np.bool_)
    mask[[one.id for one in array if one.logit > -np.inf]] = True
    return mask


@pytest.mark.parametrize("name", ["arithmetic", "json", "a program", "scripts", "comments and lines", "repetitions"])
def test_masks_are_those_of_llama_cpp(name: str, vocabulary: tuple[Any, list[bytes], frozenset[int]]) -> None:
    api = native().api
    vocab, pieces, ends = vocabulary
    source = EXAMPLES[name][0]
    grammar = Grammars(pieces, ends).gbnf(source)
    # llama.cpp takes some bytes that cannot begin a character for ones that can, no text for a zero byte, and what can
    # follow half a character only approximately; and it lets control tokens pass. Whole characters are compared.
    whole = [token for token, piece in enumerate(pieces) if token in ends or (is_text(piece) and b"\0" not in piece)]
    assert len(whole) > len(pieces) / 3
    for seed in range(3):
        dice = np.random.default_rng(seed)
        matcher = grammar.matcher()
        sampler = api.llama_sampler_init_grammar(vocab, source.encode(), b"root")
        assert sampler
        for _ in range(12):
            mask = matcher.mask()
            assert (mask[whole] == allowed_by_llama_cpp(api, sampler, len(pieces))[whole]).all()
            going = [token for token in whole if mask[token] and token not in ends]
            if not going:
                break
            token = int(dice.choice(going))
            matcher.accept(token)
            api.llama_sampler_accept(sampler, token)
        api.llama_sampler_free(sampler)


def is_text(piece: bytes) -> bool:
    try:
        return bool(piece.decode())
    except UnicodeDecodeError:
        return False


# Refusals.

REFUSED = {
    "": "no rule named root",
    "root": "line 1, before '': ::= must stand here",
    'root ::= "a': "ends within a text or a character class",
    "root ::= [a": "ends within a text or a character class",
    "root ::= []": "a character class is empty",
    "root ::= [z-a]": "the range 'z'-'a' is upside down",
    r'root ::= "\q"': r"\q is no escape",
    r'root ::= "\u12"': r"\u must be followed by 4 hexadecimal digits",
    r'root ::= "\ud800"': "0xd800 is no character",
    r'root ::= "\U00110000"': "0x110000 is no character",
    "root ::= (": ") must stand here",
    "root ::= * 3": "there is nothing here to repeat",
    'root ::= "a"{3,2}': "a repetition of 3 to 2 times is impossible",
    'root ::= "a"{x}': "a number must stand here",
    'root ::= "a"{2001}': "a repetition may be of 2000 times at most, got 2001",
    'root ::= "a"{0,99999999999999999999}': "a repetition may be of 2000 times at most",
    'root ::= "a"\n\nroot ::= "b"': "line 3, before '::= \"b\"': the rule root is there already",
    "root ::= a b": "the rule root mentions a, which is not there",
    "root ::= root": "no text can match the grammar",
    'root ::= "a" root': "no text can match the grammar",
    "root ::= [^\\x00-\\U0010ffff]": "no text can match the grammar",
    "root ::= <think> .*": "tokens (<...>) are not supported",
    "root ::= !<[12]>": "tokens (<...>) are not supported",
    'root ::= "a" )': "a new line must follow the rule",
    "root ::= " + "(" * 60 + '"a"' + ")" * 60: "parentheses are nested more than 50 deep",
    "\n".join(f'r{n} ::= "a"' for n in range(1001)): "more than 1000 rules",
}


@pytest.mark.parametrize("source", REFUSED)
def test_a_grammar_that_cannot_be_used_is_refused_with_the_reason(source: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        GRAMMARS.gbnf(source)
    assert REFUSED[source] in error.value.message
    assert error.value.param == "grammar"


def test_the_reader_takes_any_text_without_falling_over() -> None:
    pieces = ['root ::= "a"', "::=", '"', "[", "]", "(", ")", "{", "}", "|", "*", "\\", "#", "\n", " x ", "9", ",", "é"]
    dice = np.random.default_rng(0)
    for _ in range(2000):
        source = "".join(dice.choice(pieces, int(dice.integers(1, 12))))
        try:
            GRAMMARS.gbnf(source)
        except InvalidRequest as error:
            assert error.param == "grammar"


CHAIN = "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(60))
HOSTILE = {
    "texts of 2**60 characters": f'root ::= r0\n{CHAIN}\nr60 ::= "a"',
    "the same beside recursion": f'root ::= r0 root "x" | "y"\n{CHAIN}\nr60 ::= [a-z]+',
    "repeated repetitions": 'root ::= ((("a"{0,2000}){0,2000}){0,2000}){0,2000}',
    "repeated repetitions beside recursion": 'root ::= ((("a"{0,2000}){0,2000}){0,2000}){0,2000} root "b" | "c"',
    "2**200 states": 'root ::= [ab]* "a" [ab]{200} "c" root "d" | "e"',
    "all may be missing": "root ::= " + '"a"? ' * 3000,
    "all may be missing, beside recursion": "root ::= " + '"a"? ' * 3000 + 'root "b" | "c"',
    "thousands of classes": "root ::= (" + " | ".join(f"[{chr(500 + 3 * n)}-{chr(507 + 3 * n)}]" for n in range(3000))
    + ')+ root "b" | "c"',
    "readings without number": "root ::= root root root | [a-z] | [a-z] [a-z]",
    "a long chain": "\n".join(f'r{n} ::= r{n - 1} {"[a] " * 12}' for n in range(899, 0, -1))
    + '\nr0 ::= "a"\nroot ::= r899 root "b" | "c"',
    "nested rules": "root ::= r0\n" + "\n".join(f'r{n} ::= (r{n + 1} | "x")+' for n in range(900)) + '\nr900 ::= "a"',
    "free text on both sides": 'root ::= .* "a" .* "b" .* root "c" | .*',
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_comes_to_an_end(name: str) -> None:
    """Without limits most of these take hours or all memory; the time limit leaves room for any machine."""
    try:
        matcher = GRAMMARS.gbnf(HOSTILE[name]).matcher()
        dice = np.random.default_rng(0)
        for _ in range(30):
            allowed = np.flatnonzero(matcher.mask()[:END])
            if not len(allowed):
                break
            matcher.accept(int(dice.choice(allowed)))
    except (InvalidRequest, DeadEnd) as error:
        assert error.param == "grammar"


def test_the_reader_gives_ranges_that_rise_without_surrogates() -> None:
    (rule,) = parse("root ::= [^b-dac]").values()
    assert rule.ranges == ((0, 0x60), (0x65, 0xD7FF), (0xE000, 0x10FFFF))  # type: ignore[attr-defined]
