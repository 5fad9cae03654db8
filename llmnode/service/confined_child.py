"""The child's end of confined.py: reads tasks, does them, says what came of it. Runs in the child only."""

from __future__ import annotations

import json
import resource
import signal
import socket
from importlib import import_module
from typing import Any

from llmnode.service.confined import HEAD

_NOTHING_MORE = (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE)
"""Nothing can be opened, started or written any more."""
_SLACK_S = 1.0
"""The parent is first to end a task that takes too long; the kernel's timer is for when there is no parent."""


def main(fd: int) -> None:
    """Serve one parent until it hangs up."""
    with socket.socket(fileno=fd) as sock:
        begin = _read(sock)
        try:
            name, _, function = begin["entry"].partition(":")
            module = import_module(name)
            _limit(resource.RLIMIT_AS, begin["memory"])
            signal.setitimer(signal.ITIMER_REAL, begin["seconds"] + _SLACK_S)
            work = getattr(module, function)(begin["setup"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            # Not before: codecs and the like are loaded when they are first needed.
            for what in _NOTHING_MORE:
                _limit(what, 0)
        except BaseException as error:
            _write(sock, {"failed": f"{type(error).__name__}: {error}"})
            return
        _write(sock, {"done": None})
        while (message := _read(sock)) is not None:
            signal.setitimer(signal.ITIMER_REAL, message["seconds"] + _SLACK_S)
            try:
                answer = json.dumps({"done": work(message["task"])})
            except MemoryError:
                answer = json.dumps({"memory": True})
            except Exception as error:
                answer = json.dumps({"failed": f"{type(error).__name__}: {error}"[:1000]})
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(sock, answer.encode())


def _limit(what: int, limit: int) -> None:
    resource.setrlimit(what, (limit, limit))


def _read(sock: socket.socket) -> Any:
    """A message, None when the parent has hung up."""
    head = _exactly(sock, HEAD.size)
    if head is None:
        return None
    data = _exactly(sock, HEAD.unpack(head)[0])
    return None if data is None else json.loads(data)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def _write(sock: socket.socket, message: Any) -> None:
    _send(sock, json.dumps(message).encode())


def _send(sock: socket.socket, data: bytes) -> None:
    sock.sendall(HEAD.pack(len(data)) + data)
