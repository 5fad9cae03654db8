"""The seal on a saved sequence: which backend it is for, how long it is, and that nothing of it has changed.

Owns: the header before llama.cpp's own bytes. llama.cpp checks types and row sizes when it reads a state, but takes
positions as they come and trusts that the model is the same, so nothing reaches it that this has not passed.

Layout, little-endian: 8 bytes magic, 16 bytes digest of model, settings and version of llama.cpp, u64 length in tokens,
u64 size of the body, u64 sum of the body.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

import numpy as np

from llmnode.engine.backend import Saved
from llmnode.engine.llama.native import VERSION

_MAGIC = b"llmrseq1"
_HEADER = struct.Struct("<8s16sQQQ")
SIZE = _HEADER.size


class Seal:
    """Closes what one backend saves, and opens only that. `settings`: everything that decides the form of the body."""

    def __init__(self, model: bytes, *settings: object) -> None:
        self._owner = blake2b(model + repr((VERSION, *settings)).encode(), digest_size=16).digest()

    def close(self, saved: Saved, length: int) -> None:
        """Write the header before the body, which is there already."""
        _HEADER.pack_into(saved, 0, _MAGIC, self._owner, length, len(saved) - SIZE, _sum(saved))

    def length(self, saved: Saved) -> int:
        """The tokens that are in it; 0 when it is not ours or not whole."""
        if len(saved) <= SIZE:
            return 0
        magic, owner, length, size, checksum = _HEADER.unpack_from(saved)
        if (magic, owner, size) != (_MAGIC, self._owner, len(saved) - SIZE) or checksum != _sum(saved):
            return 0
        return int(length)


def _sum(saved: Saved) -> int:
    """The body as 64-bit words, added up: any changed bit shows, at 10 GB/s where a CRC makes 1."""
    body = np.frombuffer(saved, np.uint8, offset=SIZE)
    whole = len(body) // 8 * 8
    words = int(body[:whole].view(np.uint64).sum(dtype=np.uint64))
    return (words + int.from_bytes(body[whole:].tobytes(), "little")) % 2**64
