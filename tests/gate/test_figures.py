"""What workers count together: nothing is lost with a worker, and nothing is counted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from llmgate import figures
from llmgate.figures import Figures

COUNT = """
import sys
from prometheus_client import CollectorRegistry, Counter, Histogram
registry = CollectorRegistry()
for model in sys.argv[1:]:
    Counter("llmgate_requests", "Requests", ["model"], registry=registry).labels(model).inc(2)
    Histogram("llmgate_seconds", "Seconds", ["model"], buckets=(1, 5), registry=registry).labels(model).observe(3)
"""


def count(folder: Path, model: str) -> int:
    """Count something in a process of its own; its process id."""
    environ = {**os.environ, figures.ENVIRONMENT: str(folder)}
    process = subprocess.Popen([sys.executable, "-c", COUNT, model], env=environ)
    assert process.wait(60) == 0
    return process.pid


def seen(folder: Path) -> dict[tuple[str, str], float]:
    samples = (sample for metric in Figures(folder).collect() for sample in metric.samples)
    return {(sample.name, sample.labels["model"] + sample.labels.get("le", "")): sample.value for sample in samples}


def test_what_ended_workers_have_counted_stays_in_one_file_for_each_kind(tmp_path: Path) -> None:
    first, second = count(tmp_path, "a"), count(tmp_path, "a")
    before = seen(tmp_path)
    assert before["llmgate_requests_total", "a"] == 4
    assert before["llmgate_seconds_bucket", "a5.0"] == before["llmgate_seconds_count", "a"] == 2
    figures.retire(tmp_path, first)
    assert seen(tmp_path) == before
    figures.retire(tmp_path, second)
    figures.retire(tmp_path, second)
    assert seen(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counter_0.db", "histogram_0.db"]
    figures.retire(tmp_path, count(tmp_path, "b"))
    assert seen(tmp_path).items() > before.items()


def test_levels_are_of_those_that_live(tmp_path: Path) -> None:
    ours = Figures(tmp_path)
    ours.publish({"busy": {"a": 5}})
    for pid, levels in ((-1, {"busy": {"a": 1, "b": 2}}), (-2, {"busy": {"a": 3}, "other": {"a": 9}})):
        (tmp_path / f"levels_{pid}.json").write_text(json.dumps(levels))
    assert ours.others("busy") == {"a": 4, "b": 2}
    figures.retire(tmp_path, -1)
    assert ours.others("busy") == {"a": 3}
    assert ours.others("nothing") == {}
