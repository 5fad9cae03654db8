"""Chats for `make bench-routing`: who says what, in which order, and what came of it.

Owns: the traffic, drawn from a seed, and the reading of streamed chats. Refuses to know: how many nodes there are and
how requests are routed to them.

A group of chats shares one long system prompt; a chat grows turn by turn, each turn with all that was said before, as
clients of chat APIs send it. Clients take chats one after the other, in an order that mixes the groups, and ask for a
turn as soon as they have the answer to the one before.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.bench.figures import ANSWERED, CACHED, FIRST_TOKEN, FIRST_TOKEN_P90, Figures, percentile
from tests.bench.load import Words

MODEL = "bench"
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Chats:
    """Sizes in tokens, as nearly as words of one token give them. system_tokens 0: nothing is shared."""

    groups: int
    chats: int
    turns: int
    system_tokens: int
    user_tokens: int
    answer_tokens: int
    clients: int

    def drawn(self, words: Words, seed: int) -> list[list[dict[str, str]]]:
        """The chats in the order of their beginnings: the messages of clients, of which the system's is the first."""
        systems = words.prompts(self.groups, self.system_tokens, seed * 10) if self.system_tokens else []
        count = self.groups * self.chats
        said = words.prompts(count * self.turns, self.user_tokens, seed * 10 + 1)
        chats = []
        for number in range(count):
            asked = [
                {"role": "user", "content": text} for text in said[number * self.turns : (number + 1) * self.turns]
            ]
            system = [{"role": "system", "content": systems[number % self.groups]}] if systems else []
            chats.append([*system, *asked])
        random.Random(seed).shuffle(chats)
        return chats


@dataclass(frozen=True)
class Turn:
    """One answered turn: seconds to the first text, tokens by its `usage`, and what was said."""

    first_token_s: float
    prompt_tokens: int
    cached_tokens: int
    text: str


async def play(chats: Chats, words: Words, seed: int, doors: Sequence[str]) -> Figures:
    """All chats, each request at the next of the doors. A turn that is not answered ends its chat."""
    queue = list(reversed(chats.drawn(words, seed)))
    turns: list[Turn] = []
    asked = 0
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)

    async def client() -> None:
        nonlocal asked
        while queue:
            script = queue.pop()
            messages: list[dict[str, str]] = []
            for message in script:
                messages.append(message)
                if message["role"] == "system":
                    continue
                asked += 1
                turn = await _ask(session, doors[asked % len(doors)], messages, chats.answer_tokens)
                if turn is None:
                    break
                turns.append(turn)
                messages.append({"role": "assistant", "content": turn.text})

    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(chats.clients)))
        took = time.perf_counter() - began
    if not turns:
        raise RuntimeError(f"none of {asked} requests was answered")
    firsts = [turn.first_token_s for turn in turns]
    return {
        FIRST_TOKEN_P90: percentile(firsts, 90),
        FIRST_TOKEN: percentile(firsts, 50),
        ANSWERED: len(turns) / (chats.groups * chats.chats * chats.turns),
        CACHED: sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns),
        "seconds of the load": took,
    }


async def _ask(session: aiohttp.ClientSession, url: str, messages: Sequence[Any], tokens: int) -> Turn | None:
    """One turn; None when it was refused or broke off."""
    body = {
        "model": MODEL, "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    reads: list[tuple[float, bytes]] = []
    began = time.perf_counter()
    try:
        async with session.post(url + "/v1/chat/completions", json=body) as response:
            async for data in response.content.iter_any():
                reads.append((time.perf_counter(), data))
            return read(began, reads) if response.status == 200 else None
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
        return None


def read(began: float, reads: Sequence[tuple[float, bytes]]) -> Turn | None:
    """What the network reads of one stream bring; None unless they bring text, `usage` and the end."""
    first: float | None = None
    texts: list[str] = []
    usage: dict[str, Any] = {}
    rest, done = b"", False
    for moment, data in reads:
        *frames, rest = (rest + data).split(b"\n\n")
        for frame in frames:
            if frame == b"data: [DONE]":
                done = True
            elif frame.startswith(b"data: "):
                chunk = json.loads(frame[6:])
                usage = chunk.get("usage") or usage
                said = [choice["delta"].get("content") for choice in chunk.get("choices", ())]
                texts += [text for text in said if text]
                if texts and first is None:
                    first = moment
    if not done or first is None or not usage:
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Turn(first - began, usage["prompt_tokens"], cached, "".join(texts))
