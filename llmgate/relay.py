"""One attempt at one node: the request's bytes out, the answer's bytes in, cancellation both ways.

Decides nothing about other nodes: it says what came of the attempt and `core/plan.py` goes on from there. Of sockets
knows `upstream.py`, of which bytes may go on `core/reader.py`.

The answer takes one of three ways:
- an error status: read whole (bounded) and kept, so that the plan may try elsewhere or hand it on;
- a JSON answer: read whole before anything is sent on, so that a node dying halfway can still be replaced. A node that
  speaks resume sends it as an event stream with commit markers, so that what it has done so far is not lost either;
- a stream: passed on as its frames are committed, with one write for each read. Nothing is sent before the first frame.

Memory per request: frames that wait for their marker and the one being completed (at most FRAME_LIMIT together, or
BODY_LIMIT for an answer that is collected), 4 bytes for each committed token id, and what the two sockets buffer
(64 KiB each, and one read); more is read only when the client's socket has taken what came before.

Cancelling the task closes the connection to the node at once, which is how a node learns that its client has gone. So
does the end of an attempt that failed, and the deadline: a node that was only asleep must not speak again.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llmgate.core.plan import Got, Kind, Outcome
from llmgate.core.reader import Reader
from llmgate.upstream import Answer, Late, Patience, Stalled, Unreachable, Upstream, UpstreamError
from llmnode.service import spans
from llmnode.wire import headers as names
from llmnode.wire import resume
from llmnode.wire.node import Load, Usage
from llmnode.wire.resume import Committed, Fixed, Origin, Resume

FRAME_LIMIT = 4 * 1024 * 1024
BODY_LIMIT = 64 * 1024 * 1024
_ERROR_LIMIT = 1024 * 1024
_POLL_LIMIT = 4 * 1024 * 1024
_KEEP_IDLE_S = 15.0
"""Idle connections to nodes are dropped after so long, well before the 120 s after which a node would drop them."""

_FORWARD = ("content-type", "accept", "user-agent")
_NO_VALUE = frozenset("\r\n\0")
"""Cannot be in a header's value (RFC 9110, 5.5). Sanic lets single ones pass; such a header stays behind."""
_RETURN = ("content-type", names.IGNORED, "x-accel-buffering", "cache-control")
_ERROR_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "overloaded_error": 503,
    "timeout_error": 504,
}
# ValueError: an answer over its limit.
_FAILURES = (UpstreamError, ValueError)


class Client(Protocol):
    """The gate's side of the client's connection. `begin` is called once, before the first `send`; `begun` tells."""

    @property
    def begun(self) -> bool: ...

    async def begin(self, status: int, headers: Mapping[str, str]) -> None: ...

    async def send(self, data: bytes) -> None: ...


@dataclass(frozen=True)
class Whole:
    """An answer read whole, with the headers that may be handed on."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Exchange:
    """What one client request has got so far, over all its attempts. Filled in by the relay, read by the log.

    fixed: what must not differ between nodes.    deadline: clock seconds.    sent: when the client last got a byte, or
    the request came.
    origin: the model of the node that is asked to begin, by its last report until the answer itself says it; None when
    it speaks no resume.    committed: ids that are out.
    content: some content is out, so that another node may only go on.
    resumable: `committed` stands for all that is out.    first_content: clock reading.    pauses: seconds in which the
    client heard nothing, between content of one node and of the next.
    trace: the headers that say what this attempt is part of; None: the client's own go on.
    kept: the last answer or error that was read whole, not sent yet.
    heard: called when a node's answer begins, if it does not end there and then: its prompt is computed.
    busy: called with the load that a node tells of as it begins to answer.
    """

    request_id: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    stream: bool
    fixed: Fixed
    deadline: float
    sent: float
    origin: Origin | None = None
    committed: Committed = field(default_factory=Committed)
    content: bool = False
    resumable: bool = True
    first_content: float | None = None
    last_content: float = 0.0
    pauses: list[float] = field(default_factory=list)
    usage: Usage | None = None
    trace: Mapping[str, str] | None = None
    kept: Whole | None = None
    heard: Callable[[], None] = lambda: None
    busy: Callable[[Load], None] = lambda load: None

    def got(self) -> Got:
        return Got(self.committed.size, self.content, self.resumable)


class Relay:
    """The gate's connections to its nodes."""

    def __init__(
        self,
        token: str,
        clock: Callable[[], float],
        *,
        connect_timeout_s: float,
        stall_timeout_s: float,
        request_timeout_s: float,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """`context`: what to connect to https:// nodes with; None for the system's authorities."""
        self._authorization = [("authorization", f"Bearer {token}")] if token else []
        self._clock = clock
        self._connect_s, self._stall_s, self._request_s = connect_timeout_s, stall_timeout_s, request_timeout_s
        self._upstream = Upstream(idle_s=_KEEP_IDLE_S, tls=context)

    async def close(self) -> None:
        await self._upstream.close()

    async def fetch(self, base: str, path: str, *, etag: str = "", timeout_s: float) -> tuple[int, str, bytes]:
        """GET with the fleet token, for polls -> (status, ETag or "", body).

        Raises ConnectionRefusedError when no connection could be made, else ConnectionError; both say why.
        """
        headers = [*self._authorization, *([("if-none-match", etag)] if etag else [])]
        patience = Patience(connect=timeout_s, take=timeout_s, silence=timeout_s, whole=timeout_s)
        try:
            answer = await self._upstream.ask("GET", base, path, headers, b"", patience)
            try:
                body = await _read(answer, _POLL_LIMIT)
            finally:
                answer.close()
        except Late:
            raise ConnectionError(f"no answer within {timeout_s:g} s") from None
        except _FAILURES as error:
            refused = isinstance(error, Unreachable)
            raise (ConnectionRefusedError if refused else ConnectionError)(str(error)) from error
        return answer.status, answer.headers.get("etag", ""), body

    async def begin(self, base: str, exchange: Exchange, client: Client) -> Outcome:
        """Send the request to one node and pass its answer on. Never raises but for cancellation by the client."""
        exchange.committed = Committed()
        return await self._attempt(base, exchange.path, exchange.body, exchange, client, resumed=False)

    async def resume(self, base: str, exchange: Exchange, client: Client) -> Outcome:
        """Have one node go on with what is committed, and pass that on. Raises like `begin`."""
        origin = exchange.origin
        assert origin is not None, "what is committed has an origin"
        body = Resume(exchange.path, origin, exchange.fixed, exchange.committed.ids(), exchange.body).write()
        return await self._attempt(base, resume.PATH, body, exchange, client, resumed=True)

    async def _attempt(
        self, base: str, path: str, body: bytes, exchange: Exchange, client: Client, *, resumed: bool
    ) -> Outcome:
        exchange.kept = None
        left = exchange.deadline - self._clock()
        # A node that speaks no resume is silent until the whole of a JSON answer is there.
        silence = self._stall_s if exchange.stream or exchange.origin else self._request_s
        patience = Patience(self._connect_s, self._stall_s, silence, left)
        try:
            response = await self._upstream.ask("POST", base, path, self._headers(exchange, left), body, patience)
        except _FAILURES as error:
            return self._failure(error)
        try:
            if response.status != 200:
                return await self._refused(response, exchange)
            marked = response.headers.get(names.RESUMABLE) == str(resume.VERSION)
            if resumed and not marked:
                return Outcome(Kind.BROKE, detail="its answer to a resume has no commit markers")
            if marked and not resumed and names.ORIGIN in response.headers:
                exchange.origin = Origin.parse(response.headers[names.ORIGIN])
            if load := _load(response):
                exchange.busy(load)
            if marked and not exchange.stream:
                return await self._collect(response, exchange)
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                return await self._stream(response, exchange, client, marked=marked)
            return await self._whole(response, exchange)
        except _FAILURES as error:
            return self._failure(error)
        finally:
            response.close()

    async def _refused(self, response: Answer, exchange: Exchange) -> Outcome:
        body = await _read(response, _ERROR_LIMIT)
        headers = _returned(response)
        wait = response.headers.get("retry-after", "")
        if wait:
            headers["retry-after"] = wait
        exchange.kept = Whole(response.status, headers, body)
        _, code, message = _error(body)
        return Outcome(Kind.REFUSED, response.status, code, float(wait) if wait.isdigit() else None, message)

    async def _whole(self, response: Answer, exchange: Exchange) -> Outcome:
        body = await _read(response, BODY_LIMIT)
        exchange.first_content = self._clock()
        exchange.usage = Usage.parse(response.headers.get(names.USAGE, "")) or _usage(body)
        exchange.kept = Whole(response.status, _returned(response), body)
        return Outcome(Kind.ANSWERED)

    async def _collect(self, response: Answer, exchange: Exchange) -> Outcome:
        """A JSON answer in the form of a stream: one event that holds the body, with markers before it."""
        frames: list[bytes] = []

        async def keep(data: bytes) -> None:
            frames.extend(frame for frame in data.split(b"\n\n") if frame.startswith(b"data: "))

        outcome = await self._follow(response, Reader(exchange.committed, BODY_LIMIT), exchange, keep)
        if outcome.kind is not Kind.ANSWERED:
            return outcome
        if len(frames) != 2:
            return Outcome(Kind.BROKE, detail=f"its answer came in {len(frames) - 1} events instead of one")
        body = frames[0][len(b"data: ") :]
        exchange.first_content = self._clock()
        exchange.usage = exchange.usage or _usage(body)
        exchange.kept = Whole(200, _returned(response) | {"content-type": "application/json"}, body)
        return outcome

    async def _stream(self, response: Answer, exchange: Exchange, client: Client, *, marked: bool) -> Outcome:
        reader = Reader(exchange.committed if marked else None, FRAME_LIMIT)
        silent = True

        async def pass_on(data: bytes) -> None:
            nonlocal silent
            now = self._clock()
            if reader.content:
                if not exchange.content:
                    exchange.content, exchange.resumable, exchange.first_content = True, marked, now
                elif silent:
                    exchange.pauses.append(now - exchange.last_content)
                silent = False
                exchange.last_content = now
            exchange.sent = now
            await self._pass_on(response, client, data)

        return await self._follow(response, reader, exchange, pass_on)

    async def _pass_on(self, response: Answer, client: Client, data: bytes) -> None:
        if not client.begun:
            # A proxy in front of the gate must not hold a stream back, whatever the node said.
            await client.begin(response.status, {"x-accel-buffering": "no"} | _returned(response))
        await client.send(data)

    async def _follow(
        self, response: Answer, reader: Reader, exchange: Exchange, take: Callable[[bytes], Awaitable[None]]
    ) -> Outcome:
        """Read an event stream to its end, or to where there is nothing more to be had from it."""
        failure: Outcome | None = None
        silent, known = True, exchange.committed.size
        try:
            while chunk := await response.read():
                data = reader.feed(chunk)
                if silent and not reader.over and (reader.content or exchange.committed.size > known):
                    silent = False
                    exchange.heard()
                if data:
                    await take(data)
                if reader.over and not reader.done:
                    break
        except _FAILURES as error:
            failure = self._failure(error)
        exchange.usage = reader.usage or exchange.usage
        if reader.done:  # what comes after that, or does not, is nobody's concern
            return Outcome(Kind.ANSWERED)
        if reader.handover:
            return Outcome(Kind.HANDOVER)
        if reader.error is not None:
            return _failed(reader.error, exchange)
        if failure:
            return failure
        return Outcome(Kind.BROKE, detail=reader.broken or "it ended the stream without [DONE]")

    def _failure(self, error: Exception) -> Outcome:
        """What it means that nothing more comes."""
        if isinstance(error, Late):
            return Outcome(Kind.LATE, detail=f"the answer was not complete within {self._request_s:g} s")
        if isinstance(error, Unreachable):
            return Outcome(Kind.UNREACHABLE, detail=str(error))
        return Outcome(Kind.STALLED if isinstance(error, Stalled) else Kind.BROKE, detail=str(error))

    def _headers(self, exchange: Exchange, left: float) -> list[tuple[str, str]]:
        """What goes to the node: a short list of the client's headers, and ours. `left`: seconds to the deadline."""
        forward = _FORWARD if exchange.trace else (*_FORWARD, spans.PARENT, spans.STATE)
        sent = [(name, exchange.headers[name]) for name in forward if name in exchange.headers]
        headers = [(name, value) for name, value in sent if not _NO_VALUE.intersection(value)]
        headers.extend((exchange.trace or {}).items())
        headers.append((names.REQUEST_ID, exchange.request_id))
        headers.append((names.DEADLINE_MS, str(max(1, int(left * 1000)))))
        headers.append((names.REPORT_USAGE, "1"))
        if exchange.origin:
            headers.append((names.RESUMABLE, exchange.fixed.header()))
        return headers + self._authorization


async def _read(response: Answer, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while chunk := await response.read():
        size += len(chunk)
        if size > limit:
            raise ValueError(f"its answer is longer than {limit} bytes")
        parts.append(chunk)
    return b"".join(parts)


def _returned(response: Answer) -> dict[str, str]:
    return {name: response.headers[name] for name in _RETURN if name in response.headers}


def _load(response: Answer) -> Load | None:
    """The load that a node tells of with its answer. One that cannot be read is none: the next report has it."""
    try:
        return Load.parse(response.headers[names.LOAD]) if names.LOAD in response.headers else None
    except ValueError:
        return None


def _error(body: bytes) -> tuple[str, str, str]:
    """(type, code, message) of an error in the wire's shape; empty where the body is something else."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("type") or ""), str(error.get("code") or ""), str(error.get("message") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", "", ""


def _failed(body: bytes, exchange: Exchange) -> Outcome:
    """A node that fails after its first byte can only say so in the stream; it is kept as the answer it stands for."""
    kind, code, message = _error(body)
    status = _ERROR_STATUS.get(kind, 500)
    exchange.kept = Whole(status, {"content-type": "application/json"}, body)
    return Outcome(Kind.FAILED, status, code, None, message)


def _usage(body: bytes) -> Usage | None:
    """The `usage` of a JSON answer; None where it has none."""
    try:
        usage = json.loads(body)["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Usage(int(usage["prompt_tokens"]), int(cached), int(usage.get("completion_tokens", 0)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
