"""What the console watches: the whole fleet at once, the same as it changes, and what the router would do.

Owns the shape of `/admin/fleet` and the life of its streams. A stream says once a second all that is known now, and of
the history what is new. It is nobody's request: it ends when the gate drains, when this worker leaves, or when its key
is revoked, and the page connects again. There are at most `MOST` of them in a worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json as json_response

from llmgate.api.admin import describe
from llmgate.api.conversation import visible
from llmgate.api.door import Door, request_id
from llmgate.api.entrance import has_admin
from llmgate.core import body as bodies
from llmgate.core import keys, policy
from llmgate.core.explanation import as_json, explain
from llmgate.core.fleet import View
from llmgate.core.history import History
from llmgate.core.keys import Key
from llmgate.core.policy import USES, Ask
from llmgate.core.prompt import Prompt
from llmnode.service.release import release
from llmnode.wire.errors import ApiError, InvalidRequest, Overloaded

BEAT_S = 1.0
MOST = 64
"""Streams of one worker: each costs it a report of every node once a second."""
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_EXPLAINED = ("path", "body")


def blueprint(
    *,
    door: Door,
    view: View,
    history: History,
    in_flight: Callable[[], Mapping[str, int]],
    waiting: Callable[[], Mapping[str, int]],
    dice: Callable[[], int],
    clock: Callable[[], float],
    wall: Callable[[], float],
    stale_after_s: float,
    workers: int,
    admin_apart: bool,
) -> Blueprint:
    """`in_flight`, `waiting`: requests at each node, and before all of them by model, of all workers. `dice`: 64 random
    bits each time."""
    routes = Blueprint("watch")
    streams: set[object] = set()

    def fleet_now(after: float) -> dict[str, Any]:
        fleet, running, now = view.fleet, in_flight(), wall()
        nodes = [
            describe(node, now=clock(), wall=now, stale_after_s=stale_after_s)
            | {"in_flight": running.get(node.name, 0), "labels": dict(sorted(node.labels)), "weight": node.weight}
            for node in fleet.nodes.values()
        ]
        gate = {"host": socket.gethostname(), "release": release(), "workers": workers, "pid": os.getpid()}
        policies = {model: fleet.route_of(model).policy for model in sorted(fleet.models())}
        return {
            "now": round(now, 3),
            "gate": gate | {"policies": policies},
            "nodes": nodes,
            "history": history.since(after),
            "queue": {model: length for model, length in waiting().items() if length},
        }

    async def fleet(request: Request) -> HTTPResponse:
        keys.require_admin(door.who(request))
        return json_response(fleet_now(0.0))

    async def events(request: Request) -> None:
        keys.require_admin(door.who(request))
        if len(streams) >= MOST:
            raise Overloaded(f"{MOST} consoles watch through this worker, which is the most that may")
        me = object()
        streams.add(me)
        try:
            await follow(request)
        finally:
            streams.discard(me)

    async def follow(request: Request) -> None:
        # Its connection is used for nothing else, so that a worker that leaves need not wait for it.
        request.stream.keep_alive = False  # type: ignore[union-attr]
        response = await request.respond(headers=_HEADERS, content_type="text/event-stream")
        assert isinstance(response, HTTPResponse), "respond() without a response makes a new one"
        seen = 0.0
        while not (door.draining or door.leaving) and still_admin(request):
            last = history.last
            await response.send(b"event: fleet\ndata: " + json.dumps(fleet_now(seen)).encode() + b"\n\n")
            seen = last
            await asyncio.sleep(BEAT_S)
        await response.eof()  # type: ignore[no-untyped-call]

    def still_admin(request: Request) -> bool:
        try:
            return door.who(request).admin
        except ApiError:
            return False

    async def explained(request: Request) -> HTTPResponse:
        key = door.who(request)
        keys.require_admin(key)
        path, body = _explained(request.body)
        name = _model(body, visible(view.fleet, key, USES[path]) or visible(view.fleet, key))
        ask = Ask(name, USES[path], Prompt(body, path), request_id(request), dice(), key)
        return json_response(as_json(explain(view.fleet, ask, clock(), stale_after_s)))

    async def key(request: Request) -> HTTPResponse:
        here = has_admin(request, apart=admin_apart)
        return json_response(describe_key(door.who(request)) | {"admin_api": here})

    routes.add_route(fleet, "/admin/fleet", methods=["GET"])
    routes.add_route(events, "/admin/fleet/events", methods=["GET"])
    routes.add_route(explained, "/admin/explain", methods=["POST"])
    routes.add_route(key, "/v1/key", methods=["GET"])
    return routes


def describe_key(key: Key) -> dict[str, Any]:
    """A key as whoever holds it may see it."""
    return {
        "name": key.name,
        "role": "admin" if key.admin else "user",
        "models": list(key.models),
        "priority": key.priority.word,
        "anonymous": key == keys.ANONYMOUS,
    }


def _explained(body: bytes) -> tuple[str, dict[str, Any]]:
    """The path and the body that an explanation is asked for. Raises InvalidRequest."""
    try:
        asked = bodies.read(body)
    except ValueError as error:
        raise InvalidRequest(f"the request body {error}", code="invalid_json") from error
    for name in asked:
        if name not in _EXPLAINED:
            raise InvalidRequest(f"unknown field {name!r}; it takes {' and '.join(_EXPLAINED)}", param=name)
    path, wanted = asked.get("path", next(iter(USES))), asked.get("body")
    if not isinstance(path, str) or path not in USES:
        raise InvalidRequest(f"path must be one of {', '.join(USES)}, got {path!r}", param="path")
    if not isinstance(wanted, dict):
        raise InvalidRequest("body must be the JSON object that would be sent there", param="body")
    return path, wanted


def _model(body: Mapping[str, Any], served: list[str]) -> str:
    try:
        return bodies.asked(body, served)
    except bodies.ModelMissing as error:
        if not served:
            raise Overloaded("no node has reported its models yet", retry_after=policy.NO_NODE_RETRY_S) from None
        raise InvalidRequest(str(error), param="body.model", code="missing_field") from None
    except ValueError as error:
        raise InvalidRequest(str(error), param="body.model") from None
