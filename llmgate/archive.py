"""Copies of the gate's database: taken while it is written to, put back while it is served from.

Owns what a copy must be to be put back, and that this happens whole or not at all. Knows no table: `store.py` does.

A copy is a SQLite file, whichever database it is of, so that one made here can be put back there. It is of one moment,
whatever is written meanwhile. What is put back replaces keys and leases in one transaction, which running gates notice
like any other change. Usage is what has happened: of that, a copy brings back what is missing and takes nothing away.
What was there before stays in the state folder as llmgate.db.before-restore.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from llmgate.database import FILE, Database, StoreError
from llmgate.store import SCHEMA_VERSION, Store

_BUSY_S = 5.0
_TABLES = {"keys", "leases"}


class NotOurs(Exception):
    """The file cannot be put back; the message names it and says why."""


def backup(where: Database, to: Path) -> None:
    """Write a copy of the database to `to`, mode 0600. Raises StoreError."""
    if not where.shared and not where.path.exists():
        raise StoreError(f"there is no {where.path}: nothing to copy")
    try:
        if not where.shared:
            _copy(where.path, to)
            return
        with _draft(to.absolute().parent) as draft, closing(Store(where)) as store:
            with closing(Store(draft)) as copy:
                copy.take_all(store)
            _copy(draft.path, to)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot copy {where} to {to}: {error}") from error


def restore(copy: Path, where: Database, *, check: bool = False) -> bool:
    """Put a copy back; whether that changes anything. With `check` it only says so.

    Raises NotOurs for a file that is no whole database of this gate's schema or an older one, StoreError.
    """
    _judge(copy)
    if check and not where.shared and not where.path.exists():
        return True
    try:
        with _draft(where.folder if where.folder.exists() else copy.absolute().parent) as draft:
            _copy(copy, draft.path)
            with closing(Store(draft)) as new, closing(Store(where)) as store:
                changes = store.put_back(new, check=True)
                if changes and not check:
                    where.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    backup(where, where.folder / f"{FILE}.before-restore")
                    store.put_back(new)
                return changes
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot put {copy} back into {where}: {error}") from error


def _judge(copy: Path) -> None:
    """Raises NotOurs unless the file is a whole database of the gate, of a schema that is known here."""
    if not copy.is_file():
        raise NotOurs(f"there is no file {copy}")
    try:
        with closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables >= _TABLES:
                raise NotOurs(f"{copy} is not a database of llmgate: it has no table {min(_TABLES - tables)}")
            if not 1 <= version <= SCHEMA_VERSION:
                known = f"schema {version}, and this one knows 1 to {SCHEMA_VERSION}"
                advice = ": install the release that made it first" if version > SCHEMA_VERSION else ""
                raise NotOurs(f"{copy} was made by another llmgate ({known}){advice}")
            damage = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise NotOurs(f"{copy} is not a whole database: {error}") from error
    if damage != "ok":
        raise NotOurs(f"{copy} is damaged: {damage}")


def _copy(source: Path, to: Path) -> None:
    """A copy of one moment, readable by its owner alone, whole or absent."""
    draft = to.with_name(to.name + ".new")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        with closing(sqlite3.connect(source, timeout=_BUSY_S)) as old, closing(sqlite3.connect(draft)) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode=DELETE")  # one file, without a -wal beside it
        draft.replace(to)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _draft(beside: Path) -> Iterator[Database]:
    """A folder that is gone afterwards, on the same disk and with the same owner as the database."""
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=beside) as folder:
        yield Database(Path(folder))
