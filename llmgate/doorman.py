"""Who takes connections off the gate's listening sockets, and how many may be there at the same time.

A connection is counted from the moment in which it is accepted, so also while its TLS handshake goes on: who connects
and then says nothing takes a place like any other. When places run out:

1. An address that has `per_address` connections gets no more: the new one is reset at once, which costs a system call.
   Of IPv6 a whole /64 is one address, since that is what one host may pick its own from.
2. When all `limit` places are taken, those give way for whom nobody works: the oldest handshakes, then those that have
   been longest without a whole request. So a flood of connections that ask for nothing pushes out itself, and those
   that were answered before, but no running request.
3. When a request runs on each, the new connection is reset.

Accepting is done here and not by the event loop's server, which would count after the handshake only, and would take
all that wait at once: here a turn of the loop takes a few, and other workers the others. When the process has no more
open files, it rests a moment, and connections wait in the kernel's queue.

Knows sockets and counts; refuses to know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable
from heapq import nsmallest
from typing import Any, Protocol

log = logging.getLogger("llmgate.door")

_AT_ONCE = 8
"""Connections taken in one turn of the loop."""
_REST_S = 0.2
_SAY_EVERY_S = 60.0
_IN_VAIN_S = 0.1
"""After a search in which nobody could give way, the next one is not before this."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: close() sends a reset, and nothing is left of the connection."""

Taking = Callable[[Callable[[], None]], asyncio.Protocol]
"""Makes the protocol of a connection, from what it is to call when that has gone."""


class Held(Protocol):
    """A connection as it stands in the set of those that the gate has."""

    @property
    def spare_since(self) -> float | None: ...

    transport: Any


class Doorman:
    """Accepts for one worker. `count`: connections that it has now, handshakes included."""

    def __init__(
        self,
        connections: set[Any],
        *,
        limit: int,
        per_address: int,
        context: ssl.SSLContext | None,
        handshake_s: float,
        clock: Callable[[], float],
        turned: Callable[[str, int], None],
    ) -> None:
        """connections: those whose protocol is at work (`Held`).     per_address: 0 for any number.
        turned: told for what reason how many were closed: "address", "full", "spare"."""
        self._connections = connections
        self._limit, self._per_address = limit, per_address
        self._context, self._handshake_s = context, handshake_s
        self._clock, self._turned = clock, turned
        self._listening: set[socket.socket] = set()
        self._from: Counter[str] = Counter()
        self._shaking: dict[asyncio.Task[None], None] = {}
        self._unsaid: Counter[str] = Counter()
        self._may_say = self._may_search = 0.0
        self.count = 0

    def listen(self, sock: socket.socket, taking: Taking) -> None:
        """Take what connects to `sock`, until `close`."""
        self._listening.add(sock)
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock, taking)

    def close(self) -> None:
        """Take no more. What was taken goes on."""
        loop = asyncio.get_running_loop()
        for sock in self._listening:
            loop.remove_reader(sock.fileno())
            sock.close()
        self._listening.clear()

    async def abort(self) -> None:
        """End the handshakes that still go on."""
        for task in self._shaking:
            task.cancel()
        await asyncio.gather(*self._shaking, return_exceptions=True)

    def _accept(self, sock: socket.socket, taking: Taking) -> None:
        for _ in range(_AT_ONCE):
            try:
                conn, peer = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept a connection: %s", error.strerror)
                self._rest(sock, taking)
                return
            self._admit(conn, household(peer[0]) if isinstance(peer, tuple) else "", taking)

    def _rest(self, sock: socket.socket, taking: Taking) -> None:
        """No open file is free: what waits makes the socket readable, and the loop would turn for nothing."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(sock.fileno())
        loop.call_later(_REST_S, lambda: self.listen(sock, taking) if sock in self._listening else None)

    def _admit(self, conn: socket.socket, address: str, taking: Taking) -> None:
        if self._per_address and self._from[address] >= self._per_address:
            self._turn_away(conn, "address")
        elif self.count >= self._limit and not self._make_room():
            self._turn_away(conn, "full")
        else:
            conn.setblocking(False)
            self.count += 1
            self._from[address] += 1
            task = asyncio.get_running_loop().create_task(self._greet(conn, address, taking))
            self._shaking[task] = None
            task.add_done_callback(lambda done: self._shaking.pop(done, None))

    async def _greet(self, conn: socket.socket, address: str, taking: Taking) -> None:
        """Hand a connection over to its protocol, once the handshake is done."""
        gone = False

        def left() -> None:
            nonlocal gone
            if not gone:
                gone = True
                self.count -= 1
                self._from[address] -= 1
                if not self._from[address]:
                    del self._from[address]

        patience = {"ssl_handshake_timeout": self._handshake_s} if self._context else {}
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: taking(left), conn, ssl=self._context, **patience
            )
        except BaseException as error:
            left()
            conn.close()
            if not isinstance(error, OSError):
                raise

    def _make_room(self) -> bool:
        """Close some of those for whom nobody works; a part of them at once, as finding them is a look at all."""
        if self._clock() < self._may_search:
            return False
        batch = 1 + self._limit // 64
        shaking = [task for task, _ in zip(self._shaking, range(batch), strict=False)] if self._context else []
        for task in shaking:
            task.cancel()
        known = ((since, id(one), one) for one in self._connections if (since := one.spare_since) is not None)
        spare = [one for _, _, one in nsmallest(batch - len(shaking), known)]
        for one in spare:
            if one.transport:
                one.transport.abort()
        found = len(shaking) + len(spare)
        if not found:
            self._may_search = self._clock() + _IN_VAIN_S
            return False
        self._note("spare", found)
        return True

    def _turn_away(self, conn: socket.socket, why: str) -> None:
        with contextlib.suppress(OSError):
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        conn.close()
        self._note(why, 1)

    def _note(self, why: str, number: int) -> None:
        self._turned(why, number)
        self._unsaid[why] += number
        if (now := self._clock()) < self._may_say:
            return
        self._may_say = now + _SAY_EVERY_S
        said = ", ".join(f"{count} {_WHY[why]}" for why, count in sorted(self._unsaid.items()))
        log.warning("too many connections (%d are open), closed: %s; said once a minute", self.count, said)
        self._unsaid.clear()


_WHY = {
    "address": "new ones of addresses that have connections_per_address",
    "full": "new ones while a request ran on each of connections_limit",
    "spare": "that had asked for nothing, for new ones",
}


def household(address: str) -> str:
    """Whose connection it is, as far as an address tells: of IPv6 the /64, of IPv4 written as IPv6 the IPv4."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
