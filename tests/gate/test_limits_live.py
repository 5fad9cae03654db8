"""Limits at the door: what a key is told, what it pays for, and what happens while nobody can count."""

from __future__ import annotations

import concurrent.futures
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Start
from tests.databases import Postgres, Redis
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode
from tests.gate.test_counters import wipe
from tests.gate.test_workers_live import figure
from tests.processes import free_port, wait_for

Mock = Callable[..., MockNode]
MANY = "1000000"


@pytest.fixture
def one(gate: GateUnderTest, mock: Mock) -> tuple[GateUnderTest, MockNode]:
    """A running gate in front of one mock node, whose answers cost 11 + 5 tokens."""
    node = mock("a")
    gate.list_nodes(node)
    gate.run("--ready-wait-s", "0")
    gate.wait_node("a", lambda seen: seen["usable"])
    return gate, node


def key(gate: GateUnderTest, name: str) -> dict[str, Any]:
    with gate.client() as client:
        found = client.get("/admin/keys").json()["keys"]
    shown: dict[str, Any] = next(k for k in found if k["name"] == name)
    return shown


def used(gate: GateUnderTest, name: str) -> dict[str, int]:
    """What counts against the key once nothing of it is under way."""

    def settled() -> dict[str, int] | None:
        use: dict[str, int] = key(gate, name)["use"]
        return use if use and use["concurrent_requests"] == 0 else None

    return wait_for(settled, f"{name} has nothing under way")


def known(gate: GateUnderTest, secret: str) -> str:
    """The secret, once every worker knows it: each of many connections goes to any of them."""

    def all_do() -> bool:
        asked = (httpx.get(gate.url + "/v1/models", headers={"x-api-key": secret}, timeout=60) for _ in range(10))
        return all(answer.status_code == 200 for answer in asked)

    wait_for(all_do, "every worker knows the key")
    return secret


def granted(gate: GateUnderTest, name: str, *options: str) -> str:
    return known(gate, gate.create_key(name, *options))


def fresh_minute() -> None:
    """Begin where the next seconds are of one minute, so that what is counted stays in view."""
    left = 60 - time.time() % 60
    if left < 15:
        time.sleep(left)


def test_an_answer_says_what_is_left_and_settles_at_what_it_cost(one: tuple[GateUnderTest, MockNode]) -> None:
    gate, _ = one
    secret = granted(gate, "k", "--requests-per-minute", "5", "--tokens-per-minute", "1000", "--tokens-per-day", "5000")
    fresh_minute()
    for stream in (False, True):
        answer = gate.chat(secret, max_tokens=100, stream=stream)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "5"
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert int(answer.headers["x-ratelimit-remaining-requests"]) == (3 if stream else 4)
        assert 800 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 900
        assert re.fullmatch(r"(\d+m)?\d+s", answer.headers["x-ratelimit-reset-tokens"])
    assert used(gate, "k") == {
        "requests_per_minute": 2,
        "tokens_per_minute": 32,
        "concurrent_requests": 0,
        "tokens_per_day": 32,
        "tokens_per_month": 32,
    }
    unlimited = gate.chat()
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


def test_over_a_limit_is_429_with_an_honest_retry_after(one: tuple[GateUnderTest, MockNode]) -> None:
    gate, node = one
    secret = granted(gate, "k", "--requests-per-minute", "2")
    fresh_minute()
    assert [gate.chat(secret).status_code for _ in range(3)] == [200, 200, 429]
    refused = gate.chat(secret)
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["limit"] == {"name": "requests_per_minute", "limit": 2, "used": 2, "asked": 1}
    # Both of one minute: one of them is out of sight when half of the next one has gone.
    left = 60 - time.time() % 60
    assert left + 29 <= int(refused.headers["retry-after"]) <= left + 32
    assert refused.headers["x-should-retry"] == "false"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(node.requests) == 2
    with gate.client(secret) as client:
        body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
        anthropic = client.post("/v1/messages", json=body)
    said = anthropic.json()
    assert (anthropic.status_code, said["type"], said["error"]["type"]) == (429, "error", "rate_limit_error")
    assert gate.line_with(status=429)["end"] == "rate_limit_exceeded"
    assert figure(gate, "llmgate_limit_refusals_total", limit="requests_per_minute") == 3


def test_a_budget_that_is_used_up_is_a_quota_and_what_never_fits_is_said_so(
    one: tuple[GateUnderTest, MockNode],
) -> None:
    gate, _ = one
    secret = granted(gate, "k", "--tokens-per-day", "150")
    too_much = gate.chat(secret, max_tokens=200)
    assert (too_much.status_code, too_much.json()["error"]["code"]) == (429, "insufficient_quota")
    assert "retry-after" not in too_much.headers and too_much.headers["x-should-retry"] == "false"
    assert "can never be let in" in too_much.json()["error"]["message"]
    while (answer := gate.chat(secret, max_tokens=50)).status_code == 200:
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 150
    assert answer.json()["error"]["code"] == "insufficient_quota"
    assert 0 < int(answer.headers["retry-after"]) <= 86_400
    assert gate.cli("keys", "set", "k", "--tokens-per-day", "none").returncode == 0
    wait_for(lambda: gate.chat(secret, max_tokens=50).status_code == 200, "the budget has gone")


@pytest.mark.parametrize(
    ("fault", "status", "tokens", "requests"), [("bad_request", 400, 0, 1), ("refuse_503", 503, 0, 1), ("", 200, 16, 1)]
)
def test_what_failed_before_its_first_token_costs_no_tokens(
    one: tuple[GateUnderTest, MockNode], fault: str, status: int, tokens: int, requests: int
) -> None:
    gate, node = one
    secret = granted(gate, "k", "--requests-per-minute", MANY)
    node.fault = fault
    fresh_minute()
    assert gate.chat(secret, max_tokens=100).status_code == status
    use = used(gate, "k")
    assert (use["tokens_per_day"], use["requests_per_minute"]) == (tokens, requests)


def test_what_the_gate_turned_away_itself_costs_nothing(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    node.say(load={"slots": 1})
    gate.list_nodes(node)
    gate.run("--queue-limit", "0")
    gate.wait_node("a", lambda seen: seen["usable"])
    secret = granted(gate, "k", "--requests-per-minute", MANY)
    fresh_minute()
    node.hold = "post"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        others = [pool.submit(gate.chat) for _ in range(2)]
        gate.wait_node("a", lambda seen: seen["in_flight"] == 2)
        refused = gate.chat(secret, max_tokens=9)
        node.hold = ""
        assert [other.result().status_code for other in others] == [200, 200]
    assert refused.status_code == 503
    assert set(used(gate, "k").values()) == {0}


def test_an_answer_that_its_client_left_costs_what_was_out(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a", resume=True)
    gate.list_nodes(node)
    gate.run()
    secret = granted(gate, "k", "--tokens-per-day", MANY)
    node.fault, node.at, node.hold = "sleep", 6, "stream"
    body = {"model": "tiny", "stream": True, "max_tokens": 500, "messages": [{"role": "user", "content": "x" * 400}]}
    with gate.client(secret) as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces, heard = answer.iter_bytes(), b""
        while heard.count(b"data: ") < 4:
            heard += next(pieces)
        assert 600 <= key(gate, "k")["use"]["tokens_per_day"] <= 800
    use = used(gate, "k")
    node.hold = ""
    assert 100 <= use["tokens_per_day"] <= 250, "the prompt and six tokens, not five hundred"


def test_no_more_requests_at_once_than_a_key_may_have(one: tuple[GateUnderTest, MockNode]) -> None:
    gate, node = one
    secret = granted(gate, "k", "--concurrent-requests", "2")
    node.hold = "post"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(gate.chat, secret) for _ in range(2)]
        wait_for(lambda: key(gate, "k")["use"]["concurrent_requests"] == 2, "two are under way")
        refused = gate.chat(secret)
        node.hold = ""
        assert [one.result().status_code for one in running] == [200, 200]
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["limit"]["name"] == "concurrent_requests"
    assert "x-should-retry" not in refused.headers
    for _ in range(20):  # one after the other is never two at once
        assert gate.chat(secret, stream=True).status_code == 200


def test_an_expired_key_is_told_so(one: tuple[GateUnderTest, MockNode]) -> None:
    gate, _ = one
    secret = granted(gate, "k", "--expires", "2s")
    wait_for(lambda: gate.chat(secret).status_code == 401, "it has expired")
    refused = gate.chat(secret)
    assert refused.json()["error"]["code"] == "api_key_expired"
    assert gate.cli("keys", "set", "k", "--expires", "never").returncode == 0
    wait_for(lambda: gate.chat(secret).status_code == 200, "it lives again")


def hammer(gates: list[GateUnderTest], secret: str, threads: int, **fields: Any) -> list[int]:
    """Statuses of requests over as many connections as threads, to each gate in turn, until none of them gets one in:
    each ends with its third 429 in a row, and the last of the limit goes one request at a time."""

    def work(number: int) -> list[int]:
        seen: list[int] = []
        with gates[number % len(gates)].client(secret) as client:
            while seen[-3:] != [429] * 3:
                body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
                try:
                    seen.append(client.post("/v1/chat/completions", json=body).status_code)
                except httpx.TransportError:
                    seen.append(0)
                if seen[-1] not in (200, 429):
                    time.sleep(0.1)
        return seen

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        together = [status for seen in pool.map(work, range(threads)) for status in seen]
    return together + work(0)


def test_four_workers_let_in_no_more_than_the_limit_and_no_less(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    node.say(load={"slots": 64})
    gate.list_nodes(node)
    gate.run("--workers", "4")
    secret = granted(gate, "k", "--requests-per-minute", "60", "--tokens-per-day", "1600")
    fresh_minute()
    began = int(time.time() / 60)
    seen = hammer([gate], secret, 8, max_tokens=5)
    minutes = int(time.time() / 60) - began
    assert set(seen) == {200, 429}
    assert seen.count(200) == len(node.requests)
    assert 60 <= seen.count(200) <= 60 + 60 * minutes


def test_a_restart_forgets_nothing(one: tuple[GateUnderTest, MockNode]) -> None:
    gate, _ = one
    secret = granted(gate, "k", "--tokens-per-day", "70")
    assert [gate.chat(secret, max_tokens=1).status_code for _ in range(3)] == [200, 200, 200]
    assert used(gate, "k")["tokens_per_day"] == 48
    assert gate.program
    gate.program.stop()
    gate.run()
    assert used(gate, "k")["tokens_per_day"] == 48
    gate.program.stop()
    for file in gate.state.glob("limits.*"):
        file.unlink()
    gate.run()
    assert gate.chat(secret, max_tokens=1).status_code == 429, "what the ledger has counts"
    assert used(gate, "k")["tokens_per_day"] == 48


@pytest.mark.parametrize(("policy", "status"), [("closed", 503), ("open", 200)])
def test_while_nobody_can_count_the_setting_decides(
    gate: GateUnderTest, mock: Mock, policy: str, status: int, redis_server: Redis
) -> None:
    wipe(redis_server)
    gate.list_nodes(mock("a"))
    url = gate.folder / "redis-url"
    url.write_text(redis_server.url + "\n")
    gate.run("--redis-url-file", str(url), "--limits-when-down", policy)
    secret = granted(gate, "k", "--requests-per-minute", MANY)
    wait_for(lambda: gate.chat(secret).status_code == 200, "it counts")
    redis_server.kill()
    try:
        answer = gate.chat(secret)
        assert answer.status_code == status
        if policy == "closed":
            assert answer.json()["error"]["code"] == "limits_unavailable"
            assert answer.headers["retry-after"] == "1"
        assert gate.chat().status_code == 200, "a key without limits notices nothing"
        assert key(gate, "k")["use"] is None
        assert figure(gate, "llmgate_limits_unavailable_total", policy=policy) >= 1
        assert gate.program is not None
        assert gate.program.output().count("cannot be used") == 1
        assert ("UNCOUNTED" in gate.program.output()) == (policy == "open")
    finally:
        redis_server.start()
    wait_for(lambda: gate.chat(secret).headers.get("x-ratelimit-limit-requests") == MANY, "it counts again")


class Fleet:
    """Two gates of four workers each that share PostgreSQL and Redis, in front of one node."""

    def __init__(self, start: Start, folder: Path, node: MockNode, postgres: Postgres, redis: Redis) -> None:
        self.gates: list[GateUnderTest] = []
        self.redis = redis
        self.flags: list[str] = []
        for name, url in (("redis-url", redis.url), ("database-url", postgres.fresh())):
            (folder / name).write_text(url + "\n")
            self.flags += [f"--{name}-file", str(folder / name)]
        secret = ""
        for name in ("one", "two"):
            (folder / name).mkdir()
            gate = GateUnderTest(start, folder / name)
            gate.list_nodes(node)
            gate.secret = secret = secret or self.create_key(gate, "tester", "--admin")
            gate.run("--workers", "4", "--gates", "2", *self.flags)
            self.gates.append(gate)

    def create_key(self, gate: GateUnderTest, name: str, *options: str) -> str:
        made = gate.cli("keys", "create", name, *options, *self.flags[2:])
        assert made.returncode == 0, made.stderr
        secret = made.stdout.strip()
        for running in self.gates:
            known(running, secret)
        return secret


@pytest.fixture(scope="module")
def fleet(
    start_module: Start, tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, redis_server: Redis
) -> Iterator[Fleet]:
    wipe(redis_server)
    with MockNode("a") as node:
        node.say(load={"slots": 64})
        yield Fleet(start_module, tmp_path_factory.mktemp("fleet"), node, postgres, redis_server)


BUDGET = 1600
"""Tokens: a hundred answers. Each reserves some more than the 16 that it costs, so up to so many may be left over."""
SLACK = BUDGET * 0.01 + 30


def test_two_gates_of_four_workers_let_in_what_the_budget_says(fleet: Fleet) -> None:
    secret = fleet.create_key(fleet.gates[0], "t", "--tokens-per-day", str(BUDGET))
    seen = hammer(fleet.gates, secret, 8, max_tokens=5)
    assert set(seen) == {200, 429}
    spent = used(fleet.gates[1], "t")["tokens_per_day"]
    assert spent == seen.count(200) * 16
    assert BUDGET - SLACK <= spent <= BUDGET


def test_killing_redis_under_load_lets_nothing_in_twice(fleet: Fleet) -> None:
    secret = fleet.create_key(fleet.gates[0], "k", "--tokens-per-day", str(BUDGET), "--concurrent-requests", "64")
    seen: list[int] = []
    load = threading.Thread(target=lambda: seen.extend(hammer(fleet.gates, secret, 6, max_tokens=5)))
    load.start()
    wait_for(lambda: used_now(fleet.gates[0], "k") > BUDGET / 5, "some of it is used")
    fleet.redis.kill()
    fleet.redis.start()
    load.join()
    assert set(seen) == {200, 429, 503}
    spent = used(fleet.gates[1], "k")["tokens_per_day"]
    assert seen.count(200) * 16 <= spent <= BUDGET
    assert seen.count(200) * 16 >= BUDGET - SLACK - 6 * 30, "it goes on when it is back; what was cut off stays counted"


def used_now(gate: GateUnderTest, name: str) -> int:
    use = key(gate, name)["use"]
    return int(use["tokens_per_day"]) if use else 0


def test_several_gates_without_one_truth_take_no_key_with_limits(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.run("--gates", "2")
    refused = gate.cli("keys", "create", "k", "--requests-per-minute", "5", "--config", str(config(gate)))
    assert refused.returncode == 2 and "redis_url_file" in refused.stderr
    with gate.client() as client:
        answer = client.post("/admin/keys", json={"name": "k", "limits": {"tokens_per_day": 5}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "limits_need_one_truth")
    gate.create_key("k", "--requests-per-minute", "5")  # by somebody who did not say that there are two
    checked = gate.cli("check", "--nodes-file", str(gate.nodes_file), "--gates", "2")
    assert checked.returncode == 2 and "each gate would let them use all of it" in checked.stderr
    assert gate.program
    gate.program.stop()
    flags = ("--port", str(free_port()), "--nodes-file", str(gate.nodes_file), "--gates", "2")
    started = gate.cli("serve", *flags)
    assert started.returncode == 2 and "redis_url_file" in started.stderr


def config(gate: GateUnderTest) -> Path:
    path = gate.folder / "llmgate.toml"
    path.write_text("gates = 2\n")
    return path
