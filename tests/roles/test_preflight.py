"""Promises of preflight: all that is wrong is told at once, in words that say what to do, and nothing was touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles import hosts_on_file
from tests.roles.hosts_on_file import CPU_ONLY
from tests.roles.programs import load
from tests.roles.test_roles import ROOT, ansible
from tests.roles.test_survey import look

GIB = 2**30


verdict = load("llmrack_preflight", "verdict")


def card(uuid: str, free: int = 24, ours: int = 0, why: str = "", **more: Any) -> dict[str, Any]:
    seen = {"uuid": uuid, "pci": f"pci-{uuid}", "vendor": "nvidia", "vram_free": free * GIB, "vram_ours": ours * GIB}
    return {**seen, "why": why, "usable": not why, "mig": [], **more}


def node(name: str = "a", settings: Any = None, port: int = 8100) -> dict[str, Any]:
    return {"name": name, "model": "m", "port": port, "settings": settings}


def host(survey: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A host with nothing wrong, but for what is given."""
    seen = {
        "gpus": [], "pythons": {"/usr/bin/python3": "3.11"}, "ports": {"22": ["ssh.service"]}, "deployed": False,
        "disks": {"/opt": {"free": 10 * GIB, "filesystem": 1}, "/srv": {"free": 10 * GIB, "filesystem": 1}},
        "packages": ["python3-venv"],
    }  # fmt: skip
    asked = {
        "survey": {**seen, **(survey or {})}, "found": [], "disk_needs": {"/opt": GIB}, "ports": [("a", 8100)],
        "instances": [node()], "needs": {"m": 20 * GIB}, "gpu": "none", "backend": "cuda", "secrets": {},
        "missing_secrets": [],
    }  # fmt: skip
    return {**asked, **more}


def bound(*uuids: str) -> list[dict[str, Any]]:
    return [node(settings={"devices": list(uuids)})]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (host(), None),
        (host({"pythons": {"/usr/bin/python3": "3.9"}}), "/usr/bin/python3 is Python 3.9, and 3.10 or newer is needed"),
        (host({"pythons": {"/usr/bin/python3.11": None}}), "/usr/bin/python3.11 is not there"),
        (host({"pythons": {"/usr/bin/python3.11": None}, "packages": ["python3.11"]}), None),
        (
            host(disk_needs={"/opt": 6 * GIB, "/srv": 6 * GIB}),
            "/srv has 10.0 GiB free on its file system, and 12.0 GiB are needed there",
        ),
        (host({"ports": {"8100": ["nginx.service"]}}), "port 8100 of a is taken by nginx.service"),
        (host({"ports": {"8100": []}}), "port 8100 of a is taken by an unknown process"),
        (host({"ports": {"8100": ["llmnode@a.service"]}}), None),
        (host({"ports": {"8100": ["init.scope"]}}), "port 8100 of a is taken by init.scope"),
        (host({"ports": {"8000": ["init.scope", "llmgate.service"]}}, ports=[("llmgate", 8000)]), None),
        (host({"gpus": [card("G1")]}, instances=bound("G1")), None),
        (host({"gpus": [card("G1")]}, instances=bound("pci-G1")), None),
        (
            host({"gpus": [card("G1")]}, instances=bound("G1"), backend="cpu"),
            "GPU G1 of a needs llmrack_artifacts_backend cuda or vulkan, and it is cpu",
        ),
        (host({"gpus": [card("G1", vendor="amd")]}, instances=bound("G1"), backend="vulkan"), None),
        (host({"gpus": [card("G1")]}, instances=bound("G2")), "GPU G2 of a is not there; it has G1, pci-G1"),
        (host({"gpus": [card("G1", why="no driver")]}, instances=bound("G1")), "GPU G1 of a cannot be used: no driver"),
        (
            host({"gpus": [card("G1", 8)]}, instances=bound("G1")),
            "GPU G1 has room for 8.0 GiB, and the weights alone of what is to run there take 20.0 GiB",
        ),
        (host({"gpus": [card("G1", 8, ours=14)]}, instances=bound("G1")), None),
        (host({"gpus": [card("G1", 12), card("G2", 12)]}, instances=bound("G1", "G2")), None),
        (
            host({"gpus": [card("G1", 30)]}, instances=[*bound("G1"), node("b", {"devices": ["G1"]}, 8101)]),
            "GPU G1 has room for 30.0 GiB, and the weights alone of what is to run there take 40.0 GiB",
        ),
        (
            host(
                {"gpus": [card("G1", why="MIG is on", mig=[{"uuid": "MIG-1", "vram_total": 40 * GIB}])]},
                instances=bound("MIG-1"),
            ),
            None,
        ),
        (
            host({"gpus": [card("G1")]}, gpu="amd"),
            "a is to use a GPU (llmnode_gpu: amd), and none can be used: there is none",
        ),
        (
            host({"gpus": [card("G1", why="reboot")]}, gpu="nvidia"),
            "a is to use a GPU (llmnode_gpu: nvidia), and none can be used: pci-G1: reboot",
        ),
        (host(secrets={"llmnode_fleet_token": 0}), "llmnode_fleet_token has 0 characters"),
        (host(missing_secrets=["/x/fleet-token"]), None),
        (
            host({"deployed": True}, missing_secrets=["/x/fleet-token"]),
            "it was deployed with secrets that this controller has not: /x/fleet-token",
        ),
        (host({"gpus": [card("G1", 8)]}, instances=bound("G1"), needs={"m": None}), None),
        (host(found=["the system is unknown"]), "the system is unknown"),
        ({}, "it could not be looked at"),
    ],
)  # fmt: skip
def test_each_thing_that_could_stop_a_deployment_is_told(asked: dict[str, Any], told: str | None) -> None:
    problems = verdict.problems({"names": ["h"], "hosts": [asked], "placement": []})
    assert len(problems) == (1 if told else 0), problems
    assert not told or problems[0].startswith(f"h: {told}")


def test_what_is_wrong_on_several_hosts_is_told_together_and_nothing_is_touched(tmp_path: Path) -> None:
    """The real playbook, on this machine under three names. Whatever it is, it is no host without systemd's like."""
    variables = {
        "ansible_connection": "local",
        "ansible_become": False,
        "llmrack_models": {
            "here": {"src": str(ROOT / "llmnode/handbook/handbook.gguf")},
            "gone": {"src": "/nowhere.gguf"},
        },
        "llmnode_placement": {"here": {"replicas": 2, "vram_gib": 9000}},
        "llmrack_artifacts_python": "/no/such/python",
    }
    declared = {"llmnode_instances": [{"name": "x", "model": "gone", "port": 8100}], "llmnode_gpu": "amd"}
    inventory = {
        "all": {"vars": variables},
        "llmgate": {"hosts": {"gate": None}},
        "llmnode": {"hosts": {"one": declared, "two": None}},
    }
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    said = ansible("ansible-playbook", "-i", tmp_path / "hosts.yml", "playbooks/deploy.yml")
    assert said.returncode != 0
    told = said.stdout[said.stdout.index("Nothing was touched.") :]
    for problem in (
        "one: /no/such/python is not there",
        "gate: /no/such/python is not there",
        "/nowhere.gguf",
        "here: 0 of 2 replicas have a place; one takes 1 GPUs with 9000.0 GiB on each",
    ):
        assert problem in told, said.stdout[-4000:]
    assert not (tmp_path / "placement.json").exists() and not (tmp_path / ".secrets").exists()
    assert not [line for line in said.stdout.splitlines() if line.startswith("changed: [") and "localhost" not in line]


def test_a_choice_is_kept_and_recalled_by_playbooks_that_look_at_no_host(tmp_path: Path) -> None:
    placed = [{"host": "two", "name": "m.0", "model": "m", "port": 8104, "devices": ["GPU-1"]}]
    (tmp_path / "placement.json").write_text(json.dumps({"placed": placed}))
    inventory = {
        "all": {"vars": {"ansible_connection": "local", "llmnode_placement": {"m": {"settings": {"slots": 3}}}}},
        "llmgate": {"hosts": {"gate": None}},
        "llmnode": {"hosts": {"one": {"llmnode_instances": [{"name": "x", "model": "m", "port": 8100}]}, "two": None}},
    }
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    show = {
        "hosts": "llmgate",
        "gather_facts": False,
        "tasks": [
            {
                "ansible.builtin.copy": {
                    "content": "{{ groups['llmnode'] | map('extract', hostvars, 'llmnode_instances') | to_json }}",
                    "dest": str(tmp_path / "seen.json"),
                    "mode": "0600",
                }
            }
        ],
    }
    play = [{"ansible.builtin.import_playbook": str(ROOT / "playbooks/inventory.yml")}, show]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(play))
    # --limit leaves the nodes out, and the gate still hears of all of them.
    done = ansible("ansible-playbook", "-i", tmp_path / "hosts.yml", tmp_path / "play.yml", "--limit", "gate")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    one, two = json.loads((tmp_path / "seen.json").read_text())
    assert [instance["name"] for instance in one] == ["x"]
    assert two == [
        {"name": "m.0", "model": "m", "port": 8104, "settings": {"slots": 3, "devices": ["GPU-1"]}, "placed": True}
    ]


def _place(folder: Path, hosts: dict[str, Any], *arguments: str, replicas: int = 3) -> str:
    """Run what deploy.yml does about placement, over surveys that were recorded; say what Ansible said."""
    variables = {
        "ansible_connection": "local",
        "llmrack_models": {"m": {"src": str(ROOT / "llmnode/handbook/handbook.gguf")}},
        "llmnode_placement": {"m": {"replicas": replicas, "vram_gib": 20}},
    }
    inventory = {"all": {"vars": variables}, "llmgate": {"hosts": {"gate": None}}, "llmnode": {"hosts": hosts}}
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    tasks = [
        {"name": verb, "ansible.builtin.include_role": {"name": "llmnode", "tasks_from": verb}}
        for verb in ("place", "keep")
    ]
    (folder / "play.yml").write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    done = ansible("ansible-playbook", "-i", folder / "hosts.yml", folder / "play.yml", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout


def test_a_fleet_of_two_vendors_is_placed_once_and_a_new_host_moves_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "placement.json"
    hosts = {
        name: {"llmrack_host_survey": look(recording, tmp_path / name), "llmrack_artifacts_backend": "vulkan"}
        for name, recording in (("nv", hosts_on_file.TWO_NVIDIA), ("mi", hosts_on_file.TWO_AMD), ("cpu", CPU_ONLY))
    }
    planned = _place(tmp_path, hosts, "--check", "--diff")
    assert '"host": "mi"' in planned and "changed=1" in planned and not kept.exists()
    assert "changed=1" in _place(tmp_path, hosts)
    first = json.loads(kept.read_text())["placed"]
    # Of NVIDIA's, one has 4000 MiB free and 18000 MiB that are llmrack's own: room for 20 GiB.
    assert sorted((one["host"], one["name"], one["port"], *one["devices"]) for one in first) == [
        ("mi", "m.0", 8100, "0000:c1:00.0"),
        ("nv", "m.0", 8100, "GPU-00000000-aaaa-bbbb-cccc-000000000000"),
        ("nv", "m.1", 8101, "GPU-00000001-aaaa-bbbb-cccc-000000000000"),
    ]
    again = _place(tmp_path, {**hosts, "a-new-one": hosts["nv"]})
    assert "changed=1" not in again and json.loads(kept.read_text())["placed"] == first
    _place(tmp_path, {**hosts, "a-new-one": hosts["nv"]}, replicas=4)
    fourth = json.loads(kept.read_text())["placed"]
    assert fourth[:3] == first and fourth[3]["host"] == "a-new-one"
