"""The gate's view of its nodes: frozen snapshots, and the one function that makes the next from an event.

Owns what is known of each node: its last report, how long ago that was, what this gate has in flight there, and who
has drained it. Refuses to know how any of it was found out. `now` is a monotonic clock in seconds throughout; leases
carry wall-clock seconds, which only `leases.py` compares.

    listed ── Reported ──> what the report says (starting, loading, ready, draining, failed)
      │                        │ Lost: the connection was refused or the answer was no report
      │                        │ no news for longer than stale_after: stale
      └──── Lost ────────> unreachable ── Reported ──> ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmgate.settings import Address
from llmnode.wire.node import Model, Report, State


@dataclass(frozen=True)
class Lease:
    """Somebody keeps new work off a node. Times in seconds since the epoch; `expires` None is a cordon."""

    node: str
    owner: str
    reason: str
    taken: float
    expires: float | None


@dataclass(frozen=True)
class Standing:
    """Where a node stands right now: `state` in one word, `usable` for new work, and why not."""

    state: str
    usable: bool
    why: str


@dataclass(frozen=True)
class Node:
    """One node as the gate knows it.

    seen: when the last good report came; None before the first.    lost: why it cannot be reached; "" when it can.
    in_flight: requests of this gate there, from dispatch to the last body byte.
    counted: what `in_flight` was when the report came, so that work the report already counts is not counted twice.
    turn: the fleet's dispatch number when this node last got work; 0 for never.
    """

    name: str
    url: str
    report: Report | None = None
    seen: float | None = None
    lost: str = ""
    in_flight: int = 0
    counted: int = 0
    turn: int = 0
    lease: Lease | None = None

    def __repr__(self) -> str:
        state = self.report.state.value if self.report else "unknown"
        lease = f", drained by {self.lease.owner}" if self.lease else ""
        return f"<{self.name} {self.lost or state}, {self.busy}/{self.slots} busy{lease}>"

    @property
    def slots(self) -> int:
        """Requests it runs at once; 1 when it does not say, so that it is never divided by zero nor free of cost."""
        return max(1, self.report.load.slots) if self.report else 1

    @property
    def busy(self) -> int:
        """Requests running or waiting there: those it reported, and those dispatched since."""
        if self.report is None:
            return self.in_flight
        reported = self.report.load.running + self.report.load.waiting
        return max(self.in_flight, reported + self.in_flight - self.counted)

    def standing(self, now: float, stale_after: float) -> Standing:
        """Judge it at `now`: not heard of, unreachable, stale, what it says of itself, or drained."""
        if self.lost:
            return Standing("unreachable", False, self.lost)
        if self.report is None or self.seen is None:
            return Standing("unknown", False, "it has not answered yet")
        if now - self.seen > stale_after:
            return Standing("stale", False, f"its last report is {now - self.seen:.1f} s old")
        if self.report.state is not State.READY:
            return Standing(self.report.state.value, False, self.report.why or f"it is {self.report.state.value}")
        if self.lease:
            reason = f": {self.lease.reason}" if self.lease.reason else ""
            return Standing("ready", False, f"drained by {self.lease.owner}{reason}")
        return Standing("ready", True, "")

    def model(self, name: str) -> Model | None:
        """The model that it serves under this id or alias."""
        models = self.report.models if self.report else ()
        return next((m for m in models if name == m.id or name in m.aliases), None)


@dataclass(frozen=True)
class Listed:
    """The nodes file was read: these are the nodes now. Those that stay keep all that is known of them."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True)
class Reported:
    """A node answered a poll. `report` None: nothing has changed since the last one."""

    name: str
    report: Report | None
    now: float


@dataclass(frozen=True)
class Lost:
    """A node refused the connection, broke it, or gave an answer that is no report."""

    name: str
    why: str


@dataclass(frozen=True)
class Dispatched:
    """A request of this gate went to the node."""

    name: str


@dataclass(frozen=True)
class Finished:
    """The last body byte of such a request came, or its connection was closed."""

    name: str


@dataclass(frozen=True)
class Leased:
    """The drain leases are now these, all of them."""

    leases: tuple[Lease, ...]


Event = Listed | Reported | Lost | Dispatched | Finished | Leased


@dataclass(frozen=True)
class Fleet:
    """All nodes at one instant, by name. `turns` counts dispatches, to break ties by who rested longest."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    turns: int = 0

    def apply(self, event: Event) -> Fleet:
        """The fleet after the event. An event about a node that is not listed (any more) changes nothing."""
        if isinstance(event, Listed):
            return self._listed(event.addresses)
        if isinstance(event, Leased):
            return self._leased(event.leases)
        node = self.nodes.get(event.name)
        if node is None:
            return self
        turns = self.turns
        if isinstance(event, Reported):
            report = event.report or node.report
            node = dataclasses.replace(node, report=report, seen=event.now, lost="", counted=node.in_flight)
        elif isinstance(event, Lost):
            node = dataclasses.replace(node, lost=event.why)
        elif isinstance(event, Dispatched):
            turns += 1
            node = dataclasses.replace(node, in_flight=node.in_flight + 1, turn=turns)
        else:
            # `counted` stays: what was counted in the report and has ended since lowers the estimate by itself.
            node = dataclasses.replace(node, in_flight=max(0, node.in_flight - 1))
        return Fleet({**self.nodes, node.name: node}, turns)

    def models(self) -> dict[str, list[Node]]:
        """Every model id that some listed node last said it serves, with those nodes."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for model in node.report.models if node.report else ():
                found.setdefault(model.id, []).append(node)
        return found

    def resolve(self, name: str) -> str | None:
        """The model id behind an id or alias; None when nobody serves it."""
        for node in self.nodes.values():
            model = node.model(name)
            if model:
                return model.id
        return None

    def silent(self) -> list[str]:
        """Nodes that have never reported, whose models nobody can know."""
        return [node.name for node in self.nodes.values() if node.report is None]

    def _listed(self, addresses: Iterable[Address]) -> Fleet:
        nodes = {}
        for address in addresses:
            old = self.nodes.get(address.name)
            same = old is not None and old.url == address.url
            lease = old.lease if old else None
            nodes[address.name] = old if old and same else Node(address.name, address.url, lease=lease)
        return Fleet(nodes, self.turns)

    def _leased(self, leases: Iterable[Lease]) -> Fleet:
        held = {lease.node: lease for lease in leases}
        nodes = {n.name: dataclasses.replace(n, lease=held.get(n.name)) for n in self.nodes.values()}
        return Fleet(nodes, self.turns)


class View:
    """Holds the latest snapshot for one event loop. Readers take `.fleet` and never wait; writers apply events."""

    def __init__(self, fleet: Fleet | None = None) -> None:
        self.fleet = fleet or Fleet()

    def apply(self, event: Event) -> None:
        self.fleet = self.fleet.apply(event)
