"""A pooling backend without a model: a text's vector is a hash of its tokens, so that it is the same in any company.

Shipped, as fake.py is: tests may ask for equality, and a fleet can be rehearsed on machines that have no model.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from llmnode.engine.backend import BAD_BATCH, OK, Room
from llmnode.engine.types import ModelInfo
from llmnode.wire.node import Device

if TYPE_CHECKING:
    from numpy.typing import NDArray

BEGIN, END, SEPARATOR = 256, 257, 258
NAMES = (b"<|begin|>", b"<|end|>", b"<|separator|>")


class FakePooling:
    """Tokens are the bytes of a text, between BEGIN and END. See pooling.PoolingBackend for what a method promises."""

    def __init__(self, room: Room, *, pooling: str = "mean", width: int = 32) -> None:
        self.info = ModelInfo(
            name="fake",
            architecture="fake",
            n_vocab=259,
            n_ctx_train=room.n_ctx,
            n_params=0,
            size_bytes=0,
            chat_template="",
            bos="",
            eos="",
            add_bos=True,
        )
        self.room, self.pooling, self.width = room, pooling, 1 if pooling == "rank" else width
        self.devices: tuple[Device, ...] = ()
        self._texts: list[list[int]] = []

    def tokenize(self, text: str, *, special: bool, ends: bool = False) -> list[int]:
        return [BEGIN, *text.encode(), END] if ends else list(text.encode())

    def spell(self, token: int) -> bytes:
        return bytes([token]) if token < BEGIN else NAMES[token - BEGIN]

    def pair(self, query: str, document: str) -> list[int]:
        return [BEGIN, *query.encode(), SEPARATOR, *document.encode(), END]

    def pool(self, texts: Many[Many[int]]) -> int:
        sizes = [len(text) for text in texts]
        if not 0 < len(texts) <= self.room.sequences or sum(sizes) > self.room.n_batch or 0 in sizes:
            return BAD_BATCH
        self._texts = [list(text) for text in texts]
        return OK

    def vector(self, index: int) -> NDArray[np.float32]:
        text = self._texts[index]
        if self.pooling == "none":
            return np.stack([self._hash(text[: end + 1]) for end in range(len(text))])
        return self._hash(text)

    def close(self) -> None:
        self._texts = []

    def _hash(self, text: list[int]) -> NDArray[np.float32]:
        seed = blake2b(np.array(text, "<i4").tobytes(), digest_size=16).digest()
        dice = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
        return dice.standard_normal(self.width, dtype=np.float32)
