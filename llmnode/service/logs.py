"""Log lines for people (`text`) or machines (`json`), on standard error, one line an event.

Use the standard `logging` module; put structure in `extra={"fields": {...}}`. Under systemd, where standard error is
the journal, a line is an entry with these as fields (journal.py), so that `journalctl LLMRACK_REQUEST_ID=...` finds it;
and a text line carries no time stamp of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from llmnode.service import journal
from llmnode.service.journal import Journal

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""From levels of the logging module to syslog's; what is below is for debugging, 7."""


def setup(level: str = "info", style: str = "text", who: str = "llmrack") -> None:
    """Send all logs to standard error, or to the journal where that is the same. `style` is "text" or "json"; `level` a
    name of the logging module; `who`: the program, as the journal names it."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    if journal.is_stream(sys.stderr.fileno(), os.environ):
        handler = Entries(Journal(who), handler)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def one_line(text: str) -> str:
    """Text that cannot forge a second log line: control characters become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def logfmt(fields: Mapping[str, Any]) -> str:
    """`key=value` pairs, as Loki, vector and people read them. What is None is left out; text that is no one word is
    quoted as in JSON, and what is neither text nor a number is JSON."""
    return " ".join(f"{name}={_plain(value)}" for name, value in fields.items() if value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, (int, float)):
        return json.dumps(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    plain = text and text.isprintable() and not set(text) & set(' ="\\')
    return text if plain else one_line(json.dumps(text, ensure_ascii=False))


def priority(level: int) -> int:
    """Syslog's priority for a level of the logging module."""
    return next((found for least, found in _PRIORITIES if level >= least), 7)


class Entries(logging.Handler):
    """Lines as entries of the journal. When it cannot take one, `other` does, whose output ends up there too."""

    def __init__(self, to: Journal, other: logging.Handler) -> None:
        super().__init__()
        self._to, self._other = to, other
        self.setFormatter(other.formatter)

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name, **getattr(record, "fields", {})}
        try:
            self._to.send(self.format(record), priority(record.levelno), fields)
        except OSError:
            self._other.emit(record)
        except Exception:
            self.handleError(record)


class JsonLines(logging.Formatter):
    """One JSON object a line: ts (seconds since the epoch), level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """`12:00:01 INFO llmnode.engine: message key=value`; the clock is left to the journal when there is one."""

    def format(self, record: logging.LogRecord) -> str:
        clock = "" if os.environ.get("JOURNAL_STREAM") else time.strftime("%H:%M:%S ", time.localtime(record.created))
        fields = logfmt(getattr(record, "fields", {}))
        line = f"{clock}{record.levelname} {record.name}: {one_line(record.getMessage())}{' ' * bool(fields)}{fields}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")
