"""The composition root of a worker: settings -> ledger, fleet, relay, prober -> blueprints -> a listening server.

The only place that wires things together, and the one owner of the worker's life, which the supervisor directs:

    accept -> "ready" -> serve ... "close": /ready 503 and no new work    -> running requests end or drain_seconds pass
                             or   "leave": no more connections; those that       -> "hurry" does not wait -> exit 0
                                  are there get their answers, and are closed
                                  with the next one

A worker leaves on its own when its supervisor has died, on SIGTERM, and when a part of it has failed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from sanic import HTTPResponse, Request, Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.http.constants import HTTP
from sanic.models.server_types import Signal
from sanic.response import BaseHTTPResponse
from sanic.server.async_server import AsyncioServer

from llmgate.allowances import Allowances
from llmgate.api import admin, entrance, errors, manual, openai, pages, probes, props, usage, watch
from llmgate.api import keys as api_keys
from llmgate.api.conversation import KEEPALIVE_S, Conversations
from llmgate.api.door import Door
from llmgate.core import leases
from llmgate.core.fleet import Fleet, Leased, Listed, Node, View
from llmgate.core.health import Rules
from llmgate.core.history import History
from llmgate.counters import Counters
from llmgate.counters.local import Local
from llmgate.database import StoreError
from llmgate.doorman import Doorman, Taking
from llmgate.figures import Figures
from llmgate.ledger import Ledger
from llmgate.line import Line, News, Order, Post
from llmgate.listener import adopted
from llmgate.listing import Listing
from llmgate.metrics import Metrics
from llmgate.prober import Prober
from llmgate.relay import Relay
from llmgate.requestlog import RequestLog
from llmgate.settings import (
    Settings,
    certificate_ends,
    database,
    door_context,
    door_files,
    is_loopback,
    node_context,
    node_files,
    read_nodes,
    receiver,
    redis_url,
    require_one_truth,
    state_dir,
)
from llmgate.store import Contents
from llmgate.usage import UsageWriter
from llmgate.waiting import Waiting
from llmnode.service import lag, tls, traces
from llmnode.service.connection import Connection
from llmnode.service.release import release
from llmnode.service.settings import Loaded, SettingError

log = logging.getLogger("llmgate")

_HOUSEKEEPING_S = 0.5
"""How often leases are looked over, the database asked for changes and the nodes file for a new one."""
_FIRST_ROUND_S = 1.0
_FLUSH_S = 5.0
_HEARTBEAT_S = 1.0
_LOOK_S = 0.05
_HANDSHAKE_S = 15.0
"""For a client's TLS handshake, which is two round trips and a signature."""
_OTHER_FILES = 64
"""Open files that are no connections."""
_MOST_FILES = 1 << 20
"""Where the system sets no limit."""


class Gate:
    """One running gate. `serve` returns when it has drained."""

    def __init__(self, loaded: Loaded[Settings], token: str, listing: Listing, post: Post, line: Line) -> None:
        self._settings = settings = loaded.values
        self._config = loaded.digest
        self._post, self._line = post, line
        self._clock, self._wall = time.monotonic, time.time
        self._stop, self._hurry, self._look = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._leaving = False
        self._failure: BaseException | None = None

        self._view = View(Fleet(rules=Rules.of(settings)), self._node_moved)
        self._view.apply(Listed(listing.addresses, listing.routes))
        self._ledger = Ledger(database(settings), self._take_contents, lambda: line.say(News.CHANGED), self._pen())
        self._door = Door(lambda: self._ledger.keyring, self._wall, require_keys=settings.require_keys)
        # Before the files are read: what changes meanwhile is a change.
        self._shown = tls.Watch(door_files(settings)), tls.Watch(node_files(settings))
        self._to_nodes = node_context(settings)
        self._relay = Relay(
            token,
            self._clock,
            connect_timeout_s=settings.connect_timeout_s,
            stall_timeout_s=settings.stall_timeout_s,
            request_timeout_s=settings.request_timeout_s,
            context=self._to_nodes,
        )
        self._context = door_context(settings)
        self._prober = Prober(
            lambda: self._view.fleet,
            self._view.apply,
            self._relay.fetch,
            self._clock,
            random.random,
            interval_s=settings.poll_interval_s,
            stale_after_s=settings.stale_after_s,
        )
        self._figures = Figures(Path(post.folder))
        self._ends = certificate_ends(settings, self._context)
        part = math.ceil(settings.queue_limit / settings.workers)
        self._waiting = Waiting(self._view, self._clock, limit=part, beat_s=KEEPALIVE_S)
        self._metrics = Metrics(
            lambda: self._view.fleet,
            self._waiting.lengths,
            self._clock,
            settings.stale_after_s,
            self._figures,
            self._ends,
            lambda: self._ledger.unwritten,
            keyring=lambda: self._ledger.keyring,
            lost={
                "request_log": lambda: self._request_log.dropped,
                "spans": lambda: self._traces.lost if self._traces else 0,
            },
        )
        self._connections: set[Connection] = set()
        self._doorman = Doorman(
            self._connections,
            limit=settings.connections_limit or _places(),
            per_address=settings.connections_per_address,
            context=self._context,
            handshake_s=min(_HANDSHAKE_S, settings.receive_timeout_s),
            clock=self._clock,
            turned=lambda why, number: self._metrics.closed.labels(why).inc(number),
        )
        self._request_log = RequestLog(settings.request_log, settings.request_log_format)
        instance = f"{socket.gethostname()}-{post.place}"
        self._traces = traces.start(receiver(settings), name="llmgate", version=release(), **{"instance.id": instance})
        self._allowances = Allowances(
            self._counters(),
            self._ledger.spent,
            self._metrics,
            closed=settings.limits_when_down == "closed",
            needed=lambda: self._ledger.keyring.limited,
            clock=self._clock,
            dice=lambda: random.getrandbits(64),
        )
        self._history = History()

    def _pen(self) -> UsageWriter | None:
        settings = self._settings
        if not settings.usage:
            return None
        # One worker drops for all what has been kept long enough.
        keep_days = 0 if self._post.place else settings.usage_retention_days
        return UsageWriter(
            socket.gethostname(),
            self._wall,
            lambda outcome, rows: self._metrics.usage.labels(outcome).inc(rows),
            keep_days=keep_days,
        )

    async def serve(self, sock: socket.socket) -> None:
        """Serve on a listening socket until told to end. Raises StoreError or SettingError before the first request."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._line.fileno(), self._hear)
        loop.add_signal_handler(signal.SIGTERM, self._leave)
        await self._ledger.open()
        require_one_truth(self._settings, limited=self._ledger.keyring.limited)
        chores: list[asyncio.Task[None]] = []
        try:
            self._prober.follow()
            await self._prober.first_round(_FIRST_ROUND_S)
            works = (
                self._housekeeping(),
                self._follow_ledger(),
                self._heartbeat(),
                self._allowances.tend(),
                lag.watch(self._metrics.lag.observe),
            )
            chores = [asyncio.create_task(work) for work in works]
            for chore in chores:
                chore.add_done_callback(self._chore_ended)
            if not self._stop.is_set():
                await self._listen(sock)
                self._announce(sock)
                await self._stop.wait()
                await self._end()
            if self._failure:
                raise self._failure
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
            await self._prober.stop()
            await self._relay.close()
            await self._allowances.close()
            await self._ledger.close()
            self._request_log.close()
            if self._traces:
                await asyncio.get_running_loop().run_in_executor(None, self._traces.close)
            if self._line.ended:
                # The supervisor cleans up, but it was killed.
                shutil.rmtree(self._post.folder, ignore_errors=True)

    def _counters(self) -> Counters:
        """Where this gate counts what keys use."""
        settings, url = self._settings, redis_url(self._settings)
        if url:
            from llmgate.counters.shared import Shared  # redis-py takes 60 ms and 10 MB, and most gates need none

            return Shared(url, hour=settings.budget_hour, strict=settings.limits_when_down == "closed")
        return Local(state_dir(settings), lambda: int(self._wall() * 1000), hour=settings.budget_hour)

    def _announce(self, sock: socket.socket) -> None:
        host = self._settings.host
        scheme = "https" if self._settings.tls_cert_file else "http"
        log.info("listening on %s://%s:%d, %s", scheme, host, sock.getsockname()[1], self._summary())
        if self._settings.admin_listen:
            log.info("the admin API is on %s alone", self._settings.admin_listen)
        if self._post.place == 0:
            if not len(self._ledger.keyring) and self._settings.require_keys:
                log.warning("there is no API key yet, so every request is refused: llmgate keys create NAME")
            if not self._settings.require_keys and not is_loopback(host):
                log.warning("keys are not required and others can reach %s: anybody may ask", host)
        self._say_alive()
        self._line.say(News.READY)

    async def _listen(self, sock: socket.socket) -> None:
        app, loop = self._compose(), asyncio.get_running_loop()
        # Else Sanic would tell of other protocols, of which there are none, in a header that is empty.
        app.state.server_info.append(ApplicationServerInfo({"version": HTTP.VERSION_1}))
        # Routes are finished by startup(), so no connection is taken before it.
        await AsyncioServer(app, loop, None, self._connections).startup()  # type: ignore[no-untyped-call]
        signal = Signal()

        def taking(where: str) -> Taking:
            common = {"loop": loop, "app": app, "connections": self._connections, "signal": signal, "state": {}}
            return lambda left: Connection(entrance=where, left=left, **common)

        self._doorman.listen(sock, taking(entrance.DOOR))
        if self._post.admin_fd is not None:
            self._doorman.listen(adopted(self._post.admin_fd), taking(entrance.ADMIN))

    def _compose(self) -> Sanic[Any, Any]:
        settings, clock, wall = self._settings, self._clock, self._wall
        app: Sanic[Any, Any] = Sanic(
            "llmgate", configure_logging=False, env_prefix=None, request_class=entrance.request_class(self._door)
        )
        app.config.update(
            {
                "MOTD": False,
                "FALLBACK_ERROR_FORMAT": "json",
                "REQUEST_MAX_SIZE": settings.body_limit_bytes,
                "REQUEST_MAX_HEADER_SIZE": settings.head_limit_bytes,
                "REQUEST_TIMEOUT": settings.receive_timeout_s,
                "KEEP_ALIVE_TIMEOUT": settings.idle_timeout_s,
                "SEND_TIMEOUT": settings.send_timeout_s,
                # Above the deadline that the gate keeps itself, or Sanic would answer 503 in its place.
                "RESPONSE_TIMEOUT": settings.request_timeout_s + 30,
            }
        )
        errors.install(app, settings.body_limit_bytes)
        app.register_middleware(self._part, "response")
        entrance.install(app, origins=settings.cors_origins, admin_apart=self._post.admin_fd is not None)
        conversations = Conversations(
            settings,
            door=self._door,
            view=self._view,
            relay=self._relay,
            waiting=self._waiting,
            allowances=self._allowances,
            request_log=self._request_log,
            note=self._ledger.note,
            metrics=self._metrics,
            traces=self._traces,
            clock=clock,
            wall=wall,
            dice=lambda: random.getrandbits(64),
        )
        stale = settings.stale_after_s
        app.blueprint(openai.blueprint(conversations, door=self._door, view=self._view, started=wall()))
        app.blueprint(manual.blueprint())
        app.blueprint(pages.blueprint(require_keys=settings.require_keys))
        app.blueprint(
            props.blueprint(
                door=self._door,
                view=self._view,
                relay=self._relay,
                clock=clock,
                stale_after_s=stale,
                timeout_s=settings.stall_timeout_s,
            )
        )
        app.blueprint(
            admin.blueprint(
                door=self._door,
                view=self._view,
                ledger=self._ledger,
                in_flight=self._metrics.in_flight,
                clock=clock,
                wall=wall,
                stale_after_s=stale,
            )
        )
        app.blueprint(
            api_keys.blueprint(
                door=self._door,
                ledger=self._ledger,
                use=self._allowances.use,
                require_one_truth=lambda limited: require_one_truth(settings, limited=limited),
                wall=wall,
            )
        )
        app.blueprint(usage.blueprint(door=self._door, ledger=self._ledger, clock=clock, wall=wall))
        app.blueprint(
            watch.blueprint(
                door=self._door,
                view=self._view,
                history=self._history,
                in_flight=self._metrics.in_flight,
                waiting=self._metrics.waiting,
                dice=lambda: random.getrandbits(64),
                clock=clock,
                wall=wall,
                stale_after_s=stale,
                workers=settings.workers,
                admin_apart=bool(settings.admin_listen),
            )
        )
        app.blueprint(
            probes.blueprint(
                door=self._door,
                view=self._view,
                metrics=self._metrics,
                clock=clock,
                stale_after_s=stale,
                config=self._config,
                post=self._post,
            )
        )
        return app

    async def _part(self, request: Request, _answer: BaseHTTPResponse) -> HTTPResponse | None:
        """The client's next request is for a worker that stays."""
        if self._door.leaving:
            request.stream.keep_alive = False  # type: ignore[union-attr]
        return None

    def _hear(self) -> None:
        """Do what the supervisor says."""
        for order, _ in self._line.heard():
            if order is Order.REFRESH:
                self._look.set()
            elif order is Order.LEAVE:
                self._leaving = True
                self._stop.set()
            elif order is Order.CLOSE:
                self._stop.set()
            elif order is Order.HURRY:
                self._hurry.set()
        if self._line.ended:
            # Also while it ends: the end of a line can be read without end, and would keep the loop turning.
            asyncio.get_running_loop().remove_reader(self._line.fileno())
            log.error("the supervisor has died; leaving")
            self._leave()

    def _leave(self) -> None:
        """End without having been told to; the supervisor starts another in this place."""
        if not self._stop.is_set():
            self._line.say(News.LEAVING)
            self._leaving = True
            self._stop.set()

    def _chore_ended(self, chore: asyncio.Task[None]) -> None:
        """A worker that can no longer look after itself leaves."""
        if not chore.cancelled() and chore.exception():
            self._failure = chore.exception()
            log.critical("a part of the gate has failed, leaving: %r", self._failure)
            self._leave()

    def _take_contents(self, contents: Contents) -> None:
        self._view.apply(Leased(leases.live(contents.leases, self._wall())))

    def _node_moved(self, node: Node) -> None:
        self._metrics.transitions.labels(node.name, node.health.state.word).inc()
        self._prober.say(node.name)

    async def _housekeeping(self) -> None:
        """Notice a new nodes file and certificates, remember how nodes do, let other workers see what is new here."""
        seen = self._nodes_stamp()
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            stamp = self._nodes_stamp()
            if stamp != seen:
                seen = stamp
                self._read_nodes_again()
            self._renew()
            self._metrics.publish()
            self._remember()

    async def _follow_ledger(self) -> None:
        """Notice other processes' writes, and leases that end. A server that does not answer may take its time."""
        failing = False
        while True:
            try:
                await asyncio.wait_for(self._look.wait(), _HOUSEKEEPING_S)
            except asyncio.TimeoutError:
                pass
            self._look.clear()
            try:
                await self._ledger.refresh()
                await self._end_leases()
            except StoreError as error:
                if not failing:
                    log.error("%s; going on with what was read before", error)
                failing = True
                continue
            if failing:
                log.warning("keys and leases can be read again")
            failing = False

    def _renew(self) -> None:
        """Take new certificates, for connections from now on; bad ones are said once, and change nothing."""
        pairs = (("clients", self._context, door_files), ("nodes", self._to_nodes, node_files))
        for shown, (to, context, files) in zip(self._shown, pairs, strict=True):
            if context is None or not shown.changed():
                continue
            try:
                tls.renew(context, files(self._settings))
            except SettingError as error:
                log.error("the new certificate for %s is refused, the old one stays: %s", to, error)
                continue
            self._ends.update({to: certificate_ends(self._settings, self._context)[to]})
            log.info("the certificate for %s was read again", to)

    def _remember(self) -> None:
        wall = self._wall()
        if self._history.due(wall):
            stale_after = self._settings.stale_after_s
            self._history.sample(self._view.fleet, wall, now=self._clock(), stale_after=stale_after)

    async def _end_leases(self) -> None:
        held = tuple(node.lease for node in self._view.fleet.nodes.values() if node.lease)
        over = set(held) - set(leases.live(held, self._wall()))
        for lease in over:
            log.warning("the drain of %s by %s has expired; it takes work again", lease.node, lease.owner)
        if over:
            await self._ledger.drop_expired(self._wall())

    def _nodes_stamp(self) -> tuple[int, int, int] | None:
        """Changes when the nodes file does; None while it is missing."""
        path = self._settings.nodes_file
        try:
            stat = path.stat() if path else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None

    def _read_nodes_again(self) -> None:
        try:
            listing = read_nodes(self._settings)
        except SettingError as error:
            log.error("the new nodes file is refused, the old nodes stay: %s", error)
            return
        before = set(self._view.fleet.nodes)
        self._view.apply(Listed(listing.addresses, listing.routes))
        self._prober.follow()
        after = set(self._view.fleet.nodes)
        gone, new = ", ".join(sorted(before - after)) or "none", ", ".join(sorted(after - before)) or "none"
        log.info("nodes file read: %d nodes; new: %s; gone: %s", len(after), new, gone)

    async def _heartbeat(self) -> None:
        """Tell the supervisor that the event loop turns: one that is stuck says nothing, and is killed."""
        while True:
            self._say_alive()
            await asyncio.sleep(_HEARTBEAT_S)

    def _say_alive(self) -> None:
        self._line.say(News.ALIVE, status=self._summary(), active=self._door.active)

    async def _end(self) -> None:
        door, patience_s = self._door, self._settings.drain_seconds
        if self._leaving:
            door.leaving = True
            self._doorman.close()
            log.info("leaving: %d requests running, at most %g s", door.active, patience_s)
            await self._unless_hurried(self._vacated(), patience_s)
        else:
            door.draining = True
            log.info("draining: %d requests running, at most %g s", door.active, patience_s)
            await self._unless_hurried(door.empty(), patience_s)
            self._doorman.close()
        door.draining = True
        if door.active:
            log.warning("cutting %d requests that are still running", door.active)
        else:
            await self._flush()
        for connection in list(self._connections):
            # Not Sanic's own abort(), which takes the transport away from a handler that is still to be cancelled.
            if connection.transport:
                connection.transport.abort()
        await self._doorman.abort()
        await door.close()
        log.info("ended")

    async def _unless_hurried(self, work: Coroutine[Any, Any, None], patience_s: float) -> None:
        """Wait for it, but no longer than that, nor after a "hurry"."""
        waiting = [asyncio.create_task(work), asyncio.create_task(self._hurry.wait())]
        await asyncio.wait(waiting, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

    async def _vacated(self) -> None:
        """Wait until every connection has gone. One that a client keeps open is closed with its next answer: closing
        it before would cut off a request that is on its way."""
        while self._doorman.count:  # noqa: ASYNC110  (they leave one by one)
            await asyncio.sleep(_LOOK_S)

    async def _flush(self) -> None:
        """Let the last bytes of finished answers reach slow clients, for a short while."""
        end = self._clock() + _FLUSH_S
        while self._connections and self._clock() < end:
            for connection in list(self._connections):
                connection.close_if_idle()
            await asyncio.sleep(0.01)

    def _summary(self) -> str:
        nodes = self._view.fleet.nodes.values()
        usable = sum(node.standing(self._clock(), self._settings.stale_after_s).usable for node in nodes)
        return f"{usable} of {len(nodes)} nodes take work"


def _places() -> int:
    """How many clients may be connected: each wants an open file, and its request one more, to a node."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (min(allowed, _MOST_FILES) - _OTHER_FILES) // 2)
