"""One request for an answer, from its bytes to the last byte of its response, also when the answer began elsewhere.

bytes -> schema (a typed request, or a 400 that names the field) -> prompt ids and grammar, off the event loop -> an ask
for each choice -> engine -> one body, or a stream.
When a client leaves, Sanic cancels its handler wherever it waits, and leaving `serving.answer` frees the slot.

An answer that can be resumed (wire/resume.py) is made of what its gate has fixed, and is always a stream. Going on with
one on this node is the same request again, with the ids that are out already: both ways end in `_answer`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from sanic import Request
from sanic.response import HTTPResponse, json

from llmnode.api import envelope, native, schema, stream, translation
from llmnode.api.anthropic import request as anthropic
from llmnode.api.anthropic.narrator import Messages
from llmnode.api.chunks import Inference, OpenAI
from llmnode.api.logprobs import LogprobWriter
from llmnode.api.names import Names
from llmnode.api.narrator import Body, Factory, Narrator, Occasion, Parsers, Teller, Told, read
from llmnode.api.native_answer import NativeNarrator
from llmnode.api.preparing import Prepared, Served
from llmnode.api.responses import request as responses
from llmnode.api.responses.narrator import Responses
from llmnode.api.rules import Rules
from llmnode.api.schema import ChatRequest, CompletionRequest, Options
from llmnode.api.serving import Serving
from llmnode.chat.pieces import Plain
from llmnode.engine.sampler import choice_seed
from llmnode.engine.types import Ask
from llmnode.wire import dialect, headers
from llmnode.wire.errors import BodyTooLarge, Conflict, ContextLengthExceeded, InvalidRequest, ModelNotFound
from llmnode.wire.resume import VERSION, Fixed, Origin, Resume, check_choices

Asked = ChatRequest | CompletionRequest
Ids = Sequence[Sequence[int]]


class _Read(Protocol):
    """Reads a body as a typed request. Raises InvalidRequest, ModelNotFound."""

    def __call__(self, body: Mapping[str, Any], rules: Rules, *, seed: int) -> Asked: ...


@dataclass(frozen=True)
class Endpoint:
    """One way to ask for an answer, and to tell it.

    field: where its text stands, for the errors of engine and template, which speak of `messages`.
    prefix: of response ids.        as_chat: a model that brings a chat template is asked as a user would ask it.
    """

    path: str
    read: _Read
    narrator: Factory
    field: str
    prefix: str = ""
    as_chat: bool = False


CHAT = Endpoint("/v1/chat/completions", schema.chat, OpenAI.of, "messages", "chatcmpl-")
COMPLETION = Endpoint("/v1/completions", schema.completion, OpenAI.of, "prompt", "cmpl-")
INFERENCE = Endpoint("/inference", schema.inference, Inference.of, "prompt", as_chat=True)
NATIVE = Endpoint("/completion", native.completion, NativeNarrator.of, "prompt")
NATIVE_TOO = replace(NATIVE, path="/completions")
INFILL = Endpoint("/infill", native.infill, NativeNarrator.of, "input_prefix")
MESSAGES = Endpoint("/v1/messages", partial(translation.read, anthropic.translate), Messages.of, "messages", "msg_")
RESPONSES = Endpoint("/v1/responses", partial(translation.read, responses.translate), Responses.of, "input", "resp_")
ENDPOINTS = {one.path: one for one in (CHAT, COMPLETION, INFERENCE, NATIVE, NATIVE_TOO, INFILL, MESSAGES, RESPONSES)}


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
    with serving.admitted(endpoint.path) as served:
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
    deadline = serving.clock() + envelope.patience(request, serving.settings.request_timeout_s)
    endpoint, fixed = order.endpoint, order.fixed
    created = fixed.created if fixed else int(serving.wall())
    asked = order.read(serving.rules(served), serving.seed())
    if endpoint.as_chat:
        asked = _as_chat(served, asked)
    options = asked.options
    each = _each(asked)
    replayed = _replayed(order.ids, options.choices * len(each))
    response_id = endpoint.prefix + (fixed.id if fixed else secrets.token_hex(12))
    if journey := request.ctx.journey:
        journey.path, journey.model, journey.response = endpoint.path, options.model, response_id
        journey.committed = sum(map(len, order.ids))
    with _names(endpoint, asked).speaking():
        prepared, asks = await _asks(serving, served, each, endpoint, created, deadline, replayed)
        if not all(one.whole for one in prepared):
            if order.ids:
                raise ContextLengthExceeded(len(asks[0].prompt), served.backend.room.n_ctx)
            fixed = None  # another node may have to leave out more of the prompt, or less
        make = prepared[0].parser  # those of several prompts, which no chat has, are alike
        parsers = [make() for _ in asks] if make else None
        writers = _writers(served, asked, len(asks))
        narrator = endpoint.narrator(
            Occasion(
                id=response_id,
                created=created,
                model=options.model,
                request=asked,
                prompt_tokens=len(asks[0].prompt),
                parsed=parsers is not None,
                writers=writers,
                asks=asks,
                backend=served.backend,
            )
        )

        def reply(index: int, text: str) -> str | Mapping[str, Any]:
            return narrator.reply(index, read(text, make())) if make else text

        if fixed is None and not options.stream:
            with serving.answer(served, asks, reply, len(each)) as (mailbox, meter):
                request.ctx.meter = meter
                answers, usage = await stream.whole(mailbox, parsers)
            said = envelope.ignored(options.ignored) | envelope.cost(request, usage)
            return json(narrator.whole(answers, usage), headers=said)
        teller, retold = _teller(narrator, parsers, options, replayed)
        if not retold:
            for writer, known in zip(writers, replayed, strict=False):
                writer.skip(known)
        asks = [replace(ask, retold=retold) for ask in asks]
        style = stream.Style(
            report_usage=request.headers.get(headers.REPORT_USAGE) == "1", dialect=dialect.of(endpoint.path)
        )
        marks = stream.Marks(replayed, retold=retold) if fixed else None
        telling = stream.Telling(teller, style, marks)
        await _stream(request, serving, served, asks, len(each), options.ignored, telling, reply)
    return None


def _teller(narrator: Narrator, parsers: Parsers | None, options: Options, replayed: Ids) -> tuple[Teller, bool]:
    """Who tells an answer as a stream, and whether ids that are out already have to be told again for that."""
    if not options.stream:
        return Body(narrator, parsers), True
    plain = None if parsers else narrator.plain([len(known) for known in replayed])
    if plain is not None:
        return plain, False
    return Told(narrator, parsers or [Plain() for _ in replayed], [len(known) for known in replayed]), True


async def _stream(
    request: Request,
    serving: Serving,
    served: Served,
    asks: Sequence[Ask],
    prompts: int,
    ignored: Sequence[str],
    telling: stream.Telling,
    reply: Callable[[int, str], str | Mapping[str, Any]],
) -> None:
    said = {**envelope.ignored(ignored), "cache-control": "no-cache", "x-accel-buffering": "no"}
    if telling.marks is not None:
        said |= {headers.RESUMABLE: str(VERSION), headers.ORIGIN: serving.origin(served).header()}
    with serving.answer(served, asks, reply, prompts) as (mailbox, meter):
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


def _names(endpoint: Endpoint, asked: Asked) -> Names:
    """The engine and the template speak of chat's fields; here the text may have come in another one."""
    names = asked.names if isinstance(asked, ChatRequest) else None
    return names or Names(((r"messages$", endpoint.field),))


async def count(request: Request, serving: Serving, endpoint: Endpoint, **more: str) -> HTTPResponse:
    """How many tokens the prompt of a request has, beside what `more` the body holds."""
    with serving.admitted() as served:
        asked = endpoint.read(schema.decode(request.body), serving.rules(served), seed=0)
        with _names(endpoint, asked).speaking():
            tokens = await serving.count(served, asked)
        return json({**more, "input_tokens": tokens}, headers=envelope.ignored(asked.options.ignored))


def _fixed(request: Request) -> Fixed | None:
    """What the gate has fixed, None for a request that nobody will resume. Raises InvalidRequest."""
    text = request.headers.get(headers.RESUMABLE)
    if text is None:
        return None
    try:
        return Fixed.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"{headers.RESUMABLE}: {error}", param=headers.RESUMABLE) from None


def _replayed(ids: Ids, choices: int) -> tuple[tuple[int, ...], ...]:
    try:
        return check_choices(ids, choices)
    except ValueError as error:
        raise InvalidRequest(str(error), param="ids") from None


def _as_chat(served: Served, asked: Asked) -> Asked:
    """A model that brings a chat template is asked as a user would ask it; one without goes on with the text."""
    if served.renderer.is_default or isinstance(asked, ChatRequest) or not isinstance(asked.prompt, str):
        return asked
    return ChatRequest(({"role": "user", "content": asked.prompt},), asked.options)


def _each(asked: Asked) -> tuple[Asked, ...]:
    """A request with several prompts as requests of one prompt each."""
    if isinstance(asked, ChatRequest) or not asked.more:
        return (asked,)
    options = asked.options
    return tuple(
        replace(asked, prompt=prompt, more=(), options=replace(options, body={**options.body, "prompt": said}))
        for prompt, said in zip((asked.prompt, *asked.more), options.body["prompt"], strict=True)
    )


async def _asks(
    serving: Serving,
    served: Served,
    each: Sequence[Asked],
    endpoint: Endpoint,
    created: int,
    deadline: float,
    replayed: Sequence[tuple[int, ...]],
) -> tuple[list[Prepared], list[Ask]]:
    """One ask for each choice, of each prompt in turn, and what those of a prompt have in common.

    The asks of a prompt differ in their seeds, in their tags and in what is out of them already: the engine computes
    what they share once."""
    asks: list[Ask] = []
    all_prepared: list[Prepared] = []
    for asked in each:
        options = asked.options
        prepared, prefixes = await serving.prepare(served, asked, created, endpoint.path)
        all_prepared.append(prepared)
        first = Ask(
            prompt=prepared.prompt,
            sampling=options.sampling,
            max_tokens=options.max_tokens,
            stop=options.stop,
            deadline=deadline,
            ignore_eos=options.ignore_eos,
            grammar=prepared.grammar,
            logprobs=options.logprobs,
            forcing=prepared.forcing,
            pieces=prepared.pieces,
        )
        for index, prefix in enumerate(prefixes):
            sampling = replace(options.sampling, seed=choice_seed(options.sampling.seed, index))
            asks.append(replace(first, sampling=sampling, replayed=replayed[len(asks)], tag=prefix))
    return all_prepared, asks


def _writers(served: Served, asked: Asked, choices: int) -> tuple[LogprobWriter, ...]:
    options = asked.options
    if options.logprobs is None:
        return ()
    endless = options.ignore_eos and options.constraint is None  # a grammar says itself where its answer ends
    pieces, ends = served.backend.pieces, () if endless else served.backend.end_tokens
    return tuple(
        LogprobWriter(pieces, chat=isinstance(asked, ChatRequest), top=options.logprobs, ends=ends)
        for _ in range(choices)
    )
