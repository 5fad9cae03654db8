"""The request log: one line a request, in a file, on standard output or in systemd's journal. Knows nothing of what a
line says, but that the journal has its fields by name."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from llmnode.service import logs
from llmnode.service.journal import Journal

log = logging.getLogger("llmgate.requestlog")

GATHER_S = 0.05
"""How long a line may wait for others, in seconds."""
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_FORMATS = {"json": _ENCODE, "logfmt": logs.logfmt}
JOURNAL = "journal"
_UNHEARD = frozenset({"ts", "attempts"})
"""Fields of a line that are none in the journal: it has a clock, and nobody looks for the other."""
_NAMES = {"id": "request_id"}
"""Fields that the journal knows by another name, which is that of all programs' lines."""
_PIECE = 4096
"""Bytes that reach a pipe in one piece (PIPE_BUF of pipe(7)). A file takes any one write as a whole."""


class RequestLog:
    """Writes one line a request to a file, to standard output or to the journal, from a thread of its own.

    The thread wakes at most every `GATHER_S` and writes all that came meanwhile: to wake it for each line took a tenth
    of the processor time of a request. The file is opened anew for each batch, so that it may be rotated by renaming.
    Several workers write to it: each write is of whole lines and appends, so that no line is torn by another's
    (_PIECE). When it cannot be written, lines are dropped and counted, and the log says so once; requests go on.
    """

    def __init__(self, target: str, form: str = "json", limit: int = 10_000) -> None:
        """`target` is a path, "-" or "journal"; `form` "json" or "logfmt". At most `limit` lines wait to be
        written."""
        self._target = target
        self._form = _FORMATS[form]
        self._limit = limit
        self._journal = Journal("llmgate") if target == JOURNAL else None
        self._lines: deque[Mapping[str, Any]] = deque()
        self._filled, self._closing = threading.Event(), threading.Event()
        self.dropped = 0
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Queue a line; never blocks."""
        if len(self._lines) >= self._limit:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._filled.is_set():
            self._filled.set()

    def close(self) -> None:
        """Write what is queued and stop."""
        self._closing.set()
        self._filled.set()
        self._thread.join()

    def _work(self) -> None:
        closing = False
        while not closing:
            self._filled.wait()
            self._closing.wait(GATHER_S)
            self._filled.clear()  # before the lines are taken: one that comes after them wakes the thread again
            closing = self._closing.is_set()  # after it: a close() just before would not wake the thread again
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if lines:
                self._append(lines)

    def _append(self, lines: list[Mapping[str, Any]]) -> None:
        left = len(lines)
        try:
            if self._journal:
                for line in lines:
                    self._journal.send(self._form(line), logs.priority(logging.INFO), _fields(line))
                    left -= 1
            elif self._target == "-":
                self._write(sys.stdout.fileno(), lines)
            else:
                out = os.open(self._target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    self._write(out, lines)
                finally:
                    os.close(out)
        except OSError as error:
            self.dropped += left
            if not self._failing:
                log.error("cannot write the request log %s: %s; requests go on unlogged", self._target, error.strerror)
            self._failing = True
            return
        if self._failing:
            log.warning("the request log can be written again; %d lines were lost", self.dropped)
        self._failing = False

    def _write(self, out: int, lines: list[Mapping[str, Any]]) -> None:
        _write_whole(out, [self._form(line).encode("utf-8", "backslashreplace") + b"\n" for line in lines])


def _fields(line: Mapping[str, Any]) -> dict[str, Any]:
    return {_NAMES.get(name, name): value for name, value in line.items() if name not in _UNHEARD}


def _write_whole(out: int, lines: list[bytes]) -> None:
    """Write whole lines at a time, as many as fit into a piece; a longer line goes alone."""
    piece = b""
    for line in [*lines, b""]:
        if piece and (not line or len(piece) + len(line) > _PIECE):
            while piece:
                piece = piece[os.write(out, piece) :]
        piece += line
