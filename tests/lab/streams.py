"""Keeps streams and plain requests going at the gates until standard input closes, then says what became of each.

Owns: the load, what each answer should have been, and samples of how many nodes are kept from work. Refuses to know:
why nodes come and go meanwhile. Every node must run the fake backend: there each request has one right answer, which is
asked for beforehand, while all is quiet.

    python -m tests.lab.streams '{"gates": [URL], "key", "operator", "streams": n, "per_second": r, "seed": n}' < pipe

Prints a line when the load begins, and in the end {"answered", "wrong": [what, ...], "most_out": {URL: nodes}}.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
from typing import Any

import aiohttp

from tests.chaos.asks import Ask, asks
from tests.chaos.client import Client, Outcome
from tests.chaos.judges import Undisturbed

DIFFERENT = 40
TOKENS = 60
PATIENCE_S = 300.0
_SAMPLE_S = 0.3
_AWAY = ("starting", "loading", "draining", "failed")


async def run(gates: list[str], key: str, operator: str, streams: int, per_second: float, seed: int) -> dict[str, Any]:
    over = asyncio.Event()
    todo = asks(DIFFERENT, seed, TOKENS)
    outcomes: list[Outcome] = []
    async with Client(key, PATIENCE_S) as client:
        judge = await _undisturbed(client, gates[0], todo)
        print("begun", flush=True)
        tasks = [asyncio.ensure_future(_stream(client, gates, todo, seed + n, over, outcomes)) for n in range(streams)]
        tasks.append(asyncio.ensure_future(_plain(client, gates, todo, per_second, seed, over, outcomes)))
        watch = asyncio.ensure_future(_most_out(gates, operator, over))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        over.set()
        await asyncio.gather(*tasks)
        most_out = await watch
    wrong = [text for outcome in outcomes if (text := _wrong(outcome, judge))]
    return {"answered": len(outcomes) - len(wrong), "wrong": wrong, "most_out": most_out}


async def _undisturbed(client: Client, gate: str, todo: list[Ask]) -> Undisturbed:
    """What nodes that nobody disturbs answer: many at a time, as the fake backend answers each as if it were alone."""
    given = []
    for outcome in await asyncio.gather(*(client.send(gate, ask) for ask in todo)):
        if outcome.answer is None:
            raise RuntimeError(f"a quiet fleet does not answer {outcome.ask.kind} {outcome.ask.body}: {outcome}")
        given.append(outcome.answer)
    return Undisturbed.of(todo, given)


async def _stream(
    client: Client, gates: list[str], todo: list[Ask], seed: int, over: asyncio.Event, outcomes: list[Outcome]
) -> None:
    """One client that asks again as soon as it has its answer, at the gates in turn."""
    dice, doors = random.Random(seed), itertools.cycle(gates)
    streamed = [ask for ask in todo if ask.streams]
    while not over.is_set():
        outcomes.append(await client.send(next(doors), dice.choice(streamed)))


async def _plain(
    client: Client,
    gates: list[str],
    todo: list[Ask],
    per_second: float,
    seed: int,
    over: asyncio.Event,
    outcomes: list[Outcome],
) -> None:
    """Requests whose answers come whole, at a steady pace whatever becomes of those before."""
    dice, doors = random.Random(seed), itertools.cycle(gates)
    whole = [ask for ask in todo if not ask.streams]
    sent = []
    while not over.is_set():
        sent.append(asyncio.ensure_future(client.send(next(doors), dice.choice(whole))))
        await asyncio.sleep(1 / per_second)
    outcomes += await asyncio.gather(*sent)


async def _most_out(gates: list[str], operator: str, over: asyncio.Event) -> dict[str, int]:
    """For each gate, how many nodes were kept from work at once at most, over all samples; of one that is silent, none.

    Kept from work is one that has a lease, or says itself that it takes none. One that a gate merely does not hear of
    may be well, on a machine that is busy.
    """
    most: dict[str, int] = {}
    headers = {"authorization": f"Bearer {operator}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=5)) as session:
        while not over.is_set():
            for gate in gates:
                try:
                    async with session.get(f"{gate}/admin/nodes") as response:
                        nodes = (await response.json())["nodes"]
                except (aiohttp.ClientError, asyncio.TimeoutError):
                    continue
                out = sum(node["lease"] is not None or node["state"] in _AWAY for node in nodes)
                most[gate] = max(out, most.get(gate, 0))
            await asyncio.sleep(_SAMPLE_S)
    return most


def _wrong(outcome: Outcome, judge: Undisturbed) -> str:
    if outcome.answer is not None:
        return judge.trouble(outcome.ask, outcome.answer)
    return outcome.refused or outcome.lost


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(**json.loads(sys.argv[1])))))
