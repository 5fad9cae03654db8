"""What clients may ask: chat, completions, inference and the list of models."""

from __future__ import annotations

from typing import Any

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json as json_response

from llmgate.api.conversation import Conversations, visible
from llmgate.api.door import Door
from llmgate.core.fleet import View
from llmgate.core.keys import require_model
from llmgate.core.policy import CHAT, COMPLETION, EITHER
from llmnode.wire.errors import ModelNotFound


def blueprint(conversations: Conversations, *, door: Door, view: View, started: float) -> Blueprint:
    """`started`: seconds since the epoch, which stands for `created` in the list of models."""
    routes = Blueprint("openai")

    async def chat(request: Request) -> HTTPResponse | None:
        return await conversations.handle(request, CHAT)

    async def completions(request: Request) -> HTTPResponse | None:
        return await conversations.handle(request, COMPLETION)

    async def inference(request: Request) -> HTTPResponse | None:
        return await conversations.handle(request, EITHER)

    def card(model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": int(started), "owned_by": "llmrack"}

    async def models(request: Request) -> HTTPResponse:
        key = door.who(request)
        return json_response({"object": "list", "data": [card(m) for m in visible(view.fleet, key)]})

    async def model(request: Request, name: str) -> HTTPResponse:
        key, fleet = door.who(request), view.fleet
        found = fleet.resolve(name)
        if found is None:
            raise ModelNotFound(name, visible(fleet, key))
        require_model(key, name, found)
        return json_response(card(found))

    routes.add_route(chat, "/v1/chat/completions", methods=["POST"])
    routes.add_route(completions, "/v1/completions", methods=["POST"])
    routes.add_route(inference, "/inference", methods=["POST"])
    routes.add_route(models, "/v1/models", methods=["GET"])
    routes.add_route(model, "/v1/models/<name:path>", methods=["GET"])
    return routes
