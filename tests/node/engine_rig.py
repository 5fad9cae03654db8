"""What the engine's tests share: a sink that collects an answer's events, and a fake model that steps on command."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llmnode.engine.backend import Backend, Chunk, Room
from llmnode.engine.fake import FakeBackend
from llmnode.engine.loop import Engine, Limits
from llmnode.engine.types import Done, Event, Failed, Text

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far above what it takes on a slow machine."""


class Answer:
    """A sink. `wait` returns its last event; raises when none comes."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self) -> Done | Failed:
        with self._changed:
            assert self._changed.wait_for(lambda: self._last() is not None, PATIENCE_S), "no end of the answer came"
        last = self._last()
        assert last is not None
        return last

    def wait_for_text(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.events), PATIENCE_S), "no event came"

    def _last(self) -> Done | Failed | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Done | Failed) else None

    @property
    def done(self) -> Done:
        last = self.wait()
        assert isinstance(last, Done), last
        return last

    @property
    def error(self) -> Any:
        last = self.wait()
        assert isinstance(last, Failed), last
        return last.error

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(id for event in self.events if isinstance(event, Text | Done) for id in event.ids)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


class Steps:
    """Holds each decode of a fake until the test allows it, so that tests need no clock to know where the engine is."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)
        self._begun = threading.Semaphore(0)
        self._free = threading.Event()

    def sleep(self, _: float) -> None:
        self._begun.release()
        while not self._free.is_set() and not self._allowed.acquire(timeout=0.01):
            pass

    def begun(self) -> None:
        """Wait until one more decode has begun; it is held."""
        assert self._begun.acquire(timeout=PATIENCE_S), "no step began"

    def allow(self) -> None:
        """Let the decode that is held go on."""
        self._allowed.release()

    def free(self) -> None:
        """Hold no more decodes."""
        self._free.set()


class Watched(FakeBackend):
    """A fake that writes down its batches, and whose decode codes a test can choose (None: compute as usual)."""

    def __init__(self, room: Room, codes: Sequence[int | None] = (), **options: Any) -> None:
        super().__init__(room, **options)
        self.batches: list[list[Chunk]] = []
        self.codes = list(codes)
        self.closed = False

    def decode(self, chunks: Sequence[Chunk]) -> int:
        self.batches.append(list(chunks))
        code = self.codes.pop(0) if self.codes else None
        return super().decode(chunks) if code is None else code

    def close(self) -> None:
        self.closed = True
        super().close()


@contextmanager
def running(
    backend: Backend, limits: Limits | None = None, steps: Steps | None = None, **options: Any
) -> Iterator[Engine]:
    """An engine for the length of the block; a test that fails leaves no step held."""
    engine = Engine(backend, limits or Limits(), **options)
    engine.start()
    try:
        yield engine
    finally:
        if steps is not None:
            steps.free()
        engine.stop()
