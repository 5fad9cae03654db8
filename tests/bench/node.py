"""`make bench-node`: llmnode beside its rivals, same GGUF, same threads, in one run.

Both sides of a row are up at once and only one is asked at a time. Each pair asks both the same fresh prompts, so that
neither gains from a cache that the other lacks; pairs alternate who goes first, and the ratio is taken pair by pair, so
that it holds while the machine's speed drifts. A pair during which something else used the processor is measured again.
Prints the table of docs/benchmarks.md and writes out/bench-node.json, which holds every single run.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests import tiny_model
from tests.bench import lookup, servers
from tests.bench.load import Client, Words
from tests.bench.report import Result, Run, in_order, table
from tests.bench.rows import PEAK, ROWS, Row
from tests.bench.scenarios import Figures, Scenario, Throughput
from tests.bench.servers import OURS, RIVALS, Server

DOCS = tiny_model.ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench-node: begin -->", "<!-- bench-node: end -->"
SETTLE_S = 0.5
"""Between two turns: threads that computed spin for a while before they sleep, and a server tidies up."""

Turn = Callable[[str, int], Run]
"""(side, seed) -> what that side did."""


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
def beside_a_server(row: Row, size: str, threads: int) -> Iterator[tuple[Turn, list[list[str]]]]:
    """Start both servers of a row. Yields how to give a side its turn, and both command lines."""
    model = tiny_model.make(size)
    words, scenario = Words(model), row.scenarios[size]
    with tempfile.TemporaryDirectory() as folder:
        ours = servers.llmnode(model, row.room, threads, Path(folder), row.ours)
        rival = RIVALS[row.rival](model, row.room, threads, Path(folder), row.theirs)
        with ours, rival:

            def turn(side: str, seed: int) -> Run:
                asked, idle = (ours, rival) if side == OURS else (rival, ours)
                time.sleep(SETTLE_S)
                before, profile = idle.cpu_s(), asked.engine_seconds()
                with Meter(lambda: time.process_time() + ours.cpu_s() + rival.cpu_s()) as meter:
                    figures = asyncio.run(_ask(asked, scenario, words, seed))
                used = (idle.cpu_s() - before) / meter.took
                parts = {f"engine, {part}": s - profile[part] for part, s in asked.engine_seconds().items()}
                return Run({**figures, **parts, PEAK: asked.peak_mib(), "seconds": meter.took}, meter.others, used)

            for server in (ours, rival):
                asyncio.run(_ask(server, Throughput(4, 4, 32, 16), words, 0))
            yield turn, [ours.command, rival.command]


async def _ask(server: Server, scenario: Scenario, words: Words, seed: int) -> Figures:
    async with Client(server.url) as client:
        return await scenario(client, words, seed)


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other benchmark runs on this machine: two at once measure each other."""
    path = tiny_model.cache() / "bench.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another benchmark runs on this machine: waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def in_this_process(row: Row, size: str, threads: int) -> Iterator[tuple[Turn, list[list[str]]]]:
    """Both sides are our engine, with prompt lookup and without."""
    with lookup.sides(tiny_model.make(size), row.room, threads) as ask:

        def turn(side: str, seed: int) -> Run:
            time.sleep(SETTLE_S)
            with Meter(time.process_time) as meter:
                figures = ask(side == OURS, seed)
            return Run({**figures, "seconds": meter.took}, meter.others)

        yield turn, []


def measure(row: Row, size: str, threads: int, pairs: int, spare: int) -> Result:
    """Run one row. `spare`: how many disturbed pairs may be measured again before such a pair is taken as it is."""
    contest = in_this_process if row.in_process else beside_a_server
    result = Result(row, size)
    with contest(row, size, threads) as (turn, commands):
        result.commands = commands
        seed = 1
        while len(result.pairs) < pairs:
            order = (OURS, row.rival) if len(result.pairs) % 2 == 0 else (row.rival, OURS)
            runs = {side: turn(side, seed) for side in order}
            seed += 1
            pair = (runs[OURS], runs[row.rival])
            disturbed = max(run.others for run in pair)
            again = spare > 0 and any(run.disturbed for run in pair)
            _say(f"{row.name} {size}, pair {len(result.pairs) + 1} of {pairs}: {_glance(row, pair)}")
            if again:
                spare -= 1
                _say(f"other programs used {disturbed:.2f} cores meanwhile: once more")
                continue
            result.pairs.append(pair)
    return result


def _glance(row: Row, pair: tuple[Run, Run]) -> str:
    figures = (f"{name} {pair[0].figures[name]:.4g} : {pair[1].figures[name]:.4g}" for name in row.figures)
    seconds = " + ".join(f"{run.figures['seconds']:.1f}" for run in pair)
    return f"{', '.join(figures)}; {seconds} s; others {max(run.others for run in pair):.2f} cores"


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def remarks(results: list[Result]) -> list[str]:
    """What a reader of the table must know beside it."""
    runs = [(result, run) for result in results for pair in result.pairs for run in pair]
    out = [f"An idle server used {max((run.idle for _, run in runs), default=0):.3f} cores at most."]
    disturbed = sorted({f"{result.row.name} ({result.size})" for result, run in runs if run.disturbed})
    if disturbed:
        out.append(f"Measured while other programs ran, and not to be trusted: {', '.join(disturbed)}.")
    return out


def write_docs(text: str) -> None:
    """Put the table in its place in docs/benchmarks.md."""
    page = DOCS.read_text()
    head, _, rest = page.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise SystemExit(f"bench: {DOCS} has no place for the table: {BEGIN} ... {END}")
    DOCS.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


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


def choose(names: str, size: str) -> list[tuple[Row, str]]:
    """The rows to run: those named, or all; at the size asked for, or at each row's standard ones."""
    known = {row.name: row for row in ROWS}
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"bench: there is no row {unknown[0]!r}; rows: {', '.join(known)}")
    # A size that is asked for with no row named means: of the rows that run at it by default.
    return [
        (known[name], at)
        for name in wanted
        for at in ([size] if size else known[name].standard)
        if (at in known[name].standard or names) and (known[name].in_process or at in known[name].scenarios)
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="llmnode beside its rivals, in one run")
    parser.add_argument(
        "--rows", default="", help=f"rows to run, with commas between: {', '.join(r.name for r in ROWS)}"
    )
    parser.add_argument("--size", choices=sorted(tiny_model.SHAPES), default="", help="one size of model only")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each row (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one pair, and none again for other programs' sake")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--out", type=Path, default=tiny_model.ROOT / "out" / "bench-node.json")
    parser.add_argument("--merge", action="store_true", help="keep what the file has of rows that do not run now")
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of what the file has")
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into docs/{DOCS.name}")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    servers.end_cleanly()
    pairs = 1 if options.quick else options.pairs
    chosen = [] if options.table else choose(options.rows, options.size)
    kept: list[Result] = []
    failed: list[str] = []
    if (options.merge or options.table) and options.out.exists():
        kept = [Result.parse(body) for body in json.loads(options.out.read_text())["rows"]]
    began = time.monotonic()
    for row, size in chosen:
        try:
            with alone():
                result = measure(row, size, options.threads, pairs, spare=0 if options.quick else 2 * pairs)
        except RuntimeError as error:  # one side gave no whole answer: the other rows still say something
            failed.append(f"{row.name} ({size}): {error}")
            _say(f"row failed: {failed[-1]}")
            continue
        kept = [*(old for old in kept if (old.row.name, old.size) != (row.name, size)), result]
        _write(options.out, kept, options.threads)  # after each row: a long run that is stopped keeps what it has
    text = "\n".join([table(kept), "", *remarks(kept)])
    print(text)
    if chosen:
        _say(f"{time.monotonic() - began:.0f} s, {options.threads} threads; every run is in {options.out}")
    if options.write_docs:
        write_docs(text)
    if failed:
        sys.exit("\n".join(["bench: rows without a figure:", *failed]))


def _write(path: Path, results: list[Result], threads: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"machine": machine(), "threads": threads, "rows": [result.json() for result in in_order(results)]}
    path.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nbench: stopped; rows that were finished are in the file")
