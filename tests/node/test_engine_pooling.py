"""The engine of models that embed or rank: over the fake, whose vectors are the same in any company."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from llmnode.engine.backend import BAD_BATCH, FatalEngineError, Room
from llmnode.engine.fake_pooling import FakePooling
from llmnode.engine.pooling import Pooled, PoolingAsk, PoolingEngine, PoolingEvent, PoolingLimits, finished
from llmnode.engine.types import Failed
from llmnode.wire.errors import ApiError, InvalidRequest, Overloaded

PATIENCE_S = 60.0
ROOM = Room(slots=4, n_ctx=64, kv_cells=100, n_batch=100)


class Result:
    """A sink: exactly one event must come."""

    def __init__(self) -> None:
        self.events: list[PoolingEvent] = []
        self._came = threading.Event()

    def __call__(self, event: PoolingEvent) -> None:
        self.events.append(event)
        self._came.set()

    @property
    def event(self) -> PoolingEvent:
        assert self._came.wait(PATIENCE_S), "no event came"
        return self.events[0]

    @property
    def pooled(self) -> Pooled:
        event = self.event
        assert isinstance(event, Pooled), event
        return event

    @property
    def error(self) -> ApiError:
        event = self.event
        assert isinstance(event, Failed), event
        return event.error


class Watched(FakePooling):
    """Writes down its batches; holds each until it is let go, if told to; refuses texts with a poisonous token."""

    POISON = 66

    def __init__(self, room: Room = ROOM, *, held: bool = False, **options: Any) -> None:
        super().__init__(room, **options)
        self.batches: list[list[int]] = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.held, self.closed, self.code = held, False, 0

    def pool(self, texts: Sequence[Sequence[int]]) -> int:
        self.batches.append([len(text) for text in texts])
        if self.held:
            self.begun.release()
            assert self.go.acquire(timeout=PATIENCE_S)
        if any(self.POISON in text for text in texts):
            return BAD_BATCH
        return self.code or super().pool(texts)

    def vector(self, index: int) -> np.ndarray:
        vector = super().vector(index)
        return np.full_like(vector, math.nan) if self._texts[index][0] == 200 else vector

    def close(self) -> None:
        self.closed = True
        super().close()


def texts(count: int, length: int = 10, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    dice = np.random.default_rng(seed)
    return tuple(tuple(dice.integers(0, 60, length).tolist()) for _ in range(count))


@contextmanager
def running(backend: FakePooling, limits: PoolingLimits | None = None, **options: Any) -> Iterator[PoolingEngine]:
    engine = PoolingEngine(backend, limits, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def alone(ids: Sequence[int]) -> np.ndarray:
    backend = FakePooling(ROOM)
    assert backend.pool([ids]) == 0
    return backend.vector(0)


def test_vectors_come_in_the_order_of_their_texts_however_they_were_batched() -> None:
    backend = Watched()
    wanted = texts(23)
    with running(backend) as engine:
        results = [Result(), Result()]
        for result in results:
            engine.submit(PoolingAsk(wanted), result)
        for result in results:
            assert result.pooled.tokens == 230
            for vector, ids in zip(result.pooled.vectors, wanted, strict=True):
                assert np.array_equal(vector, alone(ids))
    assert all(len(batch) <= ROOM.sequences and sum(batch) <= ROOM.n_batch for batch in backend.batches)
    assert len(backend.batches) <= 13, "batches are filled"
    assert backend.closed


def test_a_long_ask_does_not_hold_up_a_short_one() -> None:
    backend = Watched()
    engine = PoolingEngine(backend)
    order: list[str] = []
    engine.submit(PoolingAsk(texts(40)), lambda event: order.append("long"))
    engine.submit(PoolingAsk(texts(1)), lambda event: order.append("short"))
    last = Result()
    engine.submit(PoolingAsk(texts(60)), last)
    engine.start()
    assert last.pooled
    engine.stop()
    assert order == ["short", "long"]


def test_a_text_that_was_too_long_for_what_was_left_begins_the_next_batch() -> None:
    backend = Watched(Room(slots=4, n_ctx=100, kv_cells=100, n_batch=100))
    engine = PoolingEngine(backend)
    small, large = [Result() for _ in range(3)], Result()
    for result in small:
        engine.submit(PoolingAsk(texts(30)), result)
    engine.submit(PoolingAsk(texts(1, length=100)), large)
    engine.start()
    assert large.pooled
    assert all(result.pooled for result in small)
    engine.stop()
    assert backend.batches[:2] == [[10, 10, 10, 10], [100]]


def test_what_no_model_could_take_is_refused_before_it_queues() -> None:
    engine = PoolingEngine(FakePooling(ROOM), PoolingLimits(queue_limit=5))
    ranking = PoolingEngine(FakePooling(ROOM, pooling="rank"))
    cases: list[tuple[PoolingEngine, PoolingAsk, str, str]] = [
        (engine, PoolingAsk(()), "there are 0 texts; from 1 to 5", "input"),
        (engine, PoolingAsk(texts(6)), "there are 6 texts; from 1 to 5", "input"),
        (engine, PoolingAsk(((1,), ())), "text 1 is empty", "input"),
        (engine, PoolingAsk(((1, 259),)), "from 0 to 258", "input"),
        (engine, PoolingAsk(((-1,),)), "from 0 to 258", "input"),
        (engine, PoolingAsk(((1,),), dimensions=33), "from 1 to 32, got 33", "dimensions"),
        (engine, PoolingAsk(((1,),), dimensions=0), "from 1 to 32, got 0", "dimensions"),
        (ranking, PoolingAsk(((1,),), normalized=True), "a score has no length", "dimensions"),
    ]
    for asked, ask, complaint, param in cases:
        with pytest.raises(InvalidRequest, match=complaint) as refusal:
            asked.submit(ask, Result())
        assert refusal.value.param == param
    with pytest.raises(InvalidRequest, match="text 0 has 65 tokens and the model takes 64 at most") as refusal:
        engine.submit(PoolingAsk(texts(1, length=65)), Result())
    assert refusal.value.code == "context_length_exceeded"
    assert engine.stats().load.waiting == 0


def test_a_full_queue_says_when_to_come_again() -> None:
    backend = Watched(held=True)
    with running(backend, PoolingLimits(queue_limit=10)) as engine:
        first, second = Result(), Result()
        engine.submit(PoolingAsk(texts(4)), first)
        assert backend.begun.acquire(timeout=PATIENCE_S)
        engine.submit(PoolingAsk(texts(9)), second)
        with pytest.raises(
            Overloaded, match="9 texts wait, and with 2 more they would be over the limit of 10"
        ) as full:
            engine.submit(PoolingAsk(texts(2)), Result())
        assert full.value.retry_after is not None
        assert full.value.retry_after > 0
        assert engine.submit(PoolingAsk(texts(1)), Result()) > 0
        backend.held = False
        backend.go.release()
        assert second.pooled
        assert engine.stats().timings.refused == 1


def test_a_cancelled_ask_ends_within_a_step_and_leaves_the_queue() -> None:
    backend = Watched(held=True)
    with running(backend) as engine:
        running_one, waiting_one, after = Result(), Result(), Result()
        first = engine.submit(PoolingAsk(texts(400)), running_one)
        assert backend.begun.acquire(timeout=PATIENCE_S)
        second = engine.submit(PoolingAsk(texts(300)), waiting_one)
        engine.submit(PoolingAsk(texts(1)), after)
        engine.cancel(first)
        engine.cancel(second)
        engine.cancel(12345)
        backend.held = False
        backend.go.release()
        assert running_one.error.code == waiting_one.error.code == "cancelled"
        assert after.pooled
        engine.cancel(first)
    assert len(running_one.events) == len(after.events) == 1
    assert len(backend.batches) == 2
    assert (engine.stats().load.waiting, engine.stats().timings.cancelled) == (0, 2)


def test_a_deadline_ends_what_was_not_ready() -> None:
    now = [100.0]
    backend = Watched()
    engine = PoolingEngine(backend, clock=lambda: now[0])
    late, early = Result(), Result()
    engine.submit(PoolingAsk(texts(2), deadline=105.0), late)
    engine.submit(PoolingAsk(texts(2), deadline=115.0), early)
    now[0] = 110.0
    engine.start()
    assert late.error.status == 504
    assert early.pooled.queued_s == 10.0
    engine.stop()


def test_only_the_ask_with_the_guilty_text_fails() -> None:
    backend = Watched()
    engine = PoolingEngine(backend)
    good, bad = Result(), Result()
    engine.submit(PoolingAsk(texts(3)), good)
    engine.submit(PoolingAsk(((1, 2), (5, Watched.POISON), (3, 4))), bad)
    engine.start()
    assert bad.error.code == "model_failed"
    for vector, ids in zip(good.pooled.vectors, texts(3), strict=True):
        assert np.array_equal(vector, alone(ids))
    engine.stop()
    assert len(bad.events) == 1
    assert engine.stats().load.waiting == 0


def test_a_vector_that_is_not_a_number_fails_its_ask_only() -> None:
    with running(Watched()) as engine:
        broken, good = Result(), Result()
        engine.submit(PoolingAsk(((200, 1), (200, 2))), broken)
        engine.submit(PoolingAsk(texts(1)), good)
        assert "not a number" in broken.error.message
        assert good.pooled
    assert len(broken.events) == 1


def test_a_fatal_code_ends_the_engine_and_tells_everyone() -> None:
    backend = Watched()
    backend.code = -3
    fatal: list[FatalEngineError] = []
    engine = PoolingEngine(backend, on_fatal=fatal.append)
    results = [Result() for _ in range(3)]
    for result in results:
        engine.submit(PoolingAsk(texts(30)), result)
    engine.start()
    for result in results:
        assert "code -3" in result.error.message
    engine.stop()
    assert [str(error) for error in fatal] == ["computing vectors ended with code -3"]
    with pytest.raises(Overloaded, match="code -3"):
        engine.submit(PoolingAsk(texts(1)), Result())


def test_stopping_tells_those_who_wait() -> None:
    backend = Watched(held=True)
    engine = PoolingEngine(backend)
    engine.start()
    result = Result()
    engine.submit(PoolingAsk(texts(400)), result)
    assert backend.begun.acquire(timeout=PATIENCE_S)
    assert engine.stats().step_deadline is not None, "the watchdog sees the step that runs"
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    backend.held = False
    backend.go.release()
    stopper.join(PATIENCE_S)
    assert result.error.status == 503
    assert backend.closed
    with pytest.raises(Overloaded, match="stopping"):
        engine.submit(PoolingAsk(texts(1)), Result())


def test_every_sink_gets_one_event_whatever_happens() -> None:
    dice = np.random.default_rng(7)
    with running(Watched()) as engine:
        results, kept = [], []
        for number in range(200):
            size, length = int(dice.integers(1, 30)), int(dice.integers(1, 60))
            ids = texts(size, length, number)
            if number % 17 == 0:
                ids = (*ids, (Watched.POISON,))
            results.append(Result())
            id = engine.submit(PoolingAsk(ids), results[-1])
            if number % 5 == 0:
                engine.cancel(id)
            else:
                kept.append((ids, results[-1]))
        for result in results:
            assert result.event
        for ids, result in kept:
            if isinstance(result.event, Pooled):
                assert all(np.array_equal(v, alone(t)) for v, t in zip(result.pooled.vectors, ids, strict=True))
            else:
                assert (Watched.POISON,) in ids
    assert [len(result.events) for result in results] == [1] * 200
    timings, load = engine.stats().timings, engine.stats().load
    assert timings.finished + timings.failed + timings.cancelled == 200
    assert (load.waiting, load.queued_prompt_tokens) == (0, 0)


def test_vectors_are_cut_and_scaled_as_asked() -> None:
    rows = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 5.0]], np.float32)
    assert np.allclose(finished(rows[0], normalized=True, dimensions=None), rows[0] / 13)
    assert np.allclose(finished(rows[0], normalized=True, dimensions=2), [0.6, 0.8])
    assert np.allclose(finished(rows, normalized=True, dimensions=2), [[0.6, 0.8], [0, 0]])
    kept = finished(rows, normalized=False, dimensions=None)
    rows[:] = 0
    assert kept[0, 2] == 12, "a copy: the backend's memory is used again"


def test_the_fakes_tokens_are_bytes_between_ends() -> None:
    backend = FakePooling(ROOM, pooling="none")
    assert backend.tokenize("ab", special=False, ends=True) == [256, 97, 98, 257]
    assert backend.pair("a", "b") == [256, 97, 258, 98, 257]
    assert backend.pool([[1, 2, 3], [4]]) == 0
    assert backend.vector(0).shape == (3, 32)
    assert FakePooling(ROOM, pooling="rank").width == 1
