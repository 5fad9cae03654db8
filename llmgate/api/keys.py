"""/admin/keys: what operators and the console do with keys. Wants an admin key.

What may be asked for is judged in core/grants.py. A key's secret is in the answer that made it, and nowhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from sanic import Blueprint, HTTPResponse, Request
from sanic.response import json as json_response

from llmgate.api.door import Door
from llmgate.core import keys
from llmgate.core.grants import BadGrant, describe, parse, require_admin_left
from llmgate.core.keys import Key
from llmgate.core.limits import NO_LIMITS, Limits, Use
from llmgate.database import KeyTaken
from llmgate.ledger import Ledger
from llmnode.wire.errors import Conflict, InvalidRequest, NotFound


def blueprint(
    *,
    door: Door,
    ledger: Ledger,
    use: Callable[[Key], Awaitable[Use | None]],
    require_one_truth: Callable[[bool], None],
    wall: Callable[[], float],
) -> Blueprint:
    """`use`: what counts against a key's limits now, None where nothing does or it cannot be said.
    `require_one_truth`: raises ValueError where keys can have no limits, since several gates would count on their own.
    """
    routes = Blueprint("keys", url_prefix="/admin/keys")

    async def told(key: Key) -> dict[str, Any]:
        return describe(key, await use(key) if key.live(wall()) else None)

    def asked(body: Mapping[str, Any], held: Limits) -> dict[str, Any]:
        try:
            fields = parse(body, wall(), held)
            require_one_truth(fields.get("limits", held) != NO_LIMITS)
        except BadGrant as error:
            raise InvalidRequest(str(error), param=error.field) from None
        except ValueError as error:
            raise InvalidRequest(str(error), param="limits", code="limits_need_one_truth") from None
        return fields

    async def listed(request: Request) -> HTTPResponse:
        keys.require_admin(door.who(request))
        return json_response({"keys": [await told(key) for key in await ledger.all_keys()]})

    async def made(request: Request) -> HTTPResponse:
        keys.require_admin(door.who(request))
        body = _object(request.body)
        try:
            name = body.pop("name", "")
            keys.check_name(name if isinstance(name, str) else "")
        except ValueError as error:
            raise InvalidRequest(str(error), param="name") from None
        secret = keys.make_secret(os.urandom(keys.SECRET_BYTES))
        key = Key(name, keys.digest(secret), created=wall(), **asked(body, NO_LIMITS))
        try:
            await ledger.add_key(key)
        except KeyTaken as error:
            raise Conflict(str(error), code="key_exists") from None
        return json_response({**await told(key), "secret": secret}, status=201, headers={"cache-control": "no-store"})

    async def changed(request: Request, name: str) -> HTTPResponse:
        keys.require_admin(door.who(request))
        body = _object(request.body)
        if "name" in body:
            raise InvalidRequest("a key keeps its name; make another one", param="name")
        return json_response(await told(await change(request, name, lambda held: asked(body, held.limits))))

    async def revoked(request: Request, name: str) -> HTTPResponse:
        keys.require_admin(door.who(request))
        await change(request, name, lambda held: {"revoked": wall()})
        return json_response({"name": name, "revoked": True})

    async def change(request: Request, name: str, wanted: Callable[[Key], dict[str, Any]]) -> Key:
        force = request.args.get("force") == "true"

        def decide(held: Key, others: tuple[Key, ...]) -> Key:
            key = replace(held, **wanted(held))
            require_admin_left(held, key, others, wall(), force=force)
            return key

        key = await ledger.change_key(name, decide)
        if key is None:
            raise NotFound(f"there is no live key named {name!r}", param="name", code="key_not_found")
        return key

    routes.add_route(listed, "", methods=["GET"])
    routes.add_route(made, "", methods=["POST"])
    routes.add_route(changed, "/<name:str>", methods=["PATCH"])
    routes.add_route(revoked, "/<name:str>", methods=["DELETE"])
    return routes


def _object(body: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the request body is not valid JSON", code="invalid_json") from error
    if not isinstance(decoded, dict):
        raise InvalidRequest("the body must be a JSON object")
    return decoded
