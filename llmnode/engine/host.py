"""Sequences in host RAM: prefixes that the cache had no room for, and answers that had to give way. Pure.

Owns: the saved cells, their byte budget, and which goes when it is full (the one unused for longest). Refuses to know:
how cells are saved and loaded, which sequences run. Losing an entry costs time, never an answer: whoever counted on it
computes its tokens again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from llmnode.engine.backend import Saved
from llmnode.engine.prefix import Match, PrefixIndex

_OVERHEAD = 512
"""Bytes that an entry takes beside its cells, about: token ids are added to this."""


@dataclass(eq=False, slots=True)
class Entry:
    """The first `length` of `tokens`, and their cells. tag: `Ask.tag` of whose they are, None when nobody knows."""

    tokens: array[int]
    length: int
    saved: Saved
    tag: object = None

    @property
    def size(self) -> int:
        return len(self.saved) + 4 * self.length + _OVERHEAD


class HostCache:
    """At most `budget` bytes of saved sequences; 0 keeps none."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.size = 0
        self._index: PrefixIndex[Entry] = PrefixIndex()
        self._entries: dict[Entry, None] = {}  # in order of last use

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._entries

    def __iter__(self) -> Iterator[Entry]:
        """Entries, the one used last first."""
        return reversed(self._entries)

    def has(self, tokens: array[int], length: int) -> bool:
        """Whether an entry holds all of these tokens; it counts as used now."""
        same = self._index.match(tokens, length)
        longer = next(same.sharing(), None) if same.length == length else None
        if longer is not None:
            self.touch(longer)
        return longer is not None

    def put(self, tokens: array[int], length: int, saved: Saved, *, extends: bool = True, tag: object = None) -> bool:
        """Keep a sequence, at the price of those unused for longest. False when it alone is over the budget.

        extends: whether it makes entries whose tokens it begins with superfluous (not so for recurrent state).
        """
        entry = Entry(tokens, length, saved, tag)
        if not saved or entry.size > self.budget:
            return False
        same = self._index.match(tokens, length)
        for held, old in list(same.ending()):
            if extends or held == length:
                self.remove(old)
        while self.size + entry.size > self.budget:
            self.remove(next(iter(self._entries)))
        self._entries[entry] = None
        self._index.insert(entry, tokens, length)
        self.size += entry.size
        return True

    def match(self, tokens: array[int], limit: int) -> Match[Entry]:
        """Who has the longest prefix of the first `limit` tokens."""
        return self._index.match(tokens, limit)

    def touch(self, entry: Entry) -> None:
        """It was used now."""
        del self._entries[entry]
        self._entries[entry] = None

    def remove(self, entry: Entry) -> None:
        del self._entries[entry]
        self._index.remove(entry)
        self.size -= entry.size

    def check_integrity(self) -> str:
        """Compare the cache with itself. Returns what is wrong, or nothing."""
        due = sum(entry.size for entry in self._entries)
        if due != self.size or due > self.budget:
            return f"{self.size} of {self.budget} bytes are counted in host RAM, its entries have {due}"
        return self._index.check_integrity()
