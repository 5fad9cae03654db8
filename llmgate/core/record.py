"""What is written down of one request: a line of the request log, filled in on the way.

Prompts, answers and secrets are never in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmgate.core.plan import Kind, Outcome
from llmnode.wire.node import Usage

MOST_ATTEMPTS = 50
"""Attempts that a line names; an answer may be handed from node to node more often than anybody would read."""


@dataclass
class Record:
    """Clock readings and durations in seconds. `end`: in one word how it ended.

    queued: how long it waited for a node with room; None when it did not get that far.
    predicted: prompt tokens that the last node tried was thought to hold.
    first_content: when the client, or the gate for an answer that is not streamed, got the first of it.
    resumed: how many nodes went on with what others had begun, as far as they got.
    """

    id: str
    path: str
    arrived: float
    key: str | None = None
    model: str | None = None
    stream: bool = False
    node: str | None = None
    status: int = 500
    end: str = "failed"
    route: str = ""
    queued: float | None = None
    predicted: int | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)
    usage: Usage | None = None
    first_content: float | None = None
    resumed: int = 0

    def attempt(self, node: str, outcome: Outcome, *, began: float, now: float, resume: bool, ids: int) -> None:
        """Note what came of a node. `ids`: token ids that are committed after it, of all attempts."""
        offset, took = round(began - self.arrived, 4), round(now - began, 4)
        tried: dict[str, Any] = {"node": node, "outcome": str(outcome), "at": offset, "seconds": took}
        if resume:
            tried["resume"] = True
            self.resumed += outcome.kind not in (Kind.UNREACHABLE, Kind.REFUSED)
        if ids:
            tried["ids"] = ids
        if outcome.detail:
            tried["why"] = outcome.detail
        if len(self.attempts) < MOST_ATTEMPTS:
            self.attempts.append(tried)

    def ended(self, status: int, end: str) -> None:
        self.status, self.end = status, end

    def line(self, now: float, wall: float) -> dict[str, Any]:
        usage, first = self.usage, self.first_content
        return {
            "ts": round(wall, 3),
            "id": self.id,
            "key": self.key,
            "path": self.path,
            "model": self.model,
            "stream": self.stream,
            "node": self.node,
            "status": self.status,
            "end": self.end,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "cached_tokens": usage.cached_tokens if usage else None,
            "predicted_cached_tokens": self.predicted,
            "completion_tokens": usage.completion_tokens if usage else None,
            "time_to_first_token_seconds": None if first is None else round(first - self.arrived, 4),
            "queued_seconds": None if self.queued is None else round(self.queued, 4),
            "duration_seconds": round(now - self.arrived, 4),
            "attempts": self.attempts,
            "resumed": self.resumed,
            "route": self.route,
        }
