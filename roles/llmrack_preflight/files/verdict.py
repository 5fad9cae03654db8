#!/usr/bin/env python3
"""What would stop a deployment, read from surveys of the hosts and what the inventory wants of them.

Owns: the checks, and sentences that say what to do. Refuses to know: how hosts are looked at, what else roles check of
their own settings (`found` holds what those said).

`verdict.py < asked.json` on the controller prints {"problems": [...]}, of all hosts together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

GIB = 2**30
OLDEST_PYTHON = (3, 10)
BACKENDS = {"nvidia": ("cuda", "vulkan"), "amd": ("rocm", "vulkan")}
GATE_HOLDERS = ("llmgate.service", "llmgate.socket", "init.scope")
"""systemd itself holds the gate's socket: PID 1 is in init.scope."""


def problems(asked: Mapping[str, Any]) -> list[str]:
    """Those of every host, in the order of hosts, and then those of the placement."""
    found = []
    for name, host in zip(asked["names"], asked["hosts"], strict=True):
        found += [problem if problem.startswith(name) else f"{name}: {problem}" for problem in _of(host)]
    return found + list(asked["placement"])


def _of(host: Mapping[str, Any]) -> Iterator[str]:
    if not host.get("survey"):
        yield "it could not be looked at (unreachable, or without Python); --limit '!HOST' leaves it out"
        return
    yield from host["found"]
    yield from _python(host)
    yield from _disks(host)
    yield from _ports(host)
    yield from _gpus(host)
    yield from _secrets(host)


def _python(host: Mapping[str, Any]) -> Iterator[str]:
    for python, version in host["survey"]["pythons"].items():
        name = python.rsplit("/", 1)[-1]
        if version is None and not any(f"{package}-".startswith(f"{name}-") for package in host["survey"]["packages"]):
            yield f"{python} is not there; set llmrack_artifacts_python to Python 3.10 or newer"
        elif version and tuple(int(part) for part in version.split(".")) < OLDEST_PYTHON:
            yield f"{python} is Python {version}, and 3.10 or newer is needed; set llmrack_artifacts_python"


def _disks(host: Mapping[str, Any]) -> Iterator[str]:
    """Needs of one file system are added up."""
    needs: dict[int, int] = {}
    for path, need in host["disk_needs"].items():
        seen = host["survey"]["disks"].get(path)
        if seen is None:
            continue
        needs[seen["filesystem"]] = needs.get(seen["filesystem"], 0) + need
        if need and needs[seen["filesystem"]] > seen["free"]:
            need_gib, free_gib = needs[seen["filesystem"]] / GIB, seen["free"] / GIB
            yield f"{path} has {free_gib:.1f} GiB free on its file system, and {need_gib:.1f} GiB are needed there"


def _ports(host: Mapping[str, Any]) -> Iterator[str]:
    """Free, or held by a unit of ours. Another instance's is fine: a port that changes hands is free by then."""
    for what, port in host["ports"]:
        holders = host["survey"]["ports"].get(str(port))
        ours = GATE_HOLDERS if what == "llmgate" else ()
        others = [name for name in holders or () if name not in ours and not name.startswith("llmnode@")]
        if others or holders == []:
            yield f"port {port} of {what} is taken by {', '.join(others) or 'an unknown process'}"


def _gpus(host: Mapping[str, Any]) -> Iterator[str]:
    """That the GPUs of declared instances are there and usable, and have room for what is put on each."""
    cards = {}
    for card in host["survey"]["gpus"]:
        room = (card["vram_free"] or 0) + card["vram_ours"]
        cards.update({name: (room, card["why"], card["vendor"]) for name in (card["uuid"], card["pci"]) if name})
        cards.update({part["uuid"]: (part["vram_total"], "", card["vendor"]) for part in card["mig"]})
    loads: dict[str, int] = {}
    for instance in host["instances"]:
        settings = instance.get("settings") or {}
        devices = settings.get("devices") or []
        for device in devices:
            if device not in cards:
                yield f"GPU {device} of {instance['name']} is not there; it has {', '.join(sorted(cards)) or 'none'}"
            elif host["backend"] not in BACKENDS[cards[device][2]]:
                able = " or ".join(BACKENDS[cards[device][2]])
                yield (
                    f"GPU {device} of {instance['name']} needs llmrack_artifacts_backend {able}, and it is"
                    f" {host['backend']}"
                )
            elif cards[device][1]:
                yield f"GPU {device} of {instance['name']} cannot be used: {cards[device][1]}"
            elif settings.get("n_gpu_layers", -1) == -1:
                need = host["needs"].get(instance["model"]) or 0  # not known before the first download
                loads[device] = loads.get(device, 0) + -(-need // len(devices))
        if not devices and host["gpu"] != "none" and settings.get("n_gpu_layers", -1) != 0:
            yield from _any_gpu(host, instance["name"])
    for device, load in loads.items():
        if load > cards[device][0]:
            yield (
                f"GPU {device} has room for {cards[device][0] / GIB:.1f} GiB, and the weights alone of what is to run"
                f" there take {load / GIB:.1f} GiB"
            )


def _any_gpu(host: Mapping[str, Any], name: str) -> Iterator[str]:
    ours = [card for card in host["survey"]["gpus"] if card["vendor"] == host["gpu"]]
    if not any(card["usable"] for card in ours):
        reasons = "; ".join(f"{card['pci']}: {card['why']}" for card in ours) or "there is none"
        yield f"{name} is to use a GPU (llmnode_gpu: {host['gpu']}), and none can be used: {reasons}"


def _secrets(host: Mapping[str, Any]) -> Iterator[str]:
    for name, length in host["secrets"].items():
        if length < 16:
            yield f"{name} has {length} characters; a secret needs 16 or more (is it missing from the vault?)"
    if host["missing_secrets"] and host["survey"]["deployed"]:
        yield (
            f"it was deployed with secrets that this controller has not: {', '.join(host['missing_secrets'])}. Copy the"
            " inventory's .secrets from where it was deployed, or take them from a vault"
        )


def main() -> None:
    print(json.dumps({"problems": problems(json.load(sys.stdin))}))


if __name__ == "__main__":
    main()
