"""Starts the real programs for tests, on free ports, and ends them by their own process ids."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import httpx

T = TypeVar("T")
PATIENCE_S = 120.0
"""How long a test waits for something that must happen: generous, since a busy machine is no failure."""


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], T | None], what: str, patience_s: float = PATIENCE_S) -> T:
    """Poll until `condition()` is truthy and return it; AssertionError naming `what` after `patience_s` seconds."""
    end = time.monotonic() + patience_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {patience_s:g} s for {what}"
        time.sleep(0.02)


class Program:
    """One running program, its output kept in a file.

    `start` returns at once; `ready` waits until GET /ready answers 200 and fails early, with the log, if the program
    ends before. `url` is its base address on loopback. `command` starts it in place of `python -m MODULE`.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
    ):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.command = [*(command or (sys.executable, "-m", module)), *arguments]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLMNODE_", "LLMGATE_", "NOTIFY_SOCKET"))}
        clean.update(env or {})
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=clean,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str, **options: object) -> httpx.Response | None:
        """GET a path; None while nobody answers."""
        try:
            return httpx.get(self.url + path, timeout=10, **options)  # type: ignore[arg-type]
        except httpx.HTTPError:
            return None

    def ready(self) -> Program:
        def answered() -> bool:
            assert self.process.poll() is None, f"{self.command} ended with {self.process.returncode}:\n{self.output()}"
            response = self.get("/ready")
            return response is not None and response.status_code == 200

        wait_for(answered, f"{self.url}/ready\n{self.output()}")
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(patience_s)

    def stop(self) -> None:
        """End it: SIGTERM twice (the second does not wait for streams), SIGKILL if that did not help. Idempotent."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                return
            self.process.send_signal(number)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                continue
