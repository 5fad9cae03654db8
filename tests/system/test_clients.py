"""What clients in the wild really send is answered, and what had no effect is named: tests/data/clients, one file each.

Each was written down by hand from what the client sends: headers, query, odd fields and all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnode.wire import headers
from tests.system.conftest import Door

CLIENTS = sorted((Path(__file__).parents[1] / "data" / "clients").glob("*.json"))


@pytest.mark.parametrize("file", CLIENTS, ids=lambda file: file.stem)
def test_a_client_in_the_wild_is_answered(file: Path, door: Door) -> None:
    recorded: dict[str, Any] = json.loads(file.read_text())
    is_anthropics = recorded["path"].startswith("/v1/messages")
    key = {"x-api-key": door.key} if is_anthropics else {"authorization": f"Bearer {door.key}"}
    answer = httpx.post(
        door.url + recorded["path"], json=recorded["body"], headers=recorded["headers"] | key, timeout=60
    )
    assert answer.status_code == 200, answer.text
    named = answer.headers.get(headers.IGNORED, "")
    assert sorted(filter(None, named.split(", "))) == recorded["ignored"]
    assert ("request-id" in answer.headers) == is_anthropics
    if recorded["body"].get("stream"):
        assert answer.headers["content-type"].startswith("text/event-stream")
        frames = answer.text.split("\n\n")
        assert not [frame for frame in frames if frame.startswith(("event: error", 'data: {"error"'))]
        if door.url == door.fleet.gate.url:
            assert not [frame for frame in frames if frame.startswith((": t ", ": u ", ": end"))]
    else:
        assert isinstance(answer.json(), dict)
