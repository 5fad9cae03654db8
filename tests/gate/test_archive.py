"""Copies of the gate's database are of one moment, private, and put back whole or not at all."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmgate import archive
from llmgate.core import usage
from llmgate.core.fleet import Lease
from llmgate.core.keys import Key
from llmgate.core.limits import Limits
from llmgate.core.record import Record
from llmgate.database import FILE, Database
from llmgate.store import SCHEMA_VERSION, Store
from tests.databases import Postgres
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import wait_for


def filled(folder: Path, *names: str) -> Path:
    store = Store(Database(folder))
    for name in names:
        store.add_key(Key(name, f"digest of {name}", False, (), 1.0))
    store.close()
    return folder


def names(folder: Path) -> list[str]:
    store = Store(Database(folder))
    try:
        return [key.name for key in store.all_keys()]
    finally:
        store.close()


def test_a_copy_of_a_database_that_is_written_to_is_of_one_moment(tmp_path: Path) -> None:
    """Each writer's change is two leases in one transaction: a copy that has one of them has both."""
    source, stop, turns = filled(tmp_path / "state"), threading.Event(), [0]

    def write() -> None:
        with closing(sqlite3.connect(source / FILE, isolation_level=None)) as database:
            while not stop.is_set():
                database.execute("BEGIN IMMEDIATE")
                for node in ("a", "b"):
                    row = (node, "me", str(turns[0]), 1.0, None)
                    database.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)", row)
                database.execute("COMMIT")
                turns[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(20):
            before = turns[0]
            wait_for(lambda before=before: turns[0] > before, "a write between two copies")
            archive.backup(Database(source), tmp_path / f"{number}.db")
    finally:
        stop.set()
        writer.join()
    seen = []
    for number in range(20):
        with closing(sqlite3.connect(tmp_path / f"{number}.db")) as database:
            reasons = [reason for (reason,) in database.execute("SELECT reason FROM leases")]
        assert len(reasons) == 2 and reasons[0] == reasons[1]
        seen.append(int(reasons[0]))
    assert seen == sorted(set(seen)), "each copy is later than the one before"


def test_a_copy_is_its_owners_alone_and_one_file(tmp_path: Path) -> None:
    archive.backup(Database(filled(tmp_path / "state", "one")), tmp_path / "copies.db")
    assert (tmp_path / "copies.db").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies.db", "state"]


def test_what_was_there_before_stays_beside_it(tmp_path: Path) -> None:
    old, new = filled(tmp_path / "old", "one"), filled(tmp_path / "new", "two")
    archive.backup(Database(old), tmp_path / "copy.db")
    assert archive.restore(tmp_path / "copy.db", Database(new), check=True)
    assert names(new) == ["two"]
    assert archive.restore(tmp_path / "copy.db", Database(new))
    assert names(new) == ["one"]
    assert not archive.restore(tmp_path / "copy.db", Database(new))
    assert archive.restore(new / "llmgate.db.before-restore", Database(new))
    assert names(new) == ["two"]


def test_a_running_gate_serves_what_was_put_back(two: tuple[GateUnderTest, MockNode, MockNode]) -> None:
    gate, _, _ = two
    secret = gate.create_key("early")
    copy = gate.folder / "copy.db"
    assert gate.cli("backup", str(copy)).stdout == "written\n"
    late = gate.create_key("late")
    gate.cli("keys", "revoke", "early")

    def status(key: str) -> int:
        with gate.client(key) as client:
            return client.get("/v1/models").status_code

    wait_for(lambda: (status(secret), status(late)) == (401, 200), "the gate to know")
    assert gate.cli("restore", str(copy), "--check").stdout == "would be restored\n"
    assert gate.cli("restore", str(copy)).stdout == "restored\n"
    wait_for(lambda: (status(secret), status(late)) == (200, 401), "the gate to have gone back")
    assert gate.cli("restore", str(copy)).stdout == "unchanged\n"


def test_an_older_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    archive.backup(Database(filled(tmp_path / "state", "one")), tmp_path / "copy.db")
    with closing(sqlite3.connect(tmp_path / "copy.db")) as database:
        database.execute("ALTER TABLE keys DROP COLUMN priority")
        database.execute("PRAGMA user_version = 1")
        database.commit()
    target = filled(tmp_path / "new")
    assert archive.restore(tmp_path / "copy.db", Database(target))
    assert names(target) == ["one"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (f"PRAGMA user_version = {SCHEMA_VERSION + 1}", "install the release that made it first"),
        ("PRAGMA user_version = 0", "was made by another llmgate (schema 0"),
        ("DROP TABLE leases", "is not a database of llmgate: it has no table leases"),
    ],
)
def test_a_copy_of_another_schema_is_refused_and_changes_nothing(tmp_path: Path, spoil: str, complaint: str) -> None:
    archive.backup(Database(filled(tmp_path / "state", "one")), tmp_path / "copy.db")
    with closing(sqlite3.connect(tmp_path / "copy.db")) as database:
        database.execute(spoil)
        database.commit()
    target = filled(tmp_path / "new", "two")
    with pytest.raises(archive.NotOurs) as refused:
        archive.restore(tmp_path / "copy.db", Database(target))
    assert complaint in str(refused.value)
    assert names(target) == ["two"]
    assert sorted(path.name for path in target.iterdir()) == [FILE]


@pytest.mark.parametrize("spoil", ["cut", "text", "missing"])
def test_a_file_that_is_no_whole_database_is_refused(tmp_path: Path, spoil: str) -> None:
    source = filled(tmp_path / "state", *(f"key{number}" for number in range(300)))
    copy = tmp_path / "copy.db"
    archive.backup(Database(source), copy)
    if spoil == "cut":
        copy.write_bytes(copy.read_bytes()[: copy.stat().st_size // 2])
    elif spoil == "text":
        copy.write_text("these are my keys")
    else:
        copy.unlink()
    with pytest.raises(archive.NotOurs):
        archive.restore(copy, Database(filled(tmp_path / "new", "two")))
    assert names(tmp_path / "new") == ["two"]


def test_leases_are_copied_too(tmp_path: Path) -> None:
    source = filled(tmp_path / "state")
    store = Store(Database(source))
    store.take_lease(lambda _: Lease("node", "operator", "new fans", 1.0, None))
    store.close()
    archive.backup(Database(source), tmp_path / "copy.db")
    target = filled(tmp_path / "new")
    archive.restore(tmp_path / "copy.db", Database(target))
    store = Store(Database(target))
    assert [lease.node for lease in store.leases()] == ["node"]
    store.close()


def row(number: int) -> dict[str, Any]:
    record = Record(f"r{number}", "/v1/completions", arrived=1.0, key="one", model="tiny")
    return usage.row(record.line(2.0, 0.0), 100.0 + number, "gate")


def stocked(database: Database, *names: str, rows: int = 0) -> Store:
    """A store with these keys, a lease, and the first rows of usage."""
    store = Store(database)
    for name in names:
        store.add_key(
            Key(name, f"digest of {name}", False, ("tiny",), 1.0, limits=Limits(tokens_per_day=5), owner="me")
        )
    store.take_lease(lambda _: Lease("node", "operator", "new fans", 1.0, None))
    store.add_usage([row(number) for number in range(rows)])
    return store


def requests(store: Store) -> list[str]:
    return [one["request_id"] for one in store.requests(usage.Selection())][::-1]


@pytest.mark.parametrize("other", ["sqlite", "postgresql"])
def test_a_copy_of_either_database_can_be_put_into_either(
    database: Database, other: str, postgres: Postgres, tmp_path: Path
) -> None:
    """So a gate moves from its file to a server, and back."""
    target = Database(tmp_path / "target", postgres.fresh() if other == "postgresql" else "")
    with closing(stocked(database, "one", "two", rows=3)) as store, closing(stocked(target, "three", rows=5)) as new:
        store.revoke_key("two", 7.0)
        archive.backup(database, tmp_path / "copy.db")
        assert archive.restore(tmp_path / "copy.db", target, check=True)
        assert [key.name for key in new.all_keys()] == ["three"]
        version = new.version()
        assert archive.restore(tmp_path / "copy.db", target)
        assert new.contents() == store.contents()
        assert new.version() != version, "gates that run must notice"
        assert requests(new) == [f"r{number}" for number in range(5)], "what was used is not taken away"
        assert not archive.restore(tmp_path / "copy.db", target)
        assert archive.restore(target.folder / f"{FILE}.before-restore", target)
        assert [key.name for key in new.all_keys()] == ["three"]
        new.add_key(Key("four", "digest of four"))
        assert [key.name for key in new.all_keys()] == ["three", "four"]


def test_usage_that_is_missing_comes_back_once(database: Database, tmp_path: Path) -> None:
    with closing(stocked(database, "one", rows=4)) as store:
        archive.backup(database, tmp_path / "copy.db")
        store.forget_usage(102.0, 10)
        assert requests(store) == ["r2", "r3"]
        assert archive.restore(tmp_path / "copy.db", database)
        assert sorted(requests(store)) == ["r0", "r1", "r2", "r3"]
        assert not archive.restore(tmp_path / "copy.db", database)


def test_a_copy_of_a_server_that_is_written_to_is_of_one_moment(postgres: Postgres, tmp_path: Path) -> None:
    """Each change is a key more and its predecessor revoked, in two transactions: there are never three live ones."""
    database, stop = Database(tmp_path / "state", postgres.fresh()), threading.Event()
    with closing(Store(database)) as store:

        def write() -> None:
            for number in itertools.count():
                store.add_key(Key(f"key{number}", f"digest {number}"))
                store.add_usage([row(number)])
                store.revoke_key(f"key{number - 1}", 1.0)
                if stop.is_set():
                    return

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(8):
                archive.backup(database, tmp_path / "copy.db")
                (tmp_path / "look").mkdir(exist_ok=True)
                archive.restore(tmp_path / "copy.db", Database(tmp_path / "look"))
                with closing(Store(Database(tmp_path / "look"))) as copy:
                    keys = copy.all_keys()
                    assert len([key for key in keys if key.revoked is None]) <= 2
                    assert len(keys) - copy.usage(usage.Question(("key",), 0.0, 1e9))[1]["requests"] in (0, 1)
        finally:
            stop.set()
            writer.join()
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob(".restore-*"))
