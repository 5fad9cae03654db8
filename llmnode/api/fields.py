"""Reading a JSON object field by field: types and ranges, with errors that name the field, the limit and the value.

Owns: what is a number, a flag, a list of texts, and which fields nobody has looked at. Refuses to know what any field
means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmnode.wire.errors import InvalidRequest


class Fields:
    """Reads a JSON object and remembers which of its fields were looked at; null counts as absent.

    body: the object without its nulls.
    where: its place in the body of the request, with a dot behind it, for the names in errors.
    advice: fields without effect found in nested objects, as full names.
    """

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self.body = {name: value for name, value in body.items() if value is not None}
        self._seen: set[str] = set()
        self.where = where
        self.advice: list[str] = []

    @property
    def place(self) -> str:
        """Where the object itself stands, "" for the body."""
        return self.where.removesuffix(".")

    def get(self, name: str) -> Any:
        """The value as it came, None when it is absent."""
        self._seen.add(name)
        return self.body.get(name)

    def wrong(self, name: str, what: str, value: Any, code: str | None = None) -> InvalidRequest:
        """The error for a field that is not `what` it must be."""
        full = self.where + name
        return InvalidRequest(f"{full} {what}, got {show(value)}", param=full, code=code)

    def number(self, name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        """A number from `low` (or above it) to `high`."""
        value = self.get(name)
        if value is None:
            return default
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high or (above and value == low):
            limits = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise self.wrong(name, f"must be a number {limits}", value)
        return float(value)

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        """A whole number from `low` to `high`, None when it is absent."""
        value = self.get(name)
        if value is None:
            return None
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or value < low or (high is not None and value > high):
            limits = f"from {low} to {high}" if high is not None else f"from {low}"
            raise self.wrong(name, f"must be a whole number {limits}", value)
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false", value)
        return value

    def texts(self, name: str, most: int, longest: int, *, or_one: bool = False) -> tuple[str, ...] | None:
        """A list of at most `most` texts, none empty or above `longest` characters; with `or_one`, also one text."""
        value = self.get(name)
        if value is None:
            return None
        texts = [value] if or_one and isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            shape = "a text or a list of texts" if or_one else "a list of texts"
            raise self.wrong(name, f"must be {shape}, none empty", value)
        full = self.where + name
        if len(texts) > most:
            raise InvalidRequest(f"{full} may hold {most} texts at most, got {len(texts)}", param=full)
        length = max(map(len, texts), default=0)
        if length > longest:
            raise InvalidRequest(f"{full} may hold texts of {longest} characters at most, got {length}", param=full)
        return tuple(texts)

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            full = self.where + name
            raise InvalidRequest(f"{full} must be an object, got {kind(value)}", param=full)
        return value

    def refuse(self, table: Mapping[str, tuple[Any, ...]], why: str = "is not supported by this server") -> None:
        """Raise for a field of the table whose value is none of the neutral ones given there."""
        for name, neutral in table.items():
            value = self.get(name)
            if value is not None and not any(_same(value, n) for n in neutral):
                raise self.wrong(name, why, value, "unsupported_parameter")

    def rest(self) -> list[str]:
        """Names of the fields that nobody has looked at, with the advice found in nested objects."""
        return sorted({self.where + name for name in self.body if name not in self._seen} | set(self.advice))


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    if value in ("", [], {}):
        return names[type(value)] + " that is empty"
    return names[type(value)]


def show(value: Any) -> str:
    """A value for a message, cut so that a hostile one does not fill the log."""
    try:
        text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = f"{kind(value)} that is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def _same(value: Any, neutral: Any) -> bool:
    """Equal, without true being 1 or false being 0."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
