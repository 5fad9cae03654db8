"""The table of rows of `make bench-gate`: what is sent through which two proxies, and what figure would do.

Owns: traffic, figures and bars. Refuses to know: how a proxy is started and how a load is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.bench.doors import LIMITED, LITELLM, NGINX, NO_ACCOUNTS, ONE_WORKER, OURS
from tests.bench.figures import (
    ADDED_P50,
    ADDED_P99,
    CPU_TIME,
    REQUESTS_PER_CORE,
    REQUESTS_PER_S,
    STREAM_KIB,
    STREAMS_PER_CORE,
    STREAMS_PER_S,
    Bar,
    Figures,
)
from tests.bench.report import Board
from tests.bench.volley import Volley

STRAIGHT = "straight to the upstream"


class Range(Protocol):
    """Where a scenario fires: at the proxy that has its turn, or past it."""

    def fire(self, *, straight: bool = False, **load: Any) -> Volley:
        """Put a load (volley.Load without its address) on the proxy, or straight on the upstream. Raises RuntimeError
        when one request was not answered well."""

    def cpu_s(self) -> float:
        """Processor time that the proxy has used so far, in seconds."""

    def hold(self, streams: int) -> float:
        """Memory of the proxy in KiB while so many streams are open, less what it was before."""


class Scenario(Protocol):
    def __call__(self, range: Range, seed: int) -> Figures: ...


@dataclass(frozen=True)
class Closed:
    """`connections` clients, each asking again as soon as it is answered: how many answers come in a second, and how
    many a core of the proxy gives in one, by what each cost it. The first tells less of a fast proxy, which one core of
    load does not fill."""

    stream: bool
    connections: int = 64
    seconds: float = 4.0
    warm_up_s: float = 1.0

    def __call__(self, range: Range, seed: int) -> Figures:
        load: dict[str, Any] = {"stream": self.stream, "connections": self.connections, "seed": seed}
        straight = range.fire(straight=True, seconds=self.warm_up_s, **load)
        range.fire(seconds=self.warm_up_s, **load)  # connections are open and code is warm
        before = range.cpu_s()
        volley = range.fire(seconds=self.seconds, **load)
        each = (range.cpu_s() - before) / volley.answered
        return {
            STREAMS_PER_CORE if self.stream else REQUESTS_PER_CORE: 1 / each,
            STREAMS_PER_S if self.stream else REQUESTS_PER_S: volley.per_s,
            CPU_TIME: each,
            STRAIGHT: straight.per_s,
            "first byte, p99": volley.first_byte["p99"],
            "latency, p99": volley.latency["p99"],
            "connections closed by the proxy": volley.reopened,
        }


@dataclass(frozen=True)
class Open:
    """`rate` requests a second, whatever comes back: how much later answers come than straight from the upstream, of
    the same requests at the same moments, and what each cost the proxy."""

    rate: float
    seconds: float = 6.0

    def __call__(self, range: Range, seed: int) -> Figures:
        load: dict[str, Any] = {"stream": False, "rate": self.rate, "seconds": self.seconds, "seed": seed}
        range.fire(**{**load, "seconds": 1.0})
        straight = range.fire(straight=True, **load)
        before = range.cpu_s()
        volley = range.fire(**load)
        return {
            CPU_TIME: (range.cpu_s() - before) / volley.answered,
            ADDED_P50: volley.latency["p50"] - straight.latency["p50"],
            ADDED_P99: volley.latency["p99"] - straight.latency["p99"],
            STRAIGHT: straight.latency["p99"],
        }


@dataclass(frozen=True)
class Held:
    """Streams that stay open after their first chunk: what each takes of the memory of a proxy that has not had so many
    before. What it keeps of them afterwards is nobody's any more, so each turn needs a fresh one."""

    streams: int = 128
    warm_up: int = 8

    def __call__(self, range: Range, seed: int) -> Figures:
        range.hold(self.warm_up)  # code and pools that are there once
        return {STREAM_KIB: range.hold(self.streams) / self.streams}


@dataclass(frozen=True)
class Row:
    """bars: by figure; figures without one are shown beside them.      ours: flags of our side.

    fresh: whether each turn begins with a proxy that has done nothing yet.
    """

    name: str
    title: str
    scenario: Scenario
    figures: tuple[str, ...]
    rival: str = NGINX
    bars: Mapping[str, Bar] = field(default_factory=dict)
    ours: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False

    def bar(self, size: str, figure: str) -> Bar | None:
        return self.bars.get(figure)


_STREAMS, _JSON = "streams of 50 chunks, 64 connections", "JSON, 64 connections"
_OPEN = "JSON, open loop at {:g} requests/s"
LITELLM_RATE = 30.0
"""Requests a second: a third of what LiteLLM's proxy reached at most on the machine of the figures."""
WORKERS_RATE = 400.0
"""Requests a second that leave two workers time for each other also where they share one core."""
MANY_CORES = 4
"""From here on two workers have cores of their own."""

ROWS = (
    Row("streams", f"{_STREAMS}, beside nginx", Closed(stream=True), (STREAMS_PER_S, STREAMS_PER_CORE),
        bars={STREAMS_PER_S: Bar(at_least=0.75)}),
    Row("streams-litellm", f"{_STREAMS}, beside LiteLLM", Closed(stream=True), (STREAMS_PER_S, STREAMS_PER_CORE),
        LITELLM, {STREAMS_PER_S: Bar(at_least=15)}),
    Row("json", f"{_JSON}, beside nginx", Closed(stream=False), (REQUESTS_PER_S, REQUESTS_PER_CORE),
        bars={REQUESTS_PER_S: Bar(at_least=0.25)}),
    Row("json-litellm", f"{_JSON}, beside LiteLLM", Closed(stream=False), (REQUESTS_PER_S, REQUESTS_PER_CORE),
        LITELLM, {REQUESTS_PER_S: Bar(at_least=15)}),
    Row("latency", f"{_OPEN.format(200)}, beside nginx", Open(200), (ADDED_P99, ADDED_P50),
        bars={ADDED_P99: Bar(at_most=0.005, own=True)}),
    Row("latency-litellm", f"{_OPEN.format(LITELLM_RATE)}, beside LiteLLM", Open(LITELLM_RATE), (ADDED_P99, ADDED_P50),
        LITELLM, {ADDED_P99: Bar(at_most=1.0)}),
    Row("workers", f"{_OPEN.format(WORKERS_RATE)}, two workers beside one", Open(WORKERS_RATE), (CPU_TIME,),
        ONE_WORKER, {CPU_TIME: Bar(at_most=1.15)}, {"workers": "2"}),
    Row("workers-full", f"{_JSON}, two workers beside one", Closed(stream=False), (REQUESTS_PER_S, CPU_TIME),
        ONE_WORKER, {REQUESTS_PER_S: Bar(at_least=1.7)} if (os.cpu_count() or 1) >= MANY_CORES else {},
        {"workers": "2"}),
    Row("ledger", f"{_JSON}, ledger on beside off", Closed(stream=False), (REQUESTS_PER_CORE, REQUESTS_PER_S),
        NO_ACCOUNTS, {REQUESTS_PER_CORE: Bar(at_least=0.9)}),
    Row("accounts", f"{_JSON}, limits and ledger on beside off", Closed(stream=False),
        (REQUESTS_PER_CORE, REQUESTS_PER_S), NO_ACCOUNTS, {REQUESTS_PER_CORE: Bar(at_least=0.9)}, {LIMITED: "yes"}),
    Row("accounts-streams", f"{_STREAMS}, limits and ledger on beside off", Closed(stream=True),
        (STREAMS_PER_CORE, STREAMS_PER_S), NO_ACCOUNTS, {STREAMS_PER_CORE: Bar(at_least=0.9)}, {LIMITED: "yes"}),
    Row("memory", "128 open streams, beside nginx", Held(), (STREAM_KIB,), fresh=True),
    Row("memory-litellm", "128 open streams, beside LiteLLM", Held(), (STREAM_KIB,), LITELLM, fresh=True),
)  # fmt: skip

BOARD = Board("bench-gate", ROWS, OURS)
