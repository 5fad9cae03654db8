"""Who goes next, of the requests that wait for one model: order, fairness, and who leaves when it gets too long.

Pure: no clock, no task, no node. It is told what waits and asked who goes; `waiting.py` owns the requests themselves.

1. A class goes before the classes below it (HIGH, NORMAL, LOW), but is passed over at most `PASSES` times in a row
   while one above it goes, two more while another starves beside it. So the low ones move, whatever the others send.
2. Within a class, keys share: the next is of the key that has had least, and of equals of the one that has rested
   longest. That is fair queueing by counters (Sheng et al., "Fairness in Serving Large Language Models", 2024) over
   seconds of service instead of tokens: what a request takes from the others is a place at a node, for as long as its
   answer lasts. That time is not known beforehand, so a key is charged an estimate when its request goes, and `settle`
   puts it right when the answer has ended. A key that was away starts level with the least served of those that wait,
   whose answers under way do not count yet: so nobody saves up, nobody pays for what they used while nobody else
   wanted it, but who holds many places now gives way to who holds none.
3. Of one key and class, the first come goes first.
4. When it is too long, the newest of the longest line leaves (a line: one key's requests of one class). So a key that
   floods pushes out its own, and each key has room for one while there are no more keys than places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

PASSES = 8
"""How often in a row a class may be passed over: so each of them gets a tenth of all turns at least."""


class Priority(IntEnum):
    """Who goes first; a smaller number goes before a larger one."""

    HIGH = 0
    NORMAL = 1
    LOW = 2

    @property
    def word(self) -> str:
        return self.name.lower()

    @classmethod
    def of(cls, word: str) -> Priority:
        """Raises ValueError that names the words."""
        for priority in cls:
            if priority.word == word:
                return priority
        raise ValueError(f"must be one of {', '.join(p.word for p in cls)}, got {word!r}")


@dataclass(frozen=True, eq=False)
class Ticket:
    """One request in the queue, equal to itself alone. `cost`: seconds of service that it should take, above 0."""

    key: str
    priority: Priority
    cost: float


@dataclass
class _Line:
    """One key's requests of one class.

    had: service that the key has had, in the class's count, with `under_way`: what is charged for and not settled yet.
    went: number of the turn in which one of it went last.    waiting: oldest first, with their numbers of arrival.
    """

    had: float = 0.0
    under_way: float = 0.0
    went: int = 0
    waiting: dict[Ticket, int] = field(default_factory=dict)

    @property
    def level(self) -> float:
        return self.had - self.under_way

    @property
    def place(self) -> tuple[float, int, int]:
        """Where it stands in the class's order."""
        return (self.had, self.went, next(iter(self.waiting.values())))

    @property
    def newest(self) -> Ticket:
        return next(reversed(self.waiting))


@dataclass
class _Class:
    """lines: of every key ever seen, so as many as there are keys.

    level: of the last one that went, where who joins an empty class starts.
    passed: turns in a row that went to classes above while somebody waited here.
    """

    lines: dict[str, _Line] = field(default_factory=dict)
    level: float = 0.0
    passed: int = 0

    def backlog(self) -> list[_Line]:
        return [line for line in self.lines.values() if line.waiting]


class Queue:
    """The requests that wait for one model. A few microseconds a call at hundreds waiting."""

    def __init__(self) -> None:
        self._classes = {priority: _Class() for priority in Priority}
        self._arrivals = 0
        self._turns = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Ticket]:
        """Those waiting, in no order that matters."""
        return (t for c in self._classes.values() for line in c.lines.values() for t in line.waiting)

    def push(self, ticket: Ticket) -> None:
        """Add one that is not in here."""
        _, line = self._joined(ticket)
        line.waiting[ticket] = self._arrivals
        self._length += 1

    def pass_by(self, ticket: Ticket) -> None:
        """As `push` and `take` of one that goes at once, while nobody waits."""
        assert not self._length, "somebody waits"
        self._charge(*self._joined(ticket), ticket)
        for other in self._classes.values():
            other.passed = 0

    def take(self, may_go: Callable[[Ticket], bool]) -> Ticket | None:
        """Take out who goes next of those that may, and charge its key; None when none may."""
        for priority in self._order():
            group = self._classes[priority]
            for line in sorted(group.backlog(), key=lambda line: line.place):
                ticket = next(filter(may_go, line.waiting), None)
                if ticket is None:
                    continue
                self._out(ticket)
                self._charge(group, line, ticket)
                self._count_passed(priority)
                return ticket
        return None

    def remove(self, ticket: Ticket) -> None:
        """Take one out as if it had never come. Raises KeyError when it is not in here."""
        self._out(ticket)

    def surplus(self) -> Ticket:
        """Who leaves when there are too many: the newest of the longest line; among equals of the lowest class, then
        the latest. Raises IndexError when nobody waits."""
        lines = [(p, line) for p, group in self._classes.items() for line in group.backlog()]
        if not lines:
            raise IndexError("nobody waits")
        _, line = max(lines, key=lambda at: (len(at[1].waiting), at[0], at[1].waiting[at[1].newest]))
        return line.newest

    def settle(self, ticket: Ticket, cost: float) -> None:
        """A request that went has ended after `cost` seconds: charge these instead of what was estimated."""
        line = self._classes[ticket.priority].lines[ticket.key]
        line.had += cost - ticket.cost
        line.under_way -= ticket.cost

    def ahead(self, ticket: Ticket) -> int:
        """How many of those waiting should go before this one: all of classes above, and of each key in its own class
        as many as its key has up to it. An estimate: turns given to starving classes and differing costs move it."""
        above = sum(len(line.waiting) for p, g in self._classes.items() if p < ticket.priority for line in g.backlog())
        lines = self._classes[ticket.priority].lines
        own = list(lines[ticket.key].waiting).index(ticket)
        beside = (min(len(line.waiting), own + 1) for key, line in lines.items() if key != ticket.key)
        return above + own + sum(beside)

    def _order(self) -> list[Priority]:
        """Classes in the order of this turn: starving ones first, the most passed over before others."""

        def place(priority: Priority) -> tuple[int, int]:
            passed = self._classes[priority].passed
            return (-passed if passed >= PASSES else 0, priority)

        return sorted((p for p in Priority if self._classes[p].backlog()), key=place)

    def _count_passed(self, went: Priority) -> None:
        for priority, group in self._classes.items():
            if priority == went or not group.backlog():
                group.passed = 0
            elif priority > went:
                group.passed += 1

    def _joined(self, ticket: Ticket) -> tuple[_Class, _Line]:
        """Its class and its key's line there, which has no credit for the time in which it was empty."""
        group = self._classes[ticket.priority]
        line = group.lines.setdefault(ticket.key, _Line())
        if not line.waiting:
            line.had = max(line.had, min((other.level for other in group.backlog()), default=group.level))
        self._arrivals += 1
        return group, line

    def _charge(self, group: _Class, line: _Line, ticket: Ticket) -> None:
        self._turns += 1
        group.level, line.went = line.level, self._turns
        line.had += ticket.cost
        line.under_way += ticket.cost

    def _out(self, ticket: Ticket) -> None:
        group = self._classes[ticket.priority]
        del group.lines[ticket.key].waiting[ticket]
        self._length -= 1
