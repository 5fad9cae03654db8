"""Which prefixes the node holds, as the gate knows them: chains of block hashes (wire/chain.py).

The engine knows sequences of tokens and how far each is resident; a gate without a tokenizer knows blocks of bytes. A
`Prefix` is where the two meet: it goes with a sequence through the engine, which tells it back for as long as any of it
is held. Its chain is the request's at first, and once it has been answered also the reply's, as the next turn will send
it. What was restored from `prompt_cache_file` has no chain: its requests were another process's.

Owns: the chains, and what the report says of them. Lives on the event loop's thread. Refuses to know: how sequences are
held, and who asks for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llmnode.api.prompts import Gap
from llmnode.api.schema import ChatRequest, CompletionRequest
from llmnode.wire import chain
from llmnode.wire.chain import Chain
from llmnode.wire.node import Cache

MOST_BLOCKS = 4096
"""Hashes in a report: 44 KB as JSON."""
_MEMORY_TOKENS = 50_000
"""Prompt tokens after which an earlier prompt weighs 1/e in the bytes of a token."""


@dataclass(eq=False, slots=True)
class Prefix:
    """What one sequence is to the gate: its first `tokens` tokens are what `chain` stands for.

    answered: gives the chain with the reply, a text or a message, in it; None where no further request would begin so,
    and once it is known.
    """

    chain: Chain
    tokens: int
    answered: Callable[[str | Mapping[str, Any]], Chain] | None = None

    def blocks(self, held: int) -> int:
        """How many blocks stand for the first `held` tokens, as if each token had as many bytes as any other."""
        whole = len(self.chain.blocks)
        return whole if held >= self.tokens else min(whole, self.chain.size * held // self.tokens // chain.BLOCK)


def prefix(request: ChatRequest | CompletionRequest, tokens: int, salt: str) -> Prefix:
    """What a request with a prompt of so many tokens is to the gate. Takes 1.5 ms for 100,000 tokens: call it off the
    event loop."""
    body = request.options.body
    # /inference puts a prompt into a conversation: a longer prompt is another conversation, not a longer one. And what
    # has filled a gap stands between two texts the next time.
    goes_on = isinstance(request, ChatRequest) == chain.converses(body)
    if isinstance(request, CompletionRequest) and isinstance(request.prompt, Gap):
        goes_on = False
    answered = partial(chain.of_answered, body, salt=salt) if goes_on else None
    return Prefix(chain.of_request(body, salt), tokens, answered)


class Residency:
    """The chains of the prefixes that the engine holds."""

    def __init__(self) -> None:
        self.bytes_per_token = 0.0
        self.reported = 0  # hashes in the last report
        self._version = 0
        self._seen: tuple[object, int] = (None, 0)
        self._cache = Cache()
        self._bytes = self._tokens = 0.0

    def asked(self, prefix: Prefix, choices: int) -> list[Prefix]:
        """A request came in; returns what each of its choices is to the gate."""
        fade = max(0.0, 1.0 - prefix.tokens / _MEMORY_TOKENS)
        self._bytes = self._bytes * fade + prefix.chain.size
        self._tokens = self._tokens * fade + prefix.tokens
        if self._tokens:  # an empty prompt is refused, but not here
            self.bytes_per_token = round(self._bytes / self._tokens, 3)
        return [replace(prefix) for _ in range(choices)]

    def answered(self, prefix: Prefix, whole: Chain, tokens: int) -> None:
        """A choice was answered: prompt and reply have so many tokens, and this is their chain."""
        prefix.chain, prefix.tokens = whole, tokens
        self._version += 1

    def report(self, held: tuple[tuple[object, int], ...], *, parts: bool) -> Cache:
        """What `Stats.held` comes to. parts: `Engine.shares_parts`; where it is false, nobody can use less than all of
        what is held, so only its last block is told, and the first, without which a gate looks for no other."""
        seen = (held, self._version)
        if seen[0] is not self._seen[0] or seen[1] != self._seen[1]:
            blocks = chain.publish(_blocks(held, parts), MOST_BLOCKS)
            self._seen, self._cache, self.reported = seen, Cache(chain.pack(blocks)), len(blocks)
        return self._cache


def _blocks(held: Iterable[tuple[object, int]], parts: bool) -> Iterable[tuple[int, ...]]:
    for tag, tokens in held:
        if isinstance(tag, Prefix) and (count := tag.blocks(tokens)):
            blocks = tag.chain.blocks
            yield blocks[:count] if parts else (blocks[0], blocks[count - 1])
