"""Where keys' counters are kept: one seam, and two stores behind it.

local.py    a SQLite file of this host: all workers of one gate, the generations of a reload, a restart
shared.py   Redis or Valkey: several gates

Each operation is one atomic step over all that is counted of one key; what the figures mean is `core/limits.py`'s. A
store knows keys by name and refuses to know requests, budgets of the past (those come in as a `Seed`) and what is to be
done while it is down (`allowances.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from llmgate.core.limits import Hold, Limits, Moment, State

HOLD_MS = 60_000
"""How long a request's place is held if it is not renewed: that long a gate that died counts against its keys."""


class StoreDown(Exception):
    """The counters cannot be used now. retry_after: seconds until it is worth trying, as far as that is known."""

    def __init__(self, why: str, retry_after: float = 1.0) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class Seed(NamedTuple):
    """Tokens that a key has used of its budgets, by the ledger: on the day and in the month of `at`."""

    at: Moment
    day_tokens: int
    month_tokens: int


class Unseeded(NamedTuple):
    """Nothing was done: the store does not know what this key has used of its budgets. Ask again with a seed."""

    at: Moment


class Reserved(NamedTuple):
    """What came of a reservation, and the key's state after it. hold None: it did not fit, and nothing was changed."""

    state: State
    hold: Hold | None


class Renewed(NamedTuple):
    """What came of a renewal. holds: as they are to be known from now on.    wanting: keys of which a seed is needed
    first, and the moment that it has to be of."""

    holds: list[Hold]
    wanting: dict[str, Moment]


class Counters(Protocol):
    """All raise StoreDown. `id`: 63 random bits."""

    async def reserve(
        self, key: str, limits: Limits, tokens: int, id: int, seed: Seed | None = None
    ) -> Reserved | Unseeded:
        """Count one request and its tokens, and hold a place for it, if it fits; nothing otherwise. The same id again
        changes nothing."""

    async def settle(self, hold: Hold, spent: int, requests: int) -> bool:
        """Count `spent` tokens in place of those reserved, `requests` (0 or 1) in place of one, and free the place.

        What was settled before changes nothing. False: the store has lost the hold; renew it, then settle again.
        """

    async def renew(self, holds: Sequence[Hold], seeds: Mapping[str, Seed]) -> Renewed:
        """Put off the ends of these places; what the store has lost of them is counted again. None of them may be
        settled meanwhile."""

    async def look(self, key: str) -> State:
        """What is counted of a key now. Changes nothing."""

    async def close(self) -> None: ...
