"""Promises of what the roll keeps of an instance, and of how it waits for one: instance.py, on a host made of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.roles import programs

SCRIPT = programs.ROLES / "llmrack_orchestrate/files/instance.py"
ACTIVE = {"ActiveState": "active", "SubState": "running", "LoadState": "loaded", "UnitFileState": "enabled",
          "MainPID": "7", "NRestarts": "0", "Result": "success", "ExecMainStatus": "0"}  # fmt: skip


class Host:
    """A root folder with releases r1 and r2, and a systemctl that tells states one after another, the last for ever."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.states = root / "states"
        tools = root / "tools"
        tools.mkdir()
        (tools / "systemctl").write_text(
            f"#!{sys.executable}\nimport pathlib\nat = pathlib.Path({str(self.states)!r})\n"
            "first, _, rest = at.read_text().partition('---\\n')\nprint(first)\nrest and at.write_text(rest)\n"
        )
        (tools / "journalctl").write_text("#!/bin/sh\necho first line\necho out of memory\n")
        for tool in tools.iterdir():
            tool.chmod(0o755)
        for release in ("r1", "r2"):
            (root / "opt/llmrack/releases" / release).mkdir(parents=True)
            (root / "opt/llmrack/releases" / release / ".complete").touch()
        self.unit = root / "etc/systemd/system/llmnode@.service"
        self.devices = root / "etc/systemd/system/llmnode@a.service.d/10-llmrack.conf"
        self.settings = root / "etc/llmrack/llmnode/a.toml"
        for path in (self.unit, self.devices, self.settings):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.is_now({})

    def is_now(self, *changes: dict[str, str]) -> None:
        """What systemctl says of the unit, at one question after the other."""
        states = ["".join(f"{name}={value}\n" for name, value in {**ACTIVE, **change}.items()) for change in changes]
        self.states.write_text("---\n".join(states))

    def install(self, release: str, words: str) -> None:
        """What a deployment writes of the instance `a`."""
        for path in (self.unit, self.devices, self.settings):
            path.write_text(f"{path.name} {words}")
        self.settings.chmod(0o640)
        link = self.root / "opt/llmrack/instances/a"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(f"/opt/llmrack/releases/{release}")

    def installed(self) -> tuple[str, list[str]]:
        """The release that the link names, and what stands in the unit, the drop-in and the settings."""
        link = self.root / "opt/llmrack/instances/a"
        release = link.readlink().name if link.is_symlink() else ""
        return release, [p.read_text() if p.exists() else "" for p in (self.unit, self.devices, self.settings)]

    def do(self, verb: str, refused: bool = False, **asked: Any) -> dict[str, Any]:
        given = {"name": "a"} if verb != "look" else {"names": ["a"]}
        given |= {"root": str(self.root)} if verb != "await" else {}
        environment = {**os.environ, "PATH": f"{self.root}/tools:{os.environ['PATH']}"}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), verb], input=json.dumps(given | asked), env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == int(refused), done.stderr + done.stdout
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def look(self) -> dict[str, Any]:
        found: dict[str, Any] = self.do("look")["a"]
        return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_all_that_an_instance_had_comes_back(host: Host) -> None:
    host.install("r1", "old")
    before = host.installed(), host.look()["config"], host.settings.stat().st_mode
    host.do("save")
    host.install("r2", "new")
    said = {"existed": True, "release": "r1", "config": before[1], "scheme": "http"}
    assert host.do("restore", kept="undo") == said
    assert (host.installed(), host.look()["config"], host.settings.stat().st_mode) == before
    host.do("drop")
    assert not host.look()["unfinished"]


def test_whether_an_instance_listens_with_tls_is_read_from_its_settings(host: Host) -> None:
    assert host.look()["scheme"] == host.look()["before"]["scheme"] == ""
    host.install("r1", "")
    host.settings.write_text('tls_cert_file = "/etc/llmrack/tls/host.crt"\n')
    host.do("save")
    host.install("r2", "")
    host.settings.write_text("port = 8100\n")
    host.do("commit")
    assert host.look()["scheme"] == "http" and host.look()["before"]["scheme"] == "https"


def test_a_roll_that_was_interrupted_goes_back_to_what_was_before_it(host: Host) -> None:
    host.install("r1", "old")
    host.do("save")
    host.install("r2", "half")
    assert host.look()["unfinished"]
    assert host.do("save") == {"changed": False}
    host.do("restore", kept="undo")
    assert host.installed()[0] == "r1" and "old" in host.installed()[1][2]


def test_an_instance_that_was_not_there_is_gone_again_and_leaves_the_unit_of_the_others(host: Host) -> None:
    host.unit.write_text("shared")
    host.do("save")
    host.install("r2", "new")
    assert host.do("restore", kept="undo")["existed"] is False
    assert host.installed() == ("", ["shared", "", ""])


def test_a_rollback_goes_to_the_release_before_and_not_to_the_settings_before(host: Host) -> None:
    for release, words in (("r1", "one"), ("r2", "two"), ("r2", "three")):
        host.do("save")
        host.install(release, words)
        host.do("commit")
    assert host.look()["before"]["release"] == "r1"
    host.do("save", target="before")
    host.do("restore", kept="before")
    assert host.installed()[0] == "r1" and "one" in host.installed()[1][2]
    assert host.look()["before"]["release"] == "r1", "interrupted here, it must not go forward again"
    assert host.do("save", target="before") == {"changed": False}
    host.do("drop")
    assert host.look()["before"]["release"] == "r1" and not host.look()["unfinished"]


def test_a_rollback_from_half_a_roll_goes_to_what_that_began_with(host: Host) -> None:
    host.install("r1", "old")
    host.do("save", target="inventory")
    host.install("r2", "half")
    assert host.look()["before"]["release"] == "r1"
    host.do("save", target="before")
    host.do("restore", kept="before")
    assert host.installed()[0] == "r1" and "old" in host.installed()[1][2]


def test_a_release_that_was_removed_is_refused_before_anything_is_touched(host: Host) -> None:
    host.install("r1", "old")
    host.do("save")
    host.install("r2", "new")
    (host.root / "opt/llmrack/releases/r1/.complete").unlink()
    said = host.do("restore", refused=True, kept="undo")
    assert said == {"error": "a had release r1, which is not on this host any more"}
    assert host.installed()[0] == "r2"
    assert "nothing was kept of a" in host.do("restore", refused=True, kept="before")["error"]


def test_an_instance_without_a_link_of_its_own_starts_from_current(host: Host) -> None:
    host.install("r1", "old")
    (host.root / "opt/llmrack/instances/a").unlink()
    (host.root / "opt/llmrack/current").symlink_to("/opt/llmrack/releases/r1")
    assert host.look()["release"] == "r1"
    host.do("save")
    host.install("r2", "new")
    assert host.do("restore", kept="undo")["release"] == "r1"
    assert host.installed()[0] == "r1"


@pytest.mark.parametrize(
    ("state", "by_hand"),
    [
        ({}, ""),
        ({"ActiveState": "inactive"}, "stopped"),
        ({"ActiveState": "inactive", "UnitFileState": "disabled"}, "disabled"),
        ({"UnitFileState": "disabled"}, "disabled"),
        ({"LoadState": "masked", "ActiveState": "inactive"}, "masked"),
        ({"ActiveState": "failed"}, ""),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, ""),
    ],
)
def test_what_an_operator_did_is_told_from_a_crash(host: Host, state: dict[str, str], by_hand: str) -> None:
    host.install("r1", "old")
    host.is_now(state)
    assert host.look()["by_hand"] == by_hand


def test_one_that_was_never_started_was_not_stopped_by_anybody(host: Host) -> None:
    host.is_now({"ActiveState": "inactive", "UnitFileState": "disabled"})
    assert host.look()["by_hand"] == "" and not host.look()["installed"]
    host.do("save")
    host.install("r1", "new")
    assert host.look()["by_hand"] == "", "a roll was interrupted before it started it"


STOPPING = {"ActiveState": "deactivating", "SubState": "stop-sigterm"}
STARTING = {"ActiveState": "activating", "SubState": "start", "MainPID": "8"}
CRASHED = {"ActiveState": "activating", "SubState": "auto-restart", "MainPID": "0", "Result": "core-dump",
           "ExecMainStatus": "6"}  # fmt: skip


@pytest.mark.parametrize(
    ("states", "pid", "why"),
    [
        ([{}], 0, ""),
        ([{}, {}, STOPPING, STARTING, {"MainPID": "8"}], 7, ""),
        ([{"ActiveState": "failed", "MainPID": "0", "Job": "5"}, STARTING, {"MainPID": "8"}], 0, ""),
        # A start by hand sets the count of an earlier life back.
        ([{"NRestarts": "5"}, STARTING, {"MainPID": "8"}], 7, ""),
        ([STARTING, CRASHED | {"NRestarts": "1"}, STARTING | {"NRestarts": "1"}, {"MainPID": "9"}], 7, ""),
        (
            [STARTING, CRASHED, CRASHED | {"NRestarts": "1"}, STARTING | {"NRestarts": "2"}],
            7,
            "it crashes again and again, the last time with core-dump, status 6",
        ),
        (
            [STARTING, {"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "2", "MainPID": "0"}],
            7,
            "it stays down, having ended the last time with exit-code, status 2",
        ),
        ([{}], 7, "it is active (running) after 1 s"),
    ],
)
def test_a_start_is_waited_for_and_a_crash_loop_is_not(
    host: Host, states: list[dict[str, str]], pid: int, why: str
) -> None:
    host.is_now(*states)
    # Where the time decides, there is one outcome however slow the machine is; elsewhere there is plenty.
    told = host.do("await", pid=pid, seconds=1 if "after 1 s" in why else 120)
    assert told["ready"] is not bool(why)
    assert told["why"] == (f"{why}; its journal ends: first line | out of memory" if why else "")
