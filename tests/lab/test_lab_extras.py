"""What a fleet may have besides, on three real systemd hosts: two gates under one address, a firewall, Prometheus.

It is deployed from the installed collection. The tests share one deployment, in order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from tests.lab import lab
from tests.lab.test_lab_fleet import LAB, accepted, changes, on, run
from tests.lab.test_lab_fleet import pytestmark as needs_the_lab
from tests.processes import wait_for

ROOT = Path(__file__).resolve().parents[2]
PLACES = lab.Places.of(dict(os.environ))
SHARED = "198.18.0.100"
GATES = ("lab1", "lab2")
NODES = ("lab2", "lab3")
WATCHER = "lab2"
REFUSED = "7"  # curl's exit code

pytestmark = [*needs_the_lab, pytest.mark.full]


@dataclass(frozen=True)
class Fleet:
    """An inventory of its own, and a folder in which the collection is installed and nothing else."""

    home: Path

    def play(self, name: str, *arguments: str) -> str:
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        environment |= {"ANSIBLE_COLLECTIONS_PATH": str(self.home), "ANSIBLE_HOME": str(self.home)}
        command = [*LAB, "exec", "--", program, "-i", str(self.home / "inventory"), f"llmrack.llmrack.{name}"]
        done = subprocess.run(
            [*command, *arguments],
            cwd=self.home, env=environment, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=900,
        )  # fmt: skip
        return accepted(done)

    @property
    def question(self) -> list[str]:
        """curl's arguments for a short answer through the shared address."""
        key = (self.home / "inventory/.secrets/client-key").read_text().strip()
        body = {"model": "handbook", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        url = f"http://{SHARED}:8000/v1/chat/completions"
        return ["-sS", "-m", "5", "-f", "-H", f"Authorization: Bearer {key}", "-d", json.dumps(body), url]

    def answers(self) -> bool:
        return run(*LAB, "exec", "--", "curl", *self.question).returncode == 0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("extras")
    accepted(run(*LAB, "down"))
    accepted(run(*LAB, "up"))
    try:
        lab.fetch_release(PLACES)
        galaxy = [str(Path(sys.executable).with_name("ansible-galaxy")), "collection"]
        accepted(run(*galaxy, "build", "--output-path", str(home)))
        (archive,) = home.glob("*.tar.gz")
        accepted(run(*galaxy, "install", "--offline", "-p", str(home), str(archive)))
        write_inventory(home / "inventory")
        (home / "deployed").write_text(Fleet(home).play("deploy"))
        yield Fleet(home)
    finally:
        accepted(run(*LAB, "down"))


def write_inventory(folder: Path) -> None:
    model = {"src": str(ROOT / "llmnode/handbook/handbook.gguf"), "settings": {"n_ctx": 1024}}
    variables = {
        "ansible_user": "root",
        "ansible_ssh_common_args": f"-F {PLACES.ssh_config}",
        "llmrack_models": {"handbook": model},
        "llmrack_firewall": True,
        "llmrack_virtual_address": SHARED,
        "llmgate_address": SHARED,
        "llmnode_settings": {"slots": 4, "threads": 1},
        "llmrack_monitoring_interval": "2s",
    }
    instances = [{"name": "main", "model": "handbook", "port": 8100}]
    inventory = {
        "all": {
            "vars": variables,
            "hosts": {host: {"ansible_host": address} for host, address in lab.ADDRESSES.items()},
            "children": {
                "llmgate": {"hosts": dict.fromkeys(GATES)},
                "llmnode": {"hosts": dict.fromkeys(NODES), "vars": {"llmnode_instances": instances}},
                "llmrack_monitoring": {"hosts": {WATCHER: None}},
            },
        }
    }
    folder.mkdir()
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))


def reaches(host: str | None, target: str, port: int) -> bool:
    """Whether a connection from the host (None: the controller) is taken. Nothing may drop it."""
    ask = f"curl -s -o /dev/null -m 10 http://{lab.ADDRESSES[target]}:{port}/; echo $?"
    told = on(host, ask) if host else accepted(run(*LAB, "exec", "--", "sh", "-c", ask)).strip()
    assert told in ("0", REFUSED), f"curl from {host} to {target}:{port} ended with {told}"
    return told == "0"


def holders() -> list[str]:
    return [host for host in GATES if lab.process_of(host, PLACES) and SHARED in on(host, "ip -4 -o address")]


def test_a_second_deployment_from_the_collection_changes_nothing(fleet: Fleet) -> None:
    unchanged = {"lab1": 0, "lab2": 0, "lab3": 0}
    assert changes(fleet.play("deploy", "--check", "--diff")) == unchanged
    assert changes(fleet.play("deploy")) == unchanged
    assert f"llmrack answers at http://{SHARED}:8000" in (fleet.home / "deployed").read_text()


def test_a_nodes_port_answers_gates_and_nobody_else(fleet: Fleet) -> None:
    assert reaches("lab1", "lab3", 8100) and reaches("lab2", "lab3", 8100)
    assert reaches("lab3", "lab3", 8100), "its own host"
    assert not reaches("lab3", "lab2", 8100), "another node"
    assert not reaches(None, "lab3", 8100) and not reaches(None, "lab2", 8100)
    assert reaches(None, "lab1", 8000) and reaches("lab3", "lab2", 8000), "gates answer everybody"


def test_models_go_from_node_to_node_and_to_nobody_else(fleet: Fleet) -> None:
    on("lab3", "systemd-run --quiet --unit=handed python3 -m http.server 8099")
    try:
        wait_for(lambda: reaches("lab3", "lab3", 8099), "a server on 8099")
        assert reaches("lab2", "lab3", 8099)
        assert not reaches("lab1", "lab3", 8099) and not reaches(None, "lab3", 8099)
    finally:
        on("lab3", "systemctl stop handed")


def test_a_firewall_that_was_flushed_is_put_back_beside_the_rules_of_others(fleet: Fleet) -> None:
    on("lab3", "nft flush ruleset && nft add table inet theirs")
    assert reaches(None, "lab3", 8100)
    assert changes(fleet.play("deploy", "--check", "--tags", "firewall"))["lab3"] == 1
    assert reaches(None, "lab3", 8100), "a check changes nothing"
    assert changes(fleet.play("deploy", "--tags", "firewall")) == {"lab1": 0, "lab2": 0, "lab3": 1}
    assert not reaches(None, "lab3", 8100)
    assert "inet theirs" in on("lab3", "nft list tables")
    assert on("lab3", "systemctl is-enabled llmrack-firewall") == "enabled"
    on("lab3", "systemctl restart nftables")
    wait_for(lambda: not reaches(None, "lab3", 8100), "the rules to be loaded after the distribution's own")


def ask_prometheus(path: str) -> Any:
    told = json.loads(on(WATCHER, f"curl -sS -m 10 --globoff 'http://127.0.0.1:9090/api/v1/{path}'"))
    return told["data"]


def figures(query: str) -> dict[str, float]:
    """Instance -> value of an instant query."""
    found = ask_prometheus(f"query?query={quote(query)}")["result"]
    return {one["metric"]["instance"]: float(one["value"][1]) for one in found}


def test_prometheus_sees_all_that_the_inventory_has_and_is_left_alone_by_a_second_run(fleet: Fleet) -> None:
    fleet.play("monitoring")
    assert changes(fleet.play("monitoring")) == {"lab1": 0, "lab2": 0, "lab3": 0}
    assert changes(fleet.play("monitoring", "--check", "--diff")) == {"lab1": 0, "lab2": 0, "lab3": 0}
    targets = {"lab1": 1.0, "lab2": 1.0, "lab3": 1.0, "lab2-main": 1.0, "lab3-main": 1.0, "127.0.0.1:9090": 1.0}
    wait_for(lambda: figures("up") == targets, "every target to be up")
    wait_for(lambda: figures("llmgate_node_usable==1").keys() == set(GATES), "the gates' figures")
    (group,) = ask_prometheus("rules?type=alert")["groups"]
    assert len(group["rules"]) >= 14 and {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
    settings = {"llmrack_monitoring_jobs": [{"job_name": "more", "static_configs": [{"targets": ["127.0.0.1:9090"]}]}]}
    assert changes(fleet.play("monitoring", "-e", json.dumps(settings))) == {"lab1": 0, WATCHER: 2, "lab3": 0}
    wait_for(lambda: "more" in on(WATCHER, "curl -s http://127.0.0.1:9090/api/v1/targets"), "the new job")
    fleet.play("monitoring")


def move_to(host: str) -> None:
    """Give a gate the address, by stopping the other for a moment."""
    (other,) = set(GATES) - {host}
    on(other, "systemctl stop llmgate.socket llmgate.service")
    wait_for(lambda: holders() == [host], f"the address to move to {host}")
    on(other, "systemctl start llmgate.socket llmgate.service")


def test_one_gate_has_the_address_and_it_stays_where_it_went(fleet: Fleet) -> None:
    wait_for(lambda: len(holders()) == 1 and fleet.answers(), "one gate to have the address, and to answer there")
    (first,) = holders()
    (second,) = set(GATES) - {first}
    move_to(second)
    assert fleet.answers()
    assert changes(fleet.play("deploy", "--tags", "virtual_address")) == {"lab1": 0, "lab2": 0, "lab3": 0}
    assert holders() == [second], "it does not go back"


def test_the_address_moves_when_a_gates_host_dies(fleet: Fleet) -> None:
    if holders() != ["lab1"]:
        move_to("lab1")
    accepted(run(*LAB, "off", "lab1"))
    wait_for(fleet.answers, "an answer from the other gate")
    assert holders() == ["lab2"]
    wait_for(lambda: "lab1" in figures('ALERTS{alertname="LlmrackGateDown"}'), "Prometheus to notice")


def test_both_are_gone_without_a_trace_when_the_settings_are(fleet: Fleet) -> None:
    left = [host for host in lab.ADDRESSES if lab.process_of(host, PLACES)]
    without = ("--limit", ",".join(left), "-e", json.dumps({"llmrack_firewall": False, "llmrack_virtual_address": ""}))
    checked = changes(fleet.play("deploy", "--check", *without))
    assert checked["lab3"] > 0 and fleet.answers()
    fleet.play("deploy", *without)
    assert holders() == []
    assert reaches(None, "lab3", 8100)
    for host in left:
        assert on(host, "systemctl list-unit-files --no-legend 'llmrack-*.service' || true") == ""
        assert "llmrack" not in on(host, "nft list tables")
        assert on(host, "ls /etc/llmrack | grep -E 'firewall|keepalived|answers' || true") == ""
    assert set(changes(fleet.play("deploy", *without)).values()) == {0}
