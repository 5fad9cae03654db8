"""Work of unknown cost, done in child processes that can be killed: foreign code, schemas, patterns.

A thread cannot be stopped and shares its memory with everything; a process can be ended from outside at any point. So
work whose time and memory nobody can foresee is sent to a child and waited for, so long and no longer. A child that
takes too much is killed and replaced, and whoever asked hears why; others go on with other children.

Owns: the children, their limits, and what goes to and fro (length-prefixed JSON over a socket pair: what a child says
is data to the parent, never code). Refuses to know: what the work is. confined_child.py is the other end.

A child has no environment, no file of the parent but its socket and the pipe that is its standard error, a limit on its
address space, and once it is set up it can open no file, make no socket, start no process and write to no file. What it
writes to that pipe is thrown away, unless it dies: native code that gets no memory says so there and aborts. It ends
when its socket closes, at the latest when its current task runs out of time: a timer that the kernel keeps ends it even
where nobody is left to kill it. (Not PR_SET_PDEATHSIG: that fires when the thread that made the child ends.)

Measured: a round trip takes 0.06 ms, and 0.4 ms with 100 kB of text each way; a child starts in 0.15 s and takes 25 MB.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = struct.Struct("!I")
_START_S = 30.0
"""For a child to be set up, on a machine that is busy loading a model."""
_OUT_OF_MEMORY = (b"memory allocation of ", b"std::bad_alloc")
"""Last words of Rust's runtime and of C++'s."""
_RUN = (
    "import json, sys\n"
    "fd, paths = int(sys.argv[1]), json.loads(sys.argv[2])\n"
    "sys.path[:] = paths\n"
    "from llmnode.service.confined_child import main\n"
    "main(fd)\n"
)


@dataclass(frozen=True)
class Limits:
    """What one task may take. seconds: of the clock.  memory_bytes: of address space.  reply_bytes: of its result."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    reply_bytes: int = 64 << 20


class ConfinedError(Exception):
    """The work was not done. The message says why, to go on after "it": `took longer than 5 s`."""


class Overrun(ConfinedError):
    """It took more than it may; the child was killed."""


class Broken(ConfinedError):
    """It failed in a way that the work itself did not foresee, or its child died."""


class StartError(ConfinedError):
    """No child could be set up."""


KEPT = 2
"""Children that wait for work when there is none; each takes some 30 MB, and starting one 0.2 s."""


class Confined:
    """Children that do one kind of work. Thread-safe; each thread that asks has a child to itself, and `KEPT` of them
    are kept for the next ones.

    entry: "module:function" of the work; it gets `setup` in each new child and returns what does one task, JSON to
    JSON.
    """

    def __init__(self, entry: str, setup: Mapping[str, Any], limits: Limits) -> None:
        self._entry, self._setup, self._limits = entry, setup, limits
        self._lock = threading.Lock()  # guards the two below
        self._idle: list[_Child] = []
        self._closed = False

    def start(self) -> None:
        """Have a first child ready. Raises StartError."""
        self._give_back(self._new())

    def close(self) -> None:
        """End the children that are idle; one at work ends with its task."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def do(self, task: Any) -> Any:
        """Have a task done; blocks. Raises Overrun, Broken, StartError."""
        child = self._take() or self._new()
        try:
            result = child.do(task, self._limits)
        except BaseException:
            child.end()
            if not self._closed:
                threading.Thread(target=self._replace, name="confined", daemon=True).start()
            raise
        self._give_back(child)
        return result

    def _take(self) -> _Child | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give_back(self, child: _Child) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < KEPT:
                self._idle.append(child)
                return
        child.end()

    def _new(self) -> _Child:
        return _Child(self._entry, self._setup, self._limits)

    def _replace(self) -> None:
        try:
            self._give_back(self._new())
        except StartError:
            pass  # the next one to ask will hear of it


class _Child:
    """One child process. Belongs to one thread at a time."""

    def __init__(self, entry: str, setup: Mapping[str, Any], limits: Limits) -> None:
        self._sock, theirs = socket.socketpair()
        paths = json.dumps([path or str(Path.cwd()) for path in sys.path])
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _RUN, str(theirs.fileno()), paths],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    env={"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
                    cwd="/",
                    start_new_session=True,  # signals from a terminal are the parent's
                )
            except OSError as error:
                self._sock.close()
                raise StartError(f"could not be started: {error}") from error
        assert self._process.stderr is not None, "it is a pipe"
        self._stderr = self._process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        begin = {"entry": entry, "setup": setup, "memory": limits.memory_bytes, "seconds": _START_S}
        try:
            self._exchange(begin, Limits(seconds=_START_S))
        except ConfinedError as error:
            self.end()
            raise StartError(f"could not be set up: it {error}") from error

    def do(self, task: Any, limits: Limits) -> Any:
        return self._exchange({"task": task, "seconds": limits.seconds}, limits)

    def end(self) -> None:
        """Kill it and see it off."""
        self._sock.close()
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _exchange(self, message: Any, limits: Limits) -> Any:
        end = time.monotonic() + limits.seconds
        data = json.dumps(message).encode()
        try:
            self._sock.settimeout(limits.seconds)
            self._sock.sendall(HEAD.pack(len(data)) + data)
            (size,) = HEAD.unpack(self._read(HEAD.size, end))
            if size > limits.reply_bytes:
                raise Overrun(f"came to more than {limits.reply_bytes} bytes")
            answer = json.loads(self._read(size, end))
        except TimeoutError:
            raise Overrun(f"took longer than {limits.seconds:g} s") from None
        except OSError as error:
            said = self._said()
            if any(words in said for words in _OUT_OF_MEMORY):
                raise _too_much_memory(limits) from error
            raise Broken(f"ended its process: {error}") from error
        self._said()
        if "done" in answer:
            return answer["done"]
        if "memory" in answer:
            raise _too_much_memory(limits)
        raise Broken(f"failed: {answer['failed']}")

    def _said(self) -> bytes:
        """What it has written to its standard error since the last task; a pipe that nobody emptied would fill."""
        try:
            return os.read(self._stderr.fileno(), 1 << 16)
        except BlockingIOError:
            return b""

    def _read(self, size: int, end: float) -> bytes:
        """Raises TimeoutError, OSError."""
        parts: list[bytes] = []
        while size:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            part = self._sock.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionError(f"exit status {self._process.wait()}")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _too_much_memory(limits: Limits) -> Overrun:
    return Overrun(f"took more than {limits.memory_bytes / 2**20:,.0f} MiB of memory")
