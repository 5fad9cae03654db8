"""The usage ledger holds every request once, whatever becomes of its database; on SQLite and on PostgreSQL."""

from __future__ import annotations

import itertools
import logging
import random
import resource
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmgate.core.record import Record
from llmgate.core.usage import DAY_S, Question, Selection, day, row
from llmgate.database import Database
from llmgate.store import Store
from llmgate.usage import UsageWriter
from llmnode.wire.node import Usage
from tests.databases import Postgres
from tests.processes import wait_for

EVER = Question(("key",), 0.0, 1e10)


def line(
    number: int, key: str = "k", model: str | None = "tiny", end: str = "done", tokens: int = 10
) -> dict[str, Any]:
    record = Record(f"r{number}", "/v1/chat/completions", arrived=1.0, key=key, model=model, node="a")
    record.ended(200 if end == "done" else 503, end)
    record.usage = Usage(tokens, tokens // 2, 1)
    record.first_content = 1.5
    return record.line(2.0, 0.0)


def filled(database: Database, lines: list[dict[str, Any]], at: float = 100.0) -> Store:
    """A store with these, one a second from then on."""
    store = Store(database)
    store.add_usage([row(one, at + number, "gate") for number, one in enumerate(lines)])
    return store


@contextmanager
def writing(store: Store, **options: Any) -> Iterator[tuple[UsageWriter, dict[str, int]]]:
    """A writer at work, and what it has counted."""
    counted: dict[str, int] = defaultdict(int)
    wall = itertools.count(1000.0, 0.001)

    def count(outcome: str, rows: int) -> None:
        counted[outcome] += rows

    writer = UsageWriter("gate", lambda: next(wall), count, **options)
    writer.start(store)
    try:
        yield writer, counted
    finally:
        writer.close()


def test_a_row_that_is_written_twice_is_one(database: Database) -> None:
    rows = [row(line(number), 100.0 + number, "gate") for number in range(3)]
    with closing(Store(database)) as store:
        store.add_usage(rows[:2])
        store.add_usage(rows)
        assert store.usage(EVER)[1]["requests"] == 3


def test_sums_are_those_of_the_rows(database: Database) -> None:
    dice = random.Random(8)
    lines = [
        line(
            number,
            dice.choice("abc"),
            dice.choice(["tiny", "huge", None]),
            dice.choice(["done", "done", "failed"]),
            dice.randrange(1000),
        )
        for number in range(200)
    ]
    rows = [row(one, dice.uniform(0, 5 * DAY_S), "gate") for one in lines]
    with closing(Store(database)) as store:
        store.add_usage(rows)
        since, until = 1.2 * DAY_S, 4.1 * DAY_S
        inside = [one for one in rows if since <= one["at"] < until]
        for by in (("key",), ("model", "day"), ("key", "model", "node", "day")):
            wanted: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
            for one in inside:
                named = one | {"day": day(int(one["at"] // DAY_S))}
                sums = wanted[tuple(named[name] for name in by)]
                for at, value in enumerate((1, one["end"] != "done", one["prompt_tokens"], one["completion_tokens"])):
                    sums[at] += value
            found, total = store.usage(Question(by, since, until))
            names = ("requests", "failed", "prompt_tokens", "completion_tokens")
            assert {tuple(one[name] for name in by): [one[name] for name in names] for one in found} == wanted
            assert total["requests"] == len(inside)
            assert total["time_to_first_token_seconds"] == 0.5
        mine = [one for one in inside if one["key"] == "a"]
        assert store.usage(Question(("model",), since, until, key="a"))[1]["requests"] == len(mine)
        assert store.spent("a", since, until) == sum(one["prompt_tokens"] + one["completion_tokens"] for one in mine)
        assert store.spent("nobody", since, until) == 0
        nothing, total = store.usage(Question(("key",), 9 * DAY_S, 10 * DAY_S))
        assert (nothing, total["requests"], total["time_to_first_token_seconds"]) == ([], 0, None)


def test_requests_are_chosen_and_paged(database: Database) -> None:
    lines = [line(number, key="ab"[number % 2], end="done" if number % 3 else "failed") for number in range(10)]
    with closing(filled(database, lines)) as store:

        def numbers(**said: str) -> list[int]:
            return [int(one["request_id"][1:]) for one in store.requests(Selection.parse(said))]

        first = store.requests(Selection(limit=1000))[-1]["id"]
        assert numbers() == list(range(9, -1, -1))
        assert numbers(limit="3") == [9, 8, 7]
        assert numbers(before=str(first + 3)) == [2, 1, 0]
        assert numbers(after=str(first + 3), limit="2") == [5, 4], "the next ones, so that who follows misses none"
        assert numbers(key="a", status="5xx") == [6, 0]
        assert numbers(node="b") == []
        assert store.newest_request() == first + 9
        assert store.request(str(first))["request_id"] == "r0"  # type: ignore[index]
        assert store.request("r4")["id"] == first + 4  # type: ignore[index]
        assert store.request("r99") is None and store.request("9" * 30) is None


def test_what_a_client_calls_a_model_can_be_written(database: Database) -> None:
    names = ["a\0b", "\ud800", "\U0001f600" * 200, "'; DROP TABLE usage; --", ""]
    with closing(filled(database, [line(number, model=name) for number, name in enumerate(names)])) as store:
        found = [one["model"] for one in store.requests(Selection())][::-1]
    assert found == ["a\ufffdb", "?", "\U0001f600" * 200, "'; DROP TABLE usage; --", ""]


def test_what_a_node_counts_can_be_written(database: Database) -> None:
    lines = [line(1) | {"prompt_tokens": 10**40, "completion_tokens": -5}]
    with closing(filled(database, lines)) as store:
        (one,) = store.requests(Selection())
        assert (one["prompt_tokens"], one["completion_tokens"]) == (2**53 - 1, 0)
        assert store.usage(EVER)[1]["prompt_tokens"] == 2**53 - 1


def test_old_rows_go_in_bites_and_no_id_comes_again(database: Database) -> None:
    with closing(filled(database, [line(number) for number in range(10)])) as store:
        newest = store.newest_request()
        assert [store.forget_usage(107.0, 5), store.forget_usage(107.0, 5)] == [5, 2]
        assert store.usage(EVER)[1]["requests"] == 3
        store.forget_usage(1e9, 100)
        store.add_usage([row(line(10), 200.0, "gate")])
        assert [one["id"] for one in store.requests(Selection())] == [newest + 1, newest]


def test_rows_older_than_they_are_to_be_kept_are_dropped(database: Database) -> None:
    with (
        closing(filled(database, [line(number) for number in range(1200)], at=-2 * DAY_S)) as store,
        writing(store, keep_days=1) as (writer, counted),
    ):
        writer.note(line(5000))
        wait_for(lambda: store.usage(Question(("key",), -1e9, 1e9))[1]["requests"] == 1, "only the new one to be left")
        assert counted == {"written": 1}


def test_what_is_noted_while_the_writer_closes_is_written(database: Database) -> None:
    with closing(Store(database)) as store:
        with writing(store) as (writer, counted):
            for number in range(2500):
                writer.note(line(number))
        assert (counted, writer.waiting) == ({"written": 2500}, 0)
        assert store.usage(EVER)[1]["requests"] == 2500


def test_writers_of_several_gates_lose_nothing_and_who_follows_sees_all(database: Database) -> None:
    """Rows must become visible in the order of their ids, or one that was late is never told."""
    writers, each = 4, 60
    seen: list[int] = []
    with closing(Store(database)) as reader:

        def write(name: int) -> None:
            with closing(Store(database)) as store:
                for number in range(each):
                    store.add_usage([row(line(number, key=f"k{name}"), name * 1000.0 + number, f"g{name}")] * 2)

        threads = [threading.Thread(target=write, args=(name,)) for name in range(writers)]
        for thread in threads:
            thread.start()
        while len(seen) < writers * each:
            if not any(thread.is_alive() for thread in threads):
                threads = []
            seen += [one["id"] for one in reader.requests(Selection(after=seen[-1] if seen else 0, limit=50))][::-1]
            if not threads and reader.newest_request() == (seen or [0])[-1]:
                break
        assert len(seen) == writers * each
        assert {one["requests"] for one in reader.usage(EVER)[0]} == {each}


def test_a_database_that_is_locked_is_written_to_when_it_is_free(tmp_path: Path) -> None:
    with closing(Store(Database(tmp_path))) as store, closing(sqlite3.connect(tmp_path / "llmgate.db")) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        with writing(store, limit=5) as (writer, counted):
            for number in range(8):
                writer.note(line(number))
            assert (writer.waiting, counted) == (5, {"dropped": 3})
            other.execute("ROLLBACK")
            wait_for(lambda: writer.waiting == 0, "what was kept to be written")
            assert counted == {"dropped": 3, "written": 5}


def test_rows_are_kept_while_postgresql_is_away_and_written_when_it_is_back(
    postgres: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed under load: what was committed is there, what came meanwhile is written later, each row once."""
    caplog.set_level(logging.INFO, "llmgate")
    database, noted, stop = Database(tmp_path, postgres.fresh()), itertools.count(), threading.Event()
    with closing(Store(database)) as store, writing(store) as (writer, counted):

        def load() -> None:
            while not stop.wait(0.001):
                writer.note(line(next(noted)))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            wait_for(lambda: counted["written"], "the first rows")
            postgres.kill()
            wait_for(lambda: "usage cannot be written" in caplog.text, "the writer to say so")
            before = counted["written"]
            wait_for(lambda: writer.waiting > 100, "rows to be kept")
        finally:
            postgres.start()
            stop.set()
            thread.join()
        wait_for(lambda: writer.waiting == 0, "them to be written")
        total = next(noted)
        assert before < total
        assert counted == {"written": total}
        assert store.usage(EVER)[1]["requests"] == total
    assert caplog.text.count("usage cannot be written") == 1
    assert caplog.text.count("usage is written again") == 1
    assert "llmrack@" not in caplog.text, "the URL, which may hold a password, is not repeated"


def test_a_full_disk_is_said_once_and_costs_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files is the disk that one can fill without being root."""
    caplog.set_level(logging.INFO, "llmgate")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(Store(Database(tmp_path))) as store, writing(store) as (writer, counted):
        writer.note(line(0))
        wait_for(lambda: counted["written"] == 1, "the first row")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "llmgate.db-wal").stat().st_size, before[1]))
            for number in range(1, 50):
                writer.note(line(number))
            wait_for(lambda: "usage cannot be written" in caplog.text, "the writer to say so")
            assert writer.waiting == 49
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        wait_for(lambda: counted["written"] == 50, "the rest")
        assert store.usage(EVER)[1]["requests"] == 50
    assert caplog.text.count("usage cannot be written") == 1
    with closing(sqlite3.connect(tmp_path / "llmgate.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
