"""What is asked of a server in each scenario, and the figures that are taken from its answers.

Owns: the traffic. Refuses to know: which server it is, what the others did, and what a figure should be. Every scenario
is a function of (client, words, seed): equal seeds ask equal prompts, so that both sides of a pair get the same, and
another seed shares nothing with it, so that no pair gains from the one before.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.bench.figures import COMPLETED, FIRST_TOKEN, GAP_MAX, GAP_P99, TOKENS_PER_S, Figures, percentile
from tests.bench.load import Answer, Client, Words

Scenario = Callable[[Client, Words, int], Awaitable[Figures]]


@dataclass(frozen=True)
class Throughput:
    """`requests` prompts that share nothing, `concurrency` at a time. Answer tokens a second over the whole run."""

    concurrency: int
    requests: int
    prompt_tokens: int = 64
    answer_tokens: int = 128

    async def __call__(self, client: Client, words: Words, seed: int) -> Figures:
        asks = words.prompts(self.requests, self.prompt_tokens, seed)
        began = time.perf_counter()
        streams = await client.all(asks, concurrency=self.concurrency, max_tokens=self.answer_tokens)
        return _speed(client.whole(streams), time.perf_counter() - began)


@dataclass(frozen=True)
class SecondTime:
    """`requests` prompts, then the same again. Measured is the second time: what the server still knew of them."""

    concurrency: int
    requests: int
    prompt_tokens: int
    answer_tokens: int

    async def __call__(self, client: Client, words: Words, seed: int) -> Figures:
        asks = words.prompts(self.requests, self.prompt_tokens, seed)
        first, _ = await self._once(client, asks)
        figures, answers = await self._once(client, asks)
        cached = sum(a.cached_tokens for a in answers) / sum(a.prompt_tokens for a in answers)
        return {**figures, "cached part": cached, "first time, tokens/s": first[TOKENS_PER_S]}

    async def _once(self, client: Client, asks: list[str]) -> tuple[Figures, list[Answer]]:
        began = time.perf_counter()
        streams = await client.all(asks, concurrency=self.concurrency, max_tokens=self.answer_tokens)
        took = time.perf_counter() - began
        answers = client.whole(streams)
        return _speed(answers, took), answers


@dataclass(frozen=True)
class SharedPrefix:
    """A stream runs; a second prompt arrives that begins with the same `shared_tokens`. Again, with a fresh prefix."""

    rounds: int
    shared_tokens: int = 1024
    own_tokens: int = 32
    answer_tokens: int = 8
    running_tokens: int = 900

    async def __call__(self, client: Client, words: Words, seed: int) -> Figures:
        firsts, cached = [], []
        for round in range(self.rounds):
            prefix, own, other = (
                words.prompts(1, size, seed * 1000 + round * 10 + part)[0]
                for part, size in enumerate((self.shared_tokens, self.own_tokens, self.own_tokens))
            )
            running, task = client.start(f"{prefix} {own}", self.running_tokens)
            await running.first.wait()
            [stream] = await client.all([f"{prefix} {other}"], concurrency=1, max_tokens=self.answer_tokens)
            if task.done():
                raise RuntimeError(f"{client.url}: the running stream ended first: {running.answer().trouble}")
            await _hang_up(task)
            [answer] = client.whole([stream])
            firsts.append(answer.first_token_s)
            cached.append(answer.cached_tokens)
        return {FIRST_TOKEN: statistics.median(firsts), "cached tokens": statistics.median(cached)}


@dataclass(frozen=True)
class Arrivals:
    """`streams` answers run; `prompts` long prompts arrive at once.

    Stalls are the times between two reads that brought text of a running stream, of those stalls that touch the time
    from the arrival of the long prompts to the first token of the last of them. Throughput: all tokens, of prompts and
    answers, over the time from the arrival until everything is answered. The work after the arrival is the same on
    both sides but for what the streams had said by then, which is left out.
    """

    streams: int
    stream_tokens: int
    prompts: int = 2
    prompt_tokens: int = 4096
    answer_tokens: int = 16
    settle_s: float = 0.1

    async def __call__(self, client: Client, words: Words, seed: int) -> Figures:
        short = words.prompts(self.streams, 32, seed * 10)
        long = words.prompts(self.prompts, self.prompt_tokens, seed * 10 + 1)
        running = [client.start(prompt, self.stream_tokens) for prompt in short]
        await asyncio.gather(*(stream.first.wait() for stream, _ in running))
        await asyncio.sleep(self.settle_s)
        arrived = time.perf_counter()
        arriving = await client.all(long, concurrency=self.prompts, max_tokens=self.answer_tokens)
        await asyncio.gather(*(task for _, task in running))
        ended = time.perf_counter()
        late = client.whole(arriving)
        answers = client.whole(stream for stream, _ in running)
        prefilled = max(answer.arrivals[0] for answer in late)
        gaps = [gap for answer in answers for gap in answer.gaps(arrived, prefilled)]
        said = sum(answer.tokens * _part_after(answer, arrived) for answer in answers)
        tokens = said + sum(answer.prompt_tokens + answer.tokens for answer in late)
        return {
            GAP_P99: percentile(gaps, 99),
            GAP_MAX: max(gaps),
            TOKENS_PER_S: tokens / (ended - arrived),
            "gaps": len(gaps),
            "prefill time": prefilled - arrived,
            "streams ended before": sum(answer.ended < prefilled for answer in answers),
        }


@dataclass(frozen=True)
class Crowd:
    """`streams` at once that together need more cells than there are. Counted is who gets all of the answer."""

    streams: int = 32
    prompt_tokens: int = 100
    answer_tokens: int = 600

    async def __call__(self, client: Client, words: Words, seed: int) -> Figures:
        asks = words.prompts(self.streams, self.prompt_tokens, seed)
        began = time.perf_counter()
        streams = await client.all(asks, concurrency=self.streams, max_tokens=self.answer_tokens)
        took = time.perf_counter() - began
        answers = [stream.answer() for stream in streams]
        whole = [a for a in answers if not a.trouble and a.tokens == self.answer_tokens]
        return {COMPLETED: len(whole), TOKENS_PER_S: sum(a.tokens for a in whole) / took, "seconds": took}


async def _hang_up(task: asyncio.Task[None]) -> None:
    """Leave a stream, and give the server a moment to notice: the next prompt should not find it at work."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    await asyncio.sleep(0.3)


def _speed(answers: Sequence[Answer], took: float) -> Figures:
    return {
        TOKENS_PER_S: sum(answer.tokens for answer in answers) / took,
        FIRST_TOKEN: statistics.median(answer.first_token_s for answer in answers),
        "requests": len(answers),
        "prompt tokens": sum(answer.prompt_tokens for answer in answers),
        "answer tokens": sum(answer.tokens for answer in answers),
    }


def _part_after(answer: Answer, moment: float) -> float:
    """Which part of a stream's reads came after `moment`: of its tokens the same, as nearly as can be told."""
    return sum(arrival > moment for arrival in answer.arrivals) / len(answer.arrivals)
