"""One request's way through the node, as its trace tells it: the request, and for each choice of its answer the wait
for a slot, the prefill and the decode.

All of it is made when the request has ended, on the event loop, from what the engine says with each answer's end. An
answer that never ended (its client left, the node stopped) shows in the request's own span alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from llmnode.metrics import Meter
from llmnode.service.spans import Context, Kind, Span, Value, known, operation


@dataclass(frozen=True)
class Ended:
    """How a request ended. began, ended: on the node's clock, `day` added to which are seconds since the epoch."""

    route: str
    request_id: str
    status: int
    began: float
    ended: float
    day: float


@dataclass
class Journey:
    """A request that is being recorded. own: of its span.    parent: id of the span that caused it, "" for none.

    id: makes the id of a span.    path: where it goes; of an answer that is gone on with, where that began.
    model, response: the model's name as asked for, and the id of the response, once they are known.
    committed: ids of an answer that is gone on with.
    """

    own: Context
    parent: str
    id: Callable[[], str]
    path: str
    model: str = ""
    response: str = ""
    committed: int = 0

    def spans(self, end: Ended, meter: Meter | None) -> list[Span]:
        """All spans of the request. meter: of one that came to the engine."""
        usage = meter.usage if meter else None
        attributes = known({
            "gen_ai.operation.name": operation(self.path),
            "gen_ai.provider.name": "llmrack",
            "gen_ai.request.model": self.model,
            "gen_ai.response.id": self.response,
            "gen_ai.usage.input_tokens": usage.prompt_tokens if usage else None,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens if usage else None,
            "gen_ai.usage.output_tokens": usage.completion_tokens if usage else None,
            "http.request.method": "POST",
            "http.route": end.route,
            "url.path": end.route,
            "http.response.status_code": end.status,
            "llmrack.request_id": end.request_id,
            "llmrack.committed_ids": self.committed or None,
        })  # fmt: skip
        error = meter.error if meter and meter.error else str(end.status) if end.status >= 500 else ""
        name, times = f"POST {end.route}", (end.day + end.began, end.day + end.ended)
        whole = Span(name, Kind.SERVER, self.own, self.parent, *times, attributes, error)
        return [whole, *(self._parts(meter, end.day) if meter else ())]

    def _parts(self, meter: Meter, day: float) -> list[Span]:
        """What the engine did. Each part of an answer begins where the one before it ended."""
        told: list[Span] = []
        if meter.pooled_s is not None:
            told += self._line(day + meter.began, {"queue": meter.pooled_s[0], "compute": meter.pooled_s[1]}, {})
        for choice, end in sorted(meter.ends.items()):
            about: dict[str, Value] = {"llmrack.choice": choice, "llmrack.finish": end.finish.value}
            parts = {"queue": end.queued_s, "prefill": end.prefill_s, "decode": end.decode_s}
            told += self._line(day + meter.began, parts, about)
        return told

    def _line(self, began: float, parts: dict[str, float], about: dict[str, Value]) -> list[Span]:
        moments = [began]
        for seconds in parts.values():
            moments.append(moments[-1] + seconds)
        return [
            Span(name, Kind.INTERNAL, self.own.child(self.id()), self.own.span, *times, about)
            for name, times in zip(parts, pairwise(moments), strict=True)
        ]
