"""Whoever polls nodes stops when told to, whatever the library beneath does, and says what is wrong with them."""

from __future__ import annotations

import asyncio
import time

import pytest

from llmgate.core.fleet import Address, Listed, Lost, View
from llmgate.prober import Prober


@pytest.mark.parametrize("gone", ["unlisted", "stopped"])
def test_polling_ends_although_its_cancellation_is_swallowed(gone: str) -> None:
    polls = swallowed = 0

    async def fetch(base: str, path: str, *, etag: str, timeout_s: float) -> tuple[int, str, bytes]:
        nonlocal polls, swallowed
        polls += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if swallowed:
                raise  # so that a prober that asks again fails the test, and does not hold it up
            swallowed += 1
            raise TimeoutError("as if it had only been slow") from None
        raise AssertionError("nobody waits for an hour")

    async def run() -> None:
        view = View()
        view.apply(Listed((Address("a", "http://a"),)))
        prober = Prober(
            lambda: view.fleet, view.apply, fetch, time.monotonic, lambda: 0.5, interval_s=0.001, stale_after_s=5
        )
        prober.follow()
        (task,) = prober._tasks.values()
        await asyncio.sleep(0)  # the task begins
        assert polls == 1
        if gone == "unlisted":
            view.apply(Listed(()))
            prober.follow()
        else:
            await asyncio.wait_for(prober.stop(), 10)
        await asyncio.wait_for(task, 10)
        await prober.stop()

    asyncio.run(run())
    assert (polls, swallowed) == (1, 1)


def test_each_cause_of_a_node_that_cannot_be_reached_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    view = View()
    view.apply(Listed((Address("a", "http://a"),)))
    prober = Prober(
        lambda: view.fleet, view.apply, _nobody, time.monotonic, lambda: 0.5, interval_s=0.001, stale_after_s=5
    )
    refused, strange = "connection refused", "its certificate is not good"
    for why in (refused, refused, strange, refused, strange):
        view.apply(Lost("a", why, time.monotonic()))
        prober.say("a")
    said = "node a takes no work: unreachable ({})"
    assert [record.getMessage() for record in caplog.records] == [said.format(refused), said.format(strange)]


async def _nobody(base: str, path: str, *, etag: str, timeout_s: float) -> tuple[int, str, bytes]:
    raise AssertionError("nothing is polled here")
