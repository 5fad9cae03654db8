"""What may be asked of the usage ledger, and what is kept of a request."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from llmgate.core.plan import Kind, Outcome
from llmgate.core.record import Record
from llmgate.core.usage import BadQuestion, Question, Selection, as_csv, day, row, shown, table

NOW = 1_767_225_600.0 + 3600
"""2026-01-01T01:00:00Z."""


@pytest.mark.parametrize(
    ("said", "field", "words"),
    [
        ({"by": "key,colour"}, "by", "by must name some of key, model, node, day, got 'colour'"),
        ({"by": "key,key"}, "by", "each at most once"),
        ({"by": ","}, "by", "each at most once"),
        ({"since": "yesterday"}, "since", "since must be a day"),
        ({"until": "2026-13-01"}, "until", "until must be a day"),
        ({"since": "1d", "until": "2d"}, "since", "since must be before until"),
        ({"since": "9999-12-31T23:59:59Z"}, "since", "since must be before until"),
    ],
)
def test_a_bad_question_names_its_field(said: dict[str, str], field: str, words: str) -> None:
    with pytest.raises(BadQuestion, match=words) as refused:
        Question.parse(said, NOW)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"after": "x"}, "after"),
        ({"after": "9" * 40}, "after"),
        ({"after": "1", "before": "2"}, "before"),
        ({"status": "2"}, "status"),
        ({"status": "600"}, "status"),
        ({"status": "\u0662xx"}, "status"),
    ],
)
def test_a_bad_choice_names_its_field(said: dict[str, str], field: str) -> None:
    with pytest.raises(BadQuestion, match=field) as refused:
        Selection.parse(said)
    assert refused.value.field == field


def test_times_are_utc_unless_they_say_otherwise() -> None:
    midnight = 1_767_225_600.0
    for said in ("2026-01-01", "2026-01-01T00:00:00", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00", "60m", "1h"):
        assert Question.parse({"since": said}, NOW).since == midnight, said
    assert Question.parse({}, NOW) == Question(("key", "model"), midnight - 30 * 86_400, NOW)


def test_a_status_is_a_number_or_a_class() -> None:
    assert Selection.parse({"status": "404"}).status == (404, 404)
    assert Selection.parse({"status": "5xx"}).status == (500, 599)


def test_days_are_counted_from_the_epoch() -> None:
    assert [day(number) for number in (0, 19_000, 20_454)] == ["1970-01-01", "2022-01-08", "2026-01-01"]


def test_attempts_have_their_place_in_time_and_those_that_went_on_count() -> None:
    record = Record("r", "/v1/chat/completions", arrived=10.0, key="k")
    record.attempt("a", Outcome(Kind.BROKE), began=10.25, now=11.0, resume=False, ids=3)
    record.attempt("b", Outcome(Kind.UNREACHABLE), began=11.0, now=11.0, resume=True, ids=3)
    record.attempt("c", Outcome(Kind.REFUSED, 404), began=11.0, now=11.5, resume=True, ids=3)
    record.attempt("d", Outcome(Kind.STALLED), began=11.5, now=12.0, resume=True, ids=5)
    record.attempt("e", Outcome(Kind.ANSWERED), began=12.0, now=13.00004, resume=True, ids=9)
    line = record.line(14.0, 100.0)
    assert [(tried["at"], tried["seconds"]) for tried in line["attempts"]] == [
        (0.25, 0.75), (1.0, 0.0), (1.0, 0.5), (1.5, 0.5), (2.0, 1.0),
    ]  # fmt: skip
    assert line["resumed"] == 2
    kept = shown(row(line, 100.123456, "gate"))
    assert (kept["attempts"], kept["at"], kept["stream"]) == (line["attempts"], 100.123, False)


def test_a_report_reads_back_from_csv_and_makes_no_formulas() -> None:
    counts = dict.fromkeys(("requests", "failed", "resumed", "prompt_tokens", "cached_tokens", "completion_tokens"), 1)
    rows: list[dict[str, Any]] = [
        {"key": "a", "model": '=cmd("x"),\n', **counts, "time_to_first_token_seconds": 0.5},
        {"key": "b", "model": None, **counts, "time_to_first_token_seconds": None},
    ]
    read = list(csv.DictReader(io.StringIO(as_csv(("key", "model"), rows), newline="")))
    assert [one["model"] for one in read] == ['\'=cmd("x"),\n', ""]
    assert [one["time_to_first_token_seconds"] for one in read] == ["0.5", ""]
    assert table(("key",), rows)[1:] == [["a", *["1"] * 6, "0.500"], ["b", *["1"] * 6, "-"]]
