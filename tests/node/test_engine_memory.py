"""Prefixes are shared from wherever they are, and a full cache costs time and never an answer: on the fake, exactly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llmnode.engine import memory
from llmnode.engine.backend import FatalEngineError, Room, Saved
from llmnode.engine.fake import FakeBackend
from llmnode.engine.loop import Engine, Limits
from llmnode.engine.snapshot import Snapshot
from llmnode.engine.types import Ask, Finish, Sampling
from tests.node.engine_rig import Answer, Steps, Watched, running, until

ROOM = Room(slots=4, n_ctx=256, kv_cells=1024, n_batch=64, sequences=8, rows=20)
GREEDY = Sampling(temperature=0)
PLAIN = Limits(prompt_lookup=False)


@pytest.fixture(autouse=True)
def saving_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake computes a token as fast as it saves one, so what is worth saving would hang on the machine's mood."""
    monkeypatch.setattr(memory, "_CHANCE", float("inf"))


def words(length: int, seed: int) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(dice.randrange(97, 123) for _ in range(length))


def alone(ask: Ask, n_ctx: int = 256) -> Answer:
    answer = Answer()
    with running(FakeBackend(Room(1, n_ctx, n_ctx, n_ctx)), Limits(prompt_lookup=False, host_bytes=0)) as engine:
        engine.submit(ask, answer)
        answer.wait()
    return answer


def same(answer: Answer, ask: Ask, n_ctx: int = 256) -> bool:
    by_itself = alone(ask, n_ctx)
    return (answer.done.finish, answer.text) == (by_itself.done.finish, by_itself.text)


def settled(engine: Engine) -> None:
    """Nothing runs, and an idle tick has compared the account with the backend since."""
    until(lambda: engine.stats().load.running == engine.stats().load.waiting == 0)
    last = engine.stats().heartbeat
    until(lambda: engine.stats().heartbeat > last)


def one(engine: Engine, ask: Ask) -> Answer:
    answer = Answer()
    engine.submit(ask, answer)
    answer.wait()
    return answer


def test_the_next_turn_goes_on_from_the_last_one() -> None:
    backend = Watched(ROOM)
    with running(backend, PLAIN) as engine:
        first = one(engine, Ask(words(100, 1), GREEDY, max_tokens=20, ignore_eos=True))
        turn = Ask(words(100, 1) + first.ids + words(10, 2), GREEDY, max_tokens=20)
        second = one(engine, turn)
        settled(engine)
    assert first.done.usage.cached_tokens == 0
    # The last token of an answer is drawn and not computed.
    assert second.done.usage.cached_tokens == 119
    assert same(second, turn)


def test_a_running_answer_shares_its_prompt_and_what_it_has_said() -> None:
    steps, first, second = Steps(), Answer(), Answer()
    backend = Watched(ROOM, step_delay_s=1, sleep=steps.sleep)
    long = Ask(words(100, 1), GREEDY, max_tokens=150, ignore_eos=True)
    with running(backend, PLAIN, steps=steps) as engine:
        engine.submit(long, first)
        for _ in range(90):
            steps.begun()
            steps.allow()
        steps.begun()
        said = alone(long).ids[:80]
        ask = Ask(words(100, 1) + said + words(5, 3), GREEDY, max_tokens=10)
        engine.submit(ask, second)
        steps.free()
        assert second.done.usage.cached_tokens == 180
        assert same(second, ask) and same(first, long)
        settled(engine)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    steps, answers = Steps(), [Answer() for _ in range(4)]
    backend = Watched(ROOM, step_delay_s=1, sleep=steps.sleep)
    asks = [Ask(words(200, 1) + words(3, seed), Sampling(seed=seed), max_tokens=10) for seed in range(4)]
    with running(backend, PLAIN, steps=steps) as engine:
        for ask, answer in zip(asks, answers, strict=True):
            engine.submit(ask, answer)
        steps.free()
        for ask, answer in zip(asks, answers, strict=True):
            assert same(answer, ask)
        settled(engine)
        assert engine.stats().timings.prompt_tokens <= 203 + 3 * 3 + 3
        assert sorted(a.done.usage.cached_tokens for a in answers) == [0, 200, 200, 200]


def test_a_follower_goes_its_own_way_when_its_leader_is_cancelled() -> None:
    steps, leader, follower = Steps(), Answer(), Answer()
    backend = Watched(ROOM, step_delay_s=1, sleep=steps.sleep)
    ask = Ask(words(200, 1), GREEDY, max_tokens=10)
    with running(backend, PLAIN, steps=steps) as engine:
        id = engine.submit(ask, leader)
        engine.submit(ask, follower)
        steps.begun()
        engine.cancel(id)
        steps.free()
        assert leader.done.finish is Finish.CANCELLED
        assert same(follower, ask)
        # What the leader had computed when it left is of use all the same.
        assert follower.done.usage.cached_tokens == 64
        settled(engine)


def test_followers_of_an_answer_that_gave_way_are_not_lost() -> None:
    """One long answer holds nearly all cells; what came after it shares a prompt and finds no room to go on."""
    room = Room(slots=4, n_ctx=256, kv_cells=280, n_batch=64, sequences=8, rows=20)
    asks = [Ask(words(20, 9), Sampling(seed=9), max_tokens=230, ignore_eos=True)]
    asks += [Ask(words(120, 1) + words(3, seed), Sampling(seed=seed), max_tokens=10) for seed in range(3)]
    steps, answers = Steps(), [Answer() for _ in asks]
    with running(FakeBackend(room, step_delay_s=1, sleep=steps.sleep), PLAIN, steps=steps) as engine:
        for ask, answer in zip(asks, answers, strict=True):
            engine.submit(ask, answer)
        steps.free()
        for ask, answer in zip(asks, answers, strict=True):
            assert same(answer, ask)
        settled(engine)


def test_a_short_common_prefix_is_not_worth_looking_for() -> None:
    with running(FakeBackend(ROOM), PLAIN) as engine:
        one(engine, Ask(words(8, 1) + words(100, 2), GREEDY, max_tokens=2))
        assert one(engine, Ask(words(8, 1) + words(100, 3), GREEDY, max_tokens=2)).done.usage.cached_tokens == 0


def test_no_answer_is_lost_to_a_full_cache() -> None:
    """Eight answers of up to 216 tokens in 300 cells: nearly every step meets a full cache."""
    room = Room(slots=8, n_ctx=256, kv_cells=300, n_batch=64, sequences=10, rows=20)
    asks = [Ask(words(40, seed), Sampling(seed=seed), max_tokens=176, ignore_eos=True) for seed in range(12)]
    for host_bytes in (0, 6000, 1 << 20):
        answers = [Answer() for _ in asks]
        with running(FakeBackend(room), Limits(host_bytes=host_bytes)) as engine:
            for ask, answer in zip(asks, answers, strict=True):
                engine.submit(ask, answer)
            for ask, answer in zip(asks, answers, strict=True):
                assert same(answer, ask)
                assert answer.done.usage.completion_tokens == 176
            settled(engine)
            timings = engine.stats().timings
        assert timings.failed == 0
        assert timings.swapped + timings.dropped > 3
        if host_bytes != 6000:  # which holds one answer, seldom the one that is wanted
            assert (timings.swapped > 0) == (timings.restored > 0) == (host_bytes > 0)


def test_a_prefix_that_was_evicted_comes_back_from_host_ram() -> None:
    room = Room(slots=1, n_ctx=256, kv_cells=256, n_batch=64, sequences=2, rows=4)
    ask = Ask(words(200, 1), GREEDY, max_tokens=5)
    with running(FakeBackend(room), PLAIN) as engine:
        one(engine, ask)
        one(engine, Ask(words(200, 2), GREEDY, max_tokens=5))
        assert engine.stats().timings.saved == engine.stats().host_prefixes == 1
        again = one(engine, ask)
        assert again.done.usage.cached_tokens == 199
        assert same(again, ask)
        settled(engine)
        assert engine.stats().timings.restored == 1


@pytest.mark.parametrize(("longer", "saved"), [(20, False), (120, True)])
def test_what_adds_little_to_a_saved_prompt_is_not_saved_beside_it(
    longer: int, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying is made to cost half of what all tokens are worth: 20 after 80 saved ones do not pay, 120 do."""

    def half_of_all(self: memory.Memory, length: int, loose: int) -> float:
        return 0.25 * self.compute_s * length

    monkeypatch.setattr(memory, "_CHANCE", 1.0)
    monkeypatch.setattr(memory.Memory, "_copy_seconds", half_of_all)
    room = Room(slots=1, n_ctx=256, kv_cells=256, n_batch=64, sequences=1, rows=4)
    with running(FakeBackend(room), PLAIN) as engine:
        one(engine, Ask(words(80, 1), GREEDY, max_tokens=1))
        one(engine, Ask(words(100, 2), GREEDY, max_tokens=1))
        assert engine.stats().timings.saved == 1
        one(engine, Ask(words(80, 1) + words(longer, 3), GREEDY, max_tokens=1))
        one(engine, Ask(words(100, 4), GREEDY, max_tokens=1))
        settled(engine)
        assert engine.stats().timings.saved == 2 + saved
        again = one(engine, Ask(words(80, 1) + words(longer, 3) + words(9, 5), GREEDY, max_tokens=1))
        assert again.done.usage.cached_tokens == 80 + saved * longer


@pytest.mark.parametrize("host_bytes", [0, 6000])
def test_what_a_newcomer_goes_on_from_does_not_make_way_for_it(host_bytes: int) -> None:
    """There is room for two sequences and one more in host RAM; the one wanted is the one unused for longest."""
    room = Room(slots=1, n_ctx=256, kv_cells=512, n_batch=64, sequences=2, rows=4)
    ask = Ask(words(200, 1), GREEDY, max_tokens=5)
    with running(FakeBackend(room), Limits(host_bytes=host_bytes)) as engine:
        one(engine, ask)
        one(engine, Ask(words(200, 2), GREEDY, max_tokens=5))
        again = one(engine, ask)
        assert again.done.usage.cached_tokens == 199
        assert same(again, ask)
        settled(engine)


def test_without_host_ram_an_evicted_prefix_is_computed_again() -> None:
    room = Room(slots=1, n_ctx=256, kv_cells=256, n_batch=64, sequences=2, rows=4)
    ask = Ask(words(200, 1), GREEDY, max_tokens=5)
    with running(FakeBackend(room), Limits(host_bytes=0)) as engine:
        one(engine, ask)
        one(engine, Ask(words(200, 2), GREEDY, max_tokens=5))
        again = one(engine, ask)
        assert again.done.usage.cached_tokens == 0
        assert same(again, ask)
        assert engine.stats().timings.saved == 0


def test_saved_cells_that_cannot_be_loaded_are_computed_again() -> None:
    class Forgetful(FakeBackend):
        def seq_load(self, seq: int, saved: Saved) -> bool:
            return False

    room = Room(slots=1, n_ctx=256, kv_cells=256, n_batch=64, sequences=2, rows=4)
    ask = Ask(words(200, 1), GREEDY, max_tokens=5)
    with running(Forgetful(room), PLAIN) as engine:
        one(engine, ask)
        one(engine, Ask(words(200, 2), GREEDY, max_tokens=5))
        assert same(one(engine, ask), ask)
        settled(engine)


def test_idle_prefixes_make_way_for_a_newcomer() -> None:
    with running(FakeBackend(ROOM), PLAIN) as engine:
        one(engine, Ask(words(100, 1), GREEDY, max_tokens=5))
        assert engine.stats().prefixes == 1
        one(engine, Ask(words(100, 2), GREEDY, max_tokens=5))
        assert (engine.stats().host_prefixes, engine.stats().timings.evicted) == (1, 1)
        settled(engine)


def test_what_is_sooner_computed_than_copied_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CHANCE", 0.0)
    with running(FakeBackend(ROOM), PLAIN) as engine:
        one(engine, Ask(words(100, 1), GREEDY, max_tokens=5))
        one(engine, Ask(words(100, 2), GREEDY, max_tokens=5))
        assert engine.stats().timings.saved == 0
        assert engine.stats().timings.evicted == 1
        settled(engine)


def test_running_answers_move_down_when_much_below_them_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_HOLES", 100)
    monkeypatch.setattr(memory, "_IDLE_TOKENS", 20)
    steps, long, short = Steps(), Answer(), Answer()
    ask = Ask(words(20, 1), Sampling(seed=1), max_tokens=230, ignore_eos=True)
    with running(FakeBackend(ROOM, step_delay_s=1, sleep=steps.sleep), PLAIN, steps=steps) as engine:
        engine.submit(ask, long)
        steps.begun()
        engine.submit(Ask(words(240, 2), GREEDY, max_tokens=2), short)
        steps.free()
        assert same(long, ask)
        short.wait()
        settled(engine)
        assert engine.stats().timings.compacted == 1


def test_state_that_cannot_be_cut_is_reused_whole_or_not_at_all() -> None:
    """As recurrent models need it: at the end of a turn, and at the end of the same prompt."""
    with running(FakeBackend(ROOM, can_cut=False), PLAIN) as engine:
        first = one(engine, Ask(words(100, 1), GREEDY, max_tokens=20, ignore_eos=True))
        turn = Ask(words(100, 1) + first.ids + words(10, 2), GREEDY, max_tokens=20)
        second = one(engine, turn)
        assert second.done.usage.cached_tokens == 119 and same(second, turn)
        again = Ask(words(100, 1), Sampling(seed=3), max_tokens=20)
        third = one(engine, again)
        assert third.done.usage.cached_tokens == 99 and same(third, again)
        partly = Ask(words(100, 1)[:90] + words(10, 5), GREEDY, max_tokens=5)
        fourth = one(engine, partly)
        assert fourth.done.usage.cached_tokens == 0 and same(fourth, partly)
        settled(engine)


def test_choices_of_one_prompt_share_it_also_where_state_cannot_be_cut() -> None:
    asks = [Ask(words(100, 1), Sampling(seed=seed), max_tokens=20) for seed in range(4)]
    steps, answers = Steps(), [Answer() for _ in asks]
    with running(FakeBackend(ROOM, can_cut=False, step_delay_s=1, sleep=steps.sleep), PLAIN, steps=steps) as engine:
        for ask, answer in zip(asks, answers, strict=True):
            engine.submit(ask, answer)
        steps.free()
        for ask, answer in zip(asks, answers, strict=True):
            assert same(answer, ask)
        assert [answer.done.usage.cached_tokens for answer in answers] == [0, 99, 99, 99]
        settled(engine)


def test_hot_prefixes_survive_a_restart(tmp_path: Path) -> None:
    ask = Ask(words(200, 1), GREEDY, max_tokens=5)
    path = tmp_path / "prefixes"
    with running(FakeBackend(ROOM), PLAIN, snapshot=Snapshot(path, 1 << 20, "m")) as engine:
        one(engine, ask)
    assert path.exists()
    with running(FakeBackend(ROOM), PLAIN, snapshot=Snapshot(path, 1 << 20, "m")) as engine:
        again = one(engine, ask)
        assert again.done.usage.cached_tokens == 199 and same(again, ask)
        settled(engine)
    with running(FakeBackend(ROOM), PLAIN, snapshot=Snapshot(path, 1 << 20, "other")) as engine:
        assert one(engine, ask).done.usage.cached_tokens == 0


PARTED = Room(slots=4, n_ctx=256, kv_cells=4 * 256, n_batch=64, rows=20, unified=False)


def test_a_parted_cache_shares_a_running_prompt_by_copying_it() -> None:
    steps = Steps()
    backend = Watched(PARTED, step_delay_s=1, sleep=steps.sleep)
    first, second = Answer(), Answer()
    prompt = words(100, 1)
    with running(backend, PLAIN) as engine:
        engine.submit(Ask(prompt, GREEDY, 60, ignore_eos=True), first)
        for _ in range(4):
            steps.begun()
            steps.allow()
        ask = Ask((*prompt[:80], *words(10, 2)), GREEDY, 5)
        engine.submit(ask, second)
        steps.free()
        assert second.done.usage.cached_tokens == 80
        assert same(second, ask)
        first.wait()
        settled(engine)


def test_a_parted_cache_goes_on_from_an_idle_prefix_though_every_number_is_taken() -> None:
    with running(FakeBackend(PARTED), PLAIN) as engine:
        prompts = [words(60, number) for number in range(4)]
        for prompt in prompts:
            one(engine, Ask(prompt, GREEDY, 4, ignore_eos=True))
        again = one(engine, Ask((*prompts[0], *words(20, 9)), GREEDY, 4))
        assert again.done.usage.cached_tokens >= 60
        settled(engine)


def test_a_parted_cache_copies_only_what_is_quicker_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.Memory, "_copy_seconds", lambda *_: 1e9)
    with running(FakeBackend(PARTED), Limits(prompt_lookup=False, host_bytes=0)) as engine:
        prompt = words(60, 1)
        one(engine, Ask((*prompt, *words(100, 2)), GREEDY, 4))
        other = one(engine, Ask((*prompt, *words(20, 3)), GREEDY, 4))
        assert other.done.usage.cached_tokens == 0
        settled(engine)


def test_running_answers_of_a_parted_cache_close_the_gaps_between_them() -> None:
    """Numbers that follow each other are computed in one pass over the weights."""
    steps = Steps()
    backend = Watched(PARTED, step_delay_s=1, sleep=steps.sleep)
    answers = [Answer() for _ in range(4)]
    asks = [Ask(words(20, number), GREEDY, 3 if number == 1 else 80, ignore_eos=True) for number in range(4)]
    with running(backend, PLAIN) as engine:
        for ask, answer in zip(asks, answers, strict=True):
            engine.submit(ask, answer)
        steps.free()
        assert all(same(answer, ask) for ask, answer in zip(asks, answers, strict=True))
        settled(engine)
        assert engine.stats().timings.compacted >= 1
    batches = [[chunk.seq for chunk in batch] for batch in backend.batches]
    assert all(batch == sorted(batch) for batch in batches)
    gap = next(at for at, batch in enumerate(batches) if batch == [0, 2, 3])
    assert [0, 1, 2] in batches[gap : gap + 10]


@pytest.mark.parametrize("wrong", ["lost", "shifted"])
def test_an_account_that_differs_from_the_backend_is_fatal(wrong: str) -> None:
    class Drifting(FakeBackend):
        drift = 0

        def seq_length(self, seq: int) -> int:
            return max(0, super().seq_length(seq) + self.drift)

    fatal: list[FatalEngineError] = []
    backend = Drifting(ROOM)
    with running(backend, PLAIN, on_fatal=fatal.append) as engine:
        one(engine, Ask(words(50, 1), GREEDY, max_tokens=2))
        settled(engine)
        backend.drift = 1 if wrong == "shifted" else -1000
        until(lambda: fatal)
    assert "the account of KV cells is wrong" in str(fatal[0])


def over_committed(
    dice: random.Random, unified: bool = True, **options: Any
) -> tuple[list[Ask], list[Answer], FakeBackend, Limits]:
    slots, n_ctx = dice.randint(1, 6), dice.choice((64, 128, 200))
    cells = dice.randint(n_ctx, n_ctx * slots)
    spare = dice.randint(0, 6)
    sequences = slots + spare
    if not unified:
        cells = sequences * n_ctx
    rows = slots + dice.randint(0, 8)
    room = Room(slots, n_ctx, cells, dice.randint(slots, 64), sequences, rows, unified)
    base = words(n_ctx, dice.randrange(1000))
    asks = []
    for number in range(25):
        common = dice.randint(0, n_ctx - 4)
        own = tuple(dice.randrange(97, 100) for _ in range(dice.randint(1, n_ctx - common - 2)))
        sampling = Sampling(temperature=dice.choice((0, 0.3, 1.0)), seed=number)
        stop = ("e",) if dice.random() < 0.2 else ()
        most = dice.choice((None, 1, 5, 40))
        asks.append(Ask(base[:common] + own, sampling, most, stop, ignore_eos=dice.random() < 0.7))
    limits = Limits(queue_limit=100, host_bytes=dice.choice((0, 3000, 1 << 20)), gather_s=dice.choice((0.0, 0.01)))
    return asks, [Answer() for _ in asks], FakeBackend(room, **options), limits


@pytest.mark.parametrize(("can_cut", "unified"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("seed", range(12))
def test_every_answer_equals_its_answer_alone_however_full_the_cache(seed: int, can_cut: bool, unified: bool) -> None:
    dice = random.Random(seed)
    asks, answers, backend, limits = over_committed(dice, unified, can_cut=can_cut)
    fatal: list[FatalEngineError] = []
    with running(backend, limits, on_fatal=fatal.append) as engine:
        ids = [engine.submit(ask, answer) for ask, answer in zip(asks, answers, strict=True)]
        gone = set(dice.sample(range(len(asks)), 4))
        for number in gone:
            engine.cancel(ids[number])
        for number, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
            assert number in gone or same(answer, ask, backend.room.n_ctx)
            assert answer.done.usage.prompt_tokens == len(ask.prompt)
        settled(engine)
        assert engine.stats().timings.failed == 0
    assert fatal == []
