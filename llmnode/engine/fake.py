"""A backend without a model: the logits are a hash of the tokens before them.

Owns: a deterministic answer for each prompt, whatever runs beside it, so that tests can ask for equality where real
models only promise closeness. Refuses to know: llama.cpp. Shipped: a fleet can be rehearsed on machines that have no
model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from llmnode.engine.backend import BAD_BATCH, NO_ROOM, OK, Chunk, Room, Saved
from llmnode.engine.types import InfillTokens, ModelInfo
from llmnode.wire.node import Device

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPECIALS = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
BOS, END = 256, 257
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CELL = 16
"""Bytes of a cell: enough that no two prefixes share a hash."""
_NEVER = -20.0
"""A logit so low that a draw in 50 million is another token: halves of characters come in no legible answer."""
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")


class FakeBackend:
    """Tokens are the 256 bytes, then SPECIALS. Answers are made of lower-case letters and spaces, unless not `legible`:
    then any byte comes, also halves of characters.

    step_delay_s: how long each decode takes beside its own work, so that a caller can hold streams open.
    sleep: how to wait that long.
    can_cut: whether sequences can forget a part, as attention can; without it they behave like recurrent state.
    """

    def __init__(
        self,
        room: Room,
        *,
        step_delay_s: float = 0.0,
        legible: bool = True,
        can_cut: bool = True,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._likely = np.full(256 + len(SPECIALS), _NEVER, np.float32)
        self._likely[END] = -1.0 if legible else 0.0
        self._likely[list(b" abcdefghijklmnopqrstuvwxyz") if legible else slice(256)] = 0.0
        self.info = ModelInfo(
            name="fake",
            architecture="fake",
            n_vocab=len(self._likely),
            n_ctx_train=room.n_ctx,
            n_params=0,
            size_bytes=0,
            chat_template=TEMPLATE,
            bos=SPECIALS[0],
            eos=SPECIALS[1],
            add_bos=True,
            cell_bytes=_CELL,
            digest=blake2b(self._likely.tobytes(), digest_size=16).hexdigest(),  # all the weights there are
            infill=InfillTokens(*(256 + SPECIALS.index(f"<|{role}|>") for role in ("system", "user", "assistant"))),
        )
        self.room = room
        self.can_cut = can_cut
        self.pieces: Sequence[bytes] = [bytes([byte]) for byte in range(256)] + [b""] * len(SPECIALS)
        self.specials: Mapping[str, int] = {name: 256 + index for index, name in enumerate(SPECIALS)}
        self.end_tokens = frozenset({END})
        self.devices: tuple[Device, ...] = ()
        self._delay, self._sleep = step_delay_s, sleep
        # A cell is the hash of all tokens up to its position. Sharing a prefix shares the very same objects.
        self._cells: dict[int, list[bytes]] = {}
        self._holders: dict[int, int] = {}
        self._rows: list[bytes] = []

    def tokenize(self, text: str, *, special: bool, ends: bool = False) -> list[int]:
        ids = [BOS] if ends else []
        if not special:
            return [*ids, *text.encode()]
        for part in _SPLIT.split(text):
            ids += [256 + SPECIALS.index(part)] if part in SPECIALS else part.encode()
        return ids

    def spell(self, token: int) -> bytes:
        return self.pieces[token] or SPECIALS[token - 256].encode()

    def decode(self, chunks: Sequence[Chunk]) -> int:
        if self._delay:
            self._sleep(self._delay)
        size, rows = sum(len(chunk.tokens) for chunk in chunks), sum(chunk.rows for chunk in chunks)
        if not 0 < size <= self.room.n_batch or rows > self.room.rows or not all(map(self._is_good, chunks)):
            return BAD_BATCH
        if len(self._holders) + size > self.room.kv_cells or not all(map(self._has_part, chunks)):
            return NO_ROOM
        self._rows = []
        for chunk in chunks:
            cells = self._cells.setdefault(chunk.seq, [])
            state = cells[-1] if cells else b""
            for token in chunk.tokens:
                state = blake2b(state + token.to_bytes(4, "little"), digest_size=_CELL).digest()
                cells.append(state)
                self._hold(state, +1)
            self._rows += cells[len(cells) - chunk.rows :]
        return OK

    def logits(self) -> NDArray[np.float32]:
        rows = np.empty((len(self._rows), self.info.n_vocab), np.float32)
        for row, state in zip(rows, self._rows, strict=True):
            dice = np.random.Generator(np.random.PCG64(int.from_bytes(state, "little")))
            np.add(self._likely, dice.standard_normal(len(row), dtype=np.float32), out=row)
        return rows

    def seq_length(self, seq: int) -> int:
        return len(self._cells.get(seq, ()))

    def seq_remove(self, seq: int, start: int = 0) -> bool:
        cells = self._cells.get(seq, [])
        if not self.can_cut and 0 < start < len(cells):
            return False
        for state in cells[start:]:
            self._hold(state, -1)
        del cells[start:]
        return True

    def seq_reusable(self, seq: int, length: int) -> bool:
        return length <= self.seq_length(seq) if self.can_cut else length == self.seq_length(seq)

    def seq_copy(self, source: int, target: int, length: int) -> None:
        cells = self._cells[source][:length]
        # Bytes made anew are other cells, though equal.
        self._cells[target] = cells if self.room.unified else [bytes(bytearray(cell)) for cell in cells]
        for state in self._cells[target]:
            self._hold(state, +1)

    def seq_save(self, seq: int) -> Saved:
        return bytearray(b"".join(self._cells.get(seq, ())))

    def seq_load(self, seq: int, saved: Saved) -> bool:
        size = len(saved) // _CELL
        if len(saved) % _CELL or len(self._holders) + size > self.room.kv_cells:
            return False
        self._cells[seq] = [bytes(saved[at : at + _CELL]) for at in range(0, len(saved), _CELL)]
        for state in self._cells[seq]:
            self._hold(state, +1)
        return True

    def close(self) -> None:
        self._cells.clear()
        self._holders.clear()

    def _is_good(self, chunk: Chunk) -> bool:
        return (
            0 <= chunk.seq < self.room.sequences
            and chunk.start == self.seq_length(chunk.seq)
            and 0 <= chunk.rows <= len(chunk.tokens)
            and all(0 <= token < self.info.n_vocab for token in chunk.tokens)
        )

    def _has_part(self, chunk: Chunk) -> bool:
        """Whether the sequence's own part of a parted cache holds the chunk."""
        room = self.room
        return room.unified or chunk.start + len(chunk.tokens) <= room.kv_cells // room.sequences

    def _hold(self, cell: bytes, by: int) -> None:
        """Count the sequences that hold this very cell; it is free again when none does."""
        holders = self._holders.get(id(cell), 0) + by
        if holders:
            self._holders[id(cell)] = holders
        else:
            del self._holders[id(cell)]
