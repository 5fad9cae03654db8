"""The seam between the engine and whatever computes logits.

Owns: the contract that `llama.py` and `fake.py` both keep, and the errors that cross it. Refuses to know: requests,
scheduling, text, and which of the two is behind the seam.

A backend holds up to `room.sequences` token sequences in `room.kv_cells` cells. Sequences are numbered from 0; the
cell of position p of a sequence exists once a decode that carried it has returned OK. In a unified cache sequences may
share cells (`seq_copy`); in a parted one each has a part of its own. All methods but a `Tokenizer`'s belong to one
thread, the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llmnode.engine.types import ModelInfo
from llmnode.wire.node import Device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OK = 0
NO_ROOM = 1
"""No cell was free. Nothing of the batch stays."""
ABORTED = 2
"""Stopped on the way: some of the batch may stay, `seq_length` says how much."""
BAD_BATCH = -1
"""The batch itself is wrong. Nothing of it stays. Every code below this one is fatal."""


class ModelLoadError(Exception):
    """The model cannot be loaded. The message names the file or device and what is wrong with it."""


class FatalEngineError(Exception):
    """The engine cannot go on: the process should leave and be started again."""


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, to be computed in one step.

    seq: the sequence.        start: position of the first token, equal to the tokens that the sequence has so far.
    tokens: ids, at least one, in anything that numpy reads as int32.
    rows: of how many of its last tokens the logits are wanted, 0 to len(tokens).
    """

    seq: int
    start: int
    tokens: Sequence[int]
    rows: int


@dataclass(frozen=True)
class Room:
    """What fits.

    slots: sequences that are answered at once.         n_ctx: tokens in each of them.
    kv_cells: tokens in all sequences together, shared ones counted once.
    n_batch: tokens in one step.
    sequences: sequences that can be held, answered or idle; 0 in the constructor stands for `slots`.
    rows: rows of logits in one step; 0 in the constructor stands for `slots`.
    unified: all sequences take their cells from one cache. Otherwise it is parted: each has kv_cells / sequences of its
        own, at least n_ctx, a copy takes as many cells as its source, and a batch is computed in as many passes as its
        sequences' numbers have gaps.
    """

    slots: int
    n_ctx: int
    kv_cells: int
    n_batch: int
    sequences: int = 0
    rows: int = 0
    unified: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", self.sequences or self.slots)
        object.__setattr__(self, "rows", self.rows or self.slots)
        if min(self.slots, self.n_ctx, self.kv_cells, self.n_batch) < 1:
            raise ValueError(f"every figure of {self} must be at least 1")
        if self.n_batch < self.slots:
            raise ValueError(f"n_batch ({self.n_batch}) must be at least slots ({self.slots}): one token each")
        if self.kv_cells < self.n_ctx:
            raise ValueError(f"kv_cells ({self.kv_cells}) must be at least n_ctx ({self.n_ctx}): one full request")
        if self.sequences < self.slots or self.rows < self.slots:
            raise ValueError(f"sequences and rows of {self} must be at least its slots")
        if not self.unified and self.kv_cells < self.sequences * self.n_ctx:
            raise ValueError(f"kv_cells of {self} must be at least sequences x n_ctx: each has a part of its own")


Saved = bytearray
"""A sequence's cells, taken out of the backend: for the same model, options and version of llama.cpp only."""


class Tokenizer(Protocol):
    """What every model has: texts to ids and back. Thread-safe.

    info: what the model says of itself.
    """

    info: ModelInfo

    def tokenize(self, text: str, *, special: bool, ends: bool = False) -> list[int]:
        """Ids of `text`. With `special`, control tokens written out in it count as such; with `ends`, those stand
        around it that the model wants there (BOS, EOS)."""
        ...

    def spell(self, token: int) -> bytes:
        """The bytes of a token, which may be half a character; of a control token those of its name."""
        ...


class Backend(Tokenizer, Protocol):
    """Computes logits for several token sequences at once.

    room: what fits.
    can_cut: whether a sequence can forget its last tokens (attention can, recurrent state cannot). Probed at load.
    pieces: bytes of each token as text; control tokens are empty. Length n_vocab.
    specials: the tokens that are more than a text, by their spelling: control tokens, and those of the model's makers.
    end_tokens: ids that end an answer.         devices: what the model runs on.
    """

    room: Room
    can_cut: bool
    pieces: Sequence[bytes]
    specials: Mapping[str, int]
    end_tokens: frozenset[int]
    devices: tuple[Device, ...]

    def decode(self, chunks: Sequence[Chunk]) -> int:
        """Compute the chunks in one batch, at most `room.n_batch` tokens and `room.rows` rows, each sequence once.

        Returns one of the codes above."""
        ...

    def logits(self) -> NDArray[np.float32]:
        """Shape (rows, n_vocab): the rows that the chunks of the last OK decode wanted, in their order. Valid until
        the next decode."""
        ...

    def seq_length(self, seq: int) -> int:
        """How many tokens of the sequence are held."""
        ...

    def seq_remove(self, seq: int, start: int = 0) -> bool:
        """Forget positions from `start` on. False when the model cannot forget a part; all of it always works."""
        ...

    def seq_reusable(self, seq: int, length: int) -> bool:
        """Whether going on after the first `length` tokens of this sequence, here or in a copy, would be exact.

        Attention: always. Sliding windows: while the tokens that the window still sees are held. Recurrent state: only
        at its very end."""
        ...

    def seq_copy(self, source: int, target: int, length: int) -> None:
        """Give `target`, which must be empty, the first `length` positions of `source`: in a unified cache by sharing
        their cells, in a parted one by copying them.

        `seq_reusable(source, length)` must be true."""
        ...

    def seq_save(self, seq: int) -> Saved:
        """The sequence's cells, to bring it back with `seq_load`. Changes nothing. Empty when it cannot be saved."""
        ...

    def seq_load(self, seq: int, saved: Saved) -> bool:
        """Fill a sequence, which must be empty, from `seq_save`. It takes cells of its own. False when it does not fit
        or
        is not for this backend: then the sequence is empty."""
        ...

    def close(self) -> None:
        """Free everything. No other call may follow. A second close does nothing."""
        ...
