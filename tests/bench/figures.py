"""What benchmarks measure: the names of figures, how each is written, and what would do.

Owns: names, units and bars. Refuses to know: how a figure comes about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = Mapping[str, float]

TOKENS_PER_S = "tokens/s"
FIRST_TOKEN = "time to first token, p50"
FIRST_TOKEN_P90 = "time to first token, p90"
GAP_P99 = "stall, p99"
GAP_MAX = "stall, longest"
COMPLETED = "complete answers"
PEAK = "peak memory, MiB"
STREAMS_PER_S = "streams/s"
REQUESTS_PER_S = "requests/s"
STREAMS_PER_CORE = "streams a second of processor time"
REQUESTS_PER_CORE = "requests a second of processor time"
CPU_TIME = "processor time each"
ADDED_P50 = "added latency, p50"
ADDED_P99 = "added latency, p99"
STREAM_KIB = "memory of an open stream, KiB"
ANSWERED = "answered"
CACHED = "prompt tokens reused"

_SECONDS = {FIRST_TOKEN, FIRST_TOKEN_P90, GAP_P99, GAP_MAX, CPU_TIME, ADDED_P50, ADDED_P99}
_SHARES = {ANSWERED, CACHED}
_WHOLE = {PEAK, STREAM_KIB}


@dataclass(frozen=True)
class Bar:
    """What figure would do: our median over the rival's, `at_least` or `at_most`.

    plus: added to the rival's share, in the figure's own unit.
    own: our median itself, not a ratio.    count: our worst figure itself, not a ratio.
    """

    at_least: float | None = None
    at_most: float | None = None
    plus: float = 0.0
    own: bool = False
    count: bool = False

    def words(self, figure: str) -> str:
        if self.count:
            return show(figure, self.at_least or 0.0).removesuffix(" of 32")
        side, limit = ("at least", self.at_least) if self.at_least is not None else ("at most", self.at_most)
        assert limit is not None, "a bar has a side"
        if self.own:
            return f"{side} {show(figure, limit)}"
        return f"{side} {limit:g}x + {self.plus:g}" if self.plus else f"{side} {limit:g}x"

    def met(self, ours: Sequence[float], theirs: Sequence[float]) -> bool:
        """Whether the median of the ratios, pair by pair, is on the good side; a count must be there in every pair."""
        if self.count:
            return self.at_least is not None and min(ours) >= self.at_least
        shares = list(ours) if self.own else [(a - self.plus) / b for a, b in zip(ours, theirs, strict=True) if b]
        if not shares:
            return False
        middle = statistics.median(shares)
        if self.at_least is not None:
            return middle >= self.at_least
        return self.at_most is not None and middle <= self.at_most


def show(figure: str, value: float) -> str:
    """A figure with its unit: seconds as ms or s, shares in percent, counts whole."""
    if figure in _SECONDS:
        return _time(value)
    if figure in _SHARES:
        return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"
    if figure == COMPLETED:
        return f"{value:g} of 32"
    return f"{value:.0f}" if abs(value) >= 100 or figure in _WHOLE else f"{value:.1f}"


def _time(seconds: float) -> str:
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    ms = seconds * 1000
    return f"{ms:.0f} ms" if abs(ms) >= 10 else f"{ms:.3g} ms"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of 100 do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
