"""How a stream survives its node: what the gate fixes, what the node confirms, and what another node is told.

1. The gate sends `x-llmrack-resumable` with `Fixed`: the parts of an answer that would differ on another node.
2. The node answers as an event stream, whether the client asked for one or not. After the frames of each step comes a
   commit marker, an SSE comment `: t CHOICE COUNT id,id...`: with these ids, COUNT ids of that choice are out, and all
   frames before the marker say what they say, no more and no less.
3. A node that must stop says `: handover` instead of going on. Then, or when it dies or goes silent, the gate sends
   `Resume` to `POST /resume` of another node, which replays the ids without saying them again and goes on.

Which frames an id stands for:
- its text and logprobs, as far as the ids up to it make them certain;
- the first one of a choice also for the chunk that says who speaks: a choice without ids has not been introduced, and
  one with ids is never introduced again;
- the last one also for the chunk that says how the choice ended: ids that end a choice say that its end is out, and
  nothing more comes of it.
So no frame of a choice comes without an id, and a node sends no marker without one. Comments are not content. What
comes after the last choice has ended has no marker: the usage chunk, the whole body of an answer that the client does
not stream (one event, of which until then only the markers come), the usage comment. It is out when `[DONE]` is, and
whoever resumes with all ids says it all again. Such a body holds the whole text, whichever node began it.

The markers are the gate's; no client sees them. A line that begins with a colon cannot come out of JSON data.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

VERSION = 1
"""Of the resume format: a node serves those that speak the same one."""
PATH = "/resume"
HANDOVER = b": handover\n\n"
LONGEST_HEAD = 16 * 1024 * 1024
"""Bytes of the first line of a `Resume`: about two million ids."""
_MARK = b": t "
_LAST_SECOND = 253_402_300_799
"""Of the year 9999: the calendar that templates see ends there."""
_MOST_IDS = 2 * 1024 * 1024
"""Of one answer, all choices together: as JSON they fit into `LONGEST_HEAD`."""
_ID_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_")


@dataclass(frozen=True)
class Fixed:
    """What the gate decides for the node. id: the response id without the prefix of its kind, 1-64 of [A-Za-z0-9_-].

    created: seconds since the epoch, the template's clock too.    seed: for a request that brings none, 0 to 2**32 - 2.
    """

    id: str
    created: int
    seed: int

    def header(self) -> str:
        """The value of `x-llmrack-resumable`."""
        return f"{VERSION} {self.id} {self.created} {self.seed}"

    @classmethod
    def parse(cls, text: str) -> Fixed | None:
        """Read the header; None for another version, which a node takes for a request that cannot be resumed. Raises
        ValueError when it is malformed."""
        parts = text.split(" ")
        if not parts[0].isdecimal():
            raise ValueError(f"must begin with a version, got {text[:80]!r}")
        if int(parts[0]) != VERSION:
            return None
        if len(parts) != 4:
            raise ValueError(f"must be a version, an id, a time and a seed, got {text[:80]!r}")
        return cls.checked(parts[1], _whole(parts[2]), _whole(parts[3]))

    @classmethod
    def checked(cls, id: Any, created: Any, seed: Any) -> Fixed:
        """Raises ValueError that names what is wrong."""
        if not isinstance(id, str) or not 1 <= len(id) <= 64 or not _ID_CHARACTERS.issuperset(id):
            raise ValueError(f"id must be 1-64 characters of [A-Za-z0-9_-], got {id!r}")
        if not _is_whole(created) or created > _LAST_SECOND:
            raise ValueError(f"created must be whole seconds since the epoch, got {created!r}")
        if not _is_whole(seed) or seed > 2**32 - 2:
            raise ValueError(f"seed must be from 0 to {2**32 - 2}, got {seed!r}")
        return cls(id, created, seed)


@dataclass(frozen=True)
class Origin:
    """The model that began an answer: its id, what tells its weights, what tells its template (`wire.node.Model`).

    The node says it with the answer itself: what it said when it was last polled may be of the process before.
    """

    model: str
    digest: str
    template: str

    def header(self) -> str:
        """The value of `x-llmrack-origin`: JSON in ASCII, since a model's id may be any text."""
        return json.dumps({"model": self.model, "digest": self.digest, "template": self.template})

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Raises ValueError that names what is wrong."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"its origin is not JSON: {text[:80]!r}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"its origin must be a JSON object, got {text[:80]!r}")
        return cls(*(_text_of(fields, name) for name in ("model", "digest", "template")))


@dataclass(frozen=True)
class Resume:
    """What `POST /resume` carries: a line of JSON, then the body of the original request as it was received.

    path: the original one.     origin: the model that began the answer, whose id the node must serve.
    ids: for each choice the ids that are committed, in the order of the choices; empty for one that has not begun.
    """

    path: str
    origin: Origin
    fixed: Fixed
    ids: tuple[tuple[int, ...], ...]
    body: bytes

    def write(self) -> bytes:
        head = {
            "version": VERSION,
            "path": self.path,
            "model": self.origin.model,
            "digest": self.origin.digest,
            "template": self.origin.template,
            "id": self.fixed.id,
            "created": self.fixed.created,
            "seed": self.fixed.seed,
            "ids": self.ids,
        }
        return json.dumps(head, separators=(",", ":")).encode() + b"\n" + self.body

    @classmethod
    def parse(cls, data: bytes) -> Resume:
        """Raises ValueError that names what is wrong."""
        head, line, body = data.partition(b"\n")
        if not line or len(head) > LONGEST_HEAD:
            raise ValueError("must be a line of JSON and the original body")
        try:
            fields = json.loads(head)
        except (ValueError, RecursionError):
            raise ValueError("its first line is not JSON") from None
        if not isinstance(fields, dict):
            raise ValueError("its first line must be a JSON object")
        if fields.get("version") != VERSION:
            raise ValueError(f"version must be {VERSION}, got {fields.get('version')!r}")
        path = _text_of(fields, "path")
        # A gate that is one release older names no template.
        origin = Origin(*(_text_of({"template": "", **fields}, name) for name in ("model", "digest", "template")))
        ids = fields.get("ids")
        if not isinstance(ids, list) or not all(isinstance(row, list) and all(map(_is_whole, row)) for row in ids):
            raise ValueError("ids must be a list of lists of token ids")
        fixed = Fixed.checked(fields.get("id"), fields.get("created"), fields.get("seed"))
        return cls(path, origin, fixed, tuple(map(tuple, ids)), body)


@dataclass(frozen=True)
class Marker:
    """`count` ids of `choice` are out, of which these are the last."""

    choice: int
    count: int
    ids: tuple[int, ...]


def marker(choice: int, count: int, ids: Iterable[int]) -> bytes:
    """The commit marker as a frame."""
    return b": t %d %d %s\n\n" % (choice, count, ",".join(map(str, ids)).encode())


def read_marker(frame: bytes) -> Marker | None:
    """The marker that a frame is; None for any other frame. Raises ValueError for one that is malformed."""
    if not frame.startswith(_MARK):
        return None
    parts = frame[len(_MARK) : -2].split(b" ")
    if len(parts) != 3:
        raise ValueError(f"a commit marker has three parts, got {frame[:80]!r}")
    try:
        return Marker(int(parts[0]), int(parts[1]), tuple(map(int, parts[2].split(b","))) if parts[2] else ())
    except ValueError:
        raise ValueError(f"a commit marker holds numbers, got {frame[:80]!r}") from None


class Committed:
    """The ids of each choice that are out, as the gate keeps them: 4 bytes each. `size`: how many in all."""

    def __init__(self) -> None:
        self.size = 0
        self._ids: list[array[int]] = []
        self._last, self._next = 0, b""
        """The choice that spoke last, and how the marker of one more id of it begins."""

    def read(self, frame: bytes) -> None:
        """Add a marker as it stands, without its blank line. The same as `add`, and faster for one more id of the
        choice that spoke last: the gate does this for each token of each stream."""
        expected = self._next
        if expected and frame.startswith(expected) and self.size < _MOST_IDS:
            id = frame[len(expected) :]
            if id.isdigit() and len(id) < 10:
                ids = self._ids[self._last]
                ids.append(int(id))
                self.size += 1
                self._next = _MARK + b"%d %d " % (self._last, len(ids) + 1)
                return
        mark = read_marker(frame + b"\n\n")
        if mark is None:
            raise ValueError(f"no commit marker: {frame[:80]!r}")
        self.add(mark)

    def add(self, mark: Marker) -> None:
        """Raises ValueError when the marker's count does not follow: a gap or a repeat, which nobody may paper over."""
        choice, count, ids = mark.choice, mark.count, mark.ids
        if not 0 <= choice < 1024:
            raise ValueError(f"there is no choice {choice}")
        known = len(self._ids[choice]) if choice < len(self._ids) else 0
        if count != known + len(ids):
            raise ValueError(f"{len(ids)} ids after {known} of choice {choice} do not make {count}")
        if self.size + len(ids) > _MOST_IDS:
            raise ValueError(f"an answer has more than {_MOST_IDS} ids")
        try:
            new = array("I", ids)
        except OverflowError:
            raise ValueError(f"an id of choice {choice} is not from 0 to 2**32 - 1") from None
        while len(self._ids) <= choice:
            self._ids.append(array("I"))
        self._ids[choice].extend(new)
        self.size += len(ids)
        self._last, self._next = choice, _MARK + b"%d %d " % (choice, count + 1)

    def ids(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self._ids))


def check_choices(ids: Sequence[Sequence[int]], choices: int) -> tuple[tuple[int, ...], ...]:
    """The ids of exactly so many choices; those that have not begun are empty. Raises ValueError for too many."""
    if len(ids) > choices:
        raise ValueError(f"ids has {len(ids)} lists, and the request has {choices} choices")
    return tuple(map(tuple, ids)) + ((),) * (choices - len(ids))


def _text_of(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 16:
        raise ValueError(f"must be a whole number, got {text[:20]!r}")
    return int(text)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
