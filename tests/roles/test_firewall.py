"""Promises of the roles llmrack_firewall and llmrack_virtual_address that need no host; the lab has the others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.test_roles import ansible

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = ROOT / "roles/llmrack_virtual_address/files/answers.py"

FLEET = {
    "llmgate": {
        "hosts": {"gate1": {"ansible_host": "192.0.2.1"}, "gate2": {"llmrack_firewall_addresses": ["g2.example"]}},
    },
    "llmnode": {"hosts": {"node1": {"llmnode_address": "192.0.2.11"}, "node2": {"ansible_host": "2001:db8::12"}}},
    "llmrack_monitoring": {"hosts": {"watch": {"ansible_host": "192.0.2.21"}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The rules of node1, where two instances run; getent knew g2.example by an address of each kind."""
    folder = tmp_path_factory.mktemp("firewall")
    role = ROOT / "roles/llmrack_firewall"
    looked_up = {
        "192.0.2.1": ["192.0.2.1 STREAM"],
        "g2.example": ["192.0.2.2 STREAM g2.example", "192.0.2.2 DGRAM", "2001:db8::2 STREAM", "2001:db8::2 RAW"],
    }
    variables: dict[str, Any] = {
        "llmnode_instances": [{"name": "b", "port": 8101}, {"name": "a", "port": 8100}],
        "llmrack_firewall_allow": ["198.51.100.0/24"],
        "llmrack_firewall_found": {
            "results": [{"item": name, "stdout_lines": lines} for name, lines in looked_up.items()]
        },
    }
    template = {"src": str(role / "templates/firewall.nft.j2"), "dest": str(folder / "firewall.nft")}
    play = {
        "hosts": "node1",
        "connection": "local",
        "gather_facts": False,
        "vars_files": [str(role / "vars/main.yml")],
        "tasks": [{"ansible.builtin.template": template, "vars": variables}],
    }
    (folder / "hosts.yml").write_text(yaml.safe_dump(FLEET))
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    rendered = ansible("ansible-playbook", "-i", folder / "hosts.yml", folder / "play.yml")
    assert rendered.returncode == 0, rendered.stdout + rendered.stderr
    return (folder / "firewall.nft").read_text()


def members(rules: str, name: str) -> list[str]:
    found = re.search(rf"set {name} \{{.*?\}}\n", rules, re.DOTALL)
    assert found, rules
    listed = re.search(r"elements = \{ (.*) \}", found[0])
    return listed[1].split(", ") if listed else []


def test_gates_and_those_who_watch_may_speak_to_nodes_and_nodes_may_hand_models_on(rules: str) -> None:
    assert members(rules, "callers_ipv4_addr") == ["192.0.2.1", "192.0.2.2", "192.0.2.21", "198.51.100.0/24"]
    assert members(rules, "callers_ipv6_addr") == ["2001:db8::2"]
    assert members(rules, "nodes_ipv4_addr") == ["192.0.2.11"]
    assert members(rules, "nodes_ipv6_addr") == ["2001:db8::12"]
    assert "tcp dport { 8100, 8101 } jump instances" in rules and "tcp dport 8099 jump models" in rules


def test_the_rules_of_others_are_left_alone(rules: str) -> None:
    assert "flush" not in rules
    assert {line for line in rules.splitlines() if "table" in line and "#" not in line} == {
        "table inet llmrack", "delete table inet llmrack", "table inet llmrack {",
    }  # fmt: skip
    assert rules.index("\ntable inet llmrack\n") < rules.index("\ndelete table") < rules.index("\ntable inet llmrack {")


@pytest.mark.parametrize(
    ("role", "settings", "complaint"),
    [
        ("llmrack_virtual_address", {"llmrack_virtual_address": "gate.example"}, "must be an IP address, perhaps with"),
        ("llmrack_virtual_address", {"llmrack_virtual_address": "192.0.2.9"}, "cannot look up nowhere.invalid: set"),
        ("llmrack_firewall", {"llmrack_firewall": True}, "cannot look up nowhere.invalid, so it does not know whom"),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_touched(
    role: str, settings: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    groups = {"llmgate": {"hosts": {"nowhere.invalid": None}}, "llmnode": {"hosts": {"here": {"ansible_host": "::1"}}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(groups))
    include = {"ansible.builtin.include_role": {"name": role, "tasks_from": "preflight"}}
    play = {"hosts": "here", "connection": "local", "gather_facts": False, "vars": settings, "tasks": [include]}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    said = ansible("ansible-playbook", "-i", tmp_path / "hosts.yml", tmp_path / "play.yml")
    assert said.returncode != 0
    assert complaint in " ".join(said.stdout.split())


@pytest.fixture
def gate() -> Iterator[HTTPServer]:
    """Answers /200 with 200 and /503 with 503."""

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path[1:]))
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def asked(folder: Path, url: str, state: str) -> int:
    """The exit code that keepalived sees, on a host whose systemd says that the gate is `state`."""
    (folder / "systemctl").write_text(f"#!/bin/sh\necho {state}\n")
    (folder / "systemctl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run([sys.executable, ANSWERS, url], env=environment, capture_output=True, timeout=60).returncode


def test_the_address_leaves_a_gate_that_does_not_answer_unless_it_is_finishing(
    gate: HTTPServer, tmp_path: Path
) -> None:
    here = f"http://127.0.0.1:{gate.server_port}"
    assert asked(tmp_path, f"{here}/200", "active") == 0
    assert asked(tmp_path, f"{here}/503", "active") == 1
    gate.shutdown()
    gate.server_close()
    for state, code in (("active", 1), ("inactive", 1), ("activating", 1), ("deactivating", 0)):
        assert asked(tmp_path, f"{here}/200", state) == code, state
