"""What several workers write at once comes out whole, and in some order."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path

import pytest

from llmgate.core.fleet import Lease
from llmgate.database import Database
from llmgate.requestlog import RequestLog
from llmgate.store import Store


def lease(node: str) -> Lease:
    return Lease(node, "me", "", 1.0, None)


def test_lines_of_several_workers_are_never_torn(tmp_path: Path) -> None:
    logs = [RequestLog(str(tmp_path / "requests.jsonl")) for _ in range(4)]

    def write(log: RequestLog, name: int) -> None:
        for number in range(200):
            log.write({"worker": name, "number": number, "text": str(name) * (number * 40)})

    threads = [threading.Thread(target=write, args=(log, name)) for name, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    for name in range(4):
        theirs = [line for line in lines if line["worker"] == name]
        assert [line["number"] for line in theirs] == list(range(200))
        assert all(line["text"] == str(name) * (line["number"] * 40) for line in theirs)


def test_a_lease_is_decided_while_nobody_else_can_take_one(tmp_path: Path) -> None:
    """Two drains decided at once could each count on the other's node."""
    first, second = Store(Database(tmp_path)), Store(Database(tmp_path))
    stranger = sqlite3.connect(tmp_path / "llmgate.db", timeout=0, isolation_level=None)

    def decide(held: tuple[Lease, ...]) -> Lease:
        assert held == ()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            stranger.execute("BEGIN IMMEDIATE")
        return lease("a")

    def decide_next(held: tuple[Lease, ...]) -> Lease:
        assert held == (lease("a"),)
        return lease("b")

    assert first.take_lease(decide) == lease("a")
    assert second.take_lease(decide_next) == lease("b")
    assert first.leases() == (lease("a"), lease("b"))


def test_a_refused_change_leaves_leases_as_they_are_and_the_database_free(tmp_path: Path) -> None:
    store, other = Store(Database(tmp_path)), Store(Database(tmp_path))
    store.take_lease(lambda held: lease("a"))

    def refuse(held: tuple[Lease, ...]) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.release_lease("a", refuse)
    assert other.release_lease("a", lambda held: None)
    assert not other.release_lease("a", lambda held: None)
    assert store.leases() == ()
