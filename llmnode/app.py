"""The composition root: settings -> engine -> routes, and the life of the process around them.

The only place that wires things together. The order at start: routes, listening socket, then the model in a thread of
its own, so that /health answers while it loads and /ready when it is there. SIGTERM drains; a second signal stops at
once. What ends the process gives it the exit code of `Exit`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import socket
import ssl
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from string import ascii_letters, digits
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
from sanic import Request, Sanic
from sanic.config import Config
from sanic.response import BaseHTTPResponse

from llmnode.api import manual, node, openai, props, texts
from llmnode.api.errors import CLIENT_LEFT, Errors
from llmnode.api.fleet_token import FleetToken
from llmnode.api.foreign import Foreign
from llmnode.api.pooling import Pooling
from llmnode.api.preparing import Served
from llmnode.api.serving import Serving
from llmnode.api.trace import Ended, Journey
from llmnode.chat.renderer import Renderer
from llmnode.engine.backend import Backend, FatalEngineError, ModelLoadError, Room
from llmnode.engine.fake import FakeBackend
from llmnode.engine.fake_pooling import FakePooling
from llmnode.engine.loop import Engine, Limits
from llmnode.engine.pooling import PoolingBackend, PoolingEngine, PoolingEvent, PoolingLimits, PoolingSink
from llmnode.engine.snapshot import Snapshot
from llmnode.engine.types import Event, ModelInfo, Sink
from llmnode.service import lag, spans, tls, traces
from llmnode.service.confined import Limits as WorkLimits
from llmnode.service.confined import StartError
from llmnode.service.connection import Connection
from llmnode.service.notify import Notifier
from llmnode.service.release import release
from llmnode.service.settings import Loaded, SettingError
from llmnode.service.traces import Traces
from llmnode.settings import HANDBOOK, Settings
from llmnode.wire import dialect, headers, resume
from llmnode.wire.errors import ApiError
from llmnode.wire.node import State

if TYPE_CHECKING:
    from llmnode.engine.llama import LlamaOptions

log = logging.getLogger("llmnode")
access = logging.getLogger("llmnode.access")

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""What anybody may ask; the rest wants the fleet token where there is one."""

QUIET_PATHS = OPEN_PATHS | {"/node"}
"""Polled every second: logged at debug level."""

FAKE_CONTEXT = 4096
FAKE_SPARE_ROWS = 16
FAKE_POOLING_CONTEXT = 512
_MOST_HOST_CACHE = 8 << 30
_GATHER_S = 0.02
"""Tokens of steps shorter than this go to their readers together; nobody reads more than 50 pieces a second."""
_REQUEST_ID_CHARACTERS = frozenset(ascii_letters + digits + "._-")
_PREPARING = 4
"""Requests whose prompts are made at the same time, each with a process for its template."""
_STATUS_EVERY_S = 5.0
_LOOK_S = 0.5
"""How often the files of the certificate are looked at."""
_LOAD_EXTENSION_S = 120.0
_LAST_WORDS_S = 2.0
"""After the drain's end, for the error events to reach their clients."""
_SAVING_S = 25.0
"""For the prompts to reach the disk; units give 30 s beyond the drain."""


class Exit(IntEnum):
    """Why the process ends, for systemd and people."""

    OK = 0
    CONFIGURATION = 2
    MODEL = 3
    PORT = 4
    ENGINE = 5


def run(
    loaded: Loaded[Settings],
    sock: socket.socket,
    token: FleetToken | None,
    context: ssl.SSLContext | None,
    template: str | None,
) -> Exit:
    """Serve on a bound socket until a signal or a fatal error; returns the exit code.

    `context`: what to listen with, None for plain HTTP. `template` is the text of chat_template_file, None to use the
    model's own.
    """
    settings = loaded.values
    executor = ThreadPoolExecutor(max_workers=_PREPARING, thread_name_prefix="prompt")
    told = traces.start(settings.receiver, name="llmnode", version=release(), **{"instance.id": settings.name})
    serving = Serving(settings, release=release(), config=loaded.digest, executor=executor, traces=told)
    app = _app(serving, token)
    life = Life(app, serving, Notifier(), context, template)
    app.after_server_start(life.begin)
    app.run(
        sock=sock,
        ssl=context,
        protocol=Connection,
        single_process=True,
        register_sys_signals=False,
        motd=False,
        access_log=False,
        debug=False,
    )
    executor.shutdown(wait=False, cancel_futures=True)
    if told:
        told.close()
    return life.exit


def purpose(settings: Settings) -> str:
    """What the model is to do: generate, embed or rerank. Raises ModelLoadError."""
    if settings.kind != "auto":
        return settings.kind
    if settings.backend == "fake" or settings.model is None:
        return "generate"
    from llmnode.engine import llama

    return llama.purpose(settings.model)


def load_backend(settings: Settings, progress: Callable[[float], None]) -> Backend:
    """The backend that the settings ask for. `progress` is called with 0..1. Raises ModelLoadError."""
    if settings.backend == "fake" or settings.model is None:
        n_ctx = settings.n_ctx or min(FAKE_CONTEXT, settings.kv_cells or FAKE_CONTEXT)
        cells = settings.kv_cells or settings.slots * n_ctx
        slots = settings.slots
        room = Room(slots, n_ctx, cells, settings.n_batch, sequences=2 * slots, rows=slots + FAKE_SPARE_ROWS)
        return FakeBackend(room, step_delay_s=settings.fake_step_delay_s)
    # Imported here: llama.cpp's libraries take a second to load, and only this backend needs them.
    from llmnode.engine import llama

    return llama.load(_llama_options(settings, settings.model), progress)


def load_pooling(settings: Settings, purpose: str, progress: Callable[[float], None]) -> PoolingBackend:
    """The same of a model that is to embed or rerank."""
    if settings.backend == "fake" or settings.model is None:
        n_ctx = settings.n_ctx or FAKE_POOLING_CONTEXT
        n_batch = max(settings.n_batch, n_ctx)
        kind = "rank" if purpose == "rerank" else settings.pooling.replace("model", "mean")
        return FakePooling(Room(settings.slots, n_ctx, n_batch, n_batch), pooling=kind)
    from llmnode.engine import llama

    return llama.load_pooling(_pooling_options(settings, settings.model, purpose), progress)


@dataclass(frozen=True)
class Planned:
    """What `load_backend` or `load_pooling` would make of the settings. memory: the arithmetic, line by line; fits:
    what it comes to.    pooling: of a model that embeds or reranks, "" for one that generates."""

    info: ModelInfo
    room: Room
    chosen: str
    memory: tuple[str, ...]
    fits: bool
    pooling: str = ""


def plan(settings: Settings) -> Planned:
    """What `load_backend` would load, found out without reading weights. Raises ModelLoadError."""
    wanted = purpose(settings)
    if settings.backend == "fake" or settings.model is None:
        nothing = "a fake model, which computes nothing"
        if wanted == "generate":
            backend = load_backend(settings, lambda done: None)
            return Planned(backend.info, backend.room, nothing, (), True)
        pooling = load_pooling(settings, wanted, lambda done: None)
        return Planned(pooling.info, pooling.room, nothing, (), True, pooling.pooling)
    from llmnode.engine import llama

    if wanted != "generate":
        return _plan_pooling(settings, settings.model, wanted)
    found = llama.estimate(_llama_options(settings, settings.model))
    chosen = found.chosen
    text = (
        f"{', '.join(chosen.devices)}, {chosen.threads} threads ({chosen.threads_batch} for prompts), "
        f"flash attention {'on' if chosen.flash_attention else 'off'}, "
        f"keys {chosen.cache_type_k}, values {chosen.cache_type_v}, "
        f"{'one cache for all sequences' if chosen.kv_unified else 'a part of the cache for each sequence'}"
    )
    return Planned(found.info, found.room, text, tuple(found.fit.lines()), found.fit.fits)


def _plan_pooling(settings: Settings, path: Path, wanted: str) -> Planned:
    from llmnode.engine import llama

    options = _pooling_options(settings, path, wanted)
    found = llama.estimate_pooling(options)
    runs_on = ", ".join(found.devices)
    return Planned(found.info, found.room, runs_on, tuple(found.fit.lines()), found.fit.fits, found.pooling)


class NodeApp(Sanic[Config, SimpleNamespace]):
    """Sanic with one access line and one count for each request, written when its last byte has gone."""

    async def handle_request(self, request: Request) -> None:
        serving: Serving = self.ctx.serving
        began = serving.clock()
        request.ctx.meter = None
        request.ctx.journey = _journey(serving.traces, request) if serving.traces else None
        request.ctx.request_id = _request_id(request.headers.get(headers.REQUEST_ID))
        request.ctx.status = CLIENT_LEFT  # until there is an answer
        if request.path == resume.PATH and request.stream is not None:
            # An answer may be longer than its question, and this body holds both.
            request.stream.request_max_size = serving.settings.body_limit_bytes + resume.LONGEST_HEAD
        try:
            await super().handle_request(request)
        except asyncio.CancelledError:
            request.ctx.status = CLIENT_LEFT
            raise
        finally:
            _account(serving, request, began)


def _llama_options(settings: Settings, path: Path) -> LlamaOptions:
    from llmnode.engine.llama import LlamaOptions

    return LlamaOptions(
        path=path,
        slots=settings.slots,
        n_ctx=settings.n_ctx,
        kv_cells=settings.kv_cells,
        n_batch=settings.n_batch,
        threads=settings.threads,
        threads_batch=settings.threads_batch,
        n_gpu_layers=settings.n_gpu_layers,
        tensor_split=settings.tensor_split,
        devices=settings.devices,
        flash_attn=settings.flash_attn,
        cache_type_k=settings.cache_type_k,
        cache_type_v=settings.cache_type_v,
        swa_full=settings.swa_full,
        kv_unified=settings.kv_unified,
        mmap=settings.mmap,
        mlock=settings.mlock,
        fit_check=settings.fit_check,
    )


def _pooling_options(settings: Settings, path: Path, purpose: str) -> LlamaOptions:
    """A model that generates has no words on pooling, and one that embeds may be made to pool otherwise; a score comes
    from a classifier only."""
    pooling = "rank" if purpose == "rerank" else settings.pooling
    return replace(_llama_options(settings, path), pooling=pooling)


def limits(settings: Settings) -> Limits:
    """What the settings allow the engine."""
    host = settings.prompt_cache_bytes
    return Limits(
        queue_limit=settings.queue_limit,
        stall_s=settings.stall_ms / 1000,
        host_bytes=min(_MOST_HOST_CACHE, psutil.virtual_memory().total // 8) if host < 0 else host,
        prompt_lookup=settings.prompt_lookup,
        gather_s=_GATHER_S,
    )


def chosen(settings: Settings) -> dict[str, str]:
    """What settings that leave the choice to us came to on this machine, by name."""
    found = {}
    if settings.prompt_cache_bytes < 0:
        found["prompt_cache_bytes"] = str(limits(settings).host_bytes)
    if settings.backend == "llama":
        from llmnode.engine.llama.options import physical_cores

        threads = settings.threads or physical_cores()
        if not settings.threads:
            found["threads"] = str(threads)
        if not settings.threads_batch:
            found["threads_batch"] = str(threads)
    return found


def foreign(settings: Settings, info: ModelInfo, template: str, controls: Sequence[str] = ()) -> Foreign:
    """The processes for what comes from model files and clients and may cost anything. controls: spellings of the
    model's control tokens. Raises StartError."""
    setup = {
        "source": template,
        "bos": info.bos,
        "eos": info.eos,
        "controls": controls,
        "grammar_bytes": max(settings.max_grammar_bytes, settings.max_schema_bytes),
    }
    made = Foreign(setup, WorkLimits(settings.template_timeout_s, settings.template_memory_bytes))
    made.start()
    return made


def _snapshot(settings: Settings, backend: Backend) -> Snapshot | None:
    """Where hot prompts are kept between starts. What they are good for: this file, these options, this llama.cpp."""
    if settings.prompt_cache_file is None:
        return None
    options = (settings.cache_type_k, settings.cache_type_v, settings.flash_attn, settings.swa_full, settings.backend)
    parts = 1 if backend.room.unified else backend.room.sequences
    model = settings.model.stat() if settings.model else None
    about = (backend.info, model and (model.st_size, model.st_mtime_ns), options, parts, release())
    fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()
    return Snapshot(settings.prompt_cache_file, settings.prompt_cache_file_bytes, fingerprint)


def _app(serving: Serving, token: FleetToken | None) -> NodeApp:
    settings = serving.settings
    app = NodeApp("llmnode", configure_logging=False, error_handler=Errors(settings.body_limit_bytes))
    app.ctx.serving = serving
    # Longer than any deadline, or Sanic would answer for us; it also ends a stream that nobody reads any more.
    app.config.RESPONSE_TIMEOUT = int(settings.request_timeout_s) + 30
    app.config.REQUEST_MAX_SIZE = settings.body_limit_bytes
    app.config.KEEP_ALIVE_TIMEOUT = 75
    # Our own drain comes first; what is left for Sanic is to close connections.
    app.config.GRACEFUL_SHUTDOWN_TIMEOUT = 1.0
    app.config.AUTO_EXTEND = False
    app.config.FALLBACK_ERROR_FORMAT = "json"
    for name in ("sanic.root", "sanic.server", "sanic.error", "sanic.access"):
        logging.getLogger(name).setLevel(logging.WARNING)

    @app.on_request
    async def ask_for_token(request: Request) -> None:
        unreadable = not hasattr(request.ctx, "request_id")  # Sanic's stand-in for what was no HTTP: it gets its 400
        if token is not None and not unreadable and request.path not in OPEN_PATHS:
            key = request.headers.get("x-api-key")
            token.check(request.headers.get("authorization") or (key and f"Bearer {key}"))

    @app.on_response  # type: ignore[untyped-decorator]
    async def echo_request_id(request: Request, response: BaseHTTPResponse) -> None:
        request.ctx.status = response.status
        response.headers.update(
            dialect.of(request.path, request.headers).named(getattr(request.ctx, "request_id", "-"))
        )

    app.blueprint(node.blueprint(serving))
    app.blueprint(openai.blueprint(serving))
    app.blueprint(texts.blueprint(serving))
    app.blueprint(props.blueprint(serving))
    app.blueprint(manual.blueprint())
    return app


class Life:
    """The process from its first to its last moment: loading, watchdog, status lines, signals, drain."""

    def __init__(
        self,
        app: NodeApp,
        serving: Serving,
        notifier: Notifier,
        context: ssl.SSLContext | None,
        template: str | None,
    ) -> None:
        self.exit = Exit.OK
        self._app = app
        self._serving = serving
        self._notifier = notifier
        self._context = context
        serving.certificate_end = tls.end(context)
        self._files = tls.Watch(serving.settings.tls)
        self._template = template
        self._stopping: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, _: NodeApp) -> None:
        """Called when the socket listens: take over the signals and start loading."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._serving.load()
        settings = self._serving.settings
        if settings.model == HANDBOOK:
            log.info("no model is set: serving the handbook model, which knows llmrack and nothing else")
        log.info("%s listens on %s port %d", settings.name, settings.host, settings.port)
        self._tasks.append(loop.create_task(self._tell_systemd()))
        self._tasks.append(loop.create_task(lag.watch(self._serving.metrics.lag.observe)))
        if self._context is not None:
            self._tasks.append(loop.create_task(self._watch_certificate()))
        if self._notifier.watchdog_interval_s:
            self._tasks.append(loop.create_task(self._feed_watchdog(self._notifier.watchdog_interval_s)))
        threading.Thread(target=self._load, args=(loop,), name="load", daemon=True).start()

    # Loading, on its own thread

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        def progress(share: float) -> None:
            self._serving.progress = share

        settings = self._serving.settings
        try:
            wanted = purpose(settings)
            _call(loop, self._serving.meant, wanted)
            loaded = self._generating(loop, progress) if wanted == "generate" else self._pooling(loop, wanted, progress)
        except ModelLoadError as error:
            _call(loop, self._fail, Exit.MODEL, str(error))
        except (StartError, ApiError) as error:
            _call(loop, self._fail, Exit.MODEL, f"the process that renders chat templates: {error}")
        except Exception as error:
            log.exception("loading failed")
            _call(loop, self._fail, Exit.MODEL, f"loading failed: {error}")
        else:
            _call(loop, self._loaded, loaded)

    def _generating(self, loop: asyncio.AbstractEventLoop, progress: Callable[[float], None]) -> Served:
        def deliver(events: Sequence[tuple[Sink, Event]]) -> None:
            _call(loop, _hand_out, events)

        settings = self._serving.settings
        backend = load_backend(settings, progress)
        info = backend.info
        source = info.chat_template if self._template is None else self._template
        controls = [text for text, id in backend.specials.items() if not backend.pieces[id]]
        elsewhere = foreign(settings, info, source, controls)
        renderer = Renderer(source, elsewhere.template)
        bos = tuple(backend.tokenize(info.bos, special=True)) if info.bos else ()
        engine = Engine(
            backend,
            limits(settings),
            deliver=deliver,
            on_fatal=partial(self._on_fatal, loop),
            snapshot=_snapshot(settings, backend),
        )
        engine.start()
        served = Served(engine, backend, renderer, bos, elsewhere.try_grammar)
        served.grammars.prepare()  # up to a second for a large vocabulary, during which nothing else can run
        return served

    def _pooling(self, loop: asyncio.AbstractEventLoop, purpose: str, progress: Callable[[float], None]) -> Pooling:
        def deliver(events: Sequence[tuple[PoolingSink, PoolingEvent]]) -> None:
            _call(loop, _hand_out_pooled, events)

        settings = self._serving.settings
        backend = load_pooling(settings, purpose, progress)
        allowed = PoolingLimits(queue_limit=max(PoolingLimits().queue_limit, 2 * settings.max_texts))
        engine = PoolingEngine(backend, allowed, deliver=deliver, on_fatal=partial(self._on_fatal, loop))
        engine.start()
        return Pooling(engine, backend)

    def _on_fatal(self, loop: asyncio.AbstractEventLoop, error: FatalEngineError) -> None:
        _call(loop, self._fail, Exit.ENGINE, str(error))

    def _loaded(self, loaded: Served | Pooling) -> None:
        self._serving.ready(loaded)
        if self._serving.state is not State.READY:
            return
        room, name = loaded.backend.room, self._serving.settings.served_id
        if isinstance(loaded, Pooling):
            log.info(
                "ready: model %s for %s, %d texts at once, %d tokens each",
                name,
                loaded.kinds[0],
                room.slots,
                room.n_ctx,
            )
        else:
            if loaded.renderer.is_default:
                log.warning("the model brings no chat template: using ChatML; set chat_template_file for another")
            log.info(
                "ready: model %s, %d slots, %d tokens a request, %d cells", name, room.slots, room.n_ctx, room.kv_cells
            )
        self._notifier.ready(self._serving.status_line())

    def _fail(self, code: Exit, why: str) -> None:
        """The process cannot go on: say why, let clients hear of it, leave."""
        log.error("%s", why)
        self.exit = code
        self._serving.fail(why)
        self._notifier.stopping(f"failed: {why}")
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._leave(0.0))

    # A reload

    def _reload(self) -> None:
        """Take what can be taken without a restart: the certificates. Their files are as large as a page."""
        settings = self._serving.settings
        if self._context is None:
            log.info("SIGHUP: nothing to read again, this node listens without TLS")
            return
        try:
            tls.renew(self._context, settings.tls)
        except SettingError as error:
            log.error("keeping the old certificate: %s", error)
        else:
            self._serving.certificate_end = tls.end(self._context)
            log.info("certificate read again: %s", settings.tls_cert_file)

    async def _watch_certificate(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._files.changed():
                self._reload()

    # The end

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping is not None:
            log.warning("%s again: stopping at once", number.name)
            os._exit(self.exit)
        log.info("%s: draining %d requests for up to %g s", number.name, self._serving.busy, self._drain_seconds)
        self._serving.drain()
        self._notifier.stopping(self._serving.status_line())
        self._stopping = asyncio.ensure_future(self._leave(self._drain_seconds))

    @property
    def _drain_seconds(self) -> float:
        return self._serving.settings.drain_seconds

    async def _leave(self, patience_s: float) -> None:
        if not await self._idle_within(patience_s):
            log.warning("%d requests are handed over or cut off", self._serving.busy)
            self._serving.cut("the node is stopping, and the time for running answers is over")
            await self._idle_within(_LAST_WORDS_S)
        await self._save_prompts()
        for task in self._tasks:
            task.cancel()
        log.info("stopped")
        self._app.stop(terminate=False)

    async def _save_prompts(self) -> None:
        """Stopping the engine writes prompt_cache_file; off the loop, so that the watchdog is fed meanwhile."""
        served = self._serving.served
        if served is None or self.exit != Exit.OK or self._serving.settings.prompt_cache_file is None:
            return
        stopped = asyncio.get_running_loop().run_in_executor(None, served.engine.stop)
        try:
            await asyncio.wait_for(stopped, _SAVING_S)
        except asyncio.TimeoutError:
            log.error("prompts were not saved: the engine did not stop within %g s", _SAVING_S)

    async def _idle_within(self, patience_s: float) -> bool:
        """Wait until no request is under way, at most so long; says whether it came to that."""
        end = self._serving.clock() + patience_s
        while self._serving.busy:
            if self._serving.clock() >= end:
                return False
            await asyncio.sleep(0.05)
        return True

    # systemd

    async def _tell_systemd(self) -> None:
        """Status lines while serving, and more time to start for as long as loading makes progress."""
        told, progress = "", -1.0
        while True:
            serving = self._serving
            if serving.state is State.LOADING and serving.progress > progress:
                progress = serving.progress
                self._notifier.extend_timeout(_LOAD_EXTENSION_S)
            line = serving.status_line()
            if line != told:
                told = line
                self._notifier.status(line)
            await asyncio.sleep(_STATUS_EVERY_S)

    async def _feed_watchdog(self, every_s: float) -> None:
        """Only a node that can still do its work feeds the watchdog; systemd ends the others.

        systemd begins to count with READY=1: until then there is nothing to feed.
        """
        while True:
            trouble = self._serving.trouble()
            if trouble:
                log.error("the watchdog is not fed: %s", trouble)
            elif self._serving.state is not State.LOADING:
                self._notifier.watchdog()
            await asyncio.sleep(every_s)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError: the caller says which host and port."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock


def _call(loop: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    """Call on the loop's thread; the loop may be closed already when the process ends."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        pass


def _hand_out(events: Sequence[tuple[Sink, Event]]) -> None:
    for sink, event in events:
        sink(event)


def _hand_out_pooled(events: Sequence[tuple[PoolingSink, PoolingEvent]]) -> None:
    for sink, event in events:
        sink(event)


def _request_id(given: str | None) -> str:
    if given and len(given) <= 128 and _REQUEST_ID_CHARACTERS.issuperset(given):
        return given
    return f"req-{uuid.uuid4().hex}"


def _journey(traces: Traces, request: Request) -> Journey | None:
    """What is to be told of a request, None where nothing is. Gates' polls are GETs, and no part of any trace."""
    if request.method != "POST":
        return None
    own, parent = traces.context(request.headers.get(spans.PARENT), request.headers.get(spans.STATE))
    return Journey(own, parent, traces.id, request.path) if own.sampled else None


def _account(serving: Serving, request: Request, began: float) -> None:
    """Count the request, write its line and tell its trace. Unknown paths share one label, so that nobody can grow the
    registry."""
    route = request.route.path if request.route else "unknown"
    route = "/" + route.lstrip("/") if request.route else route
    now = serving.clock()
    seconds = now - began
    serving.metrics.requests.labels(route, str(request.ctx.status)).inc()
    serving.metrics.request_seconds.labels(route).observe(seconds)
    fields: dict[str, Any] = {
        "request_id": request.ctx.request_id,
        "method": request.method,
        "path": request.path,
        "status": request.ctx.status,
        "ms": round(seconds * 1000, 1),
    }
    meter = request.ctx.meter
    if meter is not None:
        if meter.first_token_s is not None:
            fields["first_token_ms"] = round(meter.first_token_s * 1000, 1)
        if meter.usage is not None:
            fields["prompt_tokens"] = meter.usage.prompt_tokens
            fields["cached_tokens"] = meter.usage.cached_tokens
            fields["completion_tokens"] = meter.usage.completion_tokens
    journey, status = request.ctx.journey, request.ctx.status
    if journey and serving.traces and status != 401:
        about = Ended(route, request.ctx.request_id, status, began, now, serving.wall() - now)
        serving.traces.say(journey.spans(about, meter))
    level = logging.DEBUG if request.path in QUIET_PATHS else logging.INFO
    access.log(level, "request", extra={"fields": fields})


def read_template(path: Path | None) -> str | None:
    """The text of chat_template_file. Raises OSError or UnicodeDecodeError."""
    return None if path is None else path.read_text(encoding="utf-8")
