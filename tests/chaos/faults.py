"""Which fault comes next, drawn from a seed.

Owns: the kinds of faults, how long each lasts, and the order. Refuses to know: processes. The same seed gives the same
faults in the same order; at which moment each begins also depends on how fast the last ones were over.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """kill: SIGKILL, started again later.      stop: SIGSTOP, SIGCONT later: either before or long after others have
    taken over.   drain: SIGTERM, started again when it has ended.      lease: a drain lease at all gates, given back.
    cut: its network goes, and comes back.  reload: a gate swaps its workers (SIGHUP).
    restart: a gate ends (SIGTERM) and another takes its socket."""

    KILL = "kill"
    STOP = "stop"
    DRAIN = "drain"
    LEASE = "lease"
    CUT = "cut"
    RELOAD = "reload"
    RESTART = "restart"

    @property
    def of_gates(self) -> bool:
        return self in (Kind.RELOAD, Kind.RESTART)


LOCAL = (Kind.KILL, Kind.STOP, Kind.DRAIN, Kind.LEASE, Kind.RELOAD, Kind.RESTART)
NETWORKED = (*LOCAL, Kind.CUT)


@dataclass(frozen=True)
class Fault:
    """lasts_s: until what was taken away is given back.        pause_s: before the fault after this one begins."""

    kind: Kind
    target: str
    lasts_s: float
    pause_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind.value} {self.target} for {self.lasts_s:.1f} s"


def drawn(
    seed: int, nodes: Sequence[str], gates: Sequence[str], kinds: Sequence[Kind], stall_s: float
) -> Iterator[Fault]:
    """Faults without end: every kind once in each round, in an order of its own.

    stall_s: silence after which a gate gives a node up. Stops and cuts last shorter or longer, as the dice say.
    """
    dice = random.Random(seed)
    while True:
        for kind in dice.sample(list(kinds), k=len(kinds)):
            lasts = dice.choice([0.4, 1.6]) * stall_s if kind in (Kind.STOP, Kind.CUT) else dice.uniform(0.2, 2.0)
            yield Fault(kind, dice.choice(gates if kind.of_gates else nodes), lasts, dice.uniform(0.5, 2.5))
