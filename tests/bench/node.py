"""`make bench-node`: llmnode beside its rivals, same GGUF, same threads, in one run.

Both sides of a row are up at once and only one is asked at a time. Each pair asks both the same fresh prompts, so that
neither gains from a cache that the other lacks; pairs alternate who goes first, and the ratio is taken pair by pair, so
that it holds while the machine's speed drifts. A pair during which something else used the processor is measured again.
Prints the table of docs/benchmarks.md and writes out/bench-node.json, which holds every single run.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests import tiny_model
from tests.bench import contest, lookup, servers
from tests.bench.contest import SETTLE_S, Meter, Turn, take_turns
from tests.bench.figures import PEAK, Figures
from tests.bench.load import Client, Words
from tests.bench.report import Result, Run
from tests.bench.rows import BOARD, ROWS, Row
from tests.bench.scenarios import Scenario, Throughput
from tests.bench.servers import OURS, RIVALS, Server


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
    contest_of = in_this_process if row.in_process else beside_a_server
    with contest_of(row, size, threads) as (turn, commands):
        return Result(row, size, take_turns(row, size, OURS, turn, pairs, spare), commands)


def remarks(results: list[Result]) -> list[str]:
    """What a reader of the table must know beside it."""
    idle = max((run.idle for result in results for pair in result.pairs for run in pair), default=0)
    return [f"An idle server used {idle:.3f} cores at most."]


def choose(names: str, size: str) -> list[tuple[str, str]]:
    """The rows to run: those named, or all; at the size asked for, or at each row's standard ones."""
    # A size that is asked for with no row named means: of the rows that run at it by default.
    known = {row.name: row for row in ROWS}
    return [
        (name, at)
        for name in contest.named(BOARD, names)
        for at in ([size] if size else known[name].standard)
        if (at in known[name].standard or names) and (known[name].in_process or at in known[name].scenarios)
    ]


def main() -> None:
    parser = contest.arguments(BOARD, "llmnode beside its rivals, in one run")
    parser.add_argument("--size", choices=sorted(tiny_model.SHAPES), default="", help="one size of model only")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    options = parser.parse_args()
    servers.end_cleanly()
    known = {row.name: row for row in ROWS}

    def one(name: str, size: str, pairs: int, spare: int) -> Result:
        return measure(known[name], size, options.threads, pairs, spare)

    contest.carry_out(BOARD, options, choose(options.rows, options.size), one, remarks, {"threads": options.threads})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nbench: stopped; rows that were finished are in the file")
