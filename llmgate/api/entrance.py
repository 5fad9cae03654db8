"""What holds for every answer, whatever is asked: which address answers what, whose pages may ask, and strict headers.

- With an address of its own, the admin API is not there at the first one: 404, as of any path that there is not.
- A browser lets the pages of an origin use the API when the gate says so (CORS, https://fetch.spec.whatwg.org). Keys
  travel in headers that a page has to set itself, so no cookie is ever asked for (no Access-Control-Allow-Credentials).
  "*" is for what users do; /admin takes origins by name.
- The body of a request is read once it is known who sends it. Who shows no key that is known here costs no more memory
  than what a socket buffers.
- Nothing that is answered is kept by anybody (no-store), taken for another type than it says, or told to other sites.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sanic import HTTPResponse, Request, Sanic
from sanic.response import BaseHTTPResponse, empty

from llmgate.api.door import Door
from llmnode.wire import headers as names
from llmnode.wire.errors import NotFound, Unauthorized

DOOR, ADMIN = "door", "admin"
"""By which address a connection has come: `Connection.entrance`."""

_STRICT = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_KEPT_BY_NOBODY = "no-store"
_EXPOSED = ", ".join(
    (
        names.REQUEST_ID,
        "request-id",
        names.NODE,
        names.IGNORED,
        names.SHOULD_RETRY,
        "retry-after",
        *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
    )
)
_METHODS = "GET, HEAD, POST, PATCH, DELETE"
_PREFLIGHT_S = "600"
_ALLOWED_AT_ONCE = 64
"""Names of headers that a page may ask for. SDKs send about twenty of their own."""


def request_class(door: Door) -> type[Request[Any, Any]]:
    """Requests whose body is read for those who may come in."""

    class Known(Request[Any, Any]):
        async def receive_body(self) -> None:
            try:
                door.who(self)
            except Unauthorized:
                return  # the handler says so
            whole = bytearray()
            async for piece in self.stream:  # type: ignore[union-attr]
                whole += piece
            self.body = bytes(whole)

    return Known


def install(app: Sanic[Any, Any], *, origins: Collection[str], admin_apart: bool) -> None:
    """Give the app what holds for every answer. `admin_apart`: the admin API has an address of its own."""

    async def apart(request: Request) -> None:
        if is_admin(request) and not has_admin(request, apart=True):
            raise NotFound(f"there is no {request.method} {request.path} here")

    async def preflight(request: Request) -> HTTPResponse | None:
        """Before a page's real request the browser asks whether it may."""
        asked = request.headers.get("access-control-request-method")
        if request.method != "OPTIONS" or asked is None or not _allowed(request, origins):
            return None
        wanted = request.headers.get("access-control-request-headers", "").lower().split(",")[:_ALLOWED_AT_ONCE]
        headers = {
            "access-control-allow-methods": _METHODS,
            "access-control-allow-headers": ", ".join(name for one in wanted if _is_name(name := one.strip())),
            "access-control-max-age": _PREFLIGHT_S,
        }
        return empty(204, {name: value for name, value in headers.items() if value})

    async def strict(request: Request, answer: BaseHTTPResponse) -> None:
        headers = answer.headers
        for name, value in _STRICT.items():
            headers.setdefault(name, value)
        if headers.get("cache-control", "no-cache") == "no-cache":
            headers["cache-control"] = _KEPT_BY_NOBODY

    async def share(request: Request, answer: BaseHTTPResponse) -> None:
        if "*" not in origins or is_admin(request):
            known = answer.headers.get("vary")
            answer.headers["vary"] = f"{known}, origin" if known else "origin"
        if origin := _allowed(request, origins):
            answer.headers["access-control-allow-origin"] = origin
            answer.headers["access-control-expose-headers"] = _EXPOSED

    if admin_apart:
        app.register_middleware(apart, "request")
    app.register_middleware(strict, "response")
    if origins:
        app.register_middleware(preflight, "request")
        app.register_middleware(share, "response")


def is_admin(request: Request) -> bool:
    """Whether it is for the admin API. The route says so, however its path was spelled; without one, the path."""
    route = request.route
    return (route.path if route else request.path.lstrip("/")).partition("/")[0] == "admin"


def has_admin(request: Request, *, apart: bool) -> bool:
    """Whether the address that it came to answers the admin API. apart: that has one of its own."""
    return not apart or getattr(request.stream and request.stream.protocol, "entrance", DOOR) != DOOR


def _allowed(request: Request, origins: Collection[str]) -> str | None:
    """What to call the origin whose page may ask for this; None when it may not."""
    origin: str | None = request.headers.get("origin")
    if origin is None:
        return None
    if origin in origins:
        return origin
    return "*" if "*" in origins and not is_admin(request) else None


def _is_name(text: str) -> bool:
    return text.isascii() and text.replace("-", "").replace("_", "").isalnum()
