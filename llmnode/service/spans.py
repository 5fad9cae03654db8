"""What a trace is made of: the context that goes from program to program, and spans as values.

The context is W3C's (Trace Context, level 1): `traceparent` says which trace a request belongs to, which span has
caused it, and whether it is to be recorded; `tracestate` goes on as it came. A span is made when the work that
it tells of is over, from the times that were noted anyway. So nothing is kept open while work is done, least of all in
the engine's thread, and a request that is not traced costs a look at None.

Names of attributes are OpenTelemetry's (semantic conventions for HTTP and for generative AI), or begin with `llmrack.`.
Prompts, answers and secrets are in none. Refuses to know who collects spans (service/traces.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

PARENT, STATE = "traceparent", "tracestate"
"""Names of the headers."""
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LONGEST_STATE = 512
"""Characters of `tracestate` that everybody must pass on (3.3.1.5)."""
_SAMPLED = 1
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/completion": "text_completion",
    "/completions": "text_completion",
    "/infill": "text_completion",
    "/inference": "text_completion",
    "/v1/embeddings": "embeddings",
    "/embeddings": "embeddings",
    "/embedding": "embeddings",
    "/v1/rerank": "rerank",
    "/v1/reranking": "rerank",
    "/rerank": "rerank",
    "/reranking": "rerank",
}

Value = str | int | float | bool


@dataclass(frozen=True)
class Context:
    """A span's place. trace: 32 hex digits.    span: 16.    sampled: whether the trace is recorded.

    state: `tracestate`, "" for none.
    """

    trace: str
    span: str
    sampled: bool
    state: str = ""

    @classmethod
    def parse(cls, parent: str | None, state: str | None = None) -> Context | None:
        """Read the two headers; None where there is no context, or none that can be read: then a new trace begins."""
        found = _PARENT.fullmatch(parent or "")
        if found is None:
            return None
        version, trace, span, flags, more = found.groups()
        if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
            return None
        fits = state and len(state) <= _LONGEST_STATE and state.isascii() and state.isprintable()
        return cls(trace, span, bool(int(flags, 16) & _SAMPLED), state if state and fits else "")

    def headers(self) -> dict[str, str]:
        """What tells another program that this span has caused its work."""
        said = {PARENT: f"00-{self.trace}-{self.span}-{int(self.sampled):02x}"}
        return said | ({STATE: self.state} if self.state else {})

    def child(self, span: str) -> Context:
        """The context of a span that this one causes. span: its 16 hex digits."""
        return Context(self.trace, span, self.sampled, self.state)


class Kind(Enum):
    """Which end of a request a span is, if any. A server's parent is in another program."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


@dataclass(frozen=True)
class Span:
    """Some work that is over.

    parent: the span that caused it, "" for the first of a trace.    began, ended: seconds since the epoch.
    error: in a word why it failed, "" when it did not.    links: spans that it goes on from.
    """

    name: str
    kind: Kind
    context: Context
    parent: str
    began: float
    ended: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    error: str = ""
    links: tuple[Context, ...] = ()


def operation(path: str) -> str:
    """What a request to this path is about, as `gen_ai.operation.name` has it: "chat", "text_completion",
    "embeddings", or a word of ours."""
    return _OPERATIONS.get(path) or path.rsplit("/", 1)[-1].replace("-", "_")


def known(attributes: Mapping[str, Value | None]) -> dict[str, Value]:
    """Attributes without those that are None or empty: what is not known is not said."""
    return {name: value for name, value in attributes.items() if value is not None and value != ""}
