"""What a node says of itself in numbers: `llmnode_*` in base units, in a registry of its own.

Counts what passes the door here; what the engine and the host know is read from their snapshots when /metrics is asked,
so nothing is kept twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmnode.engine.types import Done, Event, Failed, Stats, Text
from llmnode.wire.node import Host, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class HostProbe:
    """Figures of the machine and of this process, measured again at most every `every_s` seconds.

    /node is polled about once a second and answers 304 when nothing has changed: a figure that moves with each look
    would spoil that.
    """

    def __init__(self, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._process = psutil.Process()
        self._cores = psutil.cpu_count() or 1
        psutil.cpu_percent(interval=None)  # the first call only marks the start of the interval
        self._host = self._measure()
        self._at = clock()

    def read(self) -> Host:
        now = self._clock()
        if now - self._at >= self._every_s:
            self._host, self._at = self._measure(), now
        return self._host

    def _measure(self) -> Host:
        memory = psutil.virtual_memory()
        return Host(
            cpu_count=self._cores,
            cpu_percent=float(psutil.cpu_percent(interval=None)),
            memory_total_bytes=int(memory.total),
            memory_available_bytes=int(memory.available),
            process_rss_bytes=int(self._process.memory_info().rss),
        )


class Metrics:
    """The counters of the door. `stats` gives the engine's snapshot, None while there is no engine."""

    def __init__(
        self,
        stats: Callable[[], Stats | None],
        probe: HostProbe,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._registry.register(_Snapshots(stats, probe))
        self.requests = Counter(
            "llmnode_requests", "Requests answered, by route and status", ("route", "status"), registry=self._registry
        )
        self.request_seconds = Histogram(
            "llmnode_request_seconds",
            "From a request's head to the last byte of its answer",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "llmnode_tokens",
            "Tokens of finished requests: of prompts, of those reused from the cache, of answers",
            ("kind",),
            registry=self._registry,
        )
        self._first = Histogram(
            "llmnode_time_to_first_token_seconds",
            "From the hand-over to the engine to the first text",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._between = Histogram(
            "llmnode_inter_token_seconds",
            "Between tokens of one answer",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._queued = Histogram(
            "llmnode_queue_seconds", "Waiting for a slot", buckets=_SECONDS, registry=self._registry
        )

    def meter(self) -> Meter:
        """Begin to measure one answer."""
        return Meter(self, self._clock)

    def text(self) -> bytes:
        """The body of /metrics."""
        return bytes(generate_latest(self._registry))


class Meter:
    """Follows the events of one answer. `first_token_s` and `usage` are for the log, None until known."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._began = clock()
        self._last: float | None = None
        self.first_token_s: float | None = None
        self.usage: Usage | None = None

    def observe(self, event: Event) -> None:
        now = self._clock()
        if isinstance(event, Text):
            self._on_text(now, len(event.ids))
        elif isinstance(event, Done):
            self.usage = event.usage
            tokens = self._metrics._tokens
            tokens.labels("prompt").inc(event.usage.prompt_tokens)
            tokens.labels("cached").inc(event.usage.cached_tokens)
            tokens.labels("completion").inc(event.usage.completion_tokens)
            self._metrics._queued.observe(event.queued_s)
        else:
            assert isinstance(event, Failed)

    def _on_text(self, now: float, tokens: int) -> None:
        if self._last is None:
            self.first_token_s = now - self._began
            self._metrics._first.observe(self.first_token_s)
        else:
            for _ in range(tokens):
                self._metrics._between.observe((now - self._last) / tokens)
        self._last = now


class _Snapshots(Collector):
    """The engine's and the host's own figures, read when they are asked for."""

    def __init__(self, stats: Callable[[], Stats | None], probe: HostProbe) -> None:
        self._stats = stats
        self._probe = probe

    def collect(self) -> Iterator[Metric]:
        host = self._probe.read()
        yield _gauge("llmnode_host_cpu_ratio", "CPU use of the host, 0 to 1", host.cpu_percent / 100)
        yield _gauge("llmnode_host_memory_bytes", "Memory of the host", host.memory_total_bytes)
        yield _gauge("llmnode_host_memory_available_bytes", "Memory that is free to use", host.memory_available_bytes)
        yield _gauge("llmnode_process_resident_memory_bytes", "Memory of this process", host.process_rss_bytes)
        stats = self._stats()
        if stats is None:
            return
        load, timings = stats.load, stats.timings
        yield _gauge("llmnode_slots", "Requests that can be answered at the same time", load.slots)
        yield _gauge("llmnode_requests_running", "Requests in a slot", load.running)
        yield _gauge("llmnode_requests_waiting", "Requests waiting for a slot", load.waiting)
        yield _gauge("llmnode_kv_cells", "Tokens that the cache can hold", load.kv_cells)
        yield _gauge("llmnode_kv_cells_used", "Tokens that the cache holds", load.kv_cells_used)
        yield _gauge("llmnode_queued_prompt_tokens", "Prompt tokens waiting to be computed", load.queued_prompt_tokens)
        yield _counter("llmnode_engine_steps", "Steps of the engine", timings.steps)
        seconds = CounterMetricFamily("llmnode_engine_seconds", "Where the engine's time went", labels=["part"])
        for part, value in (("decode", timings.decode_s), ("sample", timings.sample_s), ("other", timings.other_s)):
            seconds.add_metric([part], value)
        yield seconds
        tokens = CounterMetricFamily("llmnode_engine_tokens", "Tokens that the engine computed", labels=["kind"])
        tokens.add_metric(["prompt"], timings.prompt_tokens)
        tokens.add_metric(["completion"], timings.completion_tokens)
        yield tokens
        ends = CounterMetricFamily("llmnode_engine_requests", "Requests that left the engine", labels=["end"])
        for end in ("finished", "cancelled", "failed", "refused"):
            ends.add_metric([end], getattr(timings, end))
        yield ends


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=value)


def _counter(name: str, help: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, help, value=value)
