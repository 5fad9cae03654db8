"""GBNF written anew in the Lark dialect of llguidance, for the same language.

Owns: the cut of a grammar into terminals. Refuses to know: tokens, models, requests.

llguidance reads text as terminals, which its lexer makes as long as it can and never takes back, and a grammar over
them. GBNF has no lexer: every character is a terminal, and all readings are followed at once. Terminals of one
character would say the same, but then a mask over 151,936 tokens takes 14 ms where longer ones take 0.5. So:

1. Rules that call themselves only at their end or only at their beginning become repetitions (`a ::= x a | y` is
   `x* y`).
2. Whatever is left that recurses stays a rule. The longest pieces between that do not become terminals.
3. All terminals are run together as one automaton. Where one of them can end, and what may follow it begins like
   something that another or itself may go on with, the lexer would have to guess: both are cut into smaller pieces.
   (`[a-z]+ "x"`, or `[a-z]` beside `"true"`.) Characters count as alike when their first bytes in UTF-8 are.
4. That is repeated until nothing has to be guessed; terminals of single characters never have to be.

A grammar without recursion becomes a single terminal. Parts that can never be completed are left out, so that no answer
is led into them. (llguidance has a converter too, `gbnf_to_lark`. It cuts by rules, which changes the language of the
two examples above and of others in tests/node/test_engine_gbnf.py.)
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llmnode.engine.automaton import Alphabet, Automaton
from llmnode.engine.gbnf import Alt, Chars, GbnfError, Node, Ref, Repeat, Rules, Seq, children, parse, references

MAX_SYMBOLS = 2000
"""What may be left in the rules beside terminals. For each token the parser keeps a list of places in the rules, which
it searches from the start for each new one: the worst grammar of this size can take two seconds for one token."""
_LONGEST_REGEX = 200_000
"""Of a grammar that is one terminal."""
_LONGEST = 10_000
"""Characters that the terminals among rules may be made of, all repetitions written out; more are cut smaller."""
_DEEPEST = 80
"""Groups in groups in a regular expression; the library takes 250 of all sorts."""
_ROUNDS = 16
_WORK = 2_000_000
"""Symbols that may be looked at to find what holds of which rules."""

EMPTY = Seq(())


@dataclass(frozen=True)
class Term(Node):
    """A terminal: a text that is found by the lexer. It mentions no rule that recurses."""

    text: Node


def lark_of(text: str) -> str:
    """The grammar for llguidance. Raises GbnfError."""
    try:
        rules = completable(without_tail_calls(parse(text)))
        return lark(*_Cutter(rules).cut(), rules)
    except RecursionError:
        raise GbnfError("the grammar's rules are nested too deeply") from None


# Rewriting.


def without_tail_calls(rules: Rules) -> Rules:
    """`a ::= x a | y` as `x* y`, `a ::= a x | y` as `y x*`, which is their meaning also where x and y mention a."""
    return {name: _looped(name, rule) for name, rule in rules.items()}


def completable(rules: Rules) -> Rules:
    """The rules that root needs, without the parts that no text can complete. Raises GbnfError when nothing is left."""
    good = _closure(rules, lambda rule, good: _pruned(rule, good) is not None)
    if "root" not in good:
        raise GbnfError("no text can match the grammar: every way through root is without end")
    kept: Rules = {}
    wanted = ["root"]
    while wanted:
        name = wanted.pop()
        if name not in kept:
            rule = _pruned(rules[name], good)
            assert rule is not None
            kept[name] = rule
            wanted += references(rule)
    return kept


def _options(node: Node) -> Iterator[tuple[Node, ...]]:
    """The ways to read a rule, each a sequence of items."""
    if isinstance(node, Alt):
        for option in node.options:
            yield from _options(option)
    elif isinstance(node, Repeat) and (node.low, node.high) == (0, 1):
        yield ()
        yield from _options(node.item)
    elif isinstance(node, Seq) and len(node.items) == 1:
        yield from _options(node.items[0])
    else:
        yield node.items if isinstance(node, Seq) else (node,)


def _looped(name: str, rule: Node) -> Node:
    options, self = list(_options(rule)), Ref(name)
    for end in (-1, 0):
        calls = [option for option in options if option and option[end] == self]
        if calls:
            others: list[Node] = [Seq(option) for option in options if option not in calls]
            turns: list[Node] = [Seq(option[:-1] if end else option[1:]) for option in calls if len(option) > 1]
            rest, loop = Alt(tuple(others)), Repeat(Alt(tuple(turns)), 0, None) if turns else EMPTY
            return Seq((loop, rest) if end else (rest, loop))
    return rule


def _pruned(node: Node, good: Collection[str]) -> Node | None:
    """The node without what cannot be completed by the good rules alone, None when that is all of it."""
    if isinstance(node, Chars):
        return node if node.ranges else None
    if isinstance(node, Ref):
        return node if node.name in good else None
    parts = [_pruned(child, good) for child in children(node)]
    kept = tuple(part for part in parts if part is not None)
    if isinstance(node, Repeat):
        return Repeat(kept[0], node.low, node.high) if kept and node.high != 0 else None if node.low else EMPTY
    if isinstance(node, Alt):
        return (kept[0] if len(kept) == 1 else Alt(kept)) if kept else None
    return Seq(kept) if len(kept) == len(parts) else None


def _closure(rules: Rules, holds: Callable[[Node, Collection[str]], bool]) -> Collection[str]:
    """The rules of which something holds, given that it holds of those found before: in an order of finding them."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, rule in rules.items():
        for other in set(references(rule)):
            users[other].append(name)
    sizes = {name: _symbols(rule) for name, rule in rules.items()}
    found: dict[str, None] = {}
    todo, work = deque(rules), 0
    while todo:
        name = todo.popleft()
        if name in found:
            continue
        work += sizes[name]
        if work > _WORK:
            raise GbnfError("the grammar's rules depend on each other too much")
        if holds(rules[name], found):
            found[name] = None
            todo += users[name]
    return found


# Cutting into terminals.


class _Measure(NamedTuple):
    """Of a node without recursion: its characters with all repetitions written out, the length of its regular
    expression, and how deep the groups in that are nested."""

    size: int
    length: int
    depth: int


class _Cutter:
    """Finds the largest terminals under which the lexer never has to guess."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._silent = _closure(rules, _is_silent)
        self._measures: dict[str, _Measure] = {}
        for name in _closure(rules, lambda rule, plain: all(other in plain for other in references(rule))):
            measure = self._measure(rules[name])
            assert measure is not None
            self._measures[name] = measure
        self._alphabet = Alphabet(rules.values())

    def cut(self) -> tuple[Rules, list[Node]]:
        """Rules over terminals, and the terminals. Raises GbnfError when there are too many rules left."""
        root = self._rules["root"]
        measure = self._measure(root)
        if measure is not None and measure.length <= _LONGEST_REGEX and measure.depth <= _DEEPEST:
            return {"root": Term(root)}, [root]
        split: set[Node] | None = set()
        for turn in range(_ROUNDS + 1):
            rules, terminals = self._shape(split if turn < _ROUNDS else None)
            symbols = sum(_symbols(rule) for rule in rules.values())
            if symbols > MAX_SYMBOLS:
                raise GbnfError(f"the rules are too many: {symbols} symbols remain of them, the limit is {MAX_SYMBOLS}")
            if split is None or turn == _ROUNDS:
                break
            guessed = self._guessed(rules, terminals)
            if guessed == []:
                break
            split = None if guessed is None else split | set(guessed)
        return rules, terminals

    def _shape(self, split: set[Node] | None) -> tuple[Rules, list[Node]]:
        """The rules with all pieces cut that are in `split`, where None cuts down to single characters; and the
        terminals that they mention."""
        terminals: dict[Node, None] = {}
        rules: Rules = {}
        wanted = ["root"]
        while wanted:
            name = wanted.pop()
            if name not in rules:
                rules[name] = self._cut(self._rules[name], split, terminals)
                wanted += references(rules[name])
        return rules, list(terminals)

    def _cut(self, node: Node, split: set[Node] | None, terminals: dict[Node, None]) -> Node:
        if self._is_whole(node, split):
            terminals[node] = None
            return Term(node)
        if isinstance(node, Alt):
            return Alt(tuple(self._cut(option, split, terminals) for option in node.options))
        if isinstance(node, Repeat):
            return Repeat(self._cut(node.item, split, terminals), node.low, node.high)
        if not isinstance(node, Seq):
            return node
        items: list[Node] = []
        for plain, group in itertools.groupby(node.items, lambda item: self._measure(item) is not None):
            run = tuple(group)
            whole = Seq(run)
            if plain and len(run) > 1 and self._is_whole(whole, split):
                items.append(self._cut(whole, split, terminals))
            else:
                items += [self._cut(item, split, terminals) for item in run]
        return items[0] if len(items) == 1 else Seq(tuple(items))

    def _is_whole(self, node: Node, split: set[Node] | None) -> bool:
        """Whether the node is to be one terminal."""
        if isinstance(node, Chars):
            return True
        measure = self._measure(node)
        fits = measure is not None and 0 < measure.size <= _LONGEST and measure.depth <= _DEEPEST
        return fits and split is not None and node not in split

    def _measure(self, node: Node) -> _Measure | None:
        """None when the node recurses."""
        if isinstance(node, Chars):
            return _Measure(1, len(_regex(node, {})), 0)
        if isinstance(node, Ref):
            return self._measures.get(node.name)
        size, length, depth = 0, 10, 0
        for child in children(node):
            measure = self._measure(child)
            if measure is None:
                return None
            size, length, depth = size + measure.size, length + measure.length, max(depth, measure.depth)
        if isinstance(node, Repeat):
            size *= max(1, node.low, node.high or 0)
        return _Measure(size, length, depth + 1)

    def _guessed(self, rules: Rules, terminals: list[Node]) -> list[Node] | None:
        """Terminals between whose ends the lexer would have to guess. None when there is too much to look at."""
        sizes = [measure.size for terminal in terminals if (measure := self._measure(terminal)) is not None]
        if sum(sizes) > _LONGEST:
            return [terminals[number] for number, size in enumerate(sizes) if size > 1 and 2 * size >= max(sizes)]
        if not terminals:
            return []
        automaton = Automaton(self._rules, terminals, self._alphabet)
        found = automaton.guesses(list(_following(rules, automaton.beginnings, self._silent).values()))
        return None if found is None else [terminals[n] for n in found if not isinstance(terminals[n], Chars)]


def _following(rules: Rules, beginnings: dict[Node, int], silent: Collection[str]) -> dict[Node, int]:
    """Groups of characters that can come after each terminal, whatever surrounds it."""
    first = dict.fromkeys(rules, 0)

    def begins(node: Node) -> int:
        if isinstance(node, Term):
            return beginnings[node.text]
        if isinstance(node, Ref):
            return first[node.name]
        found = 0
        for child in children(node):
            found |= begins(child)
            if isinstance(node, Seq) and not _is_silent(child, silent):
                break
        return found

    before: dict[str, int] = {}
    while before != first:
        before = dict(first)
        for name in reversed(rules):  # root is first, so that most of them come after what they mention
            first[name] = begins(rules[name])
    after, terms = dict.fromkeys(rules, 0), dict.fromkeys(beginnings, 0)

    def walk(node: Node, then: int) -> None:
        if isinstance(node, Term):
            terms[node.text] |= then
        elif isinstance(node, Ref):
            after[node.name] |= then
        elif isinstance(node, Repeat):
            walk(node.item, then | (begins(node.item) if node.high != 1 else 0))
        elif isinstance(node, Alt):
            for option in node.options:
                walk(option, then)
        elif isinstance(node, Seq):
            for item in reversed(node.items):
                walk(item, then)
                then = begins(item) | (then if _is_silent(item, silent) else 0)

    before = {}
    while before != after:
        before = dict(after)
        for name, rule in rules.items():
            walk(rule, after[name])
    return terms


def _is_silent(node: Node, silent: Collection[str]) -> bool:
    """Whether the node can be empty, given the rules that can."""
    if isinstance(node, Term):
        return _is_silent(node.text, silent)
    if isinstance(node, Ref):
        return node.name in silent
    if isinstance(node, Seq):
        return all(_is_silent(item, silent) for item in node.items)
    if isinstance(node, Alt):
        return any(_is_silent(option, silent) for option in node.options)
    return isinstance(node, Repeat) and (node.low == 0 or _is_silent(node.item, silent))


def _symbols(node: Node) -> int:
    return 1 + sum(map(_symbols, children(node)))


# Writing.


def lark(rules: Rules, terminals: list[Node], definitions: Rules) -> str:
    """The grammar as text: `rules` over `terminals`, which may mention `definitions`."""
    numbers: dict[str | Node, str] = {name: f"r{number}" for number, name in enumerate(rules)}
    numbers |= {terminal: f"T{number}" for number, terminal in enumerate(terminals)}
    lines = ['%llguidance {"no_forcing": true}', f"start: {numbers['root']}"]
    lines += [f"{numbers[name]}: {_rule(rule, numbers)}" for name, rule in rules.items()]
    lines += [f"{numbers[terminal]}: /{_regex(terminal, definitions)}/" for terminal in terminals]
    return "\n".join(lines) + "\n"


def _rule(node: Node, numbers: dict[str | Node, str]) -> str:
    if isinstance(node, Term):
        return numbers[node.text]
    if isinstance(node, Ref):
        return numbers[node.name]
    if isinstance(node, Repeat):
        return f"({_rule(node.item, numbers)}){_times(node)}"
    if isinstance(node, Alt):
        return "(" + " | ".join(_rule(option, numbers) for option in node.options) + ")"
    assert isinstance(node, Seq)
    return " ".join(_rule(item, numbers) for item in node.items) or '""'


def _regex(node: Node, definitions: Rules) -> str:
    if isinstance(node, Chars):
        texts = [_point(low) if low == high else f"{_point(low)}-{_point(high)}" for low, high in node.ranges]
        return texts[0] if texts == [_point(node.ranges[0][0])] else f"[{''.join(texts)}]"
    if isinstance(node, Ref):
        return _regex(definitions[node.name], definitions)
    if isinstance(node, Repeat):
        return f"(?:{_regex(node.item, definitions)}){_times(node)}"
    if isinstance(node, Alt):
        return "(?:" + "|".join(_regex(option, definitions) for option in node.options) + ")"
    assert isinstance(node, Seq)
    return "".join(_regex(item, definitions) for item in node.items)


def _point(point: int) -> str:
    return chr(point) if chr(point).isascii() and chr(point).isalnum() else f"\\x{{{point:x}}}"


def _times(node: Repeat) -> str:
    usual = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    return usual.get((node.low, node.high), f"{{{node.low},{'' if node.high is None else node.high}}}")
