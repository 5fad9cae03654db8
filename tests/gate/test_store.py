"""What the gate wrote down outlives its releases."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from llmgate.core.keys import Key
from llmgate.core.queue import Priority
from llmgate.database import FILE, Database, StoreError
from llmgate.store import Store

FIRST = """
CREATE TABLE keys (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, admin INTEGER NOT NULL, models TEXT NOT NULL,
    created REAL NOT NULL, revoked REAL
);
CREATE UNIQUE INDEX live_name ON keys (name) WHERE revoked IS NULL;
CREATE UNIQUE INDEX live_digest ON keys (digest) WHERE revoked IS NULL;
CREATE TABLE leases (
    node TEXT PRIMARY KEY, owner TEXT NOT NULL, reason TEXT NOT NULL, taken REAL NOT NULL, expires REAL
);
INSERT INTO keys (name, digest, admin, models, created) VALUES ('old', 'd', 1, '["tiny"]', 5.0);
PRAGMA user_version=1;
"""
"""The database of the first release, with a key."""


def test_the_first_releases_keys_are_kept(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as db:
        db.executescript(FIRST)
    for _ in range(2):
        store = Store(Database(tmp_path))
        assert store.all_keys() == [Key("old", "d", True, ("tiny",), 5.0)]
        store.close()


def test_an_old_and_a_new_database_have_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with sqlite3.connect(tmp_path / "old" / FILE) as db:
        db.executescript(FIRST)
    found = []
    for name in ("old", "new"):
        Store(Database(tmp_path / name)).close()
        with sqlite3.connect(tmp_path / name / FILE) as db:
            found.append([db.execute(f"PRAGMA table_info({table})").fetchall() for table in ("keys", "leases")])
    assert found[0] == found[1]


def test_a_newer_releases_database_is_left_alone(tmp_path: Path) -> None:
    Store(Database(tmp_path)).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(StoreError, match="newer llmgate"):
        Store(Database(tmp_path))


@pytest.mark.parametrize("priority", list(Priority))
def test_a_key_keeps_its_priority(database: Database, priority: Priority) -> None:
    store = Store(database)
    store.add_key(Key("k", "d", priority=priority))
    assert store.all_keys()[0].priority is priority
    store.change_key("k", lambda key, others: replace(key, priority=Priority.LOW))
    assert store.all_keys()[0].priority is Priority.LOW
    store.close()
