"""The promise of the soak, kept small enough for every test run. `make soak` sends ten times as many requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.soak import soak


@pytest.mark.timeout(600)
def test_hundreds_of_mixed_requests_leave_nothing_behind(tmp_path: Path) -> None:
    report = soak(requests=200, seed=2, folder=tmp_path, limit_s=500)
    assert not report.violations, str(report)
    assert report.ends["answered"] > 100, str(report)
    assert report.ends["left"] > 0 and report.ends["rejected"] > 0, str(report)
