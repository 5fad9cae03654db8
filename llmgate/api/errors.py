"""Every error leaves the gate in one shape, whoever raised it, and every answer carries its request id."""

from __future__ import annotations

import logging
from typing import Any

from sanic import HTTPResponse, Request, Sanic
from sanic.exceptions import SanicException
from sanic.response import BaseHTTPResponse, json

from llmgate.api.door import request_id
from llmgate.database import StoreError
from llmnode.wire import dialect
from llmnode.wire import headers as names
from llmnode.wire.errors import (
    ApiError,
    BodyTooLarge,
    HeadTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RequestTooSlow,
)

log = logging.getLogger("llmgate.api")

_DATABASE_RETRY_S = 5.0


def install(app: Sanic[Any, Any], body_limit_bytes: int) -> None:
    """Give the app its error handlers, the request id header and those of a key's limits (`request.ctx.rate`)."""

    async def known(request: Request, error: ApiError) -> HTTPResponse:
        return response(request, error)

    async def unstored(request: Request, error: StoreError) -> HTTPResponse:
        log.error("request %s: %s", request_id(request), error)
        message = "the gate's database cannot be used now; its log has the reason"
        return response(request, Overloaded(message, code="database_unavailable", retry_after=_DATABASE_RETRY_S))

    async def framework(request: Request, error: SanicException) -> HTTPResponse:
        return response(request, translate(error, request, body_limit_bytes))

    async def unknown(request: Request, error: Exception) -> HTTPResponse:
        log.error("request failed", exc_info=error, extra={"fields": {"request_id": request_id(request)}})
        return response(request, ApiError("the gate failed to handle this request; its log has the reason"))

    async def stamp(request: Request, answer: BaseHTTPResponse) -> HTTPResponse | None:
        for name, value in dialect.of(request.path, request.headers).named(request_id(request)).items():
            answer.headers.setdefault(name, value)
        for name, value in getattr(request.ctx, "rate", {}).items():
            answer.headers.setdefault(name, value)
        return None

    app.error_handler.add(ApiError, known)
    app.error_handler.add(SanicException, framework)
    app.error_handler.add(StoreError, unstored)
    app.error_handler.add(Exception, unknown)
    app.register_middleware(stamp, "response")


def response(request: Request, error: ApiError) -> HTTPResponse:
    """The answer for an error. `request.ctx.spent` says that the gate has used its own retries up."""
    words, id = dialect.of(request.path, request.headers), request_id(request)
    headers = error.headers() | words.named(id)
    if getattr(request.ctx, "spent", False):
        headers[names.SHOULD_RETRY] = "false"
    return json(words.error(error.body(), id), status=error.status, headers=headers)


def translate(error: SanicException, request: Request, body_limit_bytes: int) -> ApiError:
    """A framework's exception in the wire's words."""
    status = error.status_code
    if status == 404:
        return NotFound(f"there is no {request.method} {request.path} here")
    if status == 405:
        return MethodNotAllowed(f"{request.path} does not take {request.method}")
    if status == 408:
        return RequestTooSlow(str(error))
    if status == 413:
        return BodyTooLarge(f"the request body is larger than {body_limit_bytes} bytes")
    if status == 431:
        return HeadTooLarge(str(error))
    if status == 503:
        return Overloaded("the gate did not answer in time")
    if 400 <= status < 500:
        return InvalidRequest(str(error) or "the request is not valid HTTP", code="bad_request")
    return ApiError("the gate failed to handle this request")
