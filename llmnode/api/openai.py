"""The endpoints that answer with text (`answer.ENDPOINTS`), and /v1/models.

What comes of a request is answer.py's to tell.
"""

from __future__ import annotations

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, json

from llmnode.api import answer
from llmnode.api.answer import Endpoint
from llmnode.api.serving import Serving
from llmnode.wire import cards
from llmnode.wire.errors import ModelNotFound


def blueprint(serving: Serving) -> Blueprint:
    """The routes, bound to one node."""
    routes = Blueprint("openai")

    def add(endpoint: Endpoint) -> None:
        async def handler(request: Request) -> HTTPResponse | None:
            return await answer.begin(request, serving, endpoint)

        name = endpoint.path.strip("/").replace("/", "_")
        routes.add_route(handler, endpoint.path, methods=["POST"], name=name)

    for endpoint in answer.ENDPOINTS.values():
        add(endpoint)

    @routes.post(answer.RESPONSES.path + "/input_tokens")
    async def input_tokens(request: Request) -> HTTPResponse:
        return await answer.count(request, serving, answer.RESPONSES, object="response.input_tokens")

    @routes.post(answer.MESSAGES.path + "/count_tokens")
    async def count_tokens(request: Request) -> HTTPResponse:
        return await answer.count(request, serving, answer.MESSAGES)

    @routes.get("/models", name="models_of_llama_server")
    @routes.get("/v1/models")
    async def models(request: Request) -> HTTPResponse:
        return json(cards.listed(serving.cards(), anthropic=cards.ANTHROPIC_VERSION in request.headers))

    @routes.get("/v1/models/<name:path>")
    async def one(request: Request, name: str) -> HTTPResponse:
        if name not in serving.settings.names:
            raise ModelNotFound(name, list(serving.settings.names))
        found = serving.model().card(name, serving.created)
        return json(cards.card(found, anthropic=cards.ANTHROPIC_VERSION in request.headers))

    return routes
