"""GBNF, llama.cpp's grammar notation, read into trees.

Owns: the notation, as llama.cpp's grammars/README.md has it, and its parser where that is silent. Refuses to know: what
is done with a grammar. Tokens in a grammar (`<think>`) are refused: here a grammar is about characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_REPEATS = 2000
"""The largest bound of a repetition, as in llama.cpp; which takes a larger upper bound for none, we refuse it."""
MAX_NESTING = 50
MAX_RULES = 1000

_TOP = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER = re.compile(r"[0-9]+")
_PLAIN_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}

Range = tuple[int, int]


class GbnfError(ValueError):
    """The grammar cannot be used. The message names the line or the rule, and what is wrong with it."""


class Node:
    """A piece of a grammar; it stands for the texts that can be said by it."""


@dataclass(frozen=True)
class Chars(Node):
    """One character out of ranges of code points: rising, apart, and without surrogates, which text cannot hold."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Seq(Node):
    """One after the other. Without items: the empty text."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Alt(Node):
    """One of several."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat(Node):
    """`item`, `low` to `high` times; None is without end."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Ref(Node):
    """What the rule of that name says."""

    name: str


Rules = dict[str, Node]


def parse(text: str) -> Rules:
    """The rules by name, in their order. Raises GbnfError, RecursionError where they nest too deeply."""
    return _Parser(text).rules()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def rules(self) -> Rules:
        rules: Rules = {}
        self._space(True)
        while self._at < len(self._text):
            name = self._name()
            self._space(False)
            if name in rules:
                raise self._wrong(f"the rule {name} is there already")
            self._expect("::=")
            self._space(True)
            rules[name] = self._alternatives(False)
            if self._peek() not in ("", "\r", "\n"):
                raise self._wrong("a new line must follow the rule")
            self._space(True)
            if len(rules) > MAX_RULES:
                raise GbnfError(f"the grammar has more than {MAX_RULES} rules")
        if "root" not in rules:
            raise GbnfError("the grammar has no rule named root, where it would begin")
        for name, rule in rules.items():
            for other in references(rule):
                if other not in rules:
                    raise GbnfError(f"the rule {name} mentions {other}, which is not there")
        return rules

    def _alternatives(self, nested: bool) -> Node:
        options = [self._sequence(nested)]
        while self._bar(nested):
            self._space(True)
            options.append(self._sequence(nested))
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def _bar(self, nested: bool) -> bool:
        """Whether an alternative follows; its bar may begin a line of its own, since no rule can begin with one."""
        before = self._at
        self._space(True)
        if self._peek() == "|":
            self._at += 1
            return True
        if not nested:
            self._at = before
        return False

    def _sequence(self, nested: bool) -> Node:
        items: list[Node] = []
        while (item := self._item()) is not None:
            self._space(nested)
            while (bounds := self._bounds()) is not None:
                item = Repeat(item, *bounds)
                self._space(nested)
            items.append(item)
        return items[0] if len(items) == 1 else Seq(tuple(items))

    def _item(self) -> Node | None:
        here = self._peek()
        if here == '"':
            return self._literal()
        if here == "[":
            return self._class()
        if here == ".":
            self._at += 1
            return Chars(inverted([]))
        if here == "(":
            self._depth += 1
            if self._depth > MAX_NESTING:
                raise self._wrong(f"parentheses are nested more than {MAX_NESTING} deep")
            self._at += 1
            self._space(True)
            inner = self._alternatives(True)
            self._expect(")")
            self._depth -= 1
            return inner
        if here in ("<", "!"):
            raise self._wrong("tokens (<...>) are not supported, only characters")
        if here in ("*", "+", "?", "{"):
            raise self._wrong("there is nothing here to repeat")
        return Ref(self._name()) if _NAME.match(here) else None

    def _literal(self) -> Node:
        self._at += 1
        items = []
        while self._peek() != '"':
            point = self._character()
            items.append(Chars(((point, point),)))
        self._at += 1
        return items[0] if len(items) == 1 else Seq(tuple(items))

    def _class(self) -> Node:
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[Range] = []
        while self._peek() != "]":
            low = high = self._character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._character()
            if low > high:
                raise self._wrong(f"the range {chr(low)!r}-{chr(high)!r} is upside down")
            ranges.append((low, high))
        self._at += 1
        if not ranges:
            raise self._wrong("a character class is empty")
        others = inverted(ranges)
        return Chars(others if negated else inverted(others))

    def _character(self) -> int:
        here = self._peek()
        self._at += 1
        if here == "":
            raise GbnfError("the grammar ends within a text or a character class")
        if here == "\\":
            kind = self._peek()
            self._at += 1
            if kind in _HEX_ESCAPES:
                digits = self._text[self._at : self._at + _HEX_ESCAPES[kind]]
                if not re.fullmatch(f"[0-9a-fA-F]{{{_HEX_ESCAPES[kind]}}}", digits):
                    raise self._wrong(f"\\{kind} must be followed by {_HEX_ESCAPES[kind]} hexadecimal digits")
                self._at += len(digits)
                point = int(digits, 16)
            elif kind in _PLAIN_ESCAPES:
                point = ord(_PLAIN_ESCAPES[kind])
            else:
                raise self._wrong(f"\\{kind} is no escape")
        else:
            point = ord(here)
        if point > _TOP or _SURROGATES[0] <= point <= _SURROGATES[1]:
            raise self._wrong(f"{point:#x} is no character")
        return point

    def _bounds(self) -> tuple[int, int | None] | None:
        here = self._peek()
        if here in ("*", "+", "?"):
            self._at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[here]
        if here != "{":
            return None
        self._at += 1
        self._space(True)
        low = self._count()
        high: int | None = low
        self._space(True)
        if self._peek() == ",":
            self._at += 1
            self._space(True)
            high = self._count() if self._peek() != "}" else None
            self._space(True)
        self._expect("}")
        if high is not None and high < low:
            raise self._wrong(f"a repetition of {low} to {high} times is impossible")
        return low, high

    def _count(self) -> int:
        number = _NUMBER.match(self._text, self._at)
        if number is None:
            raise self._wrong("a number must stand here")
        self._at = number.end()
        if len(number[0]) > 9 or int(number[0]) > MAX_REPEATS:
            raise self._wrong(f"a repetition may be of {MAX_REPEATS} times at most, got {number[0][:9]}")
        return int(number[0])

    def _name(self) -> str:
        name = _NAME.match(self._text, self._at)
        if name is None:
            raise self._wrong("the name of a rule must stand here")
        self._at = name.end()
        return name[0]

    def _space(self, lines: bool) -> None:
        while (here := self._peek()) and (here in " \t#" or (lines and here in "\r\n")):
            if here == "#":
                while self._peek() not in ("", "\r", "\n"):
                    self._at += 1
            else:
                self._at += 1

    def _expect(self, what: str) -> None:
        if not self._text.startswith(what, self._at):
            raise self._wrong(f"{what} must stand here")
        self._at += len(what)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _wrong(self, what: str) -> GbnfError:
        before, after = self._text[: self._at], self._text[self._at : self._at + 20]
        return GbnfError(f"line {before.count(chr(10)) + 1}, before {after!r}: {what}")


def inverted(ranges: list[Range] | tuple[Range, ...]) -> tuple[Range, ...]:
    """All characters but these."""
    left, start = [], 0
    for low, high in [*sorted([*ranges, _SURROGATES]), (_TOP + 1, _TOP + 1)]:
        if start < low:
            left.append((start, low - 1))
        start = max(start, high + 1)
    return tuple(left)


def references(node: Node) -> Iterator[str]:
    """The names of the rules that the node mentions."""
    if isinstance(node, Ref):
        yield node.name
    for child in children(node):
        yield from references(child)


def children(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Seq):
        return node.items
    if isinstance(node, Alt):
        return node.options
    return (node.item,) if isinstance(node, Repeat) else ()
