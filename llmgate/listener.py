"""The sockets of the gate: one that is bound here or was passed by systemd, and how processes hand them on.

Knows addresses and file descriptors; refuses to know who accepts.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmgate.settings import Settings
from llmnode.service.settings import SettingError

BACKLOG = 1024
_FIRST_PASSED_FD = 3


class PortInUse(Exception):
    """Something else listens there; the message names the address."""


def listen(settings: Settings) -> socket.socket:
    """Bind the listening socket. Raises PortInUse, or SettingError for an address that is not this host's."""
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(found)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        where = address(settings)
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"cannot listen on {where}: the port is in use") from error
        raise SettingError(f"cannot listen on {where}: {error.strerror}") from error
    return sock


def passed_socket(environ: Mapping[str, str]) -> socket.socket | None:
    """The listening socket that systemd has opened for this process, sd_listen_fds(3). Raises SettingError."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = environ.get("LISTEN_FDS")
    if count != "1":
        raise SettingError(f"the gate serves on one socket, and {count} were passed to it (LISTEN_FDS)")
    return adopted(_FIRST_PASSED_FD)


def address(settings: Settings) -> str:
    return f"{settings.host}:{settings.port}"


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
