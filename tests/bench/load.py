"""A closed loop of streamed completions against one server, and what it measured.

The client is as cheap as it can be, since it shares the machine with what it measures: it counts bytes as they come and
parses only the last chunk of each stream.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass

import aiohttp


@dataclass(frozen=True)
class Figures:
    """One run. Throughput in answer tokens a second over the whole run; times in seconds."""

    tokens_per_s: float
    first_token_p50_s: float
    tokens: int
    requests: int


def prompts(count: int, words: int, seed: int) -> list[str]:
    """Prompts that share no prefix with each other: `words` random words each, the same for the same seed."""
    dice = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word() -> str:
        return "".join(dice.choices(letters, k=dice.randint(2, 7)))

    return [" ".join(word() for _ in range(words)) for _ in range(count)]


async def closed_loop(url: str, asks: list[str], *, concurrency: int, max_tokens: int) -> Figures:
    """Send every prompt, `concurrency` at a time. Raises RuntimeError when any answer is not whole."""
    queue = list(reversed(asks))
    firsts: list[float] = []
    tokens = 0
    timeout = aiohttp.ClientTimeout(total=600)
    # llama-server closes connections after a stream while it says keep-alive; new ones are fair to both.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def worker() -> None:
            nonlocal tokens
            while queue:
                first, count = await _one(session, url, queue.pop(), max_tokens)
                firsts.append(first)
                tokens += count

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        took = time.perf_counter() - began
    return Figures(tokens / took, statistics.median(firsts), tokens, len(asks))


async def _one(session: aiohttp.ClientSession, url: str, prompt: str, max_tokens: int) -> tuple[float, int]:
    """(seconds to the first token, answer tokens) of one streamed completion."""
    body = {
        "model": "bench", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    began = time.perf_counter()
    first = 0.0
    tail = b""
    async with session.post(url + "/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}: {(await answer.text())[:300]}")
        async for data in answer.content.iter_any():
            if not first and b"data: " in data:
                first = time.perf_counter() - began
            tail = (tail + data)[-2000:]
    frames = [line[6:] for line in tail.split(b"\n") if line.startswith(b"data: {") and line.endswith(b"}")]
    usage = next((u for f in reversed(frames) if (u := json.loads(f).get("usage"))), None)
    if usage is None or b"data: [DONE]" not in tail:
        raise RuntimeError(f"{url} ended a stream early: {tail[-300:]!r}")
    return first, int(usage["completion_tokens"])
