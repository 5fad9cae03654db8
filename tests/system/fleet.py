"""A gate in front of real nodes, as a test wants it: real processes, a fleet token, two keys."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.processes import Program, free_port, wait_for


@dataclass
class Fleet:
    """`gate` in front of `nodes`, by name. `key` is a client's, `admin` an operator's."""

    gate: Program
    nodes: dict[str, Program]
    key: str
    admin: str
    request_log: Path

    def post(self, path: str, body: Any, *, key: str | None = None) -> httpx.Response:
        return httpx.post(self.gate.url + path, json=body, headers=self._auth(key), timeout=120)

    def chat(self, text: str = "Hello", **fields: Any) -> httpx.Response:
        body = {"model": "test", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        return self.post("/v1/chat/completions", body)

    def stream(self, text: str = "Hello", **fields: Any) -> tuple[str, list[dict[str, Any]], httpx.Headers]:
        """(text, chunks, headers) of a streamed chat; AssertionError unless it ended with [DONE]."""
        body = {
            "model": "test",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 8,
            "stream": True,
            **fields,
        }
        chunks: list[dict[str, Any]] = []
        done = False
        with httpx.stream(
            "POST", self.gate.url + "/v1/chat/completions", json=body, headers=self._auth(None), timeout=120
        ) as answer:
            if answer.status_code != 200:
                answer.read()
                raise AssertionError(f"status {answer.status_code}: {answer.text}")
            for line in answer.iter_lines():
                assert not line.startswith(": u "), "the usage comment is the gate's own and must not reach clients"
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    chunks.append(json.loads(line[6:]))
        assert done, f"the stream ended without [DONE]: {chunks[-3:]}"
        text_out = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
        return text_out, chunks, answer.headers

    def view(self) -> dict[str, dict[str, Any]]:
        """GET /admin/nodes, by name."""
        answer = httpx.get(self.gate.url + "/admin/nodes", headers=self._auth(self.admin), timeout=30)
        assert answer.status_code == 200, answer.text
        return {node["name"]: node for node in answer.json()["nodes"]}

    def drain(self, name: str, **fields: Any) -> httpx.Response:
        return self.post(f"/admin/nodes/{name}/drain", {"owner": "test", **fields}, key=self.admin)

    def undrain(self, name: str) -> httpx.Response:
        url = f"{self.gate.url}/admin/nodes/{name}/drain"
        return httpx.delete(url, params={"owner": "test"}, headers=self._auth(self.admin), timeout=30)

    def lines(self) -> list[dict[str, Any]]:
        """The request log so far."""
        if not self.request_log.exists():
            return []
        return [json.loads(line) for line in self.request_log.read_text().splitlines()]

    def usable(self, count: int) -> None:
        """Wait until the gate would send work to exactly `count` nodes."""
        wait_for(lambda: sum(n["usable"] for n in self.view().values()) == count, f"{count} usable nodes")

    def _auth(self, key: str | None) -> dict[str, str]:
        return {"authorization": f"Bearer {key or self.key}"}


def build(folder: Path, start: Callable[..., Program], node_arguments: list[str], names: tuple[str, ...]) -> Fleet:
    """Start the nodes and a gate in front of them, and wait until all are ready."""
    token = folder / "token"
    token.write_text("fleet-token-of-the-tests-0123456789\n")
    nodes = {
        name: start("llmnode", "--name", name, "--fleet-token-file", str(token), "--model-id", "test", *node_arguments)
        for name in names
    }
    listing = folder / "nodes.toml"
    listing.write_text("".join(f'[[nodes]]\nname = "{n}"\nurl = "{p.url}"\n' for n, p in nodes.items()))
    state = folder / "state"
    state.mkdir()
    key, admin = create_key(state, "client"), create_key(state, "operator", "--admin")
    log = folder / "requests.jsonl"
    gate = start(
        "llmgate", "--nodes-file", str(listing), "--state-dir", str(state), "--fleet-token-file", str(token),
        "--request-log", str(log), "--poll-interval-s", "0.2", port=free_port(),
    )  # fmt: skip
    for node in nodes.values():
        node.ready()
    fleet = Fleet(gate.ready(), nodes, key, admin, log)
    fleet.usable(len(names))
    return fleet


def create_key(state: Path, name: str, *flags: str) -> str:
    """`llmgate keys create`, as an operator runs it; returns the secret that it prints once."""
    command = [sys.executable, "-m", "llmgate", "keys", "create", name, "--state-dir", str(state), *flags]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return next(word for word in printed.split() if word.startswith("sk-llmrack-"))
