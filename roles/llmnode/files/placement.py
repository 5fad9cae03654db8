#!/usr/bin/env python3
"""Which replica of which model runs on which GPUs of which host.

Owns: the choice, and the arithmetic of a refusal. Refuses to know: how hosts are surveyed, what an instance is made of,
where the choice is kept.

The rules, in the order in which they win:

(1) What is placed stays, as long as the inventory wants the replica, its host, and its GPUs are there. So a rerun moves
    nothing, and neither does a new host.
(2) A GPU serves one instance. GPUs of declared instances are not given away.
(3) A replica's GPUs are on one host and of one vendor, each with room for its share (need / GPUs): what is free there,
    and what instances of ours use, since those that are moved or retired give it back.
(4) The most demanding replicas choose first: most GPUs, then most memory on each.
(5) A replica goes where fewest of its model are, so that a host that dies takes few of them along; then onto the
    smallest GPUs with room, within one NUMA node where that is possible. If somebody finds no place that way, the new
    ones choose again, tightest fit first. If that fails too, nothing is placed at all.
(6) A model with 0 GPUs is computed by the CPU; its replicas share a host's memory.

A host that was not surveyed (it is off, or left out by --limit) keeps what it has and gets nothing new.

`placement.py < asked.json` on the controller prints the keys placed, instances (by host), moves and problems as JSON.
With "recall" it only says what was chosen before.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

GIB = 2**30
FIRST_PORT = 8100
BACKENDS = {"nvidia": ("cuda", "vulkan"), "amd": ("rocm", "vulkan")}
"""What a release must be built for to use a vendor's GPUs."""


class Gpu(NamedTuple):
    """device: what an instance is bound by. room: bytes that are free or ours. why: why it cannot be used, or empty."""

    device: str
    vendor: str
    total: int
    room: int
    numa: int | None = None
    why: str = ""


class Rack(NamedTuple):
    """A host. gpus: None when it was not surveyed. memory: bytes for models that the CPU computes.

    taken, names, ports: devices, instances and ports that declared instances have there.
    """

    gpus: tuple[Gpu, ...] | None
    memory: int = 0
    taken: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    ports: frozenset[int] = frozenset()


class Want(NamedTuple):
    """A model. need: bytes that one replica takes, over all its GPUs. hosts: where it may run."""

    model: str
    replicas: int
    gpus: int
    need: int
    hosts: frozenset[str]


@dataclass(frozen=True)
class Placed:
    """A replica in its place. devices: empty for one that the CPU computes."""

    host: str
    name: str
    model: str
    port: int
    devices: tuple[str, ...] = ()


@dataclass
class Plan:
    """placed: in the order in which they came to be. moves, problems: sentences for people."""

    placed: list[Placed] = field(default_factory=list)
    moves: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Spot(NamedTuple):
    """A place that would do: a host and devices there, and what decides between spots."""

    host: str
    devices: tuple[str, ...]
    replicas_there: int
    left_over: int
    numa_nodes: int


def place(wants: Sequence[Want], racks: Mapping[str, Rack], before: Sequence[Placed]) -> Plan:
    """The fleet as it should be. With problems the plan places nothing."""
    kept, moves = _keep(wants, racks, before)
    for choose in (_spread, _tight):
        plan = Plan(list(kept), list(moves))
        for want in sorted(wants, key=lambda want: (-want.gpus, -want.need / max(1, want.gpus), want.model)):
            there = sum(placed.model == want.model for placed in plan.placed)
            for _ in range(want.replicas - there):
                used = _memory_used(wants, plan.placed)
                spots = _spots(want, racks, plan.placed, used)
                if not spots:
                    plan.problems.append(_refusal(want, racks, plan.placed, used))
                    break
                spot = min(spots, key=choose)
                plan.placed.append(_settle(want, racks[spot.host], spot, plan.placed))
        if not plan.problems:
            break
    return Plan(moves=moves, problems=plan.problems) if plan.problems else plan


def _keep(wants: Sequence[Want], racks: Mapping[str, Rack], before: Sequence[Placed]) -> tuple[list[Placed], list[str]]:
    """Rule 1. A model that has too many gives up those that came last."""
    wanted = {want.model: want for want in wants}
    kept: list[Placed] = []
    moves = []
    for placed in before:
        want = wanted.get(placed.model)
        label = f"{placed.host}-{placed.name}"
        if want is None or sum(other.model == placed.model for other in kept) >= want.replicas:
            moves.append(f"{label} is retired: the inventory wants {want.replicas if want else 0} of {placed.model}")
        elif reason := _must_move(placed, want, racks):
            moves.append(f"{label} moves: {reason}")
        elif not placed.devices and _over(placed.host, want, racks, _memory_used(wants, kept)):
            moves.append(f"{label} moves: {placed.host} has not the memory for it any more")
        else:
            kept.append(placed)
    return kept, moves


def _memory_used(wants: Sequence[Want], placed: Sequence[Placed]) -> dict[str, int]:
    """Host -> bytes that replicas on its CPU take there."""
    needs = {want.model: want.need for want in wants}
    used: dict[str, int] = {}
    for one in placed:
        if not one.devices:
            used[one.host] = used.get(one.host, 0) + needs[one.model]
    return used


def _over(host: str, want: Want, racks: Mapping[str, Rack], used: Mapping[str, int]) -> bool:
    rack = racks[host]
    return rack.gpus is not None and used.get(host, 0) + want.need > rack.memory


def _must_move(placed: Placed, want: Want, racks: Mapping[str, Rack]) -> str:
    rack = racks.get(placed.host)
    if rack is None or placed.host not in want.hosts:
        return f"{placed.host} is not among its hosts any more"
    if len(placed.devices) != want.gpus:
        return f"the inventory wants {want.gpus} GPUs for it, and it has {len(placed.devices)}"
    if placed.name in rack.names or placed.port in rack.ports or rack.taken & set(placed.devices):
        return "a declared instance has taken its name, port or GPU"
    if rack.gpus is None:
        return ""
    known = {gpu.device: gpu for gpu in rack.gpus}
    for device in placed.devices:
        gpu = known.get(device)
        if gpu is None or gpu.why:
            return f"GPU {device}: {gpu.why if gpu else 'it is not on the host any more'}"
        if gpu.total < _share(want):
            return f"GPU {device} has {_gib(gpu.total)}, and {_gib(_share(want))} are needed on each"
    return ""


def _spots(want: Want, racks: Mapping[str, Rack], placed: Sequence[Placed], used: Mapping[str, int]) -> list[Spot]:
    """Rules 2, 3 and 6: at most one spot for each host and vendor."""
    spots = []
    for host in sorted(want.hosts & racks.keys()):
        rack = racks[host]
        if rack.gpus is None:
            continue
        there = sum(other.host == host and other.model == want.model for other in placed)
        if want.gpus == 0:
            left = rack.memory - used.get(host, 0) - want.need
            spots += [Spot(host, (), there, left, 0)] if left >= 0 else []
            continue
        roomy = [gpu for gpu in _usable(host, rack, placed) if gpu.room >= _share(want)]
        for vendor in sorted({gpu.vendor for gpu in roomy}):
            chosen = _choose([gpu for gpu in roomy if gpu.vendor == vendor], want.gpus)
            if chosen:
                left_over = sum(gpu.total for gpu in chosen) - want.need
                nodes = len({gpu.numa for gpu in chosen})
                spots.append(Spot(host, tuple(gpu.device for gpu in chosen), there, left_over, nodes))
    return spots


def _choose(roomy: Sequence[Gpu], count: int) -> list[Gpu]:
    """The smallest that do, of one NUMA node where one has enough of them."""
    ranked = sorted(roomy, key=lambda gpu: (gpu.total, gpu.device))
    nodes: dict[int | None, list[Gpu]] = {}
    for gpu in ranked:
        nodes.setdefault(gpu.numa, []).append(gpu)
    within = [found[:count] for found in nodes.values() if len(found) >= count]
    if within:
        return min(within, key=lambda found: (sum(gpu.total for gpu in found), found[0].device))
    return ranked[:count] if len(ranked) >= count else []


def _usable(host: str, rack: Rack, placed: Sequence[Placed]) -> list[Gpu]:
    """Those that nobody of ours has."""
    busy = rack.taken | {device for other in placed if other.host == host for device in other.devices}
    return [gpu for gpu in rack.gpus or () if not gpu.why and gpu.device not in busy]


def _spread(spot: Spot) -> tuple[Any, ...]:
    return (spot.replicas_there, spot.left_over, spot.numa_nodes, spot.host, spot.devices)


def _tight(spot: Spot) -> tuple[Any, ...]:
    return (spot.left_over, spot.replicas_there, spot.numa_nodes, spot.host, spot.devices)


def _settle(want: Want, rack: Rack, spot: Spot, placed: Sequence[Placed]) -> Placed:
    """The smallest number and port that are unused on the host; "-" would separate host and instance."""
    there = [other for other in placed if other.host == spot.host]
    stem = re.sub(r"[^a-z0-9_.]", "_", want.model.lower()).lstrip("_.") or "model"
    names = rack.names | {other.name for other in there}
    ports = rack.ports | {other.port for other in there}
    name = _first(lambda number: f"{stem}.{number}" not in names, 0)
    port = _first(lambda number: number not in ports, FIRST_PORT)
    return Placed(spot.host, f"{stem}.{name}", want.model, port, spot.devices)


def _first(fits: Callable[[int], bool], number: int) -> int:
    while not fits(number):
        number += 1
    return number


def _refusal(want: Want, racks: Mapping[str, Rack], placed: Sequence[Placed], used: Mapping[str, int]) -> str:
    """What was asked for, what has a place, and of every GPU or host why it is none for the next replica."""
    there = sum(other.model == want.model for other in placed)
    each = f"{want.gpus} GPUs with {_gib(_share(want))} on each" if want.gpus else f"{_gib(want.need)} of memory"
    lines = [f"{want.model}: {there} of {want.replicas} replicas have a place; one takes {each}, on one host:"]
    for host in sorted(want.hosts):
        rack = racks.get(host)
        if rack is None or rack.gpus is None:
            lines.append(f"  {host}: it was not looked at, so it gets nothing new")
        elif want.gpus == 0:
            left = rack.memory - used.get(host, 0)
            short = _gib(want.need - left)
            lines.append(f"  {host}: {_gib(left)} of {_gib(rack.memory)} of memory left, {short} too little")
        elif rack.gpus:
            lines += [f"  {host} {gpu.device}: {_verdict(host, gpu, rack, want, placed)}" for gpu in rack.gpus]
        else:
            lines.append(f"  {host}: it has no GPU")
    return "\n".join(lines)


def _verdict(host: str, gpu: Gpu, rack: Rack, want: Want, placed: Sequence[Placed]) -> str:
    if gpu.why:
        return gpu.why
    if gpu.device in rack.taken:
        return "a declared instance has it"
    for other in placed:
        if other.host == host and gpu.device in other.devices:
            return f"{other.name} has it"
    short = _share(want) - gpu.room
    state = f"{_gib(short)} too little" if short > 0 else "would do"
    return f"{_gib(gpu.room)} of {_gib(gpu.total)} free, {state}"


def _share(want: Want) -> int:
    """Bytes on each GPU, rounded up: llama.cpp spreads layers evenly."""
    return -(-want.need // max(1, want.gpus))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def read(asked: Mapping[str, Any]) -> tuple[list[Want], dict[str, Rack], list[str]]:
    """What the role asks: models, sizes, groups, surveys, backends, instances. Problems are what is wrong with it."""
    racks = {
        host: _rack(asked["surveys"][host], asked["backends"][host], _declared(asked, host))
        for host in asked["groups"]["llmnode"]
    }
    wants, problems = [], []
    for model, said in sorted(asked["models"].items()):
        said = said or {}
        unknown = sorted(set(said) - {"replicas", "gpus", "vram_gib", "hosts", "settings", "labels", "weight"})
        need = float(said["vram_gib"]) * GIB if said.get("vram_gib") else _estimate(asked["sizes"].get(model))
        counts = [(key, said.get(key, 1)) for key in ("replicas", "gpus")]
        wrong = [f"{key} must be a whole number from 0, not {count!r}" for key, count in counts if not _whole(count)]
        wrong += [f"it has no option {key}" for key in unknown]
        if need is None:
            wrong.append("vram_gib must be given: there is no file on the controller to reckon it from")
        places, missing = _hosts(said.get("hosts"), asked["groups"], racks)
        wrong += [f"hosts: the inventory has no llmnode host or group {name}" for name in missing]
        problems += [f"llmnode_placement.{model}: {what}" for what in wrong]
        if not wrong:
            wants.append(Want(model, said.get("replicas", 1), said.get("gpus", 1), int(need or 0), places))
    return wants, racks, problems


def _declared(asked: Mapping[str, Any], host: str) -> list[dict[str, Any]]:
    """Instances that the inventory itself has; those of an earlier choice are marked."""
    return [one for one in asked["instances"][host] if not one.get("placed")]


def _estimate(size: int | None) -> float | None:
    """Weights, a fifth of them for the cache, and a GiB for what CUDA or ROCm and the compute buffers take."""
    return None if not size else size * 1.2 + GIB


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _hosts(
    named: Any, groups: Mapping[str, Sequence[str]], racks: Mapping[str, Rack]
) -> tuple[frozenset[str], list[str]]:
    """Names of hosts and groups -> hosts that are there, and names of which there are none."""
    if named is None:
        return frozenset(racks), []
    found: set[str] = set()
    missing = []
    for name in [named] if isinstance(named, str) else named:
        here = racks.keys() & (set(groups[name]) if name in groups else {name})
        found |= here
        missing += [] if here else [name]
    return frozenset(found), missing


def _rack(survey: Mapping[str, Any], backend: str, declared: Sequence[Mapping[str, Any]]) -> Rack:
    """survey: empty where the host was not looked at."""
    return Rack(
        tuple(_gpu(gpu, backend) for gpu in survey["gpus"]) if survey else None,
        # What the fleet's own models hold of it comes back when they are placed anew, so the whole of it counts.
        int(survey["memory"]["total"] * 0.9) if survey else 0,
        frozenset(device for one in declared for device in (one.get("settings") or {}).get("devices", [])),
        frozenset(one["name"] for one in declared),
        frozenset(int(one["port"]) for one in declared),
    )


def _gpu(said: Mapping[str, Any], backend: str) -> Gpu:
    """llmnode knows NVIDIA's GPUs by their UUID, and AMD's by their PCI address: HIP tells it no more."""
    device = said["uuid"] if said["vendor"] == "nvidia" and said["uuid"] else said["pci"]
    total = said["vram_total"] or 0
    room = min(total, (said["vram_free"] or 0) + said["vram_ours"])
    able = backend in BACKENDS[said["vendor"]]
    why = said["why"] or ("" if able else f"llmrack_artifacts_backend {backend} cannot use it")
    return Gpu(device, said["vendor"], total, room, said["numa"], why)


def instance(placed: Placed, said: Mapping[str, Any]) -> dict[str, Any]:
    """What llmnode_instances has for it."""
    settings = dict(said.get("settings") or {})
    settings.update({"devices": list(placed.devices)} if placed.devices else {"n_gpu_layers": 0})
    extra = {key: said[key] for key in ("labels", "weight") if key in said}
    return {
        "name": placed.name,
        "model": placed.model,
        "port": placed.port,
        "settings": settings,
        "placed": True,
        **extra,
    }


def main() -> None:
    asked = json.load(sys.stdin)
    before = [Placed(**{**one, "devices": tuple(one["devices"])}) for one in asked["before"]]
    if asked["recall"]:
        plan = Plan([placed for placed in before if placed.host in asked["instances"]])
    else:
        wants, racks, problems = read(asked)
        plan = Plan(problems=problems) if problems else place(wants, racks, before)
    instances = {host: _declared(asked, host) for host in asked["instances"]}
    for placed in plan.placed:
        instances[placed.host].append(instance(placed, asked["models"].get(placed.model) or {}))
    told = {"placed": [asdict(placed) for placed in plan.placed], "instances": instances}
    print(json.dumps({**told, "moves": plan.moves, "problems": plan.problems}))


if __name__ == "__main__":
    main()
