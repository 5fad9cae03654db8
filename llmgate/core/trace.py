"""One request's way through the gate, as its trace tells it: the request, its wait for a node, each attempt at one.

The ids are fixed as soon as a request is let in, since nodes are told them; the spans are made when it has ended. An
attempt to go on with a broken answer is a span like any other, linked to the one that broke. Clock readings become
times of day at the end, all by one difference, so that a clock that is set meanwhile turns no span inside out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llmgate.core.plan import Kind as Ended
from llmgate.core.plan import Outcome
from llmgate.core.record import MOST_ATTEMPTS, Record
from llmnode.service.spans import Context, Kind, Span, Value, known, operation


@dataclass
class Leg:
    """One attempt. began, ended: clock readings, `ended` and `outcome` None while it lasts.

    ids: token ids of the answer that are committed after it.
    """

    context: Context
    node: str
    url: str
    began: float
    resume: bool
    before: Context | None
    ended: float | None = None
    outcome: Outcome | None = None
    ids: int = 0

    def end(self, outcome: Outcome, now: float, ids: int) -> None:
        self.outcome, self.ended, self.ids = outcome, now, ids

    def span(self, parent: str, journey: Mapping[str, Value], day: float, end: float) -> Span:
        """`journey`: what all attempts have in common. `day`: from clock readings to seconds since the epoch."""
        place = urlsplit(self.url)
        what = f"{journey['gen_ai.operation.name']} {journey.get('gen_ai.request.model', '')}".strip()
        attributes = known({
            **journey,
            "server.address": place.hostname,
            "server.port": place.port,
            "llmrack.node": self.node,
            "llmrack.outcome": str(self.outcome) if self.outcome else "cut",
            "llmrack.resume": self.resume or None,
            "llmrack.committed_ids": self.ids or None,
            "http.response.status_code": self.outcome.status or None if self.outcome else None,
        })  # fmt: skip
        ended = end if self.ended is None else self.ended
        links = (self.before,) if self.before else ()
        return Span(
            what, Kind.CLIENT, self.context, parent, day + self.began, day + ended, attributes, self._error(), links
        )

    def _error(self) -> str:
        if self.outcome is None or self.outcome.kind is Ended.ANSWERED:
            return ""
        return self.outcome.code or self.outcome.kind.value


@dataclass
class Journey:
    """A request that is being recorded. own: of its span.    parent: id of the client's span, "" for none.

    id: makes the id of a span.    queued: clock readings, from when to when it waited for a node; None before.
    """

    own: Context
    parent: str
    id: Callable[[], str]
    queued: tuple[float, float] | None = None
    legs: list[Leg] = field(default_factory=list)

    def leg(self, node: str, url: str, now: float, *, resume: bool) -> Leg:
        """An attempt begins. Beyond what a line of the request log names, nothing is kept of more."""
        before = self.legs[-1].context if resume and self.legs else None
        leg = Leg(self.own.child(self.id()), node, url, now, resume, before)
        if len(self.legs) < MOST_ATTEMPTS:
            self.legs.append(leg)
        return leg

    def spans(self, record: Record, now: float, wall: float) -> list[Span]:
        """The request has ended: all spans of it. `now`, `wall`: the same moment by the clock and since the epoch."""
        day = wall - now
        common = {"gen_ai.operation.name": operation(record.path)}
        if record.model:
            common["gen_ai.request.model"] = record.model
        told = [self._whole(record, common, day, now)]
        if self.queued:
            began, ended = self.queued
            told.append(
                Span("queue", Kind.INTERNAL, self.own.child(self.id()), self.own.span, day + began, day + ended)
            )
        return told + [leg.span(self.own.span, common, day, now) for leg in self.legs]

    def _whole(self, record: Record, common: Mapping[str, Value], day: float, now: float) -> Span:
        usage, first = record.usage, record.first_content
        attributes = known({
            **common,
            "gen_ai.provider.name": "llmrack",
            "gen_ai.usage.input_tokens": usage.prompt_tokens if usage else None,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens if usage else None,
            "gen_ai.usage.output_tokens": usage.completion_tokens if usage else None,
            "http.request.method": "POST",
            "http.route": record.path,
            "url.path": record.path,
            "http.response.status_code": record.status,
            "llmrack.request_id": record.id,
            "llmrack.stream": record.stream,
            "llmrack.end": record.end,
            "llmrack.route": record.route,
            "llmrack.resumed": sum(leg.resume for leg in self.legs) or None,
            "llmrack.time_to_first_token_seconds": None if first is None else round(first - record.arrived, 4),
        })  # fmt: skip
        # A client's own mistake is no error of the server's (semantic conventions for HTTP).
        error = record.end if record.status >= 500 or record.end in ("stream_broken", "failed") else ""
        name = f"POST {record.path}"
        return Span(name, Kind.SERVER, self.own, self.parent, day + record.arrived, day + now, attributes, error)
