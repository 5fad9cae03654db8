"""Drain leases by table: who may take a node, and when."""

from __future__ import annotations

import pytest

from llmgate.core import keys, leases
from llmgate.core.fleet import Fleet, Lease, Leased, Listed, Lost, Reported
from llmgate.core.keys import Key, Keyring
from llmgate.core.leases import DrainRequest
from llmgate.listing import Address
from llmnode.wire.errors import ApiError, Conflict, Forbidden, InvalidRequest, Unauthorized
from llmnode.wire.node import Load, Model, Report, State

NOW, WALL, STALE = 100.0, 1_000_000.0, 3.0


def fleet(**running: int) -> Fleet:
    made = Fleet().apply(Listed(tuple(Address(name, f"http://{name}") for name in running)))
    for name, count in running.items():
        load = Load(slots=4, running=count)
        body = Report("b", "r", "c", State.READY, models=(Model("tiny"),), load=load)
        made = made.apply(Reported(name, body, NOW))
    return made


def take(
    made: Fleet,
    name: str,
    owner: str = "me",
    ttl: float | None = 60.0,
    force: bool = False,
    min_ready: int | None = None,
) -> Lease:
    ask = DrainRequest(owner, ttl, "", force, min_ready)
    return leases.take(made, made.nodes[name], ask, now=NOW, wall=WALL, stale_after=STALE)


@pytest.mark.parametrize(
    ("running", "allowed"),
    [
        ({"a": 0, "b": 0}, True),
        ({"a": 2, "b": 2}, True),
        ({"a": 3, "b": 2}, False),
        ({"a": 4, "b": 4, "c": 0}, True),
        ({"a": 4, "b": 4, "c": 1}, False),
        ({"a": 0}, False),
    ],
)
def test_what_remains_must_carry_the_load(running: dict[str, int], allowed: bool) -> None:
    made = fleet(**running)
    if allowed:
        assert take(made, "a").expires == WALL + 60
    else:
        with pytest.raises(Conflict):
            take(made, "a")
    assert take(made, "a", force=True, ttl=None).expires is None


@pytest.mark.parametrize(
    ("running", "min_ready", "refusal"),
    [
        ({"a": 0, "b": 0, "c": 0}, 2, ""),
        ({"a": 0, "b": 0, "c": 0}, 3, "with 2 ready nodes, and min_ready is 3"),
        ({"a": 0}, 1, "with 0 ready nodes, and min_ready is 1"),
        ({"a": 3}, 0, ""),
        ({"a": 3, "b": 2}, 0, "with 4 ready slots for 5 requests"),
    ],
)
def test_as_many_nodes_stay_ready_as_the_drain_says(running: dict[str, int], min_ready: int, refusal: str) -> None:
    made = fleet(**running)
    if not refusal:
        assert take(made, "a", min_ready=min_ready)
        return
    with pytest.raises(Conflict, match=refusal):
        take(made, "a", min_ready=min_ready)
    assert take(made, "a", min_ready=min_ready, force=True)


def test_those_that_another_drain_holds_are_not_ready() -> None:
    made = fleet(a=0, b=0, c=0).apply(Leased((Lease("b", "me", "", WALL, WALL + 10),)))
    with pytest.raises(Conflict, match="with 1 ready nodes, and min_ready is 2"):
        take(made, "a", min_ready=2)
    assert take(made, "b", min_ready=2), "renewing one's own is never refused"


@pytest.mark.parametrize("value", [-1, True, 1.5, "2"])
def test_a_number_of_nodes_that_is_none_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        leases.parse_drain({"owner": "me", "min_ready": value})
    assert refused.value.param == "min_ready" and repr(value) in str(refused.value)


def test_drained_and_dead_nodes_are_not_counted_on() -> None:
    drained = fleet(a=0, b=0).apply(Leased((Lease("b", "x", "", WALL, None),)))
    dead = fleet(a=0, b=0).apply(Lost("b", "gone", NOW))
    for made in (drained, dead):
        with pytest.raises(Conflict):
            take(made, "a")


def test_a_dead_node_may_always_be_drained() -> None:
    assert take(fleet(a=4, b=4).apply(Lost("a", "gone", NOW)), "a")


def test_renewing_is_never_refused_for_load_and_never_by_another() -> None:
    made = fleet(a=4, b=4).apply(Leased((Lease("a", "me", "", WALL - 50, WALL + 10),)))
    assert take(made, "a").expires == WALL + 60
    with pytest.raises(Conflict):
        take(made, "a", owner="other")
    assert take(made, "a", owner="other", force=True).owner == "other"


def test_leases_end_at_their_time_and_cordons_do_not() -> None:
    ends, cordon = Lease("a", "x", "", WALL, WALL + 5), Lease("b", "x", "", WALL, None)
    assert leases.live((ends, cordon), WALL + 4.9) == (ends, cordon)
    assert leases.live((ends, cordon), WALL + 5) == (cordon,)


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "secret"),
    [
        (None, None, None),
        ("Bearer abc", None, "abc"),
        ("bearer  abc ", None, "abc"),
        ("Bearer abc", "xyz", "abc"),
        ("Basic abc", "xyz", "xyz"),
        ("Bearer", "xyz", "xyz"),
        ("", "", None),
        (None, "xyz", "xyz"),
    ],
)
def test_where_the_secret_is_read_from(authorization: str | None, x_api_key: str | None, secret: str | None) -> None:
    assert keys.presented(authorization, x_api_key) == secret


def test_the_ring_knows_live_keys_only() -> None:
    live, gone = Key("live", keys.digest("s1")), Key("gone", keys.digest("s2"), revoked=5.0)
    ring = Keyring([live, gone])
    assert ring.find("s1", 0.0) == live
    for secret in ("s2", "s3", "", None, keys.digest("s1"), "\udcff"):
        with pytest.raises(Unauthorized):
            ring.find(secret, 0.0)


def test_a_key_may_use_what_its_list_names_by_id_or_alias() -> None:
    key = Key("k", "d", models=("tiny", "nick"))
    for asked, model_id in (("tiny", "tiny"), ("alias", "tiny"), ("nick", "big")):
        keys.require_model(key, asked, model_id)
    with pytest.raises(Forbidden):
        keys.require_model(key, "big", "big")
    keys.require_model(Key("all", "d"), "anything", "anything")


def test_a_made_secret_is_one_word_of_its_entropy() -> None:
    secret = keys.make_secret(bytes(range(keys.SECRET_BYTES)))
    assert secret == keys.check_secret(secret)
    assert secret.startswith("sk-llmrack-0001")
    with pytest.raises(ValueError):
        keys.make_secret(b"short")


@pytest.mark.parametrize("owner", [None, "", "other"])
def test_only_the_owner_lifts_a_drain(owner: str | None) -> None:
    made = fleet(a=0, b=0).apply(Leased((Lease("a", "me", "", WALL, None),)))
    with pytest.raises(ApiError):
        leases.require_release(made.nodes["a"], owner, force=False)
    leases.require_release(made.nodes["a"], "me", force=False)
    leases.require_release(made.nodes["a"], owner, force=True)
    leases.require_release(made.nodes["b"], owner, force=False)
