"""The gate's view of its nodes: frozen snapshots, and the one function that makes the next from an event.

Owns what is known of each node: its last report, how long ago that was, what this gate has in flight there, who has
drained it, and its health, whose states and transitions are in `health.py`; and how requests for each model are routed,
as the nodes file says. Refuses to know how any of it was found out. `now` is a monotonic clock in seconds throughout;
leases carry wall-clock seconds, which only `leases.py` compares.

Of health this file decides what takes more than one node to see: a node that trips is ejected only if every model of
its has another node in full service, and at most half of the model's nodes would then be out; and when a model has no
node in full service left, those that are out but would do are called back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from llmgate.core import prediction
from llmgate.core.copying import changed
from llmgate.core.health import OUT, Condition, Health, Rules, Signal
from llmgate.core.prediction import Sent
from llmgate.listing import Address, Labels, Route
from llmgate.settings import Settings
from llmnode.wire import chain
from llmnode.wire.chain import Chain
from llmnode.wire.node import Load, Model, Report, State

_NO_ROUTE = Route()


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
    """Where a node stands right now: `state` in one word, `usable` for new work, and why not.

    trial: usable for one request alone, which will tell whether it is well again.
    """

    state: str
    usable: bool
    why: str
    trial: bool = False

    @property
    def full(self) -> bool:
        """Usable for any number of requests."""
        return self.usable and not self.trial


@dataclass(frozen=True)
class Node:
    """One node as the gate knows it.

    seen: when the last good report came; None before the first.
    since: the load that it has told of since that report, with an answer; None for none.       told: when it last told.
    in_flight: requests of this gate there, from dispatch to the last body byte.
    counted: what `in_flight` was then, so that work which its load already counts is not counted twice.
    kept: places for requests that are about to be dispatched.
    turn: the fleet's dispatch number when this node last got work; 0 for never.
    held: blocks of prefix chains that it holds, by its last report; without those that answers have proved wrong since.
    sent: what went there lately (prediction.py).
    owed: prompt tokens that such requests had still to be computed then.
    computed: those of them that have been computed since.
    """

    name: str
    url: str
    labels: Labels = frozenset()
    weight: float = 1.0
    report: Report | None = None
    seen: float | None = None
    since: Load | None = None
    told: float | None = None
    health: Health = field(default_factory=Health)
    in_flight: int = 0
    counted: int = 0
    kept: int = 0
    turn: int = 0
    lease: Lease | None = None
    held: frozenset[int] = frozenset()
    sent: tuple[Sent, ...] = ()
    owed: int = 0
    computed: int = 0

    def __repr__(self) -> str:
        lease = f", drained by {self.lease.owner}" if self.lease else ""
        return f"<{self.name} {self.health.state.word}, {self.busy}/{self.slots} busy{lease}>"

    @property
    def slots(self) -> int:
        """Requests it runs at once; 1 when it does not say, so that it is never divided by zero nor free of cost."""
        return max(1, self.report.load.slots) if self.report else 1

    @property
    def load(self) -> Load | None:
        """What it last told of its load; None before the first report."""
        return self.since or (self.report.load if self.report else None)

    @property
    def busy(self) -> int:
        """Requests running or waiting there: those it reported, those dispatched since, and those about to be."""
        load = self.load
        if load is None:
            return self.in_flight + self.kept
        reported = load.running + load.waiting
        return max(self.in_flight, reported + self.in_flight - self.counted) + self.kept

    @cached_property
    def backlog(self) -> int:
        """Prompt tokens to be computed there: those it reported, but for what is done since, and those sent since."""
        sent = prediction.backlog(self.sent, -math.inf if self.told is None else self.told)
        load = self.load
        queued = load.queued_prompt_tokens if load else 0
        if not load or not self.owed:
            return queued + sent
        # Where all the requests there were ours, so are the tokens, whatever they were guessed to be.
        ours = min(queued, self.owed) if load.running + load.waiting > self.counted else queued
        return queued - ours * self.computed // self.owed + sent

    def depth(self, prompt: Chain, now: float) -> int:
        """How many blocks of a prompt it holds: by its report, or by what was sent there lately."""
        # Who names any block of a chain names its first, so that a cold prompt costs one look instead of thousands.
        named = prompt.depth(self.held) if prompt.blocks and prompt.blocks[0] in self.held else 0
        return max(named, prediction.depth(self.sent, prompt, now))

    def standing(self, now: float, stale_after: float) -> Standing:
        """Judge it at `now`: not heard of, unreachable, stale, what it says of itself, ejected, drained, or well."""
        health = self.health.at(now)
        if health.state is Condition.UNREACHABLE:
            return Standing("unreachable", False, health.why)
        if self.report is None or self.seen is None or health.heard is None:
            return Standing("unknown", False, "it has not answered yet")
        if now - health.heard > stale_after:
            return Standing("stale", False, f"its last report is {now - self.seen:.1f} s old")
        if health.state is Condition.AWAY:
            return Standing(self.report.state.value, False, self.report.why or f"it is {self.report.state.value}")
        if health.state is Condition.EJECTED and health.until is not None:
            return Standing("ejected", False, f"{health.why}; out for another {health.until - now:.1f} s")
        word = "half-open" if health.state in OUT else "ready"
        if self.lease:
            reason = f": {self.lease.reason}" if self.lease.reason else ""
            return Standing(word, False, f"drained by {self.lease.owner}{reason}")
        if health.state is Condition.PROBING:
            return Standing(word, False, "one request is trying it")
        if health.state is Condition.HALF_OPEN:
            return Standing(word, True, f"one request may try it, since it was ejected: {health.why}", trial=True)
        return Standing(word, True, "")

    def share(self, now: float) -> float:
        """How much of its slots to use, above 0 and up to 1, while it takes work: it starts slowly. It ranks only."""
        return self.health.share(now)

    def admits(self, now: float) -> bool:
        """Whether a request that was routed here a moment ago may still be sent: its health may have changed since."""
        return self.health.at(now).state not in (Condition.EJECTED, Condition.PROBING)

    def model(self, name: str) -> Model | None:
        """The model that it serves under this id or alias."""
        models = self.report.models if self.report else ()
        return next((m for m in models if name == m.id or name in m.aliases), None)


@dataclass(frozen=True)
class Listed:
    """The nodes file was read: these are the nodes and routes now. Nodes that stay keep all that is known of them."""

    addresses: tuple[Address, ...]
    routes: Mapping[str, Route] = field(default_factory=dict)


@dataclass(frozen=True)
class Reported:
    """A node answered a poll. `report` None: nothing has changed since the last one."""

    name: str
    report: Report | None
    now: float


@dataclass(frozen=True)
class Missed:
    """A poll brought no report, though the connection was not refused: it timed out, broke, or was no report."""

    name: str
    why: str
    now: float


@dataclass(frozen=True)
class Lost:
    """A poll could not connect to the node."""

    name: str
    why: str
    now: float


@dataclass(frozen=True)
class Kept:
    """A place at the node is kept for a request of this gate that has its turn."""

    name: str


@dataclass(frozen=True)
class Released:
    """Such a place is kept no longer: the request is being dispatched, or its client has left."""

    name: str


@dataclass(frozen=True)
class Dispatched:
    """A request of this gate went to the node, and what it brings there where that was counted."""

    name: str
    now: float
    sent: Sent | None = None


@dataclass(frozen=True)
class Told:
    """With the head of an answer the node has said how busy it is."""

    name: str
    load: Load
    now: float


@dataclass(frozen=True)
class Begun:
    """The answer to such a request has begun, so that its prompt is computed. `sent`: as in its `Dispatched`."""

    name: str
    sent: Sent


@dataclass(frozen=True)
class Finished:
    """The last body byte of such a request came, or its connection was closed.

    sent: as in its `Dispatched`.    cached: prompt tokens that the node says it found; None when it did not say.
    computed: whether the node took it at all.
    """

    name: str
    sent: Sent | None = None
    cached: int | None = None
    computed: bool = True


@dataclass(frozen=True)
class Attempted:
    """What such a request says of the node's health (evidence.py). `turn`: the fleet's `turns` at its dispatch."""

    name: str
    turn: int
    signal: Signal
    why: str
    now: float


@dataclass(frozen=True)
class Leased:
    """The drain leases are now these, all of them."""

    leases: tuple[Lease, ...]


Event = Listed | Reported | Missed | Lost | Kept | Released | Dispatched | Told | Begun | Finished | Attempted | Leased


@dataclass(frozen=True)
class Fleet:
    """All nodes at one instant, by name, and the routes of models, by id.

    turns: counts dispatches, to tell who rested longest, and which answers are old news.     rules: those of health.
    """

    nodes: Mapping[str, Node] = field(default_factory=dict)
    turns: int = 0
    rules: Rules = field(default_factory=lambda: Rules.of(Settings()))
    routes: Mapping[str, Route] = field(default_factory=dict)

    def apply(self, event: Event) -> Fleet:
        """The fleet after the event. An event about a node that is not listed (any more) changes nothing."""
        if isinstance(event, Listed):
            return self._listed(event.addresses, event.routes)
        if isinstance(event, Leased):
            return self._leased(event.leases)
        node = self.nodes.get(event.name)
        if node is None:
            return self
        turns = self.turns
        if isinstance(event, Kept):
            return self._with(changed(node, kept=node.kept + 1))
        if isinstance(event, Released):
            return self._with(changed(node, kept=max(0, node.kept - 1)))
        if isinstance(event, Told):
            return self._with(_busy_since(node, event.load, event.now)) if node.report else self
        if isinstance(event, Begun):
            return self._with(_over(node, event.sent))
        if isinstance(event, Finished):
            return self._with(_finished(node, event))
        if isinstance(event, Reported):
            node = self._reported(node, event)
        elif isinstance(event, Missed):
            node = self._told(node, Signal.MISSED, event.now, event.why)
        elif isinstance(event, Lost):
            node = self._told(node, Signal.GONE, event.now, event.why)
        elif isinstance(event, Attempted):
            node = self._attempted(node, event)
        else:
            turns += 1
            sent = prediction.add(node.sent, event.sent) if event.sent else node.sent
            node = changed(node, in_flight=node.in_flight + 1, turn=turns, sent=sent)
            node = self._told(node, Signal.SENT, event.now)
        return self._with(node, turns)._called_back(event.now)

    def models(self) -> dict[str, list[Node]]:
        """Every model id that some listed node last said it serves, with those nodes."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for model in node.report.models if node.report else ():
                found.setdefault(model.id, []).append(node)
        return found

    def meant(self, name: str) -> str:
        """The id that an alias of the nodes file stands for; any other name as it is."""
        return next((model for model, route in self.routes.items() if name in route.aliases), name)

    def route_of(self, name: str) -> Route:
        """How requests for the model behind an id or alias are routed."""
        return self.routes.get(self.resolve(name) or self.meant(name), _NO_ROUTE)

    def resolve(self, name: str) -> str | None:
        """The model id behind an id or alias; None when nobody serves it."""
        name = self.meant(name)
        for node in self.nodes.values():
            model = node.model(name)
            if model:
                return model.id
        return None

    def silent(self) -> list[str]:
        """Nodes that have never reported, whose models nobody can know."""
        return [node.name for node in self.nodes.values() if node.report is None]

    def _with(self, node: Node, turns: int | None = None) -> Fleet:
        nodes = {**self.nodes, node.name: node}
        return Fleet(nodes, self.turns if turns is None else turns, self.rules, self.routes)

    def _told(self, node: Node, signal: Signal, now: float, why: str = "") -> Node:
        health = node.health.after(signal, now, self.rules, turns=self.turns, why=why)
        return node if health is node.health else changed(node, health=health)

    def _reported(self, node: Node, event: Reported) -> Node:
        report = event.report or node.report
        if report is None:
            return node
        if node.report and node.report.boot != report.boot:
            node = changed(self._told(node, Signal.RENEWED, event.now), sent=())
        ready = report.state is State.READY
        node = self._told(node, Signal.READY if ready else Signal.AWAY, event.now, "" if ready else report.why)
        sent = prediction.fresh(node.sent, event.now)
        held = _held(event.report) if event.report else node.held
        node = changed(node, report=report, seen=event.now, sent=sent, held=held)
        return _busy_since(node, None, event.now)

    def _attempted(self, node: Node, event: Attempted) -> Node:
        if event.turn < node.health.counts_from:
            return node
        signal = event.signal
        trips = signal is Signal.FAILED and node.health.would_trip(event.now, self.rules)
        if trips and not self._can_spare(node, event.now):
            signal = Signal.SPARED
        return self._told(node, signal, event.now, event.why)

    def _serving(self, model: str) -> list[Node]:
        """The nodes that last said that they serve the model."""
        return [node for node in self.nodes.values() if node.report and any(m.id == model for m in node.report.models)]

    def _can_spare(self, node: Node, now: float) -> bool:
        """Whether each of its models keeps a node in full service, and at least half of its nodes, without it."""
        for model in node.report.models if node.report else ():
            nodes = self._serving(model.id)
            others = [other for other in nodes if other.name != node.name]
            out = 1 + sum(other.health.at(now).state in OUT for other in others)
            left = any(other.standing(now, self.rules.stale_after_s).full for other in others)
            if not left or 2 * out > len(nodes):
                return False
        return True

    def _called_back(self, now: float) -> Fleet:
        """The fleet in which no model has nobody in full service while a node is kept out that would do."""
        fleet = self
        stale_after = self.rules.stale_after_s
        for node in [node for node in self.nodes.values() if node.health.state in OUT]:
            back = self._told(node, Signal.NEEDED, now)
            if not back.standing(now, stale_after).full:
                continue
            for model in back.report.models if back.report else ():
                if not any(other.standing(now, stale_after).full for other in fleet._serving(model.id)):
                    fleet = fleet._with(back)
        return fleet

    def _listed(self, addresses: Iterable[Address], routes: Mapping[str, Route]) -> Fleet:
        # Those of the first list may have served for long; whoever joins later starts slowly.
        health = Health(Condition.JOINING if self.nodes else Condition.UNKNOWN, counts_from=self.turns + 1)
        nodes = {}
        for address in addresses:
            old = self.nodes.get(address.name)
            if old is None or old.url != address.url:
                old = Node(address.name, address.url, health=health, lease=old.lease if old else None)
            nodes[address.name] = changed(old, labels=address.labels, weight=address.weight)
        return dataclasses.replace(self, nodes=nodes, routes=routes)

    def _leased(self, leases: Iterable[Lease]) -> Fleet:
        held = {lease.node: lease for lease in leases}
        nodes = {n.name: changed(n, lease=held.get(n.name)) for n in self.nodes.values()}
        return dataclasses.replace(self, nodes=nodes)


def _busy_since(node: Node, since: Load | None, now: float) -> Node:
    """Once it has told of its load, which counts what this gate has sent there so far; None: as in its report."""
    owed = prediction.backlog(node.sent, -math.inf)
    return changed(node, since=since, told=now, counted=node.in_flight, owed=owed, computed=0)


def _over(node: Node, sent: Sent, *, computed: bool = True) -> Node:
    """With nothing of the request left to compute."""
    sents, tokens = prediction.over(node.sent, sent, computed=computed)
    reported = node.told is not None and sent.now <= node.told
    return changed(node, sent=sents, computed=node.computed + tokens * reported)


def _finished(node: Node, event: Finished) -> Node:
    asked = event.sent
    if asked:
        node = _over(node, asked, computed=event.computed)
    held, sent = node.held, node.sent
    if asked and event.cached is not None and asked.missed(event.cached):
        sent = prediction.corrected(sent, asked, event.cached)
        held = held.difference(asked.blocks[asked.really(event.cached) :])
    # `counted` stays: what was counted in the report and has ended since lowers the estimate by itself.
    return changed(node, in_flight=max(0, node.in_flight - 1), held=held, sent=sent)


def _held(report: Report) -> frozenset[int]:
    """Unpacked once a report, not once a request. What cannot be read is nothing held: routing is all that it costs."""
    try:
        return chain.unpack(report.cache.blocks)
    except ValueError:
        return frozenset()


class View:
    """Holds the latest snapshot for one event loop. Readers take `.fleet` and never wait; writers apply events.

    `moved` is called with each node whose health has come to another state, once the snapshot shows it.
    """

    def __init__(self, fleet: Fleet | None = None, moved: Callable[[Node], None] | None = None) -> None:
        self.fleet = fleet or Fleet()
        self._moved = moved
        self._followers: list[Callable[[Event], None]] = []

    def follow(self, follower: Callable[[Event], None]) -> None:
        """Call `follower` after each event, within `apply`: it should do no more than take note."""
        self._followers.append(follower)

    def apply(self, event: Event) -> None:
        before, self.fleet = self.fleet, self.fleet.apply(event)
        for follower in self._followers:
            follower(event)
        if self._moved is None:
            return
        for node in self.fleet.nodes.values():
            old = before.nodes.get(node.name)
            if old and old is not node and _where(old) != _where(node):
                self._moved(node)


def _where(node: Node) -> tuple[Condition, float | None]:
    return node.health.state, node.health.since
