"""Texts in, vectors or scores out: the engine of models that embed or rank.

Owns: the seam to what computes vectors (`PoolingBackend`), and one thread that packs waiting texts into batches.
Refuses to know: llama.cpp, HTTP, and the engine that generates: both may run in one process, each with a context and a
thread of its own, so that neither touches the other's cells.

A text is computed in one piece (its vector depends on all of it), several texts at once. Asks take turns: each step
takes one text of each in turn until the batch is full, so that two thousand texts do not hold up the one that follows.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmnode.engine.backend import BAD_BATCH, OK, FatalEngineError, Room, Tokenizer
from llmnode.engine.rates import Rate
from llmnode.engine.types import Failed, Stats, Timings
from llmnode.wire.errors import ApiError, DeadlineExceeded, InvalidRequest, Overloaded
from llmnode.wire.node import Device, Load

if TYPE_CHECKING:
    from numpy.typing import NDArray

POOLINGS = ("none", "mean", "cls", "last", "rank")
"""How the vectors of a text's tokens become one: not at all, their mean, the first, the last, a classifier's score."""

_IDLE_TICK_S = 0.5


class PoolingBackend(Tokenizer, Protocol):
    """Computes the vectors of several texts at once.

    pooling: one of POOLINGS.    devices: what the model runs on.
    width: values in a vector; of a rank, the classifier's outputs, the first of which is the score.
    room: n_ctx tokens in one text at most, n_batch tokens and `sequences` texts in one batch.
    All methods but a `Tokenizer`'s and `pair` belong to one thread, the engine's.
    """

    room: Room
    pooling: str
    width: int
    devices: tuple[Device, ...]

    def pair(self, query: str, document: str) -> list[int]:
        """Ids of two texts as a ranking model wants to read them together. Thread-safe."""
        ...

    def pool(self, texts: Many[Many[int]]) -> int:
        """Compute the texts in one batch. Returns one of the codes of backend.py."""
        ...

    def vector(self, index: int) -> NDArray[np.float32]:
        """What came of a text of the last OK `pool`: shape (width,), or (tokens, width) where nothing is pooled. Valid
        until the next."""
        ...

    def close(self) -> None:
        """Free everything. No other call may follow. A second close does nothing."""
        ...


@dataclass(frozen=True)
class PoolingAsk:
    """Vectors wanted of some texts.

    texts: token ids, at least one text, each of at least one token.
    normalized: scaled to length 1.        dimensions: the first so many values only, None for all.
    deadline: on the clock `time.monotonic()`, in seconds; None for no deadline.
    """

    texts: tuple[tuple[int, ...], ...]
    normalized: bool = False
    dimensions: int | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Pooled:
    """One vector for each text, in their order. Seconds: `queued` until the first was computed, `compute` from then."""

    vectors: tuple[NDArray[np.float32], ...]
    tokens: int
    queued_s: float
    compute_s: float


PoolingEvent = Pooled | Failed
PoolingSink = Callable[[PoolingEvent], None]
PoolingDeliver = Callable[[Many[tuple[PoolingSink, PoolingEvent]]], None]


@dataclass(frozen=True)
class PoolingLimits:
    """queue_limit: texts that may wait, of all asks together.

    step_grace_s, step_tolerance: a step counts as stuck after the grace plus so many times what it should take.
    slowest_tps: tokens per second that are taken for granted before any were measured.
    """

    queue_limit: int = 4096
    step_grace_s: float = 10.0
    step_tolerance: float = 10.0
    slowest_tps: float = 1.0


def call_each(events: Many[tuple[PoolingSink, PoolingEvent]]) -> None:
    """Hand each event to its sink, on the engine's thread."""
    for sink, event in events:
        sink(event)


@dataclass
class _Job:
    """An ask inside the engine. next: its next text to be computed. over: its sink was told."""

    id: int
    ask: PoolingAsk
    sink: PoolingSink
    arrived: float
    next: int = 0
    began: float | None = None
    vectors: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    over: bool = False


class PoolingEngine:
    """Runs asks on a backend, which it owns from `start` to `stop` and then closes.

    deliver: gets all events of one step in one call, on the engine's thread. A sink gets exactly one event.
    on_fatal: called on the engine's thread when it cannot go on, after everyone has been told.
    clock: seconds, as `time.monotonic`; deadlines of asks are on it.
    """

    def __init__(
        self,
        backend: PoolingBackend,
        limits: PoolingLimits | None = None,
        *,
        deliver: PoolingDeliver = call_each,
        on_fatal: Callable[[FatalEngineError], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend, self._limits = backend, limits or PoolingLimits()
        self._deliver_all, self._on_fatal, self._clock = deliver, on_fatal, clock
        self._jobs: deque[_Job] = deque()  # those with texts left to compute, in turn
        self._out: list[tuple[PoolingSink, PoolingEvent]] = []
        self._rate = Rate()
        self._timings = Timings()
        self._step_deadline: float | None = None

        self._ids = itertools.count(1)
        self._door = threading.Lock()  # guards the four below, which other threads touch
        self._inbox: deque[_Job | int] = deque()
        self._texts = self._tokens = 0
        self._refused = 0
        self._closed = ""
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pooling", daemon=True)
        self._stats = self._snapshot(clock(), 0)

    # What other threads may call.

    def start(self) -> None:
        self._thread.start()

    def submit(self, ask: PoolingAsk, sink: PoolingSink) -> int:
        """Queue an ask and return its id. Raises before queueing: InvalidRequest for texts or a number of dimensions
        that the model cannot take, with code context_length_exceeded for one that is too long; Overloaded when the
        queue is full or the engine has stopped."""
        self._check(ask)
        tokens = sum(map(len, ask.texts))
        job = _Job(next(self._ids), ask, sink, self._clock())
        with self._door:
            if self._closed:
                raise Overloaded(self._closed, retry_after=5.0)
            if self._texts + len(ask.texts) > self._limits.queue_limit:
                self._refused += 1
                raise Overloaded(
                    f"{self._texts} texts wait, and with {len(ask.texts)} more they would be over the limit of "
                    f"{self._limits.queue_limit}",
                    retry_after=self._tokens / (self._rate.per_second or self._limits.slowest_tps),
                )
            self._texts += len(ask.texts)
            self._tokens += tokens
            self._inbox.append(job)
        self._wake.set()
        return job.id

    def cancel(self, id: int) -> None:
        """End an ask within one step; its sink gets `Failed` with code cancelled. Nothing happens when it has ended."""
        with self._door:
            self._inbox.append(id)
        self._wake.set()

    def stats(self) -> Stats:
        """The snapshot after the last step, with the deadline of the one now running."""
        return replace(self._stats, step_deadline=self._step_deadline)

    def stop(self) -> None:
        """End the thread after the step now running, fail what is left with Overloaded, close the backend."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is None:
            self._run()  # never started: the same end, on this thread
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self, ask: PoolingAsk) -> None:
        room, limit, n_vocab = self._backend.room, self._limits.queue_limit, self._backend.info.n_vocab
        if not 0 < len(ask.texts) <= limit:
            raise InvalidRequest(f"there are {len(ask.texts)} texts; from 1 to {limit} can be asked for", param="input")
        for index, text in enumerate(ask.texts):
            if not text:
                raise InvalidRequest(f"text {index} is empty; at least one token is needed", param="input")
            if len(text) > room.n_ctx:
                raise InvalidRequest(
                    f"text {index} has {len(text)} tokens and the model takes {room.n_ctx} at most",
                    param="input",
                    code="context_length_exceeded",
                )
            if not 0 <= min(text) <= max(text) < n_vocab:
                raise InvalidRequest(f"token ids must be from 0 to {n_vocab - 1}", param="input")
        if self._backend.pooling == "rank" and (ask.normalized or ask.dimensions is not None):
            raise InvalidRequest("a score has no length and no dimensions to choose from", param="dimensions")
        if ask.dimensions is not None and not 1 <= ask.dimensions <= self._backend.width:
            raise InvalidRequest(
                f"dimensions must be from 1 to {self._backend.width}, got {ask.dimensions}", param="dimensions"
            )

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._intake()
                if self._jobs:
                    self._step()
                else:
                    self._stats = self._snapshot(self._clock(), 0)
                    self._wake.wait(_IDLE_TICK_S)
                    self._wake.clear()
                self._deliver()
        except Exception as error:
            fatal = error if isinstance(error, FatalEngineError) else FatalEngineError(repr(error))
            self._close(ApiError(f"the pooling engine cannot go on: {fatal}", code="model_failed"), str(fatal))
            if self._on_fatal is not None:
                self._on_fatal(fatal)
        else:
            self._close(Overloaded("the engine is stopping", retry_after=5.0), "the engine is stopping")
            self._backend.close()

    def _intake(self) -> None:
        with self._door:
            commands, self._inbox = self._inbox, deque()
        for command in commands:
            if isinstance(command, _Job):
                self._jobs.append(command)
            else:
                for job in [job for job in self._jobs if job.id == command]:
                    self._end(job, Failed(ApiError("the request was cancelled", code="cancelled")), "cancelled")

    def _step(self) -> None:
        """Take texts in turn, compute them, hand out what is complete."""
        began = self._clock()
        for job in [job for job in self._jobs if job.ask.deadline is not None and job.ask.deadline <= began]:
            self._fail(job, DeadlineExceeded("the vectors were not ready in the time given for them"))
        batch = self._gather()
        if not batch:
            return
        tokens = sum(len(job.ask.texts[index]) for job, index in batch)
        limits = self._limits
        expected = tokens / (self._rate.per_second or limits.slowest_tps)
        self._step_deadline = began + limits.step_grace_s + limits.step_tolerance * expected
        for job, _ in batch:
            job.began = began if job.began is None else job.began
        decoded = self._compute(batch)
        ended = self._clock()
        self._step_deadline = None
        self._rate.add(tokens, decoded)
        self._count(steps=1, decode_s=decoded, other_s=ended - began - decoded, prompt_tokens=tokens)
        self._stats = self._snapshot(ended, len(batch))

    def _gather(self) -> list[tuple[_Job, int]]:
        """One text of each job in turn until the batch is full. Who was too long for what was left begins the next."""
        room, jobs = self._backend.room, self._jobs
        batch: list[tuple[_Job, int]] = []
        left, passed = room.n_batch, 0
        first_passed: _Job | None = None
        while len(batch) < room.sequences and passed < len(jobs):
            job = jobs[0]
            size = len(job.ask.texts[job.next])
            if size > left:
                first_passed = first_passed or job
                passed += 1
                jobs.rotate(-1)
                continue
            passed, left = 0, left - size
            batch.append((job, job.next))
            job.next += 1
            jobs.rotate(-1)
            if job.next == len(job.ask.texts):
                jobs.remove(job)
        if first_passed is not None:
            jobs.rotate(-jobs.index(first_passed))
        with self._door:
            self._texts -= len(batch)
            self._tokens -= room.n_batch - left
        return batch

    def _compute(self, batch: Many[tuple[_Job, int]]) -> float:
        """Compute a batch; returns the seconds it took. When it is refused, each text alone: the one that is refused
        again is the guilty one, and only its ask fails."""
        began = self._clock()
        code = self._backend.pool([job.ask.texts[index] for job, index in batch])
        took = self._clock() - began
        if code < BAD_BATCH:
            raise FatalEngineError(f"computing vectors ended with code {code}")
        if code == OK:
            for place, (job, index) in enumerate(batch):
                self._take(job, index, self._backend.vector(place))
        elif len(batch) > 1:
            took += sum(self._compute([one]) for one in batch)
        else:
            self._fail(batch[0][0], ApiError("the model refused this text's tokens", code="model_failed"))
        return took

    def _take(self, job: _Job, index: int, vector: NDArray[np.float32]) -> None:
        if not np.isfinite(vector).all():
            self._fail(job, ApiError("the model's output is not a number", code="model_failed"))
            return
        ask = job.ask
        job.vectors[index] = finished(vector, normalized=ask.normalized, dimensions=ask.dimensions)
        if len(job.vectors) == len(ask.texts) and job.began is not None:
            vectors = tuple(job.vectors[index] for index in range(len(ask.texts)))
            seconds = job.began - job.arrived, self._clock() - job.began
            self._end(job, Pooled(vectors, sum(map(len, ask.texts)), *seconds), "finished")

    def _fail(self, job: _Job, error: ApiError) -> None:
        self._end(job, Failed(error), "failed")

    def _end(self, job: _Job, event: PoolingEvent, how: str) -> None:
        """Tell a job's sink, once; what of it is in the batch now running will find nobody."""
        if job.over:
            return
        job.over = True
        if job in self._jobs:
            self._jobs.remove(job)
        left = job.ask.texts[job.next :]
        with self._door:
            self._texts -= len(left)
            self._tokens -= sum(map(len, left))
        self._out.append((job.sink, event))
        self._count(**{how: 1})

    def _close(self, error: ApiError, reason: str) -> None:
        with self._door:
            self._closed = reason
            late = [command for command in self._inbox if isinstance(command, _Job)]
            self._inbox.clear()
        for job in [*self._jobs, *late]:
            self._fail(job, error)
        self._deliver()

    def _deliver(self) -> None:
        if self._out:
            events, self._out = self._out, []
            self._deliver_all(events)

    def _count(self, **more: float) -> None:
        now = self._timings
        self._timings = replace(now, **{name: getattr(now, name) + value for name, value in more.items()})

    def _snapshot(self, now: float, running: int) -> Stats:
        with self._door:
            waiting, tokens, refused = self._texts, self._tokens, self._refused
        load = Load(
            slots=self._backend.room.sequences,
            running=running,
            waiting=waiting,
            queued_prompt_tokens=tokens,
            prefill_tps=self._rate.per_second,
        )
        return Stats(load, replace(self._timings, refused=refused), heartbeat=now)


def finished(vector: NDArray[np.float32], *, normalized: bool, dimensions: int | None) -> NDArray[np.float32]:
    """A copy of one vector, or of a row of them, cut to its first dimensions and then scaled to length 1 if asked. A
    vector of zeros stays one."""
    kept = np.array(vector[..., :dimensions], np.float32)
    if normalized:
        length = np.linalg.norm(kept, axis=-1, keepdims=True)
        kept /= np.where(length > 0, length, 1)
    return kept
