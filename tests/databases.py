"""Real servers that tests keep data in: PostgreSQL and Redis, on free ports, in folders that go with them.

Each is started once for all tests of a process that want it; a test gets a database of its own in it. A test may kill
the server it was given, and start it again: what was committed is there then.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
import redis as redis_client

from llmgate.database import Database
from tests import programs
from tests.processes import free_port, wait_for


class Server:
    """A process that can be killed and started again on the same port and folder."""

    def __init__(self, name: str, command: Callable[[Path, int], Sequence[str]], answers: Callable[[], bool]) -> None:
        """`command` for a folder and a port; `answers`: whether it can be used. Not started yet."""
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"llmrack-{name}-"))
        self._name, self._command, self._answers = name, command, answers
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self._name} does not run"
        return self._process.pid

    def start(self) -> None:
        """Returns when it can be used. A killed one may have left children that must go first, so it tries again."""

        def up() -> bool:
            if self._process is None or self._process.poll() is not None:
                with (self.folder / "log").open("ab") as log:
                    command = self._command(self.folder, self.port)
                    self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            return self._answers()

        try:
            wait_for(up, self._name)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{(self.folder / 'log').read_text(errors='replace')[-2000:]}") from None

    def kill(self) -> None:
        """As a crash does."""
        self.strike(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def strike(self, number: int) -> None:
        os.kill(self.pid, number)

    def close(self, ending: int = signal.SIGTERM) -> None:
        """End it and remove all that it kept."""
        if self._process is not None and self._process.poll() is None:
            self.strike(ending)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Postgres(Server):
    """PostgreSQL that lets everybody of this machine in, with crashes of the machine left out: it does not fsync."""

    def __init__(self) -> None:
        self._bin = programs.need("initdb").parent
        programs.need("postgres")
        super().__init__("postgresql", self._serve, self._up)
        self._numbers = itertools.count()
        # It refuses to run as root.
        self._as: list[str] = []
        if os.geteuid() == 0:
            user = next(u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody"))
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
        made = [*self._as, str(self._bin / "initdb"), "--no-sync", "--auth=trust", "--username=llmrack"]
        subprocess.run([*made, str(self.folder / "data")], check=True, capture_output=True, cwd=self.folder)

    def url(self, database: str) -> str:
        return f"postgresql://llmrack@127.0.0.1:{self.port}/{database}"

    def fresh(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def _serve(self, folder: Path, port: int) -> list[str]:
        options = (
            f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off",
            "max_connections=200", "logging_collector=off",
        )  # fmt: skip
        flags = [flag for option in options for flag in ("-c", option)]
        return [*self._as, str(self._bin / "postgres"), "-D", str(folder / "data"), *flags]

    def _up(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class Redis(Server):
    """Redis that keeps nothing on disk."""

    def __init__(self) -> None:
        self._program = programs.need("redis-server")
        super().__init__("redis", self._serve, self._up)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def flush(self) -> None:
        """Forget everything."""
        with redis_client.Redis.from_url(self.url) as client:
            client.flushall()

    def _serve(self, folder: Path, port: int) -> list[str]:
        place = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder))
        return [str(self._program), *place, "--save", "", "--appendonly", "no"]

    def _up(self) -> bool:
        try:
            with redis_client.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis_client.RedisError:
            return False


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server. A test that kills it starts it again."""
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close(signal.SIGINT)  # its "fast shutdown": it waits for no client


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis server. A test that kills it starts it again; `flush()` it first."""
    server = Redis()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """An empty database of either kind, with a state folder that is not there yet."""
    server = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    return Database(tmp_path / "state", server.fresh() if server else "")
