"""What a key may use: windows that slide, budgets that turn, and an honest time to come back."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgate.core import limits, ratelimit
from llmgate.core.demand import demand, spent
from llmgate.core.limits import Counts, Hold, Limits, State, added, moment, refusal, settled, turned, use
from llmgate.core.plan import Got
from llmnode.wire.node import Usage


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp() * 1000)


NOON = ms("2026-02-28T12:00:00")


HALF_DAY = 12 * 3600_000
BOTH = {"requests": 1, "day_tokens": 9}


def state(at: int, *, running: int = 0, hour: int = 0, full_before: int = 0, **counts: int) -> State:
    """A key at a moment, with these counts in the windows of that moment."""
    now = moment(at, hour)
    there = {"minute": now.minute, "day": now.day, "month": now.month}
    return State(Counts(**{**there, **counts}), running, now, full_before)


@pytest.mark.parametrize(
    ("before", "current", "gone_s", "used"),
    [(0, 0, 0, 0), (60, 0, 0, 60), (60, 0, 30, 30), (60, 0, 59, 1), (60, 10, 45, 25), (1, 0, 1, 1), (0, 7, 59, 7)],
)
def test_the_minute_before_weighs_what_is_left_of_it(before: int, current: int, gone_s: int, used: int) -> None:
    now = state(NOON + gone_s * 1000, requests=current, requests_before=before)
    assert use(now).requests_per_minute == used


def test_no_burst_of_twice_the_limit_passes_around_the_turn_of_a_minute() -> None:
    limit, counts, passed = Limits(requests_per_minute=60), Counts(), 0
    for at in range(NOON - 5000, NOON + 5000, 10):
        now = moment(at)
        counts = turned(counts, now)
        if refusal(limit, State(counts, 0, now), 1) is None:
            counts, passed = added(counts, 1), passed + 1
    assert passed == 60 + 4  # what a twelfth of a minute gives back, of which the last whole one is still to come


@given(st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 40)), max_size=80), st.integers(1, 100))
def test_no_minute_of_the_clock_has_more_than_the_limit(steps: list[tuple[int, int]], most: int) -> None:
    counts, at, seen = Counts(), NOON, dict[int, int]()
    for later, tokens in steps:
        at += later
        now = moment(at)
        counts = turned(counts, now)
        if refusal(Limits(tokens_per_minute=most), State(counts, 0, now), tokens) is None:
            counts = added(counts, tokens)
            seen[now.minute] = seen.get(now.minute, 0) + tokens
    assert all(count <= most for count in seen.values())


LIMIT = st.none() | st.integers(1, 50)


@given(
    st.tuples(LIMIT, LIMIT, LIMIT, LIMIT),
    st.tuples(*[st.integers(0, 60)] * 6),
    st.integers(0, 40 * 86_400_000),
    st.integers(1, 60),
    st.integers(0, 23),
    st.integers(0, 3),
)
def test_who_comes_back_when_told_to_is_let_in(
    most: tuple[int | None, ...], had: tuple[int, ...], later: int, tokens: int, hour: int, lost_minutes: int
) -> None:
    asked = Limits(most[0], most[1], None, most[2], most[3])
    names = ("requests", "requests_before", "tokens", "tokens_before", "day_tokens", "month_tokens")
    at = NOON + later
    full_before = at - lost_minutes * 30_000 if lost_minutes else 0
    counts = dict(zip(names, had, strict=True))
    now = state(at, hour=hour, full_before=full_before, **counts)
    refused = refusal(asked, now, tokens)
    if refused is None:
        return
    if refused.wait_ms is None:
        assert refused.asked > refused.most
        return
    again = moment(at + refused.wait_ms, hour)
    assert refusal(asked, now._replace(counts=turned(now.counts, again), at=again), tokens) is None
    early = moment(at + refused.wait_ms - 1, hour)
    assert refusal(asked, now._replace(counts=turned(now.counts, early), at=early), tokens) is not None


@pytest.mark.parametrize(
    ("asked", "had", "tokens", "limit", "wait"),
    [
        (Limits(requests_per_minute=3), {"requests": 3}, 1, "requests_per_minute", 60_000 + 20_000),
        (Limits(tokens_per_minute=100), {"tokens": 40, "tokens_before": 60}, 30, "tokens_per_minute", 30_000),
        (Limits(tokens_per_day=100), {"day_tokens": 91}, 10, "tokens_per_day", HALF_DAY),
        (Limits(tokens_per_month=100), {"month_tokens": 91}, 10, "tokens_per_month", HALF_DAY),
        (Limits(tokens_per_minute=100, tokens_per_day=200), {"day_tokens": 191}, 101, "tokens_per_minute", None),
        (Limits(requests_per_minute=1, tokens_per_day=9), BOTH, 1, "tokens_per_day", HALF_DAY),
    ],
)  # fmt: skip
def test_of_several_limits_the_one_that_lasts_longest_is_named(
    asked: Limits, had: dict[str, int], tokens: int, limit: str, wait: int | None
) -> None:
    refused = refusal(asked, state(NOON, **had), tokens)
    assert refused is not None and (refused.limit, refused.wait_ms) == (limit, wait)


def test_places_are_counted_by_who_holds_them() -> None:
    asked = Limits(concurrent_requests=2)
    assert refusal(asked, state(NOON, running=1), 1) is None
    refused = refusal(asked, state(NOON, running=2), 1)
    assert refused == ("concurrent_requests", 2, 2, 1, limits.CONCURRENT_RETRY_MS)


def test_days_and_months_turn_at_the_hour_that_is_set() -> None:
    end = ms("2026-03-01T00:00:00")
    assert (moment(end - 1).month, moment(end).month) == (2026 * 12 + 1, 2026 * 12 + 2)
    assert moment(end + 5 * 3600_000 - 1, 5).month == 2026 * 12 + 1
    assert moment(end + 5 * 3600_000, 5).day == moment(end).day
    counts = turned(Counts(day=moment(NOON).day, day_tokens=5, month=moment(NOON).month, month_tokens=9), moment(end))
    assert (counts.day_tokens, counts.month_tokens) == (0, 0)
    assert limits.month_begins(moment(NOON).month + 1, 5) == end + 5 * 3600_000


def test_a_clock_that_was_set_back_gives_nothing_out_twice() -> None:
    late = moment(ms("2026-03-01T00:00:10"))
    counts = added(turned(Counts(), late), 7)
    back = turned(counts, moment(late.ms - 20_000))
    assert back == counts
    assert use(State(back, 0, moment(late.ms - 20_000))).tokens_per_day == 7


def test_what_was_used_takes_the_place_of_what_was_reserved() -> None:
    now = moment(NOON)
    counts = added(turned(Counts(), now), 100)
    hold = Hold("k", 1, now.minute, 100)
    assert use(State(settled(counts, hold, 30, 1, 0), 0, now)) == (1, 30, 0, 30, 30)
    assert use(State(settled(counts, hold, 0, 0, 0), 0, now)) == (0, 0, 0, 0, 0)
    assert use(State(settled(counts, hold, 130, 1, 0), 0, now)) == (1, 130, 0, 130, 130)


def test_an_answer_over_midnight_counts_on_the_day_it_was_let_in() -> None:
    before, after = moment(ms("2026-02-28T23:59:59")), moment(ms("2026-03-01T00:00:30"))
    counts = added(turned(Counts(), before), 100)
    ended = settled(turned(counts, after), Hold("k", 1, before.minute, 100), 40, 1, 0)
    assert (ended.tokens_before, ended.day_tokens, ended.month_tokens) == (40, 0, 0)


def test_minutes_whose_counts_were_lost_are_used_up() -> None:
    asked = Limits(requests_per_minute=10)
    lost = NOON + 20_000
    refused = refusal(asked, state(NOON + 30_000, full_before=lost), 1)
    assert refused is not None and refused.wait_ms == 30_000 + 6_000
    assert refusal(asked, state(NOON + 66_000, full_before=lost), 1) is None
    assert refusal(asked, state(NOON + 65_999, full_before=lost), 1) is not None
    assert refusal(asked, state(NOON + 120_000, requests=9, full_before=lost), 1) is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tokens_per_week": 1}, "tokens_per_week"),
        ({"tokens_per_day": 0}, "tokens_per_day"),
        ({"tokens_per_day": True}, "tokens_per_day"),
        ({"requests_per_minute": 1.5}, "1.5"),
        ({"requests_per_minute": limits.MOST + 1}, str(limits.MOST)),
    ],
)
def test_a_limit_that_is_none_is_refused_by_name(given: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Limits.of(given)


def test_headers_say_what_is_left_and_when_all_is_there_again() -> None:
    asked = Limits(requests_per_minute=10, tokens_per_minute=1000)
    said = ratelimit.headers(asked, state(NOON + 30_000, requests=2, requests_before=4, tokens_before=100))
    assert said == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "6",
        "x-ratelimit-reset-requests": "1m30s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "950",
        "x-ratelimit-reset-tokens": "30s",
    }
    budget = ratelimit.headers(Limits(tokens_per_day=100, tokens_per_month=90), state(NOON, month_tokens=95))
    assert budget["x-ratelimit-remaining-tokens"] == "0"
    assert ratelimit.headers(Limits(concurrent_requests=1), state(NOON)) == {}


@pytest.mark.parametrize(
    ("time", "said"), [(0, "0ms"), (350, "350ms"), (1001, "2s"), (60_000, "1m0s"), (3_600_001, "1h0m1s")]
)
def test_durations_are_written_as_openai_writes_them(time: int, said: str) -> None:
    assert ratelimit.span(time) == said


def test_a_refusal_that_ends_soon_may_be_tried_again_and_another_may_not() -> None:
    asked = Limits(requests_per_minute=1, tokens_per_day=10)
    soon = refusal(asked, state(NOON + 30_000, requests_before=1), 1)
    late = refusal(asked, state(NOON, day_tokens=10), 1)
    never = refusal(asked, state(NOON), 11)
    assert soon and late and never
    errors = [ratelimit.OverLimit(refused, {"x-ratelimit-limit-requests": "1"}) for refused in (soon, late, never)]
    assert [error.code for error in errors] == ["rate_limit_exceeded", "insufficient_quota", "insufficient_quota"]
    assert [error.headers().get("retry-after") for error in errors] == ["30", str(12 * 3600), None]
    assert ["x-should-retry" in error.headers() for error in errors] == [False, True, True]
    assert errors[0].body()["error"]["limit"] == {"name": "requests_per_minute", "limit": 1, "used": 1, "asked": 1}
    assert all(error.status == 429 and "x-ratelimit-limit-requests" in error.headers() for error in errors)


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        (CHAT, {}, 10 + 50),
        (CHAT, {"max_tokens": 7}, 17),
        (CHAT, {"max_completion_tokens": 7, "n": 3}, 10 + 21),
        (CHAT, {"max_tokens": 99999}, 10 + 200),
        (CHAT, {"max_tokens": "many", "n": True}, 10 + 50),
        ("/v1/responses", {"max_output_tokens": 5}, 15),
        ("/completion", {"n_predict": -1}, 10 + 50),
        ("/completion", {"n_predict": 0}, 10),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "n": 2}, 10 + 8),
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2}, 12),
        ("/v1/completions", {"prompt": [[1], [2]], "max_tokens": 2}, 14),
        ("/v1/embeddings", {"max_tokens": 5}, 10),
        ("/v1/rerank", {}, 10),
        ("/tokenize", {}, 0),
        ("/v1/messages/count_tokens", {"max_tokens": 5}, 0),
    ],
)
def test_a_request_asks_for_its_prompt_and_the_longest_answer(path: str, body: dict[str, object], tokens: int) -> None:
    assert demand(body, path, 10, default_max=50, n_ctx=200) == tokens


def test_what_is_known_of_an_answer_is_what_it_costs() -> None:
    hold = Hold("k", 1, 1, 100)
    assert spent(Usage(11, 3, 5), Got(5, True, True), 10, hold) == 16
    assert spent(None, Got(7, True, True), 10, hold) == 17
    assert spent(None, Got(0, True, False), 10, hold) == 100
    assert spent(None, Got(0, False, True), 10, hold) == 0
