"""What this gate has sent to a node lately, and so what the node is about to hold and has yet to compute.

A report is up to a poll old. In between, a request that has just left says two things of its node: its prompt's tokens
are still to be computed there (until its answer begins, or a report counts them), and its prompt's blocks will be held
there (for `PREDICTED_S`, by when a report should name them). Both are guesses; the answer's `cached_tokens` corrects
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmgate.core.copying import changed
from llmnode.wire.chain import Chain

PREDICTED_S = 5.0
"""How long a dispatch stands for what the node holds, in seconds."""
MOST = 64
"""Dispatches kept a node: what comes before them its next report will know. Bounds the work for each request."""
_FAR_TOKENS = 64
"""A prediction is off by chance within this many tokens, about one block."""


@dataclass(frozen=True)
class Sent:
    """One request on its way at a node.

    blocks: of its chain.    depth: how many of these the node was thought to hold.
    cached: tokens which that is.    tokens: those of its prompt which the node must compute; 0 once it has done so.
    now: when it left.
    """

    request: str
    blocks: tuple[int, ...]
    depth: int
    cached: int
    tokens: int
    now: float

    def missed(self, cached: int) -> bool:
        """Whether the node found far fewer tokens than predicted: less than half, and not by a block's chance."""
        return cached < self.cached / 2 and self.cached - cached > _FAR_TOKENS

    def really(self, cached: int) -> int:
        """How many blocks were held, by what the node says it found."""
        return self.depth * cached // self.cached if self.cached else 0


def add(sents: Sequence[Sent], sent: Sent) -> tuple[Sent, ...]:
    """With one more; without those that predict nothing any more."""
    return (*fresh(sents, sent.now)[-(MOST - 1) :], sent)


def fresh(sents: Iterable[Sent], now: float) -> tuple[Sent, ...]:
    return tuple(sent for sent in sents if now - sent.now <= PREDICTED_S)


def over(sents: tuple[Sent, ...], sent: Sent, *, computed: bool) -> tuple[tuple[Sent, ...], int]:
    """Once nothing of it is left to compute -> (the others and it, its tokens until then). A node that did not take it
    will not hold it."""
    for at, other in enumerate(sents):
        if (other.request, other.now) == (sent.request, sent.now):
            itself = (changed(other, tokens=0),) if computed else ()
            return (*sents[:at], *itself, *sents[at + 1 :]), other.tokens
    return sents, 0


def corrected(sents: Iterable[Sent], wrong: Sent, cached: int) -> tuple[Sent, ...]:
    """Without those that say the node holds more of this prompt than it turned out to hold."""
    return tuple(other for other in sents if common(other.blocks, wrong.blocks) <= wrong.really(cached))


def backlog(sents: Iterable[Sent], since: float) -> int:
    """Prompt tokens that were sent after `since` and are not computed yet."""
    return sum(sent.tokens for sent in sents if sent.now > since)


def depth(sents: Sequence[Sent], chain: Chain, now: float) -> int:
    """How many blocks of the chain the node is about to hold."""
    found, blocks, oldest = 0, chain.blocks, now - PREDICTED_S
    for sent in reversed(sents):
        if found == len(blocks) or sent.now < oldest:
            break
        # Who shares no more blocks than that is told by one look: a hash stands for all before it.
        theirs = sent.blocks
        if found < len(theirs) and theirs[found] == blocks[found]:
            found = common(theirs, blocks)
    return found


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many blocks two chains share. A hash stands for all before it, so the last shared one is found by halving."""
    if not a or not b or a[0] != b[0]:
        return 0
    low, high = 1, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[middle - 1] == b[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
