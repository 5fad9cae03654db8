"""The account of KV cells: which sequences hold them, how many are free. Pure.

Owns: the count. Refuses to know: tokens, the backend, who is running. llama.cpp tells nobody how full its cache is, so
this account is the only truth there is; `Memory.check_integrity` compares it with what the backend says of lengths.

The cells of a sequence are a list of spans. A span is cells that the same sequences hold: sharing a prefix splits the
span at its end, and the front part gains a holder. So cells are counted once however many sequences share them, and
dropping a sequence frees just the spans that nobody else holds.
"""

from __future__ import annotations

from collections.abc import Iterable


class _Span:
    __slots__ = ("holders", "length")

    def __init__(self, length: int, holders: set[int]) -> None:
        self.length = length
        self.holders = holders


class Cells:
    """`total` cells. Sequences are numbers; one that was never mentioned has none."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._spans: dict[int, list[_Span]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def free(self) -> int:
        return self.total - self.used

    def length(self, seq: int) -> int:
        """Cells in which the sequence has its tokens, shared ones too."""
        return self._lengths.get(seq, 0)

    def grow(self, seq: int, count: int) -> None:
        """The sequence takes `count` cells for itself."""
        spans = self._spans.setdefault(seq, [])
        if spans and len(spans[-1].holders) == 1:
            spans[-1].length += count
        elif count:
            spans.append(_Span(count, {seq}))
        self._lengths[seq] = self._lengths.get(seq, 0) + count
        self.used += count

    def share(self, source: int, target: int, length: int) -> None:
        """`target`, which has none, holds the first `length` cells of `source` too. Takes no cell."""
        spans = self._spans.setdefault(source, [])
        taken = spans[: self._border(source, length)]
        for span in taken:
            span.holders.add(target)
        self._spans[target] = list(taken)
        self._lengths[target] = length

    def cut(self, seq: int, length: int) -> int:
        """The sequence lets go of its cells from `length` on. Returns how many came free."""
        spans = self._spans.get(seq, [])
        at = self._border(seq, length)
        freed = 0
        for span in spans[at:]:
            span.holders.discard(seq)
            if not span.holders:
                freed += span.length
        del spans[at:]
        self._lengths[seq] = length
        self.used -= freed
        return freed

    def drop(self, seq: int) -> int:
        """The sequence lets go of all its cells. Returns how many came free."""
        freed = self.cut(seq, 0)
        self._spans.pop(seq, None)
        self._lengths.pop(seq, None)
        return freed

    def private(self, seq: int) -> int:
        """How many cells `drop` would free."""
        return sum(span.length for span in self._spans.get(seq, ()) if len(span.holders) == 1)

    def held_by(self, seqs: Iterable[int]) -> int:
        """Cells that at least one of these sequences holds."""
        spans = {id(span): span.length for seq in seqs for span in self._spans.get(seq, ())}
        return sum(spans.values())

    def check_integrity(self) -> str:
        """Compare the account with itself. Returns what is wrong, or nothing."""
        seen: dict[int, _Span] = {}
        for seq, spans in self._spans.items():
            if sum(span.length for span in spans) != self._lengths.get(seq, 0):
                return f"the spans of sequence {seq} do not add up to its {self._lengths.get(seq, 0)} cells"
            for span in spans:
                if seq not in span.holders:
                    return f"sequence {seq} holds a span that does not know of it"
                seen[id(span)] = span
        if any(span not in self._spans.get(seq, ()) for span in seen.values() for seq in span.holders):
            return "a span is said to be held by a sequence that does not have it"
        due = sum(span.length for span in seen.values())
        return "" if due == self.used else f"{self.used} cells are counted as used, {due} are held"

    def _border(self, seq: int, length: int) -> int:
        """The index of the span that begins at `length`, after splitting the one across it for all its holders."""
        spans = self._spans.get(seq, [])
        begin = 0
        for index, span in enumerate(spans):
            if begin >= length:
                return index
            if begin + span.length > length:
                front = _Span(length - begin, set(span.holders))
                span.length -= front.length
                for holder in span.holders:
                    others = self._spans[holder]
                    others.insert(others.index(span), front)
                return index + 1
            begin += span.length
        return len(spans)
