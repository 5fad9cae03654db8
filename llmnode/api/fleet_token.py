"""The secret that gates and nodes share: read from its file, compared in constant time, rotated without a restart.

The file has one or two lines, each a valid token, so that a new one can be brought to every machine before the old one
stops working.
"""

from __future__ import annotations

import hmac
import logging
from pathlib import Path

from llmnode.wire.errors import Unauthorized

log = logging.getLogger("llmnode.api")

MIN_CHARACTERS = 16


class FleetTokenError(ValueError):
    """The file cannot be used. The message names it and never the token."""


class FleetToken:
    """The tokens that are valid now. The file is looked at on each check and read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens = read(path)
        self._version = _version(path)

    def check(self, authorization: str | None) -> None:
        """Accept the value of an Authorization header. Raises Unauthorized."""
        self._refresh()
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise Unauthorized("this node wants the fleet token: send Authorization: Bearer TOKEN")
        candidate = given.strip().encode()
        # Every token is compared, so that the time taken does not say which one was near.
        matches = [hmac.compare_digest(candidate, token) for token in self._tokens]
        if not any(matches):
            raise Unauthorized("the fleet token is not valid here")

    def _refresh(self) -> None:
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._tokens = read(self._path)
        except FleetTokenError as error:
            log.error("keeping the old fleet token: %s", error)
        else:
            log.info("fleet token read again: %d valid", len(self._tokens))


def read(path: Path) -> tuple[bytes, ...]:
    """The one or two tokens in a file. Raises FleetTokenError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FleetTokenError(f"cannot read the fleet token file {path}: {reason}") from error
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(tokens) <= 2:
        raise FleetTokenError(
            f"the fleet token file {path} must hold one or two tokens, one a line; it has {len(tokens)}"
        )
    shortest = min(len(token) for token in tokens)
    if shortest < MIN_CHARACTERS:
        raise FleetTokenError(f"a token in {path} must have at least {MIN_CHARACTERS} characters, got {shortest}")
    return tuple(token.encode() for token in tokens)


def _version(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does, also when it is replaced; None while it is away."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
