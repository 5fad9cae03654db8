"""What clients ask: chat, completions, inference and the list of models.

One request's life, in the order of the code: who asks -> what for -> which nodes -> attempts, as the plan says ->
written down. The body is read once, for the model's name, the prompt's chain and whether a stream is wanted; the bytes
themselves go to the node as they came, but for the model's name where the nodes know it by another.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json as json_response

from llmgate.api.door import Door, request_id
from llmgate.core import body as bodies
from llmgate.core import evidence, plan, policy
from llmgate.core.candidate import Candidate
from llmgate.core.fleet import Dispatched, Finished, Fleet, View
from llmgate.core.keys import Key, require_model
from llmgate.core.plan import Kind, Outcome, Verdict
from llmgate.core.policy import CHAT, COMPLETION, EITHER, Ask, Choice
from llmgate.core.prompt import Prompt
from llmgate.ledger import RequestLog
from llmgate.metrics import UNKNOWN, Metrics
from llmgate.relay import Exchange, Relay, Whole
from llmgate.settings import Settings
from llmnode.wire import headers as names
from llmnode.wire import sse
from llmnode.wire.errors import ApiError, DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded

CLIENT_LEFT = 499
"""The status logged for a client that went away before an answer began, as nginx logs it. Never sent."""
_LONGEST_NAME = 200


@dataclass
class Record:
    """A request's line in the log, filled in on the way. Clock readings and durations in seconds.

    predicted: prompt tokens that the last node tried was thought to hold.
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
    predicted: int | None = None
    attempts: list[dict[str, str]] = field(default_factory=list)
    exchange: Exchange | None = None

    def line(self, now: float, wall: float) -> dict[str, Any]:
        usage = self.exchange.usage if self.exchange else None
        first = self.exchange.first_content if self.exchange else None
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
            "duration_seconds": round(now - self.arrived, 4),
            "attempts": self.attempts,
            "route": self.route,
        }


class _Client:
    """The client's connection, as the relay sees it: the status line waits for the first bytes."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._response: HTTPResponse | None = None
        self.node = ""

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        rest = {name: value for name, value in headers.items() if name != "content-type"}
        response = await self._request.respond(
            status=status, headers=rest | {names.NODE: self.node}, content_type=headers.get("content-type")
        )
        assert isinstance(response, HTTPResponse), "respond() without a response makes a new one"
        self._response = response

    async def send(self, data: bytes) -> None:
        assert self._response is not None, "send before begin"
        await self._response.send(data)

    async def end(self) -> None:
        if self._response is not None:
            await self._response.eof()  # type: ignore[no-untyped-call]


class Conversations:
    """Carries requests from the door to the log."""

    def __init__(
        self,
        settings: Settings,
        *,
        door: Door,
        view: View,
        relay: Relay,
        request_log: RequestLog,
        metrics: Metrics,
        clock: Callable[[], float],
        wall: Callable[[], float],
        dice: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._door, self._view, self._relay = door, view, relay
        self._log, self._metrics = request_log, metrics
        self._clock, self._wall, self._dice = clock, wall, dice

    async def handle(self, request: Request, kinds: frozenset[str]) -> HTTPResponse | None:
        """Answer one request; None when the answer was streamed. Raises ApiError before the first byte."""
        record = Record(request_id(request), request.path, self._clock())
        try:
            with self._door.inside():
                return await self._answer(request, kinds, record)
        except ApiError as error:
            record.status, record.end = error.status, error.code or "refused"
            raise
        except asyncio.CancelledError:
            begun = record.exchange is not None and record.exchange.begun
            record.status = 200 if begun else CLIENT_LEFT
            record.end = "cut_by_shutdown" if self._door.closed else "client_left"
            raise
        finally:
            self._write(record)

    async def _answer(self, request: Request, kinds: frozenset[str], record: Record) -> HTTPResponse | None:
        key = self._door.who(request)
        record.key = key.name
        body = _object(request.body)
        fleet = self._view.fleet
        asked = _model(body, fleet, key)
        record.model = asked[:_LONGEST_NAME]
        record.stream = body.get("stream") is True
        ask = Ask(asked, kinds, Prompt(body), record.id, self._dice(), key)
        choice = policy.choose(fleet, ask, self._clock(), self._settings.stale_after_s)
        record.route = choice.why
        if choice.model is not None:
            require_model(key, asked, fleet.resolve(asked) or fleet.meant(asked))
            record.model = choice.model
        if not choice.ranked:
            raise policy.refusal(fleet, ask, choice, visible(fleet, key))
        self._metrics.routed.labels(choice.policy, choice.reason).inc()

        sent = request.body if choice.name == asked else bodies.renamed(request.body, choice.name)
        exchange = Exchange(record.id, request.path, sent, request.headers, record.stream)
        record.exchange = exchange
        client = _Client(request)
        try:
            trying = self._try_nodes(choice, exchange, client, record)
            outcome, verdict = await asyncio.wait_for(trying, self._settings.request_timeout_s)
        except asyncio.TimeoutError:
            limit = self._settings.request_timeout_s
            error = DeadlineExceeded(f"the answer was not complete within {limit:g} s")
            await self._fail(error, exchange, client, record)
            return None
        request.ctx.spent = verdict.spent
        return await self._conclude(outcome, verdict, exchange, client, record)

    async def _try_nodes(
        self, choice: Choice, exchange: Exchange, client: _Client, record: Record
    ) -> tuple[Outcome, Verdict]:
        steps = plan.attempts(choice.ranked, self._settings.tries)
        candidate = next(steps)
        while True:
            record.node = client.node = candidate.name
            outcome = await self._attempt(choice, candidate, exchange, client, record)
            tried = {"node": candidate.name, "outcome": str(outcome)}
            record.attempts.append(tried | ({"why": outcome.detail} if outcome.detail else {}))
            self._metrics.attempts.labels(candidate.name, outcome.kind.value).inc()
            try:
                candidate = steps.send(outcome)
            except StopIteration as stop:
                return outcome, stop.value

    async def _attempt(
        self, choice: Choice, candidate: Candidate, exchange: Exchange, client: _Client, record: Record
    ) -> Outcome:
        name = candidate.name
        node = self._view.fleet.nodes.get(name)
        if node is None:
            return Outcome(Kind.UNREACHABLE, detail="it is no longer listed")
        now = self._clock()
        if not node.admits(now):
            return Outcome(Kind.UNREACHABLE, detail="it was ejected, or another request is trying it")
        sent = choice.sent(candidate, record.id, now)
        record.predicted = sent.cached if sent else None
        self._view.apply(Dispatched(name, now, sent))
        turn = self._view.fleet.turns
        computed = True
        try:
            outcome = await self._relay.attempt(node.url, exchange, client)
            computed = outcome.kind in (Kind.ANSWERED, Kind.CUT)
        finally:
            cached = exchange.usage.cached_tokens if exchange.usage else None
            self._view.apply(Finished(name, sent, cached, computed))
        self._view.apply(evidence.attempted(name, turn, outcome, self._clock()))
        return outcome

    async def _conclude(
        self, outcome: Outcome, verdict: Verdict, exchange: Exchange, client: _Client, record: Record
    ) -> HTTPResponse | None:
        if verdict.error:
            await self._fail(verdict.error, exchange, client, record)
            return None
        if outcome.kind is Kind.CUT:
            error = ApiError(f"the answer broke off: {outcome.detail}", code="stream_broken")
            await self._fail(error, exchange, client, record)
            return None
        record.end = "refused" if verdict.hand_on else "done"
        record.status = exchange.kept.status if exchange.kept else 200
        if exchange.begun:
            if verdict.hand_on and exchange.kept:
                await client.send(b"data: " + exchange.kept.body + b"\n\n")
            await client.end()
            return None
        assert exchange.kept is not None, "an answer is either streamed or kept"
        return self._handed_on(exchange.kept, client.node, spent=verdict.spent)

    def _handed_on(self, kept: Whole, node: str, *, spent: bool) -> HTTPResponse:
        headers = kept.headers | {names.NODE: node} | ({names.SHOULD_RETRY: "false"} if spent else {})
        return HTTPResponse(kept.body, kept.status, headers, headers.pop("content-type", None))

    async def _fail(self, error: ApiError, exchange: Exchange, client: _Client, record: Record) -> None:
        """Say what went wrong: as a status while that is possible, else as the stream's last event, without [DONE]."""
        if not exchange.begun:
            raise error
        record.status, record.end = 200, error.code or "failed"
        if not exchange.told:
            await client.send(sse.event(error.body()))
        await client.end()

    def _write(self, record: Record) -> None:
        now = self._clock()
        line = record.line(now, self._wall())
        self._log.write(line)
        model = record.model if record.model and self._view.fleet.resolve(record.model) else UNKNOWN
        self._metrics.requests.labels(model, str(record.status)).inc()
        self._metrics.duration.labels(model).observe(now - record.arrived)
        exchange = record.exchange
        if exchange and exchange.first_content is not None:
            self._metrics.first_token.labels(model).observe(exchange.first_content - record.arrived)
        if exchange and exchange.usage:
            for kind in ("prompt_tokens", "cached_tokens", "completion_tokens"):
                self._metrics.tokens.labels(model, kind.removesuffix("_tokens")).inc(getattr(exchange.usage, kind))
            self._metrics.predicted.labels(model).inc(record.predicted or 0)


def blueprint(conversations: Conversations, *, door: Door, view: View, started: float) -> Blueprint:
    """`started`: seconds since the epoch, which stands for `created` in the list of models."""
    routes = Blueprint("openai")

    async def chat(request: Request) -> HTTPResponse | None:
        return await conversations.handle(request, CHAT)

    async def completions(request: Request) -> HTTPResponse | None:
        return await conversations.handle(request, COMPLETION)

    async def inference(request: Request) -> HTTPResponse | None:
        return await conversations.handle(request, EITHER)

    def card(model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": int(started), "owned_by": "llmrack"}

    async def models(request: Request) -> HTTPResponse:
        key = door.who(request)
        return json_response({"object": "list", "data": [card(m) for m in visible(view.fleet, key)]})

    async def model(request: Request, name: str) -> HTTPResponse:
        key, fleet = door.who(request), view.fleet
        found = fleet.resolve(name)
        if found is None:
            raise ModelNotFound(name, visible(fleet, key))
        require_model(key, name, found)
        return json_response(card(found))

    routes.add_route(chat, "/v1/chat/completions", methods=["POST"])
    routes.add_route(completions, "/v1/completions", methods=["POST"])
    routes.add_route(inference, "/inference", methods=["POST"])
    routes.add_route(models, "/v1/models", methods=["GET"])
    routes.add_route(model, "/v1/models/<name:path>", methods=["GET"])
    return routes


def visible(fleet: Fleet, key: Key) -> list[str]:
    """The models of the fleet that the key may use, by id."""
    models = (m for node in fleet.nodes.values() for m in (node.report.models if node.report else ()))
    return sorted({m.id for m in models if key.may_use(m.id, *m.aliases)})


def _object(body: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"the request body is not valid JSON: {what}", code="invalid_json") from error
    if not isinstance(decoded, dict):
        raise InvalidRequest("the request body must be a JSON object", code="invalid_json")
    return decoded


def _model(body: Mapping[str, Any], fleet: Fleet, key: Key) -> str:
    """The model asked for; the only one there is when none is named."""
    asked = body.get("model")
    if asked is None:
        choices = visible(fleet, key)
        if len(choices) == 1:
            return choices[0]
        if not choices and fleet.silent():
            raise Overloaded("no node has reported its models yet", retry_after=policy.NO_NODE_RETRY_S)
        have = ", ".join(choices) or "none"
        raise InvalidRequest(f"model is missing; models served here: {have}", param="model", code="missing_field")
    if not isinstance(asked, str) or not asked:
        raise InvalidRequest(f"model must be a string, got {type(asked).__name__}", param="model")
    return asked
