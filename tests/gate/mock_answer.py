"""An answer as wire/resume.py wants it, without a model: each id is a hash of (prompt, seed, choice, position).

So any node that is given the same request and the ids that are out goes on with the same answer, and what a client
must have heard in the end, byte for byte, can be written down. Some pieces of text are held back until the next id, as
halves of characters are. Choice 0 has `max_tokens` ids, each further one has one less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from llmnode.wire import sse
from llmnode.wire.node import Usage
from llmnode.wire.resume import Fixed, marker

LENGTH = 8


@dataclass(frozen=True)
class Step:
    """One id of one choice: its frames, the marker behind them, and how many ids of the choice are out then."""

    frames: bytes
    marker: bytes
    count: int


class Script:
    """The whole answer to one request."""

    def __init__(self, body: bytes, fixed: Fixed, model: str = "tiny") -> None:
        self._ask = json.loads(body)
        self._fixed, self._model = fixed, model
        self.stream = self._ask.get("stream") is True
        length, choices = self._ask.get("max_tokens", LENGTH), self._ask.get("n", 1)
        self.ids = tuple(tuple(self._id(c, p) for p in range(length - c)) for c in range(choices))

    @property
    def usage(self) -> Usage:
        return Usage(len(json.dumps(self._ask)), 0, sum(map(len, self.ids)))

    def steps(self, out: Sequence[Sequence[int]] = ()) -> Iterator[Step]:
        """What follows the ids that are out, choices taking turns."""
        known = [tuple(out[choice]) if choice < len(out) else () for choice in range(len(self.ids))]
        for mine, theirs in zip(self.ids, known, strict=True):
            assert mine[: len(theirs)] == theirs, "these are the ids of another answer"
        for position in range(max(map(len, self.ids))):
            for choice, ids in enumerate(self.ids):
                if len(known[choice]) <= position < len(ids):
                    count = position + 1
                    frames = b"".join(self._frames(choice, count)) if self.stream else b""
                    yield Step(frames, marker(choice, count, [ids[position]]), count)

    def ending(self) -> list[bytes]:
        """What follows the last step, but for the usage comment."""
        if not self.stream:
            return [sse.event(self.whole()), sse.DONE]
        chunk = self._chunk([]) | {"usage": self.usage.openai()}
        return [sse.event(chunk), sse.DONE]

    def whole(self) -> dict[str, Any]:
        texts = [self._text(choice, len(ids)) for choice, ids in enumerate(self.ids)]
        return self._chunk(
            [{"index": i, "message": {"role": "assistant", "content": text}} for i, text in enumerate(texts)]
        ) | {"usage": self.usage.openai()}

    def heard(self) -> bytes:
        """All that the client of an undisturbed stream gets."""
        return b"".join([*(step.frames for step in self.steps()), *self.ending()])

    def _id(self, choice: int, position: int) -> int:
        seed = self._ask.get("seed", self._fixed.seed)
        prompt = json.dumps(self._ask.get("messages"))
        return crc32(f"{prompt} {seed} {choice} {position}".encode()) % 50_000

    def _text(self, choice: int, count: int) -> str:
        """What is certain after so many ids: a piece that ends in `~` waits for the next one."""
        ids = self.ids[choice][:count]
        pieces = [f" {n}~" if n % 4 == 0 else f" {n}\n\n: t 0 1 {n}" if n % 4 == 1 else f" {n}" for n in ids]
        while pieces and pieces[-1].endswith("~") and count < len(self.ids[choice]):
            pieces.pop()
        return "".join(pieces)

    def _frames(self, choice: int, count: int) -> Iterator[bytes]:
        new = self._text(choice, count)[len(self._text(choice, count - 1)) :]
        if count == 1:
            yield self._delta(choice, {"role": "assistant"})
        if new:
            yield self._delta(choice, {"content": new})
        if count == len(self.ids[choice]):
            yield self._delta(choice, {}, "length")

    def _delta(self, choice: int, delta: dict[str, str], finish: str | None = None) -> bytes:
        return sse.event(self._chunk([{"index": choice, "delta": delta, "finish_reason": finish}]))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        fixed = self._fixed
        return {"id": f"chatcmpl-{fixed.id}", "created": fixed.created, "model": self._model, "choices": choices}
