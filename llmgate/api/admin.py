"""What operators and playbooks ask: the nodes as the gate sees them, and drain leases. Wants an admin key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json as json_response

from llmgate.api.door import Door
from llmgate.core import keys, leases
from llmgate.core.fleet import Lease, Leased, Node, View
from llmgate.core.health import Health
from llmgate.ledger import Ledger
from llmnode.wire.errors import InvalidRequest, NotFound


def blueprint(
    *,
    door: Door,
    view: View,
    ledger: Ledger,
    in_flight: Callable[[], Mapping[str, int]],
    clock: Callable[[], float],
    wall: Callable[[], float],
    stale_after_s: float,
) -> Blueprint:
    """`in_flight`: requests at each node, of all workers."""
    routes = Blueprint("admin", url_prefix="/admin")

    def shown(node: Node, running: Mapping[str, int]) -> dict[str, Any]:
        described = describe(node, now=clock(), wall=wall(), stale_after_s=stale_after_s)
        return described | {"in_flight": running.get(node.name, 0)}

    def named(name: str) -> Node:
        node = view.fleet.nodes.get(name)
        if node is None:
            have = ", ".join(sorted(view.fleet.nodes))
            raise NotFound(f"there is no node {name!r}; nodes: {have}", param="name", code="node_not_found")
        return node

    async def nodes(request: Request) -> HTTPResponse:
        keys.require_admin(door.who(request))
        running = in_flight()
        return json_response({"nodes": [shown(node, running) for node in view.fleet.nodes.values()]})

    async def one(request: Request, name: str) -> HTTPResponse:
        keys.require_admin(door.who(request))
        return json_response(shown(named(name), in_flight()))

    async def drain(request: Request, name: str) -> HTTPResponse:
        keys.require_admin(door.who(request))
        ask = leases.parse_drain(_object(request.body))
        named(name)
        seen = view.fleet

        def decide(held: tuple[Lease, ...]) -> Lease:
            fleet = seen.apply(Leased(leases.live(held, wall())))
            return leases.take(fleet, fleet.nodes[name], ask, now=clock(), wall=wall(), stale_after=stale_after_s)

        lease = await ledger.take_lease(decide)
        return json_response(describe_lease(lease, wall()))

    async def undrain(request: Request, name: str) -> HTTPResponse:
        keys.require_admin(door.who(request))
        owner, force = request.args.get("owner"), request.args.get("force") == "true"
        named(name)
        seen = view.fleet

        def check(held: tuple[Lease, ...]) -> None:
            fleet = seen.apply(Leased(leases.live(held, wall())))
            leases.require_release(fleet.nodes[name], owner, force=force)

        released = await ledger.release_lease(name, check)
        return json_response({"node": name, "released": released})

    routes.add_route(nodes, "/nodes", methods=["GET"])
    routes.add_route(one, "/nodes/<name:str>", methods=["GET"])
    routes.add_route(drain, "/nodes/<name:str>/drain", methods=["POST"])
    routes.add_route(undrain, "/nodes/<name:str>/drain", methods=["DELETE"])
    return routes


def describe(node: Node, *, now: float, wall: float, stale_after_s: float) -> dict[str, Any]:
    """A node as /admin/nodes shows it: `state` and `usable` count all there is to know, `health` its history alone."""
    standing = node.standing(now, stale_after_s)
    report = node.report
    return {
        "name": node.name,
        "url": node.url,
        "state": standing.state,
        "why": standing.why,
        "usable": standing.usable,
        "in_flight": node.in_flight,
        "health": describe_health(node.health.at(now), now),
        "lease": describe_lease(node.lease, wall) if node.lease else None,
        "boot": report.boot if report else "",
        "release": report.release if report else "",
        "config": report.config if report else "",
        "models": [dataclasses.asdict(model) for model in report.models] if report else [],
        "load": dataclasses.asdict(node.load) if node.load else None,
        "seen_seconds_ago": None if node.seen is None else round(now - node.seen, 3),
    }


def describe_health(health: Health, now: float) -> dict[str, Any]:
    """A node's health as the admin API shows it: its state (docs/health.md), since when, and the breaker's numbers."""
    return {
        "state": health.state.word,
        "why": health.why,
        "since_seconds": None if health.since is None else round(now - health.since, 3),
        "ends_in_seconds": None if health.until is None else round(health.until - now, 3),
        "share": round(health.share(now), 3),
        "failures_in_a_row": health.failures,
        "recent_answered": sum(answered for _, answered in health.recent),
        "recent_failed": sum(not answered for _, answered in health.recent),
        "missed_polls": health.missed,
        "ejections": health.ejections,
        "level": health.level,
    }


def describe_lease(lease: Lease, wall: float) -> dict[str, Any]:
    """A lease as the admin API shows it: seconds left and the end in ISO 8601, both null for a cordon."""
    end = lease.expires
    return {
        "node": lease.node,
        "owner": lease.owner,
        "reason": lease.reason,
        "ttl_seconds": None if end is None else round(max(0.0, end - wall), 3),
        "expires_at": None if end is None else datetime.fromtimestamp(end, timezone.utc).isoformat(timespec="seconds"),
    }


def _object(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the request body is not valid JSON", code="invalid_json") from error
