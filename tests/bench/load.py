"""Streamed completions against one server: what was asked, what came back, and when.

Owns: the load generator and the reading of what it recorded. Refuses to know: which server it asks, and what a figure
should be.

The client shares the machine with what it measures, so it is as cheap as it can be: while a run lasts it keeps each
network read as it came, with its time, and parses nothing. `Answer` is read out of that when the run is over.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import gguf

# llama-server says keep-alive and closes the connection after a stream; a new one for each request is fair to all.
_CONNECTION = {"limit": 0, "force_close": True}
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Answer:
    """One streamed completion, read after the run. Moments are on `time.perf_counter()`.

    began: when the request was sent.       ended: when the last byte came.
    arrivals: moments of the network reads that brought text. A read can bring several tokens: to a reader, what lies
        between two reads is the stall.
    tokens, prompt_tokens, cached_tokens: as `usage` has them; a server that sends none is counted by `_count`.
    trouble: why the answer is not whole, empty when it is.
    """

    began: float
    ended: float
    arrivals: tuple[float, ...]
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    finish: str
    trouble: str

    @property
    def first_token_s(self) -> float:
        """Seconds from sending to the first text."""
        return self.arrivals[0] - self.began

    def gaps(self, since: float, until: float) -> list[float]:
        """Seconds between text and text, of the gaps that touch the time from `since` to `until`."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [later - earlier for earlier, later in pairs if later > since and earlier < until]


@dataclass
class Stream:
    """One request on its way. `reads`: what came, with its moment."""

    prompt: str
    max_tokens: int
    began: float = 0.0
    ended: float = 0.0
    status: int = 0
    broken: str = ""
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    first: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, session: aiohttp.ClientSession, url: str) -> None:
        """Ask and record until the end. Does not raise: what went wrong is for `answer` to tell."""
        # Greedy and without penalties, in the words of all three servers, whose defaults differ.
        body = {
            "model": "bench", "prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True, "repeat_penalty": 1.0,
        }  # fmt: skip
        self.began = time.perf_counter()
        try:
            async with session.post(url + "/v1/completions", json=body) as response:
                self.status = response.status
                async for data in response.content.iter_any():
                    self.reads.append((time.perf_counter(), data))
                    if not self.first.is_set() and b"data: " in data:
                        self.first.set()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            self.broken = f"{type(error).__name__}: {error}"
        finally:
            self.ended = time.perf_counter()
            self.first.set()

    def answer(self) -> Answer:
        """Read what was recorded."""
        raw = b"".join(data for _, data in self.reads)
        if self.status != 200:
            trouble = self.broken or f"status {self.status}: {raw[:300].decode(errors='replace')}"
            return Answer(self.began, self.ended, (), 0, 0, 0, "", trouble)
        arrivals: list[float] = []
        usage: dict[str, Any] = {}
        finish = trouble = ""
        pieces, done = 0, False
        for moment, event in _events(self.reads):
            if event == b"[DONE]":
                done = True
                continue
            chunk = json.loads(event)
            if "error" in chunk:
                trouble = f"error event: {json.dumps(chunk['error'])[:300]}"
                continue
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or []:
                if choice.get("text"):
                    pieces += 1
                    if not arrivals or arrivals[-1] != moment:
                        arrivals.append(moment)
                finish = choice.get("finish_reason") or finish
        if not trouble and not done:
            trouble = self.broken or f"the stream ended without [DONE]: ...{raw[-200:].decode(errors='replace')}"
        elif not trouble and not arrivals:
            trouble = "no text came"
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            self.began,
            self.ended,
            tuple(arrivals),
            int(usage["completion_tokens"]) if usage else _count(finish, self.max_tokens, pieces),
            int(usage.get("prompt_tokens", 0)),
            int(details.get("cached_tokens", 0)),
            finish,
            trouble,
        )


def _count(finish: str, max_tokens: int, pieces: int) -> int:
    """Tokens of an answer without `usage`: all that were asked for when it ended by length, else one a piece."""
    return max_tokens if finish == "length" else pieces


def _events(reads: Iterable[tuple[float, bytes]]) -> Iterable[tuple[float, bytes]]:
    """The data of each server-sent event, with the moment of the read that completed it. Source: WHATWG HTML, 9.2."""
    rest = b""
    for moment, data in reads:
        *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    yield moment, line[6:]


class Client:
    """A session in which streams run. `whole` turns each ended stream into an answer that must be whole."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(**_CONNECTION))  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def start(self, prompt: str, max_tokens: int) -> tuple[Stream, asyncio.Task[None]]:
        """Send a request; the task ends with its answer. Cancelling the task closes the connection."""
        stream = Stream(prompt, max_tokens)
        return stream, asyncio.ensure_future(stream.run(self._session, self.url))

    async def all(self, asks: list[str], *, concurrency: int, max_tokens: int) -> list[Stream]:
        """A closed loop: every prompt, `concurrency` at a time. Returns the streams in the order of the prompts."""
        streams = [Stream(prompt, max_tokens) for prompt in asks]
        queue = list(reversed(streams))

        async def worker() -> None:
            while queue:
                await queue.pop().run(self._session, self.url)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return streams

    def whole(self, streams: Iterable[Stream]) -> list[Answer]:
        """The answers. Raises RuntimeError when one of them is not whole: its time would say nothing."""
        answers = [stream.answer() for stream in streams]
        for answer in answers:
            if answer.trouble:
                raise RuntimeError(f"{self.url}: {answer.trouble}")
        return answers


class Words:
    """Prompts of a known length: words that are one token each in the model's vocabulary."""

    def __init__(self, model: Path) -> None:
        self._words = _words(model)

    def prompts(self, count: int, tokens: int, seed: int) -> list[str]:
        """`count` prompts of about `tokens` tokens that share no prefix; the same for the same seed."""
        dice = random.Random(seed)
        return [" ".join(dice.choices(self._words, k=tokens)) for _ in range(count)]


@functools.cache
def _words(model: Path) -> list[str]:
    tokens = gguf.GGUFReader(model).fields["tokenizer.ggml.tokens"].contents()
    words = sorted({token[1:] for token in tokens if re.fullmatch("▁[a-z]{3,8}", token)})
    if len(words) < 1000:
        raise SystemExit(f"bench: {model} has {len(words)} plain words in its vocabulary; 1000 are needed")
    return words
