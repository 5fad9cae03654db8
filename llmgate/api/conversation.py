"""One request for an answer, from the door to the log.

Its life, in the order of the code: who asks -> what for -> which nodes -> what its key may still use -> its turn, when
one has room -> attempts and waits, as the plan says -> what it used -> written down. The body is read once, for the
model's name, the prompt's chain and whether a stream is wanted; the bytes themselves go to the node as they came, but
for the model's name where the nodes know it by another.

Decides nothing about nodes: `core/policy.py` ranks them, `waiting.py` says when to begin and `core/plan.py` whom to ask
next. Here is what those decisions take: clock, dice, the fleet as it is now, and time to wait.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sanic import HTTPResponse, Request

from llmgate.allowances import Allowance, Allowances
from llmgate.api.door import Door, request_id
from llmgate.core import body as bodies
from llmgate.core import evidence, keys, plan, policy
from llmgate.core.demand import demand, prompt_tokens, spent
from llmgate.core.fleet import Begun, Dispatched, Finished, Fleet, Node, Told, View
from llmgate.core.keys import Key, require_model
from llmgate.core.plan import Kind, Look, Outcome, Seen, Try, Verdict
from llmgate.core.policy import Ask, Choice
from llmgate.core.prediction import Sent
from llmgate.core.prompt import Prompt
from llmgate.core.queue import Priority
from llmgate.core.record import Record
from llmgate.core.seats import Seat, heirs, origin_of, seats
from llmgate.core.trace import Journey, Leg
from llmgate.metrics import UNKNOWN, Metrics
from llmgate.relay import Exchange, Relay, Whole
from llmgate.requestlog import RequestLog
from llmgate.settings import Settings
from llmgate.waiting import NobodyReady, Turn, TurnedAway, Visit, Waiting
from llmnode.service import spans
from llmnode.service.traces import Traces
from llmnode.wire import dialect
from llmnode.wire import headers as names
from llmnode.wire.errors import ApiError, DeadlineExceeded, InvalidRequest, Overloaded
from llmnode.wire.resume import Fixed

CLIENT_LEFT = 499
"""The status logged for a client that went away before an answer began, as nginx logs it. Never sent."""
KEEPALIVE_S = 10.0
"""A streaming client for whom nobody works now hears a comment after so much silence. The first one spends the status,
which is kept as long as an error is still likely."""
_LONGEST_NAME = 200
_EVENT_STREAM = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}


class _Client:
    """The client's connection, as the relay sees it: the status line waits for the first bytes.

    node: who began the answer, as the client is told.    begun: the status line is out.
    at: the node that works on the answer now. A client that asked to be told hears of each one after the first in a
    comment before its first bytes, where an event ends and another one begins.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._response: HTTPResponse | None = None
        self._tell = request.headers.get(names.TELL) == "node"
        self._told = ""
        self.node = self.at = ""
        self.begun = False

    async def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.begun, self._told = True, self.node
        rest = {name: value for name, value in headers.items() if name != "content-type"}
        response = await self._request.respond(
            status=status, headers=rest | {names.NODE: self.node}, content_type=headers.get("content-type")
        )
        assert isinstance(response, HTTPResponse), "respond() without a response makes a new one"
        self._response = response

    async def send(self, data: bytes) -> None:
        assert self._response is not None, "send before begin"
        if self._tell and self.at != self._told:
            self._told = self.at
            data = b": node %s\n\n" % self.at.encode() + data
        await self._response.send(data)

    async def end(self) -> None:
        if self._response is not None:
            await self._response.eof()  # type: ignore[no-untyped-call]


@dataclass
class _Talk:
    """What is at hand while one request is being answered.

    body: as it came.    choice: what the policy said of the last look at the fleet, of nodes to begin with; heirs: of
    those that may go on, once something has begun.    turn: once it has one.    journey: of one that is traced.
    """

    ask: Ask
    body: bytes
    choice: Choice
    exchange: Exchange
    client: _Client
    record: Record
    heirs: Choice | None = None
    turn: Turn | None = None
    journey: Journey | None = None


class Conversations:
    """Carries requests from the door to the log. `dice`: 64 random bits each time. `note` takes what the log takes."""

    def __init__(
        self,
        settings: Settings,
        *,
        door: Door,
        view: View,
        relay: Relay,
        waiting: Waiting,
        allowances: Allowances,
        request_log: RequestLog,
        note: Callable[[Mapping[str, Any]], None],
        metrics: Metrics,
        traces: Traces | None,
        clock: Callable[[], float],
        wall: Callable[[], float],
        dice: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._door, self._view, self._relay, self._waiting = door, view, relay, waiting
        self._allowances = allowances
        self._log, self._note, self._metrics, self._traces = request_log, note, metrics, traces
        self._clock, self._wall, self._dice = clock, wall, dice
        self._may_wait = settings.ready_wait_s > 0 and settings.queue_limit > 0

    async def handle(self, request: Request, kinds: frozenset[str]) -> HTTPResponse | None:
        """Answer one request; None when the answer was streamed. Raises ApiError before the first byte."""
        record = Record(request_id(request), request.path, self._clock())
        client = _Client(request)
        journey = self._journey(request) if self._traces else None
        try:
            with self._door.inside():
                return await self._answer(request, kinds, client, record, journey)
        except BaseException as error:
            record.ended(*self._ended_by(error, client))
            raise
        finally:
            self._write(record, journey)

    def _journey(self, request: Request) -> Journey:
        assert self._traces is not None, "asked for only where traces are recorded"
        sent = request.headers
        own, parent = self._traces.context(sent.get(spans.PARENT), sent.get(spans.STATE))
        return Journey(own, parent, self._traces.id)

    def _ended_by(self, error: BaseException, client: _Client) -> tuple[int, str]:
        """The one place that says how a request ended that was not answered to its end -> (status, end).

        A connection that is gone shows itself in many ways, according to where the handler was just then.
        """
        if isinstance(error, ApiError):
            return error.status, error.code or "refused"
        status = 200 if client.begun else CLIENT_LEFT
        if self._door.closed:
            return status, "cut_by_shutdown"
        return (status, "client_left") if isinstance(error, asyncio.CancelledError) else (500, "failed")

    async def _answer(
        self,
        request: Request,
        kinds: frozenset[str],
        client: _Client,
        record: Record,
        journey: Journey | None,
    ) -> HTTPResponse | None:
        key = self._door.who(request)
        record.key = key.name
        body = _read(request.body)
        fleet = self._view.fleet
        asked = _asked(body, fleet, key, kinds)
        record.model = asked[:_LONGEST_NAME]
        record.stream = body.get("stream") is True and request.path not in policy.WHOLE
        ask = Ask(asked, kinds, Prompt(body, request.path), record.id, self._dice(), key)
        choice = self._choose(ask)
        record.route = choice.why
        if choice.model is not None:
            require_model(key, asked, fleet.resolve(asked) or fleet.meant(asked))
            record.model = choice.model
        priority = keys.priority(key, request.headers.get(names.PRIORITY))
        if not choice.ranked and not (choice.awaited and self._may_wait):
            raise policy.refusal(fleet, ask, choice, visible(fleet, key))

        exchange = Exchange(
            request_id=record.id,
            path=request.path,
            body=request.body,
            headers=request.headers,
            stream=record.stream,
            fixed=self._fixed(),
            deadline=record.arrived + self._settings.request_timeout_s,
            sent=record.arrived,
        )
        talk = _Talk(ask, request.body, choice, exchange, client, record, journey=journey)
        prompt = prompt_tokens(choice, len(request.body))
        allowance = await self._allow(key, body, request.path, choice, prompt)
        request.ctx.rate = allowance.headers
        turned_away = False
        try:
            verdict = await self._in_turn(talk, priority)
            turned_away = verdict.error is not None and not record.attempts
        finally:
            record.usage, record.first_content = exchange.usage, exchange.first_content
            used = spent(exchange.usage, exchange.got(), prompt, allowance.hold)
            await self._allowances.settle(allowance, used, 0 if turned_away else 1)
        request.ctx.spent = verdict.spent
        return await self._conclude(verdict, talk)

    async def _allow(self, key: Key, body: Mapping[str, Any], path: str, choice: Choice, prompt: int) -> Allowance:
        """Reserve what the request may use of its key's limits. Raises OverLimit and LimitsUnavailable."""
        n_ctx = max((candidate.n_ctx for candidate in choice.ranked), default=0)
        most = self._settings.default_max_tokens
        return await self._allowances.reserve(key, demand(body, path, prompt, default_max=most, n_ctx=n_ctx))

    def _fixed(self) -> Fixed:
        """What would otherwise differ between the nodes that one answer may come from."""
        id = f"{self._dice():016x}{self._dice() & 0xFFFFFFFF:08x}"
        return Fixed(id, int(self._wall()), self._dice() % (2**32 - 1))

    def _choose(self, ask: Ask) -> Choice:
        return policy.choose(self._view.fleet, ask, self._clock(), self._settings.stale_after_s)

    def _look(self, talk: _Talk) -> Look:
        """The nodes of the last choice, and those that may go on with what has begun."""
        fleet, origin = self._view.fleet, talk.exchange.origin
        able: tuple[Seat, ...] = ()
        if talk.exchange.committed.size and origin:
            talk.heirs = self._choose(replace(talk.ask, model=origin.model, begun=True))
            able = heirs(fleet, talk.heirs.ranked, origin)
        return Look(self._clock(), seats(fleet, talk.choice.ranked), able)

    async def _in_turn(self, talk: _Talk, priority: Priority) -> Verdict:
        """Wait until a node has room, and then take the steps of the plan."""
        visit = Visit(
            talk.record.model or talk.ask.model,
            talk.ask.key.name,
            priority,
            deadline=talk.exchange.deadline,
            ready_by=min(talk.record.arrived + self._settings.ready_wait_s, talk.exchange.deadline),
            choice=talk.choice,
            rank=lambda: self._choose(talk.ask),
            beat=lambda: self._keep_awake(talk),
        )
        came = self._clock()
        try:
            async with self._waiting.turn(visit) as turn:
                talk.turn, talk.choice = turn, turn.choice
                if talk.journey:
                    talk.journey.queued = came, self._clock()
                talk.record.queued, talk.record.route = turn.waited, turn.choice.why
                self._metrics.queued.labels(visit.model).observe(turn.waited)
                self._metrics.routed.labels(turn.choice.policy, turn.choice.reason).inc()
                return await self._carry_out(talk)
        except TurnedAway as error:
            if talk.journey:
                talk.journey.queued = came, self._clock()
            self._metrics.turned_away.labels(visit.model, error.reason).inc()
            return Verdict(error=error)
        except NobodyReady as error:
            self._metrics.turned_away.labels(visit.model, "no_node").inc()
            return Verdict(error=self._nobody_came(talk, error.waited))
        except DeadlineExceeded as error:
            return Verdict(error=error)

    def _nobody_came(self, talk: _Talk, waited: float) -> ApiError:
        fleet, choice = self._view.fleet, self._choose(talk.ask)
        talk.record.queued, talk.record.route = waited, choice.why
        return policy.refusal(fleet, talk.ask, choice, visible(fleet, talk.ask.key), waited)

    async def _carry_out(self, talk: _Talk) -> Verdict:
        """Take the steps of the plan, until it knows what to answer."""
        look = self._look(talk)
        steps = plan.attempts(
            look, tries=self._settings.tries, deadline=talk.exchange.deadline, dice=lambda: self._dice() / 2**64
        )
        step = next(steps)
        while True:
            outcome = None
            if isinstance(step, Try):
                outcome = await self._try(step, talk)
            else:
                await self._wait(step.seconds, talk)
            if outcome is None or outcome.kind is not Kind.ANSWERED:
                talk.choice = self._choose(talk.ask)
                look = self._look(talk)
            try:
                step = steps.send(Seen(look, outcome, talk.exchange.got()))
            except StopIteration as stop:
                verdict: Verdict = stop.value
                return verdict

    async def _wait(self, seconds: float, talk: _Talk) -> None:
        await asyncio.sleep(seconds)
        if self._clock() - talk.exchange.sent >= KEEPALIVE_S:
            await self._keep_awake(talk)

    async def _keep_awake(self, talk: _Talk) -> None:
        exchange, client = talk.exchange, talk.client
        if exchange.stream:
            exchange.sent = self._clock()
            if not client.begun:
                await client.begin(200, _EVENT_STREAM)
            await client.send(dialect.of(exchange.path).keepalive)

    async def _try(self, step: Try, talk: _Talk) -> Outcome:
        exchange, record = talk.exchange, talk.record
        record.node = talk.client.at = step.node
        if not step.resume:
            talk.client.node = step.node
            record.model = talk.choice.model
        leg = self._leg(step, talk) if talk.journey else None
        began = self._clock()
        outcome = await self._attempt(step, talk)
        now = self._clock()
        record.attempt(step.node, outcome, began=began, now=now, resume=step.resume, ids=exchange.committed.size)
        if leg:
            leg.end(outcome, now, exchange.committed.size)
        self._metrics.attempts.labels(step.node, outcome.kind.value).inc()
        if step.resume:
            self._metrics.resumes.labels(record.model, outcome.kind.value).inc()
        return outcome

    def _leg(self, step: Try, talk: _Talk) -> Leg:
        """An attempt begins that is traced: its node hears so."""
        assert talk.journey is not None, "asked for only where there is one"
        node = self._view.fleet.nodes.get(step.node)
        leg = talk.journey.leg(step.node, node.url if node else "", self._clock(), resume=step.resume)
        talk.exchange.trace = leg.context.headers()
        return leg

    async def _attempt(self, step: Try, talk: _Talk) -> Outcome:
        name, exchange = step.node, talk.exchange
        if talk.turn:
            # From here on the request itself is counted where it is.
            talk.turn.begin()
        node = self._view.fleet.nodes.get(name)
        if node is None:
            return Outcome(Kind.UNREACHABLE, detail="it is no longer listed")
        now = self._clock()
        if not node.admits(now):
            return Outcome(Kind.UNREACHABLE, detail="it was ejected, or another request is trying it")
        sent = self._sent(step, talk, now)
        talk.record.predicted = sent.cached if sent else None
        self._view.apply(Dispatched(name, now, sent))
        exchange.busy = lambda load: self._view.apply(Told(name, load, self._clock()))
        if sent:
            exchange.heard = lambda: self._view.apply(Begun(name, sent))
        turn = self._view.fleet.turns
        attempt = self._resume(node, talk) if step.resume else self._begin(node, talk)
        known, computed = exchange.committed.size if step.resume else 0, True
        try:
            outcome = await attempt
            computed = outcome.kind is Kind.ANSWERED or exchange.committed.size > known
        finally:
            cached = exchange.usage.cached_tokens if exchange.usage else None
            self._view.apply(Finished(name, sent, cached, computed))
        self._view.apply(evidence.attempted(name, turn, outcome, self._clock()))
        return outcome

    def _begin(self, node: Node, talk: _Talk) -> Coroutine[Any, Any, Outcome]:
        choice, exchange = talk.choice, talk.exchange
        exchange.body = talk.body if choice.name == talk.ask.model else bodies.renamed(talk.body, choice.name)
        exchange.origin = None if exchange.path in policy.WHOLE else origin_of(node, choice.name)
        return self._relay.begin(node.url, exchange, talk.client)

    def _resume(self, node: Node, talk: _Talk) -> Coroutine[Any, Any, Outcome]:
        return self._relay.resume(node.url, talk.exchange, talk.client)

    def _sent(self, step: Try, talk: _Talk, now: float) -> Sent | None:
        choice = talk.heirs if step.resume and talk.heirs else talk.choice
        to = next((candidate for candidate in choice.ranked if candidate.name == step.node), None)
        return choice.sent(to, talk.record.id, now) if to else None

    async def _conclude(self, verdict: Verdict, talk: _Talk) -> HTTPResponse | None:
        """Say the end: as a status while that is possible, else as the stream's last event, after which it
        does not end as a whole one does."""
        exchange, client, record = talk.exchange, talk.client, talk.record
        for pause in exchange.pauses:
            self._metrics.pause.labels(record.model).observe(pause)
        if verdict.lost:
            self._metrics.lost.labels(record.model, verdict.lost.value).inc()
        if not client.begun:
            if verdict.error:
                raise verdict.error
            assert exchange.kept is not None, "an answer is either streamed or kept"
            record.ended(exchange.kept.status, "refused" if verdict.hand_on else "done")
            return self._handed_on(_worded(exchange.kept, exchange.path), client.node, spent=verdict.spent)
        if verdict.error:
            record.ended(200, verdict.error.code or "failed")
            await client.send(dialect.of(exchange.path).error_event(verdict.error.body()))
        elif verdict.hand_on:
            record.ended(200, "stream_broken" if verdict.lost else "refused")
            assert exchange.kept is not None, "what is handed on was kept"
            await client.send(_broken_off(exchange.kept, exchange.path))
        else:
            record.ended(200, "done")
        await client.end()
        return None

    def _handed_on(self, kept: Whole, node: str, *, spent: bool) -> HTTPResponse:
        headers = kept.headers | {names.NODE: node} | ({names.SHOULD_RETRY: "false"} if spent else {})
        return HTTPResponse(kept.body, kept.status, headers, headers.pop("content-type", None))

    def _write(self, record: Record, journey: Journey | None) -> None:
        now = self._clock()
        wall = self._wall()
        line = record.line(now, wall)
        self._log.write(line)
        self._note(line)
        if journey and self._traces and journey.own.sampled and record.key is not None:
            self._traces.say(journey.spans(record, now, wall))
        model = record.model if record.model and self._view.fleet.resolve(record.model) else UNKNOWN
        self._metrics.count(record, model, now)


def visible(fleet: Fleet, key: Key, kinds: frozenset[str] = frozenset()) -> list[str]:
    """The models of the fleet that the key may use, by id; of these kinds alone, if any are named."""
    models = (m for node in fleet.nodes.values() for m in (node.report.models if node.report else ()))
    found = (m for m in models if not kinds or kinds.intersection(m.kinds))
    return sorted({m.id for m in found if key.may_use(m.id, *m.aliases)})


def _worded(kept: Whole, path: str) -> Whole:
    """An answer read whole; an error in its endpoint's words, since one of /resume is not."""
    words = dialect.of(path)
    if kept.status < 400 or words is dialect.OPENAI:
        return kept
    try:
        return replace(kept, body=json.dumps(words.error(json.loads(kept.body))).encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return kept


def _broken_off(kept: Whole, path: str) -> bytes:
    """A node's error as the last event of a stream; what is no error in a shape that we know goes on as it is."""
    try:
        return dialect.of(path).error_event(json.loads(kept.body))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return b"data: " + kept.body + b"\n\n"


def _read(body: bytes) -> dict[str, Any]:
    try:
        return bodies.read(body)
    except ValueError as error:
        raise InvalidRequest(f"the request body {error}", code="invalid_json") from error


def _asked(body: Mapping[str, Any], fleet: Fleet, key: Key, kinds: frozenset[str]) -> str:
    """The model asked for; when none is named, the only one of these kinds, or else of all, that the key may use."""
    served = (visible(fleet, key, kinds) or visible(fleet, key)) if body.get("model") is None else []
    try:
        return bodies.asked(body, served)
    except bodies.ModelMissing as error:
        if not served and fleet.silent():
            raise Overloaded("no node has reported its models yet", retry_after=policy.NO_NODE_RETRY_S) from None
        raise InvalidRequest(str(error), param="model", code="missing_field") from None
    except ValueError as error:
        raise InvalidRequest(str(error), param="model") from None
