"""How fast a queue moves, and so how long one in it will wait. Pure: the clock is an argument.

While somebody waits, the time between one that goes and the next is a sample; an empty queue says nothing about how
fast a full one would move, so that time is left out. With n samples (the last `_SAMPLES`), T seconds together, and u
seconds since the last one went or the queue formed:

    wait of one with k ahead of it = (k + 1) x (T + u) / (n + 1)

that is, as if the next were to go now: right after a turn this is the mean of the samples, and while nobody goes it
grows. Before the first sample it is u itself a turn, the least that can be true.
"""

from __future__ import annotations

from collections import deque

_SAMPLES = 32
_FORGET_S = 60.0
"""Samples older than this when a queue forms are of other times: other nodes, other prompts."""


class Pace:
    """Of one queue. Tell it when the queue forms, when one goes and when it has become empty."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._since: float | None = None
        self._last = float("-inf")

    def formed(self, now: float) -> None:
        """Somebody waits, where nobody did."""
        if now - self._last > _FORGET_S:
            self._samples.clear()
        self._since = now

    def went(self, now: float) -> None:
        """One of those waiting has got its turn."""
        if self._since is not None:
            self._samples.append(now - self._since)
        self._since = self._last = now

    def emptied(self) -> None:
        self._since = None

    def wait(self, ahead: int, now: float) -> float:
        """Seconds until one with so many ahead of it should go."""
        running = 0.0 if self._since is None else now - self._since
        return (ahead + 1) * (sum(self._samples) + running) / (len(self._samples) + 1)
