"""Where each sequence's cells are: running, idle in the cache, or saved in host RAM.

Owns: the numbers of sequences in the backend, the account of cells, the index of resident prefixes, and the host cache.
Every change of the backend's sequences goes through here, so that the account and the backend cannot drift apart.
Refuses to know: what is drawn, who asked, and whose turn it is: scheduler.py decides, this carries it out.

An answer that has ended leaves its cells behind as an idle prefix, and so does a prompt whose client left. A sequence
that comes in goes on from the longest prefix that anybody has, in this order:

1. An idle prefix that it uses whole is taken over: the same number goes on.
2. Part of an idle one, or of a running sequence, is shared: its cells get one more holder, and nothing is copied.
3. A saved one is loaded, when that gains enough beyond what is resident.
4. While another sequence computes a longer common prefix just now, it follows that one and shares when it is there.

Cells come free in this order: idle prefixes, the one unused for longest first (each goes to host RAM while that has
room), then whatever the scheduler gives up. Idle prefixes are not free even where there is room: attention passes over
all cells up to the highest one in use, 13% of a step for each 1,000 idle cells (8 sequences of a 15M model on one
core), and cells of an answer that begins above them stay high for all its life. So before a sequence gets cells of its
own, the idle prefixes that it does not use leave for host RAM, as many as take `Memory.COPY_S`; the rest, and those
that became idle beside others, go after _IDLE_TOKENS. Saving has its price too: llama.cpp copies each run of
cells by itself, in each layer (and, without flash attention, for each value), and the cells of answers that ran side by
side lie one by one. What would take longer to save and load than _CHANCE of what it takes to compute again is dropped
instead, and of the latter counts only what host RAM does not have yet. Both are measured: so it is with the smallest
models only.

In a parted cache (`Room.unified` off) each sequence has a part of its own. Nobody's cells are in another one's way
there and there is always room, so nothing above about making room applies; what is scarce is numbers of sequences. A
prefix is shared by copying it, where that is quicker than computing it. And answers whose numbers do not follow each
other are computed in several passes over the weights: so when a gap stays open for _GAP_STEPS, the highest answer
moves down into it.

Where a long sequence does not stand for its prefixes (recurrent state cannot be cut, a sliding window has lost what it
saw earlier), a prefix is used whole, and a checkpoint is kept of each prompt, one token before its end: there the same
prompt, or another choice of it, can go on.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llmnode.engine.backend import Backend
from llmnode.engine.cells import Cells
from llmnode.engine.host import Entry, HostCache
from llmnode.engine.prefix import PrefixIndex
from llmnode.engine.rates import Rate
from llmnode.engine.sequence import NOWHERE, Sequence

_WORTH_KEEPING = 16
"""Tokens: a shorter prefix is computed again sooner than found."""
_WORTH_WAITING = 32
"""Tokens of a common prefix for which a sequence waits while another computes them."""
_LAG = 64
"""Answer tokens that a running sequence may have beyond what the index knows of it."""
_IDLE_TOKENS = 512
_HOLES = 1024
"""Cells: fewer free ones below running sequences cost less than moving these down."""
_GAP_STEPS = 4
"""Steps for which a gap between running sequences may stay: somebody who waits may be about to fill it."""
_CHANCE = 0.5
"""That a saved prefix is asked for again, for all we know."""
_BYTES_PER_S, _LOOSE_S = 1e9, 10e-6
"""What copying costs before it was measured: bytes a second, and seconds for a token that was computed by itself."""
_TOGETHER = 8
"""Tokens computed in one step of which it can be said that their cells lie together."""
_LOOK_AT = 16
"""Holders of one prefix that are looked at; any will do in most models."""


@dataclass(eq=False, slots=True)
class Idle:
    """The first `length` of `tokens`, resident and used by nobody since `since` on the count of tokens drawn.

    loose: how many of them were computed one by one, so that their cells may lie apart.
    tag: `Ask.tag` of whose they are.
    """

    tokens: array[int]
    length: int
    since: int
    loose: int
    tag: object


class Found(NamedTuple):
    """What a sequence can go on from: `length` tokens of the resident `source`, or `saved` tokens of `entry`."""

    source: int = NOWHERE
    length: int = 0
    entry: Entry | None = None
    saved: int = 0


@dataclass
class Moves:
    """What was moved since the start: see `Timings`."""

    evicted: int = 0
    compacted: int = 0
    saved: int = 0
    restored: int = 0


class Memory:
    """The cells of one backend. `clock`: seconds, to measure how fast host RAM is."""

    COPY_S = 0.02
    """Seconds that an admission may spend on clearing idle prefixes away."""
    COMPACT_S = 0.1
    """Seconds that a step may spend on moving running sequences down."""

    def __init__(self, backend: Backend, host: HostCache, clock: Callable[[], float]) -> None:
        self._backend, self._clock = backend, clock
        self.host = host
        self.cells = Cells(backend.room.kv_cells)
        self.moves = Moves()
        self.version = 0  # another one when what `held` says may have changed otherwise than by computing prompts
        self._index: PrefixIndex[int] = PrefixIndex()
        self._live: dict[int, Sequence] = {}
        self._idle: dict[int, Idle] = {}  # in order of last use
        self._unused = list(range(backend.room.sequences))
        self._drawn = 0
        self._holes = 0  # cells that came free below running sequences, about
        self._unified = backend.room.unified
        self._gap = 0  # steps for which running sequences have had gaps between them
        self.compute_s = 0.0  # seconds that prefill takes for a token; the loop keeps it up to date
        self._copying = Rate()  # bytes a second, to host RAM or back, where cells lie together
        self._loose_s = _LOOSE_S
        self._divisible = backend.can_cut and not backend.info.window
        self._last_saved = 1 << 20  # bytes; stands for the next where the size of a cell is unknown

    # What the scheduler asks.

    @property
    def wants_checkpoints(self) -> bool:
        """Whether prompts should be kept as they are one token before their end: see the module's text."""
        return not self._divisible

    @property
    def prefixes(self) -> int:
        return len(self._idle)

    @property
    def cells_live(self) -> int:
        """Cells that running sequences hold; idle prefixes may share them."""
        return self.cells.held_by(self._live)

    def shared_with_live(self, tokens: array[int]) -> int:
        """How many of the tokens a running sequence has, or will have before these are computed."""
        if not self._divisible:
            return 0
        match = self._index.match(tokens, len(tokens) - 1)
        return match.length if any(seq in self._live for seq in match.sharing()) else 0

    def swap_seconds(self, sequence: Sequence) -> float:
        """About how long it takes to bring a running sequence to host RAM and back; infinite when it cannot be."""
        if self._size(sequence.computed) > self.host.budget:
            return float("inf")
        return 2 * self._copy_seconds(sequence.computed, sequence.loose)

    def held(self, most: int) -> tuple[tuple[object, int], ...]:
        """(tag, tokens) of what others can go on from, `most` at most, those used last first: see `Stats.held`."""
        # Where a sequence does not stand for its prefixes, a running one serves nobody: its checkpoints do.
        live = ((sequence.ask.tag, sequence.computed) for sequence in reversed(self._live.values()))
        idle = ((idle.tag, idle.length) for idle in reversed(self._idle.values()))
        saved = ((entry.tag, entry.length) for entry in self.host)
        found = itertools.chain(live if self._divisible else (), idle, saved)
        known = ((tag, tokens) for tag, tokens in found if tag is not None and tokens)
        return tuple(itertools.islice(known, most))

    # What the loop does.

    def open(self, sequence: Sequence) -> None:
        """Give the sequence a number and the longest prefix there is. Sets `seq`, `computed`, `leader`, `follow`."""
        sequence.computed = sequence.loose = 0
        sequence.leader = None
        found = self._find(sequence)
        if not self._unused:
            self._evict_another(found.source)
            if found.entry is None:
                found = self._find(sequence)
        sequence.seq = heapq.heappop(self._unused)
        self._live[sequence.seq] = sequence
        self._begin(sequence, found)

    def attach(self, sequence: Sequence) -> None:
        """Find a prefix for an open sequence that has none yet, or somebody to follow."""
        if sequence.seq in self._index:
            self._index.remove(sequence.seq)
        self._begin(sequence, self._find(sequence))

    def detach(self, sequence: Sequence) -> None:
        """The sequence has no cells of its own any more: it waits for another one's, or was wrong about its own."""
        self.version += 1
        self.cells.drop(sequence.seq)
        self._backend.seq_remove(sequence.seq)
        sequence.computed = sequence.loose = 0

    def grow(self, sequence: Sequence, count: int) -> None:
        """A decode has computed `count` more tokens of it."""
        self.cells.grow(sequence.seq, count)
        self._holes = max(0, self._holes - count)
        sequence.computed += count
        if count < _TOGETHER and self._unified:  # a part of its own is filled from its start
            sequence.loose += count

    def cut(self, sequence: Sequence, length: int) -> bool:
        """Forget what is computed from `length` on. False when the model cannot."""
        if not self._backend.seq_remove(sequence.seq, length):
            return False
        self.cells.cut(sequence.seq, length)
        sequence.computed = length
        sequence.loose = min(sequence.loose, length)
        return True

    def resync(self, sequence: Sequence) -> bool:
        """Take from the backend how far a sequence is, after a decode that ended on the way; its last token is computed
        again, for its logits. False when the model cannot go back so far."""
        self.version += 1
        held = self._backend.seq_length(sequence.seq)
        self.cells.grow(sequence.seq, max(0, held - sequence.computed))
        sequence.computed = held
        return self.cut(sequence, min(held, len(sequence.tokens) - 1))

    def checkpoint(self, sequence: Sequence) -> None:
        """Keep a copy of a running sequence as it is now, as an idle prefix."""
        held = self._index.match(sequence.tokens, sequence.computed).ending()
        if any(other in self._idle and length == sequence.computed for length, other in held):
            return
        if not self._unused and not self.evict_one():
            return
        copy = heapq.heappop(self._unused)
        self._copy(sequence.seq, copy, sequence.computed)
        self._idle[copy] = Idle(sequence.tokens, sequence.computed, self._drawn, sequence.loose, sequence.ask.tag)
        self._index.insert(copy, sequence.tokens, sequence.computed)
        self.version += 1

    def close(self, sequence: Sequence) -> None:
        """The sequence runs no more; what it has computed stays as an idle prefix if that is worth it."""
        seq, tokens, length = sequence.seq, sequence.tokens, sequence.computed
        del self._live[seq]
        sequence.seq, sequence.leader = NOWHERE, None
        if self._is_covered(seq, tokens, length):
            self._forget(seq)
            return
        self._index.move(seq, tokens, length)
        self._idle[seq] = Idle(tokens, length, self._drawn, sequence.loose, sequence.ask.tag)
        self.version += 1
        if self._divisible:
            for _, other in list(self._index.match(tokens, length).ending()):
                if other in self._idle and other != seq:
                    self._forget(other)

    def yield_cells(self, sequence: Sequence, *, save: bool) -> bool:
        """A running sequence gives way: its cells go to host RAM, or are computed again later. Returns whether
        saved."""
        seq, length = sequence.seq, sequence.computed
        saved = save and length > 0 and self._save(seq, sequence.tokens, length, sequence.loose, sequence.ask.tag)
        del self._live[seq]
        sequence.seq, sequence.leader, sequence.computed, sequence.loose = NOWHERE, None, 0, 0
        self._forget(seq)
        return saved

    def abandon(self, sequence: Sequence) -> None:
        """Drop a sequence without a trace: its cells cannot be trusted."""
        seq = sequence.seq
        del self._live[seq]
        sequence.seq, sequence.leader = NOWHERE, None
        self._forget(seq)

    def make_room(self, count: int) -> bool:
        """Evict idle prefixes until `count` cells are free. False when there are not so many even then."""
        while self.cells.free < count:
            if not self.evict_one():
                return False
        return True

    def evict_one(self) -> bool:
        """Evict the idle prefix that was unused for longest. False when there is none."""
        victim = next(iter(self._idle), NOWHERE)
        if victim == NOWHERE:
            return False
        self._evict(victim)
        return True

    def tidy(self, drawn: int) -> None:
        """`drawn` more tokens of running answers have passed over the idle prefixes: one that had enough of it leaves
        for host RAM. One in a step at most, so that a step is held up by one copy only."""
        self._drawn += drawn
        if not self._unified:
            self._close_gap()
            return
        if self._idle and self.host.budget:
            seq, idle = next(iter(self._idle.items()))
            if self._drawn - idle.since > _IDLE_TOKENS:
                self._evict(seq)
        if self._holes > _HOLES:
            self._compact()

    def _compact(self) -> None:
        """Move running sequences down into the holes below them: out to host RAM and back in, all of them at once.

        Nobody tells where cells are, but llama.cpp fills the lowest free ones first, so what came free since the last
        time, less what was taken, lies below something. Not worth it where they are about to end; and not where they
        share cells, since each would come back with its own."""
        live = [sequence for sequence in self._live.values() if sequence.computed]
        needed = sum(sequence.computed for sequence in live)
        seconds = sum(2 * self._copy_seconds(sequence.computed, sequence.loose) for sequence in live)
        if self._holes < needed or seconds > self.COMPACT_S or not self._divisible:
            return
        if sum(sequence.remaining for sequence in live) < _IDLE_TOKENS:
            return
        if any(self.cells.private(sequence.seq) != sequence.computed for sequence in live):
            return
        self._holes = 0
        self.version += 1
        saved = [self._backend.seq_save(sequence.seq) for sequence in live]
        for sequence in live:
            self._backend.seq_remove(sequence.seq)
        for sequence, state in zip(live, saved, strict=True):
            sequence.loose = 0
            if not self._backend.seq_load(sequence.seq, state):
                self.cells.drop(sequence.seq)  # computed again, as after giving way
                sequence.computed = 0
        self.moves.compacted += 1

    def _close_gap(self) -> None:
        """Move the highest running sequence of a parted cache down into a gap that has been there for some steps. One
        in a step at most, and only where the copy is short beside what the passes would take."""
        if len(self._live) < 2:
            return
        low, high = min(self._live), max(self._live)
        if high - low + 1 == len(self._live):
            self._gap = 0
            return
        self._gap += 1
        sequence = self._live[high]
        if self._gap <= _GAP_STEPS or 2 * self._copy_seconds(sequence.computed, 0) > self.COMPACT_S:
            return
        if sequence.remaining < _GAP_STEPS or not sequence.computed:
            return
        self._gap = 0
        gap = next(seq for seq in range(low, high) if seq not in self._live)
        if gap in self._idle:
            self._evict(gap)
        self._unused.remove(gap)
        heapq.heapify(self._unused)
        self._copy(high, gap, sequence.computed)
        del self._live[high]
        self._live[gap] = sequence
        sequence.seq = gap
        self._note(sequence)
        self._forget(high)
        self.moves.compacted += 1

    def _evict_another(self, used: int) -> None:
        """Evict an idle prefix to get its number: not `used`, which serves the newcomer, unless there is no other."""
        for seq in self._idle:
            if seq != used:
                self._evict(seq)
                return
        self.evict_one()

    def _clear_the_way(self, used: int) -> None:
        """Send idle prefixes to host RAM before new cells are taken, but not `used`, which serves the newcomer."""
        if not self._unified or not self._idle or not self.host.budget:
            return
        left = self.COPY_S
        for seq in list(self._idle):
            if seq != used:
                idle = self._idle[seq]
                left -= self._copy_seconds(idle.length, idle.loose) if self._is_worth_saving(idle) else 0.0
                if left < 0:
                    return
                self._evict(seq)

    def check_integrity(self) -> str:
        """Compare the account with itself and with what the backend holds. Returns what is wrong, or nothing."""
        numbers = sorted([*self._unused, *self._live, *self._idle])
        if numbers != list(range(self._backend.room.sequences)):
            return f"sequences are lost or held twice: unused {sorted(self._unused)}, live {sorted(self._live)}"
        for seq in range(self._backend.room.sequences):
            due = self.cells.length(seq)
            if (held := self._backend.seq_length(seq)) != due:
                return f"the backend holds {held} tokens of sequence {seq}, {due} are due"
            owner = (
                self._live[seq].computed if seq in self._live else self._idle[seq].length if seq in self._idle else 0
            )
            if owner != due:
                return f"sequence {seq} counts {owner} tokens, {due} cells are held for it"
        return self.cells.check_integrity() or self._index.check_integrity() or self.host.check_integrity()

    def hot(self) -> Iterator[Entry]:
        """What could be kept for the next start, the prefix used last first: idle ones, then those in host RAM."""
        for seq, idle in reversed(self._idle.items()):
            yield Entry(idle.tokens, idle.length, self._backend.seq_save(seq))
        yield from self.host

    # Finding a prefix.

    def _catch_up(self) -> None:
        """Tell the index of answers that have grown, so that they can be shared too."""
        for seq, sequence in self._live.items():
            if seq in self._index and sequence.computed > self._index.length(seq) + _LAG:
                self._index.move(seq, sequence.tokens, sequence.computed)

    def _note(self, sequence: Sequence) -> None:
        seq = sequence.seq
        place = self._index.move if seq in self._index else self._index.insert
        place(seq, sequence.tokens, len(sequence.tokens))

    def _has(self, seq: int) -> int:
        """Tokens that are computed of a resident sequence."""
        return self._idle[seq].length if seq in self._idle else self._live[seq].computed

    def _find(self, sequence: Sequence) -> Found:
        """What there is to go on from. A saved entry counts as used now: what makes way for the sequence may go to host
        RAM, and should not push it out."""
        self._catch_up()
        limit = sequence.rows_from
        if limit < _WORTH_KEEPING and self._backend.can_cut:
            return Found()
        source, length = self._resident(sequence, limit)
        entry, saved = self._saved(sequence, limit, length)
        if entry is not None:
            self.host.touch(entry)
        return Found(source, length, entry, saved)

    def _begin(self, sequence: Sequence, found: Found) -> None:
        """Go on from what was found, or follow somebody."""
        self.version += 1
        limit, source, length, entry = sequence.rows_from, found.source, found.length, found.entry
        if limit >= _WORTH_KEEPING or not self._backend.can_cut:
            self._clear_the_way(source if entry is None else NOWHERE)
            if entry is not None and self._load(sequence, entry, found.saved):
                length = found.saved
            else:
                if entry is not None:  # trying may have evicted what was found before
                    source, length = self._resident(sequence, limit)
                if source != NOWHERE:
                    self._use(sequence, source, length)
            self._follow(sequence, limit, length)
        self._note(sequence)

    def _resident(self, sequence: Sequence, limit: int) -> tuple[int, int]:
        """(sequence, length) of the longest prefix that is resident and can be gone on from; (NOWHERE, 0) for none."""
        match = self._index.match(sequence.tokens, limit)
        best, most = NOWHERE, 0
        if self._backend.can_cut:
            for _, seq in zip(range(_LOOK_AT), match.sharing(), strict=False):
                length = min(match.length, self._has(seq))
                whole = seq in self._idle and self._idle[seq].length == length
                better = length > most or (length == most and (whole or self._copies_sooner(seq, best)))
                if not whole and not self._is_worth_copying(seq, length):
                    continue
                if better and seq != sequence.seq and self._backend.seq_reusable(seq, length):
                    best, most = seq, length
        if not self._divisible:
            for length, seq in match.ending():
                if seq in self._idle and length > most and self._backend.seq_reusable(seq, length):
                    best, most = seq, length
        return (best, most) if most >= _WORTH_KEEPING or (not self._backend.can_cut and most) else (NOWHERE, 0)

    def _saved(self, sequence: Sequence, limit: int, resident: int) -> tuple[Entry | None, int]:
        """(entry, length) of a saved prefix that gains enough over a resident one of that length."""
        match = self.host.match(sequence.tokens, limit)
        if match.length < resident + _WORTH_KEEPING and (self._backend.can_cut or match.length <= resident):
            return None, 0
        if self._divisible:
            return next(match.sharing(), None), match.length
        for length, entry in match.ending():
            if length > resident:
                return entry, length
        return None, 0

    def _follow(self, sequence: Sequence, limit: int, has: int) -> None:
        """Wait for a running sequence that is about to compute much of the same prompt, and began earlier."""
        match = self._index.match(sequence.tokens, limit)
        for _, seq in zip(range(_LOOK_AT), match.sharing(), strict=False):
            leader, reach = self._live.get(seq), match.length
            if leader is not None and leader.leader is not None:
                leader, reach = leader.leader, min(reach, leader.follow)
            if leader is None or leader is sequence or leader.seq == NOWHERE:
                continue
            if not max(has + _WORTH_WAITING, leader.computed + 1) <= reach:
                continue
            if self._divisible or reach == limit:  # elsewhere there is nothing to share but the checkpoint of a prompt
                sequence.leader, sequence.follow = leader, reach
                return

    # Moving cells.

    def _use(self, sequence: Sequence, source: int, length: int) -> None:
        idle = self._idle.get(source)
        if idle is not None and idle.length == length and (self._backend.can_cut or not self._unused):
            # Taken over: the sequence goes on under the number of the prefix.
            del self._idle[source], self._live[sequence.seq]
            if sequence.seq in self._index:
                self._index.remove(sequence.seq)
            heapq.heappush(self._unused, sequence.seq)
            sequence.seq = source
            self._live[source] = sequence
        else:
            if idle is not None:
                del self._idle[source]
                idle.since = self._drawn
                self._idle[source] = idle  # used last now
            self._copy(source, sequence.seq, length)
        sequence.computed = length
        sequence.loose = min(length, idle.loose if idle is not None else self._live[source].loose)

    def _copy(self, source: int, target: int, length: int) -> None:
        """Give an empty sequence the first `length` tokens of another."""
        if self._unified:
            self._backend.seq_copy(source, target, length)
            self.cells.share(source, target, length)
            return
        began = self._clock()
        self._backend.seq_copy(source, target, length)
        self.cells.grow(target, length)
        self._learn(2 * self._size(self._has(source)), 0, self._clock() - began)

    def _is_worth_copying(self, source: int, length: int) -> bool:
        """Whether it is quicker to copy a prefix than to compute it. Sharing costs nothing; a copy in a parted cache
        goes through host RAM, all of the source, out and in."""
        if self._unified or not self.compute_s:
            return True
        return 2 * self._copy_seconds(self._has(source), 0) < self.compute_s * length

    def _copies_sooner(self, one: int, other: int) -> bool:
        return not self._unified and other != NOWHERE and self._has(one) < self._has(other)

    def _load(self, sequence: Sequence, entry: Entry, length: int) -> bool:
        """Bring an entry back into a sequence that has no cells, and cut it to the part that is of use. It is good also
        when what made way for it has taken its place in host RAM."""
        if self.cells.total - self.cells_live < entry.length or not self.make_room(entry.length):
            return False
        began = self._clock()
        if not self._backend.seq_load(sequence.seq, entry.saved):
            return False
        self._learn(len(entry.saved), 0, self._clock() - began)
        self.cells.grow(sequence.seq, entry.length)
        sequence.computed = entry.length
        self.moves.restored += 1
        if length < entry.length:
            self.cut(sequence, length)
        return True  # the entry stays: the same prompt, asked again, need not be saved again

    def _size(self, length: int) -> int:
        """Bytes that so many tokens take in host RAM, about."""
        return self._backend.info.cell_bytes * length or self._last_saved

    def _copy_seconds(self, length: int, loose: int) -> float:
        """How long it takes to save so many tokens, or to load them."""
        return self._size(length) / (self._copying.per_second or _BYTES_PER_S) + loose * self._loose_s

    def _learn(self, size: int, loose: int, seconds: float) -> None:
        """A copy of `size` bytes took so long."""
        if loose < _WORTH_KEEPING:
            self._copying.add(size, seconds)
        else:
            beyond = seconds - size / (self._copying.per_second or _BYTES_PER_S)
            self._loose_s += (max(0.0, beyond) / loose - self._loose_s) * 0.3

    def _is_worth_saving(self, idle: Idle) -> bool:
        """Whether host RAM gains enough by it: an answer that went on from a saved prompt adds itself only."""
        if not self.compute_s:
            return True
        gain = idle.length - (self.host.match(idle.tokens, idle.length).length if self._divisible else 0)
        return not gain or 2 * self._copy_seconds(idle.length, idle.loose) < _CHANCE * self.compute_s * gain

    def _save(self, seq: int, tokens: array[int], length: int, loose: int, tag: object) -> bool:
        if self._divisible and self.host.has(tokens, length):
            return True
        if self._size(length) > self.host.budget:
            return False
        began = self._clock()
        saved = self._backend.seq_save(seq)
        self._last_saved = len(saved)
        self._learn(len(saved), loose, self._clock() - began)
        kept = self.host.put(tokens, length, saved, extends=self._backend.can_cut, tag=tag)
        self.moves.saved += kept
        return kept

    def _evict(self, seq: int) -> None:
        idle = self._idle[seq]
        if self._is_worth_saving(idle) and not self._is_elsewhere(seq, idle.tokens, idle.length):
            self._save(seq, idle.tokens, idle.length, idle.loose, idle.tag)
        self.moves.evicted += 1
        self._forget(seq)

    def _is_covered(self, seq: int, tokens: array[int], length: int) -> bool:
        """Whether it is not worth keeping: short, or all of it is in an idle prefix too."""
        if length < (_WORTH_KEEPING if self._divisible else 1):
            return True
        return self._is_elsewhere(seq, tokens, length, idle=True)

    def _is_elsewhere(self, seq: int, tokens: array[int], length: int, *, idle: bool = False) -> bool:
        """Whether another resident sequence (an `idle` one) could be gone on from after all of these tokens."""
        match = self._index.match(tokens, length)
        return match.length == length and any(
            other != seq
            and (other in self._idle or not idle)
            and self._has(other) >= length
            and self._backend.seq_reusable(other, length)
            for _, other in zip(range(_LOOK_AT), match.sharing(), strict=False)
        )

    def _forget(self, seq: int) -> None:
        """Free a sequence's cells and number."""
        self.version += 1
        self._idle.pop(seq, None)
        if seq in self._index:
            self._index.remove(seq)
        freed = self.cells.drop(seq)
        self._holes = self._holes + freed if self._live else 0
        self._backend.seq_remove(seq)
        heapq.heappush(self._unused, seq)
