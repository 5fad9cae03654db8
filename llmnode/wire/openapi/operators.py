"""What operators ask of a gate: everything under /admin, with what it takes and what it answers.

A new route of the gate's admin API gets its `Operation` here; a test asks the gate's router for any that has none
(tests/gate/test_authorisation.py), and another one sends it what may be made up from this (tests/gate/test_fuzz.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmnode.wire.openapi.fields import DRAIN, Schema, flag, number, some, text, thing, whole
from llmnode.wire.openapi.operation import EVENTS, GATE, Operation

_CHAPTER = "Operators"


def _answer(words: str, fields: dict[str, Schema], *, or_null: Sequence[str] = ()) -> Schema:
    """An object with all of these fields, and perhaps others that a later release adds."""
    typed = {
        name: {**schema, "type": [schema["type"], "null"]} if name in or_null else schema
        for name, schema in fields.items()
    }
    return thing(words, typed, required=tuple(fields))


_LEASE = _answer(
    "A drain lease; without an end it is a cordon",
    {
        "node": text("The node"),
        "owner": text("Who has taken it"),
        "reason": text("Why, for people"),
        "ttl_seconds": number("What is left of it", 0),
        "expires_at": text("Its end, ISO 8601"),
    },
    or_null=("ttl_seconds", "expires_at"),
)
_NODE_SEEN = _answer(
    "A node as the gate sees it",
    {
        "name": text("As in the nodes file"),
        "url": text("Where it is"),
        "state": text("In which state it is, all that is known counted"),
        "why": text("What keeps it from taking work, empty when nothing does"),
        "usable": flag("Whether it takes new work"),
        "in_flight": whole("Requests of this gate that are there now", 0),
        "health": thing("What became of it lately (docs/health.md)"),
        "lease": _LEASE,
        "release": text("Which release it runs"),
        "models": some("What it serves", thing()),
        "load": thing("As it last said"),
        "seen_seconds_ago": number("Since its last report", 0),
    },
    or_null=("lease", "load", "seen_seconds_ago"),
)
_KEY, _MODEL, _NODE = text("Of this key alone"), text("Of this model alone"), text("Of this node alone")
_CHOICE: tuple[tuple[str, Schema], ...] = (
    ("key", _KEY),
    ("model", _MODEL),
    ("node", _NODE),
    ("status", text("Of this status alone: a number, or a class such as 5xx; and ends by their names, with commas")),
)
_AFTER = ("after", whole("What came after the row of this number", 0))
_ROW = thing("A request as the ledger has it: the fields of a line of the request log, and `id`, the number of its row")
_USAGE = _answer(
    "What was used",
    {
        "since": text("From when, ISO 8601"),
        "until": text("To before when, ISO 8601"),
        "by": some("What it was added up by", text("key, model, node or day")),
        "rows": some("The sums, with the values that they are of", thing()),
        "total": thing("The sums of all"),
    },
)

_LIMITS = thing(
    "What it may use; null: as much as it likes",
    {
        name: {**whole(f"At most so many {words}", 1), "type": ["integer", "null"]}
        for name, words in (
            ("requests_per_minute", "requests in a minute"),
            ("tokens_per_minute", "tokens in a minute"),
            ("concurrent_requests", "requests at the same time"),
            ("tokens_per_day", "tokens in a day"),
            ("tokens_per_month", "tokens in a month"),
        )
    },
)
_KEY_SEEN: dict[str, Schema] = {
    "name": text("What it is called"),
    "owner": text("Who answers for it"),
    "admin": flag("Whether it may do what is in this chapter"),
    "role": text("The same in a word", enum=["user", "admin"]),
    "models": some("Which models it may use; none named: all", text("A model's id, or an alias")),
    "priority": text("Who goes first when requests wait", enum=["high", "normal", "low"]),
    "created": text("When it was made, ISO 8601"),
    "expires": {**text("When it ends by itself"), "type": ["string", "null"]},
    "revoked": {**text("When it was ended"), "type": ["string", "null"]},
    "limits": _LIMITS,
    "use": {**thing("What counts against its limits now"), "type": ["object", "null"]},
}
_GRANT: dict[str, Schema] = {
    "owner": text("Who answers for it", maxLength=200),
    "role": _KEY_SEEN["role"],
    "models": _KEY_SEEN["models"],
    "priority": _KEY_SEEN["priority"],
    "expires_at": text("When it ends, ISO 8601"),
    "ttl_seconds": number("The same, as seconds from now", 0, above=True),
    "limits": _LIMITS,
}
_FORCE = (("force", text("Even if nobody is an admin then", enum=["true", "false"])),)
_EXPLAIN = thing(
    "A request that is not sent",
    {"path": text("Where it would go; /v1/chat/completions if left out"), "body": thing("What would be sent there")},
    required=("body",),
)
_FLEET = _answer(
    "The fleet as this worker sees it",
    {
        "now": number("Unix time"),
        "gate": thing("Host, release, workers, and the routing policy of each model"),
        "nodes": some("As in /admin/nodes, with labels and weight", _NODE_SEEN),
        "history": thing("The last 15 minutes of each node, as lists that go with the times in `at`"),
        "queue": thing("Requests that wait for a node, by model"),
    },
)


def _gate(method: str, path: str, name: str, summary: str, body: Schema | None = None, **more: Any) -> Operation:
    return Operation(method, "/admin" + path, name, _CHAPTER, summary, body, at=GATE, **more)


OPERATIONS: tuple[Operation, ...] = (
    _gate("get", "/nodes", "nodes", "All nodes", returns=_answer("", {"nodes": some("All of them", _NODE_SEEN)})),
    _gate("get", "/nodes/{name}", "node", "One node", returns=_NODE_SEEN),
    _gate("post", "/nodes/{name}/drain", "drain", "Keep new work away from a node", DRAIN, also=(409,), returns=_LEASE),
    _gate("delete", "/nodes/{name}/drain", "undrain", "Let it have work again", also=(409,), query=(
        ("owner", text("Whose lease it is", minLength=1)), ("force", text("Whoever has it", enum=["true", "false"]))),
        returns=_answer("", {"node": text("The node"), "released": flag("Whether there was a lease")})),
    _gate("get", "/usage", "usage", "What was used, added up", or_else=("text/csv",), returns=_USAGE, query=(
        ("by", text("Some of key, model, node and day, with commas")),
        ("since", text("From when: a day, a time (ISO 8601), or ago, such as 30m, 12h, 7d")),
        ("until", text("To before when, the same")),
        ("key", _KEY), ("model", _MODEL), ("format", text("How to write it", enum=["json", "csv"])))),
    _gate("get", "/requests", "requests", "Requests, the newest first", query=(
        *_CHOICE, _AFTER, ("before", whole("What came before that row", 0)), ("limit", whole("So many", 1, 1000))),
        returns=_answer("", {"requests": some("The newest first", _ROW)})),
    _gate("get", "/requests/{name}", "request", "One request, by its id", returns=_ROW),
    _gate("get", "/requests/events", "requests_events", "Requests as they end", answer=EVENTS,
          query=(*_CHOICE, _AFTER)),
    _gate("get", "/keys", "keys", "All keys, without their secrets",
          returns=_answer("", {"keys": some("The oldest first", _answer("A key", _KEY_SEEN))})),
    _gate("post", "/keys", "make_key", "Make a key; its secret is in this answer and nowhere else", thing(
        "A key to be", {"name": text("What it is called", minLength=1, maxLength=64), **_GRANT}, required=("name",)),
        status=201, also=(409,), returns=_answer("A key", _KEY_SEEN | {"secret": text("What its user sends")})),
    _gate("patch", "/keys/{name}", "change_key", "Change what a key may do", thing("What is to be otherwise", _GRANT),
          query=_FORCE, also=(409,), returns=_answer("A key", _KEY_SEEN)),
    _gate("delete", "/keys/{name}", "revoke_key", "End a key", query=_FORCE, also=(409,),
          returns=_answer("", {"name": text("The key"), "revoked": flag("True")})),
    _gate("get", "/fleet", "fleet", "The whole fleet, and its last 15 minutes", returns=_FLEET),
    _gate("get", "/fleet/events", "fleet_events", "The same, once a second", answer=EVENTS),
    _gate("post", "/explain", "explain", "What the router would do with a request, and why", _EXPLAIN),
)  # fmt: skip
