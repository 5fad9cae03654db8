"""What a node says of itself in numbers: `llmnode_*` in base units, in a registry of its own.

Counts what passes the door here; what the engine and the host know is read from their snapshots when /metrics is asked,
so nothing is kept twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmnode.engine.pooling import Pooled
from llmnode.engine.types import Done, Event, Failed, Stats, Text, Timings
from llmnode.service import lag, process
from llmnode.service.release import release
from llmnode.wire.node import Host, State, Usage

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
    """The counters of the door. `stats` gives the engine's snapshot, None while there is no engine; `reported` how many
    hashes of prefixes the last report had; `gpus` how many GPUs the model is on; `certificate_end` when the certificate
    that is served ends, in Unix time, None without TLS; `state` where the node is in its life;
    `spans_lost` how much of traces could not be sent."""

    def __init__(
        self,
        stats: Callable[[], Stats | None],
        probe: HostProbe,
        clock: Callable[[], float] = time.monotonic,
        reported: Callable[[], float] = lambda: 0,
        gpus: Callable[[], float] = lambda: 0,
        certificate_end: Callable[[], float | None] = lambda: None,
        state: Callable[[], State] = lambda: State.READY,
        spans_lost: Callable[[], int] = lambda: 0,
    ) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._registry.register(_Snapshots(stats, probe, clock, gpus, certificate_end))
        self._registry.register(_OfProcess(state, spans_lost))
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
        self._prefill = Histogram(
            "llmnode_prefill_seconds",
            "From a slot to the first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.lag = Histogram(
            "llmnode_event_loop_lag_seconds",
            "By how much a timer came late, twice a second",
            buckets=lag.BUCKETS,
            registry=self._registry,
        )
        Gauge(
            "llmnode_reported_blocks", "Hashes of prefixes in the last answer to /node", registry=self._registry
        ).set_function(reported)

    def meter(self, choices: int = 1, prompts: int = 1) -> Meter:
        """Begin to measure the answers to one request: so many, to so many prompts."""
        return Meter(self, self._clock, choices, prompts)

    def count(self, usage: Usage) -> None:
        """A request has ended that cost so much."""
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)

    def text(self) -> bytes:
        """The body of /metrics."""
        return bytes(generate_latest(self._registry))


class Meter:
    """Follows the events of one request's choices. What is known of it is for the log and for traces.

    began: on the clock.    first_token_s: seconds from then, None until known.    usage: None until all have ended.
    ends: how choices ended, of those that did.    pooled_s: seconds that vectors waited and took, None for an answer.
    error: the code of what ended it badly, "" for nothing.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float], choices: int, prompts: int) -> None:
        self._metrics = metrics
        self._clock = clock
        self._choices = choices
        self._prompts = prompts
        self.began = clock()
        self._last: dict[int, float] = {}
        self.ends: dict[int, Done] = {}
        self.first_token_s: float | None = None
        self.usage: Usage | None = None
        self.pooled_s: tuple[float, float] | None = None
        self.error = ""

    def observe(self, choice: int, event: Event) -> None:
        if isinstance(event, Text):
            now = self._clock()
            last = self._last.get(choice)
            self._last[choice] = now
            if last is not None:
                tokens = len(event.ids)
                for _ in range(tokens):
                    self._metrics._between.observe((now - last) / tokens)
            elif self.first_token_s is None:
                self.first_token_s = now - self.began
                self._metrics._first.observe(self.first_token_s)
        elif isinstance(event, Done):
            self._metrics._queued.observe(event.queued_s)
            self._metrics._prefill.observe(event.prefill_s)
            self.ends[choice] = event
            if len(self.ends) == self._choices:
                self.usage = total({index: end.usage for index, end in self.ends.items()}, self._prompts)
                self._metrics.count(self.usage)
        else:
            assert isinstance(event, Failed)
            self.error = event.error.code or "failed"

    def pooled(self, pooled: Pooled) -> None:
        """The request was for vectors, and these are they."""
        self._metrics._queued.observe(pooled.queued_s)
        self.usage = Usage(prompt_tokens=pooled.tokens)
        self.pooled_s = pooled.queued_s, pooled.compute_s
        self._metrics.count(self.usage)


def total(answers: Mapping[int, Usage], prompts: int = 1) -> Usage:
    """What a request cost, of the cost of each of its answers, as many of each prompt in turn: a prompt counts once,
    and as cached what no answer to it had to compute."""
    usages = [usage for _, usage in sorted(answers.items())]
    size = max(1, len(usages) // prompts)
    each = [usages[start : start + size] for start in range(0, len(usages), size)]
    return Usage(
        prompt_tokens=sum(max(usage.prompt_tokens for usage in part) for part in each),
        cached_tokens=sum(min(usage.cached_tokens for usage in part) for part in each),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
    )


class _Snapshots(Collector):
    """The engine's, the host's and the certificate's own figures, read when they are asked for."""

    def __init__(
        self,
        stats: Callable[[], Stats | None],
        probe: HostProbe,
        clock: Callable[[], float],
        gpus: Callable[[], float],
        certificate_end: Callable[[], float | None],
    ) -> None:
        self._stats = stats
        self._probe = probe
        self._clock = clock
        self._gpus = gpus
        self._certificate_end = certificate_end

    def collect(self) -> Iterator[Metric]:
        host = self._probe.read()
        yield _gauge("llmnode_host_cpu_ratio", "CPU use of the host, 0 to 1", host.cpu_percent / 100)
        yield _gauge("llmnode_host_memory_bytes", "Memory of the host", host.memory_total_bytes)
        yield _gauge("llmnode_host_memory_available_bytes", "Memory that is free to use", host.memory_available_bytes)
        end = self._certificate_end()
        if end is not None:
            yield _gauge("llmnode_certificate_end_seconds", "When the certificate ends, in Unix time", end)
        stats = self._stats()
        if stats is None:
            return
        now = self._clock()
        late = 0.0 if stats.step_deadline is None else max(0.0, now - stats.step_deadline)
        yield _gauge("llmnode_engine_heartbeat_age_seconds", "Since the engine's last step", now - stats.heartbeat)
        yield _gauge("llmnode_gpus", "GPUs that the model is on", self._gpus())
        yield _gauge("llmnode_engine_step_overdue_seconds", "By how much the step now running is late", late)
        for name, meaning, value in _GAUGES:
            yield _gauge(name, meaning, value(stats))
        for name, meaning, count in _COUNTERS:
            yield CounterMetricFamily(name, meaning, value=count(stats.timings))
        for name, meaning, label, counts in _LABELLED:
            family = CounterMetricFamily(name, meaning, labels=[label])
            for kind, count in counts.items():
                family.add_metric([kind], count(stats.timings))
            yield family


class _OfProcess(Collector):
    """What the process is, and what the kernel says of it."""

    def __init__(self, state: Callable[[], State], spans_lost: Callable[[], int]) -> None:
        self._state, self._spans_lost = state, spans_lost

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("llmnode_build_info", "1; what runs here", labels=["release"])
        info.add_metric([release()], 1)
        yield info
        states, now = (
            GaugeMetricFamily("llmnode_state", "1 for where the node is in its life", labels=["state"]),
            self._state(),
        )
        for state in State:
            states.add_metric([state.value], float(state is now))
        yield states
        lost = CounterMetricFamily("llmnode_lost_records", "What could not be sent", labels=["what"])
        lost.add_metric(["spans"], self._spans_lost())
        yield lost
        own = process.look()
        if own is None:
            return
        yield _gauge("llmnode_process_resident_memory_bytes", "Memory of this process", own.resident_bytes)
        yield CounterMetricFamily("llmnode_process_cpu_seconds", "Processor time of it", value=own.cpu_seconds)
        yield _gauge("llmnode_process_open_fds", "Open files of this process", own.open_files)
        yield _gauge("llmnode_process_max_fds", "How many it may have", own.open_files_limit)
        yield _gauge("llmnode_process_start_time_seconds", "When it was started, in Unix time", own.started)


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=value)


_GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("llmnode_slots", "Requests that can be answered at the same time", attrgetter("load.slots")),
    ("llmnode_requests_running", "Requests in a slot", attrgetter("load.running")),
    ("llmnode_requests_waiting", "Requests waiting for a slot", attrgetter("load.waiting")),
    ("llmnode_queued_prompt_tokens", "Prompt tokens waiting to be computed", attrgetter("load.queued_prompt_tokens")),
    ("llmnode_predicted_wait_seconds", "Until one more request should get a slot", attrgetter("load.wait_s")),
    ("llmnode_prompt_bytes_per_token", "Canonical bytes of a prompt token, lately", attrgetter("load.bytes_per_token")),
    ("llmnode_prefill_tokens_per_second", "Tokens a second of long prompts, lately", attrgetter("load.prefill_tps")),
    ("llmnode_decode_tokens_per_second", "Answer tokens computed a second, lately", attrgetter("load.decode_tps")),
    ("llmnode_kv_cells", "Tokens that the KV cache can hold", attrgetter("load.kv_cells")),
    ("llmnode_kv_cells_used", "Cells that running requests hold", attrgetter("load.kv_cells_used")),
    ("llmnode_kv_cells_idle", "Cells that only idle prefixes hold", attrgetter("cells_idle")),
    ("llmnode_prefixes", "Idle prefixes in the KV cache", attrgetter("prefixes")),
    ("llmnode_prompt_cache_sequences", "Sequences in host RAM", attrgetter("host_prefixes")),
    ("llmnode_prompt_cache_bytes", "Memory that the sequences in host RAM take", attrgetter("host_bytes")),
)

_COUNTERS: tuple[tuple[str, str, Callable[[Timings], float]], ...] = (
    ("llmnode_engine_steps", "Steps of the engine", attrgetter("steps")),
    ("llmnode_prefixes_evicted", "Idle prefixes that gave their cells back", attrgetter("evicted")),
    ("llmnode_cache_compactions", "Times that running answers were moved to lower cells", attrgetter("compacted")),
    ("llmnode_prompt_cache_saved", "Sequences taken to host RAM", attrgetter("saved")),
    ("llmnode_prompt_cache_restored", "Sequences brought back from host RAM", attrgetter("restored")),
)

_LABELLED: tuple[tuple[str, str, str, Mapping[str, Callable[[Timings], float]]], ...] = (
    (
        "llmnode_engine_seconds",
        "Where the time of the engine's steps went",
        "part",
        {"decode": attrgetter("decode_s"), "sample": attrgetter("sample_s"), "other": attrgetter("other_s")},
    ),
    (
        "llmnode_engine_tokens",
        "Tokens of prompts and answers that were computed, and tokens of prompts that were found instead",
        "kind",
        {
            "prompt": attrgetter("prompt_tokens"),
            "cached": attrgetter("cached_tokens"),
            "completion": attrgetter("completion_tokens"),
        },
    ),
    (
        "llmnode_engine_requests",
        "Requests that left the engine",
        "end",
        {end: attrgetter(end) for end in ("finished", "cancelled", "failed", "refused")},
    ),
    (
        "llmnode_preempted",
        "Running answers that gave way: to host RAM, or dropped and computed again",
        "how",
        {"swapped": attrgetter("swapped"), "dropped": attrgetter("dropped")},
    ),
    (
        "llmnode_draft_tokens",
        "Tokens that prompt lookup proposed",
        "result",
        {"accepted": attrgetter("accepted"), "rejected": lambda timings: timings.drafted - timings.accepted},
    ),
)
