"""How fast things go, as seen lately. Owns: one moving average. Refuses to know: what is counted, and the clock."""

from __future__ import annotations


class Rate:
    """Amount per second, the older counting less: after `memory_s` seconds of work a measurement weighs 1/e.

    Amounts and seconds fade together, so a short step counts little and a long one much; with `weight` as much more.
    """

    __slots__ = ("_amount", "_memory_s", "_seconds")

    def __init__(self, memory_s: float = 10.0) -> None:
        self._memory_s = memory_s
        self._amount = 0.0
        self._seconds = 0.0

    def add(self, amount: float, seconds: float, weight: float = 1.0) -> None:
        fade = max(0.0, 1.0 - seconds / self._memory_s)
        self._amount = self._amount * fade + weight * amount
        self._seconds = self._seconds * fade + weight * seconds

    @property
    def per_second(self) -> float:
        """0.0 until first measured."""
        return self._amount / self._seconds if self._seconds > 0 else 0.0
