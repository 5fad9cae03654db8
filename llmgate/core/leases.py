"""Drain leases: who may take a node out of rotation, and when that must be refused.

A lease has an owner, perhaps a reason, and perhaps an end; one without an end is a cordon, which stays until somebody
lifts it. The same owner renews by asking again. It is refused (409) when another owner holds the node, when fewer nodes
of one of its models would be ready than the drain's `min_ready`, or when those that remain could not carry the model's
present load; `force` overrides all three. So those who drain many nodes at once need not agree with each other: this
file decides, with all leases before it. Whether a lease is over is decided here, from the wall clock's seconds that the
caller passes in; that it is stored is the ledger's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmgate.core.fleet import Fleet, Lease, Node
from llmnode.wire.errors import Conflict, InvalidRequest

MAX_TTL_S = 30 * 24 * 3600
MAX_TEXT = 200
_FIELDS = ("owner", "ttl_seconds", "reason", "force", "min_ready")


@dataclass(frozen=True)
class DrainRequest:
    """A drain as asked for. `ttl_s` None makes a cordon.

    min_ready: nodes that each of the node's models must keep ready without it; None asks for no number, and 0 says that
    a model may be without a node for the time of the drain.
    """

    owner: str
    ttl_s: float | None
    reason: str
    force: bool
    min_ready: int | None = None


def parse_drain(body: Any) -> DrainRequest:
    """Read a drain from decoded JSON. Raises InvalidRequest that names the field."""
    if not isinstance(body, Mapping):
        raise InvalidRequest("the body must be a JSON object with an owner")
    for name in body:
        if name not in _FIELDS:
            raise InvalidRequest(f"unknown field {name!r}; a drain takes {', '.join(_FIELDS)}", param=name)
    name = "ttl_seconds"
    ttl = body.get(name)
    if ttl is not None:
        number = isinstance(ttl, (int, float)) and not isinstance(ttl, bool) and math.isfinite(ttl)
        if not number or not 0 < ttl <= MAX_TTL_S:
            raise InvalidRequest(f"{name} must be above 0 and at most {MAX_TTL_S}, got {ttl!r}", param=name)
    force = body.get("force", False)
    if not isinstance(force, bool):
        raise InvalidRequest(f"force must be true or false, got {force!r}", param="force")
    least = body.get("min_ready")
    if least is not None and (not isinstance(least, int) or isinstance(least, bool) or least < 0):
        raise InvalidRequest(f"min_ready must be a whole number from 0, got {least!r}", param="min_ready")
    return DrainRequest(_text(body, "owner", required=True), ttl, _text(body, "reason", required=False), force, least)


def take(fleet: Fleet, node: Node, ask: DrainRequest, *, now: float, wall: float, stale_after: float) -> Lease:
    """The lease that this drain makes or renews. `now` monotonic, `wall` since the epoch. Raises Conflict."""
    held = node.lease
    if held and held.owner != ask.owner and not ask.force:
        raise Conflict(f"the node {node.name} is already drained by {held.owner}", code="lease_held")
    # A node that takes no new work as it is leaves no gap: renewals and dead nodes are never refused for load.
    if not ask.force and node.standing(now, stale_after).full:
        _require_room(fleet, node, ask.min_ready, now, stale_after)
    return Lease(node.name, ask.owner, ask.reason, wall, None if ask.ttl_s is None else wall + ask.ttl_s)


def require_release(node: Node, owner: str | None, *, force: bool) -> None:
    """Raise unless this owner may lift the node's lease. Lifting what is not there is fine: the aim is reached."""
    if force or node.lease is None:
        return
    if not owner:
        raise InvalidRequest("name the owner who lifts the drain: ?owner=NAME", param="owner")
    if node.lease.owner != owner:
        raise Conflict(f"the node {node.name} is drained by {node.lease.owner}, not {owner}", code="lease_held")


def live(leases: tuple[Lease, ...], wall: float) -> tuple[Lease, ...]:
    """Those that have not expired."""
    return tuple(lease for lease in leases if lease.expires is None or lease.expires > wall)


def _require_room(fleet: Fleet, node: Node, min_ready: int | None, now: float, stale_after: float) -> None:
    for model in node.report.models if node.report else ():
        others = [
            other
            for other in fleet.models()[model.id]
            if other.name != node.name and other.standing(now, stale_after).full
        ]
        if min_ready is not None and len(others) < min_ready:
            raise Conflict(
                f"draining {node.name} would leave the model {model.id} with {len(others)} ready nodes, and min_ready "
                f"is {min_ready}",
                code="capacity",
            )
        if min_ready == 0 and not others:
            continue
        slots = sum(other.slots for other in others)
        load = node.busy + sum(other.busy for other in others)
        if not others or load > slots:
            raise Conflict(
                f"draining {node.name} would leave the model {model.id} with {slots} ready slots for "
                f"{load} requests; add force to do it anyway",
                code="would_leave_no_room",
            )


def _text(body: Mapping[str, Any], name: str, *, required: bool) -> str:
    value = body.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT or (required and not value):
        raise InvalidRequest(f"{name} must be a line of 1 to {MAX_TEXT} characters", param=name)
    return value
