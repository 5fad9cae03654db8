"""One thread owns the model; everyone else sends commands and reads events.

Owns: the engine thread, the clock, the order of commands, and what happens when a step goes wrong. Refuses to know:
HTTP, asyncio, llama.cpp. Who runs and what goes into a step is scheduler.py's business, where cells are is
memory.py's, which token comes out is sampler.py's.

A step is four verbs: schedule, decode, sample, postprocess. Between steps the thread takes in commands, so a
cancellation takes effect within one step, whether its sequence waits, prefills or decodes.

What a decode's code means:
  OK         the step's logits are there
  NO_ROOM    the account said there was room, the backend says there is none: evict one idle prefix, or halve the
             prompts' part, or let one sequence give way; a sequence that finds no room alone fails
  ABORTED    some of the batch was computed: ask the backend how much and go on from there
  BAD_BATCH  compute each sequence's part alone: the one that fails alone is the guilty one, and only it fails
  else       fatal: everyone fails, `on_fatal` is called and the thread ends. The process should leave with it
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmnode.engine.backend import ABORTED, BAD_BATCH, NO_ROOM, OK, Backend, FatalEngineError
from llmnode.engine.grammar import DeadEnd
from llmnode.engine.host import HostCache
from llmnode.engine.lookup import Lookup
from llmnode.engine.memory import Memory
from llmnode.engine.pace import Pace
from llmnode.engine.rates import Rate
from llmnode.engine.sampler import Sampler, Vocabulary
from llmnode.engine.scheduler import Bounds, Plan, Scheduler
from llmnode.engine.sequence import NOWHERE, Sequence
from llmnode.engine.snapshot import Snapshot
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Done, Event, Failed, Finish, Sink, Stats, Timings
from llmnode.wire.errors import ApiError, ContextLengthExceeded, DeadlineExceeded, InvalidRequest, Overloaded
from llmnode.wire.node import Load, Usage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Drawn = int | ApiError
"""A token, or why there is none."""
Deliver = Callable[[Many[tuple[Sink, Event]]], None]

log = logging.getLogger(__name__)

_IDLE_TICK_S = 0.5
"""How often an idle engine shows that it is alive."""

_SWITCH_INTERVAL_S = 0.0005
"""After a decode this thread needs the GIL back. Python's default lets another thread keep it for 5 ms, which is two
whole steps of a small model."""

_SNAPSHOT_S = 0.02
"""How old the figures in `stats` may be beside steps that nobody joins or leaves; making them takes 20 us."""

_HELD_S, _MOST_HELD = 0.25, 1024
"""How old `Stats.held` may be while answers run (gates ask once a second), and how many sequences it names, which takes
80 us."""

_LONGEST_DRAFT = 16


@dataclass(frozen=True)
class Limits:
    """queue_limit: asks that may wait while every slot is taken.

    stall_s: how long prompts may hold up running answers in each step, in seconds.
    host_bytes: host RAM for sequences that the cache has no room for.
    prompt_lookup: whether to guess ahead from earlier text where that pays.
    gather_s: tokens of steps shorter than this are handed over together, so that a model of 1,000 tokens a second does
        not cost its readers 1,000 wake-ups; 0 hands over after each step.
    step_grace_s, step_tolerance: a step counts as stuck after the grace plus so many times what it should take.
    slowest_tps: tokens per second that are taken for granted before any were measured.
    """

    queue_limit: int = 64
    stall_s: float = 0.1
    host_bytes: int = 256 << 20
    prompt_lookup: bool = True
    gather_s: float = 0.0
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
    snapshot: where prefixes are kept from one process to the next; None keeps none.
    clock: seconds, as `time.monotonic`; deadlines of asks are on it.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        *,
        deliver: Deliver = call_each,
        on_fatal: Callable[[FatalEngineError], None] | None = None,
        snapshot: Snapshot | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend, self._limits, self._snapshot_file = backend, limits, snapshot
        self._deliver_all, self._on_fatal, self._clock = deliver, on_fatal, clock
        self._vocabulary = Vocabulary(backend.pieces, backend.end_tokens)
        self._scheduler = Scheduler(backend.room)
        self._memory = Memory(backend, HostCache(limits.host_bytes), clock)
        self._pace = Pace(
            limits.stall_s,
            grace_s=limits.step_grace_s,
            tolerance=limits.step_tolerance,
            slowest_tps=limits.slowest_tps,
            parted=not backend.room.unified,
        )
        self._squeeze = backend.room.n_batch  # prompt tokens in a step at most, halved while the backend finds no room
        self._sequences: dict[int, Sequence] = {}
        self._unheard: dict[int, Sequence] = {}  # with text that was not handed over yet
        self._out: list[tuple[Sink, Event]] = []
        self._delivered = clock()
        self._step_s = 0.0
        self._count = _Counters()
        self._prefill, self._decode, self._hold_s = Rate(), Rate(), 0.0
        # Of prompts too, each step counting by its tokens: as a long prompt is computed, however many short ones come.
        self._long_prefill = Rate()
        self._step_deadline: float | None = None
        self._next_deadline = float("inf")  # of all asks
        self._changed = False  # whether somebody joined or left since the last snapshot
        self._held: tuple[tuple[object, int], ...] = ()
        self._held_at, self._held_version = float("-inf"), (0, 0)

        self._ids = itertools.count(1)
        self._door = threading.Lock()  # guards the four below, which other threads touch
        self._inbox: deque[Sequence | int] = deque()
        self._inside = 0
        self._refused = 0
        self._closed = ""
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._heartbeat = clock()
        self._stats = self._snapshot(self._heartbeat)

    # What other threads may call.

    def start(self) -> None:
        """Start the thread. Lowers the interpreter's switch interval for the whole process (see _SWITCH_INTERVAL_S)."""
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
        self._thread.start()

    def submit(self, ask: Ask, sink: Sink) -> int:
        """Queue an ask and return its id. Raises before queueing: ContextLengthExceeded when the prompt leaves no room
        for an answer, InvalidRequest for a prompt, a limit or an answer so far that no model could take, Overloaded
        when the queue is full or the engine has stopped."""
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
        if len(ask.replayed) > limit or not all(0 <= id < self._backend.info.n_vocab for id in ask.replayed):
            raise InvalidRequest(
                f"the answer so far has {len(ask.replayed)} tokens, "
                f"of which some are none of the model's or beyond the limit of {limit}",
                param="ids",
            )
        now = self._clock()
        sequence = self._sequence(ask, sink, limit, now)
        with self._door:
            if self._closed:
                raise Overloaded(self._closed, retry_after=5.0)
            wait_s = self._predicted_wait()
            if self._inside >= room.slots + self._limits.queue_limit:
                self._refused += 1
                raise Overloaded(
                    f"all {room.slots} slots are taken and {self._inside - room.slots} requests wait, "
                    f"the limit is {self._limits.queue_limit}",
                    retry_after=max(1.0, wait_s),
                )
            if ask.deadline is not None and now + wait_s > ask.deadline:
                self._refused += 1
                raise Overloaded(
                    f"a slot should be free in {wait_s:.1f} s, and the deadline is in {ask.deadline - now:.1f} s",
                    retry_after=max(1.0, wait_s - (ask.deadline - now)),
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
        """The snapshot after the last step, or one of the last few, with what has come since, and the deadline of the
        step now running."""
        stats = self._stats
        with self._door:
            load = self._with_arrivals(stats.load)
        return replace(stats, load=load, heartbeat=self._heartbeat, step_deadline=self._step_deadline)

    @property
    def shares_parts(self) -> bool:
        """Whether others can go on from a part of a sequence in `Stats.held`, or from all of it only. Thread-safe."""
        return not self._memory.wants_checkpoints

    def stop(self) -> None:
        """End the thread after the step now running, fail what is left with Overloaded, close the backend."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is None:
            self._run()  # never started: the same end, on this thread
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    def _sequence(self, ask: Ask, sink: Sink, limit: int, now: float) -> Sequence:
        matcher = ask.grammar.matcher() if ask.grammar is not None else None
        sampler = Sampler(
            ask.sampling,
            ask.prompt,
            vocabulary=self._vocabulary,
            matcher=matcher,
            forcing=ask.forcing() if ask.forcing is not None else None,
            logprobs=ask.logprobs,
        )
        text = TextStream(self._backend.pieces if ask.pieces is None else ask.pieces, ask.stop)
        sequence = Sequence(next(self._ids), ask, sink, limit, text, sampler, now, self._backend.end_tokens)
        if self._limits.prompt_lookup and self._backend.can_cut:
            sequence.lookup = Lookup(sequence.tokens)
        sequence.ended = sequence.replay()
        return sequence

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        try:
            if self._snapshot_file is not None:
                self._snapshot_file.load(self._memory.host)
            while not self._stopping:
                self._intake()
                if self._sequences:
                    self._step()
                else:
                    self._idle()
        except Exception as error:
            self._die(error)
        else:
            self._close(Overloaded("the engine is stopping", retry_after=5.0))
            if self._snapshot_file is not None:
                self._snapshot_file.save(self._memory.hot())
            self._backend.close()

    def _step(self) -> None:
        """Schedule, decode, sample, postprocess."""
        began = self._clock()
        plan = self._schedule(began)
        if self._changed:
            # A step with a long prompt takes a while, in which gates ask what is to be done here.
            self._stats = self._snapshot(began)
        if plan.tokens:
            self._step_deadline = began + self._pace.due(plan.tokens - plan.prefill, plan.prefill, plan.depth)
            if self._decode_plan(plan):
                drawn = self._sample(plan)
                self._postprocess(plan, drawn)
                count = sum(map(len, drawn))
                self._memory.tidy(count)
                if not plan.prefill:
                    self._decode.add(count, self._clock() - began)
            self._step_deadline = None
        ended = self._clock()
        self._step_s = ended - began
        self._count.steps += 1
        self._count.step_s += self._step_s
        self._heartbeat = ended
        if self._changed or ended - self._stats.heartbeat > _SNAPSHOT_S:
            self._stats = self._snapshot(ended)
        self._deliver(ended)

    # Schedule.

    def _schedule(self, now: float) -> Plan:
        self._expire(now)
        self._admit(now)
        self._gather_followers()
        drafts = self._drafts() if self._limits.prompt_lookup and self._backend.can_cut else None
        while True:
            plan = self._scheduler.plan(self._bounds(), drafts)
            if plan.tokens and self._memory.make_room(plan.tokens):
                return plan
            if not self._scheduler.running:
                return plan
            if not plan.tokens and self._gather_followers():
                continue  # whom they followed has just given way
            # The ladder of a full cache: idle prefixes are gone by now; then guesses, prompts, and the cheapest answer.
            free = self._memory.cells.free
            decoding = plan.tokens - plan.prefill
            if drafts:
                drafts = None
            elif plan.prefill and decoding < free:
                return self._scheduler.plan(replace(self._bounds(), tokens=free))
            elif not self._give_way():
                # One sequence alone always fits, so the account must be wrong; the idle check will say how.
                log.error("%d cells are free and the last sequence finds no room", free)
                self._fail(self._scheduler.running[-1], Overloaded("the KV cache is full", retry_after=1.0))

    def _bounds(self) -> Bounds:
        room = self._backend.room
        decoding = sum(s.behind == 1 for s in self._scheduler.running if s.leader is None)
        prompt = self._scheduler.next_prompt(self._count.steps)
        start = prompt.computed if prompt else 0
        prefill = min(self._squeeze, self._pace.prefill_limit(decoding, room.n_batch, start))
        tokens = room.n_batch if self._squeeze >= room.n_batch else min(room.n_batch, decoding + self._squeeze)
        return Bounds(tokens, prefill, room.rows, self._memory.wants_checkpoints, self._count.steps)

    def _admit(self, now: float) -> None:
        while True:
            live = self._memory.cells_live if self._scheduler.waiting else 0
            sequence = self._scheduler.next(live, self._memory.shared_with_live)
            if sequence is None:
                return
            self._memory.open(sequence)
            if sequence.admitted is None:
                sequence.admitted = now
            if sequence.cached is None and sequence.leader is None:
                self._found(sequence)

    def _gather_followers(self) -> int:
        """Those that waited for another one's prompt go on from it once it is there, or look again once it is not.
        Returns how many there were."""
        gathered = 0
        for sequence in self._scheduler.running:
            leader = sequence.leader
            if leader is None or (leader.seq != NOWHERE and leader.computed < sequence.follow):
                continue
            gathered += 1
            sequence.leader = None
            self._memory.detach(sequence)
            self._memory.attach(sequence)
            if sequence.cached is None and sequence.leader is None:
                self._found(sequence)
        return gathered

    def _found(self, sequence: Sequence) -> None:
        sequence.cached = min(sequence.computed, len(sequence.ask.prompt))
        self._count.cached_tokens += sequence.cached

    def _drafts(self) -> dict[int, array[int]] | None:
        """Guessed tokens for the answers whose guesses are likely enough to pay."""
        decoding = [s for s in self._scheduler.running if s.behind == 1 and s.leader is None and s.lookup is not None]
        if not decoding:
            return None
        left = min(self._backend.room.rows, self._backend.room.n_batch) - len(decoding)
        worth = self._pace.worth(len(decoding))
        drafts = {}
        for sequence in decoding:
            lookup = sequence.lookup
            assert lookup is not None
            lookup.advance()
            chance, length = lookup.chance, 0
            most = min(_LONGEST_DRAFT, left, sequence.remaining - 1)
            while length < most and chance > worth:
                length += 1
                chance *= lookup.streak
            if length:
                drafts[sequence.seq] = lookup.draft(length)
                left -= length
        return drafts

    def _give_way(self) -> bool:
        """The cheapest running sequence leaves the cache. False when there is none but the oldest."""
        prefill_tps = self._prefill.per_second or self._limits.slowest_tps

        def cost(sequence: Sequence) -> float:
            return min(self._memory.swap_seconds(sequence), sequence.computed / prefill_tps)

        victim = self._scheduler.victim(cost, lambda sequence: self._memory.cells.private(sequence.seq))
        if victim is None:
            return False
        self._scheduler.remove(victim)
        save = self._memory.swap_seconds(victim) <= victim.computed / prefill_tps
        if self._memory.yield_cells(victim, save=save):
            self._count.swapped += 1
        else:
            self._count.dropped += 1
        victim.yielded += 1
        self._scheduler.add(victim)
        return True

    # Decode.

    def _decode_plan(self, plan: Plan) -> bool:
        """Compute the batch. False when that was to be done in another way, which has been done."""
        began = self._clock()
        code = self._backend.decode(plan.chunks)
        took = self._clock() - began
        self._count.decode_s += took
        if code != OK:
            self._recover(code, plan)
            return False
        for sequence, chunk in zip(plan.sequences, plan.chunks, strict=True):
            self._memory.grow(sequence, len(chunk.tokens))
        self._pace.record(plan.tokens - plan.prefill, plan.prefill, took, plan.depth)
        self._count.prompt_tokens += plan.prefill
        if plan.prefill:
            prefill_s = max(took - self._pace.seconds(plan.tokens - plan.prefill), 0.1 * took)
            self._prefill.add(plan.prefill, prefill_s)
            self._long_prefill.add(plan.prefill, prefill_s, weight=plan.prefill)
            self._squeeze = min(self._backend.room.n_batch, 2 * self._squeeze)
            self._memory.compute_s = 1 / self._prefill.per_second
        return True

    def _recover(self, code: int, plan: Plan) -> None:
        if code == NO_ROOM:
            if self._memory.evict_one():
                return
            if plan.prefill > 1:
                self._squeeze = max(1, plan.prefill // 2)
            elif not self._give_way():
                youngest = max(plan.sequences, key=lambda sequence: sequence.id)
                self._fail(youngest, Overloaded("the KV cache is full", retry_after=max(1.0, self._predicted_wait())))
        elif code == ABORTED:
            for sequence in plan.sequences:
                if not self._memory.resync(sequence):
                    self._memory.detach(sequence)  # computed again from the start
        elif code == BAD_BATCH and len(plan.chunks) > 1:
            for index in range(len(plan.chunks)):
                part = plan.alone(index)
                if part.sequences[0].seq != NOWHERE and self._decode_plan(part):
                    self._postprocess(part, self._sample(part))
        elif code == BAD_BATCH:
            self._fail(plan.sequences[0], ApiError("the model refused this sequence's tokens", code="model_failed"))
        else:
            raise FatalEngineError(f"decode of {plan.tokens} tokens ended with code {code}")

    # Sample.

    def _sample(self, plan: Plan) -> list[list[Drawn]]:
        """The tokens drawn for each chunk of the plan, an error for a row from which none could be.

        A chunk with guesses gives tokens up to the first that differs from its guess: each is drawn from the logits
        that it would have been drawn from without them, so guessing changes nothing but the time it takes."""
        if not any(chunk.rows for chunk in plan.chunks):
            return [[] for _ in plan.chunks]
        began = self._clock()
        logits = self._backend.logits()
        best = logits.argmax(axis=1).tolist()
        drawn: list[list[Drawn]] = []
        row = 0
        for sequence, chunk, guesses in zip(plan.sequences, plan.chunks, plan.drafts, strict=True):
            tokens: list[Drawn] = []
            for at in range(chunk.rows):
                position = chunk.start + len(chunk.tokens) - chunk.rows + at
                known = sequence.sampled < len(sequence.ask.replayed)  # an answer that is gone on with
                if sequence.sampler.plain and not known and math.isfinite(logits[row + at, best[row + at]]):
                    token: Drawn = best[row + at]
                    sequence.sampled += 1
                else:
                    token = self._draw(sequence, logits[row + at], best[row + at], known)
                if known and isinstance(token, int) and position + 1 < len(sequence.tokens):
                    continue  # taken in already: only the sampler had to hear of it
                tokens.append(token)
                if at == chunk.rows - 1 or not isinstance(token, int):
                    break
                if token != chunk.tokens[len(chunk.tokens) - guesses + at]:
                    break
            drawn.append(tokens)
            row += chunk.rows
        self._count.sample_s += self._clock() - began
        return drawn

    def _draw(self, sequence: Sequence, row: NDArray[np.float32], best: int, known: bool) -> Drawn:
        """Draw a token, or take the one that is known, and let the sampler hear of it."""
        sampler, ask = sequence.sampler, sequence.ask
        try:
            drawn = sampler.draw(row, best, sequence.sampled, ask.replayed[sequence.sampled] if known else None)
            if drawn is None:
                return ApiError("the model's output is not a number", code="model_failed")
            if drawn.logprob is not None and (ask.retold or not known):
                sequence.logprobs.append(drawn.logprob)
            sampler.accept(drawn.token, row)
        except DeadEnd as error:
            return error
        sequence.sampled += 1
        return drawn.token

    # Postprocess.

    def _postprocess(self, plan: Plan, drawn: list[list[Drawn]]) -> None:
        now = self._clock()
        for sequence, tokens, guesses in zip(plan.sequences, drawn, plan.drafts, strict=True):
            if guesses:
                kept = len(tokens) - 1
                self._count.drafted += guesses
                self._count.accepted += kept
                if kept < guesses and not self._memory.cut(sequence, sequence.computed - (guesses - kept)):
                    raise FatalEngineError("the model can no longer forget the tokens that were guessed wrong")
            if self._memory.wants_checkpoints and sequence.computed == len(sequence.ask.prompt) - 1:
                self._memory.checkpoint(sequence)
            for token in tokens:
                if not self._take(sequence, token, now):
                    break

    def _take(self, sequence: Sequence, token: Drawn, now: float) -> bool:
        """A token was drawn: its reader will hear what it makes certain. Returns whether the answer goes on."""
        if not isinstance(token, int):
            self._fail(sequence, token)
            return False
        self._count.completion_tokens += 1
        finish = sequence.take(token)
        if sequence.first is None:
            sequence.first = now
            self._delivered = float("-inf")  # the first token of an answer waits for no other
        if sequence.unsent:
            self._unheard[sequence.id] = sequence
        if finish is not None:
            self._finish(sequence, finish, now)
            return False
        return True

    def _idle(self) -> None:
        self._deliver(self._clock(), at_once=True)
        self._squeeze = self._backend.room.n_batch
        self._heartbeat = self._clock()
        self._stats = self._snapshot(self._heartbeat)
        if self._wake.wait(_IDLE_TICK_S):
            return
        wrong = self._scheduler.check_integrity() or self._memory.check_integrity()
        if wrong:
            # Cells under a wrong account can show one user's prompt to another.
            raise FatalEngineError(f"the account of KV cells is wrong: {wrong}")

    def _intake(self) -> None:
        self._wake.clear()
        with self._door:
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            if isinstance(command, Sequence):
                self._sequences[command.id] = command
                self._scheduler.add(command)
                self._changed = True
                if command.ask.deadline is not None:
                    self._next_deadline = min(self._next_deadline, command.ask.deadline)
                if command.ended is not None:
                    self._finish(command, command.ended, self._clock())
            elif command in self._sequences:
                self._finish(self._sequences[command], Finish.CANCELLED, self._clock())

    def _expire(self, now: float) -> None:
        if now < self._next_deadline:
            return
        self._next_deadline = float("inf")
        for sequence in self._scheduler.everyone():
            if sequence.ask.deadline is not None and now >= sequence.ask.deadline:
                what = "queued" if sequence.seq == NOWHERE else f"running, {sequence.answered} tokens into its answer"
                took = now - sequence.submitted
                self._fail(sequence, DeadlineExceeded(f"the deadline passed after {took:.1f} s, while {what}"))
            elif sequence.ask.deadline is not None:
                self._next_deadline = min(self._next_deadline, sequence.ask.deadline)

    def _finish(self, sequence: Sequence, finish: Finish, now: float) -> None:
        self._say(sequence)
        admitted = now if sequence.admitted is None else sequence.admitted
        first = now if sequence.first is None else sequence.first
        usage = Usage(len(sequence.ask.prompt), sequence.cached or 0, sequence.answered)
        times = (admitted - sequence.submitted, first - admitted, now - first)
        if finish is Finish.CANCELLED:
            self._count.cancelled += 1
        else:
            self._count.finished += 1
            self._hold_s += (now - admitted - self._hold_s) * (0.2 if self._hold_s else 1.0)
        self._leave(sequence, Done(finish, usage, *times, ids=tuple(sequence.fresh), stop=sequence.text.stopped))

    def _fail(self, sequence: Sequence, error: ApiError) -> None:
        self._say(sequence)
        self._count.failed += 1
        self._leave(sequence, Failed(error))

    def _leave(self, sequence: Sequence, last: Event) -> None:
        self._changed = True
        ran = sequence.seq != NOWHERE
        self._scheduler.remove(sequence)
        if ran and isinstance(last, Done):
            self._memory.close(sequence)
        elif ran:
            self._memory.abandon(sequence)
        del self._sequences[sequence.id]
        self._out.append((sequence.sink, last))
        self._delivered = float("-inf")
        with self._door:
            self._inside -= 1

    def _say(self, sequence: Sequence) -> None:
        self._unheard.pop(sequence.id, None)
        event = sequence.event()
        if event is not None:
            self._out.append((sequence.sink, event))

    def _deliver(self, now: float, *, at_once: bool = False) -> None:
        """Hand over what there is to hear, unless more comes soon: see `Limits.gather_s`."""
        if not at_once and now - self._delivered + self._step_s < self._limits.gather_s:
            return
        for sequence in list(self._unheard.values()):
            self._say(sequence)
        self._delivered = now
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
        self._deliver(self._clock(), at_once=True)

    # Measuring.

    def _predicted_wait(self) -> float:
        """Seconds until one more ask should get a slot, 0.0 while one is free. Thread-safe, under the door's lock.

        Slots turn over in the time that an answer lately held one; what waits ahead of it takes its share of them."""
        slots = self._backend.room.slots
        if self._inside < slots:
            return 0.0
        return self._hold_s * (self._inside - slots + 1) / slots

    def _with_arrivals(self, load: Load) -> Load:
        """The load of a snapshot, and what the engine has not looked at yet. Thread-safe, under the door's lock."""
        arriving = sum(len(command.tokens) for command in self._inbox if isinstance(command, Sequence))
        return replace(
            load,
            waiting=max(0, self._inside - load.running),
            queued_prompt_tokens=load.queued_prompt_tokens + arriving,
            wait_s=self._predicted_wait(),
        )

    def _snapshot(self, now: float) -> Stats:
        self._changed = False
        scheduler, memory, count, moves = self._scheduler, self._memory, self._count, self._memory.moves
        live = memory.cells_live
        load = Load(
            slots=scheduler.room.slots,
            running=len(scheduler.running),
            kv_cells=scheduler.room.kv_cells,
            kv_cells_used=live,
            queued_prompt_tokens=scheduler.queued_prompt_tokens,
            prefill_tps=self._long_prefill.per_second,
            decode_tps=self._decode.per_second,
        )
        version = (memory.version, count.prompt_tokens)
        if version != self._held_version and (now - self._held_at >= _HELD_S or not self._sequences):
            self._held, self._held_at, self._held_version = memory.held(_MOST_HELD), now, version
        timings = Timings(
            steps=count.steps,
            decode_s=count.decode_s,
            sample_s=count.sample_s,
            other_s=count.step_s - count.decode_s - count.sample_s,
            prompt_tokens=count.prompt_tokens,
            cached_tokens=count.cached_tokens,
            completion_tokens=count.completion_tokens,
            finished=count.finished,
            cancelled=count.cancelled,
            failed=count.failed,
            refused=self._refused,
            evicted=moves.evicted,
            compacted=moves.compacted,
            saved=moves.saved,
            restored=moves.restored,
            swapped=count.swapped,
            dropped=count.dropped,
            drafted=count.drafted,
            accepted=count.accepted,
        )
        return Stats(
            load,
            timings,
            heartbeat=now,
            prefixes=memory.prefixes,
            cells_idle=memory.cells.used - live,
            host_prefixes=len(memory.host),
            host_bytes=memory.host.size,
            held=self._held,
        )


@dataclass
class _Counters:
    """The engine thread's own figures, copied into `Timings`."""

    steps: int = 0
    step_s: float = 0.0
    decode_s: float = 0.0
    sample_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    swapped: int = 0
    dropped: int = 0
    drafted: int = 0
    accepted: int = 0
