#!/usr/bin/env python3
"""What of llmrack is on a host, in the order in which it has to go.

    remnants.py [--data] [--models]        prints {"units", "paths", "account", "kept"} as JSON

Owns the list of everything that the roles put on a host. Changes nothing. units: those that run or start at boot, doors
before what they lead to, those that only watch last. paths: what there is of ours. account: whether the service user
goes. kept: what stays. The user stays with the state, whose files are its own: the next user of the system with that
number could read them.
"""

from __future__ import annotations

import argparse
import json
import pwd
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNITS = (
    "llmgate.socket",
    "llmgate.service",
    "llmnode@*.service",
    "llmrack-*.timer",
    "llmrack-*.service",
    "llmrack.slice",
)
PATHS = (
    "/etc/systemd/system/llmgate.service",
    "/etc/systemd/system/llmgate.socket",
    "/etc/systemd/system/llmnode@.service",
    "/etc/systemd/system/llmnode@*.service.d/10-llmrack.conf",
    "/etc/systemd/system/llmrack-*.service",
    "/etc/systemd/system/llmrack-*.timer",
    "/etc/systemd/system/llmrack.slice",
    "/etc/sysctl.d/60-llmrack.conf",
    "/etc/apt/sources.list.d/llmrack.sources",
    "/etc/yum.repos.d/llmrack.repo",
    "/etc/prometheus/llmrack-alerts.yml",
    "/etc/llmrack",
    "/opt/llmrack",
)
WATCHERS = {
    "/etc/prometheus/prometheus.yml": "prometheus.service",
    "/etc/default/prometheus": "prometheus.service",
    "/etc/default/llmrack-exporter": "prometheus-node-exporter.service",
}
"""Units of the distribution that run for llmrack where one of these files is signed by the role that writes it."""
SIGNATURE = "Written by Ansible (role llmrack_monitoring)"
STATE = "/var/lib/llmrack"
MODELS = "/srv/llmrack"
DROPINS = ("/etc/systemd/system/llmnode@*.service.d", "/etc/systemd/system/llmgate.*.d")
"""Folders of drop-ins: they go when nothing of the operator's is in them."""


def remnants(
    root: Path, list_units: Callable[[str], list[str]], account: bool, *, data: bool, models: bool
) -> dict[str, Any]:
    """`list_units`: pattern -> names of units that run or are enabled. `account`: whether the service user is there."""
    paths = [path for pattern in PATHS for path in _found(root, pattern)]
    kept = []
    for folder in (folder for pattern in DROPINS for folder in _found(root, pattern)):
        inside = [f"{folder}/{path.name}" for path in sorted((root / folder[1:]).iterdir())]
        theirs = [path for path in inside if path not in paths]
        kept += theirs
        paths += [] if theirs else [folder]
    for place, goes in ((STATE, data), (MODELS, models)):
        (paths if goes else kept).extend(_found(root, place))
    signed = [path for path in WATCHERS if _found(root, path) and SIGNATURE in (root / path[1:]).read_text()]
    paths += signed
    watchers = dict.fromkeys(WATCHERS[path] for path in signed)
    units = [unit for pattern in (*UNITS, *watchers) for unit in list_units(pattern)]
    return {"units": units, "paths": paths, "account": account and STATE not in kept, "kept": kept}


def _found(root: Path, pattern: str) -> list[str]:
    return [f"/{path.relative_to(root)}" for path in sorted(root.glob(pattern[1:]))]


def list_units(pattern: str) -> list[str]:
    """From systemd: units that do something (or have failed), and unit files that are enabled."""
    running = {words[0] for words in _systemctl("list-units", "--all", "--full", pattern) if words[2] != "inactive"}
    enabled = {words[0] for words in _systemctl("list-unit-files", pattern) if words[1] == "enabled"}
    return sorted(name for name in running | enabled if "@." not in name)


def _systemctl(*arguments: str) -> list[list[str]]:
    told = subprocess.run(["systemctl", "--plain", "--no-legend", *arguments], text=True, capture_output=True)
    return [line.split() for line in told.stdout.splitlines() if len(line.split()) > 2]


def _account() -> bool:
    try:
        pwd.getpwnam("llmrack")
    except KeyError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="say what of llmrack is on this host, as JSON")
    parser.add_argument("--data", action="store_true", help="keys, leases and prompt caches are to go too")
    parser.add_argument("--models", action="store_true", help="models are to go too")
    asked = parser.parse_args()
    print(json.dumps(remnants(Path("/"), list_units, _account(), data=asked.data, models=asked.models)))


if __name__ == "__main__":
    main()
