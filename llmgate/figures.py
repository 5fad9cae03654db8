"""Figures that the workers of one gate keep together: files in a folder that the supervisor owns.

Counters and histograms are prometheus_client's, in its multi-process mode: each process counts in a file of its own
that is mapped into its memory, so that nothing is lost with a process, and a scrape adds the files up. What goes up and
down (requests at a node now) is a small file that each worker writes twice a second, and which goes with it.

A worker that ended is folded into one file for all that have, or they would grow in number without end. A lock keeps
a scrape from counting it twice or not at all: for Prometheus, a counter that falls has been reset.

Knows files and sums; refuses to know what is counted.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

ENVIRONMENT = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder to prometheus_client, which looks when it is imported."""
_ENDED = 0
"""Stands for the process id in the name of the file for all that have ended."""

Levels = Mapping[str, Mapping[str, float]]
"""Gauge -> value of its one label -> level."""


class Figures:
    """A worker's view of the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = _levels_file(folder, os.getpid())
        self._said = ""

    def publish(self, levels: Levels) -> None:
        """Let the others see this process's levels."""
        text = json.dumps(levels)
        if text == self._said:
            return
        draft = self._own.with_suffix(".new")
        draft.write_text(text)
        draft.replace(self._own)
        self._said = text

    def others(self, gauge: str) -> dict[str, float]:
        """Label value -> sum of what the other processes last said of a gauge; at most half a second old."""
        total: dict[str, float] = {}
        for path in self._folder.glob("levels_*.json"):
            if path == self._own:
                continue
            try:
                levels = json.loads(path.read_text())
            except FileNotFoundError:
                continue  # it has just ended
            for label, level in levels.get(gauge, {}).items():
                total[label] = total.get(label, 0.0) + level
        return total

    def workers(self) -> set[int]:
        """Process ids of those that count here, this one among them."""
        return {os.getpid()} | {int(path.stem.removeprefix("levels_")) for path in self._folder.glob("levels_*.json")}

    def collect(self) -> Iterable[Metric]:
        """Counters and histograms, summed over all processes, ended ones too."""
        with _locked(self._folder, fcntl.LOCK_SH):
            metrics: Iterable[Metric] = MultiProcessCollector(None, str(self._folder)).collect()  # type: ignore[no-untyped-call]
            return metrics


def retire(folder: Path, pid: int) -> None:
    """Keep what an ended process has counted, and forget its levels."""
    _levels_file(folder, pid).unlink(missing_ok=True)
    for kind in ("counter", "histogram"):
        counted = folder / f"{kind}_{pid}.db"
        if not counted.exists():
            continue
        with _locked(folder, fcntl.LOCK_EX):
            kept: Any = MmapedDict(str(folder / f"{kind}_{_ENDED}.db"))  # type: ignore[no-untyped-call]
            ended: Any = MmapedDict(str(counted), read_mode=True)  # type: ignore[no-untyped-call]
            for key, value, stamp in ended.read_all_values():
                kept.write_value(key, kept.read_value(key)[0] + value, stamp)
            ended.close()
            kept.close()
            counted.unlink()


def _levels_file(folder: Path, pid: int) -> Path:
    return folder / f"levels_{pid}.json"


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold the folder's lock; it goes with its holder, however that ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)
