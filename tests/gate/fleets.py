"""Fleets of made-up nodes for the tests of the core: no process, no socket, a clock that stands still."""

from __future__ import annotations

from typing import Any

from llmgate.core.fleet import Event, Fleet, Listed, Reported
from llmgate.core.policy import Ask, Choice, choose
from llmgate.core.prompt import Prompt
from llmgate.listing import Address, Route
from llmnode.wire import chain
from llmnode.wire.chain import Chain
from llmnode.wire.node import Cache, Load, Model, Report, State

NOW, STALE = 100.0, 3.0
PATH = "/v1/chat/completions"
CHAT = frozenset({"chat"})
SALT = chain.salt("tiny", "", PATH)


def body(*turns: str, model: str = "tiny", system: str = "") -> dict[str, Any]:
    """A conversation: turns of the user and the assistant, one after the other."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"model": model, "messages": [{"role": "system", "content": system}] * bool(system) + messages}


def ask(*turns: str, model: str = "tiny", system: str = "", **fields: Any) -> Ask:
    return Ask(model, CHAT, Prompt(body(*turns, model=model, system=system), PATH), **fields)


def chain_of(*turns: str, system: str = "") -> Chain:
    return chain.of_request(body(*turns, system=system), SALT)


def report(*held: Chain, model: str = "tiny", release: str = "r", **load: Any) -> Report:
    """A ready node's report: 4 slots and 1000 tokens a second of prefill, 4 bytes a token, unless `load` says else."""
    figures = {"slots": 4, "prefill_tps": 1000.0, "bytes_per_token": 4.0, **load}
    blocks = chain.pack(block for one in held for block in one.blocks)
    return Report("boot", release, "c", State.READY, models=(Model(model),), load=Load(**figures), cache=Cache(blocks))


def fleet(*addresses: str | Address, events: tuple[Event, ...] = (), routes: dict[str, Route] | None = None) -> Fleet:
    """Idle ready nodes, then the events."""
    listed = tuple(a if isinstance(a, Address) else Address(a, f"http://{a}") for a in addresses)
    made = Fleet().apply(Listed(listed, routes or {}))
    for event in (*(Reported(a.name, report(), NOW) for a in listed), *events):
        made = made.apply(event)
    return made


def reported(name: str, *held: Chain, at: float = NOW, **load: Any) -> Reported:
    return Reported(name, report(*held, **load), at)


def choice(made: Fleet, asked: Ask, policy: str | None = None, now: float = NOW) -> Choice:
    return choose(made, asked, now, STALE, policy)


def names(made: Choice) -> list[str]:
    return [candidate.name for candidate in made.ranked]
