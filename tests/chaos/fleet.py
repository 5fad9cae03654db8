"""The fleet that chaos is done to: nodes and gates as processes of this machine, and each fault as it is carried out.

Owns: processes, their addresses and sockets, and the record of how many nodes were ready when. Refuses to know: what is
asked of the fleet, and which fault comes next. Processes are ended by their own ids.

A gate's listening socket is made here and passed to it, as systemd does for a unit with a socket: so what connects
while one gate ends and the next begins waits in the socket's queue.
"""

from __future__ import annotations

import asyncio
import bisect
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import aiohttp
import psutil

from tests.chaos.faults import Fault, Kind
from tests.processes import PATIENCE_S, free_port

TOKEN = "fleet-token-of-the-chaos-0123456789"
SECRET = "sk-chaos-0123456789abcdef0123456789abcdef"
OWNER = "chaos"
_STEP_S = 0.05
_PASSED = (
    "import os, sys; fd = int(sys.argv[1]); os.dup2(fd, 3) if fd != 3 else None; os.set_inheritable(3, True); "
    "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
)
"""Runs in the gate's process before the gate does: the protocol of sd_listen_fds(3)."""


class Network(Protocol):
    """Where the members of the fleet run and how they reach each other."""

    def address(self, name: str) -> str:
        """The address on which a member listens."""

    def inside(self, name: str, command: list[str]) -> list[str]:
        """The command that runs `command` where that member is."""

    def cut(self, name: str) -> None: ...

    def mend(self, name: str) -> None: ...


class Loopback:
    """All on 127.0.0.1: nothing can be cut."""

    def address(self, name: str) -> str:
        return "127.0.0.1"

    def inside(self, name: str, command: list[str]) -> list[str]:
        return command

    def cut(self, name: str) -> None:
        raise NotImplementedError("loopback cannot be cut")

    mend = cut


class Member:
    """A node or a gate: a process that can be started again at the same address. `url` is what others use."""

    def __init__(self, name: str, command: list[str], url: str, log: Path, fd: int | None = None) -> None:
        self.name, self.command, self.url, self.log, self._fd = name, command, url, log, fd
        self.wanted = False
        self.starts = 0

    def start(self) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLMNODE_", "LLMGATE_", "NOTIFY_SOCKET"))}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=clean,
                pass_fds=() if self._fd is None else (self._fd,),
            )
        self.wanted = True
        self.starts += 1

    def signal(self, number: signal.Signals) -> None:
        self.wanted = number not in (signal.SIGKILL, signal.SIGTERM)
        self.process.send_signal(number)

    def workers(self) -> list[int]:
        """Ids of the processes that it has started."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    async def ended(self) -> None:
        """Wait for the end of the process. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} does not end")
            await asyncio.sleep(_STEP_S)

    def trouble(self) -> str:
        """Why it should not be as it is, nothing when all is well: a process that nobody has ended, a traceback."""
        code = self.process.poll()
        if self.wanted and code is not None:
            return f"{self.name} ended by itself with code {code}: {self.last_words()}"
        text = self.log.read_text(errors="replace")
        at = text.find("Traceback")
        return f"a traceback in the log of {self.name}: {text[max(0, at - 300) : at + 3000]}" if at >= 0 else ""

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """End it at once, asleep or not."""
        if self.starts and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Readiness:
    """How many nodes were ready when."""

    def __init__(self) -> None:
        self._ready: set[str] = set()
        self._changes: list[tuple[float, int]] = []

    def note(self, name: str, ready: bool) -> None:
        (self._ready.add if ready else self._ready.discard)(name)
        self._changes.append((time.monotonic(), len(self._ready)))

    def none_within(self, began: float, ended: float) -> bool:
        """Whether at some moment from `began` to `ended` no node was ready."""
        first = max(0, bisect.bisect_right(self._changes, (began, sys.maxsize)) - 1)
        return any(not count for moment, count in self._changes[first:] if moment <= ended)


@dataclass
class Fleet:
    """nodes, gates: by name.   disturbed: members that a fault is at.      done: faults of each kind that are over."""

    nodes: dict[str, Member]
    gates: dict[str, Member]
    network: Network
    session: aiohttp.ClientSession
    readiness: Readiness = field(default_factory=Readiness)
    disturbed: set[str] = field(default_factory=set)
    done: dict[str, int] = field(default_factory=dict)

    def members(self) -> list[Member]:
        return [*self.nodes.values(), *self.gates.values()]

    def may_begin(self, fault: Fault, most: int) -> bool:
        """Whether its target is undisturbed, and not too many nodes would be disturbed at once."""
        nodes = len(self.disturbed & set(self.nodes))
        return fault.target not in self.disturbed and (fault.kind.of_gates or nodes < most)

    async def suffer(self, fault: Fault) -> None:
        """Carry a fault out, to the end of it: its target is as good as before."""
        self.disturbed.add(fault.target)
        member = self.gates[fault.target] if fault.kind.of_gates else self.nodes[fault.target]
        if not fault.kind.of_gates:
            self.readiness.note(member.name, False)
        await _FAULTS[fault.kind](self, member, fault.lasts_s)
        await self.ready(member)
        if not fault.kind.of_gates:
            self.readiness.note(member.name, True)
        self.disturbed.discard(fault.target)
        self.done[fault.kind.value] = self.done.get(fault.kind.value, 0) + 1

    async def ready(self, member: Member) -> None:
        """Wait until it says so itself. Raises AssertionError when it has ended or never does."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert member.process.poll() is None, f"{member.name} ended: {member.last_words()}"
            try:
                async with self.session.get(member.url + "/ready", timeout=aiohttp.ClientTimeout(total=2)) as answer:
                    if answer.status == 200:
                        return
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
                pass
            await asyncio.sleep(_STEP_S)
        raise AssertionError(f"{member.name} does not become ready: {member.last_words()}")

    async def all_seen(self) -> None:
        """Wait until every gate would use every node."""
        for gate in self.gates.values():
            end = time.monotonic() + PATIENCE_S
            while sum(node["usable"] is True for node in await self._admin("GET", gate, "")) < len(self.nodes):
                assert time.monotonic() < end, f"{gate.name} does not see all nodes: {gate.last_words()}"
                await asyncio.sleep(_STEP_S)

    async def lease(self, member: Member, method: str) -> None:
        """Take or give back a lease at every gate. One that is refused for want of room is no lease: that is right."""
        for gate in self.gates.values():
            await self._admin(method, gate, f"/{member.name}/drain")

    async def _admin(self, method: str, gate: Member, path: str) -> list[dict[str, object]]:
        body = {"owner": OWNER, "ttl_seconds": 120} if method == "POST" else None
        query = {"owner": OWNER} if method == "DELETE" else None
        url = f"{gate.url}/admin/nodes{path}"
        headers = {"authorization": f"Bearer {SECRET}"}
        async with self.session.request(method, url, json=body, params=query, headers=headers) as answer:
            assert answer.status in (200, 409), f"{method} {url}: {answer.status} {await answer.text()}"
            found = await answer.json()
            return list(found.get("nodes", ()))


async def _kill(fleet: Fleet, member: Member, lasts_s: float) -> None:
    member.signal(signal.SIGKILL)
    await _again(member, lasts_s)


async def _drain(fleet: Fleet, member: Member, lasts_s: float) -> None:
    member.signal(signal.SIGTERM)
    await _again(member, lasts_s)


async def _again(member: Member, after_s: float) -> None:
    await member.ended()
    await asyncio.sleep(after_s)
    member.start()


async def _stop(fleet: Fleet, member: Member, lasts_s: float) -> None:
    member.signal(signal.SIGSTOP)
    await asyncio.sleep(lasts_s)
    member.signal(signal.SIGCONT)


async def _lease(fleet: Fleet, member: Member, lasts_s: float) -> None:
    await fleet.lease(member, "POST")
    await asyncio.sleep(lasts_s)
    await fleet.lease(member, "DELETE")


async def _cut(fleet: Fleet, member: Member, lasts_s: float) -> None:
    fleet.network.cut(member.name)
    await asyncio.sleep(lasts_s)
    fleet.network.mend(member.name)


async def _reload(fleet: Fleet, member: Member, lasts_s: float) -> None:
    before = set(member.workers())
    member.signal(signal.SIGHUP)
    end = time.monotonic() + PATIENCE_S
    while before & set(member.workers()):
        assert time.monotonic() < end, f"{member.name} keeps its workers: {member.last_words()}"
        await asyncio.sleep(_STEP_S)
    await asyncio.sleep(lasts_s)


async def _restart(fleet: Fleet, member: Member, lasts_s: float) -> None:
    member.signal(signal.SIGTERM)
    await member.ended()
    member.start()


_FAULTS = {
    Kind.KILL: _kill, Kind.DRAIN: _drain, Kind.STOP: _stop, Kind.LEASE: _lease, Kind.CUT: _cut, Kind.RELOAD: _reload,
    Kind.RESTART: _restart,
}  # fmt: skip


def names(what: str, count: int) -> list[str]:
    return [f"{what}-{number}" for number in range(1, count + 1)]


@asynccontextmanager
async def fleet(
    folder: Path,
    network: Network,
    node_flags: Mapping[str, str],
    gate_flags: Mapping[str, str],
    *,
    nodes: int,
    gates: int,
    seen_at: Callable[[str], str] = lambda url: url,
) -> AsyncIterator[Fleet]:
    """Start a fleet and wait until every gate uses every node; nothing of it is left afterwards.

    seen_at: the address at which gates find a node, given its own: a test puts something in between.
    """
    token = folder / "token"
    token.write_text(TOKEN + "\n")
    sockets: list[socket.socket] = []
    members = {name: _node(name, folder, network, token, node_flags) for name in names("node", nodes)}
    listing = folder / "nodes.toml"
    listing.write_text(
        "".join(f'[[nodes]]\nname = "{name}"\nurl = "{seen_at(node.url)}"\n\n' for name, node in members.items())
    )
    doors = {}
    for name in names("gate", gates):
        sockets.append(sock := socket.create_server((network.address(name), 0), backlog=1024))
        doors[name] = _gate(name, folder, network, token, listing, sock, gate_flags)
    try:
        headers = {"authorization": f"Bearer {TOKEN}"}
        # Connections that we keep open would keep a gate from ending.
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
            built = Fleet(members, doors, network, session)
            for member in built.members():
                member.start()
            for member in built.members():
                await built.ready(member)
            for name in members:
                built.readiness.note(name, True)
            await built.all_seen()
            yield built
    finally:
        for member in (*members.values(), *doors.values()):
            member.stop()
        for sock in sockets:
            sock.close()


def _node(name: str, folder: Path, network: Network, token: Path, flags: Mapping[str, str]) -> Member:
    address, port = network.address(name), free_port()
    command = [
        sys.executable, "-m", "llmnode", "serve", "--name", name, "--host", address, "--port", str(port),
        "--fleet-token-file", str(token), *_words(flags),
    ]  # fmt: skip
    return Member(name, network.inside(name, command), f"http://{address}:{port}", folder / f"{name}.log")


def _gate(
    name: str, folder: Path, network: Network, token: Path, listing: Path, sock: socket.socket, flags: Mapping[str, str]
) -> Member:
    state = folder / name
    state.mkdir()
    make = ["keys", "create", OWNER, "--admin", "--from-file", "-", "--state-dir", str(state)]
    subprocess.run([sys.executable, "-m", "llmgate", *make], input=SECRET, text=True, check=True, capture_output=True)
    address, port = sock.getsockname()
    command = [
        sys.executable, "-c", _PASSED, str(sock.fileno()), sys.executable, "-m", "llmgate", "serve", "--host", address,
        "--port", str(port), "--nodes-file", str(listing), "--state-dir", str(state), "--fleet-token-file", str(token),
        "--request-log", str(folder / f"{name}.jsonl"), *_words(flags),
    ]  # fmt: skip
    return Member(name, command, f"http://{address}:{port}", folder / f"{name}.log", sock.fileno())


def _words(flags: Mapping[str, str]) -> Sequence[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]
