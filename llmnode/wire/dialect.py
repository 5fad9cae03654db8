"""What clients of an endpoint hear besides an answer: errors, signs of life, the end of a stream.

Node and gate speak to the same clients, and each of them may be the one that has to say it. Owns these words, by the
path of the request. Refuses to know: answers (their narrators write those), and what went wrong.

Between node and gate an error inside a stream is always OpenAI's event, whatever the endpoint: the gate may still ask
another node, and when it gives up it says so in the endpoint's words. A refusal before the stream has the endpoint's
own shape at once; all shapes hold `error` with `type`, `code`, `message` and `param`, so the gate can read any.
Sources: the API references of OpenAI and Anthropic.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from llmnode.wire import headers, sse
from llmnode.wire.cards import ANTHROPIC_VERSION

_ANTHROPIC_CODES = {
    "not_found": "not_found_error",
    "model_not_found": "not_found_error",
    "body_too_large": "request_too_large",
}
_ANTHROPIC_TYPES = {"server_error": "api_error"}


@dataclass(frozen=True)
class Dialect:
    """OpenAI's words, for chats, completions and all that has no dialect of its own.

    keepalive: sent while there is nothing to say.      end: ends a stream that is whole.
    Errors come as `ApiError.body()` has them, or in the endpoint's own shape already.
    """

    keepalive: bytes = sse.KEEPALIVE
    end: bytes = sse.DONE

    def error(self, body: Mapping[str, Any], request_id: str = "") -> dict[str, Any]:
        """The body of an answer that is an error."""
        return dict(body)

    def named(self, request_id: str) -> dict[str, str]:
        """The headers of an answer that name its request."""
        return {headers.REQUEST_ID: request_id}

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        """A failure after the first byte, when the status is spent: the last event of a stream."""
        return sse.event(self.error(body))


class _Anthropic(Dialect):
    def error(self, body: Mapping[str, Any], request_id: str = "") -> dict[str, Any]:
        error = body["error"]
        kind = _ANTHROPIC_CODES.get(error.get("code")) or _ANTHROPIC_TYPES.get(error["type"], error["type"])
        request = request_id or body.get("request_id")
        return {"type": "error", "error": {**error, "type": kind}} | ({"request_id": request} if request else {})

    def named(self, request_id: str) -> dict[str, str]:
        return {**super().named(request_id), "request-id": request_id}

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        return sse.event(self.error(body), "error")


class _Responses(Dialect):
    def error_event(self, body: Mapping[str, Any]) -> bytes:
        """`error` is there too: it is what OpenAI's SDK raises an exception for."""
        error = body["error"]
        said = {"type": "error", **{name: error.get(name) for name in ("code", "message", "param")}, "error": error}
        return sse.event(said, "error")


OPENAI = Dialect()
ANTHROPIC = _Anthropic(keepalive=sse.event({"type": "ping"}, "ping"), end=sse.END)
RESPONSES = _Responses(end=sse.END)
LLAMA = Dialect(end=sse.END)


def of(path: str, sent: Container[str] = ()) -> Dialect:
    """The words for a request to this path. sent: names of its headers, which say whose client lists the models."""
    if path in ("/completion", "/completions", "/infill"):
        return LLAMA
    if path == "/v1/responses":
        return RESPONSES
    anthropic = _is_below(path, "/v1/messages") or (_is_below(path, "/v1/models") and ANTHROPIC_VERSION in sent)
    return ANTHROPIC if anthropic else OPENAI


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")
