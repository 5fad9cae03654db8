"""What the console is told: the fleet at once, the fleet as it changes, what the router would do, whose a key is."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.processes import wait_for
from tests.system.fleet import Fleet, create_key

FIGURES = ["at", "running", "waiting", "kv_used", "tokens_per_second"]


def ask(fleet: Fleet, path: str, key: str, body: Any = None) -> httpx.Response:
    method = "GET" if body is None else "POST"
    return httpx.request(method, fleet.gate.url + path, json=body, headers=auth(key), timeout=60)


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_fleet_at_once_says_all_that_the_page_shows(quiet: Fleet) -> None:
    said = wait_for(lambda: (now := ask(quiet, "/admin/fleet", quiet.admin).json())["history"] and now, "a sample")
    assert [node["name"] for node in said["nodes"]] == ["a", "b"] == list(said["history"])
    assert said["gate"]["policies"] == {"test": "prefix"} and said["gate"]["workers"] == 1
    assert said["queue"] == {}
    for samples in said["history"].values():
        assert list(samples) == FIGURES
        assert len({len(values) for values in samples.values()}) == 1
    one = ask(quiet, "/admin/nodes/a", quiet.admin).json()
    assert set(one) <= set(said["nodes"][0])


def test_the_stream_repeats_no_sample_and_ends_with_its_key(quiet: Fleet) -> None:
    state = quiet.request_log.parent / "state"
    key = create_key(state, "watcher", "--admin")
    times: list[float] = []
    with httpx.stream("GET", quiet.gate.url + "/admin/fleet/events", headers=auth(key), timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no" and answer.headers["connection"] == "close"
        events = 0
        for line in answer.iter_lines():
            if line.startswith("data: "):
                times += json.loads(line[6:])["history"]["a"]["at"]
                events += 1
                if events == 2:
                    command = [sys.executable, "-m", "llmgate", "keys", "revoke", "watcher", "--state-dir", str(state)]
                    subprocess.run(command, check=True, timeout=60)
            else:
                assert line in ("", "event: fleet")
    assert events >= 2 and times == sorted(set(times)), "it ended by itself"


@pytest.mark.parametrize("path", ["/admin/fleet", "/admin/fleet/events", "/admin/explain"])
def test_only_admins_may_watch(quiet: Fleet, path: str) -> None:
    body = {"body": {}} if path.endswith("explain") else None
    assert ask(quiet, path, quiet.key, body).status_code == 403
    assert ask(quiet, path, "sk-llmrack-nobody", body).status_code == 401


def test_the_router_explains_a_request_that_is_never_sent(quiet: Fleet) -> None:
    before = len(quiet.lines())
    body = {"messages": [{"role": "user", "content": "word " * 200}]}
    said = ask(quiet, "/admin/explain", quiet.admin, {"body": body}).json()
    assert (said["model"], said["policy"]) == ("test", "prefix")
    assert {node["node"] for node in said["nodes"]} == {"a", "b"}
    assert all(node["cost_seconds"] > 0 and node["prompt_tokens"] > 200 for node in said["nodes"])
    assert all(sorted(one["ranking"]) == ["a", "b"] for one in said["policies"])
    nobody = ask(quiet, "/admin/explain", quiet.admin, {"body": {"model": "nobody"}}).json()
    assert nobody["nodes"] == [] and nobody["model"] is None
    assert len(quiet.lines()) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "body"),
        ({"body": []}, "body"),
        ({"body": {"model": 3}}, "body.model"),
        ({"body": {}, "path": "/nowhere"}, "path"),
        ({"body": {}, "path": 7}, "path"),
        ({"body": {}, "more": 1}, "more"),
    ],
)
def test_what_cannot_be_explained_is_refused_by_name(quiet: Fleet, body: Any, param: str) -> None:
    answer = ask(quiet, "/admin/explain", quiet.admin, body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_key_is_told_what_it_is(quiet: Fleet) -> None:
    admin, user = (ask(quiet, "/v1/key", key).json() for key in (quiet.admin, quiet.key))
    assert (admin["name"], admin["role"], admin["admin_api"]) == ("operator", "admin", True)
    assert (
        user | {} == {"name": "client", "role": "user", "models": [], "priority": "normal", "anonymous": False} | user
    )
    assert ask(quiet, "/v1/key", "sk-llmrack-nobody").status_code == 401
