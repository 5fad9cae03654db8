"""The plan by table and by hypothesis: what follows each outcome, and what the client is told in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgate.core.plan import Got, Kind, Look, Lost, Outcome, Seen, Step, Try, Verdict, Wait, attempts
from llmgate.core.seats import Seat

A, B, C = (Seat(name, f"boot-{name}", n_ctx) for name, n_ctx in (("a", 100), ("b", 100), ("c", 200)))
NODES = (A, B, C)
ANSWERED, HANDOVER, LATE = Outcome(Kind.ANSWERED), Outcome(Kind.HANDOVER), Outcome(Kind.LATE, detail="too late")
GONE, BROKE, STALLED = Outcome(Kind.UNREACHABLE), Outcome(Kind.BROKE), Outcome(Kind.STALLED)
DEADLINE = 600.0


def refused(status: int, code: str = "", retry_after: float | None = None) -> Outcome:
    return Outcome(Kind.REFUSED, status, code, retry_after)


def failed(status: int) -> Outcome:
    return Outcome(Kind.FAILED, status)


AWAY = refused(503, "draining")
TOO_LONG = refused(400, "context_length_exceeded")
MOVED = refused(404, "model_not_found")


@dataclass
class Run:
    """What a plan did: `tried` has a letter for each node that began, and a capital one for each that went on."""

    verdict: Verdict | None = None
    tried: str = ""
    waits: list[float] = field(default_factory=list)
    took_s: float = 0.0


def run(
    given_outcomes: Iterable[Outcome | tuple[Outcome, Got]],
    tries: int = 5,
    begin: Callable[[float], tuple[Seat, ...]] = lambda now: NODES,
    go_on: Callable[[float], tuple[Seat, ...]] = lambda now: NODES,
    dice: Callable[[], float] = lambda: 1.0,
    deadline: float = DEADLINE,
) -> Run:
    """Each attempt takes 10 ms and brings the next outcome, with what there is of the answer after it."""
    done, now, got = Run(), 0.0, Got()
    look = Look(now, begin(now), go_on(now))
    steps = attempts(look, tries=tries, deadline=deadline, dice=dice)
    coming = iter(given_outcomes)
    try:
        step: Step = next(steps)
        while True:
            outcome = None
            if isinstance(step, Try):
                done.tried += step.node.upper() if step.resume else step.node
                came = next(coming)
                outcome, got = came if isinstance(came, tuple) else (came, got)
                now += 0.01
            else:
                assert isinstance(step, Wait)
                assert step.seconds > 0
                done.waits.append(step.seconds)
                now += step.seconds
            step = steps.send(Seen(Look(now, begin(now), go_on(now)), outcome, got))
    except StopIteration as stop:
        done.verdict, done.took_s = stop.value, now
    return done


@pytest.mark.parametrize(
    ("outcomes", "tried", "verdict"),
    [
        ([ANSWERED], "a", Verdict()),
        ([GONE, ANSWERED], "ab", Verdict()),
        ([BROKE, STALLED, ANSWERED], "abc", Verdict()),
        ([HANDOVER, ANSWERED], "ab", Verdict()),
        ([BROKE, BROKE, BROKE, ANSWERED], "abca", Verdict()),
        ([HANDOVER, BROKE, BROKE, ANSWERED], "abcb", Verdict()),
        ([refused(503), ANSWERED], "ab", Verdict()),
        ([failed(503), ANSWERED], "ab", Verdict()),
        ([refused(503), BROKE, BROKE, ANSWERED], "abcb", Verdict()),
        ([AWAY, ANSWERED], "ab", Verdict()),
        ([AWAY, BROKE, BROKE, ANSWERED], "abcb", Verdict()),
        ([refused(401), ANSWERED], "ab", Verdict()),
        ([MOVED, ANSWERED], "ab", Verdict()),
        ([refused(404, "not_found")], "a", Verdict(hand_on=True)),
        ([refused(400)], "a", Verdict(hand_on=True)),
        ([failed(400)], "a", Verdict(hand_on=True)),
        ([refused(409)], "a", Verdict(hand_on=True)),
        ([refused(413)], "a", Verdict(hand_on=True)),
        ([refused(422)], "a", Verdict(hand_on=True)),
        ([refused(429)], "a", Verdict(hand_on=True)),
        ([refused(504)], "a", Verdict(hand_on=True)),
        ([GONE, refused(400)], "ab", Verdict(hand_on=True)),
        # c alone has a larger context than a; nobody has a larger one than c.
        ([TOO_LONG, ANSWERED], "ac", Verdict()),
        ([TOO_LONG, TOO_LONG], "ac", Verdict(hand_on=True)),
        ([refused(500)] * 3, "abc", Verdict(hand_on=True, spent=True)),
        ([GONE, BROKE, refused(502), refused(502), refused(502)], "abcab", Verdict(hand_on=True, spent=True)),
    ],
)
def test_what_follows_what_before_the_first_byte(outcomes: list[Outcome], tried: str, verdict: Verdict) -> None:
    done = run(outcomes)
    assert (done.tried, done.verdict) == (tried, verdict)


SOME, MORE = Got(ids=3, content=True), Got(ids=9, content=True)


@pytest.mark.parametrize(
    ("outcomes", "tried"),
    [
        ([(BROKE, SOME), ANSWERED], "aB"),
        ([(STALLED, SOME), (BROKE, MORE), ANSWERED], "aBA"),
        ([(HANDOVER, SOME), GONE, GONE, GONE, ANSWERED], "aBCBC"),
        ([(failed(500), SOME), ANSWERED], "aB"),
        ([(failed(503), SOME), refused(503), refused(503), refused(503), ANSWERED], "aBCAB"),
        # Digest, template or version differ there; it has no such path; it does not know our token: not asked again.
        ([(BROKE, SOME), refused(409), refused(404), refused(503), ANSWERED], "aBCAA"),
        ([(BROKE, SOME), refused(401), refused(503), BROKE, ANSWERED], "aBCAC"),
        ([(BROKE, SOME), TOO_LONG, ANSWERED], "aBC"),
        ([refused(503), (BROKE, SOME), ANSWERED], "abC"),
        # Progress is a fresh start: nobody has failed at this place yet.
        ([(BROKE, SOME), BROKE, BROKE, BROKE, (BROKE, MORE), BROKE, BROKE, BROKE, ANSWERED], "aBCABACAB"),
    ],
)
def test_an_answer_goes_on_elsewhere(outcomes: list[Outcome | tuple[Outcome, Got]], tried: str) -> None:
    done = run(outcomes)
    assert (done.tried, done.verdict) == (tried, Verdict())


@pytest.mark.parametrize(
    ("outcomes", "lost", "code"),
    [
        ([(BROKE, SOME), BROKE, BROKE], Lost.SAME_PLACE, "stream_broken"),
        ([(STALLED, SOME), failed(500), refused(500)], Lost.SAME_PLACE, "stream_broken"),
        ([(BROKE, SOME), refused(400)], Lost.NOT_RESUMABLE, "stream_broken"),
        ([(BROKE, SOME), refused(413)], Lost.NOT_RESUMABLE, "stream_broken"),
        ([(BROKE, Got(0, True, False))], Lost.NOT_RESUMABLE, "stream_broken"),
        ([(failed(500), Got(0, True, False))], Lost.NODE_ERROR, None),
        ([(failed(400), SOME)], Lost.NODE_ERROR, None),
        ([(BROKE, SOME), failed(400)], Lost.NODE_ERROR, None),
        ([(BROKE, SOME), refused(504)], Lost.DEADLINE, None),
        ([(LATE, SOME)], Lost.DEADLINE, "deadline_exceeded"),
    ],
)
def test_when_a_stream_is_lost_and_what_is_said(
    outcomes: list[Outcome | tuple[Outcome, Got]], lost: Lost, code: str | None
) -> None:
    verdict = run(outcomes, tries=3).verdict
    assert verdict is not None
    assert verdict.lost is lost
    assert verdict.hand_on == (code is None)
    assert (verdict.error.code if verdict.error else None) == code
    if code == "stream_broken":
        assert "a " + str(outcomes[0][0]) in str(verdict.error)  # type: ignore[index]


def test_an_answer_of_which_nothing_was_said_may_begin_again() -> None:
    """Not streamed: its client has seen nothing, so a node that cannot go on with it can still begin."""
    some = Got(ids=3)
    assert run([(BROKE, some), ANSWERED]).tried == "aB"
    assert run([(BROKE, some), ANSWERED], go_on=lambda now: ()).tried == "ab"
    assert run([(BROKE, some), refused(400), (BROKE, Got()), ANSWERED]).tried == "aBca"


def test_a_late_answer_is_504_before_content() -> None:
    verdict = run([LATE]).verdict
    assert verdict is not None
    assert verdict.error is not None
    assert (verdict.error.status, verdict.error.message, verdict.lost) == (504, "too late", None)


@pytest.mark.parametrize(
    ("outcomes", "code", "retry_after"),
    [
        (
            [refused(503, retry_after=9.0), refused(503, retry_after=4.0), refused(503, retry_after=6.0)],
            "overloaded",
            4.0,
        ),
        ([refused(503)] * 3, "overloaded", 1.0),
        ([BROKE] * 3, "no_node_answered", 1.0),
        ([BROKE, STALLED, BROKE], "no_node_answered", 1.0),
        ([refused(500), BROKE, refused(503)], "no_node_answered", 1.0),
        ([refused(401)] * 3, "no_node_answered", 1.0),
        ([MOVED] * 3, "no_node_answered", 1.0),
    ],
)
def test_what_is_said_when_nobody_could(outcomes: list[Outcome], code: str, retry_after: float) -> None:
    done = run(outcomes, tries=3)
    assert done.tried == "abc"
    assert done.verdict is not None
    assert done.verdict.spent
    assert done.verdict.error is not None
    error = done.verdict.error
    assert (error.status, error.code, error.retry_after) == (503, code, retry_after)


@pytest.mark.parametrize("tries", [1, 2, 3, 9])
def test_nodes_that_fail_at_one_place_are_bounded(tries: int) -> None:
    assert len(run([BROKE] * 99, tries).tried) == tries
    assert len(run([(BROKE, SOME)] * 99, tries).tried) == tries


def test_a_node_that_comes_back_is_waited_for() -> None:
    for outcome, tried in ((GONE, "aa"), ((BROKE, SOME), "aA")):
        done = run(
            [outcome, ANSWERED], **dict.fromkeys(("begin", "go_on"), lambda now: (A,) if not 0.005 < now < 42 else ())
        )
        assert (done.tried, done.verdict) == (tried, Verdict())
        assert 42 <= done.took_s < 43
        assert max(done.waits) <= 0.25


@pytest.mark.parametrize(("outcome", "code"), [(GONE, "no_node_answered"), ((BROKE, SOME), "stream_broken")])
def test_waiting_ends_with_the_deadline(outcome: Outcome | tuple[Outcome, Got], code: str) -> None:
    done = run([outcome], begin=lambda now: (A,) * (now == 0), go_on=lambda now: ())
    assert done.took_s == pytest.approx(DEADLINE)
    assert done.verdict is not None
    assert done.verdict.error is not None
    assert done.verdict.error.code == code
    assert "deadline" in done.verdict.error.message
    assert done.verdict.lost == (Lost.NO_NODE if code == "stream_broken" else None)


def test_a_restarted_node_is_another_node() -> None:
    """One that handed its answers over is not asked again; the process that takes its place is."""
    again = Seat("a", "another boot", 100)
    done = run([(HANDOVER, SOME), ANSWERED], begin=lambda now: (A,), go_on=lambda now: (A,) if now < 3 else (again,))
    assert done.tried == "aA"
    assert done.took_s > 3


@pytest.mark.parametrize("code", ["starting", "loading", "draining", "failed", "node_stopping"])
def test_a_node_that_says_that_it_is_away_is_waited_for_until_it_has_started_anew(code: str) -> None:
    again = Seat("a", "another boot", 100)
    done = run([refused(503, code), ANSWERED], tries=1, begin=lambda now: (A,) if now < 3 else (again,))
    assert (done.tried, done.verdict) == ("aa", Verdict())
    assert done.took_s > 3


def test_where_some_are_away_and_the_others_full_the_client_hears_so() -> None:
    done = run([AWAY, refused(503, retry_after=7.0), AWAY])
    assert done.tried == "abc"
    assert done.verdict is not None and done.verdict.error is not None
    assert (done.verdict.error.code, done.verdict.error.retry_after) == ("overloaded", 7.0)


def test_the_first_retry_is_at_once_and_the_next_ones_spread_out() -> None:
    done = run([BROKE] * 7, tries=7)
    assert done.waits == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert run([BROKE] * 7, tries=7, dice=lambda: 0.0).waits == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert max(run([refused(503), *[(BROKE, SOME)], *[refused(503)] * 30, ANSWERED]).waits) == 2.0


KINDS = [GONE, BROKE, STALLED, HANDOVER, refused(503), refused(500), refused(401), refused(409), refused(400), MOVED]
KINDS += [
    TOO_LONG,
    refused(404),
    refused(429),
    refused(504),
    failed(500),
    failed(503),
    failed(400),
    LATE,
    ANSWERED,
    AWAY,
]
LAST = {400, 413, 422, 429, 504}


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.booleans()), max_size=40),
    st.integers(1, 6),
    st.lists(st.sets(st.sampled_from(NODES)), min_size=1),
    st.floats(0, 1),
)
def test_no_plan_repeats_what_was_sent_or_runs_away(
    story: list[tuple[Outcome, int, bool]], tries: int, fleets: list[set[Seat]], dice: float
) -> None:
    """Whatever happens: content is only gone on with; nothing is tried after an end; what makes no progress stops."""
    got, given_outcomes = Got(), []
    for outcome, progress, shown in story:
        got = Got(got.ids + progress, got.content or (shown and progress > 0))
        given_outcomes.append((outcome, got))
    given_outcomes += [(BROKE, got)] * 20

    def heirs(now: float) -> tuple[Seat, ...]:
        return tuple(sorted(fleets[int(now * 7) % len(fleets)], key=lambda seat: seat.name))

    done = run(given_outcomes, tries, go_on=heirs, dice=lambda: dice, deadline=30.0)
    assert done.verdict is not None
    assert done.took_s <= 30.02
    before = [Got(), *(after for _, after in given_outcomes)]
    stuck = 0
    for number, letter in enumerate(done.tried):
        outcome, after = given_outcomes[number]
        assert letter.isupper() or not before[number].content, "content was out, and a node began"
        assert letter.islower() or before[number].ids, "a node went on with nothing"
        is_last = number == len(done.tried) - 1
        if outcome.kind in (Kind.ANSWERED, Kind.LATE):
            assert is_last
        if letter.islower() and outcome.status in LAST and outcome.code == "" and after.ids == 0:
            assert is_last, "a client's own error was tried again"
        stuck = 0 if after.ids > before[number].ids else stuck
        stuck += outcome.kind in (Kind.BROKE, Kind.STALLED)
        assert stuck < tries or is_last
    if done.verdict.lost:
        assert before[len(done.tried)].content
