"""One request's attempts, as a generator: `seen = yield step`, until it returns what to answer.

The caller takes each step and sends back what it saw; this file alone decides what follows. A step is to try a node or
to wait. In order:

1. The answer is whole: the end.
2. Who is asked: a node that this request has not failed at since it last got on, else the one it has failed at least,
   and among equals the one that the policy ranks first.
     nothing of the answer is here     any node that the policy offers: begin
     ids are committed                 a node that may go on with them: resume. While the client has seen nothing and
                                       none is there, any node: begin again
     the client has seen content       a node that may go on with it, and no other: nothing is sent twice
3. The node could not be used (UNREACHABLE), died (BROKE), went silent (STALLED) or asked for another (HANDOVER): the
   next node, at once the first time, then after waits that double up to `_LONGEST_PAUSE_S`, with jitter.
4. The node refused (REFUSED), or failed in its stream (FAILED), with the status
     503              it is full: the next node. Or it leaves, or is not ready yet (`Outcome.away`), which is as good as
                      not being there: the next node, or this one once it has started anew.
     other 5xx        the next node; but 504 means that the request's time is up, wherever it runs.
     401              our fleet token is not valid there, no fault of the client's key: the next node.
     404, 409         404 model_not_found: it has just changed its model. On a resume: it cannot go on with this
                      answer. The next node.
     400 context_length_exceeded   the next node whose context is larger.
     any other 4xx    the client's own doing, the same everywhere: handed on. On a resume: nobody can go on.
   To begin, a node that has refused is not asked again. To go on, one that was full is.
5. No node is there. If some refused to begin: what they said. Else wait, and look again, until the deadline.
6. `tries` nodes have failed at the same place of the answer, without one more id: the request may be what ends them,
   and it must not end the whole fleet. Nodes that it never reached, that were away or that handed it over do not count;
   nor, once the answer has begun, those that were full or could not go on.
7. The deadline has passed, while waiting or in an attempt (LATE).

A client that has seen content is told the truth in an error event, any other one by a status.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import Enum

from llmgate.core.policy import NO_NODE_RETRY_S
from llmgate.core.seats import Seat
from llmnode.wire.errors import ApiError, DeadlineExceeded, Overloaded
from llmnode.wire.node import State

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_LOOK_S = 0.25
"""How often the fleet is looked at again while no node is there."""
_AWAY = frozenset(state.value for state in State if state is not State.READY) | {"node_stopping"}
"""Codes of a node's 503 that say that it is leaving or not ready yet; any other one that it is full."""
_NAMED = 8
"""Outcomes that an error names, the last ones."""


class Kind(str, Enum):
    """How an attempt ended. BROKE: the connection, or the rules. FAILED: the node said so in its stream. LATE: it had
    no more time."""

    ANSWERED = "answered"
    UNREACHABLE = "unreachable"
    BROKE = "broke"
    STALLED = "stalled"
    HANDOVER = "handover"
    REFUSED = "refused"
    FAILED = "failed"
    LATE = "late"


class Lost(str, Enum):
    """Why an answer that the client has seen some of could not be ended."""

    NO_NODE = "no_node"
    SAME_PLACE = "same_place"
    NOT_RESUMABLE = "not_resumable"
    NODE_ERROR = "node_error"
    DEADLINE = "deadline"


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt. For REFUSED and FAILED: the status, the error's `code`; `Retry-After` in seconds."""

    kind: Kind
    status: int = 0
    code: str = ""
    retry_after: float | None = None
    detail: str = ""

    @property
    def away(self) -> bool:
        """Whether the node said that it takes no work, in the state that it is in."""
        return self.status == 503 and self.code in _AWAY

    def __str__(self) -> str:
        return f"{self.kind.value} {self.status}" if self.status else self.kind.value


@dataclass(frozen=True)
class Got:
    """What is there of the answer, over all attempts.

    ids: committed ones.    content: the client has seen some.    resumable: the ids stand for all that it has seen.
    """

    ids: int = 0
    content: bool = False
    resumable: bool = True


@dataclass(frozen=True)
class Look:
    """A look at the fleet at `now`, clock seconds: the nodes that may begin, and those that may go on, best first."""

    now: float
    begin: tuple[Seat, ...]
    go_on: tuple[Seat, ...] = ()


@dataclass(frozen=True)
class Try:
    """Send the request to this node; `resume`: with the ids that are committed."""

    node: str
    resume: bool


@dataclass(frozen=True)
class Wait:
    """Let so many seconds pass, then look again."""

    seconds: float


Step = Try | Wait


@dataclass(frozen=True)
class Seen:
    """What a step brought. `outcome`, `got`: of an attempt, None after a wait."""

    look: Look
    outcome: Outcome | None = None
    got: Got = Got()


@dataclass(frozen=True)
class Verdict:
    """What the client gets: `error`, else what the last attempt sent (`hand_on` False) or refused with (True).

    spent: the gate has used its own retries, so the client should not add more.
    lost: set when the client has seen content and will not see the end of it.
    """

    error: ApiError | None = None
    hand_on: bool = False
    spent: bool = False
    lost: Lost | None = None


def attempts(look: Look, *, tries: int, deadline: float, dice: Callable[[], float]) -> Generator[Step, Seen, Verdict]:
    """Yield the next step; return the verdict. `look` has one node to begin with at least, `tries` is 1 or more.

    deadline: clock seconds, after which no step is begun.    dice: numbers from 0 to 1.
    """
    tale, pause = _Tale(tries), 0.0
    while look.now < deadline:
        seat, resume = tale.choose(look)
        if seat is None and tale.refused:
            return tale.spent()
        if seat is None or pause:
            # Half of it by the dice, so that what failed together does not come back together.
            seconds = (pause or _LOOK_S) * (0.5 + 0.5 * dice())
            look, pause = (yield Wait(min(seconds, deadline - look.now))).look, 0.0
            continue
        seen = yield Try(seat.name, resume)
        assert seen.outcome is not None, "an attempt has an outcome"
        verdict = tale.take(seat, resume, seen.outcome, seen.got)
        if verdict:
            return verdict
        look, pause = seen.look, tale.pause_s()
    return tale.too_late()


class _Tale:
    """What has happened to one request: what it has got, and whom it has failed at since it last got on."""

    def __init__(self, tries: int) -> None:
        self._tries = tries
        self._got = Got()
        self._furthest = 0
        self._outcomes: list[tuple[str, Outcome]] = []
        self._failed_at: Counter[Seat] = Counter()
        self._barred: set[Seat] = set()
        self._n_ctx_above = -1
        self._stuck = 0
        self._may_resume = True

    @property
    def begun(self) -> bool:
        return self._got.content or self._furthest > 0

    @property
    def refused(self) -> bool:
        """Some node has said why it does not begin, and none has begun."""
        return not self.begun and any(outcome.status and not outcome.away for _, outcome in self._outcomes)

    def choose(self, look: Look) -> tuple[Seat | None, bool]:
        """Whom to ask, and whether to go on rather than to begin."""
        if self._got.content:
            return self._best(look.go_on), True
        heir = self._best(look.go_on) if self._got.ids and self._may_resume else None
        return (heir, True) if heir else (self._best(look.begin), False)

    def take(self, seat: Seat, resume: bool, outcome: Outcome, got: Got) -> Verdict | None:
        """Take an attempt's outcome in. None: go on."""
        self._got = got
        if outcome.kind is Kind.ANSWERED:
            return Verdict()
        if outcome.kind is Kind.LATE:
            return Verdict(error=DeadlineExceeded(outcome.detail), lost=Lost.DEADLINE if got.content else None)
        self._outcomes = [*self._outcomes[1 - _NAMED :], (seat.name, outcome)]
        if got.ids > self._furthest:
            self._furthest, self._stuck = got.ids, 0
            self._failed_at.clear()
        self._failed_at[seat] += 1
        if got.content and not got.resumable:
            return self._not_resumable(outcome)
        verdict = self._refused(seat, resume, outcome) if outcome.status else None
        if verdict:
            return verdict
        if outcome.kind is Kind.HANDOVER or outcome.away:
            self._barred.add(seat)
        self._stuck += self._counts(outcome)
        if self._stuck < self._tries:
            return None
        if got.content:
            return self._broken(Lost.SAME_PLACE, f"{self._stuck} nodes failed at the same place of it")
        return self.spent()

    def pause_s(self) -> float:
        """How long to wait before the next attempt: not at all after the first failure at this place."""
        failures = self._failed_at.total()
        return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures - 2, 16)) if failures > 1 else 0.0

    def spent(self) -> Verdict:
        """Nobody is left to begin, or enough have tried."""
        outcomes = [outcome for _, outcome in self._outcomes]
        last = outcomes[-1]
        if last.status == 400:
            return Verdict(hand_on=True)
        if all(o.status == 503 for o in outcomes):
            waits = [o.retry_after for o in outcomes if o.retry_after is not None]
            message = f"every node that serves this model is full ({self._tried()})"
            return Verdict(error=Overloaded(message, retry_after=min(waits, default=NO_NODE_RETRY_S)), spent=True)
        if last.status not in (0, 401, 404, 503):
            return Verdict(hand_on=True, spent=True)
        return self._nobody("no node could answer")

    def too_late(self) -> Verdict:
        """The deadline has passed while nobody was asked."""
        if self._got.content:
            return self._broken(Lost.NO_NODE, "no node came that could go on with it before its deadline")
        return self._nobody("no node came back before this request's deadline")

    def _best(self, seats: Sequence[Seat]) -> Seat | None:
        able = [seat for seat in seats if seat not in self._barred and seat.n_ctx > self._n_ctx_above]
        return min(able, key=self._failed_at.__getitem__, default=None)

    def _refused(self, seat: Seat, resume: bool, outcome: Outcome) -> Verdict | None:
        """What an error with a status means: a verdict, or None where another node may be asked."""
        status = outcome.status
        if outcome.code == "context_length_exceeded":
            self._n_ctx_above = seat.n_ctx
        elif status == 401 or outcome.code == "model_not_found" or (resume and status in (404, 409)):
            self._barred.add(seat)
        elif status >= 500 and status != 504:
            if not self.begun:
                self._barred.add(seat)
        elif resume and outcome.kind is Kind.REFUSED and status != 504:
            self._may_resume = False
            if self._got.content:
                return self._broken(Lost.NOT_RESUMABLE, f"{seat.name} says that it cannot be gone on with")
        else:
            lost = Lost.DEADLINE if status == 504 else Lost.NODE_ERROR
            return Verdict(hand_on=True, lost=lost if self._got.content else None)
        return None

    def _counts(self, outcome: Outcome) -> bool:
        """Whether this failure may be the request's doing."""
        if outcome.away:
            return False
        if outcome.kind in (Kind.BROKE, Kind.STALLED):
            return True
        return bool(outcome.status) and (not self.begun or (outcome.status >= 500 and outcome.status != 503))

    def _not_resumable(self, outcome: Outcome) -> Verdict:
        if outcome.kind is Kind.FAILED:
            return Verdict(hand_on=True, lost=Lost.NODE_ERROR)
        return self._broken(Lost.NOT_RESUMABLE, "its node speaks no resume, so no other can go on with it")

    def _broken(self, lost: Lost, why: str) -> Verdict:
        error = ApiError(f"the answer broke off: {why} ({self._tried()})", code="stream_broken")
        return Verdict(error=error, spent=True, lost=lost)

    def _nobody(self, why: str) -> Verdict:
        error = Overloaded(f"{why} ({self._tried()})", retry_after=NO_NODE_RETRY_S, code="no_node_answered")
        return Verdict(error=error, spent=True)

    def _tried(self) -> str:
        said = (
            f"{node} {outcome}" + (f", {outcome.detail}" * bool(outcome.detail)) for node, outcome in self._outcomes
        )
        return "tried: " + "; ".join(said)
