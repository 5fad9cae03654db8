"""What the gate counts, in a Prometheus registry of its own (base units, bounded labels).

Label values come from configuration and from nodes, never from clients: a model that nobody serves is counted as
"unknown", so that nobody can make series without end. Names of keys are the operator's, and for all that bounded: those
beyond the first MOST_KEYS share a label, and one that is revoked has none.
"""

from __future__ import annotations

import os
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from llmgate.core.fleet import Fleet
from llmgate.core.health import Condition
from llmgate.core.keys import ANONYMOUS, Keyring
from llmgate.core.record import Record
from llmgate.figures import Figures
from llmnode.service import lag, process
from llmnode.service.process import Process
from llmnode.service.release import release

# From a warm prefix on a GPU to a long prompt on a CPU.
_TTFT_BUCKETS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100)
# From a node that hands its streams over to a wait for the only one there is to come back.
_PAUSE_BUCKETS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 250)
_DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
# The first is of those that went at once.
_QUEUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
# From a file of this host to a Redis that has to be waited for.
_STORE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# From a small model on a GPU to a large one on a CPU.
_TOKEN_BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3)
_SIZE_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
UNKNOWN = "unknown"
OTHERS = "(others)"
"""Stands for the keys that have no label of their own; no key can have that name."""
MOST_KEYS = 200
_KINDS = ("prompt", "cached", "completion")
_CPU = "llmgate_process_cpu_seconds"
_IN_FLIGHT = "llmgate_in_flight"
_QUEUE_LENGTH = "llmgate_queue_length"
_USAGE_WAITING = "llmgate_usage_rows_waiting"


class Metrics:
    """Counters and histograms, fed by the API layer; fleet gauges are read from the snapshot at each scrape.

    Each worker has its own, and all count into files that a scrape adds up (figures.py). A gauge is of the worker that
    answers, unless it is published: all see the same nodes, but each has requests of its own at them, and waiting.
    """

    def __init__(
        self,
        fleet: Callable[[], Fleet],
        waiting: Callable[[], Mapping[str, int]],
        clock: Callable[[], float],
        stale_after_s: float,
        figures: Figures | None = None,
        certificate_ends: Mapping[str, float | None] | None = None,
        unwritten: Callable[[], int] = lambda: 0,
        keyring: Callable[[], Keyring] = Keyring,
        lost: Mapping[str, Callable[[], int]] | None = None,
    ) -> None:
        """`waiting`: how many requests wait for a node, by model. With `figures`, /metrics shows what all workers have
        counted together. `certificate_ends`: whom this gate shows a certificate -> when that ends, in Unix time.
        `unwritten`: rows of usage that this worker has still to write. `lost`: how much it has failed to write down or
        to send, by what it is."""
        self._fleet, self._waiting, self._figures, self._unwritten = fleet, waiting, figures, unwritten
        self._keyring, self._lost = keyring, lost or {}
        self._named: tuple[Keyring | None, frozenset[str]] = (None, frozenset())
        self._told: dict[str, float] = {}
        self._models: dict[str, _OfModel] = {}
        self._keys: dict[str, _OfKey] = {}
        self.registry = CollectorRegistry()
        self.requests = Counter("llmgate_requests", "Requests answered", ["model", "status"], registry=self.registry)
        self.tokens = Counter(
            "llmgate_tokens", "Tokens of answered requests", ["model", "kind"], registry=self.registry
        )
        self.predicted = Counter(
            "llmgate_predicted_cached_tokens",
            "Prompt tokens of answered requests that the gate took for cached",
            ["model"],
            registry=self.registry,
        )
        self.routed = Counter(
            "llmgate_routed",
            "Requests that found a node, by policy and reason",
            ["policy", "reason"],
            registry=self.registry,
        )
        self.attempts = Counter(
            "llmgate_upstream_attempts", "Attempts at nodes", ["node", "outcome"], registry=self.registry
        )
        self.transitions = Counter(
            "llmgate_node_transitions", "States of health that nodes came to", ["node", "to"], registry=self.registry
        )
        self.resumes = Counter(
            "llmgate_resumes", "Attempts to go on with a broken answer", ["model", "outcome"], registry=self.registry
        )
        self.lost = Counter(
            "llmgate_streams_lost", "Answers that clients saw break off", ["model", "reason"], registry=self.registry
        )
        self.pause = Histogram(
            "llmgate_stream_pause_seconds",
            "Without content at the client, between one node's and the next one's",
            ["model"],
            buckets=_PAUSE_BUCKETS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "llmgate_time_to_first_token_seconds",
            "From the request's arrival to its first content",
            ["model"],
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "llmgate_request_duration_seconds",
            "From the request's arrival to its last byte",
            ["model"],
            buckets=_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.queued = Histogram(
            "llmgate_queue_seconds",
            "Waiting at the gate for a node with room, of requests that got their turn",
            ["model"],
            buckets=_QUEUE_BUCKETS,
            registry=self.registry,
        )
        self.turned_away = Counter(
            "llmgate_queue_refusals",
            "Requests that could not wait at the gate, or no longer",
            ["model", "reason"],
            registry=self.registry,
        )
        self.token_time = Histogram(
            "llmgate_time_per_output_token_seconds",
            "Of one stream, from its first token to its last, for each token after the first",
            ["model"],
            buckets=_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.sizes = Histogram(
            "llmgate_request_tokens",
            "Tokens of one answered request: prompt, completion",
            ["model", "kind"],
            buckets=_SIZE_BUCKETS,
            registry=self.registry,
        )
        self.key_requests = Counter("llmgate_key_requests", "Requests by key", ["key"], registry=self.registry)
        self.key_tokens = Counter(
            "llmgate_key_tokens", "Tokens of answered requests by key", ["key", "kind"], registry=self.registry
        )
        self.lost_records = Counter(
            "llmgate_lost_records", "What could not be written down or sent", ["what"], registry=self.registry
        )
        self.cpu = Counter(_CPU, "Processor time of all workers", registry=self.registry)
        self.lag = Histogram(
            "llmgate_event_loop_lag_seconds",
            "By how much a timer came late, twice a second in each worker",
            buckets=lag.BUCKETS,
            registry=self.registry,
        )
        self.usage = Counter("llmgate_usage_rows", "Requests for the usage ledger", ["outcome"], registry=self.registry)
        for outcome in ("written", "dropped"):
            self.usage.labels(outcome)
        self.limit_refusals = Counter(
            "llmgate_limit_refusals", "Requests over a limit of their key", ["limit"], registry=self.registry
        )
        self.limits_unavailable = Counter(
            "llmgate_limits_unavailable",
            "Requests of keys with limits while the counters could not be used",
            ["policy"],
            registry=self.registry,
        )
        self.limit_store = Histogram(
            "llmgate_limit_store_seconds",
            "Operations on the counters of keys with limits",
            ["operation"],
            buckets=_STORE_BUCKETS,
            registry=self.registry,
        )
        self.limit_store_failures = Counter(
            "llmgate_limit_store_failures", "Such operations that failed", ["operation"], registry=self.registry
        )
        self.closed = Counter(
            "llmgate_connections_closed",
            "Connections that were closed because there were too many",
            ["reason"],
            registry=self.registry,
        )
        self._gauges = _Gauges(
            fleet,
            self.in_flight,
            self.waiting,
            self.unwritten,
            self.processes,
            clock,
            stale_after_s,
            certificate_ends or {},
        )

    def text(self) -> bytes:
        """The scrape, in Prometheus' text format."""
        shown = CollectorRegistry()
        shown.register(_Live(self._figures or self.registry, self._labels()))
        shown.register(self._gauges)
        return generate_latest(shown)

    def count(self, record: Record, model: str, now: float) -> None:
        """A request has ended. `model`: UNKNOWN for one that nobody serves."""
        of = self._models.get(model) or self._models.setdefault(model, _OfModel(self, model))
        self.requests.labels(model, str(record.status)).inc()
        of.duration.observe(now - record.arrived)
        if record.first_content is not None:
            of.first_token.observe(record.first_content - record.arrived)
        usage, whose = record.usage, self._of_key(record.key) if record.key else None
        if whose:
            whose.requests.inc()
        if usage is None:
            return
        for index, tokens in enumerate((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)):
            of.tokens[index].inc(tokens)
            if whose:
                whose.tokens[index].inc(tokens)
        of.predicted.inc(record.predicted or 0)
        of.prompt.observe(usage.prompt_tokens)
        of.completion.observe(usage.completion_tokens)
        after = usage.completion_tokens - 1
        if record.stream and record.first_content is not None and after > 0:
            of.token_time.observe((now - record.first_content) / after)

    def _of_key(self, name: str) -> _OfKey:
        label = name if name in self._labels() else OTHERS
        return self._keys.get(label) or self._keys.setdefault(label, _OfKey(self, label))

    def _labels(self) -> frozenset[str]:
        """The keys that have a label of their own: the first ones that are live, for all workers the same."""
        ring = self._keyring()
        if self._named[0] is not ring:
            self._named = ring, frozenset([ANONYMOUS.name, *ring.names[:MOST_KEYS]])
        return self._named[1]

    def in_flight(self) -> dict[str, int]:
        """Requests at each listed node, of all workers. Those of the others are at most half a second old."""
        others = self._figures.others(_IN_FLIGHT) if self._figures else {}
        return {node.name: node.in_flight + int(others.get(node.name, 0)) for node in self._fleet().nodes.values()}

    def waiting(self) -> dict[str, int]:
        """Requests that wait for a node, by model, of all workers."""
        others = self._figures.others(_QUEUE_LENGTH) if self._figures else {}
        own = self._waiting()
        return {model: own.get(model, 0) + int(others.get(model, 0)) for model in {*own, *others}}

    def unwritten(self) -> int:
        """Rows of usage that are still to be written, of all workers."""
        others = self._figures.others(_USAGE_WAITING) if self._figures else {}
        return self._unwritten() + int(sum(others.values()))

    def publish(self) -> None:
        """Let the other workers see what only this one knows. Called twice a second."""
        self._add(self.cpu, _CPU, time.process_time())
        for what, count in self._lost.items():
            self._add(self.lost_records.labels(what), what, count())
        if self._figures:
            running = {node.name: node.in_flight for node in self._fleet().nodes.values() if node.in_flight}
            rows = {"rows": self._unwritten()}
            self._figures.publish({_IN_FLIGHT: running, _QUEUE_LENGTH: dict(self._waiting()), _USAGE_WAITING: rows})

    def _add(self, counter: Counter, name: str, total: float) -> None:
        """Bring a counter up to a total that somebody else counts in this process."""
        counter.inc(total - self._told.get(name, 0.0))
        self._told[name] = total

    def processes(self) -> tuple[Process | None, list[Process]]:
        """The gate's first process, and its workers; without `figures` this process is all there is."""
        if self._figures is None:
            own = process.look()
            return own, [own] if own else []
        found = (process.look(pid) for pid in sorted(self._figures.workers()))
        return process.look(os.getppid()), [one for one in found if one]


class _OfModel:
    """The series of one model. Looking each up by its labels took longer than to count."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.duration, self.first_token = metrics.duration.labels(model), metrics.first_token.labels(model)
        self.tokens = [metrics.tokens.labels(model, kind) for kind in _KINDS]
        self.predicted, self.token_time = metrics.predicted.labels(model), metrics.token_time.labels(model)
        self.prompt, self.completion = (metrics.sizes.labels(model, kind) for kind in ("prompt", "completion"))


class _OfKey:
    """The series of one key."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.requests = metrics.key_requests.labels(name)
        self.tokens = [metrics.key_tokens.labels(name, kind) for kind in _KINDS]


class _Live:
    """What was counted, without what was counted of keys that are gone."""

    def __init__(self, counted: Figures | CollectorRegistry, keys: Iterable[str]) -> None:
        self._counted, self._keys = counted, {*keys, OTHERS}

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for metric in self._counted.collect():
            metric.samples = [s for s in metric.samples if "key" not in s.labels or s.labels["key"] in self._keys]
            yield metric


class _Gauges:
    def __init__(
        self,
        fleet: Callable[[], Fleet],
        in_flight: Callable[[], dict[str, int]],
        waiting: Callable[[], Mapping[str, int]],
        unwritten: Callable[[], int],
        processes: Callable[[], tuple[Process | None, list[Process]]],
        clock: Callable[[], float],
        stale_after_s: float,
        certificate_ends: Mapping[str, float | None],
    ) -> None:
        self._fleet, self._in_flight, self._waiting = fleet, in_flight, waiting
        self._unwritten, self._processes = unwritten, processes
        self._clock, self._stale_after_s = clock, stale_after_s
        self._certificate_ends = certificate_ends

    def describe(self) -> list[Metric]:
        """Nothing to check against: the registry would otherwise collect once to find out."""
        return []

    def collect(self) -> Iterator[Metric]:
        fleet, now, running = self._fleet(), self._clock(), self._in_flight()
        states = Tally(node.standing(now, self._stale_after_s).state for node in fleet.nodes.values())
        nodes = GaugeMetricFamily("llmgate_nodes", "Nodes by state as this gate sees them", labels=["state"])
        for state, count in sorted(states.items()):
            nodes.add_metric([state], count)
        yield nodes
        usable = GaugeMetricFamily("llmgate_node_usable", "1 when the node takes new work", labels=["node"])
        in_flight = GaugeMetricFamily(_IN_FLIGHT, "Requests of this gate at a node now", labels=["node"])
        health = GaugeMetricFamily("llmgate_node_state", "1 for the state of a node's health", labels=["node", "state"])
        share = GaugeMetricFamily("llmgate_node_share", "How much of its slots is used by choice", labels=["node"])
        lease = GaugeMetricFamily("llmgate_node_lease", "1 while a drain lease is on the node", labels=["node", "end"])
        for node in fleet.nodes.values():
            usable.add_metric([node.name], float(node.standing(now, self._stale_after_s).usable))
            in_flight.add_metric([node.name], running[node.name])
            share.add_metric([node.name], node.share(now))
            current = node.health.at(now).state
            for condition in Condition:
                health.add_metric([node.name, condition.word], float(current is condition))
            ends = node.lease and ("stays" if node.lease.expires is None else "expires")
            for end in ("expires", "stays"):
                lease.add_metric([node.name, end], float(ends == end))
        queue = GaugeMetricFamily(_QUEUE_LENGTH, "Requests that wait for a node with room", labels=["model"])
        for model, length in self._waiting().items():
            queue.add_metric([model], length)
        certificates = GaugeMetricFamily(
            "llmgate_certificate_end_seconds", "When the certificate shown to them ends, in Unix time", labels=["to"]
        )
        for to, moment in self._certificate_ends.items():
            if moment is not None:
                certificates.add_metric([to], moment)
        yield GaugeMetricFamily(_USAGE_WAITING, "Requests not in the usage ledger yet", value=self._unwritten())
        info = GaugeMetricFamily("llmgate_build_info", "1; what runs here", labels=["release"])
        info.add_metric([release()], 1)
        yield info
        yield from self._of_processes()
        yield certificates
        yield usable
        yield in_flight
        yield queue
        yield health
        yield share
        yield lease

    def _of_processes(self) -> Iterator[Metric]:
        first, workers = self._processes()
        everybody = [one for one in (first, *workers) if one]
        yield _gauge("llmgate_workers", "Processes that serve, or end what they have begun", len(workers))
        memory = sum(one.resident_bytes for one in {id(one): one for one in everybody}.values())
        yield _gauge("llmgate_process_resident_memory_bytes", "Memory of all processes of the gate", memory)
        if workers:
            fullest = max(workers, key=lambda one: one.open_files / (one.open_files_limit or float("inf")))
            yield _gauge("llmgate_process_open_fds", "Open files of the worker that has most", fullest.open_files)
            yield _gauge("llmgate_process_max_fds", "How many it may have", fullest.open_files_limit)
        if first:
            yield _gauge("llmgate_process_start_time_seconds", "When the gate was started, Unix time", first.started)


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=value)
