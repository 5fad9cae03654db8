"""The one error shape that clients see, and the exceptions that carry it from any layer to the door.

Source: OpenAI's API, `{"error": {"message", "type", "param", "code"}}`. Every exception here has a status, a code for
programs and a message for people that names the field, the limit and the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


class ApiError(Exception):
    """An answer that is an error. `retry_after` is in seconds and goes out as a whole number in `Retry-After`."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}


class InvalidRequest(ApiError):
    """400: a field is missing, of the wrong type, out of range or not supported. `param` names it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """400: the prompt cannot fit the context, whatever else runs."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, n_ctx: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and the model's context holds {n_ctx}, "
            "of which at least one must be left for the answer",
            param="messages",
        )


class WrongKind(InvalidRequest):
    """400: the model is there, and is for something else. kinds: what it serves, as `wire.node.Model.kinds`."""

    code = "wrong_kind"

    def __init__(self, model: str, path: str, kinds: Iterable[str]) -> None:
        serves = ", ".join(kinds) or "nothing"
        super().__init__(f"the model {model!r} cannot answer {path}; it serves: {serves}", param="model")


class Unauthorized(ApiError):
    """401: no key, or one that is unknown, expired or revoked."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ApiError):
    """403: the key is good, but not for this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(ApiError):
    """404: no such path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """404: nobody here serves that model."""

    code = "model_not_found"

    def __init__(self, model: str, known: list[str]) -> None:
        have = ", ".join(sorted(known)) or "none"
        super().__init__(f"the model {model!r} does not exist; models served here: {have}", param="model")


class MethodNotAllowed(ApiError):
    """405."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(ApiError):
    """409: the state of things forbids it."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class RequestTooSlow(ApiError):
    """408: the request had not arrived in the time given for it."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class HeadTooLarge(ApiError):
    """431: the request's line and headers together."""

    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class BodyTooLarge(ApiError):
    """413."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class Overloaded(ApiError):
    """503: no room now, or not ready now. Always with `Retry-After`."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class DeadlineExceeded(ApiError):
    """504: the answer was not ready in the time given for it."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
