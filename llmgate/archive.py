"""Copies of the gate's database: taken while it is written to, put back while it is served from.

Owns what a copy must be to be put back, and that this happens whole or not at all. Knows no table: `ledger.py` does.

Both ways go through SQLite's backup API: a copy is of one moment, whatever is written meanwhile, and what is put back
replaces the database in one transaction, which running gates notice like any other change. What was there before stays
beside it as llmgate.db.before-restore.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from llmgate.ledger import FILE, SCHEMA_VERSION, Store, StoreError

_BUSY_S = 5.0
_TABLES = {"keys", "leases"}


class NotOurs(Exception):
    """The file cannot be put back; the message names it and says why."""


def backup(folder: Path, to: Path) -> None:
    """Write a copy of the database of `folder` to `to`, mode 0600. Raises StoreError."""
    source = folder / FILE
    if not source.exists():
        raise StoreError(f"there is no {source}: nothing to copy")
    try:
        _copy(source, to)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot copy {source} to {to}: {error}") from error


def restore(copy: Path, folder: Path, *, check: bool = False) -> bool:
    """Put a copy back into `folder`; whether that changes anything. With `check` it only says so.

    Raises NotOurs for a file that is no whole database of this gate's schema or an older one, StoreError.
    """
    _judge(copy)
    target = folder / FILE
    try:
        with _draft(folder if folder.exists() else copy.parent) as draft:
            _copy(copy, draft / FILE)
            Store(draft).close()  # brings an older schema up to date
            if target.exists() and _contents(target) == _contents(draft / FILE):
                return False
            if check:
                return True
            Store(folder).close()
            _copy(target, target.with_suffix(".db.before-restore"))
            with (
                closing(sqlite3.connect(draft / FILE)) as new,
                closing(sqlite3.connect(target, timeout=_BUSY_S)) as old,
            ):
                new.backup(old)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot put {copy} back into {target}: {error}") from error
    return True


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


def _contents(database: Path) -> list[str]:
    with closing(sqlite3.connect(database, timeout=_BUSY_S)) as opened:
        return list(opened.iterdump())


@contextmanager
def _draft(beside: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, on the same disk and with the same owner as the database."""
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=beside) as folder:
        yield Path(folder)
