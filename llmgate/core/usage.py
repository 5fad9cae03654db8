"""What the ledger holds of a request, and the questions that may be asked of it. Pure: rows in, words out.

A row is a line of the request log in the words of the database: text that any database takes, counts that it can hold.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

GROUPS = ("key", "model", "node", "day")
"""What usage may be added up by. A day is one of UTC."""
COUNTS = ("requests", "failed", "resumed", "prompt_tokens", "cached_tokens", "completion_tokens")
FIRST_TOKEN = "time_to_first_token_seconds"
MOST_ROWS = 10_000
"""Rows that a report shows; its total is of all."""
MOST_REQUESTS = 1000
USUAL_REQUESTS = 100
USUAL_DAYS = 30
DAY_S = 86_400
_MOST = 2**53 - 1
_LONGEST = 300
_AGO = re.compile(r"(\d{1,6})([mhd])")
_AGO_S = {"m": 60, "h": 3600, "d": DAY_S}
_STATUS = re.compile(r"([1-5])xx|([1-5]\d\d)")
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


class BadQuestion(ValueError):
    """What was asked cannot be; `field` is the one that is wrong, and the message names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def row(line: Mapping[str, Any], at: float, gate: str) -> dict[str, Any]:
    """A row of the table `usage` from a line of the request log (core/record.py).

    at: when the request ended, in seconds since the epoch, unrounded: with its id it says which request this is.
    """
    return {
        "at": at,
        "request_id": _text(line["id"]),
        "key": _text(line["key"]),
        "model": _text(line["model"]),
        "path": _text(line["path"]),
        "stream": int(line["stream"]),
        "node": _text(line["node"]),
        "status": line["status"],
        "end": _text(line["end"]),
        "prompt_tokens": _count(line["prompt_tokens"]),
        "cached_tokens": _count(line["cached_tokens"]),
        "completion_tokens": _count(line["completion_tokens"]),
        "queued_seconds": line["queued_seconds"],
        FIRST_TOKEN: line[FIRST_TOKEN],
        "duration_seconds": line["duration_seconds"],
        "attempts": _ENCODE(line["attempts"]),
        "resumed": line["resumed"],
        "gate": gate,
    }


def shown(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored row as the API shows it."""
    attempts = json.loads(stored["attempts"])
    return {**stored, "at": round(stored["at"], 3), "stream": bool(stored["stream"]), "attempts": attempts}


@dataclass(frozen=True)
class Question:
    """Usage of `since` to before `until`, in seconds since the epoch, added up by `by`; key, model: of these alone."""

    by: tuple[str, ...]
    since: float
    until: float
    key: str | None = None
    model: str | None = None

    @classmethod
    def parse(cls, said: Mapping[str, str | None], now: float) -> Question:
        """From words, as they come in a query or on a command line. Raises BadQuestion."""
        by = tuple(part.strip() for part in (said.get("by") or "key,model").split(",") if part.strip())
        strange = next((part for part in by if part not in GROUPS), None)
        if strange is not None or len(set(by)) < len(by) or not by:
            wrong = f"got {strange!r}" if strange is not None else "each at most once"
            raise BadQuestion("by", f"by must name some of {', '.join(GROUPS)}, {wrong}")
        first = (now // DAY_S - USUAL_DAYS) * DAY_S
        since, until = moment(said.get("since"), "since", now, first), moment(said.get("until"), "until", now, now)
        if since >= until:
            raise BadQuestion("since", f"since must be before until, got {iso(since)} and {iso(until)}")
        return cls(by, since, until, said.get("key") or None, said.get("model") or None)


@dataclass(frozen=True)
class Selection:
    """Requests: at most `limit`, the newest, or if `after` is given the next ones after that row.

    before: those older than that row.    key, model, node: of these alone.    status: of these numbers, ends included.
    """

    after: int | None = None
    before: int | None = None
    limit: int = USUAL_REQUESTS
    key: str | None = None
    model: str | None = None
    node: str | None = None
    status: tuple[int, int] | None = None

    @classmethod
    def parse(cls, said: Mapping[str, str | None]) -> Selection:
        """From the words of a query. Raises BadQuestion."""
        after, before = _whole(said, "after", 0, _MOST), _whole(said, "before", 0, _MOST)
        if after is not None and before is not None:
            raise BadQuestion("before", "before and after cannot both be given")
        limit = _whole(said, "limit", 1, MOST_REQUESTS)
        return cls(
            after,
            before,
            USUAL_REQUESTS if limit is None else limit,
            said.get("key") or None,
            said.get("model") or None,
            said.get("node") or None,
            _status(said.get("status")),
        )


def moment(said: str | None, field: str, now: float, default: float) -> float:
    """Seconds since the epoch from `2026-12-01`, a time of ISO 8601 (UTC unless it says otherwise), or `7d`, `12h`,
    `30m` ago. Raises BadQuestion."""
    if not said:
        return default
    if ago := _AGO.fullmatch(said):
        return now - int(ago[1]) * _AGO_S[ago[2]]
    try:
        # Python 3.10 does not know the Z.
        found = datetime.fromisoformat(said.replace("Z", "+00:00").replace("z", "+00:00"))
        return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        raise BadQuestion(
            field, f"{field} must be a day (2026-12-01), a time of ISO 8601, or 7d, 12h, 30m ago, got {said!r}"
        ) from None


def iso(seconds: float) -> str:
    """A time in ISO 8601, UTC, to the second."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        return f"{seconds:.0f}"


def day(number: int) -> str:
    """A day of UTC, counted from the epoch, as 2026-12-01."""
    return (datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(days=number)).date().isoformat()


def report(asked: Question, rows: list[dict[str, Any]], total: Mapping[str, Any]) -> dict[str, Any]:
    """What /admin/usage and `llmgate usage --json` say. truncated: there are more rows than are shown."""
    return {
        "since": iso(asked.since),
        "until": iso(asked.until),
        "by": list(asked.by),
        "rows": rows,
        "total": total,
        "truncated": len(rows) == MOST_ROWS and sum(row["requests"] for row in rows) < total["requests"],
    }


def table(by: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a report as text, with their head; no mean is a dash."""
    head = [*by, *COUNTS, FIRST_TOKEN]
    return [head, *([_cell(row[name]) for name in head] for row in rows)]


def as_csv(by: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A report as CSV (RFC 4180), with a head; no mean is an empty field."""
    out = io.StringIO()
    head = [*by, *COUNTS, FIRST_TOKEN]
    writer = csv.writer(out)
    writer.writerow(head)
    writer.writerows([_inert(row[name]) for name in head] for row in rows)
    return out.getvalue()


def _inert(value: Any) -> Any:
    """A spreadsheet takes text that begins like these for a formula, and clients choose the names of models."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _text(value: str | None) -> str | None:
    """Text that every database takes: PostgreSQL has no NUL, and half a surrogate is no character."""
    if value is None:
        return None
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()[:_LONGEST]


def _count(value: int | None) -> int:
    """What a node says it has counted, as far as a database can hold it."""
    return 0 if value is None else min(max(int(value), 0), _MOST)


def _whole(said: Mapping[str, str | None], field: str, least: int, most: int) -> int | None:
    value = said.get(field)
    if value is None or value == "":
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 16 and least <= int(value) <= most):
        raise BadQuestion(field, f"{field} must be a whole number from {least} to {most}, got {value!r}")
    return int(value)


def _status(said: str | None) -> tuple[int, int] | None:
    if not said:
        return None
    found = _STATUS.fullmatch(said)
    if not found:
        raise BadQuestion("status", f"status must be one like 200, or a class like 5xx, got {said!r}")
    return (int(found[1]) * 100, int(found[1]) * 100 + 99) if found[1] else (int(found[2]), int(found[2]))
