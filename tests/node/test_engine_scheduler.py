"""Who runs and what goes into a batch: answers go on whatever arrives, prompts share the rest, none waits for ever."""

from __future__ import annotations

from array import array

import hypothesis.strategies as st
from hypothesis import given, settings

from llmnode.engine.backend import Room
from llmnode.engine.pace import TILE
from llmnode.engine.sampler import Sampler, Vocabulary
from llmnode.engine.scheduler import Bounds, Plan, Scheduler
from llmnode.engine.sequence import Sequence
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Sampling

PIECES = [b"x"] * 10
VOCABULARY = Vocabulary(PIECES, frozenset())
WIDE = Bounds(tokens=512, prefill=512, rows=64)


def sequence(id: int, prompt: int, limit: int = 10, seq: int = -1) -> Sequence:
    ask = Ask(tuple(range(1, 2)) * prompt, Sampling(), limit)
    sampler = Sampler(ask.sampling, ask.prompt, vocabulary=VOCABULARY)
    return Sequence(id, ask, lambda event: None, limit, TextStream(PIECES), sampler, 0.0, frozenset(), seq=seq)


def decoding(id: int, prompt: int = 5) -> Sequence:
    """One that has its first token drawn and not computed."""
    member = sequence(id, prompt, seq=id)
    member.computed = prompt
    member.take(1)
    member.sampled = 1
    return member


def scheduler_with(
    *running: Sequence, slots: int = 8, cells: int = 100_000, batch: int = 512, unified: bool = True
) -> Scheduler:
    scheduler = Scheduler(Room(slots, min(cells // slots, 50_000), cells, batch, unified=unified))
    scheduler.running += running
    return scheduler


def sizes(plan: Plan) -> dict[int, int]:
    assert plan.tokens == sum(len(chunk.tokens) for chunk in plan.chunks)
    return {s.id: len(chunk.tokens) for s, chunk in zip(plan.sequences, plan.chunks, strict=True)}


def admitted(scheduler: Scheduler, live: int = 0) -> list[int]:
    """Ids of all that get in now, in order; each takes the next number, as memory.py would give it."""
    ids = []
    while (member := scheduler.next(live, lambda tokens: 0)) is not None:
        member.seq = 100 + member.id
        ids.append(member.id)
    return ids


def test_a_long_prompt_does_not_hold_back_a_short_one() -> None:
    scheduler = scheduler_with(sequence(1, 4000, seq=1), sequence(2, 20, seq=2))
    assert sizes(scheduler.plan(WIDE)) == {1: 492, 2: 20}


def test_the_shortest_prompt_comes_first_and_the_oldest_keeps_a_quarter() -> None:
    members = [sequence(1, 4000, seq=1), sequence(2, 3000, seq=2), sequence(3, 100, seq=3)]
    assert sizes(scheduler_with(*members).plan(WIDE)) == {1: 128, 2: 284, 3: 100}


def test_of_two_long_prompts_the_first_is_done_before_the_second_begins() -> None:
    assert sizes(scheduler_with(sequence(1, 4000, seq=1), sequence(2, 4000, seq=2)).plan(WIDE)) == {1: 512}


def test_in_a_parted_cache_a_deep_prompt_has_its_step_to_itself() -> None:
    old, young, answer = sequence(1, 4000, seq=1), sequence(2, 3000, seq=2), decoding(3)
    old.computed = young.computed = 1000
    scheduler = scheduler_with(old, young, answer, unified=False)
    turns = [sizes(scheduler.plan(Bounds(512, 200, 20, turn=turn))) for turn in range(8)]
    assert turns == [{1: 200, 3: 1}, *[{2: 200, 3: 1}] * 3] * 2, "one step in four is for the one that waits longest"
    old.computed = young.computed = 0
    assert sizes(scheduler.plan(Bounds(5000, 4500, 20, turn=1))) == {1: 1500, 2: 3000, 3: 1}


def test_a_batch_for_a_parted_cache_is_in_the_order_of_its_sequences() -> None:
    for second, guessed in ((sequence(2, 30, seq=2), [0, 0, 0]), (decoding(2), [1, 0, 0])):
        members = [decoding(5), second, decoding(0)]
        plan = scheduler_with(*members, unified=False).plan(WIDE, {0: array("i", [7])})
        assert [chunk.seq for chunk in plan.chunks] == [s.seq for s in plan.sequences] == [0, 2, 5]
        assert list(plan.drafts) == guessed


def test_guesses_never_take_the_rows_of_a_prompts_tile_in_a_parted_cache() -> None:
    for unified, wanted in ((True, {1: 3, 2: 100}), (False, {1: 1, 2: 100})):
        scheduler = scheduler_with(decoding(1), sequence(2, 100, seq=2), unified=unified)
        assert sizes(scheduler.plan(WIDE, {1: array("i", [7, 8])})) == wanted
    assert sizes(scheduler_with(decoding(1), unified=False).plan(WIDE, {1: array("i", [7, 8])})) == {1: 3}


def test_running_answers_come_first_and_prompts_keep_to_their_limit_beside_them() -> None:
    scheduler = scheduler_with(decoding(1), decoding(2), sequence(3, 4000, seq=3))
    assert sizes(scheduler.plan(WIDE)) == {1: 1, 2: 1, 3: 510}
    plan = scheduler.plan(Bounds(tokens=512, prefill=40, rows=64))
    assert sizes(plan) == {1: 1, 2: 1, 3: 40}
    assert (plan.tokens, plan.prefill) == (42, 40)
    assert sizes(scheduler.plan(Bounds(tokens=2, prefill=40, rows=64))) == {1: 1, 2: 1}


def test_the_last_chunk_of_a_prompt_is_no_small_one() -> None:
    assert sizes(scheduler_with(sequence(1, 552, seq=1)).plan(WIDE)) == {1: 488}
    assert sizes(scheduler_with(sequence(1, 100, seq=1)).plan(Bounds(60, 60, 8))) == {1: 60}
    for unified, tile in ((True, 64), (False, 65)):
        for behind in (tile + 1, tile + 20, 2 * tile - 1):  # beside an answer: over the limit, but not in two
            prompt = sequence(1, behind, seq=1)
            plan = scheduler_with(decoding(0), prompt, unified=unified).plan(Bounds(512, prefill=tile, rows=8))
            assert sizes(plan) == {0: 1, 1: behind}
            full = scheduler_with(decoding(0), prompt, unified=unified).plan(Bounds(tile + 10, prefill=tile, rows=8))
            assert sizes(full) == {0: 1, 1: min(behind, tile + 9)}, "what a batch holds is no matter of taste"
        prompt = sequence(1, 2 * tile + 5, seq=1)
        plan = scheduler_with(decoding(0), prompt, unified=unified).plan(Bounds(512, prefill=tile + 30, rows=8))
        assert sizes(plan) == {0: 1, 1: tile + 5}


def test_a_prompt_with_nobody_to_hold_up_gets_the_whole_batch() -> None:
    assert sizes(scheduler_with(sequence(1, 4000, seq=1)).plan(Bounds(512, prefill=8, rows=8))) == {1: 512}


def test_logits_are_wanted_only_where_a_sequence_is_wholly_computed() -> None:
    member = sequence(1, 700, seq=1)
    scheduler = scheduler_with(member)
    assert [chunk.rows for chunk in scheduler.plan(WIDE).chunks] == [0]
    member.computed = 512
    assert [(chunk.start, len(chunk.tokens), chunk.rows) for chunk in scheduler.plan(WIDE).chunks] == [(512, 188, 1)]


def test_guesses_go_into_the_batch_with_their_sequence_as_far_as_rows_last() -> None:
    scheduler = scheduler_with(decoding(1), decoding(2))
    drafts = {1: array("i", [7, 8, 9])}
    plan = scheduler.plan(WIDE, drafts)
    assert [(chunk.tokens.tolist(), chunk.rows) for chunk in plan.chunks] == [([1, 7, 8, 9], 4), ([1], 1)]
    assert (list(plan.drafts), plan.tokens, plan.prefill) == ([3, 0], 5, 0)
    assert [len(chunk.tokens) for chunk in scheduler.plan(Bounds(512, 512, rows=3), drafts).chunks] == [3]


def test_an_answer_begun_elsewhere_gets_the_logits_that_its_sampler_has_not_seen() -> None:
    ask = Ask((1,) * 20, Sampling(mirostat=2), 50, replayed=(1,) * 30)
    sampler = Sampler(ask.sampling, ask.prompt, vocabulary=VOCABULARY)
    member = Sequence(1, ask, lambda event: None, 50, TextStream(PIECES), sampler, 0.0, frozenset(), seq=1)
    assert member.replay() is None
    scheduler = scheduler_with(member)
    (chunk,) = scheduler.plan(Bounds(512, 512, rows=16)).chunks
    assert (len(chunk.tokens), chunk.rows) == (35, 16)
    member.computed, member.sampled = 35, 16
    (chunk,) = scheduler.plan(Bounds(512, 512, rows=16)).chunks
    assert (len(chunk.tokens), chunk.rows) == (15, 15)


def test_a_sequence_that_follows_another_waits_for_it() -> None:
    leader, follower = sequence(1, 100, seq=1), sequence(2, 100, seq=2)
    follower.leader, follower.follow = leader, 80
    assert sizes(scheduler_with(leader, follower).plan(WIDE)) == {1: 100}


def test_a_chunk_ends_before_a_prompts_last_token_where_checkpoints_are_kept() -> None:
    assert sizes(scheduler_with(sequence(1, 100, seq=1)).plan(Bounds(512, 512, 8, split=True))) == {1: 99}


def test_admission_leaves_each_running_answer_room_to_grow() -> None:
    scheduler = scheduler_with(cells=1000)
    for id, prompt in enumerate((400, 400, 400)):
        scheduler.add(sequence(id, prompt, limit=500))
    assert admitted(scheduler) == [0, 1]


def test_what_is_shared_with_running_answers_needs_no_cells_of_its_own() -> None:
    scheduler = scheduler_with(cells=1000)
    for id in range(3):
        scheduler.add(sequence(id, 600, limit=10))
    assert admitted(scheduler) == [0]
    second = scheduler.next(0, lambda tokens: 590)
    assert second is not None and second.id == 1


def test_the_queue_is_in_order_of_arrival_and_one_that_gave_way_comes_back_first() -> None:
    scheduler = scheduler_with(slots=2)
    for id in (1, 2, 3, 4):
        scheduler.add(sequence(id, 10))
    assert admitted(scheduler) == [1, 2]
    first = scheduler.running[0]
    scheduler.remove(first)
    first.seq = -1
    scheduler.add(first)
    assert [member.id for member in scheduler.waiting] == [1, 3, 4]


def test_a_small_ask_may_pass_a_large_one_but_not_for_ever() -> None:
    scheduler = scheduler_with(decoding(0), cells=1000, slots=100)
    large = sequence(1, 990, limit=1)
    scheduler.add(large)
    passed = 0
    for id in range(2, 80):
        scheduler.add(sequence(id, 1, limit=1))
        got = scheduler.next(5, lambda tokens: 0)
        if got is None:
            break
        assert got.id == id
        scheduler.running.remove(got)
        passed += 1
    assert passed == large.passed == 32


def test_nobody_passes_one_that_had_to_give_way() -> None:
    scheduler = scheduler_with(decoding(0), cells=1000)
    pushed_out = sequence(1, 990, limit=1)
    pushed_out.yielded = 1
    scheduler.add(pushed_out)
    scheduler.add(sequence(2, 1, limit=1))
    assert scheduler.next(5, lambda tokens: 0) is None


def test_the_cheapest_answer_gives_way_but_never_the_oldest() -> None:
    members = [decoding(id) for id in (1, 2, 3)]
    scheduler = scheduler_with(*members)
    cost = {1: 0.1, 2: 9.0, 3: 5.0}
    assert scheduler.victim(lambda s: cost[s.id], lambda s: 10) is members[2]
    assert scheduler.victim(lambda s: cost[s.id], lambda s: 100 if s.id == 2 else 10) is members[1]
    assert scheduler.victim(lambda s: cost[s.id], lambda s: 0 if s.id == 3 else 10) is members[1]
    members[2].yielded = 5
    assert scheduler.victim(lambda s: cost[s.id], lambda s: 10) is members[1]
    assert scheduler_with(members[0]).victim(lambda s: 1.0, lambda s: 10) is None


def test_integrity_names_what_is_wrong() -> None:
    assert scheduler_with(decoding(1)).check_integrity() == ""
    assert "runs holds none" in scheduler_with(sequence(1, 10)).check_integrity()
    assert "3 sequences run in 2 slots" in scheduler_with(*map(decoding, (1, 2, 3)), slots=2).check_integrity()
    scheduler = scheduler_with()
    scheduler.add(decoding(1))
    assert "waits holds cells" in scheduler.check_integrity()


@given(
    prompts=st.lists(st.one_of(st.none(), st.integers(2, 300)), min_size=1, max_size=9),
    tokens=st.integers(9, 80),
    prefill=st.integers(1, 80),
    rows=st.integers(9, 20),
    lengths=st.dictionaries(st.integers(0, 8), st.integers(1, 5)),
    unified=st.booleans(),
    turn=st.integers(0, 4),
)
@settings(max_examples=200, deadline=None)
def test_every_plan_keeps_its_bounds_and_gets_everybody_on(
    prompts: list[int | None],
    tokens: int,
    prefill: int,
    rows: int,
    lengths: dict[int, int],
    unified: bool,
    turn: int,
) -> None:
    """None stands for an answer under way, a number for a prompt of so many tokens."""
    members = [decoding(id) if n is None else sequence(id, n, seq=id) for id, n in enumerate(prompts)]
    scheduler = scheduler_with(*members, slots=9, unified=unified)
    drafts = {id: array("i", [1] * length) for id, length in lengths.items()}
    plan = scheduler.plan(Bounds(tokens, prefill, rows, turn=turn), drafts)
    running = [member for member in members if member.behind == 1]
    assert 0 < plan.tokens <= tokens
    assert plan.tokens == sum(len(chunk.tokens) for chunk in plan.chunks)
    assert plan.prefill <= (prefill + (TILE if prefill >= TILE else 0) if running else tokens)
    assert sum(chunk.rows for chunk in plan.chunks) <= rows
    assert len(set(map(id, plan.sequences))) == len(plan.sequences)
    for chunk, member, guesses in zip(plan.chunks, plan.sequences, plan.drafts, strict=True):
        assert (chunk.seq, chunk.start) == (member.seq, member.computed)
        assert guesses < len(chunk.tokens) and 0 <= chunk.rows <= len(chunk.tokens)
        known = chunk.tokens[: len(chunk.tokens) - guesses]
        assert known == member.tokens[chunk.start : chunk.start + len(known)]
        ends = chunk.start + len(known) == len(member.tokens)
        assert chunk.rows == (1 + guesses if ends else 0)
    if not drafts:
        assert all(member in plan.sequences for member in running)
    waiting = [member for member in members if member.behind > 1]
    if waiting and tokens > len(running) and not drafts:
        assert any(member in plan.sequences for member in waiting)


@given(st.lists(st.tuples(st.integers(1, 120), st.integers(1, 40)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_steps_compute_every_token_once_and_everybody_ends(wanted: list[tuple[int, int]]) -> None:
    """The model: a sequence of n prompt and m answer tokens takes n + m - 1 computed tokens, whatever runs beside."""
    scheduler = Scheduler(Room(4, 160, 640, 32))
    for id, (prompt, limit) in enumerate(wanted):
        scheduler.add(sequence(id, prompt, limit))
    computed = dict.fromkeys(range(len(wanted)), 0)
    numbers = {0, 1, 2, 3}
    for _ in range(5000):
        while (member := scheduler.next(sum(s.computed for s in scheduler.running), lambda tokens: 0)) is not None:
            member.seq = numbers.pop()
        plan = scheduler.plan(Bounds(32, 8, 8))
        if not plan.tokens:
            break
        for member, chunk in zip(plan.sequences, plan.chunks, strict=True):
            assert chunk.start == member.computed
            member.computed += len(chunk.tokens)
            computed[member.id] += len(chunk.tokens)
            if chunk.rows:
                member.sampled += 1
                if member.take(1) is not None:
                    scheduler.running.remove(member)
                    numbers.add(member.seq)
                    member.seq = -1
        assert scheduler.check_integrity() == ""
    assert not scheduler.running and not scheduler.waiting
    assert computed == {id: prompt + limit - 1 for id, (prompt, limit) in enumerate(wanted)}
