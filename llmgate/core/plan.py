"""One request's attempts, as a generator: `outcome = yield node`, until it returns what to answer.

The caller makes each attempt and sends back its `Outcome`; this file alone decides what follows. In order:

1. Content reached the client: the end, whether it is whole (ANSWERED) or broke off (CUT). Nothing is sent twice.
2. The node could not be used (UNREACHABLE, BROKE before any content, STALLED): the next node.
3. The node refused:
   503                       it is full or leaving: the next node.
   other 5xx but 504         the next node. 504 means that the request's time is up, wherever it runs.
   401                       our fleet token is not valid there, which is no fault of the client's key: the next node.
   404 model_not_found       it has just changed its model: the next node.
   400 context_length_exceeded   the next node whose context is larger, if there is one.
   any other 4xx             the client's own doing, the same everywhere: handed on.
4. Tries or nodes are used up: the last refusal is handed on when it tells the client something true; when all were
   full, 503 with the smallest Retry-After among them; when none could be reached, 503.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum

from llmgate.core.candidate import Candidate
from llmgate.core.policy import NO_NODE_RETRY_S
from llmnode.wire.errors import Overloaded


class Kind(str, Enum):
    """How an attempt ended."""

    ANSWERED = "answered"
    CUT = "cut"
    UNREACHABLE = "unreachable"
    BROKE = "broke"
    STALLED = "stalled"
    REFUSED = "refused"


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt. For REFUSED: the status, the error's `code` and `Retry-After` in seconds."""

    kind: Kind
    status: int = 0
    code: str = ""
    retry_after: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value} {self.status}" if self.kind is Kind.REFUSED else self.kind.value


@dataclass(frozen=True)
class Verdict:
    """What the client gets: `error`, else what the last attempt sent (`hand_on` False) or refused with (True).

    spent: the gate has used its own retries, so the client should not add more.
    """

    error: Overloaded | None = None
    hand_on: bool = False
    spent: bool = False


def attempts(ranked: Sequence[Candidate], tries: int) -> Generator[Candidate, Outcome, Verdict]:
    """Yield the node to try next; return the verdict. `ranked` has one candidate at least, `tries` is 1 or more."""
    queue = list(ranked)
    outcomes: list[Outcome] = []
    while queue and len(outcomes) < tries:
        node = queue.pop(0)
        outcome = yield node
        outcomes.append(outcome)
        if outcome.kind in (Kind.ANSWERED, Kind.CUT):
            return Verdict()
        if outcome.kind is Kind.REFUSED:
            if outcome.code == "context_length_exceeded":
                queue = [other for other in queue if other.n_ctx > node.n_ctx]
            elif not _worth_another(outcome):
                return Verdict(hand_on=True)
    return _spent(outcomes)


def _worth_another(refused: Outcome) -> bool:
    if refused.status == 404:
        return refused.code == "model_not_found"
    return refused.status == 401 or (refused.status >= 500 and refused.status != 504)


def _spent(outcomes: Sequence[Outcome]) -> Verdict:
    last = outcomes[-1]
    if last.kind is Kind.REFUSED and last.status == 400:
        return Verdict(hand_on=True)
    if all(o.kind is Kind.REFUSED and o.status == 503 for o in outcomes):
        waits = [o.retry_after for o in outcomes if o.retry_after is not None]
        message = f"every node that serves this model is full ({len(outcomes)} tried)"
        return Verdict(error=Overloaded(message, retry_after=min(waits, default=NO_NODE_RETRY_S)), spent=True)
    if last.kind is Kind.REFUSED and last.status not in (401, 404, 503):
        return Verdict(hand_on=True, spent=True)
    how = ", ".join(map(str, outcomes))
    message = f"no node could answer ({len(outcomes)} tried: {how})"
    return Verdict(error=Overloaded(message, retry_after=NO_NODE_RETRY_S, code="no_node_answered"), spent=True)
