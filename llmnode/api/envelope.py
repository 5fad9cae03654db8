"""What goes around a body: how long an answer may take, which fields had no effect, what it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sanic import Request

from llmnode.wire import headers
from llmnode.wire.errors import InvalidRequest
from llmnode.wire.node import Usage

_MAX_HEADER_CHARACTERS = 4000
"""Many clients and proxies take a header of 8 KiB at most."""


def patience(request: Request, limit_s: float) -> float:
    """Seconds that the answer may take: what the gate has left for it, and no more than the limit. Raises
    InvalidRequest."""
    text = request.headers.get(headers.DEADLINE_MS)
    if text is None:
        return limit_s
    if not (text.isascii() and text.isdecimal() and len(text) <= 16):
        raise InvalidRequest(
            f"{headers.DEADLINE_MS} must be whole milliseconds, got {text[:80]!r}", param=headers.DEADLINE_MS
        )
    return min(limit_s, int(text) / 1000)


def ignored(fields: Sequence[str]) -> dict[str, str]:
    """The header that names fields without effect. Their names come from the client: what no header may hold is
    escaped, and what no proxy would take is cut."""
    if not fields:
        return {}
    names = ", ".join(json.dumps(name)[1:-1].replace("\x7f", "\\u007f") for name in fields)
    cut = len(names) > _MAX_HEADER_CHARACTERS
    return {headers.IGNORED: names[:_MAX_HEADER_CHARACTERS] + "..." if cut else names}


def cost(request: Request, usage: Usage) -> dict[str, str]:
    """The header that tells the gate what an answer in one body cost, where it asks for that."""
    return {headers.USAGE: usage.header()} if request.headers.get(headers.REPORT_USAGE) == "1" else {}
