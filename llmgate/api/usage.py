"""What operators ask of the usage ledger: sums by key, model, node and day; single requests, also as they come.

Wants an admin key. What is asked is judged in core/usage.py; what is told of a request, too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json as json_response
from sanic.response import text

from llmgate.api.door import Door
from llmgate.core import keys
from llmgate.core.usage import BadQuestion, Question, Selection, as_csv, report, shown
from llmgate.database import StoreError
from llmgate.ledger import Ledger
from llmnode.wire.errors import ApiError, InvalidRequest, NotFound

T = TypeVar("T")

_QUESTION = ("by", "since", "until", "key", "model")
_CHOICE = ("key", "model", "node", "status")
_POLL_S = 1.0
"""How often the database is asked for new rows, for each reader of /admin/requests/events."""
_BEAT_S = 10.0
"""A reader that has nothing to read hears a comment after so much silence."""
_AT_ONCE = 200
_EVENT_STREAM = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def blueprint(*, door: Door, ledger: Ledger, clock: Callable[[], float], wall: Callable[[], float]) -> Blueprint:
    """`clock` monotonic, `wall` since the epoch; in seconds."""
    routes = Blueprint("usage", url_prefix="/admin")

    async def usage(request: Request) -> HTTPResponse:
        keys.require_admin(door.who(request))
        said = _said(request, *_QUESTION, "format")
        form = said.get("format") or "json"
        if form not in ("json", "csv"):
            raise InvalidRequest(f"format must be json or csv, got {form!r}", param="format")
        asked = _parsed(lambda: Question.parse(said, wall()))
        rows, total = await ledger.usage(asked)
        if form == "csv":
            return text(as_csv(asked.by, rows), content_type="text/csv; charset=utf-8")
        return json_response(report(asked, rows, total))

    async def requests(request: Request) -> HTTPResponse:
        keys.require_admin(door.who(request))
        said = _said(request, *_CHOICE, "after", "before", "limit")
        rows = await ledger.requests(_parsed(lambda: Selection.parse(said)))
        return json_response({"requests": [shown(row) for row in rows]})

    async def one(request: Request, name: str) -> HTTPResponse:
        keys.require_admin(door.who(request))
        row = await ledger.request(name)
        if row is None:
            raise NotFound(f"the ledger has no request {name!r}", param="name", code="request_not_found")
        return json_response(shown(row))

    async def events(request: Request) -> None:
        keys.require_admin(door.who(request))
        said = _said(request, *_CHOICE, "after")
        if last := request.headers.get("last-event-id"):
            said["after"] = last  # a reader that comes back
        asked = _parsed(lambda: Selection.parse(said))
        seen = await ledger.newest_request() if asked.after is None else asked.after
        response = await request.respond(content_type="text/event-stream", headers=_EVENT_STREAM)
        assert response is not None, "respond() without a response makes a new one"
        await response.send(": these come as they end\n\n")
        spoke = clock()
        while not (door.draining or door.leaving):
            rows, seen = await _after(ledger, asked, seen)
            if rows:
                await response.send("".join(map(_event, rows)))
                spoke = clock()
            elif clock() - spoke >= _BEAT_S:
                await response.send(": nothing new\n\n")
                spoke = clock()
            if len(rows) < _AT_ONCE:
                await asyncio.sleep(_POLL_S)
            try:
                keys.require_admin(door.who(request))
            except ApiError:
                break
        await response.eof()

    routes.add_route(usage, "/usage", methods=["GET"])
    routes.add_route(requests, "/requests", methods=["GET"])
    routes.add_route(events, "/requests/events", methods=["GET"])
    routes.add_route(one, "/requests/<name:str>", methods=["GET"])
    return routes


async def _after(ledger: Ledger, asked: Selection, seen: int) -> tuple[list[dict[str, Any]], int]:
    """What has come since the row `seen`, oldest first and only so much of it -> rows, the last one looked at."""
    try:
        newest = await ledger.newest_request()
        if newest <= seen:
            return [], seen
        rows = await ledger.requests(replace(asked, after=seen, before=newest + 1, limit=_AT_ONCE))
    except StoreError:
        return [], seen  # the database may come back, and the reader need not know
    return rows[::-1], rows[0]["id"] if len(rows) == _AT_ONCE else newest


def _event(row: Mapping[str, Any]) -> str:
    return f"event: request\nid: {row['id']}\ndata: {json.dumps(shown(row))}\n\n"


def _said(request: Request, *known: str) -> dict[str, str | None]:
    """The query, each name once. Raises InvalidRequest that names what is wrong."""
    said: dict[str, str | None] = {}
    for name, value in request.get_query_args(keep_blank_values=True):
        if name not in known:
            raise InvalidRequest(f"there is no parameter {name!r} here; there are {', '.join(known)}", param=name)
        if name in said:
            raise InvalidRequest(f"{name} is given more than once", param=name)
        said[name] = value
    return said


def _parsed(parse: Callable[[], T]) -> T:
    try:
        return parse()
    except BadQuestion as error:
        raise InvalidRequest(str(error), param=error.field) from None
