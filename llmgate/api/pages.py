"""The console: the pages at `/`, as they stand in llmgate/web.

Owns how files get to a browser: read once, under names that are known from then on, with a policy under which the page
can run its own scripts and styles and speak to this gate, and nothing else. They hold no data and ask for no key; all
that they show comes from the API, with the key that the user gives the page.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources

from sanic import Blueprint, HTTPResponse, Request

from llmnode.wire.errors import NotFound

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    # Kept, since it holds nothing of anybody, and asked about each time: no page runs with scripts of two releases.
    "cache-control": "private, no-cache",
    "vary": "accept-encoding",
}
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_INDEX = "index.html"
_WANTED = b'<meta name="llmrack-keys" content="wanted">'


@dataclass(frozen=True)
class Page:
    """One file, plain and packed. `etag`: of its bytes."""

    kind: str
    plain: bytes
    packed: bytes
    etag: str


def read() -> dict[str, Page]:
    """Every file of the console, by name."""
    folder = resources.files("llmgate") / "web"
    return {file.name: _page(file.name, file.read_bytes()) for file in folder.iterdir() if _kind(file.name) in _TYPES}


def blueprint(*, require_keys: bool) -> Blueprint:
    """`/` and `/console/NAME`. The page is told whether this gate wants keys, or it would have to be refused first."""
    routes = Blueprint("pages")
    pages = read()
    if not require_keys:
        pages[_INDEX] = _page(_INDEX, pages[_INDEX].plain.replace(_WANTED, _WANTED.replace(b"wanted", b"none")))

    async def index(request: Request) -> HTTPResponse:
        return _answer(request, pages[_INDEX])

    async def file(request: Request, name: str) -> HTTPResponse:
        page = pages.get(name)
        if page is None:
            raise NotFound(f"the console has no file {name!r}")
        return _answer(request, page)

    routes.add_route(index, "/", methods=["GET", "HEAD"])
    routes.add_route(file, "/console/<name:str>", methods=["GET", "HEAD"])
    return routes


def _page(name: str, plain: bytes) -> Page:
    etag = f'"{hashlib.sha256(plain).hexdigest()[:32]}"'
    return Page(_TYPES[_kind(name)], plain, gzip.compress(plain, mtime=0), etag)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _answer(request: Request, page: Page) -> HTTPResponse:
    headers = HEADERS | {"etag": page.etag}
    if page.etag in request.headers.get("if-none-match", ""):
        return HTTPResponse(status=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return HTTPResponse(page.packed, headers=headers | {"content-encoding": "gzip"}, content_type=page.kind)
    return HTTPResponse(page.plain, headers=headers, content_type=page.kind)
