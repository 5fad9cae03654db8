"""A file of keys, and the steps that make the stored ones what it says.

    [[keys]]
    name = "alice"
    secret_file = "alice.key"       # beside this file; or secret_sha256, so that no secret is on this machine
    owner = "Alice"
    limits = {requests_per_minute = 60, tokens_per_day = 1_000_000}

with `role`, `models`, `priority`, `expires_at` and `limits` as in /admin/keys. What an entry does not name is what a
new key has: the file is the whole truth about the keys in it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgate.core import keys
from llmgate.core.grants import BadGrant, changes, parse
from llmgate.core.keys import Key

if TYPE_CHECKING:
    from llmgate.store import Store

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 only
    import tomli as tomllib

SOURCE = "file"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SECRETS = ("secret_file", "secret_sha256")


@dataclass(frozen=True)
class Step:
    """One change. why: what stands against it, "" for nothing.    told: the line that says it was made."""

    name: str
    told: str
    add: Key | None = None
    change: Key | None = None
    revoke: bool = False
    why: str = ""

    def take(self, store: Store, now: float) -> None:
        """Raises KeyTaken, StoreError."""
        if self.revoke:
            store.revoke_key(self.name, now)
        if self.change:
            wanted = self.change
            store.change_key(self.name, lambda held, others: wanted)
        if self.add:
            store.add_key(self.add)


def read(file: str, now: float) -> list[Key]:
    """The keys that a file lists. Raises ValueError that names the file and the entry, and repeats no secret."""
    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        listed = tomllib.loads(text.decode())
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from None
    entries = listed.pop("keys", [])
    if listed or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file} must hold [[keys]] and nothing else")
    folder = Path() if file == "-" else Path(file).parent
    found: dict[str, Key] = {}
    for number, entry in enumerate(entries, 1):
        try:
            key = _key(entry, folder, now)
        except ValueError as error:
            raise ValueError(f"{file}: key {number} ({entry.get('name')!r}): {error}") from None
        if key.name in found or any(key.digest == other.digest for other in found.values()):
            raise ValueError(f"{file}: key {number} ({key.name!r}): its name or its secret is another's")
        found[key.name] = key
    return list(found.values())


def steps(held: Iterable[Key], wanted: Sequence[Key], now: float, *, prune: bool, rotate: bool) -> list[Step]:
    """What makes the stored keys what the file says, in the order in which it can be done; none when they are."""
    live = {key.name: key for key in held if key.revoked is None}
    found: list[Step] = []
    if prune:
        gone = [key for key in live.values() if key.source == SOURCE and key.name not in {k.name for k in wanted}]
        found += [Step(key.name, f"revoked {key.name}", revoke=True) for key in gone]
    for key in wanted:
        had = live.get(key.name)
        if had is None:
            found.append(Step(key.name, f"created {key.name}", add=key))
        elif had.digest != key.digest:
            why = "" if rotate else f"the key {key.name} has another secret; --rotate replaces it"
            found.append(Step(key.name, f"rotated {key.name}", add=key, revoke=True, why=why))
        elif replace(key, created=had.created) != had:
            told = ", ".join(changes(had, key)) or "from now on kept by the file"
            found.append(Step(key.name, f"updated {key.name}: {told}", change=key))
    return found


def secret_in(path: Path) -> str:
    """The secret that a file holds, - for standard input. Raises ValueError that does not repeat it."""
    try:
        text = sys.stdin.read() if path == Path("-") else path.read_text(encoding="utf-8")
        return keys.check_secret(text.strip())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None


def _key(entry: Mapping[str, Any], folder: Path, now: float) -> Key:
    rights = {name: value for name, value in entry.items() if name not in ("name", *_SECRETS)}
    if "ttl_seconds" in rights:
        raise BadGrant("ttl_seconds", "ttl_seconds would begin anew each time: say expires_at")
    name = entry.get("name")
    return Key(
        keys.check_name(name if isinstance(name, str) else ""),
        _digest(entry, folder),
        created=now,
        source=SOURCE,
        **parse(rights, now),
    )


def _digest(entry: Mapping[str, Any], folder: Path) -> str:
    given = [name for name in _SECRETS if name in entry]
    if len(given) != 1 or not isinstance(entry[given[0]], str):
        raise ValueError("one of secret_file and secret_sha256 must say what its secret is")
    value: str = entry[given[0]]
    if given[0] == "secret_file":
        return keys.digest(secret_in(folder / value))
    if not _DIGEST.fullmatch(value):
        raise ValueError("secret_sha256 must be 64 hex digits in lower case")
    return value
