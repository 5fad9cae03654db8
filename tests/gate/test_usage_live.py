"""Real gates write down what was used, in their own file or in one PostgreSQL database, and show it."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmgate.database import FILE, Database
from llmgate.store import Store
from tests import previous
from tests.conftest import Start
from tests.databases import Postgres
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import wait_for

One = tuple[GateUnderTest, MockNode]
Shared = tuple[GateUnderTest, GateUnderTest]
Mock = Callable[..., MockNode]


def told(gate: GateUnderTest, path: str, **query: str) -> Any:
    with gate.client() as client:
        answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def counted(gate: GateUnderTest, key: str | None = None) -> int:
    """Requests in the ledger."""
    return int(told(gate, "/admin/usage", **({"key": key} if key else {}))["total"]["requests"])


def metric(gate: GateUnderTest, name: str, **labels: str) -> float:
    text = httpx.get(gate.url + "/metrics", timeout=60).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return next(sample.value for sample in samples if sample.name == name and sample.labels == labels)


@pytest.fixture(scope="module")
def one(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[One]:
    """A gate in front of one node, whose tests tell their requests by their keys."""
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    with MockNode("a") as node:
        gate.list_nodes(node)
        yield gate.run(), node


@pytest.fixture(scope="module")
def shared(postgres: Postgres, start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Two gates on one PostgreSQL database, in front of one node; they have one admin key."""
    url = postgres.fresh()
    with MockNode("a") as node:
        gates = [GateUnderTest(start_module, tmp_path_factory.mktemp(name)) for name in ("first", "second")]
        for gate in gates:
            gate.keep_in(url)
            gate.list_nodes(node)
        first, second = gates
        first.run("--gates", "2")
        second.secret = first.secret
        second.run("--gates", "2", "--workers", "2")
        yield first, second


def user(gate: GateUnderTest, name: str) -> str:
    """A new key's secret, once the gate knows it."""
    secret = gate.create_key(name)

    def known() -> bool:
        with gate.client(secret) as client:
            return client.get("/v1/models").status_code == 200

    wait_for(known, "the gate to know the key")
    return secret


def test_each_request_is_in_the_ledger_once_with_what_its_log_line_says(one: One) -> None:
    gate, a = one
    secret = user(gate, "careful")
    a.fault = "refuse_503"
    failed = gate.chat(secret).headers["x-request-id"]
    a.fault = ""
    done = gate.chat(secret, stream=True, model="tiny-alias").headers["x-request-id"]
    assert gate.chat("sk-llmrack-wrong-0123456789abcdef").status_code == 401
    wait_for(lambda: counted(gate, "careful") == 2, "two requests in the ledger")
    row, line = told(gate, f"/admin/requests/{done}"), gate.line(done)
    for name in ("key", "model", "path", "stream", "node", "status", "end", "attempts", "resumed", "duration_seconds"):
        assert row[name] == line[name], name
    assert (row["model"], row["node"], row["stream"], row["status"]) == ("tiny", "a", True, 200)
    assert (row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]) == (11, 3, 5)
    assert told(gate, f"/admin/requests/{row['id']}") == row
    newest = told(gate, "/admin/requests", key="careful")["requests"]
    assert newest[0] == row and newest[1]["request_id"] == failed
    assert told(gate, "/admin/requests", status="5xx", key="careful")["requests"] == [newest[1]]
    sums = told(gate, "/admin/usage", by="key", key="careful", since="1h")["total"]
    assert (sums["requests"], sums["failed"], sums["completion_tokens"]) == (2, 1, 5)
    assert all(row["key"] for row in told(gate, "/admin/requests")["requests"]), "none without a key"
    written = (gate.state / FILE).read_bytes() + (gate.state / f"{FILE}-wal").read_bytes()
    assert b"a secret prompt" not in written and secret.encode() not in written


def test_the_command_line_and_the_api_say_the_same(one: One) -> None:
    gate, _ = one
    secret = user(gate, "counting")
    for _ in range(3):
        gate.chat(secret)
    wait_for(lambda: counted(gate, "counting") == 3, "the ledger")
    asked, flags = {"by": "key,model", "since": "1h", "key": "counting"}, ("--since", "1h", "--key", "counting")
    here = told(gate, "/admin/usage", **asked)
    there = json.loads(gate.cli("usage", "--by", "key,model", *flags, "--json").stdout)
    assert (there["rows"], there["total"], there["by"]) == (here["rows"], here["total"], ["key", "model"])
    with gate.client() as client:
        sheet = client.get("/admin/usage", params={**asked, "format": "csv"})
    assert sheet.headers["content-type"] == "text/csv; charset=utf-8"
    (row,) = csv.DictReader(io.StringIO(sheet.text))
    assert (row["key"], row["model"], row["requests"], row["prompt_tokens"]) == ("counting", "tiny", "3", "33")
    assert gate.cli("usage", *flags, "--csv").stdout.split() == sheet.text.split()
    head, line, total = gate.cli("usage", "--by", "model,key,node", *flags).stdout.splitlines()
    assert head.split()[:5] == ["model", "key", "node", "requests", "failed"]
    assert line.split()[:5] == ["tiny", "counting", "a", "3", "0"] and total.split()[:2] == ["total", "3"]
    assert gate.cli("usage", "--key", "nobody").stdout.splitlines()[1].split()[:2] == ["total", "0"]
    refused = gate.cli("usage", "--by", "colour")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "llmgate: --by must name some of key, model, node, day, got 'colour'\n"


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/admin/usage?by=colour", "by"),
        ("/admin/usage?since=soon", "since"),
        ("/admin/usage?untill=1d", "untill"),
        ("/admin/usage?key=a&key=b", "key"),
        ("/admin/usage?format=xml", "format"),
        ("/admin/requests?limit=0", "limit"),
        ("/admin/requests?status=ok", "status"),
        ("/admin/requests?after=-1", "after"),
        ("/admin/requests/events?after=x", "after"),
        ("/admin/requests/events?limit=5", "limit"),
    ],
)
def test_a_bad_question_names_its_field(one: One, path: str, field: str) -> None:
    with one[0].client() as client:
        answer = client.get(path)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field and field in error["message"]


def test_only_admins_may_ask(one: One) -> None:
    gate, _ = one
    secret = user(gate, "curious")
    for path in ("/admin/usage", "/admin/requests", "/admin/requests/1", "/admin/requests/events"):
        with gate.client(secret) as client:
            assert client.get(path).status_code == 403
        assert httpx.get(gate.url + path, timeout=60).status_code == 401


def test_what_is_written_is_counted(one: One) -> None:
    gate, _ = one

    def samples() -> list[float]:
        outcomes = [metric(gate, "llmgate_usage_rows_total", outcome=outcome) for outcome in ("written", "dropped")]
        return [*outcomes, metric(gate, "llmgate_usage_rows_waiting")]

    wait_for(lambda: samples()[2] == 0, "what came before to be written")
    before = samples()[0]
    for _ in range(4):
        gate.chat()
    wait_for(lambda: samples() == [before + 4, 0, 0], "the counters")


def test_a_reader_hears_of_requests_of_every_gate_and_misses_none(shared: Shared) -> None:
    one, other = shared
    heard: list[dict[str, Any]] = []

    def listen(client: httpx.Client, most: int, **headers: str) -> None:
        with client.stream("GET", "/admin/requests/events", headers=headers, params={"key": "tester"}) as events:
            assert events.headers["content-type"] == "text/event-stream"
            began.set()
            for line in events.iter_lines():
                if line.startswith("data: "):
                    heard.append(json.loads(line.removeprefix("data: ")))
                    if len(heard) == most:
                        return

    began = threading.Event()
    with one.client() as client:
        thread = threading.Thread(target=listen, args=(client, 6))
        thread.start()
        assert began.wait(60)
        asked = [gate.chat().headers["x-request-id"] for _ in range(3) for gate in (one, other)]
        thread.join(60)
    assert sorted(row["request_id"] for row in heard) == sorted(asked)
    assert [row["id"] for row in heard] == sorted(row["id"] for row in heard)
    more = [other.chat().headers["x-request-id"] for _ in range(2)]
    wait_for(lambda: counted(one) == 8, "both to be in the ledger")
    with one.client() as client:
        listen(client, 8, **{"last-event-id": str(heard[-1]["id"])})
    assert sorted(row["request_id"] for row in heard[6:]) == sorted(more)


def test_a_reader_does_not_keep_a_gate_from_ending(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.run()
    assert gate.program is not None
    with gate.client() as client, client.stream("GET", "/admin/requests/events") as events:
        lines = events.iter_lines()
        assert next(lines).startswith(":")
        gate.program.process.send_signal(signal.SIGTERM)
        assert list(lines) == [""]
    assert gate.program.process.wait(60) == 0


def test_gates_of_one_database_share_keys_and_leases(shared: Shared) -> None:
    one, other = shared
    secret = user(one, "sharing")
    wait_for(lambda: other.chat(secret).status_code == 200, "the key to be known")
    with one.client() as client:
        taken = client.post("/admin/nodes/a/drain", json={"owner": "me", "force": True})
    assert taken.status_code == 200, taken.text
    assert other.wait_node("a", lambda node: node["lease"] is not None)["lease"]["owner"] == "me"
    with other.client() as client:
        assert client.delete("/admin/nodes/a/drain", params={"owner": "me"}).json()["released"]
    one.wait_node("a", lambda node: node["lease"] is None)
    assert other.cli("keys", "revoke", "sharing").stdout == "revoked\n"
    wait_for(lambda: one.chat(secret).status_code == 401, "the key to be gone")
    assert not (one.state / FILE).exists()


def test_a_gate_serves_while_its_database_is_away(shared: Shared, postgres: Postgres) -> None:
    one, other = shared
    secret = user(one, "patient")
    wait_for(lambda: other.chat(secret).status_code == 200, "the key to be known")
    wait_for(lambda: counted(one, "patient"), "the ledger")
    before = counted(one, "patient")
    assert one.program is not None and other.program is not None
    postgres.kill()
    try:
        for program in (one.program, other.program):
            wait_for(lambda: "cannot use the database" in program.output(), "the gate to say so")  # noqa: B023
        assert {gate.chat(secret).status_code for _ in range(5) for gate in (one, other)} == {200}
        with one.client() as client:
            away = client.get("/admin/usage")
        assert (away.status_code, away.json()["error"]["code"]) == (503, "database_unavailable")
        assert "retry-after" in away.headers
    finally:
        postgres.start()
    with other.client() as client:
        wait_for(lambda: client.get("/admin/usage").status_code == 200, "the database to be used again")
    wait_for(lambda: counted(other, "patient") == before + 10, "what was kept to be written")
    later = user(one, "later")
    wait_for(lambda: other.chat(later).status_code == 200, "keys to be read again")


def test_a_killed_gate_has_what_was_written_and_its_database_is_whole(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.run("--workers", "2")
    assert gate.program is not None
    stop, asked = threading.Event(), []

    def load() -> None:
        with gate.client() as client:
            while not stop.is_set():
                try:
                    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
                    asked.append(client.post("/v1/chat/completions", json=body).headers["x-request-id"])
                except httpx.HTTPError:
                    return

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: counted(gate) >= 50, "the ledger to fill")
    settled = counted(gate)
    supervisor = gate.program.pid
    workers = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    for pid in (supervisor, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    gate.program.process.wait()
    stop.set()
    for thread in threads:
        thread.join()
    with closing(sqlite3.connect(gate.state / FILE)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = [id for (id,) in db.execute("SELECT request_id FROM usage WHERE status = 200 ORDER BY id")]
    assert len(found) >= settled and len(set(found)) == len(found)
    gate.run()
    gate.chat()
    wait_for(lambda: counted(gate) == len(found) + 1, "the ledger to go on")


def test_a_gate_can_do_without_a_ledger(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.run("--usage", "false")
    answer = gate.chat()
    gate.line(answer.headers["x-request-id"])
    assert gate.program is not None
    gate.program.stop()
    with closing(Store(Database(gate.state))) as store:
        assert store.newest_request() == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mysql://me:hunter2@db/x\n", "it must begin with postgresql://"),
        ("", "it must begin with postgresql://"),
        ("postgresql://me:hunter2@db:port/x", "it is no URL"),
        (None, "cannot read the database URL file"),
        ("postgresql://me:hunter2@127.0.0.1:1/x", "x of PostgreSQL at 127.0.0.1:1"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    gate: GateUnderTest, text: str | None, words: str
) -> None:
    path = gate.folder / "database-url"
    if text is not None:
        path.write_text(text)
    refused = gate.cli("keys", "list", "--database-url-file", str(path))
    assert refused.returncode == (5 if "127.0.0.1" in words else 2)
    assert words in refused.stderr and "hunter2" not in refused.stderr and "Traceback" not in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_previous_release_uses_what_this_one_has_changed(one: One, tmp_path: Path) -> None:
    """A rollback finds its keys, and what it writes is noticed by the gates that run."""
    if previous.missing():
        pytest.skip(previous.missing())
    gate, _ = one
    secret = user(gate, "ours")
    gate.chat(secret)
    wait_for(lambda: counted(gate, "ours") == 1, "the ledger")
    (tmp_path / "old").mkdir()
    old = previous.unpack(tmp_path / "old")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llmgate", *arguments, "--state-dir", str(gate.state)],
            env={**os.environ, "PYTHONPATH": str(old)},
            cwd=old,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("keys", "list").split()[0] == "tester"
    secret = run("keys", "create", "theirs").strip()
    wait_for(lambda: gate.chat(secret).status_code == 200, "the gate to know a key that the old release made")
    run("keys", "revoke", "theirs")
    wait_for(lambda: gate.chat(secret).status_code == 401, "the gate to have noticed")
    run("backup", str(tmp_path / "copy.db"))
    assert gate.cli("restore", str(tmp_path / "copy.db")).stdout == "unchanged\n"
    assert counted(gate, "ours") == 1
