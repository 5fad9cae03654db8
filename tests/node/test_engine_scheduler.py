"""What goes into a batch: answers go on whatever arrives, prompts share the rest, no cell is promised twice."""

from __future__ import annotations

import random

from llmnode.engine.backend import Room
from llmnode.engine.scheduler import Scheduler, Sequence
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Sampling

PIECES = [b"x"] * 10


def sequence(id: int, prompt: int, limit: int = 10) -> Sequence:
    ask = Ask(tuple(range(1, 2)) * prompt, Sampling(), limit)
    return Sequence(id, ask, lambda event: None, limit, TextStream(PIECES), 0.0)


def sizes(scheduler: Scheduler, budget: int) -> dict[int, int]:
    plan = scheduler.plan(budget)
    assert plan.tokens == sum(len(chunk.tokens) for chunk in plan.chunks) <= budget
    return {s.id: len(chunk.tokens) for s, chunk in zip(plan.sequences, plan.chunks, strict=True)}


def scheduler_with(*members: Sequence, slots: int = 8, cells: int = 100_000, batch: int = 512) -> Scheduler:
    scheduler = Scheduler(Room(slots, 50_000, cells, batch))
    for member in members:
        scheduler.add(member)
    scheduler.admit()
    return scheduler


def test_a_long_prompt_does_not_hold_back_a_short_one() -> None:
    scheduler = scheduler_with(sequence(1, 4000), sequence(2, 20))
    assert sizes(scheduler, 512) == {1: 492, 2: 20}


def test_prompts_share_the_batch_evenly_and_leave_no_room_unused() -> None:
    scheduler = scheduler_with(sequence(1, 4000), sequence(2, 4000), sequence(3, 100))
    assert sizes(scheduler, 512) == {1: 206, 2: 206, 3: 100}


def test_running_answers_come_first() -> None:
    running = [sequence(id, 5) for id in (1, 2, 3)]
    scheduler = scheduler_with(*running)
    scheduler.computed(scheduler.plan(512))
    for each in running:
        each.take(1, frozenset())
    scheduler.add(sequence(4, 4000))
    scheduler.admit()
    assert sizes(scheduler, 64) == {1: 1, 2: 1, 3: 1, 4: 61}
    assert sizes(scheduler, 3) == {1: 1, 2: 1, 3: 1}


def test_logits_are_wanted_only_where_a_sequence_is_wholly_computed() -> None:
    scheduler = scheduler_with(sequence(1, 700))
    first = scheduler.plan(512)
    assert [chunk.wanted for chunk in first.chunks] == [False]
    assert scheduler.computed(first) == []
    second = scheduler.plan(512)
    assert [(chunk.start, len(chunk.tokens), chunk.wanted) for chunk in second.chunks] == [(512, 188, True)]
    assert [s.id for s in scheduler.computed(second)] == [1]


def test_no_answer_is_admitted_that_could_meet_a_full_cache() -> None:
    big, next_one, small = sequence(1, 600, 200), sequence(2, 100, 101), sequence(3, 10, 10)
    scheduler = Scheduler(Room(4, 800, 1000, 512))
    for each in (big, next_one, small):
        scheduler.add(each)
    assert [s.id for s in scheduler.admit()] == [1]
    assert scheduler.cells_reserved == 800
    scheduler.remove(big)
    assert [s.id for s in scheduler.admit()] == [2, 3]


def test_the_queue_is_first_come_first_served() -> None:
    scheduler = scheduler_with(*[sequence(id, 10) for id in range(5)], slots=2)
    left = []
    while scheduler.running:
        first = min(scheduler.running.values(), key=lambda s: s.id)
        left.append(first.id)
        scheduler.remove(first)
        scheduler.admit()
    assert left == [0, 1, 2, 3, 4]


def test_integrity_names_a_leak() -> None:
    scheduler = scheduler_with(sequence(1, 10))
    assert scheduler.check_integrity(lambda slot: 0) == ""
    assert (
        scheduler.check_integrity(lambda slot: 3 if slot == 5 else 0)
        == "the backend holds 3 tokens in slot 5, 0 are due"
    )
    scheduler.cells_reserved += 1
    assert "21 cells are reserved, 20 by running" in scheduler.check_integrity(lambda slot: 0)
    scheduler.cells_reserved -= 1
    scheduler._free.pop()
    assert "slots are lost" in scheduler.check_integrity(lambda slot: 0)


def test_random_arrivals_and_departures_keep_the_account_true() -> None:
    for seed in range(30):
        dice = random.Random(seed)
        room = Room(dice.randint(1, 6), 300, dice.randint(300, 900), dice.randint(6, 64))
        scheduler, held, arrived, alive = Scheduler(room), [0] * room.slots, 0, []
        for _ in range(400):
            if dice.random() < 0.3:
                arrived += 1
                alive.append(sequence(arrived, dice.randint(1, 200), dice.randint(1, 100)))
                scheduler.add(alive[-1])
            if alive and dice.random() < 0.1:
                gone = alive.pop(dice.randrange(len(alive)))
                if (slot := scheduler.remove(gone)) >= 0:
                    held[slot] = 0
            scheduler.admit()
            plan = scheduler.plan(room.n_batch)
            assert 0 < plan.tokens <= room.n_batch or not scheduler.running
            for chunk in plan.chunks:
                assert chunk.start == held[chunk.seq]
                held[chunk.seq] += len(chunk.tokens)
            assert sum(held) <= room.kv_cells
            assert len(plan.chunks) == len(scheduler.running) or plan.tokens == room.n_batch
            for ready in scheduler.computed(plan):
                _, finish = ready.take(1, frozenset())
                if finish is not None:
                    held[scheduler.remove(ready)] = 0
                    alive.remove(ready)
            assert scheduler.check_integrity(lambda slot, held=held: held[slot]) == ""
