"""The seam between the engine and whatever computes logits.

Owns: the contract that `llama.py` and `fake.py` both keep, and the errors that cross it. Refuses to know: requests,
scheduling, text, and which of the two is behind the seam.

A backend holds up to `room.slots` token sequences in `room.kv_cells` cells. Sequences are numbered from 0 to
`room.slots - 1`; the cell of position p of a sequence exists once a decode that carried it has returned OK. All methods
but `tokenize` belong to one thread, the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    wanted: whether the logits after the last token are wanted. Those of the others never are.
    """

    seq: int
    start: int
    tokens: Sequence[int]
    wanted: bool


@dataclass(frozen=True)
class Room:
    """What fits: `slots` sequences at once, `n_ctx` tokens in each, `kv_cells` tokens in all, `n_batch` in one step."""

    slots: int
    n_ctx: int
    kv_cells: int
    n_batch: int

    def __post_init__(self) -> None:
        if min(self.slots, self.n_ctx, self.kv_cells, self.n_batch) < 1:
            raise ValueError(f"every figure of {self} must be at least 1")
        if self.n_batch < self.slots:
            raise ValueError(f"n_batch ({self.n_batch}) must be at least slots ({self.slots}): one token each")
        if self.kv_cells < self.n_ctx:
            raise ValueError(f"kv_cells ({self.kv_cells}) must be at least n_ctx ({self.n_ctx}): one full request")


class Backend(Protocol):
    """Computes logits for several token sequences at once.

    info: what the model says of itself.        room: what fits.
    pieces: bytes of each token as text; control tokens are empty. Length n_vocab.
    end_tokens: ids that end an answer.         devices: what the model runs on.
    """

    info: ModelInfo
    room: Room
    pieces: Sequence[bytes]
    end_tokens: frozenset[int]
    devices: tuple[Device, ...]

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`, without BOS. With `special`, control tokens written out in it count as such. Thread-safe."""
        ...

    def decode(self, chunks: Sequence[Chunk]) -> int:
        """Compute the chunks in one batch, at most `room.n_batch` tokens. Returns one of the codes above."""
        ...

    def logits(self) -> NDArray[np.float32]:
        """Shape (rows, n_vocab): one row for each wanted chunk of the last OK decode. Valid until the next decode."""
        ...

    def seq_length(self, seq: int) -> int:
        """How many tokens of the sequence are held."""
        ...

    def seq_remove(self, seq: int, start: int = 0) -> bool:
        """Forget positions from `start` on. False when the model cannot forget a part; all of it always works."""
        ...

    def seq_copy(self, source: int, target: int, length: int) -> None:
        """Give `target`, which must be empty, the first `length` positions of `source`, sharing their cells."""
        ...

    def close(self) -> None:
        """Free everything. No other call may follow. A second close does nothing."""
        ...
