"""Times between tokens are counted as prometheus_client's own histogram counts them, only cheaper."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from llmnode.metrics import _TOKEN_SECONDS, Gaps


class Ours(Collector):
    def __init__(self, gaps: Gaps) -> None:
        self.gaps = gaps

    def collect(self) -> list[Metric]:
        return [self.gaps.metric()]


def test_gaps_are_exposed_as_the_librarys_histogram_would() -> None:
    gaps, theirs, ours = Gaps(), CollectorRegistry(), CollectorRegistry()
    ours.register(Ours(gaps))
    histogram = Histogram("llmnode_inter_token_seconds", "Between tokens of one answer", buckets=_TOKEN_SECONDS,
                          registry=theirs)  # fmt: skip
    dice = random.Random(5)
    # Values at the bounds themselves too, in eighths so that sums are exact.
    for _ in range(500):
        seconds = dice.choice([0.125, 0.25, 0.5, 1.0, 2.5, 4.0, 10.0, 16.0, 0.0])
        count = dice.randint(1, 4)
        gaps.add(seconds, count)
        for _ in range(count):
            histogram.observe(seconds)

    def lines(registry: CollectorRegistry) -> list[str]:
        text = generate_latest(registry).decode()
        return [line for line in text.splitlines() if "_created" not in line]

    assert lines(ours) == lines(theirs)
