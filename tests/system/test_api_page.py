"""Every `curl` of docs/api.md works, word for word but for the address, and every path of the API is on the page."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from llmnode.wire.openapi.document import served
from tests.processes import PATIENCE_S
from tests.system.conftest import House
from tests.system.fleet import Fleet

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```(?:sh)?\n(curl .*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [command for block in BLOCKS for command in re.split(r"^(?=curl )", block, flags=re.MULTILINE) if command]
ADDRESS = "http://127.0.0.1:8000"
NAMED = re.compile(r'"model": "|model=|/models/')
"""Of a command that says which model it means. The others are for a fleet that serves only one."""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[1].strip('"').removeprefix(ADDRESS))
def test_a_curl_of_the_page_is_answered(command: str, fake_fleet: Fleet, house: House) -> None:
    fleet = house if NAMED.search(command) else fake_fleet
    url, key = fleet.gate.url, fleet.admin if "/admin/" in command else fleet.key
    here = command.replace(ADDRESS, url).replace("curl ", "curl -sS --fail-with-body ", 1)
    assert here.count(url) == 1
    done = subprocess.run(
        ["bash", "-c", here], env={**os.environ, "KEY": key}, capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    if "/openapi.json" not in here and "/docs" not in here:
        assert "error" not in done.stdout.replace('"error":null', "")


def test_every_path_is_on_the_page() -> None:
    paths = {one.path.replace("{name}", "NAME") for side in ("node", "gate") for one in served(side)}  # type: ignore[arg-type]
    assert [path for path in sorted(paths) if path not in PAGE] == []


def test_what_clients_are_told_to_ask_has_an_example() -> None:
    asked = {command.split()[1].strip('"').removeprefix(ADDRESS).partition("?")[0] for command in COMMANDS}
    aliases = {"/embeddings", "/rerank", "/v1/reranking", "/reranking", "/completions", "/models"}
    machines = {"/health", "/ready", "/metrics"}
    for one in served("gate"):
        if one.path not in aliases | machines and not one.path.startswith("/admin"):
            assert one.path.replace("{name}", "handbook") in asked, one.path
