"""What the handlers share: the state of the node's life, the model once it is there, and the answers under way.

Owns the state machine starting -> loading -> ready -> draining, and failed; every transition is a method here. Lives on
the event loop's thread. Knows nothing of Sanic and does not load models: the composition root does both.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property, partial

from llmnode.api.residency import Prefix, Residency, prefix
from llmnode.api.schema import MAX_CHOICES, ChatRequest, CompletionRequest, Constraint, Rules
from llmnode.api.stream import Mailbox
from llmnode.chat.template import ChatTemplate
from llmnode.engine.backend import Backend
from llmnode.engine.grammar import Grammar, Grammars
from llmnode.engine.loop import Engine
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Done, Finish, Stats
from llmnode.metrics import HostProbe, Meter, Metrics
from llmnode.settings import Settings
from llmnode.wire.chain import Chain, salt
from llmnode.wire.errors import Overloaded
from llmnode.wire.node import Cache, Load, Model, Report, State
from llmnode.wire.resume import VERSION as RESUME_VERSION
from llmnode.wire.resume import Origin


@dataclass(frozen=True)
class Served:
    """A loaded model: the engine that runs it, and what turns requests into its token ids."""

    engine: Engine
    backend: Backend
    template: ChatTemplate
    bos: tuple[int, ...]

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles constraints for this vocabulary; made when the first request brings one."""
        return Grammars(self.backend.pieces, self.backend.end_tokens)

    def prepare(self, request: ChatRequest | CompletionRequest, created: int) -> tuple[tuple[int, ...], Grammar | None]:
        """Ids of the prompt, and the constraint compiled. Raises InvalidRequest.

        created: what the template takes for now, in seconds since the epoch. It sees UTC: another node, which may go on
        with the answer, may be in another time zone.
        May take long (a foreign template, a long text, a large schema): call it off the event loop.
        """
        constraint = request.options.constraint
        grammar = None if constraint is None else self._compiled(constraint)
        if isinstance(request, ChatRequest):
            now = datetime.fromtimestamp(created, timezone.utc)
            return self._ids(self.template.render(request.messages, now)), grammar
        return self._ids(request.prompt) if isinstance(request.prompt, str) else request.prompt, grammar

    def _compiled(self, constraint: Constraint) -> Grammar:
        if constraint.kind == "gbnf":
            return self.grammars.gbnf(constraint.source)
        if constraint.kind == "json_schema":
            return self.grammars.json_schema(constraint.source, param=constraint.field)
        return self.grammars.json_object()

    def said_elsewhere(self, ask: Ask) -> str:
        """The text of an answer that another node has sent before this one went on with it."""
        text = TextStream(self.backend.pieces if ask.pieces is None else ask.pieces, ask.stop)
        return "" if ask.retold else "".join(map(text.push, ask.replayed))

    def _ids(self, text: str) -> tuple[int, ...]:
        """BOS goes in front where the model wants it, unless the template has put it there already."""
        ids = tuple(self.backend.tokenize(text, special=True))
        if self.backend.info.add_bos and ids[: len(self.bos)] != self.bos:
            return self.bos + ids
        return ids or self.bos


class Serving:
    """One node's life. `boot` is random for each process; `wall` gives seconds since the epoch, `dice` a seed."""

    def __init__(
        self,
        settings: Settings,
        *,
        release: str,
        config: str,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        dice: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self.settings = settings
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
        self.served: Served | None = None
        self.certificate_end: float | None = None
        self.probe = HostProbe(clock=clock)
        self.residency = Residency()
        self.metrics = Metrics(
            self.stats,
            self.probe,
            clock,
            reported=lambda: self.residency.reported,
            gpus=lambda: len(self.served.backend.devices) if self.served else 0,
            certificate_end=lambda: self.certificate_end,
        )
        self._executor = executor
        self._busy = 0
        self._mailboxes: set[Mailbox] = set()

    # Transitions

    def load(self) -> None:
        self.state, self.why = State.LOADING, "loading the model"

    def ready(self, served: Served) -> None:
        """The model is there. A drain that began meanwhile stays a drain."""
        self.served, self.progress = served, 1.0
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
        for mailbox in tuple(self._mailboxes):
            mailbox.fail(Overloaded(why, code="node_stopping"))

    # What is asked of it

    @property
    def busy(self) -> int:
        """Requests that were let in and are not finished."""
        return self._busy

    @contextmanager
    def admitted(self) -> Iterator[Served]:
        """The model, for the time of one request. Raises Overloaded with an honest `Retry-After` when not ready."""
        if self.state is not State.READY or self.served is None:
            raise self.not_ready()
        self._busy += 1
        try:
            yield self.served
        finally:
            self._busy -= 1

    def not_ready(self) -> Overloaded:
        return Overloaded(
            f"the node is {self.state.value}: {self.why or 'not ready yet'}",
            code=self.state.value,
            retry_after=5.0 if self.state is State.LOADING else 2.0,
        )

    @contextmanager
    def answer(self, served: Served, asks: Sequence[Ask]) -> Iterator[tuple[Mailbox, Meter]]:
        """Hand the choices of a request to the engine; leaving the block, however that happens, gives their slots back
        at once."""
        meter = self.metrics.meter(len(asks))
        mailbox = Mailbox(meter.observe, len(asks))
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
                self._ended(served, ask, mailbox.texts[choice], mailbox.ends.get(choice))

    async def prepare(
        self, served: Served, request: ChatRequest | CompletionRequest, created: int, path: str
    ) -> tuple[tuple[int, ...], Grammar | None, list[Prefix]]:
        """Token ids of a request to `path`, its compiled constraint, and what each choice is to the gate; computed off
        the event loop."""

        def work() -> tuple[tuple[int, ...], Grammar | None, Prefix]:
            prompt, grammar = served.prepare(request, created)
            return prompt, grammar, prefix(request, len(prompt), salt(model.id, model.template, path))

        model = self._model(served)
        prompt, grammar, known = await asyncio.get_running_loop().run_in_executor(self._executor, work)
        return prompt, grammar, self.residency.asked(known, request.options.choices)

    def _ended(self, served: Served, ask: Ask, texts: Sequence[str], end: Done | None) -> None:
        """A choice is over. If it was answered, what it left behind is its prompt and its reply."""
        tag = ask.tag
        assert isinstance(tag, Prefix)
        answered, tag.answered = tag.answered, None
        if answered is None or end is None or end.finish is Finish.CANCELLED:
            return

        def work() -> Chain:
            return answered(served.said_elsewhere(ask) + "".join(texts))

        def known(found: asyncio.Future[Chain]) -> None:
            self.residency.answered(tag, found.result(), tokens)

        tokens = end.usage.prompt_tokens + end.usage.completion_tokens
        asyncio.get_running_loop().run_in_executor(self._executor, work).add_done_callback(known)

    def rules(self, served: Served) -> Rules:
        settings = self.settings
        return Rules(
            models=settings.names,
            n_vocab=served.backend.info.n_vocab,
            max_tokens=settings.max_tokens,
            strict=settings.strict_fields,
            # More could not even wait here, on a node that does nothing else.
            max_choices=min(MAX_CHOICES, settings.slots + settings.queue_limit),
        )

    def seed(self) -> int:
        """A seed for a request that brought none."""
        return self.dice(2**32 - 1)

    # What it says of itself

    def stats(self) -> Stats | None:
        """The engine's snapshot, with what only the door knows of its load."""
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
            models=(self._model(served),),
            load=stats.load if stats else Load(slots=self.settings.slots),
            devices=served.backend.devices if served else (),
            host=self.probe.read(),
            cache=self.residency.report(stats.held, parts=served.engine.shares_parts) if stats and served else Cache(),
            resume=RESUME_VERSION,
        )

    def _model(self, served: Served | None) -> Model:
        state = "ready" if self.state is State.DRAINING else self.state.value
        return Model(
            id=self.settings.served_id,
            aliases=self.settings.aliases,
            state=state,
            n_ctx=served.backend.room.n_ctx if served else self.settings.n_ctx,
            template=_described(served.template) if served else "",
            digest=served.backend.info.digest if served else "",
        )

    def origin(self, served: Served) -> Origin:
        """What its answers come from, for whoever goes on with them."""
        model = self._model(served)
        return Origin(model.id, model.digest, model.template)

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


def _described(template: ChatTemplate) -> str:
    return f"{'default' if template.is_default else 'model'}:{template.fingerprint}"
