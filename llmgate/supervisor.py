"""The first process of `llmgate serve`: owns the listening sockets and the workers that accept on them.

All workers accept from one socket. With a socket each (SO_REUSEPORT) the kernel would spread connections more evenly,
but those that wait on a socket are reset when it is closed; what waits on a shared one is taken by whoever is left.

Starting and replacing are the same steps; the rules are in core/crew.py:

    SIGHUP -> read the settings -> start new workers from the release that is installed now -> all ready
           -> they serve, the old ones leave -> this process becomes the new release, too (exec: same process id,
              same sockets, same children)

and at any step before the last the old workers go on if something is wrong. SIGTERM and SIGINT end the gate, twice at
once. A socket that systemd has opened (LISTEN_FDS) outlives this process: then connections that come while the gate
ends wait there for the next one, instead of being refused.

Knows no HTTP and nothing of what workers do. It is the one who talks to systemd.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import selectors
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmgate import figures, line
from llmgate import settings as configuration
from llmgate.core import crew as rules
from llmgate.core.crew import Crew, Generation, State, Vacancy, Worker
from llmgate.database import Database
from llmgate.line import Line, News, Post
from llmgate.listener import PortInUse, address, adopted, inheritable, listen, passed_sockets
from llmgate.settings import Settings
from llmnode.service import logs
from llmnode.service.notify import Notifier
from llmnode.service.release import release
from llmnode.service.settings import Loaded, SettingError, rows

T = TypeVar("T")
log = logging.getLogger("llmgate.supervisor")

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_HANDOVER = "LLMRACK_GATE_HANDOVER"
"""Environment variable: the file in which the image before an exec has left what the next must know."""
_OURS_ALONE = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
"""What systemd says to this process, and to no child of it."""


@dataclass(frozen=True)
class Invocation:
    """How this process was started, which is how its workers and its next image are: `command`, then `arguments`.

    flags: the settings among the arguments.
    """

    command: list[str]
    arguments: list[str]
    flags: dict[str, str]

    @classmethod
    def of(cls, argv: Sequence[str], executable: str, flags: Mapping[str, str | None]) -> Invocation:
        """From sys.argv and sys.executable. The command starts what is installed there by then."""
        module = Path(argv[0]).name == "__main__.py"
        command = [executable, "-m", "llmgate"] if module else [str(Path(argv[0]).absolute())]
        names = {"config", *(row.name for row in rows(Settings))}
        given = {name: value for name, value in flags.items() if name in names and value is not None}
        return cls(command, list(argv[1:]), given)

    def pinned(self) -> list[str]:
        """The command with the link to the installed release followed, so that it starts that one after a switch too.

        Only links in its folder's path: the interpreter of a virtual environment is a link itself, and must stay one.
        """
        first = Path(self.command[0])
        return [str(first.parent.resolve() / first.name), *self.command[1:]]


@dataclass(frozen=True)
class Edition:
    """What the workers of one generation are started from.

    Pinned, so that a worker that is started again later is the same as the others: `command` names a release, and the
    flag `config` a copy of the settings file. `held` is the address that this process has bound, empty when the socket
    was passed to it; `admin_fd` and `admin_held` are the same of the admin API's own address, None where it has none.
    """

    generation: Generation
    command: list[str]
    flags: dict[str, str]
    held: str
    listen_fd: int
    log_level: str
    log_format: str
    admin_fd: int | None = None
    admin_held: str | None = None

    def fds(self) -> tuple[int, ...]:
        """What its workers listen on."""
        return (self.listen_fd,) if self.admin_fd is None else (self.listen_fd, self.admin_fd)


@dataclass(frozen=True)
class Place:
    """A socket that listens, and the address that this process has bound it to; empty when it was passed."""

    socket: socket.socket
    held: str


@dataclass
class Peer:
    """What is kept of a worker beside its place in the crew. `status` and `active` are its last words."""

    line: Line
    status: str = ""
    active: int = 0
    why: str = ""


@dataclass
class Estate:
    """All that a supervisor works with: what one image of this process hands over to the next."""

    folder: Path
    edition: Edition
    sockets: tuple[socket.socket, ...]
    crew: Crew
    peers: dict[int, Peer]
    again: bool


def serve(invocation: Invocation) -> int:
    """Run a gate and return its exit code. Raises SettingError, PortInUse or StoreError before anything listens."""
    environ = dict(os.environ)
    estate = _inherited(environ)
    if estate:
        logs.setup(estate.edition.log_level, estate.edition.log_format, "llmgate")
        log.info("release %s goes on with %d workers", release(), len(estate.peers))
    else:
        estate = _founded(invocation, environ)
    try:
        return Supervisor(invocation, environ, estate).run()
    finally:
        shutil.rmtree(estate.folder, ignore_errors=True)


class Supervisor:
    """Carries out what the crew decides."""

    def __init__(self, invocation: Invocation, environ: Mapping[str, str], estate: Estate) -> None:
        self._invocation, self._environ = invocation, environ
        self._notifier = Notifier(environ)
        self._folder = estate.folder
        self._crew, self._peers = estate.crew, estate.peers
        self._sockets = {sock.fileno(): sock for sock in estate.sockets}
        self._editions = {estate.edition.generation.number: estate.edition}
        self._again = estate.again
        self._swapped = False
        self._refused = ""
        self._status = ""
        self._code: int | None = None
        self._signals = Signals()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals, selectors.EVENT_READ, None)
        for pid, peer in self._peers.items():
            self._selector.register(peer.line, selectors.EVENT_READ, pid)

    def run(self) -> int:
        """Until nobody is left, and return the exit code; unless this process becomes its next release before."""
        next_tick = next_ping = time.monotonic()
        ping_s = self._notifier.watchdog_interval_s
        if self._crew.serving is None:
            self._feed(rules.Begin(self._serving().generation, next_tick))
        self._reap()
        while self._code is None:
            if self._again and self._crew.coming is None:
                self._reload()
            if self._swapped:
                self._become_new()
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + rules.TICK_S
                self._feed(rules.Tick(now))
                self._say_status()
            if ping_s and now >= next_ping:
                # For all of them: a worker that is stuck is killed on its own (core/crew.py).
                next_ping = now + ping_s
                self._notifier.watchdog()
            self._wait(min(next_tick, next_ping if ping_s else next_tick) - now)
        log.info("stopped")
        return self._code

    def _wait(self, seconds: float) -> None:
        """For news of the workers, or signals."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._heed_signals()
            elif key.data in self._peers:
                self._hear(key.data)

    def _heed_signals(self) -> None:
        numbers = self._signals.read()
        for number in numbers:
            if number == signal.SIGHUP:
                self._again = True
            elif number != signal.SIGCHLD:
                self._stop()
        if signal.SIGCHLD in numbers:
            self._reap()

    def _stop(self) -> None:
        if self._crew.ending is not None:
            self._feed(rules.Rush())
            return
        active = sum(peer.active for peer in self._peers.values())
        self._notifier.stopping(f"draining, {active} requests running")
        passed = not self._serving().held
        log.info("stopping %d workers%s", len(self._peers), "; new connections wait in the socket" if passed else "")
        self._feed(rules.Stop(passed, time.monotonic()))

    def _reload(self) -> None:
        """Start the next generation. The caller has seen to it that none is coming."""
        self._again = False
        if self._crew.ending is not None:
            return
        number = 1 + max(self._serving().generation.number, *(worker.generation for worker in self._crew.workers))
        self._notifier.reloading(f"generation {number} is starting")
        try:
            edition = self._next_edition(number)
        except (SettingError, PortInUse, OSError) as error:
            self._refuse(number, str(error))
            return
        log.info("generation %d is starting: %d workers", number, edition.generation.workers)
        self._editions[number] = edition
        self._feed(rules.Begin(edition.generation, time.monotonic()))

    def _next_edition(self, number: int) -> Edition:
        """Raises SettingError, PortInUse or OSError, and has then changed nothing."""
        loaded = _checked(self._invocation)
        settings, serving = loaded.values, self._serving()
        door = self._place(serving.listen_fd, serving.held, (settings.host, settings.port))
        wanted, admin = configuration.admin_address(settings), None
        if wanted:
            admin = self._place(serving.admin_fd, serving.admin_held, wanted)
        elif serving.admin_held == "":
            raise SettingError("admin_listen is not set, and systemd's socket for it stays until the gate is restarted")
        return _edition(self._invocation, loaded, number, self._folder, door, admin)

    def _place(self, fd: int | None, held: str | None, wanted: tuple[str, int]) -> Place:
        """The socket that there is, unless this process has bound it to another address than the wanted one."""
        if fd is not None and held in ("", address(*wanted)):
            return Place(self._sockets[fd], held or "")
        sock = listen(*wanted)
        self._sockets[sock.fileno()] = sock
        return Place(sock, address(*wanted))

    def _feed(self, event: rules.Event) -> None:
        self._crew, orders = self._crew.step(event)
        for order in orders:
            self._carry_out(order)

    def _carry_out(self, order: rules.Order) -> None:
        match order:
            case rules.Spawn():
                self._spawn(order)
            case rules.Leave(pid):
                self._tell(pid, line.Order.LEAVE)
            case rules.Close(pid):
                self._tell(pid, line.Order.CLOSE)
            case rules.Hurry(pid):
                self._tell(pid, line.Order.HURRY)
            case rules.Kill(pid, why):
                log.error("killing worker %d: %s", pid, why)
                os.kill(pid, signal.SIGKILL)
            case rules.Serve(number):
                self._serve(number)
            case rules.Refuse(number, why):
                self._refuse(number, why)
            case rules.Exit(code):
                self._code = code

    def _spawn(self, spawn: rules.Spawn) -> None:
        edition = self._editions.get(spawn.generation)
        if edition is None:
            return  # refused in the same step: the worker before this one could not be started
        ours, theirs = line.pair()
        folder, line_fd = str(self._folder), theirs.fileno()
        post = Post(spawn.place, spawn.generation, edition.listen_fd, line_fd, folder, edition.admin_fd)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in edition.flags.items()]
        command = [*edition.command, "worker", post.text(), *flags]
        environ = {name: value for name, value in self._environ.items() if name not in _OURS_ALONE}
        environ[figures.ENVIRONMENT] = str(self._folder)
        try:
            with theirs, inheritable(*edition.fds(), line_fd):
                pid = os.posix_spawn(command[0], command, environ)
        except OSError as error:
            ours.close()
            why = f"cannot start {command[0]}: {error.strerror}"
            log.error("%s", why)
            self._feed(rules.NotSpawned(spawn, why, time.monotonic()))
            return
        self._peers[pid] = Peer(ours)
        self._selector.register(ours, selectors.EVENT_READ, pid)
        self._feed(rules.Spawned(pid, spawn, time.monotonic()))

    def _hear(self, pid: int) -> None:
        peer = self._peers[pid]
        if peer.line.ended:
            return
        for word, details in peer.line.heard():
            now = time.monotonic()
            self._feed(rules.Spoke(pid))
            if word is News.READY:
                self._feed(rules.Ready(pid, now))
            elif word is News.ALIVE:
                peer.status, peer.active = str(details.get("status", "")), int(details.get("active", 0))
            elif word is News.LEAVING:
                self._feed(rules.Leaving(pid, now))
            elif word is News.FAILED:
                peer.why = str(details.get("why", ""))
            elif word is News.CHANGED:
                for other in self._peers:
                    if other != pid:
                        self._tell(other, line.Order.REFRESH)
        if peer.line.ended:
            self._selector.unregister(peer.line)  # that the process has ended is for SIGCHLD to say

    def _tell(self, pid: int, word: line.Order) -> None:
        if pid in self._peers:
            self._peers[pid].line.say(word)

    def _reap(self) -> None:
        for pid in list(self._peers):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._bury(pid, os.waitstatus_to_exitcode(status))

    def _bury(self, pid: int, code: int) -> None:
        self._hear(pid)  # its last words
        peer = self._peers.pop(pid)
        if not peer.line.ended:
            self._selector.unregister(peer.line)
        peer.line.close()
        try:
            figures.retire(self._folder, pid)
        except Exception:  # what is only counted must not end what serves
            log.exception("what worker %d has counted is lost", pid)
        why = peer.why or (f"it ended with code {code}" if code >= 0 else f"killed by {_signal_name(-code)}")
        worker = self._crew.of(pid)
        expected = worker is not None and worker.state is State.LEAVING
        log.log(logging.INFO if expected else logging.ERROR, "worker %d is gone: %s", pid, why)
        self._feed(rules.Ended(pid, code, why, time.monotonic()))

    def _serving(self) -> Edition:
        """What serves; before anything does, what is being started."""
        generation = self._crew.serving
        return self._editions[generation.number if generation else min(self._editions)]

    def _serve(self, number: int) -> None:
        self._swapped = len(self._editions) > 1
        for other in [other for other in self._editions if other != number]:
            self._drop(other)
        self._refused = ""
        log.info("generation %d serves", number)
        self._notifier.ready(self._summary())

    def _refuse(self, number: int, why: str) -> None:
        if self._crew.serving is None:
            return  # the gate ends, and the worker has said why
        self._drop(number)
        self._refused = f"; generation {number} was refused: {why}"
        log.error("generation %d is refused, generation %d stays: %s", number, self._crew.serving.number, why)
        self._notifier.ready(self._summary())

    def _drop(self, number: int) -> None:
        """Forget an edition, and the socket that no other one listens on."""
        edition = self._editions.pop(number, None)
        used = {fd for other in self._editions.values() for fd in other.fds()}
        for fd in [fd for fd in self._sockets if fd not in used]:
            self._sockets.pop(fd).close()
        if edition and "config" in edition.flags:
            Path(edition.flags["config"]).unlink(missing_ok=True)

    def _say_status(self) -> None:
        if self._crew.serving and self._crew.ending is None and self._summary() != self._status:
            self._status = self._summary()
            self._notifier.status(self._status)

    def _summary(self) -> str:
        crew, serving = self._crew, self._crew.serving
        assert serving is not None
        said = [self._peers[w.pid].status for w in crew.workers if w.generation == serving.number]
        parts = [next(filter(None, said), "nothing known of the nodes yet")]
        parts.append(f"{crew.count(State.READY, serving)} of {serving.workers} workers")
        if crew.coming:
            parts.append(f"generation {crew.coming.number} is starting")
        if crew.count(State.LEAVING):
            parts.append(f"{crew.count(State.LEAVING)} finishing")
        return ", ".join(parts) + self._refused

    def _become_new(self) -> None:
        """Go on as the release that is installed now. The same process: its children and its id stay."""
        self._swapped = False
        # A signal between two images would end the process. Blocked ones wait for the next image.
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        try:
            self._heed_signals()
            if self._crew.ending is not None:
                return
            handover = self._folder / "handover.json"
            handover.write_text(json.dumps(self._handed_over()))
            arguments = [*self._invocation.command, *self._invocation.arguments]
            with inheritable(*self._serving().fds(), *(peer.line.fileno() for peer in self._peers.values())):
                os.execve(arguments[0], arguments, {**self._environ, _HANDOVER: str(handover)})
        except OSError as error:
            log.error("cannot become the new release, this one goes on: %s", error)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    def _handed_over(self) -> dict[str, Any]:
        return {
            "folder": str(self._folder),
            "edition": dataclasses.asdict(self._serving()),
            "crew": dataclasses.asdict(self._crew),
            "peers": {pid: {"fd": p.line.fileno(), "status": p.status} for pid, p in self._peers.items()},
            "again": self._again,
        }


class Signals:
    """Signals as bytes to read, in the order they came."""

    def __init__(self) -> None:
        self._read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in WATCHED:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    def fileno(self) -> int:
        return self._read

    def read(self) -> bytes:
        try:
            return os.read(self._read, 4096)
        except BlockingIOError:
            return b""


def _founded(invocation: Invocation, environ: Mapping[str, str]) -> Estate:
    loaded = _checked(invocation)
    logs.setup(loaded.values.log_level, loaded.values.log_format, "llmgate")
    passed, settings = passed_sockets(environ), loaded.values
    wanted = configuration.admin_address(settings)
    if passed.admin and not wanted:
        raise SettingError("admin_listen is not set, and systemd has opened a socket for it")
    door = _opened(passed.door, (settings.host, settings.port))
    admin = _opened(passed.admin, wanted) if wanted else None
    # Not left to the workers: when several turn a new database to WAL at once, one may find it locked.
    _apart(_prepare, configuration.database(settings))
    folder = Path(tempfile.mkdtemp(prefix="llmgate-"))
    edition = _edition(invocation, loaded, 1, folder, door, admin)
    sockets = (door.socket, admin.socket) if admin else (door.socket,)
    return Estate(folder, edition, sockets, Crew(), {}, again=False)


def _opened(passed: socket.socket | None, wanted: tuple[str, int]) -> Place:
    return Place(passed, "") if passed else Place(listen(*wanted), address(*wanted))


def _prepare(where: Database) -> None:
    """Make the database, or bring it up to date. Raises StoreError."""
    from llmgate.store import Store

    Store(where).close()


def _apart(work: Callable[[Database], None], where: Database) -> None:
    """Do it in a process that ends with it: what it imports would double the memory of this one. Raises as it does."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        child.submit(work, where).result()


def _inherited(environ: dict[str, str]) -> Estate | None:
    """What the image before this one has left, if there was one."""
    path = Path(environ.pop(_HANDOVER, ""))
    if path == Path():
        return None
    body = json.loads(path.read_text())
    path.unlink()
    edition = _made(Edition, body["edition"], generation=_made(Generation, body["edition"]["generation"]))
    crew = Crew(
        tuple(_made(Worker, worker, state=State(worker["state"])) for worker in body["crew"]["workers"]),
        edition.generation,
        vacancies=tuple(_made(Vacancy, vacancy) for vacancy in body["crew"]["vacancies"]),
    )
    peers = {int(pid): Peer(Line(adopted(peer["fd"])), peer["status"]) for pid, peer in body["peers"].items()}
    sockets = tuple(adopted(fd) for fd in edition.fds())
    return Estate(Path(body["folder"]), edition, sockets, crew, peers, bool(body["again"]))


def _made(kind: type[T], body: Mapping[str, Any], **changed: Any) -> T:
    """A dataclass from JSON. Fields of another release are ignored, or have their defaults."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in body.items() if name in known} | changed)


def _checked(invocation: Invocation) -> Loaded[Settings]:
    """The settings, when they and the files that they name can be used. Raises SettingError."""
    loaded = configuration.read(invocation.flags)
    configuration.usable(loaded.values)
    return loaded


def _edition(
    invocation: Invocation, loaded: Loaded[Settings], number: int, folder: Path, door: Place, admin: Place | None
) -> Edition:
    settings, flags = loaded.values, dict(invocation.flags)
    if loaded.path:
        copy = folder / f"{number}.toml"
        copy.write_bytes(loaded.path.read_bytes())
        flags["config"] = str(copy)
    generation = Generation(number, settings.workers, settings.drain_seconds)
    return Edition(
        generation,
        invocation.pinned(),
        flags,
        door.held,
        door.socket.fileno(),
        settings.log_level,
        settings.log_format,
        admin.socket.fileno() if admin else None,
        admin.held if admin else None,
    )


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
