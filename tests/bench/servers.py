"""The servers that are measured, each a process started with the room that a scenario needs.

Owns: command lines, and with them what is fair: every side gets the same GGUF, threads, slots and cells; everything
else is its own default, but for the flags that a scenario names. Refuses to know: what is asked of a server.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from llmnode.settings import Settings
from tests.bench import rival
from tests.processes import free_port

OURS, LLAMA_SERVER, PYTHON_SERVER = "llmnode", "llama-server", "llama_cpp.server"
LAUNCHER = Path(__file__).with_name("python_server.py")
_START_S = 300.0
_ENGINE_SECONDS = re.compile(r'^llmnode_engine_seconds_total{part="(\w+)"} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Room:
    """slots: streams at once.      n_ctx: tokens in each.      cells: tokens in all of them, 0 for slots * n_ctx.

    unified: the rival too keeps one cache for all slots; its default with a given number of slots is one part each.
    """

    slots: int
    n_ctx: int
    cells: int = 0
    unified: bool = False

    @property
    def all_cells(self) -> int:
        return self.cells or self.slots * self.n_ctx


class Server:
    """One running server with the processes that it starts, ended when the `with` block ends.

    ready: the path that answers 200 when it can be asked.      env: beside this process's own environment.
    cores: those that it may run on, all where there is none.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        port: int,
        folder: Path,
        ready: str,
        *,
        cores: frozenset[int] = frozenset(),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self.log = folder / f"{name.replace(' ', '-')}-{port}.log"
        self.command, self._ready, self._cores = command, ready, cores
        self._env = None if env is None else {**os.environ, **env}

    def __enter__(self) -> Server:
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env=self._env,
                preexec_fn=(lambda: os.sched_setaffinity(0, self._cores)) if self._cores else None,
            )
        end = time.monotonic() + _START_S
        while True:
            if self.process.poll() is not None or time.monotonic() > end:
                self.__exit__(None)
                raise SystemExit(f"bench: {self.name} did not start: {' '.join(self.command)}\n{self.last_words()}")
            try:
                if httpx.get(self.url + self._ready, timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.1)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed and issubclass(failed, Exception):
            print(f"bench: last words of {self.name}:\n{self.last_words()}", file=sys.stderr)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):  # llmnode drains after the first
            self.process.send_signal(number)
            try:
                self.process.wait(5)
                return
            except subprocess.TimeoutExpired:
                continue

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def peak_mib(self) -> float:
        """Most memory it ever held, in MiB (VmHWM of Linux's /proc)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def engine_seconds(self) -> dict[str, float]:
        """Where the engine's time went since the start, by its own account in /metrics: llmnode's only, else empty."""
        if self.name != OURS:
            return {}
        text = httpx.get(self.url + "/metrics", timeout=30).text
        return {part: float(value) for part, value in _ENGINE_SECONDS.findall(text)}

    def cpu_s(self) -> float:
        """Seconds of processor time that its processes have used. Raises SystemExit when it has ended."""
        times = [process.cpu_times() for process in self._processes()]
        return float(sum(spent.user + spent.system for spent in times))

    def private_kib(self) -> float:
        """Memory that its processes share with nobody, in KiB (unique set size)."""
        return float(sum(process.memory_full_info().uss for process in self._processes())) / 1024

    def _processes(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise SystemExit(f"bench: {self.name} ended by itself:\n{self.last_words()}") from None


def llmnode(model: Path, room: Room, threads: int, folder: Path, flags: Mapping[str, str]) -> Server:
    """Ours. `flags`: settings beyond the room's; those that this llmnode does not know are left out."""
    port = free_port()
    values = {
        "port": str(port), "model": str(model), "model-id": "bench", "threads": str(threads),
        "slots": str(room.slots), "n-ctx": str(room.n_ctx), "kv-cells": str(room.all_cells),
        **{name: value for name, value in flags.items() if knows(name)},
    }  # fmt: skip
    command = [sys.executable, "-m", "llmnode", "serve", *_flags(values)]
    return Server(OURS, command, port, folder, "/ready")


def llama_server(model: Path, room: Room, threads: int, folder: Path, flags: Mapping[str, str]) -> Server:
    """llama.cpp's own. `flags` as it spells them."""
    port = free_port()
    values = {
        "host": "127.0.0.1", "port": str(port), "model": str(model), "threads": str(threads),
        "threads-batch": str(threads), "parallel": str(room.slots), "ctx-size": str(room.all_cells),
        "n-gpu-layers": "0", **({"kv-unified": ""} if room.unified else {}), **flags,
    }  # fmt: skip
    return Server(LLAMA_SERVER, [str(rival.llama_server()), *_flags(values)], port, folder, "/health")


def python_server(model: Path, room: Room, threads: int, folder: Path, flags: Mapping[str, str]) -> Server:
    """llama-cpp-python's. It answers one request at a time; a new one waits here and does not end the one before.

    logits_all is on by default, for `logprobs`: it would compute the logits of every prompt token.
    """
    port = free_port()
    values = {
        "host": "127.0.0.1", "port": str(port), "model": str(model), "n_threads": str(threads),
        "n_threads_batch": str(threads), "n_ctx": str(room.n_ctx), "interrupt_requests": "false",
        "logits_all": "false", "verbose": "false", **flags,
    }  # fmt: skip
    return Server(
        PYTHON_SERVER, [str(rival.python_server()), str(LAUNCHER), *_flags(values)], port, folder, "/v1/models"
    )


RIVALS = {LLAMA_SERVER: llama_server, PYTHON_SERVER: python_server}


def knows(flag: str) -> bool:
    """Whether llmnode has a setting that is spelled --FLAG."""
    return flag.replace("-", "_") in {field.name for field in dataclasses.fields(Settings)}


def end_cleanly() -> None:
    """Take SIGTERM as Ctrl-C, so that servers end with their benchmark: one left behind would disturb the next."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def _flags(values: Mapping[str, str]) -> list[str]:
    """--name value for each; --name alone where the value is empty."""
    return [word for name, value in values.items() for word in (f"--{name}", value) if word]
