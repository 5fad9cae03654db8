"""Who is asking: API keys, the ring that holds them, and what each may use.

A secret is stored as its SHA-256 alone. That is enough because secrets have at least 128 bits of chance in them (or 24
characters, when an operator brings one): there is nothing to guess, so a slow hash would only slow the door. Looking
a digest up in a table leaks no prefix of the secret through timing, since the digest is not the client's to choose.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmgate.core.limits import NO_LIMITS, Limits
from llmgate.core.queue import Priority
from llmnode.wire import headers as names
from llmnode.wire.errors import Forbidden, InvalidRequest, Unauthorized

PREFIX = "sk-llmrack-"
SECRET_BYTES = 24
"""Random bytes in a made secret, written as 48 hex digits, so that a double click selects the whole key."""
MIN_SECRET = 24
MAX_SECRET = 512
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Key:
    """One API key as stored. `models` empty means all of them; times in seconds since the epoch.

    priority: of its requests, where they do not ask for a lower one.    owner: who answers for it; free text, at most
    200 characters.    source: "file" when a file of keys lists it (`llmgate keys apply`), "" otherwise.
    """

    name: str
    digest: str
    admin: bool = False
    models: tuple[str, ...] = ()
    created: float = 0.0
    revoked: float | None = None
    priority: Priority = Priority.NORMAL
    owner: str = ""
    expires: float | None = None
    limits: Limits = NO_LIMITS
    source: str = ""

    def live(self, now: float) -> bool:
        """Whether it opens the door."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def may_use(self, *names: str) -> bool:
        """Whether the key's list has one of the names (a model's id, or the alias it was asked by)."""
        return not self.models or any(name in self.models for name in names)


ANONYMOUS = Key(name="anonymous", digest="")
"""Who asks when keys are not required. Never an admin."""


class Keyring:
    """The keys that are not revoked, by digest. Immutable: a change makes a new ring."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._by_digest: Mapping[str, Key] = {k.digest: k for k in keys if k.revoked is None}

    def __len__(self) -> int:
        return len(self._by_digest)

    @property
    def names(self) -> list[str]:
        """Of the live keys, oldest first."""
        return [key.name for key in self._by_digest.values()]

    @property
    def limited(self) -> bool:
        """Whether any key has limits."""
        return any(key.limits != NO_LIMITS for key in self._by_digest.values())

    def find(self, secret: str | None, now: float) -> Key:
        """The key behind a secret. Raises Unauthorized when there is none, without repeating what was sent."""
        if not secret:
            raise Unauthorized("no API key: send Authorization: Bearer KEY or x-api-key: KEY", code="missing_api_key")
        key = self._by_digest.get(digest(secret))
        if key is None:
            raise Unauthorized("the API key is not known here, or was revoked")
        if not key.live(now):
            raise Unauthorized("the API key has expired", code="api_key_expired")
        return key


def digest(secret: str) -> str:
    """SHA-256 of a secret, hex."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def make_secret(entropy: bytes) -> str:
    """A secret from `SECRET_BYTES` random bytes."""
    if len(entropy) != SECRET_BYTES:
        raise ValueError(f"a secret is made from {SECRET_BYTES} random bytes, got {len(entropy)}")
    return PREFIX + entropy.hex()


def check_secret(secret: str) -> str:
    """A secret that an operator brought, or ValueError that says what is wrong without repeating it."""
    if not MIN_SECRET <= len(secret) <= MAX_SECRET:
        raise ValueError(f"the secret must have {MIN_SECRET} to {MAX_SECRET} characters, it has {len(secret)}")
    if not all(33 <= ord(c) <= 126 for c in secret):
        raise ValueError("the secret must be one word of printable ASCII characters")
    return secret


def check_name(name: str) -> str:
    """A key's name, or ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"a key's name is 1-64 characters of letters, digits, '.', '_', '@' or '-', got {name!r}")
    return name


def presented(authorization: str | None, x_api_key: str | None) -> str | None:
    """The secret in a request's headers. `Authorization: Bearer` wins over `x-api-key`."""
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return x_api_key.strip() if x_api_key and x_api_key.strip() else None


def require_model(key: Key, asked: str, model_id: str) -> None:
    """Raise Forbidden, naming what the key may use, when the model is not among it."""
    if not key.may_use(asked, model_id):
        raise Forbidden(
            f"this key may not use the model {asked!r}; it may use: {', '.join(key.models)}",
            param="model",
            code="model_not_allowed",
        )


def priority(key: Key, asked: str | None) -> Priority:
    """The priority of a request that asks for one in its header, or for none. Raises InvalidRequest or Forbidden."""
    if not asked:
        return key.priority
    try:
        wanted = Priority.of(asked.strip().lower())
    except ValueError as error:
        raise InvalidRequest(f"{names.PRIORITY} {error}", param=names.PRIORITY) from None
    if wanted < key.priority:
        raise Forbidden(
            f"this key may ask for {key.priority.word} priority at most, not {wanted.word}",
            param=names.PRIORITY,
            code="priority_not_allowed",
        )
    return wanted


def require_admin(key: Key) -> None:
    if not key.admin:
        raise Forbidden("this needs an admin key", code="admin_only")
