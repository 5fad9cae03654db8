"""Who runs, who waits, and what goes into the next batch. Pure: no clock, no thread, no backend.

Owns: the queue and the slots. Refuses to know: where cells are (memory.py), how logits are computed or tokens drawn,
who asked, and what time it is. It decides; loop.py acts.

There are no phases. A sequence has tokens it knows (prompt and answer so far) and tokens that are computed; each step
lets the second catch up with the first. A sequence one token behind is decoding, one further behind is prefilling, be
it a new prompt, an answer begun elsewhere, or one that had to give way and is computed again.

1. Admission is in order of arrival, while slots last and cells do: for what is known of the sequence, what running ones
   still have to prefill, and _AHEAD more tokens for each. So the cache is over-committed on purpose, since most answers
   end early. One whose turn has come may be passed by smaller ones, but only _PASSES times.
2. Every sequence that is one token behind gets that token into the batch, and its guesses (in a parted cache while no
   prompt is computed): answers go on whatever arrives.
3. Prompts get what is left, at most the limit that keeps running answers fluent, the one with the least to compute
   first: a long prompt never holds back a short one, and of two long ones the first is answered after half the time
   that both would take side by side. A quarter is kept for the one that has waited longest, so that none is passed for
   ever: of every step in a unified cache, and every fourth step in a parted one, where parts of two prompts in one step
   would each be too small for the fast kernel (_LEAST).
4. When cells run out after all, the sequence that is cheapest to bring back gives way, for what it frees, and goes to
   the head of the queue. The oldest never does: so there is always one that gets to its end, and then the next.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from llmnode.engine.backend import Chunk, Room
from llmnode.engine.pace import TILE
from llmnode.engine.sequence import NOWHERE, Sequence

_AHEAD = 32
"""Answer tokens that each running sequence is sure to have room for when another is admitted: below it, sequences
would be swapped in and out again at once."""
_LEAST = TILE
"""Tokens that a prompt's last chunk has at least, where it has several: llama.cpp's attention on CPUs takes fewer rows
one by one, and a tail of 40 tokens after 4,000 took 300 ms beside 8 answers, the 64 in its place 30 (15M model). Where
what is left makes no two such chunks, it is computed at once, over the limit: 65 tokens and then 58 took 83 and 516 ms,
the 123 take about 110."""
_TURNS = 4
"""In a parted cache one step in so many serves the prompt that has waited longest."""
_DEEP = 256
"""Tokens that a prompt has behind it from which no other prompt shares its step in a parted cache: llama.cpp takes as
many tokens of each at once as the shorter part has, and 20 tokens after 3,800 took 200 ms, 196 of them 110 (15M)."""
_PASSES = 32
"""How often others may be admitted past a sequence that does not fit yet."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The next batch: `chunks[i]` belongs to `sequences[i]`, and its last `drafts[i]` tokens are guesses.

    prefill: how many of its `tokens` are of sequences that were more than one behind.
    depth: how many tokens these have before them in their sequences, on average.
    """

    sequences: Many[Sequence]
    chunks: Many[Chunk]
    drafts: Many[int]
    tokens: int
    prefill: int
    depth: float = 0.0

    def alone(self, index: int) -> Plan:
        """The batch of one chunk of this one."""
        chunk = self.chunks[index]
        size = len(chunk.tokens)
        prefill = size if self.sequences[index].behind > 1 else 0
        return Plan((self.sequences[index],), (chunk,), (self.drafts[index],), size, prefill, chunk.start + size / 2)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a batch may hold: `tokens` in all, `prefill` of prompts beside running answers, `rows` of logits.

    split: whether to end a chunk one token before a prompt's end (models whose prompts are kept there).
    turn: counts steps, for what is shared out step by step.
    """

    tokens: int
    prefill: int
    rows: int
    split: bool = False
    turn: int = 0


class Scheduler:
    """Sequences that wait and run."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.waiting: list[Sequence] = []  # in order of arrival
        self.running: list[Sequence] = []  # in order of admission

    def add(self, sequence: Sequence) -> None:
        """Put into the queue, at the place of its arrival: one that had to give way comes before younger ones."""
        bisect.insort(self.waiting, sequence, key=lambda other: other.id)

    def next(self, cells_live: int, shared: Callable[[array[int]], int]) -> Sequence | None:
        """Take the next sequence to admit out of the queue and count it as running; None when none fits now.

        cells_live: held by running sequences.      shared: how many of these tokens will not need cells of their own.
        """
        if not self.waiting or len(self.running) >= self.room.slots:
            return None
        promised = cells_live + sum(s.behind + min(s.remaining, _AHEAD) for s in self.running if s.leader is None)
        promised += sum(len(s.tokens) - s.follow + min(s.remaining, _AHEAD) for s in self.running if s.leader)
        for index, sequence in enumerate(self.waiting):
            need = len(sequence.tokens) + min(sequence.remaining, _AHEAD)
            if self.running and promised + need > self.room.kv_cells:
                need -= shared(sequence.tokens)
            if not self.running or promised + need <= self.room.kv_cells:
                for passed in self.waiting[:index]:
                    passed.passed += 1
                del self.waiting[index]
                self.running.append(sequence)
                return sequence
            if sequence.passed >= _PASSES or sequence.yielded:
                return None
        return None

    def plan(self, bounds: Bounds, drafts: dict[int, array[int]] | None = None) -> Plan:
        """The next batch. Changes nothing. `drafts`: guessed tokens by the sequence's number in the backend."""
        sequences: list[Sequence] = []
        chunks: list[Chunk] = []
        guesses: list[int] = []
        prefilling = self._prefilling()
        if prefilling and not self.room.unified:
            drafts = None  # a parted cache computes them beside a prompt's tokens, and the tile has fewer then
        left, rows = bounds.tokens, bounds.rows
        for sequence in self.running:
            if sequence.leader is not None or sequence.behind > 1 or left == 0 or rows == 0:
                continue
            tokens = sequence.tokens[sequence.computed :]
            draft = drafts.get(sequence.seq) if drafts else None
            if draft:
                tokens.extend(draft[: min(left, rows) - 1])
            sequences.append(sequence)
            chunks.append(Chunk(sequence.seq, sequence.computed, tokens, len(tokens)))
            guesses.append(len(tokens) - 1)
            left -= len(tokens)
            rows -= len(tokens)
        count = len(chunks)
        if prefilling and left > 0:
            self._share_out(prefilling, left, rows, bounds, sequences, chunks, guesses)
        tokens_in_all = sum(len(chunk.tokens) for chunk in chunks)
        decoding = bounds.tokens - left
        deep = sum(len(chunk.tokens) * (chunk.start + len(chunk.tokens) / 2) for chunk in chunks[count:])
        if not self.room.unified and chunks:
            # A parted cache computes sequences side by side as long as their numbers follow each other.
            order = sorted(range(len(chunks)), key=lambda at: chunks[at].seq)
            sequences = [sequences[at] for at in order]
            chunks, guesses = [chunks[at] for at in order], [guesses[at] for at in order]
        prefill = tokens_in_all - decoding
        return Plan(sequences, chunks, guesses, tokens_in_all, prefill, deep / prefill if prefill else 0.0)

    def _share_out(
        self,
        prefilling: list[Sequence],
        left: int,
        rows: int,
        bounds: Bounds,
        sequences: list[Sequence],
        chunks: list[Chunk],
        guesses: list[int],
    ) -> None:
        oldest = min(prefilling, key=lambda sequence: sequence.id)
        unified, decoding = self.room.unified, len(chunks)
        budget = min(left, bounds.prefill) if decoding else left
        kept = min(oldest.behind, max(1, budget // 4)) if unified else 0
        # The first pass over a parted batch takes one token of each sequence, so the next one has one less.
        tile = _LEAST if unified else _LEAST + 1
        for sequence in self._in_turn(prefilling, bounds.turn):
            if sequence is oldest:
                kept = 0
            size = min(sequence.behind, budget - kept)
            if 0 < sequence.behind - size < tile <= size:
                size = sequence.behind - tile if sequence.behind >= 2 * tile else min(sequence.behind, left)
            start = sequence.computed
            if not unified and len(chunks) > decoding and max(start, chunks[-1].start) >= _DEEP:
                continue
            border = len(sequence.ask.prompt) - 1
            if bounds.split and start < border < start + size:
                size = border - start
            wanted = max(0, start + size - max(start, sequence.rows_from))
            if wanted > rows:
                size -= wanted - rows
                wanted = rows
            if size <= 0:
                continue
            tokens = sequence.tokens[start : start + size]
            sequences.append(sequence)
            chunks.append(Chunk(sequence.seq, start, tokens, wanted))
            guesses.append(0)
            budget -= size
            left -= size
            rows -= wanted

    def _prefilling(self) -> list[Sequence]:
        return [s for s in self.running if s.behind > 1 and s.leader is None]

    def _in_turn(self, prefilling: list[Sequence], turn: int) -> list[Sequence]:
        """Prompts in the order in which a step serves them."""
        order = sorted(prefilling, key=lambda sequence: (sequence.behind, sequence.id))
        if not self.room.unified and turn % _TURNS == 0:
            oldest = min(prefilling, key=lambda sequence: sequence.id)
            order.remove(oldest)
            order.insert(0, oldest)
        return order

    def next_prompt(self, turn: int) -> Sequence | None:
        """The prompt that the next step serves first; None when there is none."""
        prefilling = self._prefilling()
        return self._in_turn(prefilling, turn)[0] if prefilling else None

    def victim(self, cost: Callable[[Sequence], float], frees: Callable[[Sequence], int]) -> Sequence | None:
        """Who gives way: the least `cost` in seconds for each cell that it `frees`, more for whom it has hit before."""
        oldest = min(self.running, key=lambda sequence: sequence.id, default=None)
        choice = [(s, frees(s)) for s in self.running if s is not oldest]
        choice = [(s, freed) for s, freed in choice if freed > 0]
        if not choice:
            return None
        return min(choice, key=lambda pair: (cost(pair[0]) * (1 + pair[0].yielded) / pair[1], -pair[0].id))[0]

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, running or waiting."""
        (self.waiting if sequence.seq == NOWHERE else self.running).remove(sequence)

    def everyone(self) -> Iterable[Sequence]:
        """A copy: the caller may remove while it goes through."""
        return [*self.running, *self.waiting]

    @property
    def queued_prompt_tokens(self) -> int:
        """Tokens that are still to be prefilled, of those that wait and of those that run. What a sequence will share
        with the one it follows counts once; what waiting ones will find in the cache is not known yet, and counts."""
        prefilling = sum(s.behind for s in self.running if s.leader is None and s.behind > 1)
        following = sum(len(s.tokens) - s.follow for s in self.running if s.leader is not None)
        return sum(s.behind for s in self.waiting) + prefilling + following

    def check_integrity(self) -> str:
        """Compare the lists with what sequences say of themselves. Returns what is wrong, or nothing."""
        if len(self.running) > self.room.slots:
            return f"{len(self.running)} sequences run in {self.room.slots} slots"
        if any(sequence.seq != NOWHERE for sequence in self.waiting):
            return "a sequence that waits holds cells"
        if any(sequence.seq == NOWHERE for sequence in self.running):
            return "a sequence that runs holds none"
        return ""
