"""Promises of the roll, on three real systemd hosts: see lab.py. Two gates and four nodes with the fake backend, so
that each answer has one right text. The tests share one deployment, in order."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import lab, releases
from tests.lab.test_lab_fleet import LAB, ROOT, accepted, changes, on, run
from tests.lab.test_lab_fleet import pytestmark as needs_the_lab
from tests.processes import wait_for

pytestmark = [*needs_the_lab, pytest.mark.full]

ANSIBLE = str(Path(sys.executable).with_name("ansible-playbook"))
PLAIN_YET = ("lab2-a", "lab3-a", "lab3-b")  # where a roll from one host to the next stops at lab2
BOOT = "cat /proc/sys/kernel/random/boot_id"  # nspawn gives each boot of a container one
GATES = {"lab1": "http://198.18.0.11:8000", "lab2": "http://198.18.0.12:8000"}


class Fleet:
    """The deployed fleet, seen from inside the lab's network.

    instances: their names by host, a letter each.     extra: extra variables of every playbook.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.instances = {"lab1": "a", "lab2": "a", "lab3": "ab"}
        self.extra: dict[str, Any] = {}
        self.write()

    def write(self, model: dict[str, Any] | None = None, **settings: Any) -> None:
        """The inventory. `model`: more of its entry in the catalogue; `settings`: other variables than usual."""
        hosts = {
            host: {
                "ansible_host": address,
                "llmnode_instances": [
                    {"name": name, "model": "chaos", "port": 8100 + number}
                    for number, name in enumerate(self.instances[host])
                ],
            }
            for host, address in lab.ADDRESSES.items()
        }
        variables = {
            "ansible_user": "root",
            "ansible_ssh_common_args": "-F /run/llmrack-lab/ssh_config",
            "llmrack_models": {"chaos": {"src": str(ROOT / "llmnode/handbook/handbook.gguf"), **(model or {})}},
            "llmnode_settings": {
                "backend": "fake", "fake_step_delay_s": 0.05, "slots": 64, "n_ctx": 1024, "kv_cells": 65536,
            },
            "llmnode_drain_seconds": 5,
            "llmgate_settings": {"poll_interval_s": 0.5},
            "llmrack_artifacts_cache": str(self.folder / ".releases"),
            "llmrack_orchestrate_idle_seconds": 2,
            "llmrack_orchestrate_ready_seconds": 60,
            "llmrack_orchestrate_watch_seconds": 5,
        }  # fmt: skip
        groups = {"llmgate": {"hosts": dict.fromkeys(GATES)}, "llmnode": {"hosts": dict.fromkeys(hosts)}}
        inventory = {"all": {"vars": {**variables, **settings}, "hosts": hosts, "children": groups}}
        (self.folder / "hosts.yml").write_text(yaml.safe_dump(inventory))

    def command(self, name: str, *arguments: str, **extra: Any) -> list[str]:
        """The command line of a playbook, inside the network; `extra` are its extra variables."""
        given = ["-e", json.dumps({**self.extra, **extra})]
        return [*LAB, "exec", "--", ANSIBLE, "-i", str(self.folder), f"playbooks/{name}.yml", *given, *arguments]

    def play(self, name: str, *arguments: str, succeeds: bool = True, **extra: Any) -> str:
        done = run(*self.command(name, *arguments, **extra))
        assert (done.returncode == 0) is succeeds, f"{done.stdout[-8000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def secret(self, name: str) -> str:
        return (self.folder / ".secrets" / name).read_text().strip()

    def ask(self, gate: str, path: str, *arguments: str) -> Any:
        """A gate's answer as JSON; None while it has none."""
        key = f"Authorization: Bearer {self.secret('operator-key')}"
        done = run(*LAB, "exec", "--", "curl", "-sS", "-m", "10", "-H", key, *arguments, GATES[gate] + path)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def nodes(self, gate: str = "lab1") -> dict[str, dict[str, Any]]:
        seen = self.ask(gate, "/admin/nodes") or {"nodes": []}
        return {node["name"]: node for node in seen["nodes"]}

    def releases(self) -> set[str]:
        return {node["release"] for node in self.nodes().values()}

    def schemes(self) -> dict[str, str]:
        """How each node listens, as both gates say."""
        first, second = ({name: node["url"] for name, node in self.nodes(gate).items()} for gate in GATES)
        assert first == second
        return {name: url.partition(":")[0] for name, url in first.items()}

    def settled(self) -> bool:
        """Every node is used by every gate, and nobody has a lease."""
        views = [self.nodes(gate) for gate in GATES]
        expected = {f"{host}-{name}" for host, names in self.instances.items() for name in names}
        return all(set(view) == expected and all(node["usable"] for node in view.values()) for view in views)


@contextmanager
def load(
    fleet: Fleet, streams: int = 12, per_second: float = 4, gates: Iterable[str] = GATES
) -> Iterator[dict[str, Any]]:
    """Streams and plain requests at the gates meanwhile; when it is over, what became of them."""
    asked = {
        "gates": [GATES[gate] for gate in gates],
        "key": fleet.secret("client-key"), "operator": fleet.secret("operator-key"),
        "streams": streams, "per_second": per_second, "seed": 7,
    }  # fmt: skip
    command = [*LAB, "exec", "--", sys.executable, "-m", "tests.lab.streams", json.dumps(asked)]
    running = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = {}
    assert running.stdout
    try:
        assert running.stdout.readline() == "begun\n"
        yield result
    finally:
        told, _ = running.communicate(timeout=400)
        result.update(json.loads(told or "{}"))


def unnoticed(result: Mapping[str, Any], most_out: int = 1, gates: Iterable[str] = GATES) -> None:
    """Every answer came whole and was the right one, and never were more nodes kept from work than may be."""
    assert result["wrong"] == [], (len(result["wrong"]), result["wrong"][:5])
    assert result["answered"] > 20
    assert set(result["most_out"]) == {GATES[gate] for gate in gates}
    assert 1 <= max(result["most_out"].values()) <= most_out, result["most_out"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Hosts that had nothing on them, after one deployment. The lab is removed in the end."""
    accepted(run(*LAB, "down"))
    accepted(run(*LAB, "up"))
    try:
        accepted(run(*LAB, "fetch"))
        fleet = Fleet(tmp_path_factory.mktemp("inventory"))
        # What another checkout collects meanwhile takes the place of this one's in the cache.
        shutil.copytree(lab.Places.of(dict(os.environ)).cache.parent / "releases", fleet.folder / ".releases")
        fleet.play("deploy")
        wait_for(fleet.settled, "all nodes to be usable")
        yield fleet
    finally:
        accepted(run(*LAB, "down"))


@pytest.fixture(scope="module")
def first(fleet: Fleet) -> str:
    """The release that was deployed."""
    (release,) = fleet.releases()
    return release


def test_an_upgrade_under_load_is_not_noticed_and_a_second_one_changes_nothing(fleet: Fleet, first: str) -> None:
    releases.make_release("second", first)
    with load(fleet) as result:
        fleet.play("deploy", llmrack_artifacts_release="second")
    unnoticed(result)
    assert fleet.settled() and fleet.releases() == {"second"}
    assert on("lab3", "readlink /opt/llmrack/current /opt/llmrack/previous").split() == [
        f"{releases.FOLDER}/second", f"{releases.FOLDER}/{first}",
    ]  # fmt: skip
    again = fleet.play("deploy", llmrack_artifacts_release="second")
    assert changes(again) == dict.fromkeys(lab.ADDRESSES, 0)
    fleet.extra = {"llmrack_artifacts_release": "second"}


def test_a_release_that_answers_wrongly_is_taken_back_on_the_first_node(fleet: Fleet) -> None:
    canary = {"prompt": "A canary.", "max_tokens": 6}
    ask = ["-d", json.dumps({"model": "chaos", "temperature": 0, **canary}), "-H", "Content-Type: application/json"]
    right = fleet.ask("lab1", "/v1/completions", *ask)["choices"][0]["text"]
    fleet.write(model={"canary": {**canary, "expect": f"^{right}$"}})
    releases.make_release("wrong", "second", releases.ANSWERS_WRONGLY)
    boots = {name: node["boot"] for name, node in fleet.nodes().items()}
    with load(fleet) as result:
        said = " ".join(fleet.play("deploy", succeeds=False, llmrack_artifacts_release="wrong").split())
    unnoticed(result)
    assert "lab1-a was not rolled" in said and "lab1-a answers wrongly" in said
    assert "It was switched back to release second" in said
    after = fleet.nodes()
    assert fleet.settled() and fleet.releases() == {"second"}
    assert {name for name in after if after[name]["boot"] != boots[name]} == {"lab1-a"}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (releases.IS_NEVER_READY, "lab1-a is not ready: it is activating (start) after"),
        (releases.CRASHES_AT_ONCE, "lab1-a is not ready: it crashes again and again, the last time with"),
        (releases.CRASHES_UNDER_LOAD, "lab1-a crashed within 15 s under requests"),
    ],
    ids=["never ready", "crashes at once", "crashes under load"],
)
def test_a_release_that_does_not_hold_is_taken_back_on_the_first_node(fleet: Fleet, code: str, why: str) -> None:
    releases.make_release("bad", "second", code)
    boots = {name: node["boot"] for name, node in fleet.nodes().items()}
    fleet.write(llmrack_orchestrate_ready_seconds=20, llmrack_orchestrate_watch_seconds=15)
    with load(fleet) as result:
        said = " ".join(fleet.play("deploy", succeeds=False, llmrack_artifacts_release="bad").split())
    unnoticed(result)
    assert why in said and "It was switched back to release second" in said
    after = fleet.nodes()
    assert fleet.settled() and fleet.releases() == {"second"}
    assert {name for name in after if after[name]["boot"] != boots[name]} == {"lab1-a"}
    fleet.write()


def test_fifty_streams_and_twenty_requests_a_second_do_not_notice_an_upgrade_nor_a_rollback(fleet: Fleet) -> None:
    """Nodes go back first, then the gates; again, and nothing changes."""
    releases.make_release("third", "second")
    with load(fleet, streams=50, per_second=20) as result:
        fleet.play("deploy", llmrack_artifacts_release="third")
        assert fleet.releases() == {"third"}
        fleet.play("rollback")
    unnoticed(result)
    assert fleet.settled() and fleet.releases() == {"second"}
    assert {fleet.ask(gate, "/health")["release"] for gate in GATES} == {"second"}
    assert changes(fleet.play("rollback")) == dict.fromkeys(lab.ADDRESSES, 0)
    boots = {name: node["boot"] for name, node in fleet.nodes().items()}
    fleet.play("deploy")  # which may remove the release that nobody goes back to any more
    assert {name: node["boot"] for name, node in fleet.nodes().items()} == boots


def test_a_controller_that_dies_anywhere_leaves_a_fleet_that_serves_and_a_rerun_finishes(fleet: Fleet) -> None:
    dice = random.Random(11)
    of = "second"
    with load(fleet) as result:
        for number in range(5):
            name = f"after-{number}"
            releases.make_release(name, of)
            of = name
            running = subprocess.Popen(
                fleet.command("deploy", llmrack_artifacts_release=name), cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            assert running.stdout
            tasks = 0
            stop_at = dice.randrange(1, 120)
            for line in running.stdout:
                tasks += "Roll the nodes" in line or (tasks > 0 and line.startswith("TASK ["))
                if tasks > stop_at:
                    break
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            running.stdout.close()
            assert tasks > stop_at, "it was killed in the middle of the roll"
            fleet.play("deploy", llmrack_artifacts_release=name)
            assert fleet.settled() and fleet.releases() == {name}
    unnoticed(result)
    fleet.extra = {"llmrack_artifacts_release": of}


def test_what_an_operator_stopped_or_drained_is_left_alone(fleet: Fleet) -> None:
    fleet.write(model={"min_ready": 1})
    before = fleet.nodes()
    on("lab1", "systemctl stop llmnode@a")
    fleet.play("drain", "--limit", "lab2")
    said = " ".join(fleet.play("restart").split())
    assert "lab1-a is stopped by hand, and is left as it is" in said
    assert "lab2-a is drained by operator, and is left as it is" in said
    assert on("lab1", "systemctl is-active llmnode@a || true") == "inactive"
    after = fleet.nodes()
    assert after["lab2-a"]["boot"] == before["lab2-a"]["boot"] and after["lab2-a"]["lease"]["owner"] == "operator"
    assert all(after[name]["boot"] != before[name]["boot"] for name in ("lab3-a", "lab3-b"))
    table = fleet.play("status")
    assert re.search(r"lab1-a .*stopped by hand", table) and re.search(r"lab2-a .*operator \(stays\)", table)
    on("lab1", "systemctl start llmnode@a")
    fleet.play("undrain", "--limit", "lab2")
    wait_for(fleet.settled, "all nodes to be usable")
    fleet.write()


def test_a_reboot_takes_every_instance_of_a_host_out_and_brings_it_back(fleet: Fleet, tmp_path: Path) -> None:
    """The host of lab3, since it has no gate: those that have one would take the connections of its clients along."""
    (tmp_path / "tasks.yml").write_text(
        "- name: Note that it was done\n  ansible.builtin.command: {cmd: touch /root/upgraded}\n  changed_when: true\n"
    )
    boots = {host: on(host, BOOT) for host in lab.ADDRESSES}
    fleet.write(model={"min_ready": 2})
    before = fleet.nodes()
    with load(fleet) as result:
        fleet.play("reboot", "--limit", "lab3", llmrack_orchestrate_reboot_tasks=str(tmp_path / "tasks.yml"))
    unnoticed(result, most_out=2)
    assert {host for host in boots if on(host, BOOT) != boots[host]} == {"lab3"}
    after = fleet.nodes()
    assert {name for name in after if after[name]["boot"] != before[name]["boot"]} == {"lab3-a", "lab3-b"}
    assert fleet.settled() and on("lab3", "ls /root/upgraded")
    fleet.write()


def test_a_host_of_a_gate_reboots_and_the_other_gate_answers_meanwhile(fleet: Fleet) -> None:
    boot = on("lab1", BOOT)
    with load(fleet, gates=["lab2"]) as result:
        fleet.play("reboot", "--limit", "lab1")
    assert on("lab1", BOOT) != boot
    unnoticed(result, gates=["lab2"])
    wait_for(fleet.settled, "all nodes to be usable at both gates")


@pytest.mark.timeout(3000)  # three deployments on a machine that has better things to do
def test_mutual_tls_is_switched_on_and_off_under_load_and_stays_half_way_where_a_node_fails(fleet: Fleet) -> None:
    """On lab2 a node with a certificate does not start, until what keeps it from that is taken away."""
    dropin = "/etc/systemd/system/llmnode@a.service.d/override.conf"
    plain = "ExecStartPre=/bin/sh -c '! grep -q ^tls_cert_file /etc/llmrack/llmnode/a.toml'"
    on("lab2", f'printf "[Service]\\n%s\\n" "{plain}" > {dropin} && systemctl daemon-reload')
    fleet.write(llmrack_tls_nodes=True, llmrack_orchestrate_batches=[1])
    with load(fleet) as result:
        said = " ".join(fleet.play("deploy", succeeds=False).split())
        assert "lab2-a is not ready" in said and "takes requests. journalctl -u llmnode@a on lab2" in said
        assert fleet.settled() and fleet.schemes() == {"lab1-a": "https", **dict.fromkeys(PLAIN_YET, "http")}

        on("lab2", f"rm {dropin} && systemctl daemon-reload")
        fleet.play("deploy")
        assert fleet.settled() and set(fleet.schemes().values()) == {"https"}
        refused = run(*LAB, "exec", "--", "curl", "-sS", "-m", "10", "http://198.18.0.13:8100/health")
        assert refused.returncode != 0, refused.stdout

        fleet.write()
        fleet.play("deploy")
        assert fleet.settled() and set(fleet.schemes().values()) == {"http"}
    unnoticed(result)
    assert on("lab1", "grep -c ^node_ /etc/llmrack/llmgate.toml || true") == "0"


def test_a_deployment_after_the_switch_changes_nothing(fleet: Fleet) -> None:
    assert changes(fleet.play("deploy")) == dict.fromkeys(lab.ADDRESSES, 0)


def test_a_fleet_shrinks_and_grows_under_load(fleet: Fleet) -> None:
    whole = dict(fleet.instances)
    with load(fleet) as result:
        fleet.instances = {"lab1": "a", "lab2": "a", "lab3": ""}
        fleet.write()
        fleet.play("deploy")
        assert fleet.settled()
        assert on("lab3", "systemctl is-active llmnode@a llmnode@b || true").split() == ["inactive", "inactive"]
        fleet.instances = whole
        fleet.write()
        fleet.play("deploy")
        assert fleet.settled()
    unnoticed(result)


def test_a_model_is_replaced_by_another_version_under_load(fleet: Fleet, tmp_path: Path) -> None:
    """Some nodes have the old file meanwhile, and some the new one."""
    other = tmp_path / "other.gguf"
    other.write_bytes((ROOT / "llmnode/handbook/handbook.gguf").read_bytes() + b"\0")
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    before = fleet.nodes()
    fleet.write(model={"src": str(other)})
    with load(fleet) as result:
        fleet.play("deploy")
    unnoticed(result)
    after = fleet.nodes()
    assert fleet.settled() and all(after[name]["boot"] != before[name]["boot"] for name in before)
    for host in lab.ADDRESSES:
        (path,) = re.findall(r'^model = "(.*)"$', on(host, "cat /etc/llmrack/llmnode/a.toml"), re.MULTILINE)
        assert on(host, f"sha256sum {path}").startswith(digest)
    fleet.write()
    fleet.play("deploy")
    assert fleet.settled()


def test_a_disk_that_is_too_full_for_a_model_is_told_and_every_node_goes_on(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "big.gguf").write_bytes(bytes(8 << 20))
    boots = {name: node["boot"] for name, node in fleet.nodes().items()}
    on("lab2", "mount -t tmpfs -o size=4m tmpfs /srv/llmrack")
    try:
        fleet.write(model={"src": str(tmp_path / "big.gguf")})
        said = " ".join(fleet.play("deploy", succeeds=False).split())
    finally:
        on("lab2", "umount /srv/llmrack")
        fleet.write()
    assert re.search(r"/srv/llmrack\S* has .* free, but chaos needs", said)
    assert fleet.settled() and {name: node["boot"] for name, node in fleet.nodes().items()} == boots
    assert changes(fleet.play("deploy")) == dict.fromkeys(lab.ADDRESSES, 0)


def test_a_vault_without_its_password_stops_a_deployment_before_it_begins(fleet: Fleet, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("of the vault")
    tool = str(Path(ANSIBLE).with_name("ansible-vault"))
    secret = run(tool, "encrypt_string", "--vault-password-file", str(password), fleet.secret("operator-key"))
    vault = fleet.folder / "group_vars" / "all.yml"
    vault.parent.mkdir()
    vault.write_text(f"llmrack_orchestrate_operator_key: {accepted(secret)}")
    try:
        refused = run(*fleet.command("deploy"))
        assert refused.returncode != 0 and "no vault secrets found" in refused.stdout + refused.stderr
        assert changes(fleet.play("deploy", "--vault-password-file", str(password))) == dict.fromkeys(lab.ADDRESSES, 0)
    finally:
        shutil.rmtree(vault.parent)


def test_a_killed_gate_is_back_for_the_next_request(fleet: Fleet) -> None:
    process = on("lab1", "systemctl show --value -p MainPID llmgate")
    on("lab1", "systemctl kill --signal=KILL llmgate")
    wait_for(lambda: "release" in (fleet.ask("lab1", "/health") or {}), "the gate on lab1")
    assert on("lab1", "systemctl show --value -p MainPID llmgate") != process
    wait_for(fleet.settled, "all nodes to be usable")


def test_a_host_that_loses_power_during_a_roll_is_left_out_and_told_of(fleet: Fleet) -> None:
    fleet.write(model={"min_ready": 1}, llmrack_orchestrate_batches=[1])
    releases.make_release("fourth", fleet.extra["llmrack_artifacts_release"])
    with load(fleet) as result:
        running = subprocess.Popen(
            fleet.command("deploy", llmrack_artifacts_release="fourth"), cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert running.stdout
        said = ""
        for line in running.stdout:
            said += line
            if "Take the lease on every gate" in line and "fatal" not in said:
                break
        accepted(run(*LAB, "off", "lab3"))
        said += running.stdout.read()
        assert running.wait() == 0, said[-6000:]
    unnoticed(result, most_out=3)  # the two that have no power are among them
    assert "lab3 did not answer to SSH; run the playbook again" in " ".join(said.split())
    nodes = fleet.nodes()
    assert {name: node["release"] for name, node in nodes.items() if node["usable"]} == {
        "lab1-a": "fourth", "lab2-a": "fourth",
    }  # fmt: skip
    accepted(run(*LAB, "on", "lab3"))
    fleet.play("deploy", llmrack_artifacts_release="fourth")
    assert fleet.settled() and fleet.releases() == {"fourth"}
