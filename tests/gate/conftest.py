"""Fixtures of the gate's tests: mock nodes, and the real gate in front of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Start
from tests.gate.mock_node import MockNode
from tests.processes import Program, wait_for

FAST = ("--poll-interval-s", "0.1", "--stale-after-s", "30", "--connect-timeout-s", "5", "--stall-timeout-s", "30")

LEAST_LOADED = '[models.tiny]\npolicy = "least-loaded"\n'
"""What the nodes file says of the mock nodes' model, so that of idle nodes the first by name is chosen."""


class GateUnderTest:
    """A running gate, its files and a client with a key for it."""

    def __init__(self, start: Start, folder: Path) -> None:
        self.folder = folder
        self.nodes_file = folder / "nodes.toml"
        self.state = folder / "state"
        self.log_file = folder / "requests.jsonl"
        self.secret = ""
        self.place: tuple[str, ...] = ("--state-dir", str(self.state))
        self.environ: dict[str, str] = {}
        self.program: Program | None = None
        self._start = start

    def keep_in(self, url: str) -> None:
        """Keep keys, leases and usage in this PostgreSQL database."""
        path = self.folder / "database-url"
        path.write_text(f"{url}\n")
        self.place += ("--database-url-file", str(path))

    def list_nodes(self, *nodes: Any, models: str = LEAST_LOADED) -> None:
        """Write the nodes file, as a deployment does: whole, then moved into place."""
        draft = self.nodes_file.with_suffix(".new")
        entries = (f'[[nodes]]\nname = "{n.name}"\nurl = "{n.url}"\n\n' for n in nodes)
        draft.write_text("".join(entries) + models)
        draft.replace(self.nodes_file)

    def cli(self, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
        """Run one llmgate command on this gate's state, with `said` on its standard input."""
        return subprocess.run(
            [sys.executable, "-m", "llmgate", *arguments, *self.place],
            input=said,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def create_key(self, name: str, *options: str) -> str:
        made = self.cli("keys", "create", name, *options)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def run(self, *options: str, ready: bool = True) -> GateUnderTest:
        """Start (or start again) the gate; the first time with an admin key for `self.secret`."""
        self.secret = self.secret or self.create_key("tester", "--admin")
        self.program = self._start(
            "llmgate",
            *("--nodes-file", str(self.nodes_file), *self.place),
            *("--request-log", str(self.log_file), *FAST, *options),
            env=self.environ,
        )
        if ready:
            self.program.ready()
        else:
            wait_for(lambda: self.program and self.program.get("/health"), "the gate's /health")
        return self

    @property
    def url(self) -> str:
        assert self.program is not None
        return self.program.url

    def client(self, secret: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.secret if secret is None else secret}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def chat(self, secret: str | None = None, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a secret prompt"}], **fields}
        with self.client(secret) as client:
            return client.post("/v1/chat/completions", json=body)

    def node(self, name: str) -> dict[str, Any]:
        with self.client() as client:
            answer = client.get(f"/admin/nodes/{name}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait_node(self, name: str, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            with self.client() as client:
                nodes = client.get("/admin/nodes").json()["nodes"]
            return next((seen for seen in nodes if seen["name"] == name and what(seen)), None)

        return wait_for(look, f"node {name}: {what}")

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The request log, once it has `count` lines."""

        def read() -> list[dict[str, Any]] | None:
            text = self.log_file.read_text() if self.log_file.exists() else ""
            found = [json.loads(line) for line in text.splitlines()]
            return found if len(found) >= count else None

        return wait_for(read, f"{count} lines in the request log")

    def line(self, request_id: str) -> dict[str, Any]:
        """The log line of one request."""
        return self.line_with(id=request_id)

    def line_with(self, **fields: Any) -> dict[str, Any]:
        """The first line of the request log with these fields, once it is there."""

        def read() -> dict[str, Any] | None:
            text = self.log_file.read_text() if self.log_file.exists() else ""
            return next((x for x in map(json.loads, text.splitlines()) if fields.items() <= x.items()), None)

        return wait_for(read, f"a log line with {fields}")


@pytest.fixture
def gate(start: Start, tmp_path: Path) -> GateUnderTest:
    """A gate that is not running yet: list nodes, then `run()`."""
    return GateUnderTest(start, tmp_path)


@pytest.fixture
def mock() -> Iterator[Callable[..., MockNode]]:
    """Start mock nodes: mock("a", model="tiny", ...)."""
    with ExitStack() as stack:
        yield lambda name, **options: stack.enter_context(MockNode(name, **options))


@pytest.fixture
def two(gate: GateUnderTest, mock: Callable[..., MockNode]) -> tuple[GateUnderTest, MockNode, MockNode]:
    """A running gate in front of two mock nodes, a and b, of which a comes first while both are idle. When neither is
    ready it says so at once."""
    a, b = mock("a"), mock("b")
    gate.list_nodes(a, b)
    gate.run("--ready-wait-s", "0")
    gate.wait_node("b", lambda node: node["usable"])
    gate.wait_node("a", lambda node: node["usable"])
    return gate, a, b
