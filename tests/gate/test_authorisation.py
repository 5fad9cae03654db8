"""Who may do what: one table of all routes, and each of its cells asked of a running gate.

The routes are those that the gate's own router has, so that a new one without a row fails here, and so does one that
the OpenAPI document does not tell of.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llmgate.app import Gate
from llmgate.core import keys
from llmgate.core.keys import Key
from llmgate.core.policy import USES
from llmgate.line import Line, Post, pair
from llmgate.listing import Listing
from llmgate.settings import Settings, database
from llmgate.store import Store
from llmnode.service.settings import Loaded
from llmnode.wire.openapi.document import served
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import wait_for

ROLES = ("nobody", "unknown", "expired", "revoked", "user", "limited", "admin")
IN = "in"
NO_KEY, BAD_KEY = (401, "missing_api_key"), (401, "invalid_api_key")
_NOT_IN = (NO_KEY, BAD_KEY, (401, "api_key_expired"), BAD_KEY)
_NO_MODEL, _NO_ADMIN = (403, "model_not_allowed"), (403, "admin_only")

OPEN = dict.fromkeys(ROLES, IN)
"""No key is asked for."""
ANY = dict(zip(ROLES, (*_NOT_IN, IN, IN, IN), strict=True))
"""Any key will do."""
MODEL = dict(zip(ROLES, (*_NOT_IN, IN, _NO_MODEL, IN), strict=True))
"""One that may use the model "tiny"."""
ADMIN = dict(zip(ROLES, (*_NOT_IN, _NO_ADMIN, _NO_ADMIN, IN), strict=True))

TABLE: dict[tuple[str, str], dict[str, object]] = {
    **{("POST", path): MODEL for path in USES},
    ("GET", "/v1/models"): ANY,
    ("GET", "/models"): ANY,
    ("GET", "/v1/models/{name}"): MODEL,
    ("GET", "/props"): MODEL,
    ("GET", "/slots"): MODEL,
    ("GET", "/health"): OPEN,
    ("HEAD", "/health"): OPEN,
    ("GET", "/ready"): OPEN,
    ("HEAD", "/ready"): OPEN,
    ("GET", "/metrics"): OPEN,
    ("GET", "/openapi.json"): OPEN,
    ("GET", "/docs"): OPEN,
    ("GET", "/admin/nodes"): ADMIN,
    ("GET", "/admin/nodes/{name}"): ADMIN,
    ("POST", "/admin/nodes/{name}/drain"): ADMIN,
    ("DELETE", "/admin/nodes/{name}/drain"): ADMIN,
    ("GET", "/admin/usage"): ADMIN,
    ("GET", "/admin/requests"): ADMIN,
    ("GET", "/admin/requests/events"): ADMIN,
    ("GET", "/admin/requests/{name}"): ADMIN,
    ("GET", "/admin/keys"): ADMIN,
    ("POST", "/admin/keys"): ADMIN,
    ("PATCH", "/admin/keys/{name}"): ADMIN,
    ("DELETE", "/admin/keys/{name}"): ADMIN,
    ("GET", "/admin/fleet"): ADMIN,
    ("GET", "/admin/fleet/events"): ADMIN,
    ("POST", "/admin/explain"): ADMIN,
    ("GET", "/v1/key"): ANY,
    ("GET", "/"): OPEN,
    ("HEAD", "/"): OPEN,
    ("GET", "/console/{name}"): OPEN,
    ("HEAD", "/console/{name}"): OPEN,
}
UNDESCRIBED = frozenset({"/", "/console/{name}"})
"""Paths that are pages for people, and not in the OpenAPI document."""
CELLS = [(method, path, role) for method, path in TABLE for role in ROLES]

House = tuple[GateUnderTest, dict[str, str]]


@pytest.fixture(scope="module")
def house(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A gate, and a secret for each role; "" for nobody's."""
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    with MockNode("a") as tiny, MockNode("b", model="other") as other:
        gate.list_nodes(tiny, other)
        gate.run("--ready-wait-s", "0")
        for name in ("a", "b"):
            gate.wait_node(name, lambda node: node["usable"])
        secrets = {"nobody": "", "unknown": keys.PREFIX + "0" * 48, "admin": gate.secret}
        made_up = ("expired", "revoked", "user", "limited")
        secrets |= {role: keys.PREFIX + f"{number:048x}" for number, role in enumerate(made_up, 1)}
        store = Store(database(Settings(state_dir=gate.state)))
        made = time.time()
        for role in made_up:
            store.add_key(
                Key(
                    role,
                    keys.digest(secrets[role]),
                    models=("other",) if role == "limited" else (),
                    created=made,
                    expires=made - 1 if role == "expired" else None,
                )
            )
        store.revoke_key("revoked", made)
        store.close()
        wait_for(lambda: code(gate, secrets["limited"], "GET", "/v1/models") == IN, "the keys to be known")
        yield gate, secrets


def code(gate: GateUnderTest, secret: str, method: str, path: str) -> object:
    """IN, or the status and code of a refusal."""
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    node = path.startswith("/admin") or path == "/v1/models/{name}"
    url = gate.url + path.replace("{name}", "tiny" if node else "x")
    query = {"model": "tiny"} if path in ("/props", "/slots") else None
    body = {"model": "tiny"} if method in ("POST", "PATCH") and not path.startswith("/admin") else {}
    with httpx.stream(
        method, url, headers=headers, params=query, json=body if method in ("POST", "PATCH") else None, timeout=60
    ) as answer:
        if answer.status_code not in (401, 403):
            assert answer.status_code != 405 and answer.status_code < 600
            return IN
        answer.read()
        error = answer.json()["error"]
        return answer.status_code, error.get("code") or error["type"]


@pytest.mark.parametrize(("method", "path", "role"), CELLS)
def test_each_role_gets_in_where_the_table_says(house: House, method: str, path: str, role: str) -> None:
    gate, secrets = house
    expected, got = TABLE[method, path][role], code(gate, secrets[role], method, path)
    if path.startswith("/v1/messages") and expected != IN:
        # Anthropic's words have no code.
        assert isinstance(expected, tuple) and isinstance(got, tuple) and got[0] == expected[0]
    else:
        assert got == expected


def routes(tmp_path: Path) -> set[tuple[str, str]]:
    """What the gate answers, by its own router."""
    ours, theirs = pair()
    try:
        post = Post(0, 1, 0, 0, str(tmp_path), admin_fd=0)
        settings = Settings(state_dir=tmp_path, cors_origins=("*",))
        app = Gate(Loaded(settings, {}, None, ""), "", Listing((), {}), post, Line(theirs))._compose()
    finally:
        ours.close()
        theirs.close()
    found = {(method, "/" + route.path) for route in app.router.routes for method in route.methods}
    return {(method, re_named(path)) for method, path in found}


def re_named(path: str) -> str:
    """Of Sanic's "<name:str>" the "{name}" of OpenAPI."""
    parts = (f"{{{part[1:-1].split(':')[0]}}}" if part.startswith("<") else part for part in path.split("/"))
    return "/".join(parts)


def test_every_route_has_its_row_and_its_description_and_there_are_no_others(tmp_path: Path) -> None:
    found = routes(tmp_path)
    assert found == set(TABLE)
    described = {(one.method.upper(), one.path) for one in served("gate")}
    assert {(method, path) for method, path in found if method != "HEAD" and path not in UNDESCRIBED} == described


def test_what_the_description_calls_open_is_open_and_nothing_else() -> None:
    unlocked = {(one.method.upper(), one.path) for one in served("gate") if "gate" in one.open}
    assert unlocked == {where for where, row in TABLE.items() if row is OPEN and where[0] != "HEAD"} - {
        (method, path) for method, path in TABLE if path in UNDESCRIBED
    }
