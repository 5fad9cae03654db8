"""Promises of the canary question: an instance that answers wrongly or slowly does not get requests again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.test_roles import ROOT, ansible

ASKED: list[dict[str, Any]] = []


class Node(BaseHTTPRequestHandler):
    """Answers every completion with "Paris.", after as many seconds as the prompt's last word says."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        ASKED.append(asked)
        last = asked["prompt"].split()[-1]
        time.sleep(int(last) if last.isdigit() else 0)
        body = json.dumps({"choices": [{"text": "Paris."}], "usage": {"completion_tokens": 4}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    ASKED.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Node)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("canary", "wrong"),
    [
        (None, ""),
        ({"prompt": "The capital of France?", "expect": "^Par[iI]s"}, ""),
        ({"prompt": "The capital of France?", "expect": "(?i)rome"}, 'it said "Paris.", which does not match (?i)rome'),
        ({"prompt": "Wait 2", "tokens_per_second": 3}, "too slow: 2.0 tokens a second, and tokens_per_second"),
        ({"prompt": "Wait 2", "tokens_per_second": 0.01}, ""),
    ],
)
def test_a_canary_is_judged_by_its_models_pattern_and_speed(
    url: str, canary: dict[str, Any] | None, wrong: str, tmp_path: Path
) -> None:
    variables = {
        "llmrack_orchestrate_scheme": "http",
        "llmrack_orchestrate_node": "host1-a",
        "llmrack_orchestrate_fleet_token": "token",
        "llmrack_orchestrate_instance": {"name": "a", "model": "m", "port": int(url.rpartition(":")[2])},
        "llmrack_models": {"m": {"canary": canary} if canary else {}},
    }
    task = {"ansible.builtin.include_role": {"name": "llmrack_orchestrate", "tasks_from": "ask"}}
    play = {"hosts": "localhost", "gather_facts": False, "vars": variables, "tasks": [task]}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    said = ansible("ansible-playbook", "-i", "localhost,", "-c", "local", tmp_path / "play.yml")
    text = " ".join(said.stdout.split())
    assert (said.returncode == 0) == (not wrong), text
    assert wrong in text
    asked = canary["prompt"] if canary else yaml.safe_load(_defaults())["llmrack_orchestrate_question"]
    assert ASKED[-1]["prompt"] == asked


def _defaults() -> str:
    return (ROOT / "roles/llmrack_orchestrate/defaults/main.yml").read_text()
