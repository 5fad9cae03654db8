"""The table at the end of a run in the lab: each promise, whether it was kept, and how long that took."""

from __future__ import annotations

import pytest

_kept: dict[str, tuple[str, float]] = {}
"""Node id -> (outcome, seconds with what it set up), in the order in which they ran."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "lab" not in report.keywords:
        return
    outcome, seconds = _kept.get(report.nodeid, ("passed", 0.0))
    if report.outcome != "passed":
        outcome = report.outcome
    _kept[report.nodeid] = (outcome, seconds + report.duration)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _kept:
        return
    terminalreporter.section("promises of the lab")
    for id, (outcome, seconds) in _kept.items():
        promise = id.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        terminalreporter.line(f"{outcome:8}{seconds:7.0f} s  {promise}")
    counts = [outcome for outcome, _ in _kept.values()]
    terminalreporter.line(f"{counts.count('passed')} of {len(counts)} kept, {sum(s for _, s in _kept.values()):.0f} s")
