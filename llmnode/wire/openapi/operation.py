"""One method of one path, as the document tells of it."""

from __future__ import annotations

from dataclasses import dataclass

from llmnode.wire.openapi.fields import Schema

NODE, GATE = frozenset({"node"}), frozenset({"gate"})
EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    name: unique, for clients that are made from the document.      tag: the chapter that it stands in.
    body: schema of what it takes; None for nothing.        streams: whether it may answer in events.
    query: parameters in the address, (name, schema).       at: who serves it.      open: who of these asks for no key.
    answer: media type of the answer; or_else: others that it may have.     returns: schema of an answer in JSON.
    status: of the answer when all is well.     also: other statuses of its own.
    """

    method: str
    path: str
    name: str
    tag: str
    summary: str
    body: Schema | None = None
    streams: bool = False
    query: tuple[tuple[str, Schema], ...] = ()
    at: frozenset[str] = NODE | GATE
    open: frozenset[str] = frozenset()
    answer: str = "application/json"
    also: tuple[int, ...] = ()
    status: int = 200
    returns: Schema | None = None
    or_else: tuple[str, ...] = ()
