"""Which nodes may answer a request, in which order, and why: pure functions of a fleet snapshot.

A policy takes (fleet, ask, now, stale_after) and gives a `Choice`, never an error: whoever asks turns an empty one
into an answer with `refusal`. The numbers that decided stay in the choice, for the request log.

Least loaded: the share of its slots that a node has busy or asked for, `busy / slots`, where a node that starts slowly
counts fewer slots. Ties go to the node that has rested longest, then by name, so that the same snapshot always gives
the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmgate.core.fleet import Fleet, Node
from llmnode.wire.errors import ApiError, ModelNotFound, Overloaded

NO_NODE_RETRY_S = 1.0
"""`Retry-After` when no node is ready, in seconds: nodes are polled about that often."""


@dataclass(frozen=True)
class Ask:
    """What routing needs to know of a request. `kinds`: a node must offer the model for one of these uses."""

    model: str
    kinds: frozenset[str]


@dataclass(frozen=True)
class Candidate:
    """One node that may answer: its load, and `n_ctx`, the most tokens that it lets one request hold (0: unknown).

    share: how much of its slots to use for now (`Node.share`); one of them at least.
    """

    name: str
    busy: int
    slots: int
    n_ctx: int
    turn: int
    share: float = 1.0

    @property
    def load(self) -> float:
        return self.busy / max(1.0, self.slots * self.share)

    def __str__(self) -> str:
        return f"{self.name} {self.busy}/{self.slots}" + (f" at {self.share:.0%}" if self.share < 1.0 else "")


@dataclass(frozen=True)
class Choice:
    """Candidates, best first, and the nodes passed over with the reason for each."""

    ranked: tuple[Candidate, ...]
    passed_over: tuple[tuple[str, str], ...]
    policy: str

    @property
    def why(self) -> str:
        """One line for the request log, e.g. "least-loaded: a 1/4, b 3/4; not c (draining)"."""
        text = f"{self.policy}: " + (", ".join(map(str, self.ranked)) or "nobody")
        if self.passed_over:
            text += "; not " + ", ".join(f"{name} ({why})" for name, why in self.passed_over)
        return text


def least_loaded(fleet: Fleet, ask: Ask, now: float, stale_after: float) -> Choice:
    """Candidates by `busy / slots`, then by who rested longest, then by name."""
    found, passed_over = _candidates(fleet, ask, now, stale_after)
    ranked = tuple(sorted(found, key=lambda c: (c.load, c.turn, c.name)))
    return Choice(ranked, passed_over, "least-loaded")


def refusal(fleet: Fleet, ask: Ask, choice: Choice, visible: list[str]) -> ApiError:
    """What to answer when a choice is empty. `visible`: the models that the asking key may use.

    404 is said only when every listed node has reported: until then the model may be on a node not yet heard of, and
    a client should come again rather than give up.
    """
    if fleet.resolve(ask.model) is None:
        silent = fleet.silent()
        if not silent and fleet.nodes:
            return ModelNotFound(ask.model, visible)
        who = ", ".join(silent) or "no nodes are listed"
        return Overloaded(
            f"no ready node serves the model {ask.model!r}; not heard of yet: {who}",
            retry_after=NO_NODE_RETRY_S,
            code="no_ready_node",
        )
    why = "; ".join(f"{name}: {why}" for name, why in choice.passed_over)
    return Overloaded(
        f"no ready node serves the model {ask.model!r} now ({why})", retry_after=NO_NODE_RETRY_S, code="no_ready_node"
    )


def _candidates(
    fleet: Fleet, ask: Ask, now: float, stale_after: float
) -> tuple[list[Candidate], tuple[tuple[str, str], ...]]:
    found: list[Candidate] = []
    passed_over: list[tuple[str, str]] = []
    for node in fleet.nodes.values():
        reason = _unfit(node, ask, now, stale_after)
        if reason is None:
            continue
        if reason:
            passed_over.append((node.name, reason))
            continue
        model = node.model(ask.model)
        n_ctx = model.n_ctx if model else 0
        found.append(Candidate(node.name, node.busy, node.slots, n_ctx, node.turn, node.share(now)))
    return found, tuple(passed_over)


def _unfit(node: Node, ask: Ask, now: float, stale_after: float) -> str | None:
    """Why a node cannot take this; "" when it can, None when it does not serve the model and so need not be named."""
    standing = node.standing(now, stale_after)
    model = node.model(ask.model)
    if model is None:
        return None if node.report else standing.why
    if not standing.usable:
        return standing.why
    if model.state != "ready":
        return f"its model is {model.state}"
    if not ask.kinds.intersection(model.kinds):
        return f"it offers {model.id} for {', '.join(model.kinds) or 'nothing'} only"
    return ""
