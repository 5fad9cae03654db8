"""Promises of a deployment to a gate that does not take it: the play of playbooks/deploy.yml on a host of files.

Owns: that host, whose systemd and gate are this process. The roles are copies with their paths moved below a folder.
"""

from __future__ import annotations

import getpass
import grp
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.test_roles import ROOT

pytestmark = pytest.mark.full

MOVED = re.compile(r"/(?:etc/systemd/system|(?:etc|opt|var/lib)/llmrack)\b")
OWNED = re.compile(r"\b(owner|group): (?:root|llmrack)\b")
SYSTEMCTL = """#!{python}
import json, sys, urllib.request
asked = urllib.request.Request("http://127.0.0.1:{port}/systemctl", json.dumps(sys.argv[1:]).encode())
told = json.load(urllib.request.urlopen(asked))
sys.stdout.write(told["output"])
sys.exit(told["code"])
"""


class Host(http.server.ThreadingHTTPServer):
    """A gate's host: files below `root`, and here what systemd and the gate would say and do.

    broken: the releases that do not come up. A reload leaves what runs, a restart has ended it.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.broken: set[str] = set()
        self.runs: dict[str, str] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.asked: list[str] = []
        for release in ("r0", "r1", "r2"):
            program = self.at(f"/opt/llmrack/releases/{release}/bin/llmgate")
            program.parent.mkdir(parents=True)
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
        for folder in ("/etc/systemd/system", "/etc/llmrack", "/var/lib"):
            self.at(folder).mkdir(parents=True)
        for secret in ("fleet-token", "operator-key", "client-key"):
            self.at(f"/.secrets/{secret}").parent.mkdir(exist_ok=True)
            self.at(f"/.secrets/{secret}").write_text("s" * 32)
        tool = root / "bin/systemctl"
        tool.parent.mkdir()
        tool.write_text(SYSTEMCTL.format(python=sys.executable, port=self.server_port))
        tool.chmod(0o755)
        self._move_roles()

    def at(self, path: str) -> Path:
        return self.root / path[1:]

    def links(self) -> dict[str, str]:
        links = {name: self.at(f"/opt/llmrack/{name}") for name in ("current", "previous")}
        return {name: link.readlink().name for name, link in links.items() if link.is_symlink()}

    def files(self) -> dict[str, str]:
        """What a deployment writes of a gate, by name."""
        folders = [self.at("/etc/systemd/system"), self.at("/etc/llmrack")]
        return {path.name: path.read_text() for folder in folders for path in sorted(folder.iterdir())}

    def deploy(self, release: str, *arguments: str, **settings: Any) -> tuple[int, str]:
        """Exit code, and what was said, in one line."""
        plays = yaml.safe_load((ROOT / "playbooks/deploy.yml").read_text())
        (play,) = (play for play in plays if play["name"] == "Open the gate")
        variables = {
            "ansible_python_interpreter": sys.executable,
            "llmrack_artifacts_python": sys.executable,
            "llmrack_artifacts_release": release,
            "llmgate_keys": [],
            "llmgate_port": self.server_port,
            "llmgate_ready_seconds": 1,
            **settings,
        }
        play |= {"become": False, "gather_facts": False, "connection": "local", "vars": variables}
        (self.root / "play.yml").write_text(yaml.safe_dump([play]))
        (self.root / "hosts.yml").write_text(json.dumps({"llmgate": {"hosts": {"g": None}}}))
        paths = {"PATH": f"{self.root}/bin:{os.environ['PATH']}", "ANSIBLE_ROLES_PATH": f"{self.root}/roles",
                 "ANSIBLE_PIPELINING": "true"}  # fmt: skip
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        done = subprocess.run(
            [program, "-i", "hosts.yml", "play.yml", *arguments],
            cwd=self.root, env={**os.environ, **paths}, text=True, capture_output=True, stdin=subprocess.DEVNULL,
            timeout=250,
        )  # fmt: skip
        return done.returncode, " ".join(done.stdout.split())

    def systemctl(self, *arguments: str) -> tuple[int, str]:
        verb, unit = ([word for word in arguments if not word.startswith("-")] + [""])[:2]
        if "--value" in arguments:
            return 0, str(self.process.pid if self.process else 0)
        if verb == "show":
            active = unit == "llmgate.socket" or self.runs is not None
            return 0, f"LoadState=loaded\nActiveState={'active' if active else 'failed'}\n"
        if verb == "is-enabled":
            return 0, "enabled\n"
        self.asked.append(f"{verb} {unit}".strip())
        if verb in ("stop", "restart") and unit == "llmgate.service":
            self.end()
        if verb == "daemon-reload" or verb == "stop" or unit != "llmgate.service":
            return 0, ""
        if self.links()["current"] in self.broken:
            return int(verb != "reload" and "--no-block" not in arguments), ""
        settings = self.at("/etc/llmrack/llmgate.toml").read_bytes()
        self.runs = {"release": self.links()["current"], "config": hashlib.sha256(settings).hexdigest()[:16]}
        if verb != "reload":
            unit_file = self.at("/etc/systemd/system/llmgate.service").read_text()
            given = re.findall(r"(LLMRACK_\w+)=(\w+)", unit_file)
            self.process = subprocess.Popen(["sleep", "600"], env={**os.environ, **dict(given)})
        return 0, ""

    def settle(self, files: dict[str, str]) -> None:
        """A gate that runs r1 from these files, and had r0 before."""
        for folder in ("/etc/systemd/system", "/etc/llmrack"):
            for path in self.at(folder).iterdir():
                path.write_text(files[path.name])
        for name, release in (("current", "r1"), ("previous", "r0")):
            link = self.at(f"/opt/llmrack/{name}")
            link.unlink(missing_ok=True)
            link.symlink_to(self.at(f"/opt/llmrack/releases/{release}"))
        for program in self.at("/opt/llmrack/releases").glob("*/bin/llmgate"):
            program.write_text("#!/bin/sh\n")
        self.broken = set()
        self.systemctl("restart", "llmgate.service")
        self.asked = []

    def end(self) -> None:
        self.runs = None
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _move_roles(self) -> None:
        owners = {"owner": getpass.getuser(), "group": grp.getgrgid(os.getgid()).gr_name}
        for role in ("llmgate", "llmrack_artifacts"):
            shutil.copytree(ROOT / "roles" / role, self.root / "roles" / role)
        for path in (self.root / "roles").rglob("*.yml"):
            text = MOVED.sub(lambda found: f"{self.root}{found[0]}", path.read_text())
            path.write_text(OWNED.sub(lambda found: f"{found[1]}: {owners[found[1]]}", text))


class Answer(http.server.BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        self.say(self.server.runs, 200 if self.server.runs else 503)

    def do_POST(self) -> None:
        code, output = self.server.systemctl(*json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.say({"code": code, "output": output})

    def say(self, told: Any, status: int = 200) -> None:
        body = json.dumps(told).encode() if told else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if told else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def running(root: Path) -> Iterator[Host]:
    host = Host(root)
    thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        host.end()
        host.shutdown()
        host.server_close()
        thread.join()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, dict[str, str]]]:
    """A host with a gate of r1, and the files that this takes."""
    with running(tmp_path_factory.mktemp("host")) as host:
        code, said = host.deploy("r1")
        assert code == 0, said
        assert host.links() == {"current": "r1"} and host.runs and host.runs["release"] == "r1"
        yield host, host.files()


@pytest.fixture
def host(deployed: tuple[Host, dict[str, str]]) -> Host:
    host, files = deployed
    host.settle(files)
    return host


def test_a_gate_that_refuses_a_reload_goes_on_and_has_its_old_release_and_settings(host: Host) -> None:
    before, runs = host.files(), dict(host.runs or {})
    host.broken = {"r2"}
    code, said = host.deploy("r2", llmgate_settings={"queue_limit": 3})
    assert code != 0
    assert "See that it does" in said and "failed: The gate does not run release r2" in said
    assert "It was given back release r1 with the settings that it had, and answers." in said
    assert host.links() == {"current": "r1", "previous": "r0"}
    assert host.files() == before and host.runs == runs
    assert host.asked == ["reload llmgate.service", "daemon-reload"]

    host.broken = set()
    code, said = host.deploy("r2", llmgate_settings={"queue_limit": 3})
    assert code == 0, said
    assert host.links() == {"current": "r2", "previous": "r1"} and host.runs and host.runs["release"] == "r2"


def test_a_gate_that_does_not_restart_is_started_from_what_it_had(host: Host) -> None:
    before, runs = host.files(), dict(host.runs or {})
    host.broken = {"r2"}
    code, said = host.deploy("r2", llmgate_drain_seconds=7)  # the unit has it, so this takes a restart
    assert code != 0 and "was given back release r1" in said, said
    assert host.links() == {"current": "r1", "previous": "r0"}
    assert host.files() == before and host.runs == runs
    assert host.asked[-1] == "start llmgate.service"


@pytest.mark.parametrize("tags", [[], ["--tags", "configure"]])
def test_settings_that_are_refused_leave_the_links_where_they_were(host: Host, tags: list[str]) -> None:
    for program in host.at("/opt/llmrack/releases").glob("*/bin/llmgate"):
        program.write_text("#!/bin/sh\necho queue_limit is unknown >&2\nexit 2\n")
    code, said = host.deploy("r2", *tags, llmgate_settings={"queue_limit": 3})
    assert code != 0 and "queue_limit is unknown" in said and "was given back release r1" in said, said
    assert host.links() == {"current": "r1", "previous": "r0"}
    assert not any(word in asked for asked in host.asked for word in ("reload llmgate", "restart", "start"))


def test_what_runs_is_gone_back_to_where_an_interrupted_deployment_has_moved_the_link(host: Host) -> None:
    host.at("/opt/llmrack/previous").unlink()
    current = host.at("/opt/llmrack/current")
    current.unlink()
    current.symlink_to(host.at("/opt/llmrack/releases/r2"))
    host.broken = {"r2"}
    code, said = host.deploy("r2")
    assert code != 0 and "was given back release r1" in said, said
    assert host.links() == {"current": "r1"} and host.runs and host.runs["release"] == "r1"


def test_settings_that_an_interrupted_deployment_has_written_are_not_what_is_gone_back_to(host: Host) -> None:
    before, runs = host.files(), dict(host.runs or {})
    for name, text in before.items():
        folder = "/etc/systemd/system" if name.startswith("llmgate.s") else "/etc/llmrack"
        host.at(f"{folder}/{name}").write_text(text if name == "nodes.toml" else f"# never taken\n{text}")
    host.broken = {"r2"}
    code, said = host.deploy("r2", llmgate_settings={"queue_limit": 3})
    assert code != 0 and "was given back release r1 with the settings that it had" in said, said
    assert host.files() == before and host.runs == runs
    assert "restart llmgate.service" not in host.asked


def test_what_somebody_has_changed_by_hand_and_the_gate_has_taken_is_gone_back_to(host: Host) -> None:
    settings = host.at("/etc/llmrack/llmgate.toml")
    settings.write_text(f"{settings.read_text()}# by hand\n")
    host.systemctl("reload", "llmgate.service")
    before = host.files()
    host.broken = {"r2"}
    code, said = host.deploy("r2", llmgate_settings={"queue_limit": 3})
    assert code != 0 and "was given back release r1" in said, said
    assert host.files() == before


def test_the_first_deployment_of_all_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    with running(tmp_path) as host:
        host.broken = {"r1"}
        code, said = host.deploy("r1")
        assert code != 0 and "did not take what was to come" in said and "given back" not in said, said
        assert host.links() == {"current": "r1"}
