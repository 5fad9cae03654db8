"""One thread owns the model; everyone else sends commands and reads events.

Owns: the engine thread, the clock, the order of commands, and what happens when a step goes wrong. Refuses to know:
HTTP, asyncio, llama.cpp. Which tokens go into a step is scheduler.py's business, which token comes out is sampler.py's.

A step is four verbs: schedule, decode, sample, postprocess. Between steps the thread takes in commands, so a
cancellation takes effect within one step, whether its sequence waits, prefills or decodes.

What a decode's code means:
  OK         the step's logits are there
  NO_ROOM    try again with half the batch; when nothing is left to halve, the youngest sequence fails
  ABORTED    some of the batch was computed: ask the backend how much and go on from there
  BAD_BATCH  compute each sequence's part alone: the one that fails alone is the guilty one, and only it fails
  else       fatal: everyone fails, `on_fatal` is called and the thread ends. The process should leave with it
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from llmnode.engine.backend import ABORTED, BAD_BATCH, NO_ROOM, OK, Backend, FatalEngineError
from llmnode.engine.rates import Rate
from llmnode.engine.sampler import choose
from llmnode.engine.scheduler import WAITING, Plan, Scheduler, Sequence
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Done, Event, Failed, Finish, Sink, Stats, Text, Timings
from llmnode.wire.errors import ApiError, ContextLengthExceeded, DeadlineExceeded, InvalidRequest, Overloaded
from llmnode.wire.node import Load, Usage

Deliver = Callable[[Many[tuple[Sink, Event]]], None]

log = logging.getLogger(__name__)

_IDLE_TICK_S = 0.5
"""How often an idle engine shows that it is alive."""

_SWITCH_INTERVAL_S = 0.0005
"""After a decode this thread needs the GIL back. Python's default lets another thread keep it for 5 ms, which is two
whole steps of a small model."""


@dataclass(frozen=True)
class Limits:
    """queue_limit: asks that may wait while every slot is taken.

    step_grace_s, step_tolerance: a step counts as stuck after the grace plus so many times what it should take.
    slowest_tps: tokens per second that are taken for granted before any were measured.
    """

    queue_limit: int = 64
    step_grace_s: float = 10.0
    step_tolerance: float = 10.0
    slowest_tps: float = 1.0


def call_each(events: Many[tuple[Sink, Event]]) -> None:
    """Hand each event to its sink, on the engine's thread."""
    for sink, event in events:
        sink(event)


class Engine:
    """Runs asks on a backend, which it owns from `start` to `stop` and then closes.

    deliver: gets all events of one step in one call, on the engine's thread. A sink gets any number of `Text`s and then
    one `Done` or `Failed`.
    on_fatal: called on the engine's thread when it cannot go on, after everyone has been told.
    clock: seconds, as `time.monotonic`; deadlines of asks are on it.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        *,
        deliver: Deliver = call_each,
        on_fatal: Callable[[FatalEngineError], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend, self._limits = backend, limits
        self._deliver_all, self._on_fatal, self._clock = deliver, on_fatal, clock
        self._scheduler = Scheduler(backend.room)
        self._budget = backend.room.n_batch
        self._sequences: dict[int, Sequence] = {}
        self._out: list[tuple[Sink, Event]] = []
        self._count = _Counters()
        self._prefill, self._decode, self._hold_s = Rate(), Rate(), 0.0
        self._step_deadline: float | None = None

        self._ids = itertools.count(1)
        self._door = threading.Lock()  # guards the four below, which other threads touch
        self._inbox: deque[Sequence | int] = deque()
        self._inside = 0
        self._refused = 0
        self._closed = ""
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stats = self._snapshot(clock())

    # What other threads may call.

    def start(self) -> None:
        """Start the thread. Lowers the interpreter's switch interval for the whole process (see _SWITCH_INTERVAL_S)."""
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
        self._thread.start()

    def submit(self, ask: Ask, sink: Sink) -> int:
        """Queue an ask and return its id. Raises before queueing: ContextLengthExceeded when the prompt leaves no room
        for an answer, InvalidRequest for a prompt or limit that no model could take, Overloaded when the queue is full
        or the engine has stopped."""
        room, prompt = self._backend.room, ask.prompt
        if not prompt:
            raise InvalidRequest("the prompt is empty; at least one token is needed", param="prompt")
        if len(prompt) >= room.n_ctx:
            raise ContextLengthExceeded(len(prompt), room.n_ctx)
        if not 0 <= min(prompt) <= max(prompt) < self._backend.info.n_vocab:
            raise InvalidRequest(f"token ids must be from 0 to {self._backend.info.n_vocab - 1}", param="prompt")
        if ask.max_tokens is not None and ask.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {ask.max_tokens}", param="max_tokens")
        left = room.n_ctx - len(prompt)
        limit = left if ask.max_tokens is None else min(left, ask.max_tokens)
        text = TextStream(self._backend.pieces, ask.stop)
        sequence = Sequence(next(self._ids), ask, sink, limit, text, self._clock())
        with self._door:
            if self._closed:
                raise Overloaded(self._closed, retry_after=5.0)
            if self._inside >= room.slots + self._limits.queue_limit:
                self._refused += 1
                raise Overloaded(
                    f"all {room.slots} slots are taken and {self._inside - room.slots} requests wait, "
                    f"the limit is {self._limits.queue_limit}",
                    retry_after=self._retry_after(),
                )
            self._inside += 1
            self._inbox.append(sequence)
        self._wake.set()
        return sequence.id

    def cancel(self, id: int) -> None:
        """End an answer within one step; its sink gets `Done` with CANCELLED. Nothing happens when it has ended."""
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

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._intake()
                if self._scheduler.running or self._scheduler.waiting:
                    self._step()
                else:
                    self._idle()
                self._deliver()
        except Exception as error:
            self._die(error)
        else:
            self._close(Overloaded("the engine is stopping", retry_after=5.0))
            self._backend.close()

    def _step(self) -> None:
        """Schedule, decode, sample, postprocess."""
        began = self._clock()
        self._expire(began)
        for sequence in self._scheduler.admit():
            sequence.admitted = began
        plan = self._scheduler.plan(self._budget)
        if plan.tokens:
            self._step_deadline = began + self._patience(plan)
            self._compute(plan)
        self._step_deadline = None
        ended = self._clock()
        self._count.steps += 1
        self._count.step_s += ended - began
        self._stats = self._snapshot(ended)

    def _compute(self, plan: Plan) -> None:
        began = self._clock()
        code = self._backend.decode(plan.chunks)
        if code != OK:
            self._recover(code, plan)
            return
        ready = self._scheduler.computed(plan)
        logits = self._backend.logits() if ready else None
        decoded = self._clock()
        drawn = [] if logits is None else choose(logits, [(s.ask.sampling, s.answered) for s in ready])
        sampled = self._clock()
        for sequence, token in zip(ready, drawn, strict=True):
            self._take(sequence, token, sampled)
        self._measure(plan, len(ready), decoded - began, sampled - decoded)

    def _take(self, sequence: Sequence, token: int | None, now: float) -> None:
        """A token was drawn: tell the sink what it makes certain, and end the answer when it is over."""
        if token is None:
            self._fail(sequence, ApiError("the model's output is not a number", code="model_failed"))
            return
        if sequence.first is None:
            sequence.first = now
        text, finish = sequence.take(token, self._backend.end_tokens)
        if text:
            self._out.append((sequence.sink, Text(text, tuple(sequence.fresh))))
            sequence.fresh.clear()
        if finish is not None:
            self._finish(sequence, finish, now)

    def _recover(self, code: int, plan: Plan) -> None:
        if code == NO_ROOM and plan.tokens > len(plan.chunks):
            self._budget = max(len(plan.chunks), plan.tokens // 2)
        elif code == NO_ROOM:
            youngest = max(plan.sequences, key=lambda sequence: sequence.id)
            self._fail(youngest, Overloaded("the KV cache is full", retry_after=self._retry_after()))
        elif code == ABORTED:
            for sequence in plan.sequences:
                self._resync(sequence)
        elif code == BAD_BATCH and len(plan.chunks) > 1:
            for index in range(len(plan.chunks)):
                self._compute(plan.alone(index))
        elif code == BAD_BATCH:
            self._fail(plan.sequences[0], ApiError("the model refused this sequence's tokens", code="model_failed"))
        else:
            raise FatalEngineError(f"decode of {plan.tokens} tokens ended with code {code}")

    def _resync(self, sequence: Sequence) -> None:
        """Go on from what the backend holds; the last known token is computed again, for its logits."""
        sequence.computed = min(self._backend.seq_length(sequence.slot), len(sequence.tokens) - 1)
        if not self._backend.seq_remove(sequence.slot, sequence.computed):
            self._fail(sequence, ApiError("the step was aborted and this model cannot go back", code="model_failed"))

    def _idle(self) -> None:
        wrong = self._scheduler.check_integrity(self._backend.seq_length)
        if wrong:
            # Cells under a wrong account can show one user's prompt to another.
            raise FatalEngineError(f"the account of KV cells is wrong: {wrong}")
        self._budget = self._backend.room.n_batch
        self._stats = self._snapshot(self._clock())
        self._wake.wait(_IDLE_TICK_S)

    def _intake(self) -> None:
        self._wake.clear()
        with self._door:
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            if isinstance(command, Sequence):
                self._sequences[command.id] = command
                self._scheduler.add(command)
            elif command in self._sequences:
                self._finish(self._sequences[command], Finish.CANCELLED, self._clock())

    def _expire(self, now: float) -> None:
        for sequence in self._scheduler.everyone():
            if sequence.ask.deadline is not None and now >= sequence.ask.deadline:
                what = "queued" if sequence.slot == WAITING else f"running, {sequence.answered} tokens into its answer"
                took = now - sequence.submitted
                self._fail(sequence, DeadlineExceeded(f"the deadline passed after {took:.1f} s, while {what}"))

    def _finish(self, sequence: Sequence, finish: Finish, now: float) -> None:
        admitted = now if sequence.admitted is None else sequence.admitted
        first = now if sequence.first is None else sequence.first
        usage = Usage(len(sequence.ask.prompt), 0, sequence.answered)
        times = (admitted - sequence.submitted, first - admitted, now - first)
        if finish is Finish.CANCELLED:
            self._count.cancelled += 1
        else:
            self._count.finished += 1
            self._hold_s += (now - admitted - self._hold_s) * (0.2 if self._hold_s else 1.0)
        self._leave(sequence, Done(finish, usage, *times))

    def _fail(self, sequence: Sequence, error: ApiError) -> None:
        self._count.failed += 1
        self._leave(sequence, Failed(error))

    def _leave(self, sequence: Sequence, last: Event) -> None:
        slot = self._scheduler.remove(sequence)
        if slot != WAITING:
            self._backend.seq_remove(slot)
        del self._sequences[sequence.id]
        self._out.append((sequence.sink, last))
        with self._door:
            self._inside -= 1

    def _deliver(self) -> None:
        if not self._out:
            return
        events, self._out = self._out, []
        try:
            self._deliver_all(events)
        except Exception:  # a broken reader must not end everyone's answers
            log.exception("delivering %d events failed", len(events))

    def _die(self, error: Exception) -> None:
        fatal = error if isinstance(error, FatalEngineError) else FatalEngineError(f"{type(error).__name__}: {error}")
        log.critical("the engine cannot go on: %s", fatal, exc_info=None if fatal is error else error)
        self._close(Overloaded(f"the engine failed: {fatal}", retry_after=5.0, code="engine_failed"))
        if self._on_fatal is not None:
            self._on_fatal(fatal)

    def _close(self, error: Overloaded) -> None:
        """Take no more asks and fail those inside, without touching the backend, which may be broken."""
        with self._door:
            self._closed = error.message
            late = [command for command in self._inbox if isinstance(command, Sequence)]
            self._inbox.clear()
        for sequence in [*self._sequences.values(), *late]:
            self._count.failed += 1
            self._out.append((sequence.sink, Failed(error)))
        self._sequences.clear()
        self._deliver()

    # Measuring.

    def _measure(self, plan: Plan, rows: int, decode_s: float, sample_s: float) -> None:
        self._count.decode_s += decode_s
        self._count.sample_s += sample_s
        self._count.prompt_tokens += plan.prefill
        self._count.completion_tokens += rows
        if plan.prefill:
            self._prefill.add(plan.prefill, decode_s)
        else:
            self._decode.add(plan.tokens, decode_s + sample_s)

    def _patience(self, plan: Plan) -> float:
        """Seconds after which this step counts as stuck."""
        prefill_tps = self._prefill.per_second or self._limits.slowest_tps
        decode_tps = self._decode.per_second or self._limits.slowest_tps
        due = plan.prefill / prefill_tps + (plan.tokens - plan.prefill) / decode_tps
        return self._limits.step_grace_s + self._limits.step_tolerance * due

    def _retry_after(self) -> float:
        """Seconds until a place should be free: slots turn over once in the time that an answer lately held one."""
        return max(1.0, self._hold_s / self._backend.room.slots)

    def _snapshot(self, now: float) -> Stats:
        scheduler, count = self._scheduler, self._count
        running = len(scheduler.running)
        load = Load(
            slots=scheduler.room.slots,
            running=running,
            waiting=max(0, self._inside - running),
            kv_cells=scheduler.room.kv_cells,
            kv_cells_used=scheduler.cells_used,
            queued_prompt_tokens=scheduler.queued_prompt_tokens,
            prefill_tps=self._prefill.per_second,
            decode_tps=self._decode.per_second,
        )
        timings = Timings(
            steps=count.steps,
            decode_s=count.decode_s,
            sample_s=count.sample_s,
            other_s=count.step_s - count.decode_s - count.sample_s,
            prompt_tokens=count.prompt_tokens,
            completion_tokens=count.completion_tokens,
            finished=count.finished,
            cancelled=count.cancelled,
            failed=count.failed,
            refused=self._refused,
        )
        return Stats(load, timings, heartbeat=now)


@dataclass
class _Counters:
    """The engine thread's own figures, copied into `Timings`."""

    steps: int = 0
    step_s: float = 0.0
    decode_s: float = 0.0
    sample_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
