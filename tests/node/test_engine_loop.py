"""The engine over the fake backend, where every promise can be checked exactly."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llmnode.engine.backend import ABORTED, BAD_BATCH, NO_ROOM, Chunk, FatalEngineError, Room
from llmnode.engine.fake import END, FakeBackend
from llmnode.engine.loop import Engine, Limits
from llmnode.engine.rates import Rate
from llmnode.engine.types import Ask, Done, Event, Finish, Sampling, Sink, Text
from llmnode.wire.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from tests.node.engine_rig import PATIENCE_S, Answer, Steps, Watched, running, until

ROOM = Room(slots=4, n_ctx=256, kv_cells=1024, n_batch=64)
GREEDY = Sampling(temperature=0)


def prompt(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def alone(ask: Ask, **options: Any) -> Answer:
    answer = Answer()
    with running(FakeBackend(ROOM, **options)) as engine:
        engine.submit(ask, answer)
        answer.wait()
    return answer


def test_an_answer_is_texts_then_one_done_with_true_usage() -> None:
    answer = alone(Ask(prompt("hello"), GREEDY, max_tokens=20))
    assert answer.done.finish is Finish.LENGTH
    assert answer.done.usage.prompt_tokens == 5
    assert answer.done.usage.completion_tokens == 20
    assert answer.done.usage.cached_tokens == 0
    assert len(answer.ids) == len(answer.text) == 20
    assert all(isinstance(event, Text) for event in answer.events[:-1])


def test_each_answer_in_a_mixed_batch_equals_its_answer_alone() -> None:
    dice = random.Random(7)
    asks = []
    for number in range(24):
        sampling = (
            GREEDY if number % 3 == 0 else Sampling(dice.choice((0.7, 1.5)), dice.choice((0, 5)), 0.9, seed=number)
        )
        words = prompt("".join(dice.choice("abcdef ") for _ in range(dice.randint(1, 180))))
        asks.append(Ask(words, sampling, dice.randint(1, 60), stop=("e", "zz") if number % 4 == 0 else ()))
    mixed = [Answer() for _ in asks]
    backend = Watched(ROOM)
    with running(backend) as engine:
        for ask, answer in zip(asks, mixed, strict=True):
            engine.submit(ask, answer)
        for answer in mixed:
            answer.wait()
    assert max(len(batch) for batch in backend.batches) == ROOM.slots
    for ask, answer in zip(asks, mixed, strict=True):
        by_itself = alone(ask)
        assert (answer.text, answer.done.finish, answer.done.usage) == (
            by_itself.text,
            by_itself.done.finish,
            by_itself.done.usage,
        )


def test_sequences_join_and_leave_between_any_two_steps() -> None:
    steps, first, second = Steps(), Answer(), Answer()
    backend = Watched(ROOM, step_delay_s=1, sleep=steps.sleep)
    with running(backend, steps=steps) as engine:
        engine.submit(Ask(prompt("aaa"), GREEDY, max_tokens=6), first)
        steps.begun()
        engine.submit(Ask(prompt("bbb"), GREEDY, max_tokens=2), second)
        steps.allow()
        steps.begun()
        assert [len(batch) for batch in backend.batches] == [1, 2]
        steps.free()
        first.wait()
        second.wait()
    assert [len(batch) for batch in backend.batches] == [1, 2, 2, 1, 1, 1]


def test_a_short_prompt_is_answered_while_a_long_one_still_prefills() -> None:
    steps, long, short = Steps(), Answer(), Answer()
    backend = Watched(ROOM, step_delay_s=1, sleep=steps.sleep)
    with running(backend, steps=steps) as engine:
        engine.submit(Ask(prompt("x" * 250), GREEDY, max_tokens=1), long)
        steps.begun()
        engine.submit(Ask(prompt("hi"), GREEDY, max_tokens=1), short)
        steps.allow()
        steps.begun()
        steps.allow()
        short.wait()
        assert not long.events
        steps.free()
        long.wait()


def test_cancel_frees_the_slot_within_one_step() -> None:
    steps, answer, other = Steps(), Answer(), Answer()
    backend = Watched(Room(1, 256, 256, 64), step_delay_s=1, sleep=steps.sleep)
    with running(backend, steps=steps) as engine:
        id = engine.submit(Ask(prompt("aaa"), GREEDY), answer)
        engine.submit(Ask(prompt("b"), GREEDY, max_tokens=1), other)
        for _ in range(3):
            steps.begun()
            steps.allow()
        steps.begun()
        engine.cancel(id)
        steps.allow()
        steps.begun()
        assert [chunk.tokens[0] for chunk in backend.batches[-1]] == [ord("b")]
        steps.free()
        assert answer.done.finish is Finish.CANCELLED
        assert answer.done.usage.completion_tokens == 4
        other.wait()
        until(lambda: engine.stats().load.kv_cells_used == 0)


def test_cancel_works_while_queued_and_while_prefilling() -> None:
    steps, prefilling, queued = Steps(), Answer(), Answer()
    backend = Watched(Room(1, 256, 256, 16), step_delay_s=1, sleep=steps.sleep)
    with running(backend, steps=steps) as engine:
        first = engine.submit(Ask(prompt("a" * 200), GREEDY), prefilling)
        second = engine.submit(Ask(prompt("b"), GREEDY), queued)
        steps.begun()
        engine.cancel(second)
        steps.allow()
        steps.begun()
        engine.cancel(first)
        engine.cancel(first)
        engine.cancel(10**9)
        steps.free()
        assert queued.done.finish is Finish.CANCELLED
        assert queued.done.usage.completion_tokens == 0
        assert prefilling.done.finish is Finish.CANCELLED
        until(lambda: engine.stats().load.running == 0)
        assert len(backend.batches) == 2
        assert engine.stats().timings.cancelled == 2


def test_the_queue_has_a_bound_and_says_when_to_come_back() -> None:
    steps, answers = Steps(), [Answer() for _ in range(3)]
    backend = FakeBackend(Room(1, 256, 256, 64), step_delay_s=1, sleep=steps.sleep)
    with running(backend, Limits(queue_limit=2), steps=steps) as engine:
        for answer in answers:
            engine.submit(Ask(prompt("a"), GREEDY, max_tokens=2), answer)
        with pytest.raises(Overloaded, match=r"all 1 slots are taken and 2 requests wait, the limit is 2") as refusal:
            engine.submit(Ask(prompt("a"), GREEDY), Answer())
        assert refusal.value.retry_after is not None
        assert refusal.value.retry_after >= 1
        steps.free()
        for answer in answers:
            answer.wait()
        until(lambda: engine.stats().timings.refused == 1)
        again = Answer()
        until(lambda: engine.stats().load.running == 0)
        engine.submit(Ask(prompt("a"), GREEDY, max_tokens=1), again)
        assert again.done.finish is Finish.LENGTH


def test_retry_after_is_how_long_a_slot_takes_to_come_free() -> None:
    seconds = itertools.count()
    steps = Steps()
    backend = FakeBackend(Room(1, 256, 256, 64), step_delay_s=1, sleep=steps.sleep)
    with running(backend, Limits(queue_limit=0), clock=lambda: float(next(seconds)), steps=steps) as engine:
        first, second = Answer(), Answer()
        steps.allow()
        engine.submit(Ask(prompt("a"), GREEDY, max_tokens=1), first)
        first.wait()
        until(lambda: engine.stats().load.running == 0)
        engine.submit(Ask(prompt("a"), GREEDY), second)
        with pytest.raises(Overloaded) as refusal:
            engine.submit(Ask(prompt("a"), GREEDY), Answer())
        done = first.done
        assert refusal.value.retry_after == done.prefill_s + done.decode_s
        steps.free()


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_both_numbers() -> None:
    with running(FakeBackend(ROOM)) as engine:
        with pytest.raises(ContextLengthExceeded, match=r"256 tokens .* holds 256"):
            engine.submit(Ask(prompt("a" * 256), GREEDY), Answer())
        answer = Answer()
        engine.submit(Ask(prompt("a" * 255), GREEDY), answer)
        assert answer.done.usage.completion_tokens == 1


@pytest.mark.parametrize(
    "ask, field",
    [
        (Ask((), GREEDY), "prompt"),
        (Ask((1, 5000), GREEDY), "prompt"),
        (Ask((-1,), GREEDY), "prompt"),
        (Ask((1,), GREEDY, max_tokens=0), "max_tokens"),
    ],
)
def test_an_ask_that_no_model_could_take_is_refused_by_field(ask: Ask, field: str) -> None:
    with running(FakeBackend(ROOM)) as engine, pytest.raises(InvalidRequest) as refusal:
        engine.submit(ask, Answer())
    assert refusal.value.param == field


def test_an_answer_without_a_limit_goes_up_to_the_context() -> None:
    answer = alone(Ask(prompt("hello"), GREEDY, ignore_eos=True))
    assert answer.done.finish is Finish.LENGTH
    assert answer.done.usage.completion_tokens == ROOM.n_ctx - 5


def test_the_end_token_ends_an_answer_unless_it_is_to_be_ignored() -> None:
    ask = Ask(prompt("hello"), Sampling(seed=2), max_tokens=240)
    ended = alone(ask)
    assert ended.done.finish is Finish.STOP
    assert ended.done.usage.completion_tokens == len(ended.text) + 1 < 240
    went_on = alone(Ask(ask.prompt, ask.sampling, 240, ignore_eos=True))
    assert went_on.done.finish is Finish.LENGTH
    assert went_on.text.startswith(ended.text)


def test_a_stop_string_across_tokens_ends_an_answer_and_is_not_in_it() -> None:
    whole = alone(Ask(prompt("hello"), GREEDY, max_tokens=40)).text
    stop = whole[17:21]
    answer = alone(Ask(prompt("hello"), GREEDY, max_tokens=40, stop=(stop,)))
    assert answer.done.finish is Finish.STOP
    assert answer.text == whole[: whole.index(stop)]


def test_no_event_holds_half_a_character() -> None:
    ask = Ask(prompt("hello"), Sampling(seed=4), max_tokens=200, ignore_eos=True)
    answer = alone(ask, legible=False)
    data = bytes(id for id in answer.ids if id < 256)
    assert data.decode("utf-8", "replace").startswith(answer.text)
    assert any(len(event.ids) > 1 for event in answer.events if isinstance(event, Text))


def test_a_seed_reproduces_an_answer_and_another_seed_does_not() -> None:
    first, again, other = (alone(Ask(prompt("hi"), Sampling(seed=seed), max_tokens=40)).text for seed in (5, 5, 6))
    assert first == again != other


def test_a_deadline_ends_an_answer_wherever_it_is() -> None:
    now = [100.0]
    steps, started, queued = Steps(), Answer(), Answer()
    backend = FakeBackend(Room(1, 256, 256, 64), step_delay_s=1, sleep=steps.sleep)
    with running(backend, clock=lambda: now[0], steps=steps) as engine:
        engine.submit(Ask(prompt("a"), GREEDY, deadline=110.0), started)
        engine.submit(Ask(prompt("b"), GREEDY, deadline=105.0), queued)
        steps.begun()
        now[0] = 106.0
        steps.allow()
        steps.begun()
        now[0] = 110.0
        steps.allow()
        assert queued.error.status == 504
        assert "6.0 s, while queued" in queued.error.message
        assert started.error.status == 504
        assert "2 tokens into its answer" in started.error.message
        steps.free()
        until(lambda: engine.stats().load.running == 0)


def test_a_full_cache_shrinks_the_batch_before_anything_fails() -> None:
    answer = Answer()
    backend = Watched(ROOM, codes=[NO_ROOM, NO_ROOM])
    with running(backend) as engine:
        engine.submit(Ask(prompt("a" * 60), GREEDY, max_tokens=3), answer)
        assert answer.done.usage.completion_tokens == 3
    assert [sum(len(chunk.tokens) for chunk in batch) for batch in backend.batches[:4]] == [60, 30, 15, 30]
    assert answer.text == alone(Ask(prompt("a" * 60), GREEDY, max_tokens=3)).text


def test_when_nothing_can_shrink_one_answer_gives_way_and_all_are_whole() -> None:
    old, young = Answer(), Answer()
    steps = Steps()
    backend = Watched(ROOM, codes=[None, None, NO_ROOM], step_delay_s=1, sleep=steps.sleep)
    with running(backend, steps=steps) as engine:
        engine.submit(Ask(prompt("a"), GREEDY, max_tokens=9), old)
        engine.submit(Ask(prompt("b"), GREEDY, max_tokens=9), young)
        steps.free()
        assert young.done.usage.completion_tokens == old.done.usage.completion_tokens == 9
        assert engine.stats().timings.swapped + engine.stats().timings.dropped == 1
    assert (old.text, young.text) == tuple(alone(Ask(prompt(x), GREEDY, max_tokens=9)).text for x in "ab")


def test_one_that_finds_no_room_alone_fails_and_says_so() -> None:
    answer = Answer()
    with running(Watched(ROOM, codes=[None, NO_ROOM])) as engine:
        engine.submit(Ask(prompt("a"), GREEDY, max_tokens=9), answer)
        assert answer.error.status == 503
        assert answer.error.message == "the KV cache is full"


def test_a_bad_batch_fails_only_the_guilty() -> None:
    guilty = 2

    class Picky(Watched):
        def decode(self, chunks: Sequence[Chunk]) -> int:
            self.batches.append(list(chunks))
            if any(chunk.start == 0 and chunk.tokens[0] == guilty for chunk in chunks):
                return BAD_BATCH
            return FakeBackend.decode(self, chunks)

    backend = Picky(ROOM)
    answers = {first: Answer() for first in (1, guilty, 3)}
    with running(backend) as engine:
        for first, answer in answers.items():
            engine.submit(Ask((first, 7), GREEDY, max_tokens=5), answer)
        assert answers[guilty].error.status == 500
        for first in (1, 3):
            assert answers[first].done.usage.completion_tokens == 5
            assert answers[first].text == alone(Ask((first, 7), GREEDY, max_tokens=5)).text


def test_an_aborted_batch_goes_on_from_what_was_computed() -> None:
    class Interrupted(Watched):
        def decode(self, chunks: Sequence[Chunk]) -> int:
            if len(self.batches) != 1:
                return super().decode(chunks)
            self.batches.append(list(chunks))
            part = [chunk._replace(tokens=chunk.tokens[:20], rows=0) for chunk in chunks]
            assert FakeBackend.decode(self, part) == 0
            return ABORTED

    backend = Interrupted(ROOM)
    ask = Ask(prompt("abcdefgh" * 20), GREEDY, max_tokens=4)
    answer = Answer()
    with running(backend) as engine:
        engine.submit(ask, answer)
        assert answer.done.usage.completion_tokens == 4
    assert [chunk.start for batch in backend.batches for chunk in batch][:3] == [0, 64, 84]
    assert answer.text == alone(ask).text


def test_a_fatal_code_fails_everyone_and_calls_out() -> None:
    called: list[FatalEngineError] = []
    answers = [Answer(), Answer()]
    backend = Watched(Room(1, 256, 256, 64), codes=[None, -3])
    engine = Engine(backend, Limits(), on_fatal=called.append)
    for answer in answers:
        engine.submit(Ask(prompt("a"), GREEDY), answer)
    engine.start()
    for answer in answers:
        assert answer.error.status == 503
        assert answer.error.code == "engine_failed"
    engine.stop()
    assert [str(error) for error in called] == ["decode of 1 tokens ended with code -3"]
    with pytest.raises(Overloaded, match="the engine failed"):
        engine.submit(Ask(prompt("a"), GREEDY), Answer())


def test_cells_under_a_wrong_account_are_fatal() -> None:
    called = threading.Event()

    class Leaky(FakeBackend):
        def seq_remove(self, seq: int, start: int = 0) -> bool:
            return True

    answer = Answer()
    with running(Leaky(ROOM), on_fatal=lambda error: called.set()) as engine:
        engine.submit(Ask(prompt("abc"), GREEDY, max_tokens=2), answer)
        answer.wait()
        assert called.wait(PATIENCE_S)


def test_logits_that_are_no_numbers_fail_one_answer() -> None:
    class Broken(FakeBackend):
        def logits(self) -> np.ndarray:
            rows = super().logits()
            rows[0] = np.nan
            return rows

    answer = Answer()
    with running(Broken(ROOM)) as engine:
        engine.submit(Ask(prompt("abc"), GREEDY), answer)
        assert answer.error.code == "model_failed"


def test_a_reader_that_fails_ends_nobody_elses_answer() -> None:
    def explode(event: Event) -> None:
        raise RuntimeError("reader")

    answer = Answer()
    with running(FakeBackend(ROOM)) as engine:
        engine.submit(Ask(prompt("a"), GREEDY, max_tokens=5), explode)
        until(lambda: engine.stats().timings.finished == 1)
        engine.submit(Ask(prompt("b"), GREEDY, max_tokens=5), answer)
        assert answer.done.usage.completion_tokens == 5


def test_all_events_of_a_step_are_delivered_in_one_call() -> None:
    calls: list[int] = []
    steps = Steps()

    def deliver(events: Sequence[tuple[Sink, Event]]) -> None:
        calls.append(len(events))
        for sink, event in events:
            sink(event)

    answers = [Answer() for _ in range(3)]
    backend = FakeBackend(ROOM, step_delay_s=1, sleep=steps.sleep)
    engine = Engine(backend, Limits(), deliver=deliver)
    for answer in answers:
        engine.submit(Ask(prompt("abc"), GREEDY, max_tokens=4), answer)
    steps.free()
    engine.start()
    for answer in answers:
        answer.wait()
    engine.stop()
    assert calls == [3, 3, 3, 6]


def test_stopping_fails_what_is_left_and_closes_the_backend() -> None:
    steps, answer = Steps(), Answer()
    backend = Watched(ROOM, step_delay_s=1, sleep=steps.sleep)
    engine = Engine(backend, Limits())
    engine.start()
    engine.submit(Ask(prompt("abc"), GREEDY), answer)
    steps.begun()
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    until(lambda: engine._stopping)
    steps.free()
    stopper.join(PATIENCE_S)
    assert answer.error.status == 503
    assert backend.closed
    with pytest.raises(Overloaded, match="stopping"):
        engine.submit(Ask(prompt("a"), GREEDY), Answer())


def test_stats_show_the_step_that_is_running_and_when_it_should_have_ended() -> None:
    now = [50.0]
    steps, answer = Steps(), Answer()
    backend = FakeBackend(ROOM, step_delay_s=1, sleep=steps.sleep)
    limits = Limits(step_grace_s=10, step_tolerance=10, slowest_tps=2)
    with running(backend, limits, clock=lambda: now[0], steps=steps) as engine:
        assert engine.stats().step_deadline is None
        engine.submit(Ask(prompt("a" * 40), GREEDY, max_tokens=2), answer)
        steps.begun()
        stats = engine.stats()
        assert stats.step_deadline == 50 + 10 + 10 * 40 / 2
        assert stats.stuck(now=259.0) == ""
        assert "should have ended 3.0 s ago" in stats.stuck(now=263.0)
        now[0] = 54.0
        steps.allow()
        steps.begun()
        load = engine.stats().load
        assert (load.running, load.waiting, load.kv_cells_used, load.queued_prompt_tokens) == (1, 0, 40, 0)
        assert load.prefill_tps == 10
        steps.free()
        answer.wait()
    assert engine.stats().timings.prompt_tokens == 40
    assert engine.stats().timings.completion_tokens == 2


def test_the_load_counts_what_comes_while_a_step_runs() -> None:
    steps = Steps()
    first, second = Answer(), Answer()
    with running(FakeBackend(ROOM, step_delay_s=1, sleep=steps.sleep), steps=steps) as engine:
        engine.submit(Ask(prompt("a" * 40), GREEDY, max_tokens=2), first)
        steps.begun()
        load = engine.stats().load
        assert (load.running, load.waiting, load.queued_prompt_tokens) == (1, 0, 40)
        engine.submit(Ask(prompt("b" * 30), GREEDY, max_tokens=2), second)
        load = engine.stats().load
        assert (load.running, load.waiting, load.queued_prompt_tokens) == (1, 1, 70)
        steps.free()
        first.wait()
        second.wait()


def test_the_speed_of_prompts_is_that_of_long_ones() -> None:
    rate = Rate()
    for _ in range(20):
        rate.add(4, 1.0, weight=4)
    assert rate.per_second == pytest.approx(4)
    rate.add(100, 1.0, weight=100)
    assert 70 < rate.per_second < 100  # without weights: 15


def test_hundreds_of_random_arrivals_all_end_and_leave_nothing_behind() -> None:
    dice = random.Random(11)
    room = Room(5, 128, 300, 32)
    backend = Watched(room)
    answers: list[tuple[Ask, Answer, bool]] = []
    with running(backend, Limits(queue_limit=1000)) as engine:
        for number in range(300):
            words = tuple(dice.randrange(256) for _ in range(dice.randint(1, 127)))
            sampling = Sampling(dice.choice((0.0, 1.0, 2.0)), seed=number)
            ask = Ask(words, sampling, dice.choice((None, 1, 7, 40)), stop=dice.choice(((), ("a",), ("q", "xy"))))
            answer, gone = Answer(), dice.random() < 0.25
            id = engine.submit(ask, answer)
            answers.append((ask, answer, gone))
            if gone:
                if dice.random() < 0.5:
                    answer.wait_for_text()
                engine.cancel(id)
        for ask, answer, gone in answers:
            done = answer.wait()
            assert isinstance(done, Done), done
            assert gone or done.finish is not Finish.CANCELLED
            assert sum(not isinstance(event, Text) for event in answer.events) == 1
            assert done.usage.prompt_tokens == len(ask.prompt)
            assert done.usage.completion_tokens <= min(ask.max_tokens or 128, 128 - len(ask.prompt))
        until(lambda: engine.stats().load.running == engine.stats().load.waiting == 0)
        until(lambda: engine.stats().step_deadline is None)
        timings = engine.stats().timings
        assert timings.finished + timings.cancelled == 300
        assert timings.failed == 0
    assert max(len(batch) for batch in backend.batches) == room.slots
    assert END in backend.end_tokens


def test_an_engine_that_never_started_stops_as_well() -> None:
    backend, answer = Watched(ROOM), Answer()
    engine = Engine(backend, Limits())
    engine.submit(Ask(prompt("abc"), GREEDY), answer)
    engine.stop()
    assert answer.error.status == 503
    assert backend.closed
