"""The composition root of the gate: settings -> ledger, fleet, relay, prober -> blueprints -> a listening server.

The only place that wires things together, and the one owner of the process's life:

    listen -> READY=1 -> serve ... SIGTERM -> /ready 503 and no new work -> running requests end or drain_seconds pass
           -> stop listening -> exit 0.  A second SIGTERM (or Ctrl-C) does not wait.  SIGHUP reads the nodes file again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import signal
import socket
import time
from typing import Any

from sanic import Sanic
from sanic.server.async_server import AsyncioServer

from llmgate.api import admin, errors, openai, probes
from llmgate.api.conversation import KEEPALIVE_S, Conversations
from llmgate.api.door import Door
from llmgate.core import leases
from llmgate.core.fleet import Fleet, Leased, Listed, Node, View
from llmgate.core.health import Rules
from llmgate.ledger import Contents, Ledger, RequestLog, StoreError
from llmgate.listing import Listing
from llmgate.metrics import Metrics
from llmgate.prober import Prober
from llmgate.relay import Relay
from llmgate.settings import Settings, is_loopback, read_nodes, state_dir
from llmgate.waiting import Waiting
from llmnode.service.connection import Connection
from llmnode.service.notify import Notifier
from llmnode.service.settings import Loaded, SettingError

log = logging.getLogger("llmgate")

_HOUSEKEEPING_S = 0.5
"""How often leases are looked over, the database asked for changes and the nodes file for a new one."""
_FIRST_ROUND_S = 1.0
_FLUSH_S = 5.0
_BACKLOG = 1024


class PortInUse(Exception):
    """Something else listens there; the message names the address."""


def listen(settings: Settings) -> socket.socket:
    """Bind the listening socket. Raises PortInUse, or SettingError for an address that is not this host's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"cannot listen on {where}: the port is in use") from error
        raise SettingError(f"cannot listen on {where}: {error.strerror}") from error
    return sock


class Gate:
    """One running gate. `serve` returns when it has drained."""

    def __init__(self, loaded: Loaded[Settings], token: str, listing: Listing, notifier: Notifier) -> None:
        self._settings = settings = loaded.values
        self._config = loaded.digest
        self._notifier = notifier
        self._clock, self._wall = time.monotonic, time.time
        self._stop, self._hurry, self._reload = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._status = ""
        self._failure: BaseException | None = None

        self._view = View(Fleet(rules=Rules.of(settings)), self._node_moved)
        self._view.apply(Listed(listing.addresses, listing.routes))
        self._ledger = Ledger(state_dir(settings), self._take_contents)
        self._door = Door(lambda: self._ledger.keyring, require_keys=settings.require_keys)
        self._relay = Relay(
            token,
            self._clock,
            connect_timeout_s=settings.connect_timeout_s,
            stall_timeout_s=settings.stall_timeout_s,
            request_timeout_s=settings.request_timeout_s,
        )
        self._prober = Prober(
            lambda: self._view.fleet,
            self._view.apply,
            self._relay.fetch,
            self._clock,
            interval_s=settings.poll_interval_s,
            stale_after_s=settings.stale_after_s,
        )
        self._waiting = Waiting(self._view, self._clock, limit=settings.queue_limit, beat_s=KEEPALIVE_S)
        self._metrics = Metrics(lambda: self._view.fleet, self._waiting.lengths, self._clock, settings.stale_after_s)
        self._request_log = RequestLog(settings.request_log)

    async def serve(self, sock: socket.socket) -> None:
        """Serve on a listening socket until a signal says stop. Raises StoreError before the first request."""
        loop = asyncio.get_running_loop()
        await self._ledger.open()
        chores: list[asyncio.Task[None]] = []
        try:
            self._prober.follow()
            await self._prober.first_round(_FIRST_ROUND_S)
            server = await self._listen(sock)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_stop_signal)
            loop.add_signal_handler(signal.SIGHUP, self._reload.set)
            chores = [asyncio.create_task(self._housekeeping()), asyncio.create_task(self._watchdog())]
            for chore in chores:
                chore.add_done_callback(self._chore_ended)
            log.info("listening on http://%s:%d, %s", self._settings.host, sock.getsockname()[1], self._summary())
            if not len(self._ledger.keyring) and self._settings.require_keys:
                log.warning("there is no API key yet, so every request is refused: llmgate keys create NAME")
            if not self._settings.require_keys and not is_loopback(self._settings.host):
                log.warning("keys are not required and others can reach %s: anybody may ask", self._settings.host)
            self._notifier.ready(self._summary())
            await self._stop.wait()
            await self._drain(server)
            if self._failure:
                raise self._failure
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
            await self._prober.stop()
            await self._relay.close()
            await self._ledger.close()
            self._request_log.close()

    async def _listen(self, sock: socket.socket) -> AsyncioServer:
        app = self._compose()
        # Routes are finished by startup(), so no connection is taken before it.
        server = await app.create_server(
            sock=sock,
            protocol=Connection,
            access_log=False,
            backlog=_BACKLOG,
            asyncio_server_kwargs={"start_serving": False},
        )
        assert server is not None
        await server.startup()  # type: ignore[no-untyped-call]
        started = server.start_serving()  # type: ignore[no-untyped-call]
        assert started is not None
        await started
        return server

    def _compose(self) -> Sanic[Any, Any]:
        settings, clock, wall = self._settings, self._clock, self._wall
        app: Sanic[Any, Any] = Sanic("llmgate", configure_logging=False, env_prefix=None)
        app.config.update(
            {
                "MOTD": False,
                "FALLBACK_ERROR_FORMAT": "json",
                "REQUEST_MAX_SIZE": settings.body_limit_bytes,
                "REQUEST_TIMEOUT": settings.receive_timeout_s,
                "KEEP_ALIVE_TIMEOUT": settings.idle_timeout_s,
                "SEND_TIMEOUT": settings.send_timeout_s,
                # Above the deadline that the gate keeps itself, or Sanic would answer 503 in its place.
                "RESPONSE_TIMEOUT": settings.request_timeout_s + 30,
            }
        )
        errors.install(app, settings.body_limit_bytes)
        conversations = Conversations(
            settings,
            door=self._door,
            view=self._view,
            relay=self._relay,
            waiting=self._waiting,
            request_log=self._request_log,
            metrics=self._metrics,
            clock=clock,
            wall=wall,
            dice=lambda: random.getrandbits(64),
        )
        stale = settings.stale_after_s
        app.blueprint(openai.blueprint(conversations, door=self._door, view=self._view, started=wall()))
        app.blueprint(
            admin.blueprint(
                door=self._door, view=self._view, ledger=self._ledger, clock=clock, wall=wall, stale_after_s=stale
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
            )
        )
        return app

    def _on_stop_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _chore_ended(self, chore: asyncio.Task[None]) -> None:
        """A gate that can no longer look after itself drains and ends; the service manager starts a fresh one."""
        if not chore.cancelled() and chore.exception():
            self._failure = chore.exception()
            log.critical("a part of the gate has failed, draining: %r", self._failure)
            self._stop.set()

    def _take_contents(self, contents: Contents) -> None:
        self._view.apply(Leased(leases.live(contents.leases, self._wall())))

    def _node_moved(self, node: Node) -> None:
        self._metrics.transitions.labels(node.name, node.health.state.word).inc()
        self._prober.say(node.name)

    async def _housekeeping(self) -> None:
        """Notice what changes without a request: other processes' writes, leases that end, a new nodes file."""
        seen = self._nodes_stamp()
        while True:
            try:
                await asyncio.wait_for(self._reload.wait(), _HOUSEKEEPING_S)
            except asyncio.TimeoutError:
                pass
            stamp = self._nodes_stamp()
            if self._reload.is_set() or stamp != seen:
                seen = stamp
                self._reload.clear()
                self._read_nodes_again()
            try:
                await self._ledger.refresh()
                await self._end_leases()
            except StoreError as error:
                log.error("%s; going on with what was read before", error)
            if self._summary() != self._status:
                self._status = self._summary()
                self._notifier.status(self._status)

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

    async def _watchdog(self) -> None:
        """Ping systemd from the event loop: a loop that is stuck stops pinging."""
        interval = self._notifier.watchdog_interval_s
        while interval:
            self._notifier.watchdog()
            await asyncio.sleep(interval)

    async def _drain(self, server: AsyncioServer) -> None:
        door = self._door
        door.draining = True
        self._notifier.stopping(f"draining, {door.active} requests running")
        log.info("draining: %d requests running, at most %g s", door.active, self._settings.drain_seconds)
        waiting = [asyncio.create_task(door.empty()), asyncio.create_task(self._hurry.wait())]
        await asyncio.wait(waiting, timeout=self._settings.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        server.close()  # type: ignore[no-untyped-call]
        if door.active:
            log.warning("cutting %d requests that are still running", door.active)
        else:
            await self._flush(server)
        for connection in list(server.connections):
            # Not Sanic's own abort(), which takes the transport away from a handler that is still to be cancelled.
            if connection.transport:
                connection.transport.abort()
        await door.close()
        log.info("stopped")

    async def _flush(self, server: AsyncioServer) -> None:
        """Let the last bytes of finished answers reach slow clients, for a short while."""
        end = self._clock() + _FLUSH_S
        while server.connections and self._clock() < end:
            for connection in list(server.connections):
                connection.close_if_idle()
            await asyncio.sleep(0.01)

    def _summary(self) -> str:
        nodes = self._view.fleet.nodes.values()
        usable = sum(node.standing(self._clock(), self._settings.stale_after_s).usable for node in nodes)
        return f"{usable} of {len(nodes)} nodes take work"
