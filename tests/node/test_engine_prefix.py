"""The prefix index against a list of everything that was put into it."""

from __future__ import annotations

from array import array

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmnode.engine.prefix import PrefixIndex, common

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def shared(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


class AgainstAList(RuleBasedStateMachine):
    """Holders are numbers; the model is a dictionary of their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.index: PrefixIndex[int] = PrefixIndex()
        self.arrays: dict[int, array[int]] = {}
        self.held: dict[int, list[int]] = {}
        self.next = 0

    @rule(tokens=TOKENS, more=TOKENS)
    def insert(self, tokens: list[int], more: list[int]) -> None:
        """The array goes on beyond what is held, as a running sequence's does."""
        self.arrays[self.next] = array("i", tokens + more)
        self.index.insert(self.next, self.arrays[self.next], len(tokens))
        self.held[self.next] = tokens
        self.next += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def move_along_its_array(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.held)))
        length = data.draw(st.integers(0, len(self.arrays[holder])))
        self.index.move(holder, self.arrays[holder], length)
        self.held[holder] = self.arrays[holder][:length].tolist()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=TOKENS)
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        """Arrays grow while the index points into them."""
        holder = data.draw(st.sampled_from(sorted(self.held)))
        self.arrays[holder].extend(tokens)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.held)))
        self.index.remove(holder)
        del self.held[holder], self.arrays[holder]

    @rule(tokens=TOKENS, data=st.data())
    def match(self, tokens: list[int], data: st.DataObject) -> None:
        limit = data.draw(st.integers(0, len(tokens)))
        query = tokens[:limit]
        found = self.index.match(array("i", tokens), limit)
        longest = max((shared(query, held) for held in self.held.values()), default=0)
        assert found.length == longest
        if longest:
            assert sorted(found.sharing()) == sorted(
                h for h, held in self.held.items() if held[:longest] == query[:longest]
            )
        else:
            assert not list(found.sharing())
        ending = [(len(held), holder) for holder, held in self.held.items() if held == query[: len(held)]]
        assert sorted(found.ending()) == sorted(ending)
        lengths = [length for length, _ in found.ending()]
        assert lengths == sorted(lengths, reverse=True)

    @invariant()
    def is_whole(self) -> None:
        assert self.index.check_integrity() == ""
        assert len(self.index) == len(self.held)
        assert all(self.index.length(holder) == len(held) for holder, held in self.held.items())


AgainstAList.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_the_index_finds_what_a_list_of_everything_finds = AgainstAList.TestCase


def test_common_prefixes_are_found_across_blocks() -> None:
    for length in (0, 1, 255, 256, 257, 1000):
        a, b = array("i", range(1000)), array("i", range(1000))
        if length < 1000:
            b[length] = -1
        assert common(a, b, 0, 1000) == length
        assert common(a, b, min(length, 3), 1000) == length - min(length, 3)


def test_a_torn_tree_is_noticed() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.insert("a", array("i", [1, 2, 3]), 3)
    index.insert("b", array("i", [1, 2, 4]), 3)
    index._at["a"].holders.discard("a")
    assert index.check_integrity() != ""
