"""The gate's database: its tables, and every transaction on them, in SQLite (WAL) or PostgreSQL.

Owns the schema and what may be changed together. Refuses to know who asks, and which thread: a `Store` has a
connection for each thread that is inside of it.

A schema is changed by adding: tables, and columns with a default. So releases that lie some schemas apart can use one
database, and the previous one can be put back. `meta` says

    schema        of the newest release that has opened it
    compatible    the oldest schema whose releases can still use it; SQLite says it as `user_version` too, which is
                  where releases before schema 3 look
    changes       goes up with each change of keys or leases, whoever makes it: triggers count

Prompts, answers and secrets are never written; a key is kept as its digest.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    REAL,
    BigInteger,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    Integer,
    Label,
    MetaData,
    Row,
    Table,
    Text,
    case,
    cast,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.schema import CreateColumn
from sqlalchemy.types import TypeEngine

from llmgate.core.fleet import Lease
from llmgate.core.keys import Key
from llmgate.core.limits import Limits
from llmgate.core.queue import Priority
from llmgate.core.usage import COUNTS, DAY_S, FIRST_TOKEN, MOST_ROWS, Question, Selection, day
from llmgate.database import Database, KeyTaken, StoreError

SCHEMA_VERSION = 3
COMPATIBLE = 2
_WAIT_S = 5
"""How long a transaction waits for another's lock, and a connection for its server, in seconds."""
_SPEAK_S = 10
"""A server that says nothing for so long has gone."""
_CONNECTIONS = 4
_AT_ONCE = 1000
"""Rows that are in memory at once."""
_MIGRATION_LOCK, _USAGE_LOCK = 0x6C6C6D01, 0x6C6C6D02
"""PostgreSQL's advisory locks that the gate uses."""

_ID: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")
_REAL: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")
"""REAL has 8 bytes in SQLite and 4 in PostgreSQL, too few for a time."""


def _id() -> Column[int]:
    return Column("id", _ID, primary_key=True, nullable=True)  # an INTEGER PRIMARY KEY, as SQLite wants it spelled


def _text(name: str, default: str | None = None, *, null: bool = False) -> Column[str]:
    return Column(name, Text, nullable=null, server_default=None if default is None else text(f"'{default}'"))


def _count(name: str) -> Column[int]:
    return Column(name, _ID, nullable=False, server_default=text("0"))


TABLES = MetaData()
META = Table("meta", TABLES, Column("name", Text, primary_key=True), Column("value", _ID, nullable=False))
_live = text("revoked IS NULL")
KEYS = Table(
    "keys",
    TABLES,
    _id(),
    _text("name"),
    _text("digest"),
    Column("admin", Integer, nullable=False),
    _text("models"),
    Column("created", _REAL, nullable=False),
    Column("revoked", _REAL),
    _text("priority", "normal"),
    _text("owner", ""),
    Column("expires", _REAL),
    _text("limits", "{}"),
    _text("source", ""),
    Index("live_name", "name", unique=True, sqlite_where=_live, postgresql_where=_live),
    Index("live_digest", "digest", unique=True, sqlite_where=_live, postgresql_where=_live),
)
LEASES = Table(
    "leases",
    TABLES,
    Column("node", Text, primary_key=True, nullable=True),
    _text("owner"),
    _text("reason"),
    Column("taken", _REAL, nullable=False),
    Column("expires", _REAL),
)
USAGE = Table(
    "usage",
    TABLES,
    _id(),
    Column("at", _REAL, nullable=False),
    _text("request_id"),
    _text("key"),
    _text("model", null=True),
    _text("path"),
    Column("stream", Integer, nullable=False),
    _text("node", null=True),
    Column("status", Integer, nullable=False),
    _text("end"),
    _count("prompt_tokens"),
    _count("cached_tokens"),
    _count("completion_tokens"),
    Column("queued_seconds", _REAL),
    Column("time_to_first_token_seconds", _REAL),
    Column("duration_seconds", _REAL, nullable=False),
    _text("attempts", "[]"),
    _count("resumed"),
    _text("gate", ""),
    Index("usage_at", "at"),
    Index("usage_key_at", "key", "at"),
    # A row that is written again, since nobody knows whether it was, is the same row.
    Index("usage_once", "request_id", "at", unique=True),
)
_WATCHED = (KEYS, LEASES)
_CHOSEN = ("key", "model", "node")
_ID_DIGITS = 19
"""Digits that fit into 64 bits, whatever they are."""
_SUMS = (
    func.count().label("requests"),
    func.sum(case((USAGE.c.end == "done", 0), else_=1)).label("failed"),
    *(func.sum(USAGE.c[name]).label(name) for name in COUNTS[2:]),
    func.avg(USAGE.c[FIRST_TOKEN]).label(FIRST_TOKEN),
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that the gate keeps in memory of the database."""

    keys: tuple[Key, ...]
    leases: tuple[Lease, ...]


class Store:
    """The database. Every method is one transaction, may be called from any thread, and raises StoreError."""

    def __init__(self, where: Database) -> None:
        """Open the database; make it, readable by its owner alone, or bring it up to date. Raises StoreError."""
        self.where = where
        self._moment = {"isolation_level": "REPEATABLE READ"} if where.shared else {}
        try:
            self._engine = _postgresql(where.url) if where.shared else _sqlite(where)
        except OSError as error:
            raise StoreError(f"cannot open {where}: {error.strerror}") from error
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    def version(self) -> int:
        """A number that changes when somebody has changed keys or leases."""
        with self._reading() as db:
            return int(db.execute(select(META.c.value).where(META.c.name == "changes")).scalar_one())

    def contents(self) -> Contents:
        with self._reading() as db:
            return Contents(tuple(_keys(db)), _leases(db))

    def all_keys(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        with self._reading() as db:
            return _keys(db)

    def add_key(self, key: Key) -> None:
        """Raises KeyTaken."""
        row = _key_row(key) | {"name": key.name, "digest": key.digest, "created": key.created}
        with self._writing() as db:
            try:
                db.execute(insert(KEYS).values(row))
            except IntegrityError as error:
                named = any(word in str(error.orig) for word in ("keys.name", "live_name"))
                what = "of that name" if named else "with that secret"
                raise KeyTaken(f"a live key {what} exists already") from error

    def change_key(self, name: str, decide: Callable[[Key, tuple[Key, ...]], Key]) -> Key | None:
        """Store what `decide` makes of a live key and all other keys, but for its name, secret and age; nobody changes
        any of them meanwhile.

        None when there is no live key of that name. Raises what `decide` does.
        """
        live = (KEYS.c.name == name) & KEYS.c.revoked.is_(None)
        with self._writing(KEYS) as db:
            everyone = _keys(db)
            held = next((key for key in everyone if key.name == name and key.revoked is None), None)
            if held is None:
                return None
            wanted = decide(held, tuple(key for key in everyone if key is not held))
            if wanted != held:
                db.execute(update(KEYS).where(live).values(_key_row(wanted)))
            return wanted

    def revoke_key(self, name: str, when: float) -> bool:
        """Whether there was a live key of that name."""
        with self._writing() as db:
            live = (KEYS.c.name == name) & KEYS.c.revoked.is_(None)
            return db.execute(update(KEYS).where(live).values(revoked=when)).rowcount > 0

    def leases(self) -> tuple[Lease, ...]:
        with self._reading() as db:
            return _leases(db)

    def take_lease(self, decide: Callable[[tuple[Lease, ...]], Lease]) -> Lease:
        """Store what `decide` makes of the leases there are. Nobody changes them meanwhile. Raises what it does."""
        with self._writing(LEASES) as db:
            lease = decide(_leases(db))
            db.execute(delete(LEASES).where(LEASES.c.node == lease.node))
            db.execute(insert(LEASES).values(dataclasses.asdict(lease)))
        return lease

    def release_lease(self, node: str, check: Callable[[tuple[Lease, ...]], None]) -> bool:
        """Remove a node's lease if `check` does not raise; whether there was one."""
        with self._writing(LEASES) as db:
            check(_leases(db))
            return db.execute(delete(LEASES).where(LEASES.c.node == node)).rowcount > 0

    def drop_expired(self, wall: float) -> None:
        with self._writing(LEASES) as db:
            db.execute(delete(LEASES).where(LEASES.c.expires <= wall))

    def add_usage(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of core/usage.py; those that are there already stay as they are."""
        with self._writing() as db:
            if self.where.shared:
                # One at a time, so that rows are seen in the order of their ids: who follows them misses none.
                db.execute(select(func.pg_advisory_xact_lock(_USAGE_LOCK)))
            db.execute(self._once(), rows)

    def usage(self, asked: Question) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Usage added up -> at most MOST_ROWS rows, in the order of what they are of, and the total of all."""
        groups = [self._day() if name == "day" else USAGE.c[name] for name in asked.by]
        wanted = [(USAGE.c.at >= asked.since), (USAGE.c.at < asked.until)]
        wanted += [USAGE.c[name] == value for name in ("key", "model") if (value := getattr(asked, name)) is not None]
        rows = select(*groups, *_SUMS).where(*wanted).group_by(*groups).order_by(*groups).limit(MOST_ROWS)
        with self._reading() as db:
            added = [_added(dict(row)) for row in db.execute(rows).mappings()]
            return added, _added(dict(db.execute(select(*_SUMS).where(*wanted)).mappings().one()))

    def spent(self, key: str, since: float, until: float) -> int:
        """Tokens of prompts and answers of one key's requests that ended in that time, seconds since the epoch."""
        tokens = func.sum(USAGE.c.prompt_tokens + USAGE.c.completion_tokens)
        wanted = (USAGE.c.key == key) & (USAGE.c.at >= since) & (USAGE.c.at < until)
        with self._reading() as db:
            return int(db.execute(select(tokens).where(wanted)).scalar() or 0)

    def requests(self, asked: Selection) -> list[dict[str, Any]]:
        """Rows of usage, newest first."""
        wanted = [USAGE.c[name] == value for name in _CHOSEN if (value := getattr(asked, name)) is not None]
        if asked.status:
            wanted.append(USAGE.c.status.between(*asked.status))
        if asked.before is not None:
            wanted.append(USAGE.c.id < asked.before)
        if asked.after is not None:
            wanted.append(USAGE.c.id > asked.after)
        order = USAGE.c.id.desc() if asked.after is None else USAGE.c.id
        with self._reading() as db:
            found = db.execute(select(USAGE).where(*wanted).order_by(order).limit(asked.limit)).mappings()
            rows = [dict(row) for row in found]
        return rows if asked.after is None else rows[::-1]

    def request(self, name: str) -> dict[str, Any] | None:
        """One row, by its id or by the id of the request; the newest, when a client has used that again."""
        by_request = select(USAGE).where(USAGE.c.request_id == name).order_by(USAGE.c.at.desc()).limit(1)
        with self._reading() as db:
            found = None
            if name.isascii() and name.isdigit() and len(name) < _ID_DIGITS:
                found = db.execute(select(USAGE).where(USAGE.c.id == int(name))).mappings().first()
            found = found or db.execute(by_request).mappings().first()
            return dict(found) if found else None

    def newest_request(self) -> int:
        """The id of the newest row of usage; 0 without one."""
        with self._reading() as db:
            return int(db.execute(select(func.max(USAGE.c.id))).scalar() or 0)

    def forget_usage(self, before: float, most: int) -> int:
        """Drop rows that ended before then, the oldest first -> how many. The newest stays: no id comes again."""
        newest = select(func.max(USAGE.c.id)).scalar_subquery()
        old = select(USAGE.c.id).where(USAGE.c.at < before, USAGE.c.id < newest).order_by(USAGE.c.at).limit(most)
        with self._writing() as db:
            return db.execute(delete(USAGE).where(USAGE.c.id.in_(old))).rowcount

    def _day(self) -> Label[int]:
        """The day of UTC of a row, as a number: PostgreSQL rounds where SQLite cuts off."""
        days = USAGE.c.at / DAY_S
        return cast(func.floor(days) if self.where.shared else days, Integer).label("day")

    def take_all(self, other: Store) -> None:
        """Fill this empty store with what is in another one, all of one moment."""
        with other._reading() as source, self._writing() as db:
            for table in (KEYS, LEASES, USAGE):
                for rows in _parts(source, table):
                    db.execute(insert(table), rows)

    def put_back(self, copy: Store, *, check: bool = False) -> bool:
        """Make keys and leases those of a copy, and add the usage that is only there; whether that changes anything.

        With `check` it is not done.
        """
        count = select(func.count()).select_from(USAGE)
        with copy._reading() as source, self._writing(KEYS, LEASES, USAGE) as db:
            changed = (_keys(db), _leases(db)) != (_keys(source), _leases(source))
            for table in (KEYS, LEASES):
                db.execute(delete(table))
                for rows in _parts(source, table):
                    db.execute(insert(table), _unnumbered(rows))
            before = db.execute(count).scalar_one()
            for rows in _parts(source, USAGE):
                db.execute(self._once(), _unnumbered(rows))
            changed |= db.execute(count).scalar_one() > before  # of many rows at once, no driver says how many it took
            if check or not changed:
                db.rollback()
            return changed

    def _once(self) -> Any:
        """A row of usage that is there already stays as it is."""
        dialect = postgresql if self.where.shared else sqlite
        return dialect.insert(USAGE).on_conflict_do_nothing()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A transaction that sees one moment."""
        with self._named(), self._engine.connect().execution_options(**self._moment) as db, db.begin():
            yield db

    @contextmanager
    def _writing(self, *alone: Table) -> Iterator[Connection]:
        """A transaction for changes, without anybody else's in the tables `alone` (in SQLite, in any) until it ends."""
        with self._named(), self._engine.connect().execution_options(begin="BEGIN IMMEDIATE") as db, db.begin():
            if alone and self.where.shared:
                db.exec_driver_sql(f"LOCK TABLE {', '.join(table.name for table in alone)} IN EXCLUSIVE MODE")
            yield db

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What goes wrong, in one line that names the database."""
        try:
            yield
        except DBAPIError as error:
            why = " ".join(str(error.orig).split())
            raise StoreError(f"cannot use the database {self.where}: {why}") from error
        except SQLAlchemyError as error:
            raise StoreError(f"cannot use the database {self.where}: {error}") from error

    def _migrate(self) -> None:
        """Make the tables, or bring those of an older release up to date; in one transaction, since others may try."""
        with self._writing() as db:
            if self.where.shared:
                db.execute(select(text(f"pg_advisory_xact_lock({_MIGRATION_LOCK})")))
            had = _meta(db)
            compatible = _user_version(db) if not self.where.shared else had.get("compatible", 0)
            if compatible > SCHEMA_VERSION:
                known = f"schema {compatible}, this one knows {SCHEMA_VERSION}"
                raise StoreError(f"{self.where} was made by a newer llmgate ({known})")
            if compatible >= COMPATIBLE and had.get("schema", 0) >= SCHEMA_VERSION:
                return
            _complete(db)
            said = {
                "schema": SCHEMA_VERSION,
                "compatible": max(compatible, COMPATIBLE),
                "changes": had.get("changes", 0),
            }
            db.execute(delete(META))
            db.execute(insert(META), [{"name": name, "value": value} for name, value in said.items()])
            if not self.where.shared:
                db.exec_driver_sql(f"PRAGMA user_version={said['compatible']}")


def _sqlite(where: Database) -> Engine:
    """Raises OSError."""
    where.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite gives its -wal and -shm files the mode of the database.
    os.close(os.open(where.path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(
        URL.create("sqlite", database=str(where.path)),
        connect_args={"timeout": _WAIT_S, "isolation_level": None, "check_same_thread": False},
        pool_size=_CONNECTIONS,
        max_overflow=0,
    )

    @event.listens_for(engine, "connect")
    def tune(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def begin(db: Connection) -> None:
        # The driver's own way begins a transaction late, and none for what it takes for a read.
        db.exec_driver_sql(db.get_execution_options().get("begin", "BEGIN"))

    return engine


def _postgresql(url: str) -> Engine:
    parsed = make_url(url).set(drivername="postgresql+psycopg")
    patience = {
        "connect_timeout": _WAIT_S,
        "keepalives_idle": _SPEAK_S,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": _SPEAK_S * 1000,
        "application_name": "llmgate",
    }
    engine = create_engine(
        parsed,
        connect_args={name: value for name, value in patience.items() if name not in parsed.query},
        pool_size=_CONNECTIONS,
        max_overflow=0,
        pool_pre_ping=True,
    )

    @event.listens_for(engine, "connect")
    def tune(connection: Any, _: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = '{_WAIT_S}s'")
            cursor.execute(f"SET idle_in_transaction_session_timeout = '{_SPEAK_S}s'")
        connection.commit()

    return engine


def _complete(db: Connection) -> None:
    """Make what is not there: tables, columns, indexes, triggers."""
    TABLES.create_all(db)
    for table in TABLES.sorted_tables:
        have = {column["name"] for column in inspect(db).get_columns(table.name)}
        for column in table.columns:
            if column.name not in have:
                db.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {CreateColumn(column).compile(db)}")
        for index in table.indexes:
            index.create(db, checkfirst=True)
    count = "UPDATE meta SET value = value + 1 WHERE name = 'changes';"
    if db.dialect.name == "sqlite":
        for table in _WATCHED:
            for act in ("INSERT", "UPDATE", "DELETE"):
                name = f"{table.name}_{act.lower()}_counted"
                db.exec_driver_sql(f"CREATE TRIGGER IF NOT EXISTS {name} AFTER {act} ON {table.name} BEGIN {count} END")
        return
    db.exec_driver_sql(
        "CREATE OR REPLACE FUNCTION llmgate_count_change() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {count} RETURN NULL; END $$"
    )
    for table in _WATCHED:
        name = f"{table.name}_counted"
        db.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name} ON {table.name}")
        db.exec_driver_sql(
            f"CREATE TRIGGER {name} AFTER INSERT OR UPDATE OR DELETE ON {table.name} "
            "FOR EACH STATEMENT EXECUTE FUNCTION llmgate_count_change()"
        )


def _meta(db: Connection) -> dict[str, int]:
    if not inspect(db).has_table(META.name):
        return {}
    return {row.name: row.value for row in db.execute(select(META.c.name, META.c.value))}


def _user_version(db: Connection) -> int:
    return int(db.exec_driver_sql("PRAGMA user_version").scalar_one())


def _parts(db: Connection, table: Table) -> Iterator[list[dict[str, Any]]]:
    """All rows of a table in the order in which they came, some at a time."""
    found = db.execution_options(yield_per=_AT_ONCE).execute(select(table).order_by(*table.primary_key))
    for rows in found.mappings().partitions():
        yield [dict(row) for row in rows]


def _unnumbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one database for another one, which numbers them itself."""
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]


def _keys(db: Connection) -> list[Key]:
    return [_key(row) for row in db.execute(select(KEYS).order_by(KEYS.c.id))]


def _key(row: Row[Any]) -> Key:
    return Key(
        row.name,
        row.digest,
        bool(row.admin),
        tuple(json.loads(row.models)),
        row.created,
        row.revoked,
        Priority.of(row.priority),
        row.owner,
        row.expires,
        _limits(json.loads(row.limits)),
        row.source,
    )


def _limits(said: Mapping[str, int]) -> Limits:
    """Limits that a newer release knows are not this one's to keep."""
    return Limits(**{field.name: said.get(field.name) for field in dataclasses.fields(Limits)})


def _key_row(key: Key) -> dict[str, Any]:
    """What of a key may change."""
    limits = {name: value for name, value in dataclasses.asdict(key.limits).items() if value is not None}
    return {
        "admin": int(key.admin),
        "models": json.dumps(key.models),
        "revoked": key.revoked,
        "priority": key.priority.word,
        "owner": key.owner,
        "expires": key.expires,
        "limits": json.dumps(limits),
        "source": key.source,
    }


def _added(row: Mapping[str, Any]) -> dict[str, Any]:
    """PostgreSQL adds up to what is no int, and nothing adds up to NULL."""
    added = {**row} | {name: int(row[name] or 0) for name in COUNTS}
    if "day" in added:
        added["day"] = day(added["day"])
    mean = added[FIRST_TOKEN]
    return added | {FIRST_TOKEN: None if mean is None else round(float(mean), 4)}


def _leases(db: Connection) -> tuple[Lease, ...]:
    columns = (LEASES.c.node, LEASES.c.owner, LEASES.c.reason, LEASES.c.taken, LEASES.c.expires)
    return tuple(Lease(*row) for row in db.execute(select(*columns).order_by(LEASES.c.node)))
