"""From runs to a table: medians, ratios pair by pair, and whether a bar was met.

Owns: the arithmetic and the words of the tables in docs/benchmarks.md. Refuses to know: servers, sockets, processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from tests.bench.figures import Bar, Figures, show

OTHERS_LIMIT = 0.2
"""Cores that other programs, or other machines on the same host, may use during a run. Threads that compute wait for
each other many times a token: with one of two cores shared, a step was seen to take 20 times as long, on any side."""


class Contest(Protocol):
    """What must be known of a row to tell of it. figures: what is shown, the most telling first."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def rival(self) -> str: ...

    @property
    def figures(self) -> tuple[str, ...]: ...

    def bar(self, size: str, figure: str) -> Bar | None: ...


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

    row: Contest
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

    def lines(self) -> Iterator[Line]:
        """One for each figure of the row."""
        for figure in self.row.figures:
            ours = [run.figures[figure] for run, _ in self.pairs]
            theirs = [run.figures[figure] for _, run in self.pairs]
            ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b]
            bar = self.row.bar(self.size, figure)
            yield Line(
                self.row.title,
                self.size,
                figure,
                statistics.median(ours),
                statistics.median(theirs),
                statistics.median(ratios) if ratios else None,
                min(ratios, default=None),
                max(ratios, default=None),
                bar.words(figure) if bar else "",
                bar.met(ours, theirs) if bar else None,
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


@dataclass(frozen=True)
class Board:
    """The table of one benchmark. name: its target in the Makefile.     ours: the heading of our column.

    sized: whether a column names the model.
    """

    name: str
    rows: Sequence[Contest]
    ours: str
    sized: bool = False

    def parse(self, body: dict[str, Any]) -> Result:
        """Read what `Result.json` wrote; lines are made anew. Raises KeyError for a row there is no more."""
        rows = {row.name: row for row in self.rows}
        pairs = [(Run(**ours), Run(**theirs)) for ours, theirs in body["pairs"]]
        return Result(rows[body["row"]], body["size"], pairs, body["commands"])

    def in_order(self, results: Iterable[Result]) -> list[Result]:
        names = [row.name for row in self.rows]
        return sorted(results, key=lambda result: (names.index(result.row.name), result.size))

    def table(self, results: Iterable[Result]) -> str:
        """The results in Markdown, as docs/benchmarks.md shows them, in the order of the rows."""
        sizes = ["model"] if self.sized else []
        heads = ["scenario", *sizes, "figure", self.ours, "rival", "ratio, median (min to max)", "bar", ""]
        out = ["| " + " | ".join(heads[:-1]) + " | |", "|---" * len(heads) + "|"]
        for result in self.in_order(results):
            title = result.row.title
            for line in result.lines():
                ratio = f"{line.ratio:.2f} ({line.lowest:.2f} to {line.highest:.2f})" if line.ratio is not None else ""
                met = {True: "met", False: "**missed**", None: ""}[line.met]
                ours, theirs = show(line.figure, line.ours), show(line.figure, line.theirs)
                cells = [title, *([line.size] if self.sized else []), line.figure, ours, theirs, ratio, line.bar, met]
                out.append("| " + " | ".join(cells) + " |")
                title = ""
        return "\n".join(out)
