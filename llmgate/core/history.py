"""The last quarter of an hour of every node, for the console's small charts: one sample every 5 s, bounded.

Pure: whoever keeps time calls `sample` with the fleet as it is and the wall clock. Each worker of the gate has its own,
since each polls all nodes; what they have differs by less than a sample.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from llmgate.core.fleet import Fleet, Node

EVERY_S = 5.0
KEPT_S = 15 * 60.0
_SAMPLES = int(KEPT_S / EVERY_S)


class Sample(NamedTuple):
    """One node at one moment. None: nothing was known of it, so that a gap shows as a gap.

    running, waiting: requests in a slot and before one.    kv_used: share of KV cells that running requests hold.
    tokens_per_second: of answers, all streams together; 0 while nothing runs, whatever the last average was.
    """

    running: int | None
    waiting: int | None
    kv_used: float | None
    tokens_per_second: float | None


NOTHING = Sample(None, None, None, None)


class History:
    """Samples of each listed node, oldest first. A node that is listed no more is forgotten."""

    def __init__(self) -> None:
        self._at: deque[float] = deque(maxlen=_SAMPLES)
        self._samples: dict[str, deque[Sample]] = {}

    def due(self, wall: float) -> bool:
        """Whether it is time for another sample; a clock that was set back does not stop them."""
        return not self._at or not 0 <= wall - self._at[-1] < EVERY_S

    def sample(self, fleet: Fleet, wall: float, *, now: float, stale_after: float) -> None:
        """Note every node. `wall`: seconds since the epoch; `now`: monotonic, as the fleet has it."""
        self._at.append(wall)
        before = len(self._at) - 1
        kept: dict[str, deque[Sample]] = {}
        for name, node in fleet.nodes.items():
            samples = self._samples.get(name)
            if samples is None:
                samples = deque([NOTHING] * before, maxlen=_SAMPLES)
            samples.append(of(node, now, stale_after))
            kept[name] = samples
        self._samples = kept

    def since(self, after: float = 0.0) -> dict[str, dict[str, list[float | int | None]]]:
        """By node and by figure the samples after a wall-clock time, as lists of equal length, with their times, `at`.
        Empty lists where there are none."""
        fresh = [at > after for at in self._at]
        times: list[float | int | None] = [round(at, 1) for at, new in zip(self._at, fresh, strict=True) if new]
        shown = {}
        for name, samples in self._samples.items():
            rows = [sample for sample, new in zip(samples, fresh, strict=True) if new]
            figures = {field: [getattr(row, field) for row in rows] for field in Sample._fields}
            shown[name] = {"at": times, **figures}
        return shown

    @property
    def last(self) -> float:
        """When the newest sample was taken; 0 before the first."""
        return self._at[-1] if self._at else 0.0


def of(node: Node, now: float, stale_after: float) -> Sample:
    """The node as its last report has it; NOTHING when that is too old to be believed."""
    load = node.load
    if load is None or node.standing(now, stale_after).state in ("unreachable", "stale", "unknown"):
        return NOTHING
    used = load.kv_cells_used / load.kv_cells if load.kv_cells else 0.0
    return Sample(load.running, load.waiting, round(used, 4), round(load.decode_tps, 1) if load.running else 0.0)
