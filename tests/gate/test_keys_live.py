"""Keys by command, by file and over HTTP: what is asked for is what is there, and secrets are shown once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmgate.core.grants import BadGrant, expiry, parse
from llmgate.core.limits import Limits
from llmgate.core.queue import Priority
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode

NOW = 1_772_280_000.0
SECRET = "s" * 30


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        ({}, {}),
        ({"role": "admin", "owner": "A"}, {"admin": True, "owner": "A"}),
        ({"models": ["b", "a", "b"]}, {"models": ("a", "b")}),
        ({"priority": "low"}, {"priority": Priority.LOW}),
        ({"ttl_seconds": 60}, {"expires": NOW + 60}),
        ({"expires_at": "2026-03-01T00:00:00Z"}, {"expires": 1_772_323_200.0}),
        ({"expires_at": "2026-03-01T02:00:00+02:00"}, {"expires": 1_772_323_200.0}),
        ({"expires_at": None}, {"expires": None}),
        ({"limits": {"tokens_per_day": 5}}, {"limits": Limits(7, tokens_per_day=5)}),
        ({"limits": {"requests_per_minute": None}}, {"limits": Limits()}),
        ({"limits": None}, {"limits": Limits()}),
    ],
)
def test_what_is_asked_of_a_key_becomes_its_fields(asked: dict[str, Any], fields: dict[str, Any]) -> None:
    assert parse(asked, NOW, Limits(7)) == fields


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"nmae": "x"}, "nmae"),
        ({"role": "root"}, "role"),
        ({"owner": "x" * 201}, "owner"),
        ({"owner": "a\nb"}, "owner"),
        ({"models": "a"}, "models"),
        ({"models": [""]}, "models"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 1}, "priority"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": True}, "ttl_seconds"),
        ({"ttl_seconds": 60, "expires_at": None}, "expires_at"),
        ({"expires_at": "2020-01-01"}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": 5}, "expires_at"),
        ({"limits": []}, "limits"),
        ({"limits": {"tokens_per_day": -1}}, "limits"),
    ],
)
def test_what_cannot_be_is_refused_by_name(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(BadGrant) as refused:
        parse(asked, NOW)
    assert refused.value.field == field


def test_an_end_may_be_said_as_people_do() -> None:
    assert [expiry(text, NOW) for text in ("30d", "90m", "never")] == [NOW + 2_592_000, NOW + 5400, None]
    with pytest.raises(ValueError, match="soon"):
        expiry("soon", NOW)


def shown(gate: GateUnderTest, name: str) -> dict[str, Any]:
    done = gate.cli("keys", "show", name)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_key_is_made_changed_shown_and_revoked_by_command(gate: GateUnderTest) -> None:
    gate.create_key("k", "--owner", "Ann", "--models", "b,a", "--expires", "30d", "--requests-per-minute", "5")
    made = shown(gate, "k")
    assert (made["owner"], made["models"], made["role"]) == ("Ann", ["a", "b"], "user")
    assert made["limits"] == {
        "requests_per_minute": 5,
        "tokens_per_minute": None,
        "concurrent_requests": None,
        "tokens_per_day": None,
        "tokens_per_month": None,
    }
    assert "secret" not in made and "digest" not in made
    done = gate.cli("keys", "set", "k", "--requests-per-minute", "none", "--tokens-per-day", "9", "--role", "admin")
    assert done.stdout == "updated: role user -> admin, requests_per_minute 5 -> none, tokens_per_day none -> 9\n"
    assert gate.cli("keys", "set", "k", "--owner", "Ann").stdout == "unchanged\n"
    assert "tokens_per_day 9" in gate.cli("keys", "list").stdout
    refused = gate.cli("keys", "set", "k", "--tokens-per-day", "many")
    assert refused.returncode == 2 and "--tokens-per-day" in refused.stderr
    assert gate.cli("keys", "set", "nobody", "--owner", "x").returncode == 1
    assert gate.cli("keys", "revoke", "k").returncode == 0
    assert gate.cli("keys", "show", "k").returncode == 1


def entry(name: str, secret: str = SECRET, **fields: str) -> str:
    lines = {
        "name": json.dumps(name),
        "secret_sha256": json.dumps(hashlib.sha256(secret.encode()).hexdigest()),
        **fields,
    }
    return "[[keys]]\n" + "".join(f"{field} = {value}\n" for field, value in lines.items()) + "\n"


def test_a_file_of_keys_is_applied_as_often_as_one_likes(gate: GateUnderTest, tmp_path: Path) -> None:
    gate.create_key("by-hand")
    (tmp_path / "b.key").write_text("b" * 30 + "\n")
    file = tmp_path / "keys.toml"
    a = entry("a", limits="{tokens_per_day = 5}", expires_at="2100-01-01T00:00:00Z")
    file.write_text(a + '[[keys]]\nname = "b"\nsecret_file = "b.key"\nrole = "admin"\n')
    looked = gate.cli("keys", "apply", str(file), "--check")
    assert looked.stdout == "created a\ncreated b\n"
    assert gate.cli("keys", "show", "a").returncode == 1
    assert gate.cli("keys", "apply", str(file)).stdout == "created a\ncreated b\n"
    assert gate.cli("keys", "apply", str(file), "--prune").stdout == "unchanged\n"
    assert (shown(gate, "a")["limits"]["tokens_per_day"], shown(gate, "b")["role"]) == (5, "admin")

    changed = entry("a", priority='"low"') + entry("by-hand", "h" * 30)
    refused = gate.cli("keys", "apply", "-", "--prune", said=changed)
    assert refused.returncode == 1 and "another secret" in refused.stderr
    assert shown(gate, "b"), "nothing is done of what cannot be done wholly"
    done = gate.cli("keys", "apply", "-", "--prune", "--rotate", said=changed)
    assert done.stdout.splitlines() == [
        "revoked b",
        "updated a: priority normal -> low, expires 2100-01-01T00:00:00+00:00 -> none, tokens_per_day 5 -> none",
        "rotated by-hand",
    ]
    assert gate.cli("keys", "apply", "-", said=changed).stdout == "unchanged\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense", "not valid TOML"),
        ("[other]\n", "must hold [[keys]]"),
        ('[[keys]]\nname = "a"\n', "secret_file and secret_sha256"),
        ('[[keys]]\nname = "a"\nsecret_file = "nowhere"\n', "cannot read"),
        (entry("a b"), "'a b'"),
        (entry("a") + entry("a", "t" * 30), "another's"),
        (entry("a") + entry("b"), "another's"),
        (entry("a", ttl_seconds="5"), "expires_at"),
        (entry("a", limits="{tokens_per_day = 0}"), "tokens_per_day"),
    ],
)
def test_a_file_that_cannot_be_used_changes_nothing(gate: GateUnderTest, text: str, why: str) -> None:
    done = gate.cli("keys", "apply", "-", said=text)
    assert done.returncode == 2 and why in done.stderr and SECRET not in done.stderr


def test_keys_are_kept_over_http(gate: GateUnderTest, mock: Callable[..., MockNode]) -> None:
    gate.list_nodes(mock("a"))
    gate.run()
    with gate.client() as admin:
        ask = {"name": "k", "owner": "Ann", "ttl_seconds": 600, "limits": {"requests_per_minute": 2}}
        made = admin.post("/admin/keys", json=ask)
        assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
        secret = made.json()["secret"]
        assert gate.chat(secret).status_code == 200, "the worker that made it knows it at once"
        assert admin.post("/admin/keys", json=ask).json()["error"]["code"] == "key_exists"
        listed = admin.get("/admin/keys")
        found = next(key for key in listed.json()["keys"] if key["name"] == "k")
        assert (found["owner"], found["role"], found["use"]["tokens_per_day"]) == ("Ann", "user", 16)
        assert secret not in listed.text and hashlib.sha256(secret.encode()).hexdigest() not in listed.text
        changed = admin.patch("/admin/keys/k", json={"limits": {"tokens_per_day": 50}, "expires_at": None})
        assert (changed.json()["limits"]["requests_per_minute"], changed.json()["expires"]) == (2, None)
        for body, field in (({"name": "x"}, "name"), ({"role": 1}, "role"), ({"limits": {"x": 1}}, "limits")):
            refused = admin.patch("/admin/keys/k", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        assert admin.patch("/admin/keys/nobody", json={}).json()["error"]["code"] == "key_not_found"
        with gate.client(secret) as user:
            calls = (user.get, user.post, lambda path: user.patch(path + "/k"), lambda path: user.delete(path + "/k"))
            assert [call("/admin/keys").status_code for call in calls] == [403] * 4
        assert admin.delete("/admin/keys/k").json() == {"name": "k", "revoked": True}
        assert admin.delete("/admin/keys/k").status_code == 404
        assert gate.chat(secret).status_code == 401


def test_the_last_admin_stays_unless_forced(gate: GateUnderTest, mock: Callable[..., MockNode]) -> None:
    gate.list_nodes(mock("a"))
    gate.run()

    def demote(name: str, **query: str) -> httpx.Response:
        with gate.client() as admin:
            return admin.patch(f"/admin/keys/{name}", json={"role": "user"}, params=query)

    assert (demote("tester").status_code, demote("tester").json()["error"]["code"]) == (409, "last_admin")
    with gate.client() as admin:
        assert admin.delete("/admin/keys/tester").status_code == 409
        ends = time.time() + 600
        second = admin.post("/admin/keys", json={"name": "second", "role": "admin", "ttl_seconds": 600}).json()
    assert second["expires"] and time.time() < ends
    assert demote("second").status_code == 200
    assert demote("tester", force="true").status_code == 200
    assert demote("tester").status_code == 403
