"""The plan by table: what follows each outcome, and what the client is told in the end."""

from __future__ import annotations

import itertools

import pytest

from llmgate.core.candidate import Candidate
from llmgate.core.plan import Kind, Outcome, Verdict, attempts

NODES = tuple(Candidate(name, 0, 4, n_ctx, 0) for name, n_ctx in (("a", 100), ("b", 100), ("c", 200)))
ANSWERED, CUT = Outcome(Kind.ANSWERED), Outcome(Kind.CUT)
GONE, BROKE, STALLED = Outcome(Kind.UNREACHABLE), Outcome(Kind.BROKE), Outcome(Kind.STALLED)


def refused(status: int, code: str = "", retry_after: float | None = None) -> Outcome:
    return Outcome(Kind.REFUSED, status, code, retry_after)


def run(outcomes: list[Outcome], tries: int = 3) -> tuple[str, Verdict]:
    """The names of the nodes tried, and the verdict. Each node gives the next outcome."""
    steps = attempts(NODES, tries)
    tried = []
    given = iter(outcomes)
    try:
        node = next(steps)
        while True:
            tried.append(node.name)
            node = steps.send(next(given))
    except StopIteration as stop:
        return "".join(tried), stop.value


@pytest.mark.parametrize(
    ("outcomes", "tried", "verdict"),
    [
        ([ANSWERED], "a", Verdict()),
        ([CUT], "a", Verdict()),
        ([GONE, ANSWERED], "ab", Verdict()),
        ([BROKE, STALLED, ANSWERED], "abc", Verdict()),
        ([refused(503), ANSWERED], "ab", Verdict()),
        ([refused(500), CUT], "ab", Verdict()),
        ([refused(401), ANSWERED], "ab", Verdict()),
        ([refused(404, "model_not_found"), ANSWERED], "ab", Verdict()),
        ([refused(404, "not_found")], "a", Verdict(hand_on=True)),
        ([refused(400)], "a", Verdict(hand_on=True)),
        ([refused(413)], "a", Verdict(hand_on=True)),
        ([refused(422)], "a", Verdict(hand_on=True)),
        ([refused(429)], "a", Verdict(hand_on=True)),
        ([refused(504)], "a", Verdict(hand_on=True)),
        ([GONE, refused(400)], "ab", Verdict(hand_on=True)),
        # c alone has a larger context than a; nobody has a larger one than c.
        ([refused(400, "context_length_exceeded"), ANSWERED], "ac", Verdict()),
        ([refused(400, "context_length_exceeded")] * 2, "ac", Verdict(hand_on=True)),
        ([refused(500)] * 3, "abc", Verdict(hand_on=True, spent=True)),
        ([GONE, GONE, refused(502)], "abc", Verdict(hand_on=True, spent=True)),
    ],
)
def test_what_follows_what(outcomes: list[Outcome], tried: str, verdict: Verdict) -> None:
    assert run(outcomes) == (tried, verdict)


@pytest.mark.parametrize(
    ("outcomes", "code", "retry_after"),
    [
        (
            [refused(503, retry_after=9.0), refused(503, retry_after=4.0), refused(503, retry_after=6.0)],
            "overloaded",
            4.0,
        ),
        ([refused(503)] * 3, "overloaded", 1.0),
        ([GONE] * 3, "no_node_answered", 1.0),
        ([BROKE, STALLED, GONE], "no_node_answered", 1.0),
        ([refused(500), GONE, refused(503)], "no_node_answered", 1.0),
        ([refused(401)] * 3, "no_node_answered", 1.0),
        ([refused(404, "model_not_found")] * 3, "no_node_answered", 1.0),
    ],
)
def test_what_is_said_when_nobody_could(outcomes: list[Outcome], code: str, retry_after: float) -> None:
    tried, verdict = run(outcomes)
    assert tried == "abc"
    assert verdict.spent
    assert verdict.error is not None
    assert (verdict.error.status, verdict.error.code, verdict.error.retry_after) == (503, code, retry_after)


@pytest.mark.parametrize("tries", [1, 2, 3, 9])
def test_tries_are_bounded_by_the_setting_and_by_the_nodes(tries: int) -> None:
    tried, _ = run([GONE] * 3, tries)
    assert tried == "abc"[:tries]


def test_no_plan_asks_a_node_twice_or_goes_on_after_content() -> None:
    every = [ANSWERED, CUT, GONE, BROKE, STALLED, refused(503), refused(500), refused(400), refused(401), refused(429)]
    for outcomes in itertools.product(every, repeat=3):
        tried, verdict = run(list(outcomes))
        assert len(set(tried)) == len(tried)
        for number, outcome in enumerate(outcomes[: len(tried)], 1):
            if outcome in (ANSWERED, CUT):
                assert number == len(tried)
                assert verdict == Verdict()
