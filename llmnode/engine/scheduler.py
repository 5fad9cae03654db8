"""What goes into the next batch, and what a step's results mean. Pure: no clock, no thread, no model, no numpy.

Owns: the queue, the slots, how far each sequence has come, and the account of KV cells. Refuses to know: how logits are
computed or tokens drawn, who asked, and what time it is.

There are no phases. A sequence has tokens it knows (prompt and answer so far) and tokens that are computed; each step
lets the second catch up with the first. A sequence one token behind is decoding, one further behind is prefilling.

1. Admission is first come, first served. It reserves the cells that prompt and longest answer need, so that no running
   answer can ever meet a full cache.
2. Every sequence that is one token behind gets that token into the batch: answers go on whatever arrives.
3. What is left of the batch is shared out evenly between the others. One that needs less than its share leaves the rest
   to those that need more, so a long prompt never holds back a short one.
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from llmnode.engine.backend import Chunk, Room
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Finish, Sink

WAITING = -1


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer in the making.

    limit: answer tokens at most.       slot: its sequence number in the backend, WAITING before it has one.
    computed: tokens whose cells exist. fresh: answer tokens since the last event.
    submitted, admitted, first: moments on the loop's clock; None before they happened.
    """

    id: int
    ask: Ask
    sink: Sink
    limit: int
    text: TextStream
    submitted: float
    tokens: array[int] = field(init=False)
    slot: int = WAITING
    computed: int = 0
    answered: int = 0
    fresh: list[int] = field(default_factory=list)
    admitted: float | None = None
    first: float | None = None

    def __post_init__(self) -> None:
        self.tokens = array("i", self.ask.prompt)

    @property
    def cells(self) -> int:
        """Cells reserved for it: those of its prompt and of its longest answer."""
        return len(self.ask.prompt) + self.limit

    @property
    def behind(self) -> int:
        """Tokens known and not computed."""
        return len(self.tokens) - self.computed

    def take(self, token: int, end_tokens: frozenset[int]) -> tuple[str, Finish | None]:
        """Add a drawn token. Returns the text that it makes certain and, when it ends the answer, why."""
        self.tokens.append(token)
        self.fresh.append(token)
        self.answered += 1
        if token in end_tokens and not self.ask.ignore_eos:
            return self.text.flush(), Finish.STOP
        text = self.text.push(token)
        if self.text.stopped:
            return text, Finish.STOP
        if self.answered >= self.limit:
            return text + self.text.flush(), Finish.LENGTH
        return text, None


@dataclass(frozen=True, slots=True)
class Plan:
    """The next batch: `chunks[i]` belongs to `sequences[i]`. `prefill` of its `tokens` belong to prefilling ones."""

    sequences: Many[Sequence]
    chunks: Many[Chunk]
    tokens: int
    prefill: int

    def alone(self, index: int) -> Plan:
        """The batch of one chunk of this one."""
        chunk = self.chunks[index]
        size = len(chunk.tokens)
        return Plan((self.sequences[index],), (chunk,), size, size if self.prefill else 0)


class Scheduler:
    """Sequences that wait and run. Methods change the account only; the caller makes the backend follow."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self.cells_reserved = 0
        self._free = list(range(room.slots))

    def add(self, sequence: Sequence) -> None:
        """Put at the end of the queue. Its cells must fit the room."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give slots to those at the head of the queue while slots and cells last. Returns who got one."""
        admitted = []
        while self.waiting and self._free:
            head = self.waiting[0]
            if self.cells_reserved + head.cells > self.room.kv_cells:
                break
            self.waiting.popleft()
            head.slot = heapq.heappop(self._free)
            self.running[head.slot] = head
            self.cells_reserved += head.cells
            admitted.append(head)
        return admitted

    def plan(self, budget: int) -> Plan:
        """The next batch, of at most `budget` tokens. Changes nothing: see `computed`."""
        sequences: list[Sequence] = []
        chunks: list[Chunk] = []
        prefilling = []
        for sequence in self.running.values():
            if sequence.behind > 1:
                prefilling.append(sequence)
            elif len(chunks) < budget:
                sequences.append(sequence)
                chunks.append(Chunk(sequence.slot, sequence.computed, sequence.tokens[sequence.computed :], True))
        left = budget - len(chunks)
        prefilling.sort(key=lambda sequence: sequence.behind)
        for others, sequence in zip(range(len(prefilling) - 1, -1, -1), prefilling, strict=True):
            size = min(sequence.behind, left // (others + 1))
            if size == 0:
                continue
            end = sequence.computed + size
            tokens = sequence.tokens[sequence.computed : end]
            sequences.append(sequence)
            chunks.append(Chunk(sequence.slot, sequence.computed, tokens, end == len(sequence.tokens)))
            left -= size
        decoding = len(self.running) - len(prefilling)
        return Plan(sequences, chunks, budget - left, budget - left - min(decoding, budget))

    def computed(self, plan: Plan) -> list[Sequence]:
        """The plan's batch was computed. Returns the sequences whose logits are there, in the order of their rows."""
        for sequence, chunk in zip(plan.sequences, plan.chunks, strict=True):
            sequence.computed += len(chunk.tokens)
        return [s for s, chunk in zip(plan.sequences, plan.chunks, strict=True) if chunk.wanted]

    def remove(self, sequence: Sequence) -> int:
        """Take out a sequence, running or waiting. Returns the slot to clear, or WAITING when it had none."""
        slot = sequence.slot
        if slot == WAITING:
            self.waiting.remove(sequence)
        else:
            del self.running[slot]
            heapq.heappush(self._free, slot)
            self.cells_reserved -= sequence.cells
            sequence.slot = WAITING
        return slot

    def everyone(self) -> Iterable[Sequence]:
        """A copy: the caller may remove while it goes through."""
        return [*self.running.values(), *self.waiting]

    @property
    def cells_used(self) -> int:
        return sum(sequence.computed for sequence in self.running.values())

    @property
    def queued_prompt_tokens(self) -> int:
        """Prompt tokens not computed yet, of those that wait and of those that prefill."""
        return sum(s.behind for s in self.waiting) + sum(s.behind for s in self.running.values() if s.behind > 1)

    def check_integrity(self, seq_length: Callable[[int], int]) -> str:
        """Compare the account with itself and with what the backend holds. Returns what is wrong, or nothing."""
        if sorted([*self._free, *self.running]) != list(range(self.room.slots)):
            return f"slots are lost or held twice: free {sorted(self._free)}, running {sorted(self.running)}"
        reserved = sum(sequence.cells for sequence in self.running.values())
        if reserved != self.cells_reserved:
            return f"{self.cells_reserved} cells are reserved, {reserved} by running sequences"
        for slot in range(self.room.slots):
            due = self.running[slot].computed if slot in self.running else 0
            if (held := seq_length(slot)) != due:
                return f"the backend holds {held} tokens in slot {slot}, {due} are due"
        return ""
