"""What the handlers share: the state of the node's life, the model once it is there, and the answers under way.

Owns the state machine starting -> loading -> ready -> draining, and failed; every transition is a method here. Lives on
the event loop's thread. Knows nothing of Sanic and does not load models: the composition root does both.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from llmnode.api.pooling import Pooling
from llmnode.api.preparing import Prepared, Served
from llmnode.api.residency import Prefix, Residency, prefix
from llmnode.api.rules import Rules
from llmnode.api.schema import ChatRequest, CompletionRequest
from llmnode.api.stream import Mailbox
from llmnode.api.tools import SchemaLimits
from llmnode.chat.format import Format
from llmnode.chat.renderer import Renderer
from llmnode.engine.backend import Tokenizer
from llmnode.engine.types import Ask, Done, Finish, Stats
from llmnode.metrics import HostProbe, Meter, Metrics
from llmnode.service.traces import Traces
from llmnode.settings import Settings
from llmnode.wire.chain import Chain, salt
from llmnode.wire.errors import Overloaded, WrongKind
from llmnode.wire.node import Cache, Device, Load, Model, Report, State
from llmnode.wire.resume import VERSION as RESUME_VERSION
from llmnode.wire.resume import Origin

T = TypeVar("T")

_KINDS = {"generate": ("chat", "completion"), "embed": ("embedding",), "rerank": ("rerank",)}
"""What a model will serve that is not loaded yet."""


class Serving:
    """One node's life. `boot` is random for each process; `wall` gives seconds since the epoch, `dice` a seed."""

    def __init__(
        self,
        settings: Settings,
        *,
        release: str,
        config: str,
        executor: Executor,
        traces: Traces | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        dice: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self.settings = settings
        self.traces = traces
        self.clock = clock
        self.wall = wall
        self.dice = dice
        self.boot = secrets.token_hex(8)
        self.release = release
        self.config = config
        self.created = int(wall())
        self.state = State.STARTING
        self.why = ""
        self.progress = 0.0
        self._purpose = "generate" if settings.kind == "auto" else settings.kind
        self.served: Served | None = None
        self.pooling: Pooling | None = None
        self.certificate_end: float | None = None
        self.probe = HostProbe(clock=clock)
        self.residency = Residency()
        self.metrics = Metrics(
            self.stats,
            self.probe,
            clock,
            reported=lambda: self.residency.reported,
            gpus=lambda: len(self._devices),
            certificate_end=lambda: self.certificate_end,
            state=lambda: self.state,
            spans_lost=lambda: traces.lost if traces else 0,
        )
        self._executor = executor
        self._busy = 0
        self._mailboxes: set[Mailbox] = set()

    # Transitions

    def load(self) -> None:
        self.state, self.why = State.LOADING, "loading the model"

    def meant(self, purpose: str) -> None:
        """What the model that is being loaded will do: one of `settings.KINDS`, but auto."""
        self._purpose = purpose

    def ready(self, loaded: Served | Pooling) -> None:
        """The model is there. A drain that began meanwhile stays a drain."""
        if isinstance(loaded, Served):
            self.served = loaded
        else:
            self.pooling = loaded
        self.progress = 1.0
        if self.state is State.LOADING:
            self.state, self.why = State.READY, ""

    def drain(self) -> None:
        self.state, self.why = State.DRAINING, "the node is stopping"

    def fail(self, why: str) -> None:
        """Nothing more will be answered: what is under way ends with an error."""
        self.state, self.why = State.FAILED, why
        self.cut(why)

    def cut(self, why: str) -> None:
        """End every answer under way: one that can be resumed is handed over, any other gets an error event."""
        error = Overloaded(why, code="node_stopping")
        for mailbox in tuple(self._mailboxes):
            mailbox.fail(error)
        if self.pooling is not None:
            self.pooling.cut(error)

    # What is asked of it

    @property
    def busy(self) -> int:
        """Requests that were let in and are not finished."""
        return self._busy

    @contextmanager
    def admitted(self, path: str = "") -> Iterator[Served]:
        """The model, for the time of one request to `path`. Raises Overloaded with an honest `Retry-After` when not
        ready, WrongKind when it is one that embeds or ranks."""
        with self._inside():
            if self.served is None:
                raise self._wrong_kind(path)
            yield self.served

    @contextmanager
    def admitted_to_pool(self, path: str, kind: str) -> Iterator[Pooling]:
        """The same of a model that serves this kind of vectors."""
        with self._inside():
            if self.pooling is None or kind not in self.pooling.kinds:
                raise self._wrong_kind(path)
            yield self.pooling

    @contextmanager
    def admitted_to_tokenizer(self) -> Iterator[Tokenizer]:
        """The same of what every model has."""
        with self._inside():
            yield self.tokenizer()

    def tokenizer(self) -> Tokenizer:
        """Of the model that is loaded."""
        loaded = self.served or self.pooling
        assert loaded is not None, "a ready node has a model"
        return loaded.backend

    @contextmanager
    def _inside(self) -> Iterator[None]:
        if self.state is not State.READY:
            raise self.not_ready()
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    def _wrong_kind(self, path: str) -> WrongKind:
        return WrongKind(self.settings.served_id, path, self.model().kinds)

    async def aside(self, work: Callable[[], T]) -> T:
        """What `work` comes to, computed off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def not_ready(self) -> Overloaded:
        return Overloaded(
            f"the node is {self.state.value}: {self.why or 'not ready yet'}",
            code=self.state.value,
            retry_after=5.0 if self.state is State.LOADING else 2.0,
        )

    @contextmanager
    def answer(
        self,
        served: Served,
        asks: Sequence[Ask],
        reply: Callable[[int, str], str | Mapping[str, Any]],
        prompts: int = 1,
    ) -> Iterator[tuple[Mailbox, Meter]]:
        """Hand the choices of a request to the engine, as many of each of its prompts; leaving the block, however that
        happens, gives their slots back at once. reply: the text of a choice as the next turn will send it back."""
        meter = self.metrics.meter(len(asks), prompts)
        mailbox = Mailbox(meter.observe, len(asks), prompts)
        tickets: list[int] = []
        self._mailboxes.add(mailbox)
        try:
            for choice, ask in enumerate(asks):
                tickets.append(served.engine.submit(ask, partial(mailbox.put, choice)))
            yield mailbox, meter
        finally:
            self._mailboxes.discard(mailbox)
            for ticket in tickets:
                served.engine.cancel(ticket)
            for choice, ask in enumerate(asks):
                self._ended(served, ask, mailbox.texts[choice], mailbox.ends.get(choice), partial(reply, choice))

    async def prepare(
        self, served: Served, request: ChatRequest | CompletionRequest, created: int, path: str
    ) -> tuple[Prepared, list[Prefix]]:
        """What a request to `path` comes to, and what each choice is to the gate; computed off the event loop."""

        def work() -> tuple[Prepared, Prefix]:
            prepared = served.prepare(request, created)
            return prepared, prefix(request, len(prepared.prompt), salt(model.id, model.template, path))

        model = self.model()
        prepared, known = await self.aside(work)
        return prepared, self.residency.asked(known, request.options.choices)

    async def count(self, served: Served, request: ChatRequest | CompletionRequest) -> int:
        """How many tokens the prompt of a request has; computed off the event loop."""
        work = partial(served.prepare, request, int(self.wall()))
        prepared = await asyncio.get_running_loop().run_in_executor(self._executor, work)
        return len(prepared.prompt)

    def _ended(
        self,
        served: Served,
        ask: Ask,
        texts: Sequence[str],
        end: Done | None,
        reply: Callable[[str], str | Mapping[str, Any]],
    ) -> None:
        """A choice is over. If it was answered, what it left behind is its prompt and its reply."""
        tag = ask.tag
        assert isinstance(tag, Prefix)
        answered, tag.answered = tag.answered, None
        if answered is None or end is None or end.finish is Finish.CANCELLED:
            return

        def work() -> Chain:
            return answered(reply(served.said_elsewhere(ask) + "".join(texts)))

        def known(found: asyncio.Future[Chain]) -> None:
            self.residency.answered(tag, found.result(), tokens)

        tokens = end.usage.prompt_tokens + end.usage.completion_tokens
        asyncio.get_running_loop().run_in_executor(self._executor, work).add_done_callback(known)

    def rules(self, served: Served) -> Rules:
        settings = self.settings
        format = served.renderer.format
        return Rules(
            models=settings.names,
            n_vocab=served.backend.info.n_vocab,
            max_tokens=settings.max_tokens,
            strict=settings.strict_fields,
            # More could not even wait here, on a node that does nothing else.
            max_choices=min(settings.max_choices, settings.slots + settings.queue_limit),
            max_answers=settings.slots + settings.queue_limit,
            max_stops=settings.max_stops,
            max_stop_characters=settings.max_stop_characters,
            max_logit_bias=settings.max_logit_bias,
            max_messages=settings.max_messages,
            max_tools=settings.max_tools,
            max_grammar_bytes=settings.max_grammar_bytes,
            schema=SchemaLimits(settings.max_schema_bytes, settings.max_schema_depth),
            switches=format.switches,
            thinks=format.thinking is not None,
            request_templates=settings.request_templates,
        )

    def seed(self) -> int:
        """A seed for a request that brought none."""
        return self.dice(2**32 - 1)

    # What it says of itself

    def stats(self) -> Stats | None:
        """The engine's snapshot, with what only the door knows of its load."""
        if self.pooling is not None:
            return self.pooling.stats()
        if self.served is None:
            return None
        stats = self.served.engine.stats()
        return replace(stats, load=replace(stats.load, bytes_per_token=self.residency.bytes_per_token))

    def trouble(self) -> str:
        """Why the node can no longer do its work, "" while it can: /health and systemd's watchdog ask this."""
        if self.state is State.FAILED:
            return self.why
        stats = self.stats()
        return stats.stuck(self.clock()) if stats else ""

    def report(self) -> Report:
        """The body of /node."""
        stats, served = self.stats(), self.served
        return Report(
            boot=self.boot,
            release=self.release,
            config=self.config,
            state=self.state,
            why=self.why or self.trouble(),
            progress=round(self.progress, 2),
            models=(self.model(),),
            load=stats.load if stats else Load(slots=self.settings.slots),
            devices=self._devices,
            host=self.probe.read(),
            cache=self.residency.report(stats.held, parts=served.engine.shares_parts) if stats and served else Cache(),
            resume=RESUME_VERSION,
        )

    def model(self) -> Model:
        """The model as the report has it."""
        loaded = self.served or self.pooling
        named = Model(
            id=self.settings.served_id,
            aliases=self.settings.aliases,
            state="ready" if self.state is State.DRAINING else self.state.value,
            n_ctx=self.settings.n_ctx,
            kinds=_KINDS[self._purpose],
        )
        if loaded is None:
            return named
        info = loaded.backend.info
        return replace(
            named,
            n_ctx=loaded.backend.room.n_ctx,
            kinds=loaded.kinds,
            capabilities=_capabilities(loaded.renderer.format) if isinstance(loaded, Served) else (),
            template=_described(loaded.renderer) if isinstance(loaded, Served) else "",
            digest=info.digest,
            n_vocab=info.n_vocab,
            n_ctx_train=info.n_ctx_train,
            n_embd=info.n_embd,
            n_params=info.n_params,
            size_bytes=info.size_bytes,
            vocab_type=info.vocab_type,
        )

    def cards(self) -> list[dict[str, Any]]:
        """The entries of /v1/models: each name that works, aliases too."""
        model = self.model()
        return [model.card(name, self.created) for name in self.settings.names]

    def origin(self, served: Served) -> Origin:
        """What its answers come from, for whoever goes on with them."""
        model = self.model()
        return Origin(model.id, model.digest, model.template)

    @property
    def _devices(self) -> tuple[Device, ...]:
        loaded = self.served or self.pooling
        return loaded.backend.devices if loaded else ()

    def status_line(self) -> str:
        """One line for systemd and the log: `ready: 2 running, 0 waiting, 31.4 tokens/s`."""
        if self.state is State.LOADING:
            return f"loading: {self.progress:.0%}"
        stats = self.stats()
        if stats is None:
            return f"{self.state.value}: {self.why}" if self.why else self.state.value
        load = stats.load
        rate = load.decode_tps if load.running else 0.0
        return f"{self.state.value}: {load.running} running, {load.waiting} waiting, {rate:.1f} tokens/s"


def _capabilities(format: Format) -> tuple[str, ...]:
    known = {"tools": format.calls is not None, "reasoning": format.thinking is not None, "json_schema": True}
    return tuple(name for name, able in known.items() if able)


def _described(renderer: Renderer) -> str:
    return f"{'default' if renderer.is_default else 'model'}:{renderer.fingerprint}"
