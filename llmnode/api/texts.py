"""What is asked of texts and ends in one JSON body: vectors, scores, tokens, a prompt.

Owns: the routes, and the order of their work: read, tokenise off the event loop, compute, write off the event loop.
Refuses to know: shapes (embeddings.py, rerank.py, tokens.py). None of it goes on at another node when this one dies: a
gate asks again from the start, which nobody notices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, json

from llmnode.api import embeddings, envelope, rerank, schema, tokens
from llmnode.api.pooling import Pooling
from llmnode.api.serving import Serving
from llmnode.engine.pooling import Pooled
from llmnode.wire.errors import InvalidRequest
from llmnode.wire.node import Usage

Handler = Callable[[Request, Serving], Any]


def blueprint(serving: Serving) -> Blueprint:
    """The routes, bound to one node."""
    routes = Blueprint("texts")
    for path, handler in HANDLERS.items():
        name = path.strip("/").replace("/", "_").replace("-", "_")
        routes.add_route(partial(_handle, serving, handler), path, methods=["POST"], name=name)
    return routes


async def _handle(serving: Serving, handler: Handler, request: Request) -> HTTPResponse:
    answer: HTTPResponse = await handler(request, serving)
    return answer


async def _embed(request: Request, serving: Serving, *, native: bool) -> HTTPResponse:
    with serving.admitted_to_pool(request.path, "embedding") as pooling:
        backend, settings = pooling.backend, serving.settings
        pools = backend.pooling != "none"
        asked = embeddings.read(
            schema.decode(request.body),
            settings.names,
            embeddings.Scale(backend.width, settings.matryoshka, backend.room.n_ctx),
            most=settings.max_texts,
            strict=settings.strict_fields,
            native=native,
            pools=pools,
        )

        def ids() -> list[tuple[int, ...]]:
            return [
                tuple(backend.tokenize(one, special=False, ends=True)) if isinstance(one, str) else one
                for one in asked.inputs
            ]

        pooled = await _compute(request, serving, pooling, ids, asked.field)

        def write() -> bytes:
            return embeddings.write(embeddings.scaled(pooled.vectors, asked, pools=pools), asked, pooled.tokens)

        said = envelope.ignored(asked.ignored) | envelope.cost(request, Usage(prompt_tokens=pooled.tokens))
        return HTTPResponse(await serving.aside(write), headers=said, content_type="application/json")


async def _rerank(request: Request, serving: Serving) -> HTTPResponse:
    with serving.admitted_to_pool(request.path, "rerank") as pooling:
        settings = serving.settings
        body = schema.decode(request.body)
        asked = rerank.read(body, settings.names, most=settings.max_texts, strict=settings.strict_fields)

        def pairs() -> list[tuple[int, ...]]:
            # It is read again with each document, so one that cannot fit beside any must not be.
            size, most = len(pooling.backend.tokenize(asked.query, special=False)), pooling.backend.room.n_ctx
            if size >= most:
                raise InvalidRequest(
                    f"query has {size} tokens and the model takes {most} at most, those of a document with them",
                    param="query",
                    code="context_length_exceeded",
                )
            return [tuple(pooling.backend.pair(asked.query, document)) for document in asked.documents]

        pooled = await _compute(request, serving, pooling, pairs, asked.field)
        scores = [float(vector[0]) for vector in pooled.vectors]
        said = envelope.ignored(asked.ignored) | envelope.cost(request, Usage(prompt_tokens=pooled.tokens))
        return json(rerank.write(scores, asked, pooled.tokens), headers=said)


async def _tokenize(request: Request, serving: Serving) -> HTTPResponse:
    with serving.admitted_to_tokenizer() as tokenizer:
        settings, body = serving.settings, schema.decode(request.body)
        asked = tokens.read_text(body, settings.names, tokenizer.info.n_vocab, strict=settings.strict_fields)
        answer = await serving.aside(partial(tokens.tokenize, asked, tokenizer))
        return json(answer, headers=envelope.ignored(asked.ignored))


async def _detokenize(request: Request, serving: Serving) -> HTTPResponse:
    with serving.admitted_to_tokenizer() as tokenizer:
        settings, body = serving.settings, schema.decode(request.body)
        asked = tokens.read_ids(body, settings.names, tokenizer.info.n_vocab, strict=settings.strict_fields)
        answer = await serving.aside(partial(tokens.detokenize, asked, tokenizer))
        return json(answer, headers=envelope.ignored(asked.ignored))


async def _apply_template(request: Request, serving: Serving) -> HTTPResponse:
    """The prompt that a chat would begin with. Everything that a chat's body may hold is read as there."""
    with serving.admitted(request.path) as served:
        asked = schema.chat(schema.decode(request.body), serving.rules(served), seed=0)
        prompt = await serving.aside(partial(served.rendered, asked, int(serving.wall())))
        return json({"prompt": prompt}, headers=envelope.ignored(asked.options.ignored))


async def _compute(
    request: Request, serving: Serving, pooling: Pooling, ids: Callable[[], list[tuple[int, ...]]], field: str
) -> Pooled:
    """Vectors of the ids, which are made off the event loop. field: where the texts stood, for errors."""
    deadline = serving.clock() + envelope.patience(request, serving.settings.request_timeout_s)
    meter = request.ctx.meter = serving.metrics.meter()
    try:
        pooled = await pooling.compute(await serving.aside(ids), deadline)
    except InvalidRequest as error:
        if error.param == "input":
            error.param = field
        raise
    meter.pooled(pooled)
    return pooled


HANDLERS: dict[str, Handler] = {
    "/v1/embeddings": partial(_embed, native=False),
    "/embeddings": partial(_embed, native=True),
    "/embedding": partial(_embed, native=True),
    "/v1/rerank": _rerank,
    "/v1/reranking": _rerank,
    "/rerank": _rerank,
    "/reranking": _rerank,
    "/tokenize": _tokenize,
    "/detokenize": _detokenize,
    "/apply-template": _apply_template,
}
"""By path; llama-server's names among them."""
