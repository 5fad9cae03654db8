"""What may be changed of a key, however it is asked for: by /admin/keys, `llmgate keys`, or a file of keys.

A request comes as names and values (decoded JSON or TOML) and becomes fields of a `Key`, or `BadGrant`, which names the
field. Refuses to know where keys are kept, and secrets.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from llmgate.core.keys import Key
from llmgate.core.limits import NO_LIMITS, Limits, Use
from llmgate.core.queue import Priority
from llmnode.wire.errors import Conflict

ROLES = ("user", "admin")
MAX_OWNER = 200
MAX_MODELS = 1000
_MAX_MODEL = 200
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPAN = re.compile(r"([0-9]+)([smhd])")
LAST_ADMIN = "last_admin"


class BadGrant(ValueError):
    """A field that cannot be used. `field`: its name."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


def parse(asked: Mapping[str, Any], now: float, held: Limits = NO_LIMITS) -> dict[str, Any]:
    """Fields of a `Key` for those that are asked for. Raises BadGrant.

    held: the limits that the key has: a limit that is not named stays, null ends it. A null in another place puts the
    field back to what a new key has.
    """
    fields: dict[str, Any] = {}
    for name, value in asked.items():
        if name not in _READERS:
            raise BadGrant(name, f"unknown field {name!r}; a key has {', '.join(_READERS)}")
        field, read = _READERS[name]
        if field in fields:
            raise BadGrant(name, "expires_at and ttl_seconds exclude each other")
        fields[field] = _limits(value, held) if name == "limits" else read(name, value, now)
    return fields


def require_admin_left(held: Key, wanted: Key, others: Iterable[Key], now: float, *, force: bool) -> None:
    """Raise Conflict where a change would leave nobody who could undo it."""
    ends = held.admin and held.live(now) and not (wanted.admin and wanted.live(now))
    if ends and not force and not any(key.admin and key.live(now) for key in others):
        raise Conflict(
            f"{held.name} is the last live admin key; add force to end it anyway, and make another with llmgate keys",
            code=LAST_ADMIN,
        )


def describe(key: Key, use: Use | None = None) -> dict[str, Any]:
    """A key as people and programs are shown it. use: None where nothing is counted."""
    return {
        "name": key.name,
        "owner": key.owner,
        "admin": key.admin,
        "role": ROLES[key.admin],
        "models": list(key.models),
        "priority": key.priority.word,
        "created": iso(key.created),
        "expires": None if key.expires is None else iso(key.expires),
        "revoked": None if key.revoked is None else iso(key.revoked),
        "limits": dataclasses.asdict(key.limits),
        "use": None if use is None else use._asdict(),
    }


def changes(held: Key, wanted: Key) -> list[str]:
    """What differs between two states of a key, e.g. ["priority normal -> low", "tokens_per_day none -> 1000"]."""
    before, after = describe(held), describe(wanted)
    for each in (before, after):
        each.update(each.pop("limits"), models=", ".join(each["models"]) or "all")
    told = ("owner", "role", "models", "priority", "expires", *dataclasses.asdict(NO_LIMITS))
    return [f"{name} {_word(before[name])} -> {_word(after[name])}" for name in told if before[name] != after[name]]


def iso(seconds: float) -> str:
    """A Unix time in ISO 8601, to the second."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def expiry(text: str, now: float) -> float | None:
    """The end that "30d", "12h", "90m", "45s", "never" or an ISO 8601 time stands for. Raises ValueError."""
    if text == "never":
        return None
    span = _SPAN.fullmatch(text)
    return _in_time(now + int(span[1]) * _UNITS[span[2]] if span else _time(text), text, now)


def _owner(name: str, value: Any, now: float) -> str:
    value = "" if value is None else value
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_OWNER:
        raise BadGrant(name, f"owner must be a line of at most {MAX_OWNER} characters")
    return value


def _role(name: str, value: Any, now: float) -> bool:
    if value is not None and value not in ROLES:
        raise BadGrant(name, f"role must be one of {', '.join(ROLES)}, got {value!r}")
    return bool(value == "admin")


def _models(name: str, value: Any, now: float) -> tuple[str, ...]:
    value = [] if value is None else value
    good = isinstance(value, list) and len(value) <= MAX_MODELS
    if not good or not all(isinstance(m, str) and 0 < len(m) <= _MAX_MODEL and m.isprintable() for m in value):
        raise BadGrant(name, f"models must be a list of at most {MAX_MODELS} names; an empty one is all models")
    return tuple(sorted(set(value)))


def _priority(name: str, value: Any, now: float) -> Priority:
    try:
        return Priority.NORMAL if value is None else Priority.of(value)
    except ValueError as error:
        raise BadGrant(name, f"priority {error}") from None


def _expires_at(name: str, value: Any, now: float) -> float | None:
    try:
        if isinstance(value, str):
            return _in_time(_time(value), value, now)
        if isinstance(value, datetime):  # TOML has times of its own
            return _in_time(value.astimezone(timezone.utc).timestamp(), str(value), now)
    except ValueError as error:
        raise BadGrant(name, f"{name} {error}") from None
    if value is not None:
        raise BadGrant(name, f"{name} must be a time in ISO 8601 or null, got {value!r}")
    return None


def _ttl(name: str, value: Any, now: float) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not 0 < value <= 100 * 365 * 86_400:
        raise BadGrant(name, f"{name} must be above 0 and at most 100 years, got {value!r}")
    return now + float(value)


def _limits(value: Any, held: Limits) -> Limits:
    if value is None:
        return NO_LIMITS
    if not isinstance(value, Mapping):
        raise BadGrant("limits", "limits must be an object")
    try:
        return Limits.of({**dataclasses.asdict(held), **value})
    except ValueError as error:
        raise BadGrant("limits", str(error)) from None


def _time(text: str) -> float:
    try:
        there = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
    except ValueError:
        raise ValueError(f"must be a time in ISO 8601, got {text!r}") from None
    return (there if there.tzinfo else there.replace(tzinfo=timezone.utc)).timestamp()


def _in_time(seconds: float, text: str, now: float) -> float:
    if seconds <= now:
        raise ValueError(f"must be in the future, got {text!r}")
    return seconds


def _word(value: Any) -> str:
    return "none" if value in (None, "") else str(value)


_READERS: Mapping[str, tuple[str, Callable[[str, Any, float], Any]]] = {
    "owner": ("owner", _owner),
    "role": ("admin", _role),
    "models": ("models", _models),
    "priority": ("priority", _priority),
    "expires_at": ("expires", _expires_at),
    "ttl_seconds": ("expires", _ttl),
    "limits": ("limits", lambda name, value, now: _limits(value, NO_LIMITS)),
}
