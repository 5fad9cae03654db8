"""Talk to systemd: the sd_notify protocol, which is one datagram of KEY=VALUE lines.

Source: the manual page sd_notify(3). Without NOTIFY_SOCKET in the environment every call is a no-op, so that the
same code runs under systemd, in a terminal and in a test.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends state to the service manager. Never raises: a lost notification must not take the service down."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        env = os.environ if environ is None else environ
        address = env.get("NOTIFY_SOCKET", "")
        # A leading "@" stands for the NUL byte of Linux's abstract socket namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        own = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = env.get("WATCHDOG_USEC", "")
        self._watchdog_s = int(usec) / 1e6 if own and usec.isdigit() else None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None

    @property
    def watchdog_interval_s(self) -> float | None:
        """Seconds between pings, half of systemd's limit as its manual advises; None when no watchdog is set."""
        return self._watchdog_s / 2 if self._watchdog_s else None

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}", socket.MSG_DONTWAIT)

    def reloading(self, status: str) -> None:
        """Settings are being read anew; `ready` ends it."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now}\nSTATUS={status}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1", socket.MSG_DONTWAIT)

    def extend_timeout(self, seconds: float) -> None:
        """Ask for more time to start or stop, from now; renew it while progress is made."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, message: str, flags: int = 0) -> None:
        """What is said once waits for room in the manager's queue; what is said again soon does not: an event loop that
        stands still for a status line would be worse than a lost one."""
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), flags, self._address)
        except OSError:
            pass
