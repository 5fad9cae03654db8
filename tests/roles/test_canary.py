"""Promises of the canary question: an instance that answers wrongly or slowly does not get requests again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


CASES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "no canary": (None, ""),
    "a pattern": ({"prompt": "The capital of France?", "expect": "^Par[iI]s"}, ""),
    "another pattern": (
        {"prompt": "Of Italy?", "expect": "(?i)rome"}, 'it said "Paris.", which does not match (?i)rome',
    ),
    "too slow": (
        {"prompt": "Wait 2", "tokens_per_second": 3}, "too slow: 2.0 tokens a second, and tokens_per_second",
    ),
    "fast enough": ({"prompt": "Please wait 2", "tokens_per_second": 0.01}, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What went wrong with each case, "" for nothing: all of them in one play, a host for each."""
    folder = tmp_path_factory.mktemp("canaries")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Node)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    variables = {
        "llmrack_orchestrate_scheme": "http",
        "llmrack_orchestrate_fleet_token": "token",
        "llmrack_orchestrate_node": "{{ inventory_hostname }}-a",
        "llmrack_orchestrate_instance": {"name": "a", "model": "m", "port": server.server_port},
    }
    hosts = {
        f"h{number}": {"llmrack_models": {"m": {"canary": canary} if canary else {}}}
        for number, (canary, _) in enumerate(CASES.values())
    }
    asks = {
        "block": [{"ansible.builtin.include_role": {"name": "llmrack_orchestrate", "tasks_from": "ask"}}],
        "rescue": [{"ansible.builtin.set_fact": {"wrong": "{{ ansible_failed_result.msg }}"}}],
    }
    told = "{{ ansible_play_hosts | map('extract', hostvars, 'wrong') | map('default', '') | to_json }}"
    write = {"ansible.builtin.copy": {"content": told, "dest": f"{folder}/told.json", "mode": "0600"}, "run_once": True}
    play = {"hosts": "all", "connection": "local", "gather_facts": False, "vars": variables, "tasks": [asks, write]}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts}}))
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    try:
        done = ansible("ansible-playbook", "-i", folder / "hosts.yml", folder / "play.yml")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stdout + done.stderr
    yield dict(zip(CASES, json.loads((folder / "told.json").read_text()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_canary_is_judged_by_its_models_pattern_and_speed(said: dict[str, str], case: str) -> None:
    canary, wrong = CASES[case]
    assert wrong in said[case] and bool(said[case]) == bool(wrong)
    prompt = canary["prompt"] if canary else yaml.safe_load(_defaults())["llmrack_orchestrate_question"]
    assert prompt in [asked["prompt"] for asked in ASKED]


def _defaults() -> str:
    return (ROOT / "roles/llmrack_orchestrate/defaults/main.yml").read_text()
