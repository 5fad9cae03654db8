"""What operators, the gate and systemd's neighbours ask of a node: /health /ready /node /metrics /resume.

/health is liveness, judged from the engine's own heartbeat; /ready says whether new work is taken; /node is the report
that the gate polls; /metrics is for Prometheus; /resume goes on with an answer that another node has begun.
"""

from __future__ import annotations

import hashlib
import json as plain_json

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, json

from llmnode.api import answer
from llmnode.api.serving import Serving
from llmnode.metrics import CONTENT_TYPE
from llmnode.wire.errors import Overloaded
from llmnode.wire.node import State
from llmnode.wire.resume import PATH as RESUME_PATH


def blueprint(serving: Serving) -> Blueprint:
    """The routes, bound to one node."""
    routes = Blueprint("node")

    def require_health() -> None:
        trouble = serving.trouble()
        if trouble:
            raise Overloaded(trouble, code="unhealthy", retry_after=5.0)

    @routes.get("/health")
    async def health(request: Request) -> HTTPResponse:
        require_health()
        return json({"status": "ok", "state": serving.state.value})

    @routes.get("/ready")
    async def ready(request: Request) -> HTTPResponse:
        if serving.state is not State.READY:
            raise serving.not_ready()
        require_health()
        return json({"status": "ready", "state": serving.state.value})

    @routes.get("/node")
    async def node(request: Request) -> HTTPResponse:
        body = plain_json.dumps(serving.report().json(), separators=(",", ":")).encode()
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        known = {tag.strip() for tag in request.headers.get("if-none-match", "").split(",")}
        headers = {"etag": etag, "cache-control": "no-cache"}
        if etag in known:
            return HTTPResponse(status=304, headers=headers)
        return HTTPResponse(body, headers=headers, content_type="application/json")

    @routes.get("/metrics")
    async def metrics(request: Request) -> HTTPResponse:
        return HTTPResponse(serving.metrics.text(), content_type=CONTENT_TYPE)

    @routes.post(RESUME_PATH)
    async def resume(request: Request) -> HTTPResponse | None:
        return await answer.go_on(request, serving)

    return routes
