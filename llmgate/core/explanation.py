"""What the router would do with one request, and why: every node's figures, and how each policy ranks them.

The choices come from `policy.choose`, as for a live request, so that what is explained is what is done. `explain` finds
it out, `as_json` and `as_text` tell it: the first to `POST /admin/explain`, the second to `llmgate explain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmgate.core import policy
from llmgate.core.candidate import Candidate
from llmgate.core.fleet import Fleet
from llmgate.core.policy import POLICIES, Ask, Choice

_HEAD = ("NODE", "STATE", "BUSY", "WAIT s", "BACKLOG", "PROMPT", "CACHED", "PREFILL/s", "WEIGHT", "COST s")


@dataclass(frozen=True)
class Explanation:
    """What there is to say of one request. Token counts are estimates, as routing makes them.

    counted: the choice by cost, whose candidates have figures.    choices: of every policy, by name.
    in_force: the policy that the nodes file names for this model.    states: of each node that is named.
    order: of the nodes, as they are listed.
    """

    ask: Ask
    counted: Choice
    choices: dict[str, Choice]
    in_force: str
    states: dict[str, str]
    order: tuple[str, ...]

    @property
    def anybody(self) -> bool:
        """Whether any node can take the request."""
        return bool(self.counted.ranked)

    @property
    def candidates(self) -> list[Candidate]:
        """Those that can, with their figures, in the order of the listing."""
        return sorted(self.counted.ranked, key=lambda candidate: self.order.index(candidate.name))


def explain(fleet: Fleet, ask: Ask, now: float, stale_after: float) -> Explanation:
    """Ask every policy. `now`: monotonic seconds."""
    return Explanation(
        ask,
        policy.choose(fleet, ask, now, stale_after, "prefix"),
        {name: policy.choose(fleet, ask, now, stale_after, name) for name in POLICIES},
        policy.choose(fleet, ask, now, stale_after).policy,
        {node.name: node.standing(now, stale_after).state for node in fleet.nodes.values()},
        tuple(fleet.nodes),
    )


def as_json(said: Explanation) -> dict[str, Any]:
    """The same for programs: seconds, tokens, tokens a second; rankings are names, best first."""
    choice = said.counted
    chain = choice.ranked[0].chain if choice.ranked else None
    return {
        "model": choice.model,
        "asked": said.ask.model,
        "sent_as": choice.name,
        "notes": list(choice.notes),
        "prompt": {"bytes": chain.size, "blocks": len(chain.blocks), "root": f"{chain.root:016x}"} if chain else None,
        "policy": said.in_force,
        "nodes": [_figures_of(candidate, said.states[candidate.name]) for candidate in said.candidates],
        "passed_over": [{"node": name, "state": said.states[name], "why": why} for name, why in choice.passed_over],
        "policies": [
            {
                "policy": name,
                "reason": one.reason,
                "ranking": [candidate.name for candidate in one.ranked],
                "why": one.why,
            }
            for name, one in said.choices.items()
        ],
    }


def as_text(said: Explanation) -> str:
    """The page that `llmgate explain` prints."""
    figures = [_row(candidate, said.states[candidate.name]) for candidate in said.candidates]
    others = [_passed_over(name, why, said.states[name]) for name, why in said.counted.passed_over]
    pages = [_request(said.ask, said.counted), columns(_HEAD, *figures, *others)]
    if said.anybody:
        chosen = [_chosen(name, choice, said.in_force) for name, choice in said.choices.items()]
        pages += [columns(("POLICY", "NODE", "WHY"), *chosen), "* the policy in force for this model"]
    else:
        pages += ["No node can take this request."]
    return "\n\n".join(pages)


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


def _figures_of(candidate: Candidate, state: str) -> dict[str, Any]:
    cost = candidate.cost
    assert cost is not None, "the prefix policy counts"
    return {
        "node": candidate.name,
        "state": state,
        "busy": candidate.busy,
        "slots": candidate.slots,
        "weight": candidate.weight,
        "wait_seconds": round(cost.wait_s, 3),
        "backlog_tokens": cost.backlog,
        "prompt_tokens": cost.prompt,
        "cached_tokens": cost.cached,
        "prefill_tokens_per_second": round(cost.prefill_tps, 1),
        "cost_seconds": round(cost.seconds, 3),
    }


def _row(candidate: Candidate, state: str) -> tuple[str, ...]:
    cost = candidate.cost
    assert cost is not None, "the prefix policy counts"
    return (
        candidate.name,
        state,
        f"{candidate.busy}/{candidate.slots}",
        f"{cost.wait_s:.3f}",
        str(cost.backlog),
        str(cost.prompt),
        str(cost.cached),
        f"{cost.prefill_tps:.0f}",
        f"{candidate.weight:g}",
        f"{cost.seconds:.3f}",
    )


def _passed_over(name: str, why: str, state: str) -> tuple[str, ...]:
    return (name, state, *[""] * (len(_HEAD) - 3), f"not a choice: {why}")


def _chosen(name: str, choice: Choice, in_force: str) -> tuple[str, str, str]:
    return (f"{name}{' *' if name == in_force else ''}", choice.ranked[0].name, choice.why)
