"""The API described: /openapi.json for programs, /docs for people. Made once, from llmnode/wire/openapi."""

from __future__ import annotations

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, html, json

from llmnode.service.release import release
from llmnode.wire.openapi.document import document
from llmnode.wire.openapi.page import HEADERS, page


def blueprint() -> Blueprint:
    """The routes of a node."""
    routes = Blueprint("manual")
    described = document("node", release())
    shown = page(described)

    @routes.get("/openapi.json")
    async def openapi(request: Request) -> HTTPResponse:
        return json(described)

    @routes.get("/docs")
    async def docs(request: Request) -> HTTPResponse:
        return html(shown, headers=HEADERS)

    return routes
