"""A request's body as bytes, and the one change that the gate may make to it: another name for its model."""

from __future__ import annotations

import json
import re

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def renamed(body: bytes, model: str) -> bytes:
    """The body with another value for `model`, every other byte as it came; unchanged when it names no model.

    body: a JSON object that `json.loads` has read. Of several `model` keys the last is the one that counts, as for
    `json.loads`. Text in UTF-16 or with a byte order mark, which JSON forbids and Python reads, becomes plain UTF-8.
    """
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    span = _value_of(text, "model")
    if span is None:
        return body
    start, end = span
    named = text[:start] + json.dumps(model, ensure_ascii=False) + text[end:]
    return named.encode("utf-8", "surrogatepass")


def _value_of(text: str, wanted: str) -> tuple[int, int] | None:
    """Where the value of the object's last key of that name begins and ends. Reads with the json module's own scanner,
    so that strings, escapes and nesting mean what they meant to whoever decoded the body."""
    span = None
    at = _past(text, 0, "{")
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = _past(text, at, ":")
        _, at = _DECODER.raw_decode(text, start)
        if key == wanted:
            span = start, at
        at = _past(text, at, ",")
    return span


def _past(text: str, at: int, mark: str) -> int:
    """The next place that is no white space, after an optional mark."""
    at = _over_space(text, at)
    return _over_space(text, at + 1) if text[at] == mark else at


def _over_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
