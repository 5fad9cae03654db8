"""Who may go on with an answer: the same weights, the same template, the same resume format, and nobody else."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmgate.core.candidate import Candidate
from llmgate.core.fleet import Fleet, Listed, Reported
from llmgate.core.seats import Seat, heirs, origin_of, seats
from llmgate.listing import Address
from llmnode.wire.node import Model, Report, State
from llmnode.wire.resume import VERSION, Origin

TINY = Model("tiny", digest="d1", template="t1", n_ctx=100)
ORIGIN = Origin("tiny", "d1", "t1")


def fleet(**changes: dict[str, Any]) -> Fleet:
    """A node for each keyword, named by it, that differs from the first one by this."""
    made = Fleet().apply(Listed(tuple(Address(name, f"http://{name}") for name in changes)))
    for name, change in changes.items():
        model = dataclasses.replace(TINY, **{k: v for k, v in change.items() if k in ("digest", "template", "id")})
        resume = change.get("resume", VERSION)
        report = Report(f"boot-{name}", "r", "c", State.READY, models=(model,), resume=resume)
        made = made.apply(Reported(name, report, 0.0))
    return made


def ranked(*names: str) -> list[Candidate]:
    return [Candidate(name, 0, 4, 100, 0) for name in names]


def test_only_the_same_model_and_format_may_go_on() -> None:
    nodes = fleet(
        a={}, same={}, digest={"digest": "d2"}, unknown={"digest": ""}, template={"template": "t2"}, old={"resume": 0}
    )
    assert origin_of(nodes.nodes["a"], "tiny") == ORIGIN
    able = heirs(nodes, ranked("unknown", "digest", "same", "template", "old", "a", "unlisted"), ORIGIN)
    assert [seat.name for seat in able] == ["same", "a"]
    assert able[0] == Seat("same", "boot-same", 100)


def test_who_was_not_ranked_may_not_go_on() -> None:
    assert heirs(fleet(a={}, b={}), ranked("b"), ORIGIN) == (Seat("b", "boot-b", 100),)


def test_without_a_digest_or_the_format_there_is_no_origin() -> None:
    nodes = fleet(a={"digest": ""}, b={"resume": VERSION + 1}, c={"id": "other"})
    assert [origin_of(node, "tiny") for node in nodes.nodes.values()] == [None, None, None]
    assert heirs(nodes, ranked("a", "b", "c"), None) == ()


def test_any_ranked_node_may_begin_that_is_still_listed() -> None:
    nodes = fleet(a={}, b={"digest": "d2"})
    assert [seat.name for seat in seats(nodes, ranked("b", "gone", "a"))] == ["b", "a"]
