"""OpenAI's endpoints: /v1/chat/completions, /v1/completions, /v1/models, and the smallest call, /inference.

bytes -> schema (a typed request, or a 400 that names the field) -> prompt ids and grammar, off the event loop -> an ask
for each choice -> engine -> stream.
When a client leaves, Sanic cancels its handler wherever it waits, and leaving `serving.answer` frees the slot.
"""

from __future__ import annotations

import json as plain_json
import secrets
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, json

from llmnode.api import schema, stream
from llmnode.api.schema import ChatRequest, CompletionRequest, Options
from llmnode.api.serving import Served, Serving
from llmnode.api.shape import Answer, LogprobWriter, Shape
from llmnode.engine.sampler import choice_seed
from llmnode.engine.types import Ask
from llmnode.wire import headers
from llmnode.wire.errors import InvalidRequest
from llmnode.wire.node import Usage

_MAX_HEADER_CHARACTERS = 4000
"""Many clients and proxies take a header of 8 KiB at most."""


def blueprint(serving: Serving) -> Blueprint:
    """The routes, bound to one node."""
    routes = Blueprint("openai")

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> HTTPResponse | None:
        with serving.admitted() as served:
            asked = schema.chat(schema.decode(request.body), serving.rules(served), seed=serving.seed())
            return await _answer(request, serving, served, asked)

    @routes.post("/v1/completions")
    async def completions(request: Request) -> HTTPResponse | None:
        with serving.admitted() as served:
            asked = schema.completion(schema.decode(request.body), serving.rules(served), seed=serving.seed())
            with _param("prompt"):
                return await _answer(request, serving, served, asked)

    @routes.post("/inference")
    async def inference(request: Request) -> HTTPResponse:
        with serving.admitted() as served:
            asked = schema.inference(schema.decode(request.body), serving.rules(served), seed=serving.seed())
            with _param("prompt"):
                (answer,), _ = await _whole(request, serving, served, _as_chat(served, asked))
            return json({"result": answer.text}, headers=_headers(asked.options))

    @routes.get("/v1/models")
    async def models(request: Request) -> HTTPResponse:
        return json(schema.models(serving.settings.names, serving.created))

    return routes


@contextmanager
def _param(name: str) -> Iterator[None]:
    """The engine and the template speak of `messages`; here the text came in another field."""
    try:
        yield
    except InvalidRequest as error:
        if error.param == "messages":
            error.param = name
        raise


def _as_chat(served: Served, asked: CompletionRequest) -> ChatRequest | CompletionRequest:
    """A model that brings a chat template is asked as a user would ask it; one without goes on with the text."""
    if served.template.is_default or not isinstance(asked.prompt, str):
        return asked
    return ChatRequest(({"role": "user", "content": asked.prompt},), asked.options)


async def _answer(
    request: Request, serving: Serving, served: Served, asked: ChatRequest | CompletionRequest
) -> HTTPResponse | None:
    """Answer in one body or as a stream; None when the response has been sent already."""
    chat, options = isinstance(asked, ChatRequest), asked.options
    shape = Shape(
        id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
        created=int(serving.wall()),
        model=options.model,
        chat=chat,
    )
    if options.stream:
        await _stream(request, serving, served, asked, shape)
        return None
    answers, usage = await _whole(request, serving, served, asked)
    return json(shape.whole(answers, usage, _writers(served, shape, options)), headers=_headers(options))


async def _whole(
    request: Request, serving: Serving, served: Served, asked: ChatRequest | CompletionRequest
) -> tuple[list[Answer], Usage]:
    asks = await _asks(serving, served, asked)
    with serving.answer(served, asks) as (mailbox, meter):
        request.ctx.meter = meter
        return await stream.whole(mailbox)


async def _stream(
    request: Request, serving: Serving, served: Served, asked: ChatRequest | CompletionRequest, shape: Shape
) -> None:
    options = asked.options
    style = stream.Style(options.include_usage, request.headers.get(headers.REPORT_USAGE) == "1")
    asks = await _asks(serving, served, asked)
    with serving.answer(served, asks) as (mailbox, meter):
        request.ctx.meter = meter
        async with aclosing(stream.frames(mailbox, shape, style, _writers(served, shape, options))) as frames:
            first = await anext(frames)  # until here a failure is still a status
            response = await request.respond(
                headers={**_headers(options), "cache-control": "no-cache", "x-accel-buffering": "no"},
                content_type="text/event-stream",
            )
            await response.send(first)
            async for frame in frames:
                await response.send(frame)
        await response.eof()


async def _asks(serving: Serving, served: Served, asked: ChatRequest | CompletionRequest) -> list[Ask]:
    """One ask for each choice. They differ in their seeds only: the engine computes what they share once."""
    options = asked.options
    prompt, grammar = await serving.prepare(served, asked)
    first = Ask(
        prompt=prompt,
        sampling=options.sampling,
        max_tokens=options.max_tokens,
        stop=options.stop,
        deadline=serving.clock() + serving.settings.request_timeout_s,
        ignore_eos=options.ignore_eos,
        grammar=grammar,
        logprobs=options.logprobs,
    )
    seed = options.sampling.seed
    return [
        replace(first, sampling=replace(options.sampling, seed=choice_seed(seed, index)))
        for index in range(options.choices)
    ]


def _writers(served: Served, shape: Shape, options: Options) -> tuple[LogprobWriter, ...]:
    if options.logprobs is None:
        return ()
    return tuple(
        LogprobWriter(served.backend.pieces, chat=shape.chat, top=options.logprobs) for _ in range(options.choices)
    )


def _headers(options: Options) -> dict[str, str]:
    """Names of fields come from the client: what no header may hold is escaped, and what no proxy would take is cut."""
    if not options.ignored:
        return {}
    names = ", ".join(plain_json.dumps(name)[1:-1].replace("\x7f", "\\u007f") for name in options.ignored)
    cut = len(names) > _MAX_HEADER_CHARACTERS
    return {headers.IGNORED: names[:_MAX_HEADER_CHARACTERS] + "..." if cut else names}
