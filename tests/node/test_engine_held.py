"""What the engine says it holds is what the next request finds: running, idle or in host RAM, and not a token more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.engine import loop, memory
from llmnode.engine.backend import Room
from llmnode.engine.fake import FakeBackend
from llmnode.engine.loop import Engine, Limits
from llmnode.engine.snapshot import Snapshot
from llmnode.engine.types import Ask, Finish, Sampling
from tests.node.engine_rig import Answer, Steps, running, until

ROOM = Room(slots=4, n_ctx=256, kv_cells=1024, n_batch=64, sequences=8, rows=20)
SMALL = Room(slots=1, n_ctx=256, kv_cells=256, n_batch=64, sequences=2, rows=4)
GREEDY = Sampling(temperature=0)
PLAIN = Limits(prompt_lookup=False)


@pytest.fixture(autouse=True, scope="module")
def told_at_each_step_and_always_worth_saving() -> Iterator[None]:
    """How soon it is told, and whether saving pays, would hang on the machine's speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_HELD_S", 0.0)
        patch.setattr(loop, "_SNAPSHOT_S", 0.0)
        patch.setattr(memory, "_CHANCE", float("inf"))
        yield


def words(length: int, seed: int) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(dice.randrange(97, 123) for _ in range(length))


def ask(seed: int, length: int = 200, answer: int = 5) -> Ask:
    return Ask(words(length, seed), GREEDY, max_tokens=answer, ignore_eos=True, tag=f"ask {seed}")


def one(engine: Engine, wanted: Ask) -> Answer:
    answer = Answer()
    engine.submit(wanted, answer)
    answer.wait()
    return answer


def test_an_answer_that_has_ended_is_held_under_its_tag() -> None:
    with running(FakeBackend(ROOM), PLAIN) as engine:
        assert engine.stats().held == ()
        one(engine, ask(1))
        assert engine.stats().held == (("ask 1", 204),)  # the last token of an answer is drawn and not computed
        one(engine, Ask(words(200, 1) + words(20, 9), GREEDY, max_tokens=5))
        assert engine.stats().held == (("ask 1", 204),)  # one without a tag is nobody's business


def test_what_host_ram_holds_is_held_and_the_one_used_last_comes_first() -> None:
    with running(FakeBackend(SMALL), PLAIN) as engine:
        one(engine, ask(1))
        one(engine, ask(2))
        assert engine.stats().host_prefixes == 1
        assert engine.stats().held == (("ask 2", 204), ("ask 1", 204))
        one(engine, ask(1))
        assert engine.stats().held[0] == ("ask 1", 204)


def test_what_is_evicted_and_not_saved_leaves() -> None:
    with running(FakeBackend(SMALL), Limits(host_bytes=0)) as engine:
        one(engine, ask(1))
        one(engine, ask(2))
        assert engine.stats().held == (("ask 2", 204),)


def test_what_host_ram_has_no_room_for_any_more_leaves() -> None:
    with running(FakeBackend(SMALL), Limits(host_bytes=6000)) as engine:  # one of them takes 4,592 bytes
        for seed in (1, 2, 3):
            one(engine, ask(seed))
        assert engine.stats().held == (("ask 3", 204), ("ask 2", 204))


def test_a_running_prompt_is_held_as_far_as_it_is_computed() -> None:
    steps, answer = Steps(), Answer()
    with running(FakeBackend(ROOM, step_delay_s=1, sleep=steps.sleep), PLAIN, steps=steps) as engine:
        id = engine.submit(ask(1), answer)
        for computed in (0, 64, 128):
            steps.begun()
            assert engine.stats().held == ((("ask 1", computed),) if computed else ())
            steps.allow()
        steps.begun()
        engine.cancel(id)
        steps.free()
        assert answer.done.finish is Finish.CANCELLED
        until(lambda: not engine.stats().load.running)
        assert engine.stats().held == (("ask 1", 200),)


def test_one_that_follows_another_holds_nothing_until_it_shares() -> None:
    steps, first, second = Steps(), Answer(), Answer()
    follower = Ask(words(200, 1) + words(3, 2), GREEDY, max_tokens=5, tag="follower")
    with running(FakeBackend(ROOM, step_delay_s=1, sleep=steps.sleep), PLAIN, steps=steps) as engine:
        engine.submit(ask(1, answer=50), first)
        steps.begun()
        engine.submit(follower, second)
        assert engine.stats().held == ()
        assert engine.stats().load.queued_prompt_tokens == 200 + 203
        steps.allow()
        steps.begun()
        assert engine.stats().held == (("follower", 64), ("ask 1", 64))
        assert engine.stats().load.running == 2
        # The prompt that both have is to be computed once.
        assert engine.stats().load.queued_prompt_tokens == 200 - 64 + 3
        steps.allow()
        steps.begun()
        assert engine.stats().held == (("follower", 64), ("ask 1", 128))
        assert engine.stats().load.queued_prompt_tokens == 200 - 128 + 3
        for _ in range(3):
            steps.allow()
            steps.begun()
        assert ("follower", 203) in engine.stats().held
        steps.free()
        first.wait(), second.wait()


def test_an_answer_that_gave_way_is_held_in_host_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.Memory, "swap_seconds", lambda self, sequence: 0.0)
    room = Room(slots=2, n_ctx=256, kv_cells=260, n_batch=64, sequences=4, rows=8)
    asks = [ask(seed, length=60, answer=150) for seed in (1, 2)]
    steps, answers = Steps(), [Answer(), Answer()]
    with running(FakeBackend(room, step_delay_s=1, sleep=steps.sleep), PLAIN, steps=steps) as engine:
        for wanted, answer in zip(asks, answers, strict=True):
            engine.submit(wanted, answer)
        while not engine.stats().timings.swapped:
            steps.begun()
            steps.allow()
        (_, oldest), (tag, swapped) = engine.stats().held
        assert tag == "ask 2" and 60 < swapped < oldest
        steps.free()
        for answer in answers:
            answer.wait()
        assert {tag for tag, _ in engine.stats().held} == {"ask 1", "ask 2"}


def test_where_state_cannot_be_cut_only_what_can_be_gone_on_from_is_held() -> None:
    steps, answer = Steps(), Answer()
    with running(FakeBackend(ROOM, can_cut=False, step_delay_s=1, sleep=steps.sleep), PLAIN, steps=steps) as engine:
        assert not engine.shares_parts
        engine.submit(ask(1), answer)
        steps.begun()
        steps.allow()
        steps.begun()
        assert engine.stats().load.running == 1
        assert engine.stats().held == ()  # half a prompt is of use to nobody
        steps.free()
        answer.wait()
        assert set(engine.stats().held) == {("ask 1", 199), ("ask 1", 204)}  # the prompt's checkpoint, and the turn


def test_nothing_is_told_anew_while_nothing_has_changed() -> None:
    with running(FakeBackend(ROOM), PLAIN) as engine:
        one(engine, ask(1))
        held, heartbeat = engine.stats().held, engine.stats().heartbeat
        engine.cancel(0)  # wakes it up, and changes nothing
        until(lambda: engine.stats().heartbeat > heartbeat)
        assert engine.stats().held is held


def test_prefixes_of_the_last_process_have_no_tag(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path / "prefixes", 1 << 20, "m")
    with running(FakeBackend(ROOM), PLAIN, snapshot=snapshot) as engine:
        one(engine, ask(1))
    with running(FakeBackend(ROOM), PLAIN, snapshot=snapshot) as engine:
        one(engine, ask(2))
        assert engine.stats().host_prefixes == 1
        assert engine.stats().held == (("ask 2", 204),)


def test_everything_that_is_still_to_be_prefilled_is_counted() -> None:
    steps, answers = Steps(), [Answer() for _ in range(4)]
    room = Room(slots=2, n_ctx=256, kv_cells=512, n_batch=64, rows=8)
    with running(FakeBackend(room, step_delay_s=1, sleep=steps.sleep), PLAIN, steps=steps) as engine:
        engine.submit(ask(1), answers[0])
        steps.begun()
        for seed in (2, 3, 4):
            engine.submit(ask(seed, length=100), answers[seed - 1])
        load = engine.stats().load
        assert (load.running, load.waiting) == (1, 3)
        assert load.queued_prompt_tokens == 200 + 3 * 100
        steps.allow()
        steps.begun()
        load = engine.stats().load
        assert (load.running, load.waiting) == (2, 2)
        assert load.queued_prompt_tokens == 200 - 64 + 3 * 100
        steps.allow()
        steps.begun()
        load = engine.stats().load
        assert (load.running, load.waiting) == (2, 2)
        assert load.queued_prompt_tokens == 200 - 128 + 3 * 100
        steps.free()
        for answer in answers:
            answer.wait()


def test_the_predicted_wait_is_told_and_is_nothing_while_a_slot_is_free() -> None:
    now = [0.0]
    steps, answers = Steps(), [Answer() for _ in range(4)]
    room = Room(slots=1, n_ctx=256, kv_cells=256, n_batch=64)
    backend = FakeBackend(room, step_delay_s=1, sleep=steps.sleep)
    with running(backend, PLAIN, clock=lambda: now[0], steps=steps) as engine:
        engine.submit(ask(1, length=20, answer=1), answers[0])
        steps.begun()
        now[0] = 6.0
        steps.allow()
        answers[0].wait()
        until(lambda: not engine.stats().load.running)
        assert engine.stats().load.wait_s == 0.0
        for number in (1, 2):
            engine.submit(ask(1 + number, length=20, answer=2), answers[number])
        steps.begun()
        steps.allow()
        steps.begun()
        assert (engine.stats().load.running, engine.stats().load.waiting) == (1, 1)
        assert engine.stats().load.wait_s == 12.0  # two are inside, and the last answer took its slot for 6 s
        steps.free()
        answers[1].wait(), answers[2].wait()


numbers = st.integers(0, 10_000)
requests = st.tuples(st.sampled_from(["new", "goes on", "turns off", "leaves"]), numbers, st.integers(1, 60), numbers)
rounds = st.lists(st.tuples(st.lists(requests, min_size=1, max_size=4), numbers, numbers), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rounds, st.integers(1, 4), st.integers(128, 400), st.sampled_from([0, 3000, 1 << 20]), st.booleans())
def test_whoever_asks_for_what_is_held_finds_it(
    rounds: list[tuple[list[tuple[str, int, int, int]], int, int]], slots: int, cells: int, host: int, can_cut: bool
) -> None:
    """Whatever was asked before, side by side, and was shared, cancelled, evicted, swapped or saved."""
    room = Room(slots, 128, cells, 32, sequences=2 * slots, rows=slots + 4)
    asks: list[Ask] = []
    answers: list[Answer] = []

    def tokens(tag: int) -> tuple[int, ...]:
        return asks[tag].prompt + answers[tag].ids

    def wanted(known: int, kind: str, seed: int, length: int, most: int) -> Ask:
        before = tokens(seed % known) if known and kind != "new" else ()
        if kind == "turns off":
            before = before[: seed % (len(before) + 1)]
        prompt = (*before[: 127 - length], *words(length, seed))
        return Ask(prompt, Sampling(seed=seed), max_tokens=1 + most % 30, ignore_eos=True, tag=len(asks))

    with running(FakeBackend(room, can_cut=can_cut), Limits(host_bytes=host)) as engine:
        for requests, pick, cut in rounds:
            known = len(asks)
            for kind, *figures in requests:
                asks.append(wanted(known, kind, *figures))
                answers.append(Answer())
                id = engine.submit(asks[-1], answers[-1])
                if kind == "leaves":
                    engine.cancel(id)
            for answer in answers[known:]:
                answer.wait()
            until(lambda: not engine.stats().load.running)
            held = engine.stats().held
            if held:
                tag, length = held[pick % len(held)]
                assert isinstance(tag, int)
                part = 1 + cut % length if engine.shares_parts else length
                probe = tokens(tag)[:part]  # without the last ones of an answer, where these made no text
                if len(probe) + 1 < room.n_ctx and (engine.shares_parts or len(probe) == length):
                    found = one(engine, Ask((*probe, 0), GREEDY, max_tokens=1)).done.usage.cached_tokens
                    assert found >= len(probe) - memory._WORTH_KEEPING
