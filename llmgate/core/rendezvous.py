"""Rendezvous hashing: where something lives when nothing else decides, the same at every gate that asks.

Each node draws a number from the hash of (key, node); the highest is first. A node that comes or goes moves only the
keys that it wins or loses. Weights as in Schindelhauer and Schomaker, "Weighted Distributed Hash Tables" (2005):
score = -weight / ln(draw), so that a node of weight 2 gets twice the keys of one of weight 1.
"""

from __future__ import annotations

import math
from hashlib import blake2b


def score(key: int, name: str, weight: float) -> float:
    """The higher, the earlier. `key` is any 64 bits, `weight` above 0."""
    return -weight / math.log(draw(key, name))


def draw(key: int, name: str) -> float:
    """A number above 0 and below 1, as if by chance, always the same for these two."""
    digest = blake2b(key.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
    # 53 bits and a half: what a float between 0 and 1 can hold, neither end included.
    return ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52


def key(text: str) -> int:
    """64 bits for a text, e.g. a request id."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
