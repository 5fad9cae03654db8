"""How late an event loop is: what everybody on it waits when somebody holds it up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

EVERY_S = 0.5
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


async def watch(observe: Callable[[float], None], every_s: float = EVERY_S) -> None:
    """Until cancelled, tell twice a second how many seconds after its time a timer came."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + every_s
        await asyncio.sleep(every_s)
        observe(max(0.0, clock() - due))
