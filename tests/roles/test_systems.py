"""Promises of what the roles decide about each system, from what Ansible finds out about it (systems.py).

Only Debian 12 is there as a system, in the lab: here are the decisions alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.systems import FILES, facts
from tests.roles.test_roles import ROOT, ansible

ASKED = {"Debian 13": "dpkg-query", "RHEL 9": "rpm", "RHEL 10": "rpm"}
TOLD = ("distribution", "distribution_version", "distribution_major_version", "os_family", "service_mgr")
APT, DNF = ["python3-venv", "libgomp1", "openssl"], ["python3", "libgomp", "openssl"]
NINE = ["python3.11", "libgomp", "openssl"]
SUPPORTED = {
    "Debian 12": APT, "Debian 13": APT, "Ubuntu 22.04": APT, "Ubuntu 24.04": APT,
    **{f"{name} 9": NINE for name in ("RHEL", "Rocky Linux", "AlmaLinux", "CentOS Stream", "Oracle Linux")},
    **{f"{name} 10": DNF for name in ("RHEL", "Rocky Linux", "AlmaLinux", "CentOS Stream", "Oracle Linux")},
}  # fmt: skip


def role(name: str, tasks: str, said: str) -> dict[str, Any]:
    """Tasks of a role, and what they failed with as a fact called `said`; "" when they did not."""
    kept = {"ansible.builtin.set_fact": {said: "{{ ansible_failed_result.msg }}"}}
    return {
        "block": [{"ansible.builtin.include_role": {"name": name, "tasks_from": tasks, "public": True}}],
        "rescue": [kept],
    }


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By system: why it is refused, which packages it needs, and of some, which package manager was asked for them."""
    folder = tmp_path_factory.mktemp("systems")
    hosts = {}
    for number, (name, files) in enumerate(FILES.items()):
        tools = folder / str(number)
        found = {**facts(files, tools), "service_mgr": "systemd"}
        hosts[f"h{number}"] = {"system": name, "found": found, "tools": str(tools)}
        for tool in ("dpkg-query", "rpm"):
            (tools / tool).write_text(f'#!/bin/sh\necho {tool} > {tools}/asked\nprintf "%s installed\\n" "$@"\n')
            (tools / tool).chmod(0o755)
    tasks = [
        {"ansible.builtin.set_fact": {**{name: f"{{{{ found.{name} }}}}" for name in TOLD}, "cacheable": True}},
        role("llmrack_host", "preflight", "refused"),
        role("llmrack_monitoring", "preflight", "unwatched"),
        {"ansible.builtin.set_fact": {"packages": "{{ llmrack_host_packages }}"}},
        {
            "ansible.builtin.include_role": {"name": "llmrack_host", "tasks_from": "install"},
            "when": f"system in {ASKED}",
        },
        {
            "ansible.builtin.copy": {
                "content": "{{ dict(ansible_play_hosts | map('extract', hostvars, 'system') | zip(ansible_play_hosts"
                " | map('extract', hostvars))) | to_json }}",
                "dest": f"{folder}/judged.json",
                "mode": "0600",
            },
            "run_once": True,
        },
    ]
    play = {"hosts": "all", "connection": "local", "gather_facts": False, "tasks": tasks}
    play |= {"environment": {"PATH": "{{ tools }}:/usr/bin:/bin"}}
    (folder / "hosts.yml").write_text(json.dumps({"all": {"hosts": hosts}}))
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    done = ansible("ansible-playbook", "-i", folder / "hosts.yml", folder / "play.yml")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    told: dict[str, dict[str, Any]] = json.loads((folder / "judged.json").read_text())
    return told


def test_supported_systems_are_accepted_and_get_the_packages_of_their_names(judged: dict[str, Any]) -> None:
    assert not [name for name in SUPPORTED if "refused" in judged[name]]
    assert {name: judged[name]["packages"] for name in SUPPORTED} == SUPPORTED
    asked = {name: Path(judged[name]["tools"], "asked").read_text().strip() for name in ASKED}
    assert asked == ASKED


def test_other_systems_are_refused_by_name(judged: dict[str, Any]) -> None:
    others = {name: told["refused"] for name, told in judged.items() if name not in SUPPORTED}
    assert len(others) == len(FILES) - len(SUPPORTED) == 6
    assert (
        "runs Debian 11.11; llmrack supports Debian 12 and 13, Ubuntu 22.04 and 24.04, and of RHEL"
        in others["Debian 11"]
    )
    assert all("; llmrack supports " in said for said in others.values())


def test_monitoring_is_for_systems_that_bring_prometheus(judged: dict[str, Any]) -> None:
    refused = {name for name in SUPPORTED if "unwatched" in judged[name]}
    assert refused == {name for name, packages in SUPPORTED.items() if packages is not APT}


def test_the_page_says_of_each_supported_system_whether_it_was_tested() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    table = page[page.index("| system |") : page.index("Other systems are refused by name.")]
    names = {name.rpartition(" ")[0] for name in SUPPORTED}
    assert all(name in table for name in names)
    assert "| Debian 12 | tested" in table and table.count("accepted, not tested on a host") == 2
