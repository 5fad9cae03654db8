"""Two sides measured by turns on one machine, and what every benchmark needs around that.

Owns: the alternation of pairs, the account of who else used the processor, and the rule by which a disturbed pair is
measured again; the lock by which one benchmark runs at a time; the options that all benchmarks share, their file of
every run, and the place of their table in docs/benchmarks.md. Refuses to know: what the sides are and what is asked.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests import tiny_model
from tests.bench.report import Board, Contest, Result, Run

DOCS = tiny_model.ROOT / "docs" / "benchmarks.md"
SETTLE_S = 0.5
"""Between two turns: threads that computed spin for a while before they sleep, and a server tidies up."""

Turn = Callable[[str, int], Run]
"""(side, seed) -> what that side did."""


def take_turns(row: Contest, size: str, ours: str, turn: Turn, pairs: int, spare: int) -> list[tuple[Run, Run]]:
    """`pairs` pairs of (ours, the rival), which alternate who goes first; each has a seed that no other pair has.

    `spare`: how many disturbed pairs may be measured again before such a pair is taken as it is.
    """
    taken: list[tuple[Run, Run]] = []
    seed = 1
    while len(taken) < pairs:
        order = (ours, row.rival) if len(taken) % 2 == 0 else (row.rival, ours)
        runs = {side: turn(side, seed) for side in order}
        seed += 1
        pair = (runs[ours], runs[row.rival])
        say(f"{' '.join((row.name, size)).strip()}, pair {len(taken) + 1} of {pairs}: {_glance(row, pair)}")
        if spare > 0 and any(run.disturbed for run in pair):
            spare -= 1
            say(f"other programs used {max(run.others for run in pair):.2f} cores meanwhile: once more")
            continue
        taken.append(pair)
    return taken


class Meter:
    """Who used the processor while the `with` block lasted: `others` is what no process of ours did, in cores."""

    def __init__(self, ours: Callable[[], float]) -> None:
        self._ours = ours

    def __enter__(self) -> Meter:
        self._at, self._busy, self._own = time.monotonic(), _busy_s(), self._ours()
        return self

    def __exit__(self, *_: object) -> None:
        self.took = time.monotonic() - self._at
        self.others = max(0.0, (_busy_s() - self._busy - self._ours() + self._own) / self.took)


def _busy_s() -> float:
    """Seconds of processor time that the machine has spent, or lost to other machines on its host (steal)."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other benchmark runs on this machine: two at once measure each other."""
    path = tiny_model.cache() / "bench.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another benchmark runs on this machine: waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _glance(row: Contest, pair: tuple[Run, Run]) -> str:
    figures = (f"{name} {pair[0].figures[name]:.4g} : {pair[1].figures[name]:.4g}" for name in row.figures)
    seconds = " + ".join(f"{run.figures['seconds']:.1f}" for run in pair)
    return f"{', '.join(figures)}; {seconds} s; others {max(run.others for run in pair):.2f} cores"


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def write_docs(name: str, text: str) -> None:
    """Put the table of the benchmark NAME in its place in docs/benchmarks.md."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = DOCS.read_text()
    head, _, rest = page.partition(begin)
    _, mark, tail = rest.partition(end)
    if not mark:
        raise SystemExit(f"bench: {DOCS} has no place for the table: {begin} ... {end}")
    DOCS.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def machine() -> dict[str, object]:
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def arguments(board: Board, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    names = ", ".join(row.name for row in board.rows)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", default="", help=f"rows to run, with commas between: {names}")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each row (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one pair, and none again for other programs' sake")
    parser.add_argument("--out", type=Path, default=tiny_model.ROOT / "out" / f"{board.name}.json")
    parser.add_argument("--merge", action="store_true", help="keep what the file has of rows that do not run now")
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of what the file has")
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into docs/{DOCS.name}")
    return parser


def named(board: Board, names: str) -> list[str]:
    """The names of rows in `names`, or of all. Raises SystemExit for one that there is not."""
    known = [row.name for row in board.rows]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"bench: there is no row {unknown[0]!r}; rows: {', '.join(known)}")
    return wanted or known


def carry_out(
    board: Board,
    options: argparse.Namespace,
    chosen: Sequence[tuple[str, str]],
    measure: Callable[[str, str, int, int], Result],
    remarks: Callable[[list[Result]], list[str]],
    about: Mapping[str, object],
) -> None:
    """Measure the chosen rows (name, size), print the table, write the file and perhaps the page.

    measure: (name, size, pairs, spare) -> result; a RuntimeError of its fails that row alone.      about: what the file
    says of the run beside the machine. Raises SystemExit when a row has failed.
    """
    pairs = 1 if options.quick else options.pairs
    spare = 0 if options.quick else 2 * pairs
    kept: list[Result] = []
    failed: list[str] = []
    if (options.merge or options.table) and options.out.exists():
        kept = [board.parse(body) for body in json.loads(options.out.read_text())["rows"]]
    began = time.monotonic()
    for name, size in () if options.table else chosen:
        try:
            with alone():
                result = measure(name, size, pairs, spare)
        except RuntimeError as error:  # one side gave no whole answer: the other rows still say something
            failed.append(f"{name} {size}".strip() + f": {error}")
            say(f"row failed: {failed[-1]}")
            continue
        kept = [*(old for old in kept if (old.row.name, old.size) != (name, size)), result]
        body = {"machine": machine(), **about, "rows": [result.json() for result in board.in_order(kept)]}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        # After each row: a long run that is stopped keeps what it has.
        options.out.write_text(json.dumps(body, indent=1) + "\n")
    text = "\n".join([board.table(kept), "", *remarks(kept), *_disturbed(kept)])
    print(text)
    if not options.table:
        say(f"{time.monotonic() - began:.0f} s; every run is in {options.out}")
    if options.write_docs:
        write_docs(board.name, text)
    if failed:
        sys.exit("\n".join(["bench: rows without a figure:", *failed]))


def _disturbed(results: list[Result]) -> list[str]:
    runs = [(result, run) for result in results for pair in result.pairs for run in pair]
    names = sorted({f"{r.row.name} ({r.size})" if r.size else r.row.name for r, run in runs if run.disturbed})
    return [f"Measured while other programs ran, and not to be trusted: {', '.join(names)}."] if names else []
