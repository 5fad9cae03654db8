"""Who may answer a request for a model at all, and why the others may not.

A node is passed over when it takes no new work (its standing), serves the model for another use, or lacks a label that
the model's route asks for. Order is not this file's business: core/policy.py ranks what is found here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmgate.core import cost
from llmgate.core.cost import Cost
from llmgate.core.fleet import Fleet, Node
from llmgate.core.prompt import Prompt
from llmgate.listing import Labels
from llmnode.wire.chain import Chain
from llmnode.wire.node import Model


class Candidate(NamedTuple):
    """One node that may answer: its load, and `n_ctx`, the most tokens that it lets one request hold (0: unknown).

    turn: the fleet's dispatch number when it last got work.    weight: of the nodes file.    release: what it runs.
    share: how much of its slots to use for now (`Node.share`); one of them at least.
    cost: of this request there; None where no policy asks.
    chain: of this request, as this node would name it; None where no policy asks.
    """

    name: str
    busy: int
    slots: int
    n_ctx: int
    turn: int
    share: float = 1.0
    weight: float = 1.0
    release: str = ""
    cost: Cost | None = None
    chain: Chain | None = None

    @property
    def load(self) -> float:
        """The share of its slots that is busy or asked for, over its weight; a node that starts slowly has fewer."""
        return self.busy / max(1.0, self.slots * self.share) / self.weight

    @property
    def full(self) -> bool:
        return self.busy >= self.slots

    @property
    def seconds(self) -> float:
        """The cost of this request here; 0.0 where none was asked for."""
        return self.cost.seconds if self.cost else 0.0

    @property
    def before_s(self) -> float:
        """Of this cost, what is not this request's own doing."""
        return self.cost.before_s if self.cost else 0.0

    @property
    def cached(self) -> int:
        """Tokens of this request that it holds."""
        return self.cost.cached if self.cost else 0

    @property
    def uncached(self) -> int:
        return self.cost.prompt - self.cost.cached if self.cost else 0

    def __str__(self) -> str:
        slow = f" at {self.share:.0%}" if self.share < 1.0 else ""
        return f"{self.name} {self.busy}/{self.slots}{slow}" + (f" ({self.cost})" if self.cost else "")


@dataclass(frozen=True)
class Found:
    """Candidates in the order of the listing, and the nodes passed over with the reason for each.

    awaited: some of these will do as soon as they take work.
    """

    candidates: tuple[Candidate, ...]
    passed_over: tuple[tuple[str, str], ...]
    awaited: bool = False


def find(fleet: Fleet, model: str, kinds: frozenset[str], labels: Labels, now: float, stale_after: float) -> Found:
    """Who serves the model, under this id or alias, for one of these uses."""
    found: list[Candidate] = []
    passed_over: list[tuple[str, str]] = []
    awaited = False
    for node in fleet.nodes.values():
        served = node.model(model)
        unsuited = _unsuited(node, served, kinds, labels)
        reason = _idle(node, served, now, stale_after) or unsuited
        if reason:
            passed_over.append((node.name, reason))
            awaited = awaited or (served is not None and not unsuited)
        elif served:
            release = node.report.release if node.report else ""
            busy, slots, share = node.busy, node.slots, node.share(now)
            found.append(Candidate(node.name, busy, slots, served.n_ctx, node.turn, share, node.weight, release))
    return Found(tuple(found), tuple(passed_over), awaited)


def with_chains(
    candidates: Sequence[Candidate], fleet: Fleet, model: str, prompt: Prompt, now: float
) -> tuple[Candidate, ...]:
    """The same, each with the request's chain and cost at its node."""
    return tuple(_with_chain(candidate, fleet.nodes[candidate.name], model, prompt, now) for candidate in candidates)


def _with_chain(candidate: Candidate, node: Node, model: str, prompt: Prompt, now: float) -> Candidate:
    served = node.model(model)
    assert served is not None, "a candidate serves the model"
    made = prompt.chain(served)
    return candidate._replace(cost=cost.of(node, made, now), chain=made)


def _idle(node: Node, model: Model | None, now: float, stale_after: float) -> str:
    """Why a node takes no work now; "" when it does, or when it serves another model and so need not be named."""
    standing = node.standing(now, stale_after)
    if model is None:
        return "" if node.report else standing.why
    if not standing.usable:
        return standing.why
    return "" if model.state == "ready" else f"its model is {model.state}"


def _unsuited(node: Node, model: Model | None, kinds: frozenset[str], labels: Labels) -> str:
    """Why a node cannot take this at any time; "" when it could, or serves another model."""
    if model is None:
        return ""
    if not kinds.intersection(model.kinds):
        return f"it offers {model.id} for {', '.join(model.kinds) or 'nothing'} only"
    if labels <= node.labels:
        return ""
    lacks = ", ".join(f"{name}={value}" for name, value in sorted(labels - node.labels))
    return f"it lacks the label {lacks}"
