"""The table of rows of `make bench-node`: scenario, room, rival, settings and bar of each.

Owns: what is measured, at which size, and what figure would do. Refuses to know: how it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.bench.figures import COMPLETED, FIRST_TOKEN, GAP_MAX, GAP_P99, PEAK, TOKENS_PER_S, Bar
from tests.bench.report import Board
from tests.bench.scenarios import Arrivals, Crowd, Scenario, SecondTime, SharedPrefix, Throughput
from tests.bench.servers import LLAMA_SERVER, OURS, PYTHON_SERVER, Room

WITHOUT_LOOKUP = "llmnode without prompt lookup"
GIB = 1 << 30

PLAIN = {"prompt-lookup": "off"}
"""Random weights soon repeat themselves, and a draft from the text so far is then nearly always right: with prompt
lookup on, a throughput would tell of that and not of the server. Beside a rival, which drafts nothing, it is off.
"""

SMALL_CACHE = 256
"""MiB of host RAM for prompts that left the cache, on both sides, where memory itself is measured."""


@dataclass(frozen=True)
class Row:
    """scenarios: by model size.    bars: by model size, then by figure; figures without one are shown beside them.

    figures: what is shown, the most telling first.
    ours, theirs: flags beyond the room's.      standard: sizes that run unless others are asked for.
    in_process: both sides are our own engine in this process, without a server (lookup.py).
    """

    name: str
    title: str
    scenarios: Mapping[str, Scenario]
    figures: tuple[str, ...]
    room: Room
    bars: Mapping[str, Mapping[str, Bar]] = field(default_factory=dict)
    rival: str = LLAMA_SERVER
    ours: Mapping[str, str] = field(default_factory=lambda: PLAIN)
    theirs: Mapping[str, str] = field(default_factory=dict)
    standard: tuple[str, ...] = ("15m", "500m")
    in_process: bool = False

    def bar(self, size: str, figure: str) -> Bar | None:
        return self.bars.get(size, {}).get(figure)


def _throughput(
    name: str, title: str, concurrency: int, room: Room, bars: tuple[float, float] | None, **more: object
) -> Row:
    """A row of unshared prompts; the larger model gets fewer and shorter ones, so that a run takes seconds."""
    small, large = bars or (0.0, 0.0)
    return Row(
        name,
        title,
        {
            "15m": Throughput(concurrency, requests=max(8, 2 * concurrency)),
            "500m": Throughput(concurrency, requests=max(2, concurrency), prompt_tokens=32, answer_tokens=64),
        },
        (TOKENS_PER_S, FIRST_TOKEN),
        room,
        {"15m": {TOKENS_PER_S: Bar(at_least=small)}, "500m": {TOKENS_PER_S: Bar(at_least=large)}} if bars else {},
        **more,  # type: ignore[arg-type]
    )


ROWS = (
    _throughput("throughput-1", "unshared prompts, concurrency 1", 1, Room(8, 1024), (1.0, 0.98)),
    _throughput("default-1", "the same, with our defaults (prompt lookup on)", 1, Room(8, 1024), None, ours={}),
    _throughput("throughput-8", "unshared prompts, concurrency 8", 8, Room(8, 1024), (1.0, 0.98)),
    _throughput("throughput-32", "unshared prompts, concurrency 32", 32, Room(32, 512), (1.1, 0.98)),
    Row(
        "again",
        "32 prompts of 400 tokens a second time, 8 slots",
        {"15m": SecondTime(8, 32, 400, 32), "500m": SecondTime(8, 32, 128, 16)},
        (TOKENS_PER_S, FIRST_TOKEN),
        Room(8, 512),
        {size: {TOKENS_PER_S: Bar(at_least=1.0)} for size in ("15m", "500m")},
        ours={**PLAIN, "prompt-cache-bytes": str(8 * GIB)},  # as much as the rival's default
        standard=("15m",),
    ),
    Row(
        "shared",
        "prompt that shares 1k tokens with a running stream",
        {"15m": SharedPrefix(rounds=4), "500m": SharedPrefix(rounds=1)},
        (FIRST_TOKEN,),
        Room(4, 2112),
        {size: {FIRST_TOKEN: Bar(at_most=0.5)} for size in ("15m", "500m")},
    ),
    Row(
        "stall",
        "8 streams run, two 4k-token prompts arrive",
        {"15m": Arrivals(8, stream_tokens=400), "500m": Arrivals(8, stream_tokens=160)},
        (GAP_P99, GAP_MAX, TOKENS_PER_S),
        Room(10, 4608),
        {
            "15m": {GAP_P99: Bar(at_most=0.25), TOKENS_PER_S: Bar(at_least=0.95)},
            "500m": {GAP_P99: Bar(at_most=0.1), TOKENS_PER_S: Bar(at_least=0.95)},
        },
    ),
    Row(
        "crowd",
        "32 streams of 100 + 600 tokens in 8192 cells",
        {size: Crowd() for size in ("tiny", "15m", "500m")},
        (COMPLETED, TOKENS_PER_S),
        Room(32, 1024, cells=8192, unified=True),
        {size: {COMPLETED: Bar(at_least=32, count=True)} for size in ("tiny", "15m", "500m")},
        standard=("15m",),
    ),
    Row(
        "memory",
        "8 slots of 1,024 tokens",
        {"15m": Throughput(8, requests=64, answer_tokens=32), "500m": Throughput(8, requests=24, answer_tokens=8)},
        (PEAK,),
        Room(8, 1024),
        {size: {PEAK: Bar(at_most=1.15, plus=150)} for size in ("15m", "500m")},
        ours={**PLAIN, "prompt-cache-bytes": str(SMALL_CACHE << 20)},
        theirs={"cache-ram": str(SMALL_CACHE)},
    ),
    Row(
        "python-server",
        "unshared prompts, concurrency 8, beside llama_cpp.server",
        {"15m": Throughput(8, requests=16, answer_tokens=64), "500m": Throughput(8, requests=8, answer_tokens=32)},
        (TOKENS_PER_S, FIRST_TOKEN),
        Room(8, 1024),
        {size: {TOKENS_PER_S: Bar(at_least=1.5), FIRST_TOKEN: Bar(at_most=0.15)} for size in ("15m", "500m")},
        rival=PYTHON_SERVER,
        standard=("15m",),
    ),
    Row(
        "lookup",
        "edits of JSON and code, beside our own without prompt lookup",
        {},
        (TOKENS_PER_S,),
        Room(1, 4096),
        {"500m": {TOKENS_PER_S: Bar(at_least=1.5)}},
        rival=WITHOUT_LOOKUP,
        standard=("500m",),
        in_process=True,
    ),
)

BOARD = Board("bench-node", ROWS, OURS, sized=True)
