"""From runs to a table: medians, ratios pair by pair, and whether a bar was met.

Owns: the arithmetic and the words of the table in docs/benchmarks.md. Refuses to know: servers, sockets, processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.bench.rows import PEAK, ROWS, Bar, Row
from tests.bench.scenarios import COMPLETED, FIRST_TOKEN, GAP_MAX, GAP_P99, Figures

OTHERS_LIMIT = 0.2
"""Cores that other programs, or other machines on the same host, may use during a run. Threads that compute wait for
each other many times a token: with one of two cores shared, a step was seen to take 20 times as long, on any side."""

_SECONDS = {FIRST_TOKEN, GAP_P99, GAP_MAX}


@dataclass(frozen=True)
class Run:
    """One side's turn. others: cores used by programs that are not measured; idle: by the side that was not asked."""

    figures: Figures
    others: float
    idle: float = 0.0

    @property
    def disturbed(self) -> bool:
        return self.others > OTHERS_LIMIT


@dataclass
class Result:
    """All pairs of one row at one size: (ours, the rival's). commands: how each side was started."""

    row: Row
    size: str
    pairs: list[tuple[Run, Run]] = field(default_factory=list)
    commands: Sequence[Sequence[str]] = ()

    def json(self) -> dict[str, Any]:
        return {
            "row": self.row.name,
            "size": self.size,
            "rival": self.row.rival,
            "lines": [asdict(line) for line in self.lines()],
            "pairs": [[asdict(run) for run in pair] for pair in self.pairs],
            "commands": self.commands,
        }

    @classmethod
    def parse(cls, body: dict[str, Any]) -> Result:
        """Read what `json` wrote; lines are made anew from the pairs. Raises KeyError for a row there is no more."""
        rows = {row.name: row for row in ROWS}
        pairs = [(Run(**ours), Run(**theirs)) for ours, theirs in body["pairs"]]
        return cls(rows[body["row"]], body["size"], pairs, body["commands"])

    def lines(self) -> Iterator[Line]:
        """One for each figure of the row."""
        for figure in self.row.figures:
            ours = [run.figures[figure] for run, _ in self.pairs]
            theirs = [run.figures[figure] for _, run in self.pairs]
            ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b]
            bar = self.row.bars.get(self.size, {}).get(figure)
            yield Line(
                self.row.title,
                self.size,
                figure,
                statistics.median(ours),
                statistics.median(theirs),
                statistics.median(ratios) if ratios else None,
                min(ratios, default=None),
                max(ratios, default=None),
                _words(bar) if bar else "",
                _met(bar, ours, theirs) if bar else None,
            )


@dataclass(frozen=True)
class Line:
    """One line of the table. Ratios are None where the rival's figure is 0; `met` where there is no bar."""

    title: str
    size: str
    figure: str
    ours: float
    theirs: float
    ratio: float | None
    lowest: float | None
    highest: float | None
    bar: str
    met: bool | None


def table(results: Iterable[Result]) -> str:
    """The results in Markdown, as docs/benchmarks.md shows them, in the order of the table of rows."""
    out = [
        "| scenario | model | figure | llmnode | rival | ratio, median (min to max) | bar | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in in_order(results):
        title = result.row.title
        for line in result.lines():
            ratio = f"{line.ratio:.2f} ({line.lowest:.2f} to {line.highest:.2f})" if line.ratio is not None else ""
            met = {True: "met", False: "**missed**", None: ""}[line.met]
            ours, theirs = show(line.figure, line.ours), show(line.figure, line.theirs)
            out.append(f"| {title} | {line.size} | {line.figure} | {ours} | {theirs} | {ratio} | {line.bar} | {met} |")
            title = ""
    return "\n".join(out)


def in_order(results: Iterable[Result]) -> list[Result]:
    names = [row.name for row in ROWS]
    return sorted(results, key=lambda result: (names.index(result.row.name), result.size))


def show(figure: str, value: float) -> str:
    """A figure with its unit: seconds as ms or s, counts whole."""
    if figure in _SECONDS:
        return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
    if figure == COMPLETED:
        return f"{value:g} of 32"
    return f"{value:.0f}" if value >= 100 or figure == PEAK else f"{value:.1f}"


def _words(bar: Bar) -> str:
    if bar.count:
        return f"{bar.at_least:g}"
    limit = f"at least {bar.at_least:g}x" if bar.at_least is not None else f"at most {bar.at_most:g}x"
    return f"{limit} + {bar.plus:g}" if bar.plus else limit


def _met(bar: Bar, ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether the median of the ratios, pair by pair, is on the good side; a count must be there in every pair."""
    if bar.count:
        return bar.at_least is not None and min(ours) >= bar.at_least
    shares = [(a - bar.plus) / b for a, b in zip(ours, theirs, strict=True) if b]
    if not shares:
        return False
    middle = statistics.median(shares)
    return middle >= bar.at_least if bar.at_least is not None else bar.at_most is not None and middle <= bar.at_most
