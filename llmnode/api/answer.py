"""One request for an answer, from its bytes to the last byte of its response, also when the answer began elsewhere.

bytes -> schema (a typed request, or a 400 that names the field) -> prompt ids and grammar, off the event loop -> an ask
for each choice -> engine -> one body, or a stream.
When a client leaves, Sanic cancels its handler wherever it waits, and leaving `serving.answer` frees the slot.

An answer that can be resumed (wire/resume.py) is made of what its gate has fixed, and is always a stream. Going on with
one on this node is the same request again, with the ids that are out already: both ways end in `_answer`.
"""

from __future__ import annotations

import json as plain_json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sanic import Request
from sanic.response import HTTPResponse, json

from llmnode.api import schema, stream
from llmnode.api.schema import ChatRequest, CompletionRequest, Options, Rules
from llmnode.api.serving import Served, Serving
from llmnode.api.shape import Answer, LogprobWriter, Shape
from llmnode.engine.sampler import choice_seed
from llmnode.engine.types import Ask
from llmnode.wire import headers
from llmnode.wire.errors import BodyTooLarge, Conflict, InvalidRequest, ModelNotFound
from llmnode.wire.node import Usage
from llmnode.wire.resume import VERSION, Fixed, Origin, Resume, check_choices

_MAX_HEADER_CHARACTERS = 4000
"""Many clients and proxies take a header of 8 KiB at most."""

Asked = ChatRequest | CompletionRequest
Ids = Sequence[Sequence[int]]


class _Read(Protocol):
    """Reads a body as a typed request. Raises InvalidRequest, ModelNotFound."""

    def __call__(self, body: Mapping[str, Any], rules: Rules, *, seed: int) -> Asked: ...


@dataclass(frozen=True)
class Endpoint:
    """One way to ask for an answer.

    field: where its text stands, for the errors of engine and template, which speak of `messages`.
    prefix: of response ids.        bare: whether nothing is said but `{"result": text}`.
    """

    path: str
    read: _Read
    field: str
    prefix: str = ""
    bare: bool = False


CHAT = Endpoint("/v1/chat/completions", schema.chat, "messages", "chatcmpl-")
COMPLETION = Endpoint("/v1/completions", schema.completion, "prompt", "cmpl-")
INFERENCE = Endpoint("/inference", schema.inference, "prompt", bare=True)
ENDPOINTS = {endpoint.path: endpoint for endpoint in (CHAT, COMPLETION, INFERENCE)}


@dataclass(frozen=True)
class _Order:
    """What is to be answered.

    fixed: of an answer that can be resumed, None for any other.        ids: those of each choice that are out already.
    model: for a body that names none, by the name it has where the answer began; None for this node's own.
    """

    endpoint: Endpoint
    body: bytes
    fixed: Fixed | None
    ids: Ids = ()
    model: str | None = None

    def read(self, rules: Rules, seed: int) -> Asked:
        if self.model is not None:
            rules = replace(rules, models=(self.model, *(name for name in rules.models if name != self.model)))
        return self.endpoint.read(schema.decode(self.body), rules, seed=self.fixed.seed if self.fixed else seed)


async def begin(request: Request, serving: Serving, endpoint: Endpoint) -> HTTPResponse | None:
    """Answer a request in one body or as a stream; None when the response has been sent already."""
    with serving.admitted() as served:
        return await _answer(request, serving, served, _Order(endpoint, request.body, _fixed(request)))


async def go_on(request: Request, serving: Serving) -> HTTPResponse | None:
    """Go on with an answer that another node has begun."""
    with serving.admitted() as served:
        try:
            resume = Resume.parse(request.body)
        except ValueError as error:
            raise InvalidRequest(f"the resume envelope: {error}") from None
        endpoint = ENDPOINTS.get(resume.path)
        if endpoint is None:
            raise InvalidRequest(f"path must be one of {', '.join(ENDPOINTS)}, got {resume.path!r}", param="path")
        if resume.origin.model not in serving.settings.names:
            raise ModelNotFound(resume.origin.model, list(serving.settings.names))
        _require_same(resume.origin, serving.origin(served))
        limit = serving.settings.body_limit_bytes
        if len(resume.body) > limit:
            raise BodyTooLarge(f"the original body has {len(resume.body)} bytes, the limit is {limit}")
        order = _Order(endpoint, resume.body, resume.fixed, resume.ids, resume.origin.model)
        return await _answer(request, serving, served, order)


async def _answer(request: Request, serving: Serving, served: Served, order: _Order) -> HTTPResponse | None:
    deadline = serving.clock() + _patience(request, serving)
    endpoint, fixed = order.endpoint, order.fixed
    created = fixed.created if fixed else int(serving.wall())
    asked = order.read(serving.rules(served), serving.seed())
    options = asked.options
    replayed = _replayed(order.ids, options)
    if endpoint.bare:
        asked = _as_chat(served, asked)
    shape = Shape(
        id=endpoint.prefix + (fixed.id if fixed else secrets.token_hex(12)),
        created=created,
        model=options.model,
        chat=isinstance(asked, ChatRequest),
    )
    writers = _writers(served, shape, options)

    def write(answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        return {"result": answers[0].text} if endpoint.bare else shape.whole(answers, usage, writers)

    with _param(endpoint.field):
        asks = await _asks(serving, served, asked, endpoint, created, deadline, replayed)
        if fixed is None and not options.stream:
            with serving.answer(served, asks) as (mailbox, meter):
                request.ctx.meter = meter
                answers, usage = await stream.whole(mailbox)
            return json(write(answers, usage), headers=_headers(options))
        style = stream.Style(options.include_usage, request.headers.get(headers.REPORT_USAGE) == "1")
        teller: stream.Teller = stream.Body(write)
        if options.stream:
            begun = {index for index, known in enumerate(replayed) if known}
            teller = stream.Chunks(shape, style, writers, begun)
            for writer, known in zip(writers, replayed, strict=False):
                writer.skip(known)
        marks = stream.Marks(replayed, retold=not options.stream) if fixed else None
        await _stream(request, serving, served, asks, options, stream.Telling(teller, style, marks))
    return None


async def _stream(
    request: Request, serving: Serving, served: Served, asks: Sequence[Ask], options: Options, telling: stream.Telling
) -> None:
    said = {**_headers(options), "cache-control": "no-cache", "x-accel-buffering": "no"}
    if telling.marks is not None:
        said |= {headers.RESUMABLE: str(VERSION), headers.ORIGIN: serving.origin(served).header()}
    with serving.answer(served, asks) as (mailbox, meter):
        request.ctx.meter = meter
        async with aclosing(stream.frames(mailbox, telling)) as frames:
            first = await anext(frames)  # until here a failure is still a status
            if telling.marks is not None and (stats := serving.stats()):
                said[headers.LOAD] = stats.load.header()
            response = await request.respond(headers=said, content_type="text/event-stream")
            await response.send(first)
            async for frame in frames:
                await response.send(frame)
        await response.eof()


def _require_same(theirs: Origin, ours: Origin) -> None:
    """Only the same weights and template go on with the same answer. Raises Conflict."""
    for what in ("digest", "template"):
        begun, here = getattr(theirs, what), getattr(ours, what)
        if begun and here and begun != here:
            raise Conflict(
                f"the answer was begun by a model with the {what} {begun[:80]}, and here it is {here}",
                param=what,
                code="model_differs",
            )


@contextmanager
def _param(name: str) -> Iterator[None]:
    """The engine and the template speak of `messages`; here the text came in another field."""
    try:
        yield
    except InvalidRequest as error:
        if error.param == "messages":
            error.param = name
        raise


def _fixed(request: Request) -> Fixed | None:
    """What the gate has fixed, None for a request that nobody will resume. Raises InvalidRequest."""
    text = request.headers.get(headers.RESUMABLE)
    if text is None:
        return None
    try:
        return Fixed.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"{headers.RESUMABLE}: {error}", param=headers.RESUMABLE) from None


def _patience(request: Request, serving: Serving) -> float:
    """Seconds that the answer may take. Raises InvalidRequest."""
    text = request.headers.get(headers.DEADLINE_MS)
    if text is None:
        return serving.settings.request_timeout_s
    if not (text.isascii() and text.isdecimal() and len(text) <= 16):
        raise InvalidRequest(
            f"{headers.DEADLINE_MS} must be whole milliseconds, got {text[:80]!r}", param=headers.DEADLINE_MS
        )
    return min(serving.settings.request_timeout_s, int(text) / 1000)


def _replayed(ids: Ids, options: Options) -> tuple[tuple[int, ...], ...]:
    try:
        return check_choices(ids, options.choices)
    except ValueError as error:
        raise InvalidRequest(str(error), param="ids") from None


def _as_chat(served: Served, asked: Asked) -> Asked:
    """A model that brings a chat template is asked as a user would ask it; one without goes on with the text."""
    if served.template.is_default or isinstance(asked, ChatRequest) or not isinstance(asked.prompt, str):
        return asked
    return ChatRequest(({"role": "user", "content": asked.prompt},), asked.options)


async def _asks(
    serving: Serving,
    served: Served,
    asked: Asked,
    endpoint: Endpoint,
    created: int,
    deadline: float,
    replayed: tuple[tuple[int, ...], ...],
) -> list[Ask]:
    """One ask for each choice. They differ in their seeds, in their tags and in what is out of them already: the engine
    computes what they share once."""
    options = asked.options
    prompt, grammar, prefixes = await serving.prepare(served, asked, created, endpoint.path)
    first = Ask(
        prompt=prompt,
        sampling=options.sampling,
        max_tokens=options.max_tokens,
        stop=options.stop,
        deadline=deadline,
        ignore_eos=options.ignore_eos,
        grammar=grammar,
        logprobs=options.logprobs,
        retold=not options.stream,
    )
    seed = options.sampling.seed
    return [
        replace(first, sampling=replace(options.sampling, seed=choice_seed(seed, index)), replayed=known, tag=prefix)
        for index, (known, prefix) in enumerate(zip(replayed, prefixes, strict=True))
    ]


def _writers(served: Served, shape: Shape, options: Options) -> tuple[LogprobWriter, ...]:
    if options.logprobs is None:
        return ()
    endless = options.ignore_eos and options.constraint is None  # a grammar says itself where its answer ends
    pieces, ends = served.backend.pieces, () if endless else served.backend.end_tokens
    return tuple(
        LogprobWriter(pieces, chat=shape.chat, top=options.logprobs, ends=ends) for _ in range(options.choices)
    )


def _headers(options: Options) -> dict[str, str]:
    """Names of fields come from the client: what no header may hold is escaped, and what no proxy would take is cut."""
    if not options.ignored:
        return {}
    names = ", ".join(plain_json.dumps(name)[1:-1].replace("\x7f", "\\u007f") for name in options.ignored)
    cut = len(names) > _MAX_HEADER_CHARACTERS
    return {headers.IGNORED: names[:_MAX_HEADER_CHARACTERS] + "..." if cut else names}
