"""What machines ask of the gate itself, without a key: /health, /ready, /metrics.

/health: the worker answers, and says which release and settings it runs: the playbooks reload the gate when these are
not the wanted ones. /ready: 200 while at least one node takes work and the gate is not draining, so that a load
balancer in front of several gates sends requests only where they can be answered; 503 says why. /metrics: what all
workers have counted together.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST
from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json, raw

from llmgate.api.door import Door
from llmgate.core.fleet import View
from llmgate.core.policy import NO_NODE_RETRY_S
from llmgate.line import Post
from llmgate.metrics import Metrics
from llmnode.service.release import release
from llmnode.wire.errors import Overloaded


def blueprint(
    *,
    door: Door,
    view: View,
    metrics: Metrics,
    clock: Callable[[], float],
    stale_after_s: float,
    config: str,
    post: Post,
) -> Blueprint:
    routes = Blueprint("probes")
    who = {"generation": post.generation, "worker": post.place, "pid": os.getpid()}
    known = {"status": "ok", "release": release(), "config": config} | who

    async def health(request: Request) -> HTTPResponse:
        return json(known)

    async def ready(request: Request) -> HTTPResponse:
        if door.draining:
            raise Overloaded("this gate is shutting down", code="draining")
        standings = {n.name: n.standing(clock(), stale_after_s) for n in view.fleet.nodes.values()}
        usable = [name for name, standing in standings.items() if standing.usable]
        if not usable:
            why = "; ".join(f"{name}: {standing.why}" for name, standing in standings.items())
            raise Overloaded(f"no node takes work ({why})", retry_after=NO_NODE_RETRY_S, code="no_ready_node")
        return json({"status": "ready", "nodes": len(standings), "usable": len(usable)})

    async def scrape(request: Request) -> HTTPResponse:
        return raw(metrics.text(), content_type=CONTENT_TYPE_LATEST)

    routes.add_route(health, "/health", methods=["GET", "HEAD"])
    routes.add_route(ready, "/ready", methods=["GET", "HEAD"])
    routes.add_route(scrape, "/metrics", methods=["GET"])
    return routes
