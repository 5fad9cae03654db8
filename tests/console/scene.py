"""A fleet at work, to look at: nodes of four hosts, teams that ask, a week of usage.

    python -m tests.console.scene [MINUTES]      writes docs/console.png after so much work, 16 unless given

The large models are made up and say nothing; that what the console shows of them is what happens is for the tests. A
real model answers in the playground: the handbook, which comes with llmrack.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import sync_playwright

from llmgate.core.keys import PREFIX, Key, digest
from llmgate.core.limits import NO_LIMITS, Limits
from llmgate.core.queue import Priority
from llmgate.database import Database
from llmgate.store import Store
from tests.conftest import _starter
from tests.processes import Program, free_port
from tests.programs import need
from tests.system.fleet import Fleet

FAKE = ("--backend", "fake", "--n-ctx", "2048", "--kv-cells", "8192")
LARGE = ("--model-id", "chat-large", "--slots", "8", "--fake-step-delay-s", "0.03", *FAKE)
CODE = ("--model-id", "code-large", "--slots", "6", "--fake-step-delay-s", "0.025", *FAKE)
SMALL = ("--model-id", "handbook", "--slots", "4", "--threads", "1")
NODES = {"gpu1-a": LARGE, "gpu1-b": LARGE, "gpu2-a": LARGE, "gpu2-b": LARGE, "gpu3": CODE, "cpu1": SMALL}
RACKS = {"gpu1": "a1", "gpu2": "a1", "gpu3": "a2", "cpu1": "b1"}
TEAMS = {"search": 5, "support": 3, "night-batch": 2, "ada": 1}
"""Keys, and how much of the work is theirs."""
LIMITS = {
    "search": Limits(requests_per_minute=600, tokens_per_minute=300_000, concurrent_requests=32),
    "support": Limits(requests_per_minute=300, tokens_per_day=400_000),
    "night-batch": Limits(tokens_per_day=500_000, tokens_per_month=4_000_000),
}
OWNERS = {
    "search": "Search team",
    "support": "Support",
    "night-batch": "Data platform",
    "ada": "Ada",
    "operator": "Ops",
}
SYSTEM = "You are the assistant of a team that runs its own machines. " * 6
QUESTION = "What is a slot?"


@dataclass
class Scene:
    """`fleet` at work, until `stop` is called."""

    fleet: Fleet
    stop: Callable[[], None]


@contextmanager
def scene(folder: Path, *, askers: int = 12) -> Iterator[Scene]:
    """Start it all; `askers` requests run at most at a time. Everything ends with the context."""
    programs = _starter(folder)
    start = next(programs)
    ended = threading.Event()
    askers_now: list[threading.Thread] = []

    def stop() -> None:
        ended.set()
        for asker in askers_now:
            asker.join()

    try:
        fleet, keys = _fleet(folder, start)
        askers_now += [
            threading.Thread(target=_ask_on, args=(fleet, keys, random.Random(n), ended), daemon=True)
            for n in range(askers)
        ]
        for asker in askers_now:
            asker.start()
        yield Scene(fleet, stop)
    finally:
        stop()
        next(programs, None)


def _fleet(folder: Path, start: Callable[..., Program]) -> tuple[Fleet, dict[str, str]]:
    token, state, listing = folder / "token", folder / "state", folder / "nodes.toml"
    token.write_text("fleet-token-of-the-tests-0123456789\n")
    state.mkdir()
    nodes = {
        name: start("llmnode", "--name", name, "--fleet-token-file", str(token), *flags)
        for name, flags in NODES.items()
    }
    listing.write_text(
        "".join(
            f'[[nodes]]\nname = "{name}"\nurl = "{node.url}"\nlabels = {{rack = "{RACKS[name.partition("-")[0]]}"}}\n'
            for name, node in nodes.items()
        )
    )
    keys = {name: f"{PREFIX}{name}-of-the-scene-0123456789" for name in OWNERS}
    store = Store(Database(state))
    for name, secret in keys.items():
        store.add_key(_key(name, secret))
    store.add_usage(_past())
    store.close()
    log = folder / "requests.jsonl"
    gate = start(
        "llmgate", "--nodes-file", str(listing), "--state-dir", str(state), "--fleet-token-file", str(token),
        "--request-log", str(log), "--poll-interval-s", "0.5", "--queue-limit", "64", port=free_port(),
    )  # fmt: skip
    for node in nodes.values():
        node.ready()
    fleet = Fleet(gate.ready(), nodes, keys["ada"], keys["operator"], log)
    fleet.usable(len(nodes))
    return fleet, keys


def _key(name: str, secret: str) -> Key:
    return Key(
        name,
        digest(secret),
        admin=name == "operator",
        models=("chat-large", "code-large") if name == "ada" else (),
        created=time.time(),
        priority=Priority.LOW if name == "night-batch" else Priority.NORMAL,
        owner=OWNERS[name],
        expires=time.time() + 90 * 86400 if name == "ada" else None,
        limits=LIMITS.get(name, NO_LIMITS),
    )


def _past() -> list[dict[str, Any]]:
    """A week of requests, fewer at the weekend."""
    dice, now = random.Random(8), time.time()
    rows: list[dict[str, Any]] = []
    for day in range(1, 8):
        at = now - day * 86400
        busy = 0.35 if time.gmtime(at).tm_wday >= 5 else 1.0
        for team, share in TEAMS.items():
            for _ in range(int(22 * share * busy * dice.uniform(0.7, 1.2))):
                rows.append(_row(at - dice.uniform(0, 20000), team, dice))
    return rows


def _row(at: float, team: str, dice: random.Random) -> dict[str, Any]:
    prompt = dice.randint(400, 6000)
    failed = dice.random() < 0.01
    seconds = dice.uniform(1, 20)
    return {
        "at": at, "request_id": f"req-{dice.getrandbits(128):032x}", "key": team,
        "model": dice.choices(["chat-large", "code-large", "handbook"], [7, 3, 1])[0],
        "path": "/v1/chat/completions", "stream": 1, "node": dice.choice(list(NODES)), "status": 503 if failed else 200,
        "end": "no_ready_node" if failed else "done", "prompt_tokens": prompt,
        "cached_tokens": int(prompt * dice.uniform(0.3, 0.9)), "completion_tokens": dice.randint(50, 900),
        "queued_seconds": dice.uniform(0, 0.2), "time_to_first_token_seconds": dice.uniform(0.08, 0.9),
        "duration_seconds": seconds, "attempts": "[]", "resumed": int(dice.random() < 0.01), "gate": "gate1",
    }  # fmt: skip


def _ask_on(fleet: Fleet, keys: dict[str, str], dice: random.Random, ended: threading.Event) -> None:
    """Hold conversations, one after the other, with pauses to think."""
    while not ended.is_set():
        team = dice.choices(list(TEAMS), list(TEAMS.values()))[0]
        model = dice.choices(["chat-large", "code-large", "handbook"], [8, 3, 0.3])[0]
        messages = [{"role": "system", "content": SYSTEM + team}]
        for _ in range(dice.randint(1, 4)):
            if ended.is_set():
                return
            messages.append({"role": "user", "content": "And then? " * dice.randint(2, 60)})
            body = {
                "model": model,
                "messages": messages,
                "max_tokens": dice.randint(40, 220),
                "stream": dice.random() < 0.7,
            }
            said = _asked(fleet, body, keys[team])
            messages.append({"role": "assistant", "content": said or "."})
            ended.wait(dice.expovariate(1 / (0.4 + 1.2 * (1 + _wave(time.time())))))


def _wave(at: float) -> float:
    """Work comes in waves of some minutes: -1 to 1."""
    return math.sin(at / 70) * 0.7 + math.sin(at / 23) * 0.3


def _asked(fleet: Fleet, body: dict[str, Any], key: str) -> str:
    """The beginning of the answer; "" where there was none, as while the fleet ends."""
    try:
        with httpx.stream(
            "POST", fleet.gate.url + "/v1/chat/completions", json=body, timeout=60,
            headers={"authorization": f"Bearer {key}"},
        ) as answer:  # fmt: skip
            return answer.read().decode(errors="replace")[:40]
    except httpx.HTTPError:
        return ""


def picture(minutes: float, target: Path) -> None:
    """Write the picture of the README."""
    with tempfile.TemporaryDirectory() as folder, scene(Path(folder)) as made:
        fleet = made.fleet
        time.sleep(minutes * 60)
        fleet.drain("gpu2-a", owner="ansible", reason="new kernel", ttl_seconds=1500)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=str(need("chromium")), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.5)
            page.add_init_script(f"sessionStorage.setItem('llmrack.key', {fleet.admin!r})")
            page.goto(fleet.gate.url)
            page.get_by_text("Drained by").wait_for()
            page.wait_for_timeout(8000)
            page.screenshot(path=target)
            browser.close()


if __name__ == "__main__":
    picture(float(sys.argv[1]) if len(sys.argv) > 1 else 16, Path(__file__).parents[2] / "docs" / "console.png")
