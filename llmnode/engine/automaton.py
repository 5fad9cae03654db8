"""Terminals of a grammar read together, to find where a lexer that takes the longest text would have to guess.

Owns: Glushkov's construction over groups of characters, and the walk through its sets of positions. Refuses to know:
rules that recurse, tokens, llguidance.

Sets (of groups, of positions, of bytes) are the bits of a number: a union is an `|`, and nothing else is needed.
"""

from __future__ import annotations

import functools
import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from llmnode.engine.gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, children

_WORK = 500_000
"""How much is looked at, in steps of about a microsecond."""

Part = tuple[bool, int, int]
"""Of a piece of a terminal: whether it can be empty, and the positions that it can begin and end with."""


class Alphabet:
    """All characters in as few groups as the grammar can tell apart; a set of groups is the bits of a number."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        ranges = {r for node in nodes for chars in _chars(node) for r in chars.ranges}
        self._edges = sorted({edge for low, high in ranges for edge in (low, high + 1)})
        self._groups: dict[Chars, int] = {}
        self._leads: dict[int, int] = {}

    def groups(self, chars: Chars) -> int:
        if chars not in self._groups:
            places = ((bisect_left(self._edges, low), bisect_left(self._edges, high + 1)) for low, high in chars.ranges)
            self._groups[chars] = sum((1 << end) - (1 << start) for start, end in places)
        return self._groups[chars]

    def leads(self, groups: int) -> int:
        """The first bytes in UTF-8 of the characters, as the bits of a number."""
        if groups not in self._leads:
            ends = ((self._edges[at], self._edges[at + 1] - 1) for at in _bits(groups))
            self._leads[groups] = functools.reduce(
                operator.or_, ((2 << _lead(high)) - (1 << _lead(low)) for low, high in ends), 0
            )
        return self._leads[groups]


class Automaton:
    """All terminals read together, as Glushkov's automaton: a state is the set of characters that may have been read
    last. Sets are the bits of a number."""

    def __init__(self, rules: Rules, terminals: list[Node], alphabet: Alphabet) -> None:
        self._rules, self._alphabet = rules, alphabet
        self._read: list[int] = []  # groups of each position
        self._next: list[int] = []  # positions after each
        self._own: list[int] = []  # positions of each terminal
        self._ends: list[int] = []
        self._work = 0
        self._starts: list[int] = []
        for terminal in terminals:
            before = len(self._read)
            _, first, last = self._build(terminal)
            self._own.append((1 << len(self._read)) - (1 << before))
            self._starts.append(first)
            self._ends.append(last)
        self._alike: dict[int, int] = {}
        for position, groups in enumerate(self._read):
            self._alike[groups] = self._alike.get(groups, 0) | 1 << position
        self._led = [(alphabet.leads(groups), alike) for groups, alike in self._alike.items()]
        self.beginnings = {text: self._groups(first) for text, first in zip(terminals, self._starts, strict=True)}
        """Groups that each terminal can begin with."""

    def guesses(self, following: list[int]) -> set[int] | None:
        """Terminals that can end where they, or others, can also go on as `following` (groups that may come after each)
        does. None when there is too much to look at."""
        found: set[int] = set()
        seen: set[int] = set()
        todo = [functools.reduce(operator.or_, self._starts)]
        ends = functools.reduce(operator.or_, self._ends)
        while todo and self._work <= _WORK:
            for state in set(self._steps(todo.pop())) - seen:
                if self._work > _WORK:
                    return None
                seen.add(state)
                self._work += state.bit_count()
                after = functools.reduce(operator.or_, (self._next[at] for at in _bits(state)), 0)
                if after and state & ends:
                    found |= self._clashes(state, after, following)
                if after:
                    todo.append(after)
        return found if self._work <= _WORK else None

    def _clashes(self, state: int, after: int, following: list[int]) -> set[int]:
        leads = self._alphabet.leads
        going = leads(self._groups(after))
        self._work += len(self._alike) + len(self._ends)
        found: set[int] = set()
        for number, ends in enumerate(self._ends):
            come = leads(following[number]) if ends & state else 0
            if come & going:
                self._work += len(self._alike) + len(self._own)
                rivals = sum(alike & after for lead, alike in self._led if lead & come)
                found |= {number} | {other for other, own in enumerate(self._own) if own & rivals}
        return found

    def _steps(self, ways: int) -> list[int]:
        """The states that one more character can lead to; not all of them, once there has been too much to look at."""
        blocks: list[tuple[int, int]] = []
        for groups, alike in self._alike.items():
            self._work += 1 + len(blocks)
            if self._work > _WORK:
                break
            positions, rest = alike & ways, groups
            if not positions:
                continue
            parted: list[tuple[int, int]] = []
            for block, state in blocks:
                if block & rest:
                    parted.append((block & rest, state | positions))
                if block & ~rest:
                    parted.append((block & ~rest, state))
                rest &= ~block
            blocks = [*parted, (rest, positions)] if rest else parted
        return [state for _, state in blocks]

    def _groups(self, positions: int) -> int:
        return functools.reduce(operator.or_, (groups for groups, alike in self._alike.items() if alike & positions), 0)

    def _build(self, node: Node) -> Part:
        """Whether the node can be empty, and the positions it can begin and end with."""
        if isinstance(node, Chars):
            self._read.append(self._alphabet.groups(node))
            self._next.append(0)
            here = 1 << len(self._read) - 1
            return False, here, here
        if isinstance(node, Ref):
            return self._build(self._rules[node.name])
        whole = (True, 0, 0)
        if isinstance(node, Seq):
            for item in node.items:
                whole = self._joined(whole, self._build(item))
        elif isinstance(node, Alt):
            parts = [self._build(option) for option in node.options]
            first = functools.reduce(operator.or_, (part[1] for part in parts))
            last = functools.reduce(operator.or_, (part[2] for part in parts))
            whole = (any(part[0] for part in parts), first, last)
        elif isinstance(node, Repeat):
            looped = node.high is None
            for _ in range(max(0, node.low - looped)):
                whole = self._joined(whole, self._build(node.item))
            rest = (True, 0, 0)
            if looped:
                silent, first, last = self._build(node.item)
                self._link(last, first)
                rest = (silent or not node.low, first, last)
            for _ in range(0 if node.high is None else node.high - node.low):
                rest = (True, *self._joined(self._build(node.item), rest)[1:])
            whole = self._joined(whole, rest)
        return whole

    def _joined(self, one: Part, two: Part) -> Part:
        self._link(one[2], two[1])
        return one[0] and two[0], one[1] | two[1] * one[0], two[2] | one[2] * two[0]

    def _link(self, ends: int, starts: int) -> None:
        self._work += ends.bit_count()
        if self._work > _WORK:
            return  # `guesses` will say so
        for position in _bits(ends):
            self._next[position] |= starts


def _chars(node: Node) -> Iterator[Chars]:
    if isinstance(node, Chars):
        yield node
    for child in children(node):
        yield from _chars(child)


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def _lead(point: int) -> int:
    """The first byte of a character in UTF-8."""
    return chr(point).encode(errors="surrogatepass")[0]
