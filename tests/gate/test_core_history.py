"""What the console's charts are made of: a quarter of an hour of each node, and no more."""

from __future__ import annotations

from llmgate.core.fleet import Listed, Lost, Reported
from llmgate.core.history import EVERY_S, KEPT_S, NOTHING, History, Sample, of
from llmgate.listing import Address
from tests.gate.fleets import NOW, STALE, fleet, report

BUSY = {"running": 2, "waiting": 1, "kv_cells": 1000, "kv_cells_used": 250, "decode_tps": 40.04}


def test_a_sample_is_taken_every_few_seconds_and_a_quarter_of_an_hour_is_kept() -> None:
    history, made, wall = History(), fleet("a"), 1000.0
    taken = 0
    for _ in range(int(KEPT_S) * 2):
        if history.due(wall):
            history.sample(made, wall, now=NOW, stale_after=STALE)
            taken += 1
        wall += 1
    assert taken == 2 * KEPT_S / EVERY_S
    kept = history.since()["a"]
    assert len(kept["at"]) == KEPT_S / EVERY_S == len(kept["running"])
    assert history.last == kept["at"][-1] and kept["at"][0] == history.last - KEPT_S + EVERY_S  # type: ignore[operator]


def test_only_what_is_new_is_told() -> None:
    history, made = History(), fleet("a")
    for wall in (10.0, 15.0, 20.0):
        history.sample(made, wall, now=NOW, stale_after=STALE)
    assert history.since(15.0)["a"]["at"] == [20.0]
    assert history.since(20.0)["a"] == {"at": [], **{name: [] for name in Sample._fields}}


def test_a_clock_that_is_set_back_stops_nothing() -> None:
    history = History()
    history.sample(fleet("a"), 1000.0, now=NOW, stale_after=STALE)
    assert not history.due(1001.0)
    assert history.due(500.0)


def test_a_node_shows_its_load_and_an_idle_one_no_speed() -> None:
    made = fleet("a").apply(Reported("a", report(**BUSY), NOW))
    assert of(made.nodes["a"], NOW, STALE) == Sample(2, 1, 0.25, 40.0)
    idle = made.apply(Reported("a", report(**{**BUSY, "running": 0}), NOW))
    assert of(idle.nodes["a"], NOW, STALE) == Sample(0, 1, 0.25, 0.0)


def test_what_is_not_known_is_a_gap() -> None:
    made = fleet("a")
    assert of(made.nodes["a"], NOW + STALE + 1, STALE) == NOTHING
    assert of(made.apply(Lost("a", "gone", NOW)).nodes["a"], NOW, STALE) == NOTHING


def test_nodes_that_join_have_gaps_before_and_those_that_go_are_forgotten() -> None:
    history, made = History(), fleet("a", "b")
    history.sample(made, 10.0, now=NOW, stale_after=STALE)
    moved = made.apply(Listed((Address("a", "http://a"), Address("c", "http://c"))))
    history.sample(moved, 15.0, now=NOW, stale_after=STALE)
    kept = history.since()
    assert set(kept) == {"a", "c"}
    assert kept["c"]["running"] == [None, None] and kept["c"]["at"] == kept["a"]["at"] == [10.0, 15.0]
