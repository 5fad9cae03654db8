"""Which nodes may begin an answer, and which may go on with one that another node began.

A node may go on when it serves the model with the same weights and the same chat template and speaks this version of
the resume format: pure comparisons against a fleet snapshot, in the order of the policy that ranked the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmgate.core.candidate import Candidate
from llmgate.core.fleet import Fleet, Node
from llmnode.wire.resume import VERSION, Origin


@dataclass(frozen=True)
class Seat:
    """A process that may be asked: after a restart (another `boot`) a node is another one. `n_ctx`: 0 for unknown."""

    name: str
    boot: str
    n_ctx: int


def seats(fleet: Fleet, ranked: Iterable[Candidate]) -> tuple[Seat, ...]:
    """The nodes that may begin an answer, best first."""
    found = ((candidate, fleet.nodes.get(candidate.name)) for candidate in ranked)
    return tuple(Seat(c.name, node.report.boot, c.n_ctx) for c, node in found if node and node.report)


def heirs(fleet: Fleet, ranked: Iterable[Candidate], origin: Origin | None) -> tuple[Seat, ...]:
    """Those of them that may go on with an answer from `origin`, in the same order."""
    if origin is None:
        return ()
    able = [c for c in ranked if c.name in fleet.nodes and origin_of(fleet.nodes[c.name], origin.model) == origin]
    return seats(fleet, able)


def origin_of(node: Node, model_id: str) -> Origin | None:
    """What an answer of this node can be gone on from, by its last report; None when it speaks no resume, or knows no
    digest."""
    model = node.model(model_id)
    if model is None or not model.digest or node.report is None or node.report.resume != VERSION:
        return None
    return Origin(model.id, model.digest, model.template)
