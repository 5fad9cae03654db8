"""OpenAI's endpoints: /v1/chat/completions, /v1/completions, /v1/models, and the smallest call, /inference.

bytes -> schema (a typed request, or a 400 that names the field) -> prompt ids, off the event loop -> engine -> stream.
When a client leaves, Sanic cancels its handler wherever it waits, and leaving `serving.answer` frees the slot.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import aclosing, contextmanager

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, json

from llmnode.api import schema, stream
from llmnode.api.schema import ChatRequest, CompletionRequest, Options, Shape
from llmnode.api.serving import Served, Serving
from llmnode.engine.types import Ask, Done
from llmnode.wire import headers
from llmnode.wire.errors import InvalidRequest


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
                text, _ = await _whole(request, serving, served, _as_chat(served, asked))
            return json({"result": text}, headers=_headers(asked.options))

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
    text, done = await _whole(request, serving, served, asked)
    return json(shape.whole(text, done.finish, done.usage), headers=_headers(options))


async def _whole(
    request: Request, serving: Serving, served: Served, asked: ChatRequest | CompletionRequest
) -> tuple[str, Done]:
    ask = _ask(serving, asked.options, await serving.prompt(served, asked))
    with serving.answer(served, ask) as (mailbox, meter):
        request.ctx.meter = meter
        return await stream.whole(mailbox)


async def _stream(
    request: Request, serving: Serving, served: Served, asked: ChatRequest | CompletionRequest, shape: Shape
) -> None:
    options = asked.options
    style = stream.Style(options.include_usage, request.headers.get(headers.REPORT_USAGE) == "1")
    ask = _ask(serving, options, await serving.prompt(served, asked))
    with serving.answer(served, ask) as (mailbox, meter):
        request.ctx.meter = meter
        async with aclosing(stream.frames(mailbox, shape, style)) as frames:
            first = await anext(frames)  # until here a failure is still a status
            response = await request.respond(
                headers={**_headers(options), "cache-control": "no-cache", "x-accel-buffering": "no"},
                content_type="text/event-stream",
            )
            await response.send(first)
            async for frame in frames:
                await response.send(frame)
        await response.eof()


def _ask(serving: Serving, options: Options, prompt: tuple[int, ...]) -> Ask:
    return Ask(
        prompt=prompt,
        sampling=options.sampling,
        max_tokens=options.max_tokens,
        stop=options.stop,
        deadline=serving.clock() + serving.settings.request_timeout_s,
        ignore_eos=options.ignore_eos,
    )


def _headers(options: Options) -> dict[str, str]:
    return {headers.IGNORED: ", ".join(options.ignored)} if options.ignored else {}
