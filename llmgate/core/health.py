"""Whether a node can be trusted with work: one state machine a node, fed by polls and by what became of requests.

All transitions are in this file, in the table TRANSITIONS, and nothing else moves a node from state to state. The
diagram in docs/health.md is drawn from that table. What a node serves, how busy it is, whether its last report is stale
and who has drained it is not health: `fleet.py` knows that.

Theory of operation. Polls say what a node thinks of itself, requests say what it does; neither is believed alone:

- A refused connection means that the process is gone, whoever finds out: UNREACHABLE at once. Any other poll that
  brings no report may be bad luck: only `MISSES` of them in a row, with no request answered in between, mean the same.
- Requests that a node breaks are counted. `eject_after` in a row, or half of the last 2 x `eject_after` within
  `WINDOW_S`, eject it: no work for `eject_s`, twice as long each time, `eject_s` x 2^(LEVELS-1) at most. Then one
  request at a time may pass (HALF_OPEN), until one is answered (SLOW_START) or broken (EJECTED again). A node that then
  answers for as long as it was last ejected is forgiven one doubling.
- 503, 429 and other refusals, and clients that leave, say nothing about health. A full node is not a broken one, and
  an ejection on top would move its load to nodes that are about as full.
- Ejecting must not do more harm than the fault. `fleet.py` answers a trip with SPARED when the node is the last one of
  a model in full service, or when more than half of the model's nodes would be out; and says NEEDED to an ejected node
  when a model has nobody else left.
- A node that comes (back) to a running fleet gets work by and by: its share grows from SHARE_FLOOR to 1 within
  `slow_start_s`. Nodes that a starting gate finds ready are taken as they are: they may have served for weeks.
- Another `boot` is another process: nothing that is known of the one before counts.
- Answers of requests that were sent before the node was last ejected or restarted are old news, and ignored.

Time: `now` is a monotonic clock in seconds. A state with an end (`until`) is left by the clock alone; whoever reads a
`Health` later asks `at(now)`, so that nothing needs to tick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from llmgate.core.copying import changed
from llmgate.settings import Settings

MISSES = 2
"""Polls in a row without a report, and without an answered request in between, that make a node unreachable."""
WINDOW_S = 60.0
"""Outcomes older than this do not count towards the failure rate."""
LEVELS = 6
"""Ejections in a row whose length grows: the longest is 2^5 = 32 times the first."""
SHARE_FLOOR = 0.1
"""The share that a node has when its slow start begins, and while it is half open."""


class Condition(Enum):
    """Where a node is. `meaning` is what docs/health.md says of it."""

    UNKNOWN = "unknown", "The gate has just started and not heard of it. No work."
    JOINING = "joining", "New in the list, or just restarted, and not heard of. No work."
    SLOW_START = "slow-start", "It takes work, with a share that grows to a full one within `slow_start_s`."
    UP = "up", "It takes work."
    EJECTED = "ejected", "Too many requests failed there. No work until its time is over."
    HALF_OPEN = "half-open", "It was ejected; one request may try it."
    PROBING = "probing", "That request is under way. No other passes before `eject_s` have gone by."
    UNREACHABLE = "unreachable", "No connection, or no report. No work until a poll succeeds."
    AWAY = "away", "It says itself that it takes no work: starting, loading, draining or failed."

    def __init__(self, word: str, meaning: str) -> None:
        self.word = word
        self.meaning = meaning


class Signal(Enum):
    """What moves a node. `meaning` is what docs/health.md says of it."""

    READY = "ready", "a poll brought a report, and it takes work"
    AWAY = "away", "a poll brought a report, and it takes no work"
    RENEWED = "renewed", "the report is from another process than the one before (`boot`)"
    MISSED = "missed", "a poll brought no report, though the connection was not refused"
    GONE = "gone", f"no connection could be made, or {MISSES} polls in a row were missed"
    SENT = "sent", "a request was sent there"
    PASSED = "passed", "a request was answered"
    FAILED = "failed", "a request broke, stalled, or got a 5xx that is no 503 or 504"
    TRIPPED = "tripped", "that failure was one too many"
    SPARED = "spared", "it was, but the node cannot be spared"
    ENDED = "ended", "a request ended in a way that says nothing: 503, 429 or another 4xx"
    NEEDED = "needed", "a model has no other node left"
    ELAPSED = "elapsed", "the state's own time is over"

    def __init__(self, word: str, meaning: str) -> None:
        self.word = word
        self.meaning = meaning


EVERYWHERE: Mapping[Signal, Condition] = {
    Signal.RENEWED: Condition.JOINING,
    Signal.AWAY: Condition.AWAY,
    Signal.GONE: Condition.UNREACHABLE,
}
"""What a signal does in every state."""

TRANSITIONS: Mapping[Condition, Mapping[Signal, Condition]] = {
    Condition.UNKNOWN: {Signal.READY: Condition.UP, Signal.MISSED: Condition.UNREACHABLE},
    Condition.JOINING: {Signal.READY: Condition.SLOW_START, Signal.MISSED: Condition.UNREACHABLE},
    Condition.SLOW_START: {Signal.ELAPSED: Condition.UP, Signal.TRIPPED: Condition.EJECTED},
    Condition.UP: {Signal.TRIPPED: Condition.EJECTED},
    Condition.EJECTED: {Signal.ELAPSED: Condition.HALF_OPEN, Signal.NEEDED: Condition.SLOW_START},
    Condition.HALF_OPEN: {
        Signal.SENT: Condition.PROBING,
        # Of a probe that took longer than its time.
        Signal.PASSED: Condition.SLOW_START,
        Signal.FAILED: Condition.EJECTED,
        Signal.NEEDED: Condition.SLOW_START,
    },
    Condition.PROBING: {
        Signal.PASSED: Condition.SLOW_START,
        Signal.FAILED: Condition.EJECTED,
        Signal.ENDED: Condition.HALF_OPEN,
        Signal.ELAPSED: Condition.HALF_OPEN,
        Signal.NEEDED: Condition.SLOW_START,
    },
    Condition.UNREACHABLE: {Signal.READY: Condition.SLOW_START},
    Condition.AWAY: {Signal.READY: Condition.SLOW_START},
}
"""What else it does, by state. A pair that is in neither table changes nothing."""

SERVING = frozenset({Condition.SLOW_START, Condition.UP})
"""In full service: any number of requests may be sent there."""
OUT = frozenset({Condition.EJECTED, Condition.HALF_OPEN, Condition.PROBING})
"""Kept out, wholly or but for one request, by the gate's own judgement."""


def target(state: Condition, signal: Signal) -> Condition:
    """Where the signal leads from the state: the state itself when neither table names the pair."""
    return TRANSITIONS[state].get(signal, EVERYWHERE.get(signal, state))


@dataclass(frozen=True)
class Rules:
    """The numbers that settings give; times in seconds, as described in `llmgate settings`."""

    eject_after: int
    eject_s: float
    slow_start_s: float
    stale_after_s: float

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        return cls(settings.eject_after, settings.eject_s, settings.slow_start_s, settings.stale_after_s)

    def sentence(self, level: int) -> float:
        """How long an ejection of this level lasts: levels count from 1, to LEVELS."""
        return self.eject_s * 2.0 ** (level - 1)


@dataclass(frozen=True)
class Health:
    """A node's state and what led there.

    since: when the state began; None before the first signal.    until: when it ends by itself; None: it does not.
    heard: the last sign of life, a report or an answered request.   why: what led to a state without work, or keeps it.
    missed: polls without a report since then.     failures: requests that failed since one was answered.
    recent: outcomes that count towards the rate, oldest first: (when, answered).
    level: doublings of the next ejection; 0 for a clean record.     eased: when the level was last lowered.
    ejections: of this process so far.     counts_from: requests with a lower dispatch number are old news.
    """

    state: Condition = Condition.UNKNOWN
    since: float | None = None
    until: float | None = None
    why: str = ""
    heard: float | None = None
    missed: int = 0
    failures: int = 0
    recent: tuple[tuple[float, bool], ...] = ()
    level: int = 0
    eased: float = 0.0
    ejections: int = 0
    counts_from: int = 0

    def at(self, now: float) -> Health:
        """The same at a later time: in the next state, when this one's time is over."""
        if self.until is None or now < self.until:
            return self
        state = target(self.state, Signal.ELAPSED)
        return changed(self, state=state, since=self.until, until=None)

    def after(self, signal: Signal, now: float, rules: Rules, *, turns: int = 0, why: str = "") -> Health:
        """The health after a signal. `turns`: how many requests the fleet has dispatched; `why`: for people."""
        counted, signal = self.at(now)._count(signal, now, rules)
        state = target(counted.state, signal)
        if signal is Signal.RENEWED:
            return Health(state, now, counts_from=turns + 1)
        if state is counted.state:
            unheard = state is Condition.UNREACHABLE and signal in (Signal.MISSED, Signal.GONE)
            return changed(counted, why=why) if unheard and why else counted
        return counted._enter(state, now, rules, turns, why)

    def would_trip(self, now: float, rules: Rules) -> bool:
        """Whether one more failure now would take it out of full service."""
        return self.at(now)._count(Signal.FAILED, now, rules)[1] is Signal.TRIPPED

    def share(self, now: float) -> float:
        """How much of its slots to use, from 0 to 1. It ranks nodes; it refuses no work to a node that takes some."""
        health = self.at(now)
        if health.state is Condition.UP:
            return 1.0
        if health.state is Condition.SLOW_START and health.since is not None and health.until is not None:
            passed = (now - health.since) / (health.until - health.since)
            return SHARE_FLOOR + (1.0 - SHARE_FLOOR) * max(0.0, passed)
        return SHARE_FLOOR if health.state is Condition.HALF_OPEN else 0.0

    def _count(self, signal: Signal, now: float, rules: Rules) -> tuple[Health, Signal]:
        """Take the signal into the counts, which may make it a graver one."""
        if signal in (Signal.READY, Signal.AWAY):
            return changed(self, heard=now, missed=0), signal
        if signal is Signal.MISSED:
            counted = changed(self, missed=self.missed + 1)
            return counted, Signal.GONE if counted.missed >= MISSES else signal
        if signal is Signal.PASSED:
            counted = changed(self, heard=now, missed=0, failures=0, recent=self._recent(True, now, rules))
            return counted._ease(now, rules), signal
        if signal is Signal.FAILED:
            counted = changed(self, failures=self.failures + 1, recent=self._recent(False, now, rules))
            return counted, Signal.TRIPPED if counted._trips(rules) else signal
        if signal is Signal.SPARED:
            return changed(self, failures=0, recent=()), signal
        return self, signal

    def _recent(self, answered: bool, now: float, rules: Rules) -> tuple[tuple[float, bool], ...]:
        kept = (*self.recent, (now, answered))[-2 * rules.eject_after :]
        return tuple(outcome for outcome in kept if outcome[0] > now - WINDOW_S)

    def _trips(self, rules: Rules) -> bool:
        failed = sum(not answered for _, answered in self.recent)
        often = len(self.recent) == 2 * rules.eject_after and failed >= rules.eject_after
        return self.state in SERVING and (often or self.failures >= rules.eject_after)

    def _ease(self, now: float, rules: Rules) -> Health:
        """Forgive a doubling after as long a time in full service as the last ejection took."""
        if self.state is not Condition.UP or not self.level or self.since is None:
            return self
        if now - max(self.since, self.eased) < rules.sentence(self.level):
            return self
        return changed(self, level=self.level - 1, eased=now)

    def _enter(self, state: Condition, now: float, rules: Rules, turns: int, why: str) -> Health:
        kept = self.why if self.state in OUT and state in OUT else ""
        entered = changed(self, state=state, since=now, until=None, why=why or kept)
        if state is Condition.EJECTED:
            level = min(self.level + 1, LEVELS)
            return changed(
                entered,
                until=now + rules.sentence(level),
                failures=0,
                recent=(),
                level=level,
                ejections=self.ejections + 1,
                counts_from=turns + 1,
            )
        if state is Condition.PROBING:
            return changed(entered, until=now + rules.eject_s)
        if state is Condition.SLOW_START:
            started = changed(entered, until=now + rules.slow_start_s, failures=0, recent=())
            return started.at(now)
        return entered
