"""A request's body: read once, the model that it asks for, and the one change that the gate may make to its bytes,
which is another name for that model.

Errors are sentences for whoever sent or wrote the body; where they go, as a 400 or to a terminal, is the caller's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


class ModelMissing(ValueError):
    """The body names no model, and there is not exactly one to mean."""


def read(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises ValueError, whose text goes on from the body's name: "is not ..."."""
    try:
        decoded = json.loads(body)
    except RecursionError:
        raise ValueError("is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise ValueError("must be a JSON object")
    return decoded


def asked(body: Mapping[str, Any], served: Sequence[str]) -> str:
    """The model that a body asks for, of those served the only one when it names none. Raises ModelMissing, and
    ValueError for a name that is none."""
    name = body.get("model")
    if name is None:
        if len(served) == 1:
            return served[0]
        raise ModelMissing(f"model is missing; models served: {', '.join(served) or 'none'}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"model must be a string of one character or more, got {json.dumps(name)[:80]}")
    return name


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
