"""Server-sent events as both ends of the wire write and read them.

A line that begins with a colon is a comment and cannot come out of JSON data, whose lines begin with `data: `. So a
comment can be found by scanning bytes, carried across network chunks, without parsing an event.
Source of the framing: the HTML standard, section "Server-sent events".
"""

from __future__ import annotations

import json
from typing import Any

from llmnode.wire.node import Usage

DONE = b"data: [DONE]\n\n"
END = b": end\n\n"
"""Ends the stream of an endpoint whose clients know no `[DONE]`: they read a comment as nothing."""
KEEPALIVE = b": keepalive\n\n"
_USAGE = b": u "


# Not ends of lines in SSE, but many clients split with a function for text that takes them for such.
_ESCAPED = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def event(payload: Any, name: str = "") -> bytes:
    """One `data:` event holding compact JSON, in one line by any definition of a line; `name`: its type, if it has
    one."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(_ESCAPED)
    head = f"event: {name}\ndata: " if name else "data: "
    return head.encode() + text.encode() + b"\n\n"


def usage_comment(usage: Usage) -> bytes:
    """What a stream cost, for the gate's log: `: u PROMPT CACHED COMPLETION`, token counts."""
    return b": u %d %d %d\n\n" % (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)


def read_usage(frame: bytes) -> Usage | None:
    """The usage in a frame written by `usage_comment`; None for any other frame."""
    if not frame.startswith(_USAGE):
        return None
    numbers = frame[len(_USAGE) :].split()
    if len(numbers) != 3 or not all(n.isdigit() for n in numbers):
        return None
    return Usage(int(numbers[0]), int(numbers[1]), int(numbers[2]))


class Frames:
    """Cuts a byte stream into SSE frames, whatever the network chunks were.

    `feed` returns the frames completed by a chunk, each with its blank line. `rest` is what has no blank line yet; it
    may hold at most `limit` bytes, over which `feed` raises ValueError (a node that never ends a frame).
    """

    def __init__(self, limit: int = 4 * 1024 * 1024) -> None:
        self.rest = b""
        self._limit = limit

    def feed(self, chunk: bytes) -> list[bytes]:
        data = self.rest + chunk
        *whole, self.rest = data.split(b"\n\n")
        if len(self.rest) > self._limit:
            raise ValueError(f"an SSE frame is longer than {self._limit} bytes")
        return [frame + b"\n\n" for frame in whole]
