"""Promises of a fleet with TLS everywhere, of its backup and of its removal; in order, on one lab (lab.py).

Secrets, the authority and backups are in a folder of the test's own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.test_lab_fleet import LAB, accepted, changes, on, run
from tests.lab.test_lab_fleet import pytestmark as lab_marks
from tests.processes import wait_for

pytestmark = [*lab_marks, pytest.mark.full]

GATE = "https://198.18.0.11:8000"
QUIET = {"lab1": 0, "lab2": 0, "lab3": 0}
DROPIN = "/etc/systemd/system/llmnode@main.service.d/override.conf"
FILES = (  # but those that Ansible, Python and the tools for users leave behind
    "find /etc /opt /srv /usr /root -xdev -type f"
    " | grep -v -e __pycache__ -e /[.]ansible -e '^/etc/[a-z]*-$' -e '^/etc/[.]pwd[.]lock$' | sort"
)
NAMES = "cut -d: -f1 /etc/passwd /etc/group | sort"


class Door:
    """The fleet, with mutual TLS between gate and nodes and the internal authority's certificate at the door."""

    def __init__(self, folder: Path) -> None:
        self.secrets, self.backups, self.given = folder / "secrets", folder / "backups", folder / "given.json"
        self.authority = self.secrets / "ca/ca.crt"
        self.say()

    def say(self, **variables: Any) -> None:
        """What the inventory says, from now on."""
        given = {
            "llmrack_secrets_dir": str(self.secrets),
            "llmrack_backup_dir": str(self.backups),
            "llmgate_tls": "internal",
            "llmrack_tls_nodes": True,
            **variables,
        }
        self.given.write_text(json.dumps(given))

    def deploy(self, *arguments: str) -> str:
        return accepted(run(*LAB, "deploy", "-e", f"@{self.given}", *arguments))

    def play(self, name: str, *arguments: str, succeeds: bool = True) -> str:
        ansible = str(Path(sys.executable).with_name("ansible-playbook"))
        command = [ansible, "-i", "inventory/lab", f"playbooks/{name}.yml", "-e", f"@{self.given}", *arguments]
        done = run(*LAB, "exec", "--", *command)
        assert (done.returncode == 0) is succeeds, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def curl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(*LAB, "exec", "--", "curl", "-sS", "-m", "20", *arguments)

    def key(self, name: str = "client-key") -> str:
        return f"Authorization: Bearer {(self.secrets / name).read_text().strip()}"

    def ask(self) -> dict[str, Any]:
        body = json.dumps({"model": "handbook", "prompt": "What is a slot?", "max_tokens": 4})
        sent = ["--cacert", str(self.authority), "-H", self.key(), "-H", "Content-Type: application/json", "-d", body]
        return json.loads(accepted(self.curl(*sent, f"{GATE}/v1/completions")))

    def nodes(self) -> dict[str, Any]:
        told = self.curl("--cacert", str(self.authority), "-H", self.key("operator-key"), f"{GATE}/admin/nodes")
        return {node["name"]: node for node in json.loads(told.stdout)["nodes"]} if told.returncode == 0 else {}

    def all_usable(self) -> bool:
        nodes = self.nodes()
        return len(nodes) == 2 and all(node["usable"] for node in nodes.values())


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    accepted(run(*LAB, "down"))
    accepted(run(*LAB, "up"))
    door = Door(tmp_path_factory.mktemp("door"))
    try:
        on("lab2", f"{FILES} > /tmp/files; {NAMES} > /tmp/names")
        door.deploy()
        yield door
    finally:
        accepted(run(*LAB, "down"))


def test_a_request_over_https_is_answered_and_no_other_way_is_open(door: Door) -> None:
    wait_for(door.all_usable, "both nodes to be usable")
    assert door.ask()["usage"]["completion_tokens"] > 0
    assert door.curl("-H", door.key(), f"{GATE}/v1/models").returncode == 60, "an authority that curl does not know"
    assert door.curl(f"{GATE.replace('https', 'http')}/health").returncode != 0
    assert all(node["url"].startswith("https://") for node in door.nodes().values())


def test_a_node_refuses_who_shows_no_certificate_of_the_fleet(door: Door) -> None:
    url = "https://198.18.0.12:8100/health"
    refused = door.curl("--cacert", str(door.authority), url)
    assert refused.returncode != 0 and refused.stdout == ""
    pair = "--cacert /etc/llmrack/tls/ca.crt --cert /etc/llmrack/tls/host.crt --key /etc/llmrack/tls/host.key"
    assert on("lab1", f"curl -sS {pair} -o /dev/null -w '%{{http_code}}' {url}") == "200"


def test_a_second_deployment_changes_nothing_and_neither_does_a_check(door: Door) -> None:
    assert changes(door.deploy()) == QUIET
    assert changes(door.deploy("--check", "--diff")) == QUIET


def test_private_keys_stay_where_they_were_made(door: Door) -> None:
    keys = [on(host, "cat /etc/llmrack/tls/host.key") for host in QUIET]
    assert len(set(keys)) == 3
    assert sorted(path.name for path in door.secrets.rglob("*") if path.is_file() and "ca" in path.name) == [
        "ca.crt", "ca.key",
    ]  # fmt: skip
    own = (door.secrets / "ca/ca.key").read_text().split()[5]
    for host in QUIET:
        assert on(host, "stat -c '%a %U %G' /etc/llmrack/tls/host.key") == "640 root llmrack"
        assert on(host, f"grep -rlF -e '{own}' /etc /opt/llmrack/current/ /var/lib /srv /root /tmp || true") == ""
        assert on(host, "setpriv --reuid nobody --clear-groups cat /etc/llmrack/tls/host.key 2>&1 || true").endswith(
            "Permission denied"
        )


def test_a_node_beside_a_gate_cannot_read_the_doors_key(door: Door) -> None:
    on("lab2", "touch /etc/llmrack/door/tls.key && chown root:llmrack /etc/llmrack/door/tls.key")
    inside = "nsenter --mount --target $(systemctl show --value -p MainPID llmnode@main) setpriv --reuid llmrack"
    seen = on("lab2", f"{inside} --regid llmrack --clear-groups cat /etc/llmrack/door/tls.key 2>&1 || true")
    assert "Permission denied" in seen
    on("lab2", "rm /etc/llmrack/door/tls.key")


def test_certificates_are_renewed_without_a_restart(door: Door) -> None:
    wait_for(door.all_usable, "both nodes to be usable")
    boots = {name: node["boot"] for name, node in door.nodes().items()}
    process = on("lab1", "systemctl show --value -p MainPID llmgate")
    shows = "openssl s_client -connect 127.0.0.1:{} </dev/null 2>/dev/null | openssl x509 -noout -serial"
    old = [on("lab1", shows.format(8000)), on("lab2", shows.format(8100))]
    door.say(llmrack_tls_days=500, llmrack_tls_renew_days=400)
    door.deploy()
    wait_for(lambda: on("lab1", shows.format(8000)) != old[0], "the gate's new certificate")
    wait_for(lambda: on("lab2", shows.format(8100)) != old[1], "the node's new certificate")
    assert door.ask()["usage"]["completion_tokens"] > 0
    assert {name: node["boot"] for name, node in door.nodes().items()} == boots
    assert on("lab1", "systemctl show --value -p MainPID llmgate") == process


def test_a_fleet_that_was_removed_comes_back_from_its_backup_with_the_same_keys(door: Door) -> None:
    create = "/opt/llmrack/current/bin/llmgate keys create alice --config /etc/llmrack/llmgate.toml"
    alice = on("lab1", f"runuser -u llmrack -- {create}").split()[-1]
    certificate = door.authority.read_text()
    saved = door.play("backup")
    name = re.search(r"The backup is in \S*/(\S+?)\. ", " ".join(saved.split()))
    assert name, saved
    assert (door.backups / name[1] / "gates/lab1.db").stat().st_mode & 0o777 == 0o600
    secrets = [path.read_text().strip() for path in door.secrets.iterdir() if path.is_file()]
    assert not [secret for secret in secrets if secret in saved]

    on("lab2", f"printf '[Service]\\nNice=5\\n' > {DROPIN}")
    assert "If that is meant" in " ".join(door.play("remove", succeeds=False).split())
    door.play("remove", "--limit", "lab2", "-e", "llmrack_remove_confirmed=true")
    assert on("lab3", "systemctl is-active llmnode@main") == "active"
    assert on("lab2", "stat -c '%U %a' /var/lib/llmrack/llmnode/main") == "llmrack 700"
    gone = ["-e", "llmrack_remove_confirmed=true", "-e", "llmrack_remove_data=true"]
    door.play("remove", *gone)
    left = on("lab2", f"{FILES} | comm -13 /tmp/files -")
    assert {re.sub(r"handbook-\w+", "handbook", path) for path in left.splitlines()} == {
        DROPIN, "/srv/llmrack/models/handbook.gguf", "/srv/llmrack/models/handbook.gguf.stamp",
    }  # fmt: skip
    ours = "/etc/llmrack /opt/llmrack /var/lib/llmrack /var/cache/llmrack"
    assert on("lab2", f"ls -d {ours} 2>/dev/null || true") == ""
    assert on("lab2", f"{NAMES} | comm -13 /tmp/names -") == ""
    assert on("lab1", "systemctl list-units --all --plain --no-legend 'llm*'") == ""
    assert changes(door.play("remove", *gone)) == QUIET

    for path in sorted(door.secrets.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    named = ["-e", f"llmrack_backup_name={name[1]}"]
    door.play("restore", "--tags", "secrets", *named)
    assert door.authority.read_text() == certificate
    door.deploy()
    door.play("restore", *named)
    assert changes(door.play("restore", *named)) == QUIET
    wait_for(door.all_usable, "both nodes to be usable")
    assert door.ask()["usage"]["completion_tokens"] > 0
    bearer = ["-H", f"Authorization: Bearer {alice}", "-o", "/dev/null", "-w", "%{http_code}"]
    wait_for(
        lambda: door.curl("--cacert", str(door.authority), *bearer, f"{GATE}/v1/models").stdout == "200",
        "the gate to know a key from before",
    )
    assert changes(door.deploy()) == QUIET
