"""The line between the gate's supervisor and one of its workers: a socket pair, one JSON object a datagram.

Owns the words that the two say and how they travel. Knows neither what a worker does about an order nor what the
supervisor makes of news. A word that this side does not know is ignored, and so is a detail: while a new release takes
over, the two are one release apart. The end of the line is how a worker learns that its supervisor has died.
"""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

_LARGEST = 16 * 1024
"""Bytes of one datagram. The longest is a reason for not starting, which is cut to fit."""
_LONGEST_TEXT = 2000


class Order(str, Enum):
    """What the supervisor tells a worker.

    leave: take no more connections, finish what runs on those you have, end; others take the new ones.
    close: the whole gate ends: go on answering, but refuse new work; finish what runs, end.
    hurry: do not wait any longer.      refresh: the database has changed, look now.
    """

    LEAVE = "leave"
    CLOSE = "close"
    HURRY = "hurry"
    REFRESH = "refresh"


class News(str, Enum):
    """What a worker tells the supervisor.

    ready: it takes requests.    alive: its event loop turns, once a second; with `status` and `active` (requests).
    leaving: it ends and was not told to.     failed: it cannot start; with `why`.
    changed: it has written to the database, so that the others should look.
    """

    READY = "ready"
    ALIVE = "alive"
    LEAVING = "leaving"
    FAILED = "failed"
    CHANGED = "changed"


@dataclass(frozen=True)
class Post:
    """What a worker is told as it starts: its place in its generation, what it inherits, and where all keep figures.

    admin_fd: the socket of the admin API's own address; None without one, and from a supervisor that knows of none.
    """

    place: int
    generation: int
    listen_fd: int
    line_fd: int
    folder: str
    admin_fd: int | None = None

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, text: str) -> Post:
        """Raises ValueError."""
        body = json.loads(text)
        try:
            needed = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
            return cls(**{name: body[name] for name in needed}, admin_fd=body.get("admin_fd"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a worker's post: {error!r}") from error


class Line:
    """One end. Never waits."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.ended = False

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def say(self, word: Order | News, **details: Any) -> None:
        """Send a word. One that cannot be sent is lost: the other side is dead, or has not listened for minutes."""
        details = {name: value[:_LONGEST_TEXT] if isinstance(value, str) else value for name, value in details.items()}
        try:
            self.socket.send(json.dumps({"say": word.value, **details}).encode())
        except OSError:
            pass

    def heard(self) -> Iterator[tuple[Order | News, dict[str, Any]]]:
        """The words that have come, each with its details. Sets `ended` when the other side is gone."""
        while not self.ended:
            try:
                datagram = self.socket.recv(_LARGEST)
            except BlockingIOError:
                return
            except OSError:
                datagram = b""
            if not datagram:
                self.ended = True
                return
            body = json.loads(datagram)
            word = body.pop("say")
            for kind in (Order, News):
                if word in {known.value for known in kind}:
                    yield kind(word), body


def pair() -> tuple[Line, socket.socket]:
    """A new line: the supervisor's end, and the worker's for it to inherit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Line(ours), theirs
