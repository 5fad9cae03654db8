"""What clients may ask of models: everything that `core/policy.py` knows a use for, and the list of models."""

from __future__ import annotations

from typing import Any

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json as json_response

from llmgate.api.conversation import Conversations, visible
from llmgate.api.door import Door
from llmgate.core.fleet import Fleet, View
from llmgate.core.keys import require_model
from llmgate.core.policy import USES
from llmnode.wire import cards
from llmnode.wire.errors import ModelNotFound


def blueprint(conversations: Conversations, *, door: Door, view: View, started: float) -> Blueprint:
    """`started`: seconds since the epoch, which stands for `created` in the list of models."""
    routes = Blueprint("openai")

    async def ask(request: Request) -> HTTPResponse | None:
        return await conversations.handle(request, USES[request.path])

    def card(fleet: Fleet, id: str, name: str) -> dict[str, Any]:
        """Of the nodes that serve it the one that has loaded it knows more than the others."""
        served = [model for node in fleet.nodes.values() if (model := node.model(id))]
        return max(served, key=lambda model: model.state == "ready").card(name, int(started))

    async def models(request: Request) -> HTTPResponse:
        key, fleet = door.who(request), view.fleet
        found = [card(fleet, id, id) for id in visible(fleet, key)]
        return json_response(cards.listed(found, anthropic=cards.ANTHROPIC_VERSION in request.headers))

    async def model(request: Request, name: str) -> HTTPResponse:
        key, fleet = door.who(request), view.fleet
        found = fleet.resolve(name)
        if found is None:
            raise ModelNotFound(name, visible(fleet, key))
        require_model(key, name, found)
        anthropic = cards.ANTHROPIC_VERSION in request.headers
        return json_response(cards.card(card(fleet, found, found), anthropic=anthropic))

    for path in USES:
        routes.add_route(ask, path, methods=["POST"], name=path.strip("/").replace("/", "_").replace("-", "_"))
    routes.add_route(models, "/v1/models", methods=["GET"])
    routes.add_route(models, "/models", methods=["GET"], name="models_of_llama_server")
    routes.add_route(model, "/v1/models/<name:path>", methods=["GET"])
    return routes
