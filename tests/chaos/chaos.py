"""`make chaos`: three nodes, two gates, 200 streams of mixed kinds, and faults in random order from a printed seed.

Owns: the run and its verdict. It holds when

1. no answer is lost: each that began came to its end, and is the right one (judges.py)
2. requests were refused only while no ready node existed
3. at least 95% of all requests were answered
4. no process ended by itself, and nothing in a log is a traceback

Refuses to know: how a fault is carried out (fleet.py), which comes next (faults.py), what is asked (asks.py). Exit code
1 when one of the four does not hold.

    python -m tests.chaos.chaos [--seed N] [--seconds S] [--backend fake|model] [--network]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.servers import end_cleanly
from tests.chaos import faults as dice
from tests.chaos.answers import Answer
from tests.chaos.asks import MODEL, Ask, asks, plain_asks
from tests.chaos.client import Client, Outcome
from tests.chaos.faults import Fault
from tests.chaos.fleet import SECRET, TOKEN, Fleet, Loopback, Network, fleet, names
from tests.chaos.judges import Judge, Rescored, Undisturbed
from tests.chaos.namespaces import Namespaces, run_inside
from tests.lab.lab import LabError

N_CTX = 1024
ANSWERED = 0.95
LAG_S = 2.0
"""A gate polls about once a second: so long after a node has come back it may not know of it yet."""
PATIENCE_S = 120.0
"""For one request, all pauses included."""
DIFFERENT = 150
"""Different requests, asked in turn."""
AHEAD = 4
"""Faults that may be waiting for their target: one that has to wait does not hold up those behind it."""
_MODULE = "tests.chaos.chaos"


@dataclass(frozen=True)
class Storm:
    """One run. backend: `fake` or `model`, the embedded one.   streams: requests under way at any time.

    tokens: of a long answer.   step_s: of the fake backend, each.  stall_s: silence after which gates give a node up.
    disturbed: nodes that faults may be at, at once.    seconds: how long new faults and requests begin.
    """

    seed: int
    seconds: float
    backend: str = "fake"
    streams: int = 200
    nodes: int = 3
    gates: int = 2
    tokens: int = 80
    step_s: float = 0.05
    stall_s: float = 5.0
    disturbed: int = 2

    @property
    def node_flags(self) -> dict[str, str]:
        # One node alone could answer all of them.
        flags = {
            "model-id": MODEL, "slots": str(min(256, max(8, self.streams * 3 // 2))), "n-ctx": str(N_CTX),
            "queue-limit": str(2 * self.streams), "drain-seconds": "1.5",
        }  # fmt: skip
        if self.backend == "fake":
            return flags | {"backend": "fake", "fake-step-delay-s": str(self.step_s)}
        return flags | {"threads": "1", "prompt-cache-bytes": "0"}

    @property
    def gate_flags(self) -> dict[str, str]:
        return {"stall-timeout-s": str(self.stall_s), "drain-seconds": "60", "poll-interval-s": "0.5"}


@dataclass
class Report:
    """What came of a storm."""

    outcomes: list[Outcome] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    unfounded: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def answered(self) -> int:
        return sum(outcome.answer is not None for outcome in self.outcomes) - self._wrong

    @property
    def refused(self) -> int:
        return sum(bool(outcome.refused) for outcome in self.outcomes)

    @property
    def _wrong(self) -> int:
        return len(self.lost) - sum(bool(outcome.lost) for outcome in self.outcomes)

    @property
    def violations(self) -> list[str]:
        """Why the run does not hold; empty when it does."""
        out = [f"lost: {text}" for text in self.lost]
        out += [f"refused while a node was ready: {text}" for text in self.unfounded]
        if self.answered < ANSWERED * len(self.outcomes) or not self.outcomes:
            out.append(f"{self.answered} of {len(self.outcomes)} requests were answered, {ANSWERED:.0%} are owed")
        return out + self.troubles

    def __str__(self) -> str:
        kinds = Counter(outcome.ask.kind for outcome in self.outcomes)
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        violations = self.violations
        lines = [
            f"{len(self.outcomes)} requests in {self.seconds:.0f} s: {self.answered} answered, {self.refused} refused, "
            f"lost = {len(self.lost)}",
            "by kind: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
            f"faults: {faults or 'none'}; requests that took more than one attempt: {self.moved}",
            *(f"VIOLATION: {text}" for text in violations[:20]),
        ]
        if len(violations) > 20:
            lines.append(f"and {len(violations) - 20} more")
        return "\n".join(lines if violations else [*lines, "no violation"])


async def weather(
    storm: Storm,
    folder: Path,
    faults: Iterable[Fault],
    *,
    network: Network | None = None,
    seen_at: Callable[[str], str] = lambda url: url,
) -> Report:
    """Carry a storm out and judge it. `faults`: in order; the storm is over with the last, or when its time is."""
    network = network or Loopback()
    todo = (asks if storm.backend == "fake" else plain_asks)(
        min(DIFFERENT, 2 * storm.streams), storm.seed, storm.tokens
    )
    judge: Judge = await _undisturbed(storm, folder, network, todo) if storm.backend == "fake" else Rescored(N_CTX)
    report = Report()
    began = time.monotonic()
    running = fleet(
        folder, network, storm.node_flags, storm.gate_flags, nodes=storm.nodes, gates=storm.gates, seen_at=seen_at
    )
    async with running as built:
        over = asyncio.Event()
        clients = asyncio.ensure_future(_clients(storm, built, todo, over, report.outcomes))
        try:
            await _faults(storm, built, faults, report.outcomes)
        finally:
            over.set()
        await clients
        report.faults = built.done
        report.troubles += filter(None, (member.trouble() for member in built.members()))
        for outcome in report.outcomes:
            _judge(outcome, judge, built, report)
    report.moved = sum(_moved(folder / f"{name}.jsonl") for name in built.gates)
    report.seconds = time.monotonic() - began
    if isinstance(judge, Rescored):
        judge.close()
    return report


async def _undisturbed(storm: Storm, folder: Path, network: Network, todo: list[Ask]) -> Undisturbed:
    """What a single quiet node answers, asked one after the other and without a gate."""
    quiet = folder / "quiet"
    quiet.mkdir()
    flags = storm.node_flags | {"fake-step-delay-s": "0"}
    given: list[Answer] = []
    async with fleet(quiet, network, flags, {}, nodes=1, gates=0) as built, Client(TOKEN, PATIENCE_S) as client:
        for ask in todo:
            outcome = await client.send(built.nodes["node-1"].url, ask)
            if outcome.answer is None:
                raise RuntimeError(f"a quiet node does not answer {ask.kind} {ask.body}: {outcome}")
            given.append(outcome.answer)
    return Undisturbed.of(todo, given)


async def _clients(storm: Storm, built: Fleet, todo: list[Ask], over: asyncio.Event, outcomes: list[Outcome]) -> None:
    """Keep `streams` requests under way, at the gates in turn, until it is over; return with the last answer."""
    doors = itertools.cycle(gate.url for gate in built.gates.values())
    order = random.Random(storm.seed)

    async def one(client: Client) -> None:
        while not over.is_set():
            outcomes.append(await client.send(next(doors), order.choice(todo)))

    async with Client(SECRET, PATIENCE_S) as client:
        await asyncio.gather(*(one(client) for _ in range(storm.streams)))


async def _faults(storm: Storm, built: Fleet, faults: Iterable[Fault], outcomes: list[Outcome]) -> None:
    """Begin fault after fault until time or faults are over; return when all of them are over."""
    end = time.monotonic() + storm.seconds
    under_way: set[asyncio.Task[None]] = set()
    while len(outcomes) < storm.streams // 4:  # noqa: ASYNC110 - then most of the others are in the middle
        await asyncio.sleep(0.05)
    drawn, ahead = iter(faults), collections.deque[Fault]()
    while time.monotonic() < end:
        ahead.extend(itertools.islice(drawn, AHEAD - len(ahead)))
        fault = next((fault for fault in ahead if built.may_begin(fault, storm.disturbed)), None)
        if fault is None:
            if not ahead:
                break
            await asyncio.sleep(0.05)
            continue
        ahead.remove(fault)
        say(f"{len(outcomes)} requests done; {fault}")
        under_way.add(asyncio.ensure_future(built.suffer(fault)))
        await asyncio.sleep(fault.pause_s)
        for task in [task for task in under_way if task.done()]:
            under_way.discard(task)
            task.result()
    await asyncio.gather(*under_way)


def _judge(outcome: Outcome, judge: Judge, built: Fleet, report: Report) -> None:
    what = f"{outcome.ask.kind}{', streamed' if outcome.ask.streams else ''}"
    if outcome.answer is not None:
        trouble = judge.trouble(outcome.ask, outcome.answer)
    elif outcome.refused:
        trouble = ""
        if not built.readiness.none_within(outcome.began - LAG_S, outcome.ended):
            report.unfounded.append(f"{what}: {outcome.refused}")
    else:
        trouble = outcome.lost
    if trouble:
        report.lost.append(f"{what}: {trouble}")


def _moved(log: Path) -> int:
    """Requests of a gate's log that took more than one attempt."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sum(line.count('"outcome":') > 1 for line in lines)


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"chaos: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="three nodes, two gates, hundreds of streams, and faults")
    parser.add_argument("--seed", type=int, default=None, help="of requests and faults (default: drawn and printed)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults begin (default: 60)")
    parser.add_argument("--backend", choices=("fake", "model"), default="", help="only this one (default: both)")
    parser.add_argument("--streams", type=int, default=200, help="requests under way (default: 200)")
    parser.add_argument("--network", action="store_true", help="in network namespaces, where links are cut too (root)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    end_cleanly()
    if options.network and not options.inside:
        try:
            return run_inside([sys.executable, "-m", _MODULE, *arguments, "--inside"])
        except LabError as error:
            say(str(error))
            return 2
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    code = 0
    for backend in [options.backend] if options.backend else ["fake", "model"]:
        storm = Storm(seed, options.seconds, backend, options.streams)
        if backend == "model":  # it computes: fewer streams keep the machine as busy
            storm = Storm(seed, options.seconds, backend, max(1, options.streams // 5), tokens=60)
        say(f"seed {seed}, {backend} backend, {storm.streams} streams")
        report = _weathered(storm, options.inside)
        print(report, flush=True)
        code = code or int(bool(report.violations))
    return code


def _weathered(storm: Storm, networked: bool) -> Report:
    nodes, gates = names("node", storm.nodes), names("gate", storm.gates)
    network: Network = Namespaces(nodes) if networked else Loopback()
    kinds = dice.NETWORKED if networked else dice.LOCAL
    with tempfile.TemporaryDirectory() as folder:
        faults = dice.drawn(storm.seed, nodes, gates, kinds, storm.stall_s)
        return asyncio.run(weather(storm, Path(folder), faults, network=network))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nchaos: stopped")
