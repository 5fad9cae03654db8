"""`make bench-gate`: llmgate beside nginx and LiteLLM's proxy, in front of the same mock nodes, in one run.

Both proxies of a row are up and one at a time is used. The proxy has half of the cores for itself, the upstream and
the load share the others, so that nobody takes from the proxy what is measured of it. Prints the table of
docs/benchmarks.md and writes out/bench-gate.json, which holds every single run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.bench import contest, rival, servers, volley
from tests.bench.contest import SETTLE_S, Meter, Turn, take_turns
from tests.bench.doors import DOORS, OURS, Cores, Door, start_upstream
from tests.bench.gate_rows import BOARD, ROWS, Row
from tests.bench.report import Result, Run
from tests.bench.servers import Server
from tests.bench.volley import Load, Volley

MARKED = "requests with commit markers"


@dataclass(frozen=True)
class FiringRange:
    """One proxy, the upstream behind it, and the cores of the load."""

    door: Door
    upstream: Server
    cores: frozenset[int]

    def fire(self, *, straight: bool = False, **load: Any) -> Volley:
        process = self._shoot(straight, **load)
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the load ended with {process.returncode}")
        fired = Volley(**json.loads(out))
        if fired.failed or not fired.answered:
            name = "the upstream" if straight else self.door.server.name
            raise RuntimeError(f"{name} failed {fired.failed} of {fired.failed + fired.answered}: {fired.troubles}")
        return fired

    def cpu_s(self) -> float:
        return self.door.server.cpu_s()

    def hold(self, streams: int) -> float:
        before = self.door.server.private_kib()
        process = self._shoot(False, stream=True, connections=streams, hold=True)
        assert process.stdout is not None
        held = process.stdout.readline().strip() == "held"
        grown = self.door.server.private_kib() - before
        process.communicate("")
        if not held:
            raise RuntimeError(f"{self.door.server.name} did not open {streams} streams")
        return grown

    def _shoot(self, straight: bool, **load: Any) -> subprocess.Popen[str]:
        server, key = (self.upstream, "") if straight else (self.door.server, self.door.key)
        order = Load(url=server.url, key=key, **load)
        return subprocess.Popen(
            [sys.executable, "-m", volley.__name__, json.dumps(asdict(order))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, self.cores),
        )


@contextmanager
def in_front_of_nodes(row: Row, cores: Cores) -> Iterator[tuple[Turn, list[list[str]]]]:
    """Start the upstream and both proxies of a row. Yields how to give a side its turn, and both command lines."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        upstream, ports = start_upstream(Path(folder), cores.rest)

        def door(side: str) -> Door:
            own = Path(tempfile.mkdtemp(dir=folder))
            return DOORS[side](own, ports, cores.proxy, row.ours if side == OURS else {})

        doors = {side: door(side) for side in (OURS, row.rival)}
        for server in (upstream, *(door.server for door in doors.values() if not row.fresh)):
            stack.enter_context(server)

        def turn(side: str, seed: int) -> Run:
            if not row.fresh:
                return measured(side, seed, doors)
            fresh = door(side)
            with fresh.server:
                return measured(side, seed, {side: fresh})

        def measured(side: str, seed: int, up: Mapping[str, Door]) -> Run:
            idle = [door.server for name, door in up.items() if name != side]
            running = [upstream, *(door.server for door in up.values())]
            time.sleep(SETTLE_S)
            before, marked = _cpu_s(idle), _marked(ports)
            with Meter(lambda: _own_s() + _cpu_s(running)) as meter:
                figures = row.scenario(FiringRange(up[side], upstream, cores.rest), seed)
            used = (_cpu_s(idle) - before) / meter.took
            return Run({**figures, MARKED: _marked(ports) - marked, "seconds": meter.took}, meter.others, used)

        yield turn, [door.server.command for door in doors.values()]


def _cpu_s(servers: Sequence[Server]) -> float:
    return sum(server.cpu_s() for server in servers)


def _own_s() -> float:
    """Processor time of this process and of the loads that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _marked(ports: list[int]) -> int:
    return sum(httpx.get(f"http://127.0.0.1:{port}/counts").json()["marked"] for port in ports)


def measure(row: Row, pairs: int, spare: int) -> Result:
    """Run one row. Raises RuntimeError when a side does not answer."""
    with in_front_of_nodes(row, Cores.of(sorted(os.sched_getaffinity(0)))) as (turn, commands):
        return Result(row, "", take_turns(row, "", OURS, turn, pairs, spare), commands)


def remarks(results: list[Result]) -> list[str]:
    """What a reader of the table must know beside it."""
    ours = [run for result in results for run, _ in result.pairs]
    idle = max((run.idle for result in results for pair in result.pairs for run in pair), default=0)
    out = [f"The proxy that was not asked used {idle:.3f} cores at most."]
    if any(not run.figures[MARKED] for run in ours):
        out.append("llmgate did not ask for commit markers: its figures are those of a gate that can resume nothing.")
    return out


def main() -> None:
    options = contest.arguments(BOARD, "llmgate beside nginx and LiteLLM's proxy, in one run").parse_args()
    servers.end_cleanly()
    known = {row.name: row for row in ROWS}

    def one(name: str, _: str, pairs: int, spare: int) -> Result:
        return measure(known[name], pairs, spare)

    chosen = [(name, "") for name in contest.named(BOARD, options.rows)]
    contest.carry_out(BOARD, options, chosen, one, remarks, {"rivals": rival.versions()})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nbench: stopped; rows that were finished are in the file")
