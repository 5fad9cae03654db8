"""What became of an attempt, as evidence of its node's health: one table from how it ended to a signal.

Knows nothing of what the plan does next: the same outcome can be a reason to try elsewhere and no fault of the node's.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmgate.core.fleet import Attempted
from llmgate.core.health import Signal
from llmgate.core.plan import Kind, Outcome

SAYS: Mapping[Kind, Signal] = {
    Kind.ANSWERED: Signal.PASSED,
    Kind.BROKE: Signal.FAILED,
    Kind.STALLED: Signal.FAILED,
    Kind.UNREACHABLE: Signal.GONE,
    Kind.HANDOVER: Signal.ENDED,
    Kind.REFUSED: Signal.ENDED,
    Kind.FAILED: Signal.ENDED,
    Kind.LATE: Signal.ENDED,
}
_NO_FAULT = (503, 504)
"""Full or leaving; and the request's own time was up. Other statuses from 500 are the node's fault."""


def attempted(name: str, turn: int, outcome: Outcome, now: float) -> Attempted:
    """The event that tells the fleet. `turn`: the fleet's `turns` when the attempt was dispatched."""
    signal = SAYS[outcome.kind]
    if signal is Signal.ENDED and outcome.status >= 500 and outcome.status not in _NO_FAULT:
        signal = Signal.FAILED
    why = str(outcome) + (f": {outcome.detail}" if outcome.detail else "")
    return Attempted(name, turn, signal, outcome.detail or why if signal is Signal.GONE else why, now)
