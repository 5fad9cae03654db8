"""What `llmgate explain` prints: for one request every node's figures, and which node each policy would choose and why.

The choices come from `policy.choose`, as for a live request, so that what is explained is what is done.
"""

from __future__ import annotations

from llmgate.core import policy
from llmgate.core.candidate import Candidate
from llmgate.core.fleet import Fleet
from llmgate.core.policy import POLICIES, Ask, Choice

_HEAD = ("NODE", "STATE", "BUSY", "WAIT s", "BACKLOG", "PROMPT", "CACHED", "PREFILL/s", "WEIGHT", "COST s")


def explain(fleet: Fleet, ask: Ask, now: float, stale_after: float) -> tuple[str, bool]:
    """The page, and whether any node can take the request. Token counts are estimates, as routing makes them."""
    counted = policy.choose(fleet, ask, now, stale_after, "prefix")
    in_force = policy.choose(fleet, ask, now, stale_after).policy
    ranked = sorted(counted.ranked, key=lambda c: list(fleet.nodes).index(c.name))
    figures = [_figures(candidate, fleet, now, stale_after) for candidate in ranked]
    others = [_passed_over(name, why, fleet, now, stale_after) for name, why in counted.passed_over]
    pages = [_request(ask, counted), columns(_HEAD, *figures, *others)]
    if ranked:
        chosen = [_chosen(fleet, ask, now, stale_after, name, in_force) for name in POLICIES]
        pages += [columns(("POLICY", "NODE", "WHY"), *chosen), "* the policy in force for this model"]
    else:
        pages += ["No node can take this request."]
    return "\n\n".join(pages), bool(ranked)


def columns(*rows: tuple[str, ...]) -> str:
    """Rows of as many cells each, side by side."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _request(ask: Ask, choice: Choice) -> str:
    model = f"model   {ask.model}"
    if choice.name != ask.model:
        model += f", sent as {choice.name}"
    if choice.notes:
        model += f" ({', '.join(choice.notes)})"
    chain = choice.ranked[0].chain if choice.ranked else None
    if chain is None:
        return model
    return f"{model}\nprompt  {chain.size} bytes, {len(chain.blocks)} blocks, root {chain.root:016x}"


def _figures(candidate: Candidate, fleet: Fleet, now: float, stale_after: float) -> tuple[str, ...]:
    cost = candidate.cost
    assert cost is not None, "the prefix policy counts"
    return (
        candidate.name,
        fleet.nodes[candidate.name].standing(now, stale_after).state,
        f"{candidate.busy}/{candidate.slots}",
        f"{cost.wait_s:.3f}",
        str(cost.backlog),
        str(cost.prompt),
        str(cost.cached),
        f"{cost.prefill_tps:.0f}",
        f"{candidate.weight:g}",
        f"{cost.seconds:.3f}",
    )


def _passed_over(name: str, why: str, fleet: Fleet, now: float, stale_after: float) -> tuple[str, ...]:
    return (name, fleet.nodes[name].standing(now, stale_after).state, *[""] * (len(_HEAD) - 3), f"not a choice: {why}")


def _chosen(fleet: Fleet, ask: Ask, now: float, stale_after: float, name: str, in_force: str) -> tuple[str, str, str]:
    choice = policy.choose(fleet, ask, now, stale_after, name)
    return (f"{name}{' *' if name == in_force else ''}", choice.ranked[0].name, choice.why)
