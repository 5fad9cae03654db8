"""`make soak`: thousands of mixed requests against a real llmnode, with far fewer cells than they want.

Owns: carrying out errands over HTTP, and the judgement of what is left when all of them are done:

1. every errand is accounted for: answered as its kind must be, rejected as it should be, or left by its own client;
   a full node says so with a Retry-After, and the client comes again
2. nobody runs or waits, and no cell is in use beyond those of idle prefixes
3. the node has idled since, with its own account of cells checked against llama.cpp's, and is healthy
4. no answer failed inside, and nothing in the log is a traceback
5. open files and threads are as many as at rest before
6. memory has not grown from the first quarter to the last beyond a bound

Refuses to know: how fast any of it is. Exit code 1 on any violation.

    python -m tests.soak.soak [--requests 2000] [--seed 1]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil

from llmnode.service.confined import KEPT
from tests import tiny_model
from tests.bench.servers import end_cleanly, knows
from tests.processes import PATIENCE_S, Program, free_port
from tests.soak.errands import Errand, errands

N_CTX, SLOTS, CELLS = 512, 8, 1024
"""Eight slots of 512 tokens would want 4,096 cells."""
CLIENTS = 24
RETRY_S = 0.1
"""Shorter than the Retry-After of at least a second: that is checked, and not waited for."""
GROWTH_MIB = 16.0
"""Python's and the C library's allocators keep what they once had, so a little more each quarter proves nothing. A leak
of one request's cells or texts, some 50 KB, would come to 75 MiB in three quarters of 2,000 requests."""
FLAGS = {"queue-limit": "16", "prompt-cache-bytes": str(96 << 10)}
"""A queue that several answers to one request overfill, and host RAM for some 350 cells: a shorter sequence that gives
way goes there, a longer one is dropped and computed again."""


@dataclass
class Outcome:
    """What became of one try. `end`: answered, left, rejected (as it should be), refused (to come again), or wrong."""

    errand: Errand
    end: str
    detail: str = ""


@dataclass
class Report:
    """What the soak found. `violations` is empty when all is well. `refusals`: tries that found the node full."""

    ends: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{sum(self.ends.values())} requests in {self.seconds:.0f} s: "
            + ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
            + f"; told to come again {self.refusals} times",
            "by kind: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items())),
        ]
        if self.rss_mib:
            lines.append(f"memory, median of each quarter: {', '.join(f'{mib:.0f}' for mib in self.quarters())} MiB")
        shown = ("llmnode_kv_", "llmnode_pre", "llmnode_prompt_cache", "llmnode_draft", "llmnode_engine")
        lines += [f"  {name} {value:g}" for name, value in self.metrics.items() if name.startswith(shown)]
        lines += [f"VIOLATION: {text}" for text in self.violations] or ["no violation"]
        return "\n".join(lines)

    def quarters(self) -> list[float]:
        size = max(1, len(self.rss_mib) // 4)
        return [statistics.median(self.rss_mib[at : at + size]) for at in range(0, 4 * size, size)]


def soak(requests: int, seed: int, folder: Path, limit_s: float) -> Report:
    """Start a node, send the errands, judge. `limit_s`: seconds after which what is not done counts as hung."""
    port = free_port()
    arguments = [
        "serve", "--port", str(port), "--model", str(tiny_model.make("tiny")), "--threads", "1", "--n-ctx", str(N_CTX),
        "--slots", str(SLOTS), "--kv-cells", str(CELLS),
    ]  # fmt: skip
    for name, value in FLAGS.items():
        arguments += [f"--{name}", value] if knows(name) else []
    node = Program("llmnode", arguments, port, folder / "llmnode.log")
    report = Report()
    began = time.monotonic()
    try:
        node.ready()
        todo = errands(requests, seed, N_CTX)
        warm_up = errands(SLOTS * 8, seed + 1, N_CTX)
        asyncio.run(_carry_out(node, warm_up, Report(), limit_s))
        before = _at_rest(node, report)
        asyncio.run(_carry_out(node, todo, report, limit_s))
        after = _at_rest(node, report)
        _judge(node, report, len(todo), before, after)
    except AssertionError as error:
        report.violations.append(str(error))
    finally:
        report.seconds = time.monotonic() - began
        node.stop()
    return report


@dataclass(frozen=True)
class Rest:
    """A node that has nothing to do: its open files without those of its children, its threads, and its metrics."""

    files: int
    threads: int
    metrics: dict[str, float]


async def _carry_out(node: Program, todo: Sequence[Errand], report: Report, limit_s: float) -> None:
    """Run all errands, CLIENTS at a time, and note what became of each, and the node's memory meanwhile."""
    queue = list(reversed(todo))
    process = psutil.Process(node.pid)
    every = max(1, len(todo) // 200)

    async def client() -> None:
        while queue:
            errand = queue.pop()
            outcome = await _one(session, node.url, errand)
            while outcome.end == "refused":
                report.refusals += 1
                await asyncio.sleep(RETRY_S)
                outcome = await _one(session, node.url, errand)
            report.ends[outcome.end] += 1
            report.kinds[errand.kind] += 1
            if outcome.end == "wrong":
                report.violations.append(f"{errand.kind}: {outcome.detail}; sent {_short(errand.body)}")
            if sum(report.ends.values()) % every == 0:
                report.rss_mib.append(process.memory_info().rss / (1 << 20))

    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = [asyncio.ensure_future(client()) for _ in range(CLIENTS)]
        try:
            done, pending = await asyncio.wait(clients, timeout=limit_s)
        finally:
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    assert node.process.poll() is None, f"the node ended with code {node.process.returncode}:\n{node.output()[-3000:]}"
    assert not pending, f"{limit_s:g} s have passed and {len(queue)} errands have not begun"
    for task in done:
        task.result()


async def _one(session: aiohttp.ClientSession, url: str, errand: Errand) -> Outcome:
    body = errand.body if isinstance(errand.body, bytes) else json.dumps(errand.body).encode()
    sending = _ask(session, url + errand.path, body, errand)
    try:
        return await (asyncio.wait_for(sending, errand.leave_at) if errand.leave_at is not None else sending)
    except asyncio.TimeoutError:
        if errand.leave_at is not None:
            return Outcome(errand, "left")
        return Outcome(errand, "wrong", f"no answer within {PATIENCE_S:g} s")
    except aiohttp.ClientError as error:
        return Outcome(errand, "wrong", f"{type(error).__name__}: {error}")


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, errand: Errand) -> Outcome:
    async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
        if response.status == 503:
            await response.read()
            late = response.headers.get("retry-after", "")
            good = late.isdigit() and int(late) > 0
            return Outcome(errand, "refused") if good else Outcome(errand, "wrong", f"503, retry-after {late!r}")
        if response.status not in errand.statuses:
            return Outcome(errand, "wrong", f"status {response.status}: {(await response.text())[:300]}")
        if response.status != 200:
            error = json.loads(await response.read()).get("error") or {}
            named = bool(error.get("message")) and bool(error.get("type"))
            return (
                Outcome(errand, "rejected") if named else Outcome(errand, "wrong", f"an error without words: {error}")
            )
        if errand.leave_after is not None:
            reads = 0
            async for _ in response.content.iter_any():
                reads += 1
                if reads >= errand.leave_after:
                    response.close()
                    return Outcome(errand, "left")
            return Outcome(errand, "answered")
        data = await response.read()
    try:
        _check(errand, data)
    except (AssertionError, LookupError, ValueError, TypeError) as error:
        return Outcome(errand, "wrong", f"{type(error).__name__}: {error}")
    return Outcome(errand, "answered")


def _check(errand: Errand, data: bytes) -> None:
    """Read a whole answer and hold it to what any answer owes, then to what this errand's owes."""
    texts, finishes, usage = _streamed(data) if errand.streams else _whole(json.loads(data))
    assert sorted(texts) == sorted(finishes) == list(range(errand.choices)), f"choices {sorted(finishes)}"
    assert set(finishes.values()) <= {"stop", "length"}, finishes
    most = errand.limit * errand.choices
    assert 1 <= usage["completion_tokens"] <= most, f"{usage} for {most} tokens at most"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] <= N_CTX * errand.choices, usage
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"], usage
    errand.check([(texts[index], finishes[index]) for index in sorted(texts)])


Answer = tuple[dict[int, str], dict[int, str], dict[str, Any]]
"""Texts and finishes by choice, and the usage."""


def _whole(body: dict[str, Any]) -> Answer:
    texts = {c["index"]: c["message"]["content"] if "message" in c else c["text"] for c in body["choices"]}
    return texts, {c["index"]: c["finish_reason"] for c in body["choices"]}, body["usage"]


def _streamed(data: bytes) -> Answer:
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    usage: dict[str, Any] = {}
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    assert lines and lines[-1] == b"[DONE]", f"the stream ended with {data[-100:]!r}"
    for line in lines[:-1]:
        chunk = json.loads(line)
        assert "error" not in chunk, chunk
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            index = choice["index"]
            assert index not in finishes, f"choice {index} goes on after its end: {choice}"
            piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
            texts[index] = texts.get(index, "") + (piece or "")
            if choice["finish_reason"]:
                finishes[index] = choice["finish_reason"]
    return texts, finishes, usage


def _at_rest(node: Program, report: Report) -> Rest:
    """Wait until nobody runs or waits and the engine has ticked idle since; nothing but idle prefixes is in use then.

    At each idle tick the engine compares its account of cells with llama.cpp's, and ends the process if they differ.
    """

    def calm() -> bool:
        now = _metrics(node)
        busy = now["llmnode_requests_running"] + now["llmnode_requests_waiting"] + now["llmnode_queued_prompt_tokens"]
        used, idle = now["llmnode_kv_cells_used"], now["llmnode_kv_cells_idle"]
        return busy == 0 and used in (0, idle) and idle <= CELLS

    assert _comes_true(calm), f"the node does not come to rest: {_busy(node)}"
    time.sleep(1.5)  # three idle ticks
    assert node.process.poll() is None, (
        f"the idle node ended with code {node.process.returncode}: {node.output()[-3000:]}"
    )
    health = httpx.get(node.url + "/health", timeout=PATIENCE_S)
    assert health.status_code == 200, f"/health answers {health.status_code}: {health.text}"
    process = psutil.Process(node.pid)
    report.metrics = _metrics(node)
    return Rest(_files(process), process.num_threads(), report.metrics)


def _files(process: psutil.Process) -> int:
    """Open files, but for the socket to each child that renders templates or tries grammars."""
    return int(process.num_fds()) - len(process.children())


def _judge(node: Program, report: Report, sent: int, before: Rest, after: Rest) -> None:
    """Write down what is not as it must be (the numbers of the module's text)."""

    def gained(name: str) -> float:
        return after.metrics.get(name, 0.0) - before.metrics.get(name, 0.0)

    def expect(holds: bool, text: str) -> None:
        if not holds:
            report.violations.append(text)

    accounted = sum(report.ends.values())
    expect(accounted == sent, f"{sent} errands, {accounted} accounted for")
    failed = gained('llmnode_engine_requests_total{end="failed"}')
    expect(failed == 0, f"{failed:g} answers failed inside the engine")
    finished = gained('llmnode_engine_requests_total{end="finished"}')
    expect(
        finished >= report.ends["answered"], f"the engine finished {finished:g} of {report.ends['answered']} answers"
    )
    expect("Traceback" not in node.output(), f"a traceback in the log:\n{_around(node.output(), 'Traceback')}")
    expect(
        _comes_true(lambda: _files(psutil.Process(node.pid)) <= before.files),
        f"{_files(psutil.Process(node.pid))} files are open, {before.files} were at rest before",
    )
    children = len(psutil.Process(node.pid).children())
    expect(children <= 2 * KEPT, f"{children} children are left, for templates and for grammars")
    threads = psutil.Process(node.pid).num_threads()
    expect(threads <= before.threads + 2, f"{threads} threads, {before.threads} before")
    quarters = report.quarters()
    bound = quarters[0] + GROWTH_MIB
    expect(
        quarters[-1] <= bound, f"memory grew from {quarters[0]:.0f} to {quarters[-1]:.0f} MiB; {bound:.0f} is the bound"
    )


def _metrics(node: Program) -> dict[str, float]:
    """Every sample of /metrics, by its name with labels."""
    lines = httpx.get(node.url + "/metrics", timeout=PATIENCE_S).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def _busy(node: Program) -> str:
    wanted = ("running", "waiting", "queued_prompt", "kv_cells")
    return ", ".join(f"{name} {value:g}" for name, value in _metrics(node).items() if any(w in name for w in wanted))


def _comes_true(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _around(text: str, word: str) -> str:
    at = text.find(word)
    return text[max(0, at - 300) : at + 2000]


def _short(body: object) -> str:
    text = str(body)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-100:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="thousands of mixed requests against one node")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=1500.0, help="seconds that it may take (default: 1500)")
    options = parser.parse_args()
    end_cleanly()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(options.requests, options.seed, Path(folder), options.limit_s)
    print(report)
    sys.exit(1 if report.violations else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nsoak: stopped")
