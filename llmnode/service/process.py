"""What the kernel says of a process: memory, processor time, open files, since when it runs. Source: proc(5).

No look at /proc/stat or /proc/uptime: a unit that sees only processes (systemd's ProcSubset=pid) has neither.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """started: whole seconds since the epoch, so that it stays the same when the clock is slewed.

    open_files_limit: 0 where there is none.
    """

    resident_bytes: int
    cpu_seconds: float
    open_files: int
    open_files_limit: int
    started: int


def look(pid: int | None = None) -> Process | None:
    """A process of ours, this one by default; None when it is gone, or not ours to see."""
    folder = Path("/proc", "self" if pid is None else str(pid))
    try:
        # Behind the program's name, which may hold anything.
        fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        pages = int((folder / "statm").read_text().split()[1])
        limits = (folder / "limits").read_text()
        count = sum(1 for _ in os.scandir(folder / "fd"))
    except (OSError, ValueError, IndexError):
        return None
    soft = next((line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")), "0")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / _TICKS
    return Process(
        resident_bytes=pages * _PAGE,
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS,
        open_files=count,
        open_files_limit=int(soft) if soft.isdecimal() else 0,
        started=round(time.time() - age),
    )
