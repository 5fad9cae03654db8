"""One exception tree, one error shape: whatever goes wrong at the door leaves as `{"error": {...}}`, in the dialect of
its endpoint.

A client never sees a traceback; what it sees as 500 is in the log with the request's id.
"""

from __future__ import annotations

import logging
from asyncio import CancelledError

from sanic import Request
from sanic.exceptions import SanicException
from sanic.handlers import ErrorHandler
from sanic.response import HTTPResponse, json

from llmnode.wire import dialect
from llmnode.wire.errors import (
    ApiError,
    BodyTooLarge,
    DeadlineExceeded,
    HeadTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTooSlow,
)

log = logging.getLogger("llmnode.api")

CLIENT_LEFT = 499
"""The status in logs and metrics of a request whose client went away, as nginx writes it; nobody receives it."""


class Errors(ErrorHandler):
    """Turns every exception into a response in the wire's shape. `body_limit_bytes` is named where it was exceeded."""

    def __init__(self, body_limit_bytes: int) -> None:
        super().__init__()
        self._body_limit_bytes = body_limit_bytes

    def default(self, request: Request, exception: BaseException) -> HTTPResponse:
        if isinstance(exception, CancelledError):
            return HTTPResponse(status=CLIENT_LEFT)
        error = self._translate(request, exception)
        request_id = getattr(request.ctx, "request_id", "")
        body = dialect.of(request.path, request.headers).error(error.body(), request_id)
        return json(body, status=error.status, headers=error.headers())

    def _translate(self, request: Request, exception: BaseException) -> ApiError:
        if isinstance(exception, ApiError):
            return exception
        if not isinstance(exception, SanicException):
            name = getattr(request.ctx, "request_id", "-")
            log.error("request failed", exc_info=exception, extra={"fields": {"request_id": name}})
            return ApiError(f"internal error; the log has the details under request id {name}")
        status = exception.status_code or 500
        if status == 404:
            return NotFound(f"there is no {request.path}")
        if status == 405:
            allowed = ", ".join(sorted(getattr(exception, "allowed_methods", None) or ()))
            hint = f"; allowed: {allowed}" if allowed else ""
            return MethodNotAllowed(f"{request.path} does not take {request.method}{hint}")
        if status == 408:
            return RequestTooSlow(str(exception))
        if status == 413:
            return BodyTooLarge(f"the body is over its limit of {self._body_limit_bytes} bytes")
        if status == 431:
            return HeadTooLarge(str(exception))
        if status == 503:
            # Sanic says so of its own RESPONSE_TIMEOUT, and of nothing else.
            return DeadlineExceeded("the answer was not ready in the time given for it")
        if 400 <= status < 500:
            return InvalidRequest(str(exception) or "the request is malformed", code="bad_request")
        return ApiError("internal error")
