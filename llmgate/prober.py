"""Asks every node for its report, about once a second, and tells the fleet what came.

One task a node, so that a node that does not answer delays nobody else. Says each change of standing once in the log.
Knows no HTTP library: it is given a `fetch`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Protocol

from llmgate.core.fleet import Event, Fleet, Lost, Missed, Node, Reported
from llmgate.core.health import Condition
from llmnode.wire.node import Report

log = logging.getLogger("llmgate.prober")

_JITTER = 0.1


class Fetch(Protocol):
    """GET a path of a node, with the fleet token -> (status, ETag or "", body). `base`: http://host:port.

    Raises OSError whose text is the reason, ConnectionRefusedError when no connection could be made.
    """

    async def __call__(self, base: str, path: str, *, etag: str, timeout_s: float) -> tuple[int, str, bytes]: ...


class Prober:
    """Keeps one polling task for each listed node."""

    def __init__(
        self,
        fleet: Callable[[], Fleet],
        publish: Callable[[Event], None],
        fetch: Fetch,
        clock: Callable[[], float],
        dice: Callable[[], float],
        *,
        interval_s: float,
        stale_after_s: float,
    ) -> None:
        self._fleet, self._publish, self._fetch, self._clock, self._dice = fleet, publish, fetch, clock, dice
        self._interval_s, self._stale_after_s = interval_s, stale_after_s
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._etags: dict[str, str] = {}
        self._said: dict[str, tuple[str, bool, bool]] = {}
        self._causes: dict[str, set[str]] = {}

    def follow(self) -> None:
        """Poll the nodes that are listed now: start what is new, end what is gone. Needs a running loop."""
        wanted = {(node.name, node.url) for node in self._fleet().nodes.values()}
        for key in [key for key in self._tasks if key not in wanted]:
            self._tasks.pop(key).cancel()
            self._etags.pop(key[0], None)
            self._said.pop(key[0], None)
            self._causes.pop(key[0], None)
        for name, url in sorted(wanted - set(self._tasks)):
            self._tasks[name, url] = asyncio.create_task(self._poll_on(name, url), name=f"poll {name}")

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def first_round(self, patience_s: float) -> None:
        """Wait until every listed node has answered or failed once, or the time is up."""
        end = self._clock() + patience_s
        while self._clock() < end:
            if all(node.health.since is not None for node in self._fleet().nodes.values()):
                return
            await asyncio.sleep(0.01)

    async def _poll_on(self, name: str, url: str) -> None:
        """Until the node is listed there no more. Being cancelled only hurries that: a library may swallow it
        (`asyncio.wait_for` before Python 3.12 does at times), and a task that polls on keeps a gate from ending."""
        while self._tasks.get((name, url)) is asyncio.current_task():
            started = self._clock()
            node = self._fleet().nodes.get(name)
            if node is not None:
                self._publish(await self._poll_safely(node))
                self.say(name)
            # Gates and workers that were started together must not ask a node together for ever.
            interval = self._interval_s * (1 - _JITTER + 2 * _JITTER * self._dice())
            await asyncio.sleep(max(0.0, started + interval - self._clock()))

    async def _poll_safely(self, node: Node) -> Event:
        """A poll that fails in a way nobody foresaw must not be the last one."""
        try:
            return await self._poll(node)
        except Exception as error:
            log.exception("polling node %s failed", node.name)
            return Missed(node.name, f"polling it failed: {error!r}", self._clock())

    async def _poll(self, node: Node) -> Event:
        """One poll, as the event to publish."""
        known = self._etags.get(node.name, "") if node.report else ""
        try:
            status, etag, body = await self._fetch(node.url, "/node", etag=known, timeout_s=self._stale_after_s)
        except ConnectionRefusedError as error:
            return Lost(node.name, str(error), self._clock())
        except OSError as error:
            return Missed(node.name, str(error), self._clock())
        now = self._clock()
        if status == 304 and known:
            return Reported(node.name, None, now)
        if status == 401:
            return Missed(node.name, "it refuses our fleet token (401)", now)
        if status != 200:
            return Missed(node.name, f"GET /node answered {status}", now)
        try:
            report = Report.parse(json.loads(body))
        except (ValueError, RecursionError) as error:
            return Missed(node.name, f"GET /node gave no report: {error}", now)
        self._etags[node.name] = etag
        return Reported(node.name, report, now)

    def say(self, name: str) -> None:
        """Log a node's standing when it has changed. Of a node on trial only the trial itself, not each request.

        While a node cannot be reached, each cause is logged once: behind the first that is mended may stand another.
        """
        node = self._fleet().nodes.get(name)
        if node is None:
            return
        now = self._clock()
        standing = node.standing(now, self._stale_after_s)
        slow = standing.full and node.health.at(now).state is Condition.SLOW_START
        trial = standing.state == "half-open" and not node.lease
        said, self._said[name] = self._said.get(name), (standing.state, standing.usable or trial, slow)
        causes = self._causes.setdefault(name, set())
        if standing.state != "unreachable":
            causes.clear()
        elif standing.why not in causes:
            causes.add(standing.why)
            said = None
        if said == self._said[name]:
            return
        if trial:
            log.warning("node %s is half open: one request at a time may try it", name)
        elif slow:
            log.info("node %s is up: ready at %s, starting slowly", name, node.url)
        elif standing.usable and said == (standing.state, True, True):
            log.info("node %s has its full share of the work", name)
        elif standing.usable:
            log.info("node %s is up: ready at %s", name, node.url)
        else:
            log.warning("node %s takes no work: %s (%s)", name, standing.state, standing.why)
