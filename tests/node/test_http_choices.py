"""Several answers to one request live and die together: none outlives its client, its deadline or its siblings."""

from __future__ import annotations

import json
import signal
import socket

import httpx
import pytest

from tests.conftest import Start
from tests.processes import Program, wait_for

ENDLESS = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True, "max_tokens": 4000, "n": 3}
SLOW = ("--backend", "fake", "--fake-step-delay-s", "0.02", "--slots", "2")


def load(node: Program) -> tuple[int, int]:
    """Answers that run and that wait."""
    said = httpx.get(node.url + "/node", timeout=10).json()["load"]
    return said["running"], said["waiting"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_all_its_choices_along(start: Start, stream: bool) -> None:
    node = start("llmnode", *SLOW).ready()
    with socket.create_connection(("127.0.0.1", node.port)) as raw:
        body = json.dumps({**ENDLESS, "stream": stream}).encode()
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: load(node) == (2, 1), "two choices to run and one to wait")
    wait_for(lambda: load(node) == (0, 0), "every choice to be gone")
    assert "Traceback" not in node.output()


def test_a_deadline_ends_all_choices_with_one_error(start: Start) -> None:
    node = start("llmnode", *SLOW, "--request-timeout-s", "1").ready()
    answer = httpx.post(node.url + "/v1/chat/completions", json={**ENDLESS, "n": 2}, timeout=60)
    assert answer.status_code == 504
    streamed = httpx.post(node.url + "/v1/chat/completions", json={**ENDLESS, "n": 2, "stream": True}, timeout=60)
    assert streamed.text.count('"timeout_error"') == 1
    assert streamed.text.rstrip().rpartition("\n")[2].startswith('data: {"error"')
    assert "[DONE]" not in streamed.text
    wait_for(lambda: load(node) == (0, 0), "every choice to be gone")


def test_a_drain_that_ends_tells_a_request_once(start: Start) -> None:
    node = start("llmnode", *SLOW, "--drain-seconds", "0.5").ready()
    with httpx.stream("POST", node.url + "/v1/chat/completions", json={**ENDLESS, "stream": True}, timeout=60) as held:
        pieces = held.iter_text()
        text = next(pieces)
        node.signal(signal.SIGTERM)
        text += "".join(pieces)
    assert text.count('"node_stopping"') == 1
    assert "[DONE]" not in text
    assert node.wait() == 0
