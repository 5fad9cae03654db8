"""OpenAI's endpoints: /v1/chat/completions, /v1/completions, /v1/models, and the smallest call, /inference.

What comes of a request is answer.py's to tell.
"""

from __future__ import annotations

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, json

from llmnode.api import answer, schema
from llmnode.api.serving import Serving


def blueprint(serving: Serving) -> Blueprint:
    """The routes, bound to one node."""
    routes = Blueprint("openai")

    @routes.post(answer.CHAT.path)
    async def chat_completions(request: Request) -> HTTPResponse | None:
        return await answer.begin(request, serving, answer.CHAT)

    @routes.post(answer.COMPLETION.path)
    async def completions(request: Request) -> HTTPResponse | None:
        return await answer.begin(request, serving, answer.COMPLETION)

    @routes.post(answer.INFERENCE.path)
    async def inference(request: Request) -> HTTPResponse | None:
        return await answer.begin(request, serving, answer.INFERENCE)

    @routes.get("/v1/models")
    async def models(request: Request) -> HTTPResponse:
        return json(schema.models(serving.settings.names, serving.created))

    return routes
