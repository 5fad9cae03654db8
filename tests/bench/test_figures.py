"""Promises of the benchmark's own arithmetic: what counts as an answer, as a stall, as a bar that was met."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.bench import node
from tests.bench.figures import COMPLETED, FIRST_TOKEN, PEAK, TOKENS_PER_S, percentile
from tests.bench.load import Stream
from tests.bench.report import OTHERS_LIMIT, Result, Run
from tests.bench.rows import BOARD, ROWS, Row
from tests.bench.servers import OURS

ROW = {row.name: row for row in ROWS}
DONE = b"data: [DONE]\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish}]}).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    body = {"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 3}}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def stream(*reads: tuple[float, bytes], max_tokens: int = 4) -> Stream:
    return Stream("x", max_tokens, began=1.0, ended=9.0, status=200, reads=list(reads))


def test_a_stall_is_the_time_between_reads_however_many_tokens_they_bring() -> None:
    read = stream((2.0, piece("a")), (3.0, piece("b") + piece("c")), (7.0, piece("d", "length") + usage(4) + DONE))
    answer = read.answer()
    assert not answer.trouble
    assert answer.tokens == 4
    assert answer.first_token_s == 1.0
    assert answer.gaps(0.0, 10.0) == [1.0, 4.0]
    assert answer.gaps(3.5, 4.0) == [4.0], "a stall that lasts through the window counts, the one before it does not"


def test_an_event_belongs_to_the_read_that_completes_it() -> None:
    whole = piece("a")
    answer = stream((2.0, whole[:9]), (3.0, whole[9:]), (4.0, usage(1) + DONE)).answer()
    assert answer.arrivals == (3.0,)


@pytest.mark.parametrize(
    "reads",
    [
        [(2.0, piece("a"))],
        [(2.0, piece("a")), (3.0, b'data: {"error": {"message": "Context size has been exceeded."}}\n\n')],
        [(2.0, DONE)],
    ],
    ids=["cut short", "error event", "no text"],
)
def test_an_answer_that_is_not_whole_says_so(reads: list[tuple[float, bytes]]) -> None:
    assert stream(*reads).answer().trouble


def test_a_server_without_usage_is_counted_by_what_was_asked_for() -> None:
    assert stream((2.0, piece("ab")), (3.0, piece("", "length") + DONE), max_tokens=4).answer().tokens == 4
    assert stream((2.0, piece("a")), (3.0, piece("b", "stop") + DONE), max_tokens=4).answer().tokens == 2


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([5.0, 1.0, 3.0], 99) == 5.0
    assert percentile([float(n) for n in range(1, 201)], 99) == 198.0


def result(name: str, size: str, figure: str, *pairs: tuple[float, float]) -> Result:
    """A result with that figure as given and all others 1."""
    rest = dict.fromkeys(ROW[name].figures, 1.0)
    return Result(
        ROW[name],
        size,
        [(Run({**rest, figure: ours}, 0.0), Run({**rest, figure: theirs}, 0.0)) for ours, theirs in pairs],
    )


def met(found: Result, figure: str) -> bool | None:
    return next(line.met for line in found.lines() if line.figure == figure)


def test_a_ratio_is_taken_pair_by_pair_and_its_median_counts() -> None:
    found = result("throughput-1", "15m", TOKENS_PER_S, (10, 9), (100, 110), (30, 29))
    line = next(found.lines())
    assert line.ratio == 30 / 29
    assert (line.lowest, line.highest) == (100 / 110, 10 / 9)
    assert line.met
    assert not met(result("throughput-1", "15m", TOKENS_PER_S, (10, 9), (100, 110), (28, 29)), TOKENS_PER_S)


def test_a_time_must_be_below_its_bar_and_a_figure_without_a_bar_is_neither() -> None:
    assert met(result("shared", "15m", FIRST_TOKEN, (0.4, 1.0)), FIRST_TOKEN)
    assert not met(result("shared", "15m", FIRST_TOKEN, (0.6, 1.0)), FIRST_TOKEN)
    assert met(result("throughput-1", "15m", FIRST_TOKEN, (9.0, 1.0)), FIRST_TOKEN) is None


def test_one_lost_stream_in_one_pair_misses_the_bar_of_the_crowd() -> None:
    assert met(result("crowd", "15m", COMPLETED, (32, 0), (32, 0)), COMPLETED)
    assert not met(result("crowd", "15m", COMPLETED, (32, 0), (31, 0), (32, 0)), COMPLETED)


def test_the_memory_bar_is_a_share_and_a_constant() -> None:
    assert met(result("memory", "15m", PEAK, (264, 100)), PEAK)
    assert not met(result("memory", "15m", PEAK, (266, 100)), PEAK)


def test_the_table_comes_back_from_the_file_as_it_was() -> None:
    found = [result("crowd", "15m", COMPLETED, (32, 0)), result("throughput-1", "15m", TOKENS_PER_S, (10, 9))]
    again = [BOARD.parse(json.loads(json.dumps(one.json()))) for one in found]
    assert BOARD.table(again) == BOARD.table(found)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_bar_belongs_to_a_figure_that_is_shown(row: Row) -> None:
    for size, bars in row.bars.items():
        assert set(bars) <= set(row.figures)
        assert row.in_process or size in row.scenarios
    assert set(row.standard) <= set(row.bars) or not row.bars


def test_a_pair_that_other_programs_disturbed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([0.0, OTHERS_LIMIT + 0.1, *[0.0] * 8])
    turns: list[tuple[str, int]] = []

    @contextmanager
    def contest(row: Row, size: str, threads: int) -> Iterator[object]:
        def turn(side: str, seed: int) -> Run:
            turns.append((side, seed))
            return Run({**dict.fromkeys(row.figures, 1.0), "seconds": 1.0}, next(others))

        yield turn, []

    monkeypatch.setattr(node, "beside_a_server", contest)
    row = ROW["throughput-1"]
    found = node.measure(row, "15m", threads=1, pairs=2, spare=1)
    assert len(found.pairs) == 2
    assert not any(run.disturbed for pair in found.pairs for run in pair)
    assert turns == [(OURS, 1), (row.rival, 1), (OURS, 2), (row.rival, 2), (row.rival, 3), (OURS, 3)]
