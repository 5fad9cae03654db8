"""A loaded model that makes vectors or scores of texts, and one request's wait for what it asked.

Owns: the way from the event loop to the pooling engine and back. When a client leaves, its handler is cancelled where
it waits, and its texts leave the queue. Refuses to know: JSON, and what the vectors are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llmnode.engine.pooling import Pooled, PoolingAsk, PoolingBackend, PoolingEngine, PoolingEvent
from llmnode.engine.types import Failed, Stats
from llmnode.wire.errors import ApiError


@dataclass(frozen=True)
class Pooling:
    """A model that embeds or ranks, and the engine that runs it. Belongs to the event loop's thread."""

    engine: PoolingEngine
    backend: PoolingBackend
    _waiting: set[asyncio.Future[PoolingEvent]] = field(default_factory=set)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it serves, in the words of the node's report."""
        return ("rerank",) if self.backend.pooling == "rank" else ("embedding",)

    def stats(self) -> Stats:
        """The engine's snapshot, with a load of requests where the engine counts texts: two thousand of one request do
        not hold up the next, so they are no reason for a gate to send that elsewhere."""
        stats = self.engine.stats()
        slots, asked = self.backend.room.sequences, len(self._waiting)
        load = replace(stats.load, running=min(asked, slots), waiting=max(0, asked - slots))
        return replace(stats, load=load)

    async def compute(self, texts: Sequence[tuple[int, ...]], deadline: float) -> Pooled:
        """The vectors of these token ids as the model makes them, neither cut nor scaled. deadline: on the engine's
        clock. Raises what `PoolingEngine.submit` raises, and the ApiError that the engine ended with."""
        answer: asyncio.Future[PoolingEvent] = asyncio.get_running_loop().create_future()

        def take(event: PoolingEvent) -> None:
            if not answer.done():
                answer.set_result(event)

        id = self.engine.submit(PoolingAsk(tuple(texts), deadline=deadline), take)
        self._waiting.add(answer)
        try:
            event = await answer
        finally:
            self._waiting.discard(answer)
            self.engine.cancel(id)
        if isinstance(event, Failed):
            raise event.error
        return event

    def cut(self, error: ApiError) -> None:
        """End all that wait."""
        for answer in self._waiting:
            if not answer.done():
                answer.set_result(Failed(error))
