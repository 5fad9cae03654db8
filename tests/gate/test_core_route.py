"""Names, fallbacks, labels, canaries and policies: who is asked, in which order, whatever state the fleet is in."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgate.core.explanation import as_json, as_text, explain
from llmgate.core.fleet import Attempted, Dispatched, Event, Fleet, Lease, Leased, Listed, Lost, Reported
from llmgate.core.health import Signal
from llmgate.core.keys import Key
from llmgate.core.policy import POLICIES, Ask, refusal
from llmgate.listing import Address, Canary, Route
from llmnode.wire.errors import ModelNotFound, Overloaded
from llmnode.wire.node import Model, Report, State
from tests.gate.fleets import CHAT, NOW, STALE, ask, chain_of, choice, fleet, names, report, reported

FULL = {"running": 4}


def two_models(*events: Event, **routes: Route) -> Fleet:
    """big at a and b, small at c."""
    made = fleet("a", "b", "c", routes=routes)
    for name, model in (("a", "big"), ("b", "big"), ("c", "small")):
        made = made.apply(Reported(name, report(model=model), NOW))
    for event in events:
        made = made.apply(event)
    return made


def full(name: str, model: str) -> Reported:
    return Reported(name, report(model=model, **FULL), NOW)


def test_an_alias_of_the_gate_stands_for_the_models_id() -> None:
    made = choice(fleet("a", routes={"tiny": Route(aliases=("gpt-4o",))}), ask(model="gpt-4o"))
    assert (names(made), made.model, made.name) == (["a"], "tiny", "tiny")


def test_an_alias_of_the_nodes_goes_to_them_as_it_came() -> None:
    served = report()
    nicked = type(served)(**{**vars(served), "models": (Model("tiny", aliases=("nick",)),)})
    made = fleet("a", "b", events=(Reported("b", nicked, NOW),), routes={"tiny": Route("round-robin")})
    found = choice(made, ask(model="nick"))
    assert (names(found), found.model, found.name, found.policy) == (["b"], "tiny", "nick", "round-robin")


@pytest.mark.parametrize(
    ("events", "model", "order"),
    [
        ((), "big", "ab"),
        ((full("a", "big"),), "big", "ba"),
        ((full("a", "big"), full("b", "big")), "small", "c"),
        ((Lost("a", "gone", NOW), Lost("b", "gone", NOW)), "small", "c"),
        ((Lost("a", "gone", NOW), full("b", "big")), "small", "c"),
        # Everybody is full: whoever is to wait waits for the model that was asked for.
        ((full("a", "big"), full("b", "big"), full("c", "small")), "big", "ab"),
        ((Lost("a", "gone", NOW), Lost("b", "gone", NOW), full("c", "small")), "small", "c"),
        # Nobody is there at all.
        ((Lost("a", "gone", NOW), Lost("b", "gone", NOW), Lost("c", "gone", NOW)), "big", ""),
    ],
)
def test_a_model_that_is_absent_or_full_falls_back(events: tuple[Event, ...], model: str, order: str) -> None:
    made = two_models(*events, big=Route("least-loaded", aliases=("best",), fallback=("small",)))
    for asked in ("big", "best"):
        found = choice(made, ask(model=asked))
        assert (found.model, found.name, sorted(names(found))) == (model, model, sorted(order))
        assert (f"fallback from {asked}" in found.notes) is (model == "small")


GONE = Lost("a", "gone", NOW), Lost("b", "gone", NOW)


def test_a_node_is_awaited_that_takes_no_work_now_but_would_do() -> None:
    assert not choice(two_models(), ask(model="big")).awaited
    assert choice(two_models(*GONE), ask(model="big")).awaited
    drained = Leased(tuple(Lease(name, "me", "", 0.0, None) for name in "ab"))
    assert choice(two_models(drained), ask(model="big")).awaited
    loading = (Reported(name, replace(report(model="big"), state=State.LOADING), NOW) for name in "ab")
    assert choice(two_models(*loading), ask(model="big")).awaited


def test_a_node_is_not_awaited_that_will_not_do_either_when_it_is_back() -> None:
    made = two_models(*GONE, big=Route(labels=frozenset({("zone", "z")})))
    assert not choice(made, ask(model="big")).awaited
    assert not choice(two_models(*GONE), replace(ask(model="big"), kinds=frozenset({"embedding"}))).awaited
    assert not choice(two_models(*GONE), ask(model="none")).awaited


def test_of_models_that_nobody_serves_now_the_one_is_awaited_that_may_come_back() -> None:
    labels = frozenset({("zone", "z")})
    made = two_models(*GONE, Lost("c", "gone", NOW), big=Route(fallback=("small",), labels=labels))
    found = choice(made, ask(model="big"))
    assert (names(found), found.model, found.awaited) == ([], "small", True)


def test_an_answer_that_has_begun_stays_with_its_model() -> None:
    made = two_models(full("a", "big"), full("b", "big"), big=Route("least-loaded", fallback=("small",)))
    assert choice(made, ask("x", model="big")).model == "small"
    assert choice(made, ask("x", model="big", begun=True)).model == "big"


def test_a_model_that_nobody_has_ever_served_falls_back_too() -> None:
    made = two_models(huge=Route(fallback=("nothing", "small")))
    found = choice(made, ask(model="huge"))
    assert (names(found), found.name) == (["c"], "small")
    assert isinstance(refusal(made, ask(model="none"), choice(made, ask(model="none")), []), ModelNotFound)


def test_a_key_falls_back_only_to_what_it_may_use() -> None:
    made = two_models(full("a", "big"), full("b", "big"), big=Route(fallback=("small",)))
    assert choice(made, ask(model="big", key=Key("k", "", models=("big",)))).model == "big"
    assert choice(made, ask(model="big", key=Key("k", "", models=("big", "small")))).model == "small"


def test_only_nodes_with_the_labels_are_asked() -> None:
    in_a, in_b = frozenset({("zone", "a"), ("gpu", "x")}), frozenset({("zone", "b")})
    made = fleet(
        Address("a", "http://a", in_a), Address("b", "http://b", in_b), "c",
        routes={"tiny": Route("least-loaded", labels=frozenset({("zone", "a")}))},
    )  # fmt: skip
    found = choice(made, ask())
    assert names(found) == ["a"]
    assert found.passed_over == (("b", "it lacks the label zone=a"), ("c", "it lacks the label zone=a"))
    made = made.apply(Lost("a", "gone", NOW))
    assert isinstance(refusal(made, ask(), choice(made, ask()), []), Overloaded)


def test_labels_and_weights_follow_the_nodes_file() -> None:
    made = fleet("a").apply(Listed((Address("a", "http://a", frozenset({("zone", "a")}), 3.0),), {}))
    assert made.nodes["a"].report is not None
    assert (made.nodes["a"].weight, made.nodes["a"].labels) == (3.0, frozenset({("zone", "a")}))


def canaried(share: float, policy: str = "least-loaded") -> Fleet:
    made = fleet("a", "b", "c", routes={"tiny": Route(policy, canary=Canary("new", share))})
    return made.apply(Reported("c", report(release="new"), NOW))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_canary_gets_its_share_of_conversations(share: float, policy: str) -> None:
    made = canaried(share, policy)
    firsts = Counter(names(choice(made, ask(f"conversation {number}")))[0] for number in range(1000))
    assert firsts["c"] / 1000 == pytest.approx(share, abs=0.03)


def test_requests_without_a_conversation_are_drawn_by_their_ids() -> None:
    made = canaried(0.2)
    firsts = Counter(names(choice(made, Ask("tiny", CHAT, request=f"id-{number}")))[0] for number in range(1000))
    assert firsts["c"] / 1000 == pytest.approx(0.2, abs=0.04)


def test_a_conversation_stays_on_its_side_of_a_canary() -> None:
    made = canaried(0.5)
    for number in range(50):
        turns = [f"conversation {number}", "answer", "next", "answer", "last"]
        sides = {names(choice(made, ask(*turns[:n], request=f"{number}-{n}")))[0] == "c" for n in (1, 3, 5)}
        assert len(sides) == 1


def test_a_canary_that_is_gone_is_covered_by_the_others_and_the_other_way_round() -> None:
    made = canaried(1.0)
    assert names(choice(made, ask("x"))) == ["c", "a", "b"]
    assert names(choice(made.apply(Lost("c", "gone", NOW)), ask("x"))) == ["a", "b"]
    assert names(choice(canaried(0.0).apply(Lost("a", "", NOW)).apply(Lost("b", "gone", NOW)), ask("x")))[-1] == "c"


def test_round_robin_takes_turns() -> None:
    made = fleet("a", "b", "c", routes={"tiny": Route("round-robin")})
    order = ""
    for _ in range(6):
        first = names(choice(made, ask()))[0]
        order += first
        made = made.apply(Dispatched(first, NOW))
    assert order == "abcabc"


def test_random_goes_by_dice_and_weights() -> None:
    made = fleet(Address("a", "http://a", weight=3.0), "b", routes={"tiny": Route("random")})
    won = sum(names(choice(made, ask("same", dice=number)))[0] == "a" for number in range(2000))
    assert won / 2000 == pytest.approx(0.75, abs=0.04)


def test_a_node_that_starts_slowly_wins_few_cold_prompts_and_then_its_share() -> None:
    made = fleet("a", "b").apply(Lost("b", "gone", NOW)).apply(reported("b"))
    asks = [ask(f"{number}") for number in range(1000)]
    slow = sum(names(choice(made, one))[0] == "b" for one in asks) / 1000
    made = made.apply(reported("a", at=NOW + 600)).apply(reported("b", at=NOW + 600))
    well = sum(names(choice(made, one, now=NOW + 600))[0] == "b" for one in asks) / 1000
    assert 0.0 < slow < 0.15
    assert well == pytest.approx(0.5, abs=0.05)


def test_rendezvous_moves_only_what_a_lost_node_had() -> None:
    made = fleet("a", "b", "c", routes={"tiny": Route("rendezvous")})
    asks = [ask(f"{number}") for number in range(200)]
    before = [names(choice(made, one))[0] for one in asks]
    after = [names(choice(made.apply(Lost("c", "gone", NOW)), one))[0] for one in asks]
    assert set(before) == {"a", "b", "c"}
    assert all(now == was for was, now in zip(before, after, strict=True) if was != "c")


NODES = ("a", "b", "c", "d")
LOADS = st.fixed_dictionaries(
    {},
    optional={
        "running": st.integers(0, 5),
        "waiting": st.integers(0, 5),
        "slots": st.integers(0, 4),
        "wait_s": st.floats(0, 100),
        "queued_prompt_tokens": st.integers(0, 10**6),
        "prefill_tps": st.floats(0, 10**5),
        "bytes_per_token": st.floats(0, 8),
        "release": st.sampled_from(["r", "new"]),
        "model": st.sampled_from(["tiny", "other"]),
    },
)
TURNS = ("x" * 600, "answer", "y" * 600)


@st.composite
def events(draw: st.DrawFn) -> Event:
    name = draw(st.sampled_from(NODES))
    kind = draw(st.sampled_from(["report", "state", "lost", "dispatched", "failed", "leased"]))
    if kind == "report":
        held = [chain_of(*TURNS[: draw(st.integers(0, 3))])]
        return Reported(name, report(*held, **draw(LOADS)), draw(st.sampled_from([NOW, NOW - 1, NOW - 10])))
    if kind == "state":
        return Reported(name, Report("b", "r", "c", draw(st.sampled_from(State)), models=(Model("tiny"),)), NOW)
    if kind == "lost":
        return Lost(name, "gone", NOW)
    if kind == "dispatched":
        return Dispatched(name, NOW)
    if kind == "failed":
        return Attempted(name, 10**6, Signal.FAILED, "broke", NOW)
    return Leased(tuple(Lease(n, "bob", "", 0.0, None) for n in draw(st.sets(st.sampled_from(NODES)))))


ROUTES = st.builds(
    Route,
    policy=st.sampled_from(list(POLICIES)),
    aliases=st.just(("nick",)),
    fallback=st.sampled_from([(), ("other",)]),
    labels=st.sampled_from([frozenset(), frozenset({("zone", "a")})]),
    canary=st.none() | st.builds(Canary, st.just("new"), st.floats(0, 1)),
)
ADDRESSES = st.tuples(
    *(
        st.builds(
            Address,
            st.just(name),
            st.just(f"http://{name}"),
            st.sampled_from([frozenset(), frozenset({("zone", "a")})]),
            st.floats(0.1, 10),
        )
        for name in NODES
    )
)


@given(
    addresses=ADDRESSES,
    route=ROUTES,
    happened=st.lists(events(), max_size=16),
    turns=st.integers(0, 3),
    dice=st.integers(0, 2**64 - 1),
    asked=st.sampled_from(["tiny", "nick", "other", "none"]),
)
def test_no_policy_ever_picks_a_node_that_cannot_or_forgets_one_that_can(
    addresses: tuple[Address, ...], route: Route, happened: list[Any], turns: int, dice: int, asked: str
) -> None:
    made = fleet(*addresses, events=tuple(happened), routes={"tiny": route})
    one = ask(*TURNS[:turns], model=asked, dice=dice, request="id")
    said = explain(made, one, NOW, STALE)
    page, anybody = as_text(said), said.anybody
    orders = []
    for policy in POLICIES:
        found = choice(made, one, policy)
        order = names(found)
        for name in order:
            node = made.nodes[name]
            assert node.standing(NOW, STALE).usable
            assert node.lease is None
            assert node.model(found.name)
        assert len(set(order)) == len(order)
        assert not set(order) & {name for name, _ in found.passed_over}
        assert anybody is bool(order)
        assert not order or found.why in page
        orders.append(sorted(order))
        # Two gates that have heard the same choose the same.
        assert choice(made, one, policy) == found
    assert all(order == orders[0] for order in orders)
    live = choice(made, one)
    assert live == choice(made, one, live.policy)
    if live.ranked:
        assert f"{live.policy} *" in page


def test_an_explanation_shows_every_figure() -> None:
    held = chain_of("word " * 1000)
    routes = {"tiny": Route(aliases=("nick",))}
    made = fleet("a", "b", "c", routes=routes).apply(
        reported("a", held, running=4, wait_s=1.5, queued_prompt_tokens=40)
    )
    said = explain(made.apply(Lost("c", "gone", NOW)), ask("word " * 1000, model="nick"), NOW, STALE)
    lines = as_text(said).splitlines()
    assert said.anybody
    assert lines[0] == "model   nick, sent as tiny"
    assert lines[1].startswith("prompt  5010 bytes, 19 blocks, root ")
    assert lines[4].split() == ["a", "ready", "4/4", "1.500", "40", "1253", "1216", "1000", "1", "1.577"]
    assert lines[5].split() == ["b", "ready", "0/4", "0.000", "0", "1253", "0", "1000", "1", "1.253"]
    assert lines[6].split() == ["c", "unreachable", "not", "a", "choice:", "gone"]
    chosen = next(line for line in lines if line.startswith("prefix *"))
    assert chosen.split()[2] == "b"
    assert chosen.endswith(
        "prefix (moved): b 0/4 (1.253 s, 0 of 1253 cached), a 4/4 (1.577 s, 1216 of 1253 cached); not c (gone)"
    )


def test_an_explanation_says_the_same_to_programs() -> None:
    held = chain_of("word " * 1000)
    made = fleet("a", "b", "c").apply(reported("a", held, running=1)).apply(Lost("c", "gone", NOW))
    said = as_json(explain(made, ask("word " * 1000), NOW, STALE))
    assert (said["model"], said["policy"], said["prompt"]["blocks"]) == ("tiny", "prefix", 19)
    assert [(one["node"], one["cached_tokens"], one["cost_seconds"]) for one in said["nodes"]] == [
        ("a", 1216, 0.037),
        ("b", 0, 1.253),
    ]
    assert said["passed_over"] == [{"node": "c", "state": "unreachable", "why": "gone"}]
    assert [one["policy"] for one in said["policies"]] == list(POLICIES)
    assert said["policies"][0]["ranking"] == ["a", "b"]
    nobody = as_json(explain(Fleet(), ask("Hello"), NOW, STALE))
    assert nobody["nodes"] == [] and nobody["prompt"] is None
