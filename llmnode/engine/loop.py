"""One thread owns the model; everyone else sends commands and reads events.

Owns: the engine thread and its step. Refuses to know: HTTP, asyncio, llama.cpp.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmnode.engine.backend import Backend, FatalEngineError
from llmnode.engine.types import Ask, Event, Sink, Stats

Deliver = Callable[[Sequence[tuple[Sink, Event]]], None]


@dataclass(frozen=True)
class Limits:
    """queue_limit: asks that may wait while every slot is taken."""

    queue_limit: int = 64


def call_each(events: Sequence[tuple[Sink, Event]]) -> None:
    for sink, event in events:
        sink(event)


class Engine:
    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        *,
        deliver: Deliver = call_each,
        on_fatal: Callable[[FatalEngineError], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def submit(self, ask: Ask, sink: Sink) -> int:
        raise NotImplementedError

    def cancel(self, id: int) -> None:
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError
