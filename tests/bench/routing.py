"""`make bench-routing`: one policy beside another, with four real nodes behind the gate.

Each turn of a side starts its nodes and gates afresh, so that no run finds what another has left in a cache; both
sides of a pair get the same chats. The nodes are real llmnodes with a small model, one thread each and a cache that
cannot hold every prompt; there are more of them than cores, so waiting and prefilling cost what they cost. Prints the
table of docs/benchmarks.md and writes out/bench-routing.json, which holds every single run.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import psutil

from tests import tiny_model
from tests.bench import contest
from tests.bench.chats import MODEL, Chats, play
from tests.bench.contest import SETTLE_S, Meter, take_turns
from tests.bench.figures import ANSWERED, CACHED, FIRST_TOKEN, FIRST_TOKEN_P90, Bar
from tests.bench.load import Words
from tests.bench.report import Board, Result, Run
from tests.bench.servers import end_cleanly, knows
from tests.processes import Program, free_port, wait_for

NODES = 4
SIZE = "15m"
"""Large enough that a prompt of a thousand tokens takes longer than all that a gate does."""
NODE = {
    "threads": "1", "slots": "4", "n-ctx": "2048", "kv-cells": "5120", "prompt-cache-bytes": "0",
    "prompt-lookup": "off", "log-level": "warning",
}  # fmt: skip
"""5,120 cells: about four of the eight system prompts below, with their chats. What leaves the cache is gone."""

SHARED = Chats(groups=8, chats=4, turns=5, system_tokens=1000, user_tokens=24, answer_tokens=16, clients=6)
UNSHARED = Chats(groups=96, chats=1, turns=1, system_tokens=0, user_tokens=600, answer_tokens=16, clients=6)


@dataclass(frozen=True)
class Side:
    """How requests are routed: by which policy, through how many gates (a client uses them in turn)."""

    policy: str
    gates: int = 1


SIDES = {
    "prefix": Side("prefix"), "random": Side("random"), "least-loaded": Side("least-loaded"),
    "prefix, two gates": Side("prefix", gates=2),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """ours, rival: names of SIDES.     bars: by figure; figures without one are shown beside them."""

    name: str
    title: str
    chats: Chats
    ours: str
    rival: str
    bars: Mapping[str, Bar] = field(default_factory=dict)
    figures: tuple[str, ...] = (FIRST_TOKEN_P90, FIRST_TOKEN, CACHED, ANSWERED)

    def bar(self, size: str, figure: str) -> Bar | None:
        return Bar(at_least=1.0, count=True) if figure == ANSWERED else self.bars.get(figure)


_SHARED, _UNSHARED = "shared system prompts, growing chats", "nothing to share"
ROWS = (
    Row("random", f"{_SHARED}: prefix beside random", SHARED, "prefix", "random", {FIRST_TOKEN_P90: Bar(at_most=0.5)}),
    Row("least-loaded", f"{_SHARED}: prefix beside least-loaded", SHARED, "prefix", "least-loaded",
        {FIRST_TOKEN_P90: Bar(at_most=0.75)}),
    Row("unshared", f"{_UNSHARED}: prefix beside least-loaded", UNSHARED, "prefix", "least-loaded",
        {FIRST_TOKEN_P90: Bar(at_most=1.05)}),
    Row("two-gates", f"{_SHARED}: two gates beside one", SHARED, "prefix, two gates", "prefix",
        {FIRST_TOKEN_P90: Bar(at_most=1.1)}),
)  # fmt: skip

BOARD = Board("bench-routing", ROWS, "first")


@contextmanager
def fleet(side: Side, model: Path) -> Iterator[tuple[list[str], list[Program]]]:
    """Fresh nodes and gates. Yields the gates' addresses and all programs."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        programs: list[Program] = []

        def start(module: str, number: int, *arguments: str) -> Program:
            port = free_port()
            log = folder / f"{module}-{number}.log"
            program = Program(module, ["serve", "--port", str(port), *arguments], port, log)
            stack.callback(program.stop)
            programs.append(program)
            return program

        flags = [word for name, value in NODE.items() if knows(name) for word in (f"--{name}", value)]
        nodes = [start("llmnode", n, "--model", str(model), "--model-id", MODEL, *flags) for n in range(NODES)]
        listing = "".join(f'[[nodes]]\nname = "node-{n}"\nurl = "{node.url}"\n\n' for n, node in enumerate(nodes))
        (folder / "nodes.toml").write_text(f'{listing}[models."{MODEL}"]\npolicy = "{side.policy}"\n')
        for node in nodes:
            node.ready()
        common = ["--nodes-file", str(folder / "nodes.toml"), "--require-keys", "off"]
        gates = [
            start("llmgate", n, "--state-dir", str(folder / f"gate-{n}"), "--request-log", str(folder / f"{n}.jsonl"),
                  *common)
            for n in range(side.gates)
        ]  # fmt: skip
        for gate in gates:
            wait_for(partial(_sees_all, gate), f"{NODES} usable nodes at {gate.url}\n{gate.output()}")
        yield [gate.url for gate in gates], programs


def _sees_all(gate: Program) -> bool:
    """Whether a gate would send work to every node, by its own metrics."""
    assert gate.process.poll() is None, f"a gate ended: {gate.output()[-2000:]}"
    answer = gate.get("/metrics")
    lines = answer.text.splitlines() if answer is not None and answer.status_code == httpx.codes.OK else []
    return sum(line.startswith("llmgate_node_usable{") and line.endswith(" 1.0") for line in lines) == NODES


def measure(row: Row, pairs: int, spare: int) -> Result:
    """Run one row. Raises RuntimeError when a side answers nothing."""
    model = tiny_model.make(SIZE)
    words = Words(model)

    def turn(side: str, seed: int) -> Run:
        try:
            with fleet(SIDES[side], model) as (urls, programs):
                time.sleep(SETTLE_S)
                processes = [psutil.Process(program.pid) for program in programs]
                with Meter(lambda: time.process_time() + sum(map(_cpu_s, processes))) as meter:
                    figures = asyncio.run(play(row.chats, words, seed, urls))
        except AssertionError as error:
            raise RuntimeError(str(error)) from error
        return Run({**figures, "seconds": meter.took}, meter.others)

    return Result(row, "", take_turns(row, "", row.ours, turn, pairs, spare), [[row.ours], [row.rival]])


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    options = contest.arguments(BOARD, "one routing policy beside another, over real nodes").parse_args()
    end_cleanly()
    known = {row.name: row for row in ROWS}

    def one(name: str, _: str, pairs: int, spare: int) -> Result:
        return measure(known[name], pairs, spare)

    chosen = [(name, "") for name in contest.named(BOARD, options.rows)]
    contest.carry_out(BOARD, options, chosen, one, lambda _: [], {"nodes": NODES, "model": SIZE, "settings": NODE})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nbench: stopped; rows that were finished are in the file")
