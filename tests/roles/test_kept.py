"""Promises of what a gate goes back to: kept.py, on files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.roles.programs import load

kept = load("llmgate", "kept")


class Gate:
    """A gate's unit, settings and list below a folder."""

    def __init__(self, folder: Path) -> None:
        self.unit, self.settings, self.list = (folder / name for name in ("gate.service", "gate.toml", "nodes.toml"))
        self.folder, self.current = folder / "kept", folder / "current"

    def write(self, words: str, port: int = 8000) -> None:
        self.unit.write_text(f"[Service] {words}\n")
        self.settings.write_text(f"# {words}\nport = {port}\n")
        self.list.write_text(f"# {words}\n")

    def keep(self) -> bool:
        return bool(kept.keep([str(self.unit), str(self.settings)], str(self.folder))["changed"])

    def read(self) -> dict[str, Any]:
        files = [str(path) for path in (self.unit, self.settings, self.list)]
        told: dict[str, Any] = kept.read(files, str(self.settings), [str(self.current)], str(self.folder))
        return told


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_what_a_gate_has_taken_is_told_from_what_was_written_since(gate: Gate) -> None:
    gate.write("old")
    gate.current.symlink_to("/opt/llmrack/releases/r1")
    assert gate.keep() and not gate.keep()
    gate.write("new", port=8001)
    told = gate.read()
    taken, written = told["sets"]
    assert told["links"] == {"current": "r1"}
    assert [one["here"] for one in (taken, written)] == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    assert taken["files"][str(gate.unit)] == "[Service] old\n" and written["files"][str(gate.unit)] == "[Service] new\n"
    assert taken["config"] == hashlib.sha256(taken["files"][str(gate.settings)].encode()).hexdigest()[:16]
    assert taken["files"][str(gate.list)] == "# new\n", "the gate has read its list by then"
    assert gate.keep() and gate.read()["sets"][0] == written


def test_before_anything_was_kept_it_is_what_is_there(gate: Gate) -> None:
    nothing = gate.read()
    assert nothing["links"] == {"current": ""}
    assert [(one["config"], one["here"], set(one["files"].values())) for one in nothing["sets"]] == [("", "", {""})] * 2
    gate.write("old")
    taken, written = gate.read()["sets"]
    assert taken == written and taken["here"] == "http://127.0.0.1:8000"


def test_copies_are_for_root_alone_and_say_where_a_gate_with_tls_answers(gate: Gate) -> None:
    gate.write("old")
    with gate.settings.open("a") as settings:
        settings.write('tls_cert_file = "/etc/llmrack/tls/host.crt"\n')
    gate.keep()
    assert gate.folder.stat().st_mode & 0o777 == 0o700
    assert gate.read()["sets"][0]["here"] == "https://127.0.0.1:8000"
