"""What several workers write at once comes out whole, and in some order."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmgate.core.fleet import Lease
from llmgate.core.record import Record
from llmgate.database import Database
from llmgate.requestlog import RequestLog
from llmgate.store import Store
from llmgate.usage import UsageWriter


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


class LateClosing(threading.Event):
    """Is set, by close(), when the thread has just stopped waiting for it."""

    def __init__(self, close: Callable[[], None]) -> None:
        super().__init__()
        self._close = close

    def wait(self, timeout: float | None = None) -> bool:
        threading.Thread(target=self._close).start()
        super().wait(10)
        return False


@pytest.mark.parametrize("kind", ["log", "usage"])
def test_a_close_at_an_unlucky_moment_ends_the_thread(tmp_path: Path, kind: str) -> None:
    writer: Any
    if kind == "log":
        writer = RequestLog(str(tmp_path / "requests.jsonl"))
        writer._closing = LateClosing(writer.close)
        writer.write({"id": "r"})
    else:
        writer = UsageWriter("gate", lambda: 1.0, lambda outcome, rows: None)
        writer._closing = LateClosing(writer.close)
        writer.start(Store(Database(tmp_path)))
        writer.note(Record("r", "/v1/completions", arrived=0.0, key="k").line(1.0, 1.0))
    writer._thread.join(30)
    assert not writer._thread.is_alive()


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
