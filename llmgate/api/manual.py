"""The API described: /openapi.json for programs, /docs for people; no key is asked for. Made once."""

from __future__ import annotations

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import html, json

from llmnode.service.release import release
from llmnode.wire.openapi.document import document
from llmnode.wire.openapi.page import HEADERS, page


def blueprint() -> Blueprint:
    """The routes of a gate."""
    routes = Blueprint("manual")
    described = document("gate", release())
    shown = page(described)

    async def openapi(request: Request) -> HTTPResponse:
        return json(described)

    async def docs(request: Request) -> HTTPResponse:
        return html(shown, headers=HEADERS)

    routes.add_route(openapi, "/openapi.json", methods=["GET"])
    routes.add_route(docs, "/docs", methods=["GET"])
    return routes
