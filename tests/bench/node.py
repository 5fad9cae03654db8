"""`make bench-node`: llmnode beside llama.cpp's own llama-server, same GGUF, same threads, in one run.

Both servers run at once, and only one is asked at a time. Each pair asks both the same fresh prompts, so that neither
gains from a cache; pairs alternate who goes first, and the ratio is taken pair by pair, so that it holds while the
machine's speed drifts. Prints a table and writes out/bench-node.json.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from tests import tiny_model
from tests.bench.load import Figures, closed_loop, prompts
from tests.bench.rival import llama_server
from tests.processes import free_port

OURS, RIVAL = "llmnode", "llama-server"
SLOTS, CONTEXT = 8, 1024


@dataclasses.dataclass(frozen=True)
class Scenario:
    """`requests` prompts of about `words` words, each answered with `max_tokens` tokens, `concurrency` at a time."""

    name: str
    concurrency: int
    requests: int
    words: int
    max_tokens: int


SCENARIOS = [
    Scenario("throughput, concurrency 1", 1, 6, 30, 128),
    Scenario("throughput, concurrency 8", 8, 32, 30, 128),
]


class Server:
    """A rival's process, ended when the `with` block ends."""

    def __init__(self, name: str, command: list[str], port: int, folder: Path, ready: str) -> None:
        self.name, self.url, self.log = name, f"http://127.0.0.1:{port}", folder / f"{name}.log"
        self._command, self._ready = command, ready

    def __enter__(self) -> Server:
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(self._command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        end = time.monotonic() + 300
        while True:
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"bench: {self.name} did not start:\n{self.log.read_text(errors='replace')[-3000:]}")
            try:
                if httpx.get(self.url + self._ready, timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.1)

    def __exit__(self, failed: object, *_: object) -> None:
        if failed or self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            print(f"bench: {self.name}, code {self.process.poll()}, {self.url}, last words:\n{tail}", file=sys.stderr)
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def peak_mib(self) -> float:
        """Most memory it ever held, in MiB (VmHWM of Linux's /proc)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return 0.0


def servers(model: Path, threads: int, folder: Path) -> tuple[Server, Server]:
    ours, rival = free_port(), free_port()
    return (
        Server(
            OURS,
            [
                sys.executable, "-m", "llmnode", "serve", "--port", str(ours), "--model", str(model), "--threads",
                str(threads), "--model-id",
                "bench",
                "--slots", str(SLOTS), "--n-ctx", str(CONTEXT),
            ],
            ours,
            folder,
            "/ready",
        ),
        Server(
            RIVAL,
            [
                str(llama_server()), "--host", "127.0.0.1", "--port", str(rival), "--model", str(model), "--threads",
                str(threads), "--threads-batch", str(threads), "--parallel", str(SLOTS), "--ctx-size",
                str(SLOTS * CONTEXT), "--n-gpu-layers", "0",
            ],
            rival,
            folder,
            "/health",
        ),
    )  # fmt: skip


def run(size: str, pairs: int, threads: int) -> dict[str, object]:
    model = tiny_model.make(size)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        ours, rival = servers(model, threads, Path(folder))
        with ours, rival:
            for server in (ours, rival):
                asyncio.run(closed_loop(server.url, prompts(8, 30, 0), concurrency=8, max_tokens=32))
            for scenario in SCENARIOS:
                rows.append(_measure(scenario, ours, rival, pairs))
            peak = {OURS: ours.peak_mib(), RIVAL: rival.peak_mib()}
    return {
        "model": model.name,
        "parameters": size,
        "machine": {
            "cpus": os.cpu_count(),
            "processor": _processor(),
            "memory_gib": psutil.virtual_memory().total >> 30,
        },
        "threads": threads,
        "pairs": pairs,
        "rows": rows,
        "peak_memory_mib": peak,
    }


def _measure(scenario: Scenario, ours: Server, rival: Server, pairs: int) -> dict[str, object]:
    got: dict[str, list[Figures]] = {OURS: [], RIVAL: []}
    for pair in range(pairs):
        asks = prompts(scenario.requests, scenario.words, 1000 * scenario.concurrency + pair)
        for server in (ours, rival) if pair % 2 == 0 else (rival, ours):
            figures = asyncio.run(
                closed_loop(
                    server.url, asks, concurrency=scenario.concurrency, max_tokens=scenario.max_tokens
                )
            )  # fmt: skip
            got[server.name].append(figures)
        print(f"{scenario.name}, pair {pair + 1} of {pairs}: {_pair(got, -1)}", file=sys.stderr, flush=True)
    speed = [a.tokens_per_s / b.tokens_per_s for a, b in zip(got[OURS], got[RIVAL], strict=True)]
    first = [a.first_token_p50_s / b.first_token_p50_s for a, b in zip(got[OURS], got[RIVAL], strict=True)]
    return {
        "scenario": dataclasses.asdict(scenario),
        OURS: statistics.median(f.tokens_per_s for f in got[OURS]),
        RIVAL: statistics.median(f.tokens_per_s for f in got[RIVAL]),
        "throughput_ratio": statistics.median(speed),
        "throughput_ratio_min": min(speed),
        "throughput_ratio_max": max(speed),
        "first_token_ratio": statistics.median(first),
        "runs": {name: [dataclasses.asdict(f) for f in figures] for name, figures in got.items()},
    }


def _pair(got: dict[str, list[Figures]], index: int) -> str:
    return ", ".join(f"{name} {figures[index].tokens_per_s:.0f} tokens/s" for name, figures in got.items())


def table(result: dict[str, object]) -> str:
    """The result in Markdown, as docs/benchmarks.md shows it."""
    lines = [
        f"| scenario | {OURS}, tokens/s | {RIVAL}, tokens/s | throughput ratio, median (min to max) "
        "| time to first token, ratio |",
        "|---|---|---|---|---|",
    ]
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        lines.append(
            f"| {row['scenario']['name']} | {row[OURS]:.0f} | {row[RIVAL]:.0f} | {row['throughput_ratio']:.2f} "
            f"({row['throughput_ratio_min']:.2f} to {row['throughput_ratio_max']:.2f}) "
            f"| {row['first_token_ratio']:.2f} |"
        )
    peak = result["peak_memory_mib"]
    assert isinstance(peak, dict)
    lines.append("")
    lines.append(f"Peak memory: {OURS} {peak[OURS]:.0f} MiB, {RIVAL} {peak[RIVAL]:.0f} MiB.")
    return "\n".join(lines)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="llmnode beside llama-server, in one run")
    parser.add_argument("--size", choices=sorted(tiny_model.SHAPES), default="15m")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--out", type=Path, default=tiny_model.ROOT / "out" / "bench-node.json")
    options = parser.parse_args()
    result = run(options.size, options.pairs, options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"\n{options.pairs} pairs, {options.threads} threads, model {result['model']}; all figures in {options.out}")


if __name__ == "__main__":
    main()
