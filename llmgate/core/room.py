"""Which nodes have room for one more request. Pure functions of a fleet snapshot.

A node has room while it has fewer requests than its slots and `HEADROOM`, by the gate's own view of it: one more than
it can run, so that no slot stays empty between the end of an answer and the next request's way there. As long as one
candidate has room, the ranking decides, and may prefer a busy node that holds the prompt's beginning; but no node is
given more than twice its slots, since those who wait at a node wait in order of arrival and cannot go elsewhere.
"""

from __future__ import annotations

import dataclasses

from llmgate.core.fleet import Fleet
from llmgate.core.policy import Choice

HEADROOM = 1
"""Requests that a node gets beyond its slots."""


def roomy(fleet: Fleet) -> frozenset[str]:
    """The nodes that have room, whether they may be used or not."""
    return frozenset(n.name for n in fleet.nodes.values() if n.busy < n.slots + HEADROOM)


def placed(choice: Choice, fleet: Fleet) -> Choice | None:
    """The choice with the node that takes the request in front; None while no candidate has room."""
    nodes = [(candidate, fleet.nodes[candidate.name]) for candidate in choice.ranked]
    if not any(node.busy < node.slots + HEADROOM for _, node in nodes):
        return None
    first = next(candidate for candidate, node in nodes if node.busy < 2 * node.slots)
    if first is choice.ranked[0]:
        return choice
    others = (candidate for candidate in choice.ranked if candidate is not first)
    return dataclasses.replace(choice, ranked=(first, *others))
