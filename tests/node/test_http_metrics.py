"""The metrics page: every figure of the engine is on it, and every name on it is documented."""

from __future__ import annotations

import dataclasses
import re
import resource
import time
from pathlib import Path

import psutil
import pytest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from llmgate.core.fleet import Fleet, Lease, Leased, Listed
from llmgate.core.keys import Key, Keyring
from llmgate.core.record import Record
from llmgate.listing import Address
from llmgate.metrics import Metrics as GateMetrics
from llmnode.engine.types import Done, Finish, Stats, Text, Timings
from llmnode.metrics import HostProbe, Metrics, total
from llmnode.service import process
from llmnode.wire.node import Load, Usage

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(ll\w+)` \| (\w+) \|([^|]*)\| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def distinct_stats() -> Stats:
    """Every figure of the engine different from every other, and none of them nothing."""
    number = iter(range(1001, 2000))
    timings = Timings(**{field.name: next(number) for field in dataclasses.fields(Timings)})
    load = Load(**{field.name: next(number) for field in dataclasses.fields(Load)})
    rest = ("prefixes", "cells_idle", "host_prefixes", "host_bytes")
    return Stats(load, timings, heartbeat=900.0, step_deadline=990.5, **{name: next(number) for name in rest})


def exposed(text: bytes) -> dict[str, tuple[str, frozenset[str]]]:
    """Name -> (type, labels) of a metrics page. `le` belongs to histograms and is no label of ours."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name.endswith("_created"):
            continue
        labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
        found[name] = family.type, labels
    return found


def node_page(stats: Stats | None = None) -> bytes:
    metrics = Metrics(lambda: stats, HostProbe(), Clock(), certificate_end=lambda: 1.0)
    metrics.requests.labels("/v1/models", "200").inc()
    metrics.request_seconds.labels("/v1/models").observe(1)
    meter = metrics.meter()
    for event in (Text("a", (1,)), Text("b", (2,)), Done(Finish.STOP, Usage(3, 1, 2), 0.1, 0.1, 0.1)):
        meter.observe(0, event)
    return metrics.text()


def gate_page() -> bytes:
    fleet, ring = Fleet().apply(Listed((Address("a", "http://a"),))), Keyring([Key("x", "digest")])
    metrics = GateMetrics(
        lambda: fleet, lambda: {"tiny": 1}, lambda: 0.0, 3.0, certificate_ends={"clients": 1.0}, keyring=lambda: ring
    )
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase) and metric._labelnames:
            metric.labels(*["x"] * len(metric._labelnames))
    return metrics.text()


@pytest.mark.parametrize("program", ["llmnode", "llmgate"])
def test_the_docs_name_every_metric_with_its_type_and_labels(program: str) -> None:
    pages = {"llmnode": lambda: node_page(distinct_stats()), "llmgate": gate_page}
    documented = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _unit, _meaning in ROW.findall(PAGE.read_text())
        if name.startswith(program)
    }
    assert documented == exposed(pages[program]())


def test_every_row_of_the_page_is_read() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(ROW.findall(PAGE.read_text()))


def test_every_figure_of_the_engine_is_exposed() -> None:
    stats = distinct_stats()
    values = {sample.value for family in text_string_to_metric_families(node_page(stats).decode())
              for sample in family.samples}  # fmt: skip
    timings, load = dataclasses.asdict(stats.timings), dataclasses.asdict(stats.load)
    timings["drafted"] = stats.timings.drafted - stats.timings.accepted  # by result: the two add up to it
    others = {name: getattr(stats, name) for name in ("prefixes", "cells_idle", "host_prefixes", "host_bytes")}
    missing = {name for name, value in {**timings, **load, **others}.items() if value not in values}
    assert missing == set()
    known = {"load", "timings", "heartbeat", "step_deadline", "held", *others}
    assert {field.name for field in dataclasses.fields(Stats)} == known, "a new figure: expose it, then name it here"


def test_the_engine_that_hangs_is_seen_in_numbers() -> None:
    page = node_page(distinct_stats()).decode()
    assert "llmnode_engine_heartbeat_age_seconds 100.0" in page
    assert "llmnode_engine_step_overdue_seconds 9.5" in page
    idle = node_page(dataclasses.replace(distinct_stats(), step_deadline=None)).decode()
    assert "llmnode_engine_step_overdue_seconds 0.0" in idle


def test_a_node_without_an_engine_still_answers() -> None:
    names = exposed(node_page(None))
    assert "llmnode_requests_total" in names
    assert "llmnode_slots" not in names


@pytest.mark.parametrize(
    ("lease", "expires", "stays"),
    [(None, 0, 0), (Lease("a", "ansible", "", 1.0, 901.0), 1, 0), (Lease("a", "operator", "", 1.0, None), 0, 1)],
)
def test_a_drain_that_somebody_must_end_is_told_from_one_that_ends_by_itself(
    lease: Lease | None, expires: int, stays: int
) -> None:
    fleet = Fleet().apply(Listed((Address("a", "http://a"),))).apply(Leased((lease,) if lease else ()))
    page = GateMetrics(lambda: fleet, dict, lambda: 0.0, 3.0).text().decode()
    assert f'llmgate_node_lease{{end="expires",node="a"}} {expires}.0' in page
    assert f'llmgate_node_lease{{end="stays",node="a"}} {stays}.0' in page


def test_a_prompt_that_several_choices_share_is_counted_once() -> None:
    metrics = Metrics(lambda: None, HostProbe(), Clock())
    meter = metrics.meter(choices=2)
    meter.observe(0, Text("a", (1,)))
    meter.observe(0, Done(Finish.STOP, Usage(10, 4, 1), 0.0, 0.0, 0.0))
    assert meter.usage is None
    meter.observe(1, Done(Finish.STOP, Usage(10, 9, 7), 0.0, 0.0, 0.0))
    assert meter.usage == Usage(10, 4, 8)
    page = metrics.text().decode()
    assert 'llmnode_tokens_total{kind="prompt"} 10.0' in page
    assert 'llmnode_tokens_total{kind="cached"} 4.0' in page
    assert 'llmnode_tokens_total{kind="completion"} 8.0' in page


def test_times_between_tokens_are_those_of_one_choice() -> None:
    clock = Clock()
    metrics = Metrics(lambda: None, HostProbe(clock=clock), clock)
    meter = metrics.meter(choices=2)
    for choice, after in ((0, 1.0), (1, 1.0), (0, 1.0), (1, 1.0)):
        clock.now += after
        meter.observe(choice, Text("a", (1,)))
    page = metrics.text().decode()
    assert "llmnode_inter_token_seconds_count 2.0" in page
    assert "llmnode_inter_token_seconds_sum 4.0" in page
    assert "llmnode_time_to_first_token_seconds_count 1.0" in page
    assert meter.first_token_s == 1.0


def test_several_tokens_at_once_share_the_time_they_took() -> None:
    clock = Clock()
    metrics = Metrics(lambda: None, HostProbe(clock=clock), clock)
    meter = metrics.meter()
    meter.observe(0, Text("a", (1,)))
    clock.now += 3.0
    meter.observe(0, Text("bcd", (2, 3, 4)))
    page = metrics.text().decode()
    assert "llmnode_inter_token_seconds_count 3.0" in page
    assert "llmnode_inter_token_seconds_sum 3.0" in page


def test_a_request_costs_its_prompt_once() -> None:
    assert total({0: Usage(5, 2, 3)}) == Usage(5, 2, 3)
    assert total({2: Usage(5, 4, 5), 0: Usage(5, 0, 3), 1: Usage(5, 4, 4)}) == Usage(5, 0, 12)
    four = {3: Usage(7, 6, 1), 0: Usage(5, 0, 3), 1: Usage(5, 4, 4), 2: Usage(7, 1, 2)}
    assert total(four, prompts=2) == Usage(12, 1, 10), "of each prompt once"


def test_keys_are_counted_by_name_while_they_live_and_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmgate.metrics.MOST_KEYS", 2)
    live = [Key(name, name) for name in ("first", "second", "third")]
    ring = [Keyring(live)]
    metrics = GateMetrics(lambda: Fleet(), dict, lambda: 0.0, 3.0, keyring=lambda: ring[0])

    def shown() -> dict[str, float]:
        pattern = r'llmgate_key_tokens_total\{key="(.+)",kind="completion"\} (.+)'
        return {name: float(count) for name, count in re.findall(pattern, metrics.text().decode())}

    for name in ("first", "second", "third", "nobody", "anonymous"):
        metrics.count(Record("r", "/", 0.0, key=name, usage=Usage(1, 0, 10)), "m", 1.0)
    metrics.count(Record("r", "/", 0.0), "m", 1.0)
    assert shown() == {"first": 10, "second": 10, "(others)": 20, "anonymous": 10}
    ring[0] = Keyring([live[0], dataclasses.replace(live[1], revoked=1.0), live[2]])
    assert shown() == {"first": 10, "(others)": 20, "anonymous": 10}


def test_a_process_is_seen_as_it_is() -> None:
    own = process.look()
    assert own
    with Path("/dev/null").open():
        more = process.look()
    assert more
    assert more.open_files == own.open_files + 1
    assert own.open_files_limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert abs(own.started - psutil.Process().create_time()) < 2
    assert 1 << 20 < own.resident_bytes < 1 << 34
    assert 0 < own.cpu_seconds <= time.process_time() + 0.1
    assert process.look(2**22 + 1) is None, "no process has that id"
