"""Which token prefixes are held, and by whom: a radix tree over token ids. Pure.

Owns: the tree. Refuses to know: what a holder is (a resident sequence, an entry in host RAM), cells, clocks.

Each holder stands at the node where its tokens end; a holder shares a prefix with a query as far as their paths run
together. Edges are not copies: they point into the token arrays of holders, at the same positions, since every path
begins at the root. Matching 4,000 tokens takes about 20 us, comparing blocks and not tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

H = TypeVar("H", bound=Hashable)
_BLOCK = 256


class _Node(Generic[H]):
    """Reached by the tokens from `begin` to `end` of `tokens` after its parent's path."""

    __slots__ = ("begin", "children", "end", "holders", "parent", "tokens")

    def __init__(self, parent: _Node[H] | None, tokens: array[int], begin: int, end: int) -> None:
        self.parent, self.tokens, self.begin, self.end = parent, tokens, begin, end
        self.children: dict[int, _Node[H]] = {}
        self.holders: set[H] = set()


class Match(Generic[H]):
    """`length`: the longest prefix of a query that any holder has. The tree must not change while this is used."""

    __slots__ = ("_node", "length")

    def __init__(self, length: int, node: _Node[H]) -> None:
        self.length = length
        self._node = node

    def sharing(self) -> Iterator[H]:
        """Every holder that has all of the `length` tokens."""
        stack = [self._node] if self.length else []
        while stack:
            node = stack.pop()
            yield from node.holders
            stack.extend(node.children.values())

    def ending(self) -> Iterator[tuple[int, H]]:
        """(length, holder) of those whose tokens are a prefix of the query, the longest first."""
        node: _Node[H] | None = self._node
        while node is not None:
            if node.end <= self.length:
                for holder in node.holders:
                    yield node.end, holder
            node = node.parent


class PrefixIndex(Generic[H]):
    """Holders and their tokens. Every method that takes `tokens` uses the array itself: it may grow, not change."""

    def __init__(self) -> None:
        self._root: _Node[H] = _Node(None, array("i"), 0, 0)
        self._at: dict[H, _Node[H]] = {}

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, holder: H) -> bool:
        return holder in self._at

    def length(self, holder: H) -> int:
        return self._at[holder].end

    def insert(self, holder: H, tokens: array[int], length: int) -> None:
        """`holder`, which is not in it, has the first `length` of `tokens`."""
        self._put(holder, self._root, tokens, length)

    def move(self, holder: H, tokens: array[int], length: int) -> None:
        """`holder` has the first `length` of `tokens` now, more or less than before or others."""
        node = self._at[holder]
        own_leaf = node is not self._root and len(node.holders) == 1 and not node.children
        if own_leaf and node.tokens is tokens and length >= node.end:
            node.end = length
            return
        self.remove(holder)
        self.insert(holder, tokens, length)

    def remove(self, holder: H) -> None:
        """Forget `holder`, and the branch that nobody else needs."""
        node = self._at.pop(holder)
        node.holders.discard(holder)
        while node.parent is not None and not node.holders:
            parent = node.parent
            if len(node.children) > 1:
                return
            if node.children:
                (child,) = node.children.values()
                child.begin, child.parent = node.begin, parent
                parent.children[node.tokens[node.begin]] = child
                return
            del parent.children[node.tokens[node.begin]]
            node = parent

    def match(self, tokens: array[int], limit: int) -> Match[H]:
        """The longest prefix of the first `limit` tokens that any holder has. Changes nothing."""
        node, depth = self._root, 0
        while depth < limit:
            child = node.children.get(tokens[depth])
            if child is None:
                break
            node = child
            end = min(child.end, limit)
            depth += common(child.tokens, tokens, depth, end)
            if depth < child.end:
                break
        return Match(depth, node)

    def check_integrity(self) -> str:
        """Walk the whole tree. Returns what is wrong, or nothing."""
        found = 0
        stack = [self._root]
        while stack:
            node = stack.pop()
            found += len(node.holders)
            if any(self._at.get(holder) is not node for holder in node.holders):
                return "a prefix is held by somebody who does not know of it"
            if node is not self._root and not node.holders and len(node.children) < 2:
                return f"the prefix of {node.end} tokens is held by nobody"
            for first, child in node.children.items():
                if child.parent is not node or child.begin != node.end or not child.begin < child.end:
                    return f"the tree is torn below {node.end} tokens"
                if child.tokens[child.begin] != first:
                    return f"the branch of token {first} at {node.end} begins with another"
                stack.append(child)
        return "" if found == len(self._at) else f"{len(self._at)} prefixes are known, {found} are in the tree"

    def _put(self, holder: H, node: _Node[H], tokens: array[int], length: int) -> None:
        while node.end < length:
            depth = node.end
            child = node.children.get(tokens[depth])
            if child is None:
                child = _Node(node, tokens, depth, length)
                node.children[tokens[depth]] = child
            else:
                same = depth + common(child.tokens, tokens, depth, min(child.end, length))
                if same < child.end:
                    child = self._split(child, same)
            node = child
        node.holders.add(holder)
        self._at[holder] = node

    def _split(self, node: _Node[H], at: int) -> _Node[H]:
        """A new node in the middle of the edge to `node`."""
        parent = node.parent
        assert parent is not None
        middle = _Node(parent, node.tokens, node.begin, at)
        parent.children[node.tokens[node.begin]] = middle
        middle.children[node.tokens[at]] = node
        node.parent, node.begin = middle, at
        return middle


def common(a: array[int], b: array[int], begin: int, end: int) -> int:
    """How many tokens from `begin` on are the same in both, up to `end`. Blocks are compared as a whole."""
    at = begin
    while at < end:
        stop = min(at + _BLOCK, end)
        if a[at:stop] != b[at:stop]:
            while at < stop and a[at] == b[at]:
                at += 1
            break
        at = stop
    return at - begin
