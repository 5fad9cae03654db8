"""One attempt at one node: the request's bytes out, the answer's bytes in, cancellation both ways.

Owns the HTTP client; nobody else in the gate imports one. Decides nothing about other nodes: it says what came of the
attempt and `core/plan.py` goes on from there.

The answer takes one of three ways:
- an error status: read whole (bounded) and kept, so that the plan may try elsewhere or hand it on;
- a JSON answer: read whole before anything is sent on, so that a node dying halfway can still be replaced;
- a stream: passed on frame by frame as the frames complete. Nothing is sent before the first frame. After keepalives
  alone another node may still answer; after content, a failure ends the stream with an error event and no `[DONE]`.

Memory per request: one frame being completed (at most FRAME_LIMIT) plus what the two sockets buffer (64 KiB each);
the next frame is read only when the client's socket has taken this one.

Cancelling the task closes the connection to the node at once, which is how a node learns that its client has gone.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from llmgate.core.plan import Kind, Outcome
from llmnode.wire import headers as names
from llmnode.wire import sse
from llmnode.wire.node import Usage

FRAME_LIMIT = 4 * 1024 * 1024
BODY_LIMIT = 64 * 1024 * 1024
_ERROR_LIMIT = 1024 * 1024
_POLL_LIMIT = 4 * 1024 * 1024
_KEEP_IDLE_S = 15.0
"""Idle connections to nodes are dropped after so long, well before the 120 s after which a node would drop them."""

_FORWARD = ("content-type", "accept", "traceparent", "tracestate", "user-agent")
_RETURN = ("content-type", names.IGNORED, "x-accel-buffering", "cache-control")
_ERROR_EVENT = b'data: {"error":'
_ERROR_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "overloaded_error": 503,
    "timeout_error": 504,
}
# The transport translates most of aiohttp's errors into httpx's, but not all; ValueError: an answer over its limit.
_FAILURES = (httpx.HTTPError, httpx.StreamError, aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError)


class Client(Protocol):
    """The gate's side of the client's connection. `begin` is called once, before the first `send`."""

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

    begun: the status line is out.   content: some content is out, so that no other node may take over.
    told: the node said itself, in the stream, what went wrong.      first_content: clock reading, seconds.
    kept: the last answer that was read whole, not sent yet.
    """

    request_id: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    stream: bool
    begun: bool = False
    content: bool = False
    told: bool = False
    first_content: float | None = None
    usage: Usage | None = None
    kept: Whole | None = None


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
    ) -> None:
        self._token = token
        self._clock = clock
        self._connect_s, self._stall_s, self._request_s = connect_timeout_s, stall_timeout_s, request_timeout_s
        # trust_env off: a proxy or .netrc of the host must not come between the gate and its nodes.
        self._http = httpx.AsyncClient(
            transport=AiohttpTransport(client=_session),
            trust_env=False,
            headers={"accept-encoding": "identity"},
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def fetch(self, url: str, *, etag: str = "", timeout_s: float) -> tuple[int, str, bytes]:
        """GET with the fleet token, for polls -> (status, ETag or "", body).

        Raises ConnectionRefusedError when no connection could be made, else ConnectionError; both say why.
        """
        headers = self._authorization() | ({"if-none-match": etag} if etag else {})
        try:
            return await asyncio.wait_for(self._get(url, headers), timeout_s)
        except asyncio.TimeoutError:
            raise ConnectionError(f"no answer within {timeout_s:g} s") from None
        except _FAILURES as error:
            refused = isinstance(error.__cause__ or error, aiohttp.ClientConnectorError)
            raise (ConnectionRefusedError if refused else ConnectionError)(_reason(error)) from error

    async def attempt(self, base: str, exchange: Exchange, client: Client) -> Outcome:
        """Send the request to one node and pass its answer on. Never raises but for cancellation by the client."""
        exchange.kept = None
        timeout = httpx.Timeout(
            connect=self._connect_s,
            read=self._stall_s if exchange.stream else self._request_s,
            write=self._stall_s,
            pool=None,
        )
        request = self._http.build_request(
            "POST", base + exchange.path, content=exchange.body, headers=self._headers(exchange), timeout=timeout
        )
        try:
            response = await self._http.send(request, stream=True)
        except _FAILURES as error:
            return _failure(error)
        try:
            if response.status_code != 200:
                return await self._refused(response, exchange)
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                return await self._stream(response, exchange, client)
            return await self._whole(response, exchange)
        except _FAILURES as error:
            return _failure(error)
        finally:
            await response.aclose()

    async def _refused(self, response: httpx.Response, exchange: Exchange) -> Outcome:
        body = await _read(response, _ERROR_LIMIT)
        headers = _returned(response)
        wait = response.headers.get("retry-after", "")
        if wait:
            headers["retry-after"] = wait
        exchange.kept = Whole(response.status_code, headers, body)
        _, code, message = _error(body)
        return Outcome(Kind.REFUSED, response.status_code, code, float(wait) if wait.isdigit() else None, message)

    async def _whole(self, response: httpx.Response, exchange: Exchange) -> Outcome:
        body = await _read(response, BODY_LIMIT)
        exchange.first_content = self._clock()
        exchange.usage = _usage(body)
        exchange.kept = Whole(response.status_code, _returned(response), body)
        return Outcome(Kind.ANSWERED)

    async def _stream(self, response: httpx.Response, exchange: Exchange, client: Client) -> Outcome:
        frames = sse.Frames(FRAME_LIMIT)
        done = False
        try:
            async for chunk in response.aiter_raw():
                ready: list[bytes] = []
                for frame in frames.feed(chunk):
                    usage = sse.read_usage(frame)
                    if usage:
                        exchange.usage = usage
                        continue
                    if frame.startswith(_ERROR_EVENT):
                        if not exchange.content:
                            return _refused_in_stream(frame, exchange)
                        exchange.told = True
                    if not frame.startswith(b":") and not exchange.content:
                        exchange.content = True
                        exchange.first_content = self._clock()
                    done = done or frame == sse.DONE
                    ready.append(frame)
                if ready:
                    await self._pass_on(response, exchange, client, b"".join(ready))
            outcome = Outcome(Kind.BROKE, detail="it ended the stream without [DONE]")
        except _FAILURES as error:
            outcome = _failure(error)
        if done:
            return Outcome(Kind.ANSWERED)
        return Outcome(Kind.CUT, detail=outcome.detail) if exchange.content else outcome

    async def _pass_on(self, response: httpx.Response, exchange: Exchange, client: Client, data: bytes) -> None:
        if not exchange.begun:
            exchange.begun = True
            # A proxy in front of the gate must not hold a stream back, whatever the node said.
            await client.begin(response.status_code, {"x-accel-buffering": "no"} | _returned(response))
        await client.send(data)

    async def _get(self, url: str, headers: Mapping[str, str]) -> tuple[int, str, bytes]:
        request = self._http.build_request("GET", url, headers=headers, timeout=None)
        response = await self._http.send(request, stream=True)
        try:
            body = await _read(response, _POLL_LIMIT)
        finally:
            await response.aclose()
        return response.status_code, response.headers.get("etag", ""), body

    def _headers(self, exchange: Exchange) -> dict[str, str]:
        """What goes to the node: a short list of the client's headers, and ours."""
        headers = {name: exchange.headers[name] for name in _FORWARD if name in exchange.headers}
        headers[names.REQUEST_ID] = exchange.request_id
        if exchange.stream:
            headers[names.REPORT_USAGE] = "1"
        return headers | self._authorization()

    def _authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._token}"} if self._token else {}


def _session() -> aiohttp.ClientSession:
    # limit=0: the node's own queue says when it is full, a cap here would only hide it.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_IDLE_S)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


async def _read(response: httpx.Response, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > limit:
            raise ValueError(f"its answer is longer than {limit} bytes")
        parts.append(chunk)
    return b"".join(parts)


def _returned(response: httpx.Response) -> dict[str, str]:
    return {name: response.headers[name] for name in _RETURN if name in response.headers}


def _failure(error: Exception) -> Outcome:
    """What a failed connection means. The cause tells more than httpx's class: aiohttp's are finer."""
    cause = error.__cause__ or error
    if isinstance(cause, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return Outcome(Kind.UNREACHABLE, detail=_reason(error))
    if isinstance(cause, (asyncio.TimeoutError, httpx.TimeoutException)):
        return Outcome(Kind.STALLED, detail=_reason(error))
    return Outcome(Kind.BROKE, detail=_reason(error))


def _reason(error: Exception) -> str:
    """A failure in a few words, without the addresses that the nodes file has already."""
    cause = error.__cause__ or error
    if isinstance(cause, aiohttp.ClientConnectorError):
        number = cause.os_error.errno
        return os.strerror(number).lower() if number else "cannot connect"
    if isinstance(cause, aiohttp.ConnectionTimeoutError):
        return "no connection within the connect timeout"
    if isinstance(cause, asyncio.TimeoutError):
        return "nothing came within the timeout"
    if isinstance(cause, aiohttp.ServerDisconnectedError):
        return "it closed the connection"
    return str(cause) or type(cause).__name__


def _error(body: bytes) -> tuple[str, str, str]:
    """(type, code, message) of an error in the wire's shape; empty where the body is something else."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("type") or ""), str(error.get("code") or ""), str(error.get("message") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", "", ""


def _refused_in_stream(frame: bytes, exchange: Exchange) -> Outcome:
    """A node that fails after its first keepalive can only say so in the stream; for the plan it is a refusal."""
    body = frame[len(b"data: ") :].strip()
    kind, code, message = _error(body)
    status = _ERROR_STATUS.get(kind, 500)
    exchange.kept = Whole(status, {"content-type": "application/json"}, body)
    return Outcome(Kind.REFUSED, status, code, None, message)


def _usage(body: bytes) -> Usage | None:
    """The `usage` of a JSON answer; None where it has none."""
    try:
        usage = json.loads(body)["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Usage(int(usage["prompt_tokens"]), int(cached), int(usage.get("completion_tokens", 0)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
