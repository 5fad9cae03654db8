"""The document: which paths there are, what they take, and with which statuses they answer.

Source of the form: the OpenAPI Specification 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from llmnode.wire import headers
from llmnode.wire.openapi import fields, operators
from llmnode.wire.openapi.fields import Schema
from llmnode.wire.openapi.operation import EVENTS, GATE, NODE, Operation

Side = Literal["node", "gate"]

_STATUS = {
    400: "A field is missing, malformed, out of range or not supported; `param` names it",
    401: "No key, or an unknown one",
    403: "The key may not do this",
    404: "No such model or path",
    405: "The path takes another method",
    408: "The request had not arrived in time",
    409: "It contradicts the state of things",
    413: "The body is larger than the setting `body_limit_bytes`",
    431: "The head of the request is larger than 8 KiB, or than the gate's setting `head_limit_bytes`",
    503: "Full, loading, draining, or no node is ready; `Retry-After` says when to come back",
    504: "The answer was not ready in time",
}
_ALWAYS = (400, 401, 403, 404, 405, 408, 413, 431, 503, 504)


_BOTH = NODE | GATE
_OF_MODEL = (("model", fields.text("Which model; may be left out where only one is served", minLength=1)),)
_CHATS, _TEXTS, _VECTORS = "Chats", "Completions", "Embeddings and reranking"
_TOKENS, _NATIVE, _MODELS, _STATE = "Tokens", "As llama-server", "Models", "State"

OPERATIONS: tuple[Operation, ...] = (
    Operation("post", "/v1/chat/completions", "chat", _CHATS, "Answer a chat", fields.CHAT, streams=True),
    Operation("post", "/v1/responses", "responses", _CHATS, "Answer a chat, in the words of OpenAI's Responses API",
              fields.RESPONSES, streams=True),
    Operation("post", "/v1/responses/input_tokens", "responses_tokens", _CHATS, "Count the tokens of such a request",
              fields.RESPONSES),
    Operation("post", "/v1/messages", "messages", _CHATS, "Answer a chat, in the words of Anthropic's Messages API",
              fields.ANTHROPIC_MESSAGES, streams=True),
    Operation("post", "/v1/messages/count_tokens", "messages_tokens", _CHATS, "Count the tokens of such a request",
              fields.ANTHROPIC_MESSAGES),
    Operation("post", "/v1/completions", "completion", _TEXTS, "Go on with a text", fields.COMPLETION, streams=True),
    Operation("post", "/inference", "inference", _TEXTS, "The smallest call that can work", fields.INFERENCE),
    Operation("post", "/v1/embeddings", "embeddings", _VECTORS, "Vectors of texts", fields.EMBEDDINGS),
    *(
        Operation("post", path, name, _VECTORS, "Vectors of texts, as llama-server gives them", fields.NATIVE_EMBEDDING)
        for path, name in (("/embedding", "embedding"), ("/embeddings", "native_embeddings"))
    ),
    *(
        Operation("post", path, name, _VECTORS, "Documents by how well they answer a query", fields.RERANK)
        for path, name in (
            ("/v1/rerank", "rerank"), ("/rerank", "rerank_plain"),
            ("/v1/reranking", "reranking"), ("/reranking", "reranking_plain"),
        )
    ),
    Operation("post", "/tokenize", "tokenize", _TOKENS, "A text to tokens", fields.TOKENIZE),
    Operation("post", "/detokenize", "detokenize", _TOKENS, "Tokens to a text", fields.DETOKENIZE),
    Operation("post", "/apply-template", "apply_template", _TOKENS, "Messages to a prompt", fields.APPLY_TEMPLATE),
    *(
        Operation("post", path, name, _NATIVE, "Go on with a text", fields.NATIVE_COMPLETION, streams=True)
        for path, name in (("/completion", "native_completion"), ("/completions", "native_completions"))
    ),
    Operation("post", "/infill", "infill", _NATIVE, "Fill a gap in a text", fields.INFILL, streams=True),
    Operation("get", "/props", "props", _NATIVE, "What the model is, and what /completion does by default",
              query=_OF_MODEL),
    Operation("get", "/slots", "slots", _NATIVE, "Which slots are busy", query=(
        *_OF_MODEL, ("fail_on_no_slot", {"type": "string", "enum": ["0", "1"]}))),
    Operation("get", "/v1/models", "models", _MODELS, "The models that the key may use"),
    Operation("get", "/models", "native_models", _MODELS, "The same list"),
    Operation("get", "/v1/models/{name}", "model", _MODELS, "One of them"),
    Operation("get", "/v1/key", "own_key", _STATE, "The key that is shown, and what it may do", at=GATE),
    Operation("get", "/health", "health", _STATE, "Whether the process can do its work", open=_BOTH),
    Operation("get", "/ready", "ready", _STATE, "Whether it takes work", open=_BOTH),
    Operation("get", "/metrics", "metrics", _STATE, "Prometheus's text format", open=_BOTH, answer="text/plain"),
    Operation("get", "/node", "report", _STATE, "What the node says of itself", at=NODE, also=(304,)),
    Operation("get", "/openapi.json", "openapi", _STATE, "This document", open=GATE),
    Operation("get", "/docs", "docs", _STATE, "This document as a page", open=GATE, answer="text/html"),
    *operators.OPERATIONS,
)  # fmt: skip

_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}


def document(side: Side, version: str) -> dict[str, Any]:
    """The OpenAPI document of a node or of a gate."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in served(side):
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, side)
    program = {"node": "llmnode", "gate": "llmgate"}[side]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": program,
            "version": version,
            "summary": "Language models on your own machines",
            "description": "A field that changes the answer is honoured or refused by name. One that is only advice, "
            f"or that nobody has heard of, is accepted and named in the header `{headers.IGNORED}`.",
        },
        "security": [{"bearer": []}, {"key": []}] if side == "gate" else [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": {"Error": _ERROR},
        },
    }


def served(side: Side) -> list[Operation]:
    """What one of them answers."""
    return [operation for operation in OPERATIONS if side in operation.at]


def _described(operation: Operation, side: Side) -> dict[str, Any]:
    said: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _responses(operation),
    }
    parameters = [_parameter(name, "path", {"type": "string", "minLength": 1}) for name in _in_path(operation.path)]
    parameters += [_parameter(name, "query", schema) for name, schema in operation.query]
    if parameters:
        said["parameters"] = parameters
    if operation.body is not None:
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": operation.body}}}
    if side in operation.open:
        said["security"] = []
    return said


def _responses(operation: Operation) -> dict[str, Any]:
    good: dict[str, Any] = {operation.answer: {"schema": {"type": "string"}}}
    if operation.answer == "application/json":
        good = {operation.answer: {"schema": operation.returns or {"type": ["object", "array"]}}}
    if operation.streams:
        good[EVENTS] = {"schema": {"type": "string"}}
    for media in operation.or_else:
        good[media] = {"schema": {"type": "string"}}
    answers: dict[str, Any] = {str(operation.status): {"description": "Well", "content": good}}
    for status in sorted({*_ALWAYS, *operation.also}):
        answers[str(status)] = {"description": _STATUS.get(status, "Nothing has changed")}
        if status >= 400:
            answers[str(status)]["content"] = {
                "application/json": {"schema": {"$ref": "#/components/schemas/Error"}},
            }
    return answers


def _parameter(name: str, place: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": dict(schema)}


def _in_path(path: str) -> Iterable[str]:
    return (part[1:-1] for part in path.split("/") if part.startswith("{"))
