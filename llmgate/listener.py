"""The sockets of the gate: those that are bound here or were passed by systemd, and how processes hand them on.

Knows addresses and file descriptors; refuses to know who accepts.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from llmnode.service.settings import SettingError

BACKLOG = 1024
ADMIN = "admin"
_FIRST_PASSED_FD = 3


class PortInUse(Exception):
    """Something else listens there; the message names the address."""


@dataclass(frozen=True)
class Passed:
    """The sockets that systemd has opened for this process: of the door, and of the admin API's own address."""

    door: socket.socket | None = None
    admin: socket.socket | None = None


def listen(host: str, port: int) -> socket.socket:
    """Bind a listening socket. Raises PortInUse, or SettingError for an address that is not this host's."""
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(found)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        where = address(host, port)
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"cannot listen on {where}: the port is in use") from error
        raise SettingError(f"cannot listen on {where}: {error.strerror}") from error
    return sock


def passed_sockets(environ: Mapping[str, str]) -> Passed:
    """What systemd has opened, sd_listen_fds(3): one socket is the door's, a second the admin API's; or the other way
    round, where the first one is named "admin" (FileDescriptorName=). Of one unit they come in the order of its lines.
    Raises SettingError."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return Passed()
    count, names = environ.get("LISTEN_FDS", ""), environ.get("LISTEN_FDNAMES", "").split(":")
    if count not in ("1", "2"):
        raise SettingError(
            f"the gate serves on one or two sockets, and {count or 'none'} (LISTEN_FDS) were passed to it"
        )
    found: list[socket.socket | None] = [adopted(_FIRST_PASSED_FD + place) for place in range(int(count))]
    if names[0] == ADMIN:
        found = [*found[1:], found[0]] if len(found) == 2 else [None, found[0]]
    return Passed(*found)


def address(host: str, port: int) -> str:
    return f"{host}:{port}"


def adopted(fd: int) -> socket.socket:
    """The socket behind a descriptor that this process was born with; its children are not."""
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


@contextmanager
def inheritable(*fds: int) -> Iterator[None]:
    """Processes that are started meanwhile have these."""
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        yield
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)
