"""Which machines can host the lab."""

from __future__ import annotations

import pytest

from tests.lab import lab


@pytest.mark.parametrize(
    ("libc", "fits"), [("2.31", True), ("2.36", True), ("2.39", False), ("3.0", False), ("", True)]
)
def test_a_machine_whose_builds_cannot_run_on_the_hosts_is_named(libc: str, fits: bool) -> None:
    why = lab.too_new(libc)
    assert (why == "") is fits
    assert fits or libc in why
