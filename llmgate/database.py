"""Where the gate's database is, and how it fails. Knows nothing of what is in it: who only names it stays small.

Without a URL it is a SQLite file in the state folder, for one gate; with one, a PostgreSQL database for any number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

FILE = "llmgate.db"
SCHEMES = ("postgresql", "postgres")


class StoreError(Exception):
    """The database cannot be opened or used; the message names it, and never its password."""


class KeyTaken(Exception):
    """A live key of that name, or with that secret, exists already."""


@dataclass(frozen=True)
class Database:
    """`folder`: the state folder.    url: of PostgreSQL, with its password; "" for SQLite."""

    folder: Path
    url: str = field(default="", repr=False)

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self.folder / FILE

    @property
    def shared(self) -> bool:
        """Whether gates on several hosts can use it."""
        return bool(self.url)

    def __str__(self) -> str:
        """What operators know it by."""
        if not self.url:
            return str(self.path)
        parts = urlsplit(self.url)
        name = parts.path.lstrip("/") or parts.username or "(default)"
        return f"{name} of PostgreSQL at {_host(parts)}"


def check_url(url: str) -> str:
    """A URL that can be used, or ValueError, which does not repeat it."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("it is no URL") from None
    if parts.scheme not in SCHEMES:
        raise ValueError("it must begin with postgresql://")
    return url


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2] or "a local socket"
