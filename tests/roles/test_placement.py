"""Promises of the placement of replicas on GPUs: a table of fleets, and rules that hold for any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.roles.programs import load

PROGRAM = Path(__file__).resolve().parents[2] / "roles/llmnode/files/placement.py"


placement = load("llmnode", "placement")
GIB = placement.GIB
Gpu, Rack, Want, Placed = placement.Gpu, placement.Rack, placement.Want, placement.Placed


def gpu(name: str, size: int = 24, free: int | None = None, **more: Any) -> Any:
    return Gpu(name, more.pop("vendor", "nvidia"), size * GIB, (size if free is None else free) * GIB, **more)


def rack(*gpus: Any, **more: Any) -> Any:
    return Rack(tuple(gpus), **more)


def want(model: str, replicas: int = 1, gpus: int = 1, need: int = 20, hosts: tuple[str, ...] = ("a", "b", "c")) -> Any:
    return Want(model, replicas, gpus, need * GIB, frozenset(hosts))


def places(plan: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    assert not plan.problems, "\n".join(plan.problems)
    return [(placed.host, placed.name, placed.devices) for placed in plan.placed]


def test_replicas_of_a_model_are_spread_over_hosts() -> None:
    racks = {"a": rack(gpu("a0"), gpu("a1")), "b": rack(gpu("b0"), gpu("b1"))}
    plan = placement.place([want("m", 3)], racks, [])
    assert places(plan) == [("a", "m.0", ("a0",)), ("b", "m.0", ("b0",)), ("a", "m.1", ("a1",))]
    assert [placed.port for placed in plan.placed] == [8100, 8100, 8101]


def test_the_smallest_gpu_with_room_is_taken() -> None:
    racks = {"a": rack(gpu("big", 80), gpu("mid", 48), gpu("small", 24), gpu("tiny", 12))}
    assert places(placement.place([want("m")], racks, [])) == [("a", "m.0", ("small",))]


def test_memory_that_others_use_is_not_given_away() -> None:
    racks = {"a": rack(gpu("busy", 24, free=19)), "b": rack(gpu("idle", 48))}
    assert places(placement.place([want("m")], racks, [])) == [("b", "m.0", ("idle",))]


def test_a_model_over_two_gpus_stays_within_a_numa_node_and_a_vendor() -> None:
    racks = {
        "a": rack(
            gpu("0", numa=0), gpu("1", numa=1), gpu("2", vendor="amd", numa=0), gpu("3", numa=1), gpu("4", 12, numa=1)
        )
    }
    assert places(placement.place([want("m", gpus=2, need=40)], racks, [])) == [("a", "m.0", ("1", "3"))]


def test_the_more_demanding_model_chooses_first() -> None:
    racks = {"a": rack(gpu("a0"), gpu("a1")), "b": rack(gpu("b0"))}
    plan = placement.place([want("aaa", need=10), want("wide", gpus=2, need=40)], racks, [])
    assert sorted(places(plan)) == [("a", "wide.0", ("a0", "a1")), ("b", "aaa.0", ("b0",))]


def test_replicas_are_packed_where_spreading_them_leaves_no_room() -> None:
    """Spread, the second replica of "twice" would take the only GPU that "late" may use."""
    racks = {"a": rack(gpu("a0", 48)), "b": rack(gpu("b0", 40), gpu("b1", 40))}
    plan = placement.place([want("twice", 2, need=40), want("late", need=30, hosts=("a",))], racks, [])
    assert sorted(places(plan)) == [("a", "late.0", ("a0",)), ("b", "twice.0", ("b0",)), ("b", "twice.1", ("b1",))]


def test_declared_instances_keep_their_gpus_names_and_ports() -> None:
    taken = {"taken": frozenset({"a0"}), "names": frozenset({"m.0"}), "ports": frozenset({8100})}
    plan = placement.place([want("m")], {"a": rack(gpu("a0"), gpu("a1"), **taken)}, [])
    assert places(plan) == [("a", "m.1", ("a1",))]
    assert plan.placed[0].port == 8101


def test_a_model_of_the_cpu_shares_memory_with_its_like() -> None:
    racks = {"a": rack(memory=64 * GIB), "b": rack(memory=16 * GIB)}
    plan = placement.place([want("m", 2, gpus=0), want("n", gpus=0, need=10)], racks, [])
    assert sorted(places(plan)) == [("a", "m.0", ()), ("a", "m.1", ()), ("b", "n.0", ())]
    assert placement.place([want("m", 4, gpus=0)], racks, []).problems == [
        "m: 3 of 4 replicas have a place; one takes 20.0 GiB of memory, on one host:\n"
        "  a: 4.0 GiB of 64.0 GiB of memory left, 16.0 GiB too little\n"
        "  b: 16.0 GiB of 16.0 GiB of memory left, 4.0 GiB too little\n"
        "  c: it was not looked at, so it gets nothing new"
    ]


def test_a_refusal_shows_the_arithmetic_and_places_nothing() -> None:
    racks = {
        "a": rack(gpu("a0"), gpu("a1", 24, free=8), gpu("a2", why="no driver is loaded"), gpu("a3"), taken={"a3"}),
        "b": rack(),
        "c": Rack(None),
    }
    plan = placement.place([want("m", 2)], racks, [])
    assert plan.placed == []
    assert plan.problems == [
        "m: 1 of 2 replicas have a place; one takes 1 GPUs with 20.0 GiB on each, on one host:\n"
        "  a a0: m.0 has it\n"
        "  a a1: 8.0 GiB of 24.0 GiB free, 12.0 GiB too little\n"
        "  a a2: no driver is loaded\n"
        "  a a3: a declared instance has it\n"
        "  b: it has no GPU\n"
        "  c: it was not looked at, so it gets nothing new"
    ]


def test_fewer_replicas_retire_those_that_came_last() -> None:
    racks = {"a": rack(gpu("a0"), gpu("a1")), "b": rack(gpu("b0"))}
    before = placement.place([want("m", 3)], racks, []).placed
    plan = placement.place([want("m", 2)], racks, before)
    assert plan.placed == before[:2]
    assert plan.moves == ["a-m.1 is retired: the inventory wants 2 of m"]


def test_a_host_that_was_not_looked_at_keeps_what_it_has() -> None:
    before = placement.place([want("m", 2)], {"a": rack(gpu("a0")), "b": rack(gpu("b0"))}, []).placed
    assert placement.place([want("m", 2)], {"a": rack(gpu("a0")), "b": Rack(None)}, before).placed == before


@pytest.mark.parametrize(
    ("racks", "reason"),
    [
        ({"a": rack(), "b": rack(gpu("b0"))}, "GPU a0: it is not on the host any more"),
        ({"a": rack(gpu("a0", why="it fell off the bus")), "b": rack(gpu("b0"))}, "GPU a0: it fell off the bus"),
        ({"b": rack(gpu("b0"))}, "a is not among its hosts any more"),
        ({"a": rack(gpu("a0"), ports={8100}), "b": rack(gpu("b0"))}, "a declared instance has taken its name"),
    ],
)
def test_a_replica_whose_place_is_gone_moves_and_the_reason_is_told(racks: dict[str, Any], reason: str) -> None:
    plan = placement.place([want("m")], racks, [Placed("a", "m.0", "m", 8100, ("a0",))])
    assert len(places(plan)) == 1
    assert len(plan.moves) == 1 and plan.moves[0].startswith(f"a-m.0 moves: {reason}")


_gpus = st.builds(
    lambda size, used, vendor, numa, why: (size, min(used, size), vendor, numa, why),
    st.sampled_from([8, 16, 24, 48, 80]),
    st.sampled_from([0, 0, 0, 4, 20]),
    st.sampled_from(["nvidia", "nvidia", "amd"]),
    st.sampled_from([0, 1]),
    st.sampled_from(["", "", "", "", "MIG is on"]),
)
_fleets = st.dictionaries(
    st.sampled_from("abcde"), st.tuples(st.lists(_gpus, max_size=5), st.integers(0, 64)), min_size=1
)
_wants = st.dictionaries(
    st.sampled_from(["m", "n", "M", "n 2"]),
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 90), st.frozensets(st.sampled_from("abcde"))),
)


def _racks(fleet: dict[str, Any]) -> dict[str, Any]:
    return {
        host: Rack(
            tuple(
                Gpu(f"{host}{index}", vendor, size * GIB, (size - used) * GIB, numa, why)
                for index, (size, used, vendor, numa, why) in enumerate(gpus)
            ),
            memory * GIB,
        )
        for host, (gpus, memory) in fleet.items()
    }


def _all(wanted: dict[str, Any]) -> list[Any]:
    return [want(model, count, gpus, need, tuple(hosts)) for model, (count, gpus, need, hosts) in wanted.items()]


def _check(plan: Any, wants: list[Any], racks: dict[str, Any]) -> None:
    """No GPU twice, never over memory, every replica, one host and vendor each, names and ports of their own."""
    if plan.problems:
        assert plan.placed == []
        return
    for each in wants:
        mine = [placed for placed in plan.placed if placed.model == each.model]
        assert len(mine) == each.replicas
        assert all(placed.host in each.hosts and len(placed.devices) == each.gpus for placed in mine)
    needs = {each.model: each.need for each in wants}
    for host, there in racks.items():
        mine = [placed for placed in plan.placed if placed.host == host]
        devices = [device for placed in mine for device in placed.devices]
        assert len(set(devices)) == len(devices)
        assert len({placed.name for placed in mine}) == len(mine) == len({placed.port for placed in mine})
        known = {found.device: found for found in there.gpus}
        for placed in mine:
            assert len({known[device].vendor for device in placed.devices}) <= 1
            room = [known[device].total for device in placed.devices if not known[device].why]
            assert all(size * len(placed.devices) >= needs[placed.model] for size in room)
            assert len(room) == len(placed.devices)
        assert sum(needs[placed.model] for placed in mine if not placed.devices) <= there.memory


@settings(max_examples=300, deadline=None)
@given(_fleets, _wants, _wants, _fleets)
def test_whatever_the_fleet_no_gpu_is_used_twice_and_nothing_moves_without_need(
    fleet: dict[str, Any], wanted: dict[str, Any], changed: dict[str, Any], more: dict[str, Any]
) -> None:
    racks, wants = _racks(fleet), _all(wanted)
    first = placement.place(wants, racks, [])
    _check(first, wants, racks)
    if first.problems:
        return
    needs = {each.model: each.need for each in wants}
    for placed in first.placed:
        rooms = {found.device: found.room for found in racks[placed.host].gpus}
        assert all(rooms[device] * len(placed.devices) >= needs[placed.model] for device in placed.devices)
    again = placement.place(wants, racks, first.placed)
    assert (again.placed, again.moves) == (first.placed, [])
    larger = {**_racks(more), **racks}
    assert placement.place(wants, larger, first.placed).placed == first.placed
    later = _all(changed)
    second = placement.place(later, larger, first.placed)
    _check(second, later, larger)


def _asked(**more: Any) -> dict[str, Any]:
    survey = {
        "gpus": [
            {"vendor": "nvidia", "uuid": "GPU-1", "pci": "0000:01:00.0", "vram_total": 24 * GIB, "vram_free": 2 * GIB,
             "vram_ours": 21 * GIB, "numa": 0, "why": ""},
            {"vendor": "amd", "uuid": "GPU-2", "pci": "0000:02:00.0", "vram_total": 24 * GIB, "vram_free": 24 * GIB,
             "vram_ours": 0, "numa": 0, "why": ""},
        ],
        "memory": {"total": 64 * GIB},
    }  # fmt: skip
    asked = {"models": {}, "sizes": {}, "groups": {"llmnode": ["h"], "rare": []}, "before": [], "recall": False}
    return {**asked, "surveys": {"h": survey}, "backends": {"h": "vulkan"}, "instances": {"h": []}, **more}


def _say(asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, PROGRAM], input=json.dumps(asked), text=True, capture_output=True, check=True
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_an_instance_is_bound_by_uuid_or_pci_address_and_keeps_what_was_said_of_it() -> None:
    said = {"replicas": 2, "vram_gib": 20, "hosts": "llmnode", "settings": {"slots": 8}, "labels": {"zone": "a"}}
    told = _say(_asked(models={"m": said}))
    assert told["problems"] == []
    bound = [instance["settings"] for instance in told["instances"]["h"]]
    assert sorted(bound, key=str) == [
        {"slots": 8, "devices": ["0000:02:00.0"]},
        {"slots": 8, "devices": ["GPU-1"]},  # what our own instance uses there counts as free
    ]
    assert all(instance["labels"] == {"zone": "a"} and instance["placed"] for instance in told["instances"]["h"])
    assert _say(_asked(models={"m": said}, before=told["placed"]))["placed"] == told["placed"]
    # Another play, which looked at no host, is told the same; so is one that has been told before.
    unseen = _asked(models={"m": said}, before=told["placed"], surveys={"h": {}}, recall=True)
    assert _say(unseen)["instances"] == told["instances"]
    assert _say({**unseen, "instances": told["instances"]})["instances"] == told["instances"]


def test_a_gpu_that_the_release_is_not_built_for_is_not_used() -> None:
    told = _say(_asked(models={"m": {"replicas": 2, "vram_gib": 20}}, backends={"h": "cuda"}))
    assert "h 0000:02:00.0: llmrack_artifacts_backend cuda cannot use it" in told["problems"][0]
    assert "1 of 2 replicas have a place" in told["problems"][0]


def test_what_is_wrong_with_the_settings_is_told_together() -> None:
    models = {"m": {"replicas": -1, "vram": 3, "vram_gib": 1}, "n": {"hosts": ["rare", "nowhere"], "gpus": True}}
    assert _say(_asked(models=models))["problems"] == [
        "llmnode_placement.m: replicas must be a whole number from 0, not -1",
        "llmnode_placement.m: it has no option vram",
        "llmnode_placement.n: gpus must be a whole number from 0, not True",
        "llmnode_placement.n: vram_gib must be given: there is no file on the controller to reckon it from",
        "llmnode_placement.n: hosts: the inventory has no llmnode host or group rare",
        "llmnode_placement.n: hosts: the inventory has no llmnode host or group nowhere",
    ]


def test_without_vram_gib_the_files_size_is_what_is_reckoned_with() -> None:
    told = _say(_asked(models={"m": None}, sizes={"m": 30 * GIB}))
    assert "one takes 1 GPUs with 37.0 GiB on each" in told["problems"][0]
