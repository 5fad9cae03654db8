"""What scripts written for llama-server ask of a server: /props and /slots, of the model that the query names.

Owns: how the answers of several nodes become one. Of /props that of the best node stands for all, with the slots of
all; of /slots there are those of all nodes, numbered through, each with the name of its node.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json as json_response

from llmgate.api.conversation import visible
from llmgate.api.door import Door, request_id
from llmgate.core import body as bodies
from llmgate.core import policy
from llmgate.core.fleet import View
from llmgate.core.keys import require_model
from llmgate.core.policy import Ask
from llmgate.core.prompt import Prompt
from llmgate.relay import Relay
from llmnode.wire.errors import InvalidRequest, Overloaded


def blueprint(
    *, door: Door, view: View, relay: Relay, clock: Callable[[], float], stale_after_s: float, timeout_s: float
) -> Blueprint:
    """timeout_s: how long a node may take to answer."""
    routes = Blueprint("props")

    def nodes_of(request: Request) -> list[str]:
        """Names of the nodes that serve the model, the best first."""
        key, fleet = door.who(request), view.fleet
        try:
            name = bodies.asked({"model": request.args.get("model")}, visible(fleet, key))
        except ValueError as error:
            raise InvalidRequest(str(error), param="model") from None
        ask = Ask(name, policy.ANY, Prompt({}, request.path), request_id(request), 0, key)
        choice = policy.choose(fleet, ask, clock(), stale_after_s)
        if choice.model is not None:
            require_model(key, name, choice.model)
        if not choice.ranked:
            raise policy.refusal(fleet, ask, choice, visible(fleet, key))
        return [candidate.name for candidate in choice.ranked]

    async def fetched(name: str, path: str) -> Any:
        """What a node answers; None when it does not, as of one that has just gone."""
        node = view.fleet.nodes.get(name)
        try:
            status, _, body = await relay.fetch(node.url if node else "", path, timeout_s=timeout_s)
            return json.loads(body) if status == 200 else None
        except (ConnectionError, ValueError):
            return None

    async def all_of(request: Request, path: str) -> list[tuple[str, Any]]:
        names = nodes_of(request)
        answers = await asyncio.gather(*(fetched(name, path) for name in names))
        found = [(name, answer) for name, answer in zip(names, answers, strict=True) if answer]
        if not found:
            raise Overloaded(f"no node answers {path} now; asked: {', '.join(names)}", code="no_node_answered")
        return found

    async def props(request: Request) -> HTTPResponse:
        found = await all_of(request, "/props")
        return json_response({**found[0][1], "total_slots": sum(one.get("total_slots", 0) for _, one in found)})

    async def slots(request: Request) -> HTTPResponse:
        found = [{**slot, "node": name} for name, slots in await all_of(request, "/slots") for slot in slots]
        if request.args.get("fail_on_no_slot") == "1" and all(slot["is_processing"] for slot in found):
            raise Overloaded(f"all {len(found)} slots are busy", code="no_slot_available")
        return json_response([{**slot, "id": number} for number, slot in enumerate(found)])

    routes.add_route(props, "/props", methods=["GET"])
    routes.add_route(slots, "/slots", methods=["GET"])
    return routes
