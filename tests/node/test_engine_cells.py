"""The account of cells against a set of every single cell."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmnode.engine.cells import Cells

SEQS = st.integers(0, 5)


class AgainstSets(RuleBasedStateMachine):
    """The model gives each cell a name and each sequence the list of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(10_000)
        self.held: dict[int, list[int]] = {seq: [] for seq in range(6)}
        self.names = itertools.count()

    @rule(seq=SEQS, count=st.integers(0, 9))
    def grow(self, seq: int, count: int) -> None:
        self.cells.grow(seq, count)
        self.held[seq] += itertools.islice(self.names, count)

    @rule(source=SEQS, heir=SEQS, data=st.data())
    def share(self, source: int, heir: int, data: st.DataObject) -> None:
        if self.held[heir] or source == heir:
            return
        length = data.draw(st.integers(0, len(self.held[source])))
        self.cells.share(source, heir, length)
        self.held[heir] = self.held[source][:length]

    @rule(seq=SEQS, data=st.data())
    def cut(self, seq: int, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.held[seq])))
        others = {cell for other, held in self.held.items() if other != seq for cell in held}
        freed = len(set(self.held[seq][length:]) - others)
        assert self.cells.cut(seq, length) == freed
        del self.held[seq][length:]

    @rule(seq=SEQS)
    def drop(self, seq: int) -> None:
        others = {cell for other, held in self.held.items() if other != seq for cell in held}
        freed = len(set(self.held[seq]) - others)
        assert self.cells.private(seq) == freed
        assert self.cells.drop(seq) == freed
        self.held[seq] = []

    @rule(some=st.sets(SEQS))
    def held_by(self, some: set[int]) -> None:
        assert self.cells.held_by(some) == len({cell for seq in some for cell in self.held[seq]})

    @invariant()
    def agrees(self) -> None:
        assert self.cells.check_integrity() == ""
        assert self.cells.used == len({cell for held in self.held.values() for cell in held})
        assert self.cells.free == 10_000 - self.cells.used
        assert all(self.cells.length(seq) == len(held) for seq, held in self.held.items())


AgainstSets.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_cells_are_counted_as_a_set_of_each_would_be = AgainstSets.TestCase


def test_a_wrong_account_is_noticed() -> None:
    cells = Cells(100)
    cells.grow(0, 10)
    cells.share(0, 1, 5)
    assert cells.check_integrity() == ""
    cells.used += 1
    assert "11 cells are counted as used, 10 are held" in cells.check_integrity()
