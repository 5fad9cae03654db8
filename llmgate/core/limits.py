"""What a key may use, what it has used, and whether one more request fits. Pure: the clock's readings are passed in.

A key has up to five limits. All count from the moment of admission, where the most that a request may use is reserved;
what it did use is settled at its end.

per minute   The window slides: what was counted in the minute before weighs as much as is left of it in the last sixty
             seconds. So twice a limit never passes around the turn of a minute, and of any minute of the clock no more
             than the limit.
concurrent   Each request holds a place, with an end that is put off while it lives: those of a gate that died run out.
per day,     Budgets, which turn at midnight UTC, or so many hours later. A request counts where it was admitted, also
per month    when it ends on another day.

Times are whole milliseconds since the epoch, so that a store in another language comes to the same figures
(llmgate/counters/shared.py). `Counts` is all that a store keeps of a key but for the places held.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple

MOST = 10**12
"""The largest limit. Products with the milliseconds of a minute stay whole numbers in any store."""
MINUTE_MS = 60_000
_HOUR_MS = 60 * MINUTE_MS
_DAY_MS = 24 * _HOUR_MS
_1970 = date(1970, 1, 1).toordinal()
CONCURRENT_RETRY_MS = 1000
"""When to ask again for a place: nobody knows when one of the key's own requests ends."""


@dataclass(frozen=True)
class Limits:
    """What a key may use. None: without a limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Limits:
        """From decoded JSON or TOML; a limit of None is none. Raises ValueError that names the field."""
        for name, value in given.items():
            if name not in NAMES:
                raise ValueError(f"unknown limit {name!r}; a key has {', '.join(NAMES)}")
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and 1 <= value <= MOST):
                raise ValueError(f"{name} must be a whole number from 1 to {MOST}, got {value!r}")
        return cls(**given)

    def json(self) -> dict[str, int | None]:
        return dataclasses.asdict(self)

    @property
    def budgets(self) -> bool:
        return self.tokens_per_day is not None or self.tokens_per_month is not None


NO_LIMITS = Limits()
NAMES = tuple(field.name for field in dataclasses.fields(Limits))


class Moment(NamedTuple):
    """A reading of the clock as windows see it. day: since 1970; month: since the year 0; both turn at `hour`, UTC."""

    ms: int
    minute: int
    day: int
    month: int
    hour: int

    @property
    def gone(self) -> int:
        """Milliseconds of this minute that are over."""
        return self.ms - self.minute * MINUTE_MS


def moment(ms: int, hour: int = 0) -> Moment:
    """`hour`: after midnight UTC, at which days and months begin."""
    day = (ms - hour * _HOUR_MS) // _DAY_MS
    return Moment(ms, ms // MINUTE_MS, day, month_of(day), hour)


@lru_cache(maxsize=4)
def month_of(day: int) -> int:
    """The month of a day, both as `Moment` counts them."""
    there = date.fromordinal(_1970 + day)
    return there.year * 12 + there.month - 1


def day_begins(day: int, hour: int) -> int:
    """In milliseconds since the epoch."""
    return day * _DAY_MS + hour * _HOUR_MS


def month_begins(month: int, hour: int) -> int:
    return day_begins(date(month // 12, month % 12 + 1, 1).toordinal() - _1970, hour)


class Counts(NamedTuple):
    """What a key has used: in the minute `minute` and the one before it, on the day `day`, in the month `month`."""

    minute: int = 0
    requests: int = 0
    requests_before: int = 0
    tokens: int = 0
    tokens_before: int = 0
    day: int = 0
    day_tokens: int = 0
    month: int = 0
    month_tokens: int = 0


class Hold(NamedTuple):
    """What one admitted request has reserved, until it is settled. id: 63 random bits.    minute: of its admission.
    epoch: of the store, in which this is counted there; another one may have lost it."""

    key: str
    id: int
    minute: int
    tokens: int
    epoch: int = 0


class Use(NamedTuple):
    """What counts against each limit now."""

    requests_per_minute: int
    tokens_per_minute: int
    concurrent_requests: int
    tokens_per_day: int
    tokens_per_month: int


class Refusal(NamedTuple):
    """Why a request does not fit. wait_ms: until it would, if nobody else came; None when it never will.

    limit: its name.    most: what it is.    used: what counts against it now.    asked: what the request would add.
    """

    limit: str
    most: int
    used: int
    asked: int
    wait_ms: int | None


class State(NamedTuple):
    """One key at one moment, as a store saw it, its counts turned. No more is needed to judge and to say what is left.

    running: places held.    full_before: minutes that began before this moment count as used up, since what was counted
    in them has been lost; 0 when nothing has.
    """

    counts: Counts
    running: int
    at: Moment
    full_before: int = 0


def turned(counts: Counts, at: Moment) -> Counts:
    """The counts with what is over left behind.

    With a clock that was set back by a minute, or over midnight, counting goes on in the window where it was. Set back
    further, minutes begin anew.
    """
    minute, requests, requests_before, tokens, tokens_before, day, day_tokens, month, month_tokens = counts
    passed = at.minute - minute
    if passed == 1:
        minute, requests, requests_before, tokens, tokens_before = at.minute, 0, requests, 0, tokens
    elif passed not in (0, -1):
        minute, requests, requests_before, tokens, tokens_before = at.minute, 0, 0, 0, 0
    if at.day > day:
        day, day_tokens = at.day, 0
    if at.month > month:
        month, month_tokens = at.month, 0
    return Counts(minute, requests, requests_before, tokens, tokens_before, day, day_tokens, month, month_tokens)


def added(counts: Counts, tokens: int) -> Counts:
    """The counts, turned already, with one more request in them."""
    minute, requests, requests_before, sum, sum_before, day, day_sum, month, month_sum = counts
    return Counts(
        minute,
        requests + 1,
        requests_before,
        sum + tokens,
        sum_before,
        day,
        day_sum + tokens,
        month,
        month_sum + tokens,
    )


def settled(counts: Counts, hold: Hold, spent: int, requests: int, hour: int) -> Counts:
    """The counts with what a request has used in place of what it had reserved, in the windows that it was counted in.

    spent: tokens.    requests: 1, or 0 for one that the gate itself turned away.
    """
    more, fewer = spent - hold.tokens, 1 - requests
    minute, count, count_before, tokens, tokens_before, day, day_tokens, month, month_tokens = counts
    if hold.minute == minute:
        count, tokens = max(0, count - fewer), max(0, tokens + more)
    elif hold.minute == minute - 1:
        count_before, tokens_before = max(0, count_before - fewer), max(0, tokens_before + more)
    then = (hold.minute * MINUTE_MS - hour * _HOUR_MS) // _DAY_MS
    if then == day:
        day_tokens = max(0, day_tokens + more)
    if month_of(then) == month:
        month_tokens = max(0, month_tokens + more)
    return Counts(minute, count, count_before, tokens, tokens_before, day, day_tokens, month, month_tokens)


def seeded(counts: Counts, day_tokens: int, month_tokens: int) -> Counts:
    """The counts, turned already, where what they say of budgets may be too little: the larger of both counts."""
    return counts._replace(
        day_tokens=max(counts.day_tokens, day_tokens), month_tokens=max(counts.month_tokens, month_tokens)
    )


def use(state: State, limits: Limits = NO_LIMITS) -> Use:
    """What counts against each limit. What has left the window of a minute in part is rounded up."""
    counts, left = state.counts, _left(state)
    requests = _full(state, limits.requests_per_minute, counts.requests, counts.requests_before)
    tokens = _full(state, limits.tokens_per_minute, counts.tokens, counts.tokens_before)
    return Use(
        requests[0] + -(-requests[1] * left // MINUTE_MS),
        tokens[0] + -(-tokens[1] * left // MINUTE_MS),
        state.running,
        counts.day_tokens,
        counts.month_tokens,
    )


def resets(state: State, limits: Limits) -> Use:
    """Milliseconds until nothing counts against each limit, if nobody comes; 0 for places, of which nobody knows."""
    counts, at, left = state.counts, state.at, _left(state)

    def window(current: int, before: int) -> int:
        return left + (MINUTE_MS if current else 0) if current or before else 0

    return Use(
        window(*_full(state, limits.requests_per_minute, counts.requests, counts.requests_before)),
        window(*_full(state, limits.tokens_per_minute, counts.tokens, counts.tokens_before)),
        0,
        _until(day_begins(counts.day + 1, at.hour), at) if counts.day_tokens else 0,
        _until(month_begins(counts.month + 1, at.hour), at) if counts.month_tokens else 0,
    )


def refusal(limits: Limits, state: State, tokens: int) -> Refusal | None:
    """Why a request that may use so many tokens does not fit now; of several reasons the one that lasts longest.

    What fits once fits until somebody else comes, so after the longest wait all of them have passed.
    """
    asked, waits = (1, tokens, 1, tokens, tokens), _waits(limits, state, tokens)
    most = [getattr(limits, name) for name in NAMES]
    late = [i for i, limit in enumerate(most) if limit is not None and (asked[i] > limit or waits[i])]
    if not late:
        return None
    used = use(state, limits)
    found = (Refusal(NAMES[i], most[i], used[i], asked[i], None if asked[i] > most[i] else waits[i]) for i in late)
    return max(found, key=lambda one: math.inf if one.wait_ms is None else one.wait_ms)


def _waits(limits: Limits, state: State, tokens: int) -> tuple[int, int, int, int, int]:
    """Milliseconds until each limit lets the request in, 0 for now. Of a limit that never will the figure is no use."""
    counts, at = state.counts, state.at
    requests = tokens_wait = places = day = month = 0
    if (most := limits.requests_per_minute) is not None:
        requests = _window_wait(most - 1, *_full(state, most, counts.requests, counts.requests_before), _left(state))
    if (most := limits.tokens_per_minute) is not None:
        window = _full(state, most, counts.tokens, counts.tokens_before)
        tokens_wait = _window_wait(most - tokens, *window, _left(state))
    if (most := limits.concurrent_requests) is not None and state.running >= most:
        places = CONCURRENT_RETRY_MS
    if (most := limits.tokens_per_day) is not None and counts.day_tokens + tokens > most:
        day = _until(day_begins(counts.day + 1, at.hour), at)
    if (most := limits.tokens_per_month) is not None and counts.month_tokens + tokens > most:
        month = _until(month_begins(counts.month + 1, at.hour), at)
    return requests, tokens_wait, places, day, month


def _window_wait(room: int, current: int, before: int, left: int) -> int:
    """Milliseconds until what is counted in a window is at most `room`, which is not negative, if nothing is added.

    left: of the current minute. What was counted in the minute before weighs `left / MINUTE_MS` of itself now, and in
    the next minute the same goes for what is counted in this one.
    """
    if room < 0 or (current - room) * MINUTE_MS + before * left <= 0:
        return 0
    if current <= room:
        return left - (room - current) * MINUTE_MS // before
    return left + MINUTE_MS - room * MINUTE_MS // current


def _until(ms: int, at: Moment) -> int:
    return max(1, ms - at.ms)


def _left(state: State) -> int:
    """Milliseconds of the minute that the counts are of. All of it while the clock is still before it."""
    return MINUTE_MS - min(MINUTE_MS, max(0, state.at.ms - state.counts.minute * MINUTE_MS))


def _full(state: State, most: int | None, current: int, before: int) -> tuple[int, int]:
    """This minute's count and the last one's; the limit itself where what was counted has been lost."""
    if most is not None and state.full_before:
        begins = state.counts.minute * MINUTE_MS
        if begins < state.full_before:
            current = max(current, most)
        if begins - MINUTE_MS < state.full_before:
            before = max(before, most)
    return current, before
