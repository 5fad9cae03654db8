"""Promises of a deployed fleet, on three real systemd hosts: see lab.py. The tests share one deployment, in order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab import lab, releases
from tests.processes import wait_for

ROOT = Path(__file__).resolve().parents[2]
LAB = [sys.executable, str(ROOT / "tests/lab/lab.py")]
SECRETS = ROOT / "inventory/lab/.secrets"
GATE = "http://198.18.0.11:8000"
NODES = {"lab2-main": "lab2", "lab3-main": "lab3"}

TOO_NEW = lab.too_new(platform.libc_ver()[1])

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab boots containers, which takes root"),
    pytest.mark.skipif(bool(TOO_NEW), reason=TOO_NEW),
    pytest.mark.skipif(
        bool(lab.missing_packages()), reason=f"missing: {', '.join(lab.missing_packages())} (`lab.py prepare`)"
    ),
]


def run(*command: str, patience_s: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=patience_s
    )


def on(host: str, command: str) -> str:
    done = run(*LAB, "ssh", host, command)
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout.strip()


def deploy(*arguments: str) -> str:
    return accepted(run(*LAB, "deploy", *arguments))


def play(name: str, *arguments: str, succeeds: bool = True) -> str:
    ansible = str(Path(sys.executable).with_name("ansible-playbook"))
    done = run(*LAB, "exec", "--", ansible, "-i", "inventory/lab", f"playbooks/{name}.yml", *arguments)
    assert (done.returncode == 0) is succeeds, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def accepted(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def changes(output: str) -> dict[str, int]:
    """Host -> number of changed tasks, from a play's recap."""
    recap = output[output.index("PLAY RECAP") :]
    return {host: int(count) for host, count in re.findall(r"^(\S+)\s+:.*?changed=(\d+)", recap, re.MULTILINE)}


@contextmanager
def asking() -> Iterator[dict[str, Any]]:
    """Ask the gate without end, and say how it went when it is over."""
    key = (SECRETS / "client-key").read_text().strip()
    load = subprocess.Popen(
        [*LAB, "exec", "--", sys.executable, str(ROOT / "tests/lab/load.py"), GATE, key, "handbook", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    result: dict[str, Any] = {}
    try:
        yield result
    finally:
        told, _ = load.communicate(timeout=150)
        result.update(json.loads(told))


@dataclasses.dataclass
class Fleet:
    """The deployed fleet, seen from inside the lab's network."""

    output: str  # of the first deployment

    def get(self, path: str, key: str = "operator-key") -> dict[str, Any] | None:
        secret = (SECRETS / key).read_text().strip()
        done = run(*LAB, "exec", "--", "curl", "-sS", "-m", "10", "-H", f"Authorization: Bearer {secret}", GATE + path)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def nodes(self) -> dict[str, dict[str, Any]]:
        seen = self.get("/admin/nodes")
        return {node["name"]: node for node in seen["nodes"]} if seen else {}

    def all_usable(self) -> bool:
        nodes = self.nodes()
        return set(nodes) == set(NODES) and all(node["usable"] for node in nodes.values())


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Hosts that had nothing on them, after one deployment. The lab is removed in the end."""
    accepted(run(*LAB, "down"))
    accepted(run(*LAB, "up"))
    try:
        yield Fleet(deploy())
    finally:
        accepted(run(*LAB, "down"))


def test_the_curl_that_a_deployment_prints_streams_an_answer(fleet: Fleet) -> None:
    printed = re.search(r"curl -N .*?\}'", fleet.output, re.DOTALL)
    assert printed, fleet.output[-2000:]
    answer = accepted(run(*LAB, "exec", "--", "sh", "-c", printed[0]))
    events = [line for line in answer.splitlines() if line.startswith("data: ")]
    assert len(events) > 3 and events[-1] == "data: [DONE]"
    assert "chat.completion.chunk" in events[0]


def test_a_second_deployment_changes_nothing_and_a_drop_in_of_the_operators_survives_it(fleet: Fleet) -> None:
    boots = {name: node["boot"] for name, node in fleet.nodes().items()}
    dropin = "/etc/systemd/system/llmnode@main.service.d/override.conf"
    on("lab2", f"printf '[Service]\\nNice=5\\n' > {dropin} && systemctl daemon-reload")
    assert changes(deploy()) == {"lab1": 0, "lab2": 0, "lab3": 0}
    assert {name: node["boot"] for name, node in fleet.nodes().items()} == boots
    shown = on("lab2", "systemctl show -p Nice -p Slice llmnode@main").splitlines()
    assert set(shown) == {"Nice=5", "Slice=llmrack.slice"}
    on("lab2", f"rm {dropin} && systemctl daemon-reload")


@pytest.mark.full
def test_check_mode_works_on_a_deployed_fleet(fleet: Fleet) -> None:
    assert changes(deploy("--check", "--diff")) == {"lab1": 0, "lab2": 0, "lab3": 0}


@pytest.mark.full
def test_a_limited_deployment_does_not_shorten_the_gates_list(fleet: Fleet) -> None:
    assert changes(deploy("--limit", "lab1"))["lab1"] == 0
    assert set(fleet.nodes()) == set(NODES)


def test_secrets_stay_out_of_the_output_and_of_the_units(fleet: Fleet) -> None:
    secrets = [path.read_text().strip() for path in SECRETS.iterdir()]
    assert len(secrets) == 3 and all(len(secret) >= 24 for secret in secrets)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in SECRETS.iterdir())
    shown = fleet.output + on("lab2", "systemctl show llmnode@main; journalctl -u llmnode@main")
    shown += on("lab1", "systemctl show llmgate; journalctl -u llmgate; cat /etc/llmrack/*.toml")
    assert not [secret for secret in secrets if secret in shown]
    assert on("lab2", "stat -c '%a %U' /etc/llmrack/fleet-token") == "600 root"


@pytest.mark.parametrize(("host", "unit"), [("lab1", "llmgate"), ("lab2", "llmnode@main")])
def test_the_units_are_locked_down_on_the_host(fleet: Fleet, host: str, unit: str) -> None:
    said = on(host, f"systemd-analyze security --no-pager {unit} | tail -1")
    score = re.search(r"([\d.]+) OK", said)
    assert score and float(score[1]) <= 1.6, said
    assert on(host, f"stat -c %U /proc/$(systemctl show --value -p MainPID {unit})") == "llmrack"


@pytest.mark.parametrize(
    ("host", "unit", "state"), [("lab1", "llmgate", "llmgate"), ("lab2", "llmnode@main", "llmnode/main")]
)
def test_the_service_user_can_write_its_own_state_and_nothing_else(
    fleet: Fleet, host: str, unit: str, state: str
) -> None:
    """Seen from inside of the service's own mounts, with its user; /proc, /sys and /dev have no files of a disk."""
    inside = (
        f"nsenter --mount --target $(systemctl show --value -p MainPID {unit}) setpriv --reuid llmrack --regid llmrack"
    )
    search = "find / -regex '/\\(proc\\|sys\\|dev\\)' -prune -o \\( -type d -o -type f \\) -writable -print"
    writable = set(on(host, f"{inside} --clear-groups {search} 2>/dev/null || true").splitlines())
    own = f"/var/lib/llmrack/{state}"
    assert own in writable
    others = {path for path in writable if not f"{path}/".startswith((f"{own}/", "/tmp/", "/var/tmp/"))}
    assert not others, on(
        host, f"nsenter --mount --target $(systemctl show --value -p MainPID {unit}) cat /proc/self/mounts"
    )


def test_preflight_names_who_has_a_port(fleet: Fleet) -> None:
    """That it finds nothing on a deployed fleet, the second deployment has shown, which begins with it."""
    refused = play("preflight", "-e", "llmgate_port=22", succeeds=False)
    assert re.search(r"lab1: port 22 of llmgate is taken by ssh\S*", refused)


def test_a_killed_node_comes_back_and_the_gate_notices_both_ways(fleet: Fleet) -> None:
    wait_for(fleet.all_usable, "both nodes to be usable")
    before = fleet.nodes()["lab2-main"]["boot"]
    since = on("lab1", "date +'%F %T'")
    on("lab2", "systemctl kill --signal=KILL llmnode@main")
    wait_for(lambda: fleet.all_usable() and fleet.nodes()["lab2-main"]["boot"] != before, "lab2-main to come back")
    assert on("lab2", "systemctl is-active llmnode@main") == "active"
    log = on("lab1", f"journalctl -u llmgate -o cat --since '{since}'")
    assert "node lab2-main takes no work" in log and "node lab2-main is up" in log


def test_a_drained_node_gets_no_requests_until_it_is_undrained(fleet: Fleet) -> None:
    play("drain", "--limit", "lab2")
    node = fleet.nodes()["lab2-main"]
    assert not node["usable"] and node["lease"]["owner"] == "operator" and node["lease"]["ttl_seconds"] is None
    table = play("status")
    assert re.search(r"lab2-main\s+.*operator \(stays\)", table)
    assert "drifted" not in table
    play("undrain", "--limit", "lab2")
    wait_for(fleet.all_usable, "lab2-main to be usable again")


def test_an_upgrade_is_not_noticed_by_who_asks_meanwhile(fleet: Fleet) -> None:
    wait_for(fleet.all_usable, "both nodes to be usable")
    before = fleet.nodes()
    (first,) = {node["release"] for node in before.values()}
    releases.make_release("next", first)
    with asking() as result:
        deploy("-e", "llmrack_artifacts_release=next")
    assert result["failed"] == [], result
    assert result["answered"] > 20
    upgraded = fleet.nodes()
    assert {node["release"] for node in upgraded.values()} == {"next"}
    assert all(before[name]["boot"] != upgraded[name]["boot"] for name in NODES)
    assert all(node["lease"] is None for node in upgraded.values())


@pytest.mark.full
def test_its_rollback_is_not_noticed_either(fleet: Fleet) -> None:
    upgraded = fleet.nodes()
    with asking() as result:
        play("rollback")
    assert result["failed"] == [], result
    assert result["answered"] > 20
    after = fleet.nodes()
    assert not {node["release"] for node in after.values()} & {node["release"] for node in upgraded.values()}
    assert all(after[name]["boot"] != upgraded[name]["boot"] and after[name]["lease"] is None for name in NODES)


@pytest.mark.full
def test_the_gate_is_reloaded_and_restarted_while_requests_are_answered(fleet: Fleet) -> None:
    wait_for(fleet.all_usable, "both nodes to be usable")
    process = on("lab1", "systemctl show --value -p MainPID llmgate")
    before = fleet.get("/health")
    with asking() as result:
        deploy("--limit", "lab1", "-e", json.dumps({"llmgate_settings": {"workers": 2}}))
        reloaded = fleet.get("/health")
        assert before and reloaded and reloaded["generation"] == before["generation"] + 1
        assert on("lab1", "systemctl show --value -p MainPID llmgate") == process
        assert "2 of 2 workers" in on("lab1", "systemctl show --value -p StatusText llmgate")
        on("lab1", "systemctl restart llmgate")
        assert on("lab1", "systemctl show --value -p MainPID llmgate") != process
        restarted = fleet.get("/health")
        assert restarted and restarted["generation"] == 1
        assert changes(deploy("--limit", "lab1"))["lab1"] > 0
    assert result["failed"] == [], result
    assert result["answered"] > 20
    assert on("lab1", "systemctl is-active llmgate llmgate.socket") == "active\nactive"


@pytest.mark.full
def test_the_gate_moves_to_another_port_and_back(fleet: Fleet) -> None:
    deploy("--limit", "lab1", "-e", "llmgate_port=8001")
    assert "0.0.0.0:8001" in on("lab1", "ss -Hltn")
    assert "0.0.0.0:8000" not in on("lab1", "ss -Hltn")
    deploy("--limit", "lab1")
    wait_for(fleet.all_usable, "both nodes to be usable")


@pytest.mark.full
def test_a_model_behind_a_url_leaves_its_source_once_and_comes_whole_or_not_at_all(
    fleet: Fleet, tmp_path: Path
) -> None:
    body = os.urandom(3 << 20)
    (tmp_path / "m.gguf").write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    record = tmp_path / "sent"
    web = subprocess.Popen(
        [*LAB, "exec", "--", sys.executable, str(ROOT / "tests/lab/web.py"), "198.18.0.1", "8080", tmp_path, record]
    )

    def placed(succeeds: bool = True, **entry: str) -> str:
        model = {"url": "http://198.18.0.1:8080/m.gguf", **entry}
        given = {
            "llmrack_models": {"m": model},
            "llmrack_model_wanted": ["m"],
            "llmrack_model_lock": f"{tmp_path}/lock",
        }
        return play("model", "-e", json.dumps(given), succeeds=succeeds)

    def on_hosts() -> list[str]:
        return [
            on(host, "cd /srv/llmrack/models && sha256sum m-* 2>/dev/null | grep -v stamp || true")
            for host in NODES.values()
        ]

    try:
        wait_for(record.exists, "the web server")
        assert "but m must have " + "0" * 64 in " ".join(placed(succeeds=False, sha256="0" * 64).split())
        assert on_hosts() == ["", ""]
        (tmp_path / "breaks").write_text("6")
        record.write_text("")
        assert "could not be fetched" in " ".join(placed(succeeds=False, sha256=digest).split())
        assert on_hosts() == ["", ""]
        placed(sha256=digest)
        assert all(line.startswith(digest) for line in on_hosts()), on_hosts()
        assert sum(map(int, record.read_text().split())) == len(body), "it left its source once, broken off or not"
        assert set(changes(placed(sha256=digest)).values()) == {0}
    finally:
        web.terminate()
        web.wait()


@pytest.mark.full
def test_a_host_without_power_boots_from_its_disk_and_without_its_disk_from_the_image(fleet: Fleet) -> None:
    on("lab3", "echo kept > /root/kept")
    accepted(run(*LAB, "off", "lab3"))
    assert run(*LAB, "ssh", "lab3", "true").returncode != 0
    accepted(run(*LAB, "on", "lab3"))
    assert on("lab3", "cat /root/kept") == "kept"
    wait_for(lambda: on("lab3", "systemctl is-active llmnode@main || true") == "active", "the node to be back")
    accepted(run(*LAB, "off", "lab3", "--wipe"))
    accepted(run(*LAB, "on", "lab3"))
    assert on("lab3", "ls /root/kept /opt/llmrack 2>/dev/null || true") == ""


def test_down_leaves_nothing_behind(fleet: Fleet) -> None:
    places = lab.Places.of(dict(os.environ))
    processes = [lab.process_of(host, places) for host in lab.ADDRESSES]
    assert all(processes)
    accepted(run(*LAB, "down"))
    assert not [process for process in processes if process and process.alive]
    assert not [name for name in lab.namespaces() if name.startswith("llmrack-")]
    assert "llmrack-lab" not in Path("/proc/self/mounts").read_text()
    assert not [group for host in lab.ADDRESSES for group in lab.cgroups_of(host) if group.exists()]
    assert not places.run.exists()
    assert run(*LAB, "ssh", "lab1", "true").returncode == 1
