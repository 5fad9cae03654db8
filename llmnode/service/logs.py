"""Log lines for people (`text`) or machines (`json`), on standard error, one line an event.

Use the standard `logging` module; put structure in `extra={"fields": {...}}`. Under systemd, standard error is the
journal, so a text line carries no time stamp of its own there.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any


def setup(level: str = "info", style: str = "text") -> None:
    """Send all logs to standard error. `style` is "text" or "json"; `level` a name of the logging module."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def one_line(text: str) -> str:
    """Text that cannot forge a second log line: control characters become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
        fields = "".join(f" {k}={v}" for k, v in getattr(record, "fields", {}).items())
        line = f"{clock}{record.levelname} {record.name}: {one_line(record.getMessage())}{one_line(fields)}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")
