"""Control tokens that clients spell out in their texts are text, not control tokens.

A user who writes `<|im_end|>` must not end a turn: the prompt is tokenized with control tokens, so their spellings in
what a client sent have to be told from those that the template wrote. Before rendering, each is put between two
characters for private use that occur nowhere in the request; the template carries them along like any text, and behind
it they say where to cut the prompt. What is between two of them is tokenized as plain text.

Owns: the marks. Refuses to know: templates, messages, ids. A template may cut a text between two marks: a mark without
its partner is dropped, and what it stood at is no whole spelling any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Any

Segment = tuple[str, bool]
"""A part of a prompt, and whether control tokens written out in it count as such."""

_PRIVATE = range(0xE000, 0xF900)


class Spellings:
    """How the control tokens of a vocabulary are written out."""

    def __init__(self, texts: Iterable[str]) -> None:
        # By their first two characters, longest first: a document full of `<` is looked at once, not once a token.
        self._texts: dict[str, list[int]] = {}
        self._known = {text for text in texts if len(text) > 1}
        for size, start in sorted({(len(text), text[:2]) for text in self._known}, reverse=True):
            self._texts.setdefault(start, []).append(size)
        self._starts = re.compile("|".join(re.escape(start) for start in self._texts) or "(?!)")

    def places(self, text: str) -> list[tuple[int, int]]:
        """Where a text spells one, as (start, end)."""
        found, at = [], 0
        while (start := self._starts.search(text, at)) is not None:
            at = start.start()
            size = next((n for n in self._texts[start.group()] if text[at : at + n] in self._known), 0)
            if size:
                found.append((at, at + size))
            at += size or 1
        return found


class Marks:
    """The characters that one request is marked with. taken: text in which they must not occur.

    begin, end: around a spelling.      stop: for a place of the caller's.
    """

    def __init__(self, taken: str) -> None:
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        self.begin, self.end, self.stop = next(free), next(free), next(free)
        self._any = re.compile(f"[{self.begin}{self.end}]")
        self._escaped = re.compile("|".join(rf"\\u{ord(mark):04x}" for mark in (self.begin, self.end, self.stop)))

    def marked(self, value: Any, spellings: Spellings, allowed: Collection[str] = ()) -> Any:
        """A JSON value with every spelling marked in its texts and keys, but for the allowed ones."""
        if isinstance(value, str):
            return self._marked(value, spellings, allowed)
        if isinstance(value, dict):
            return {
                self._marked(key, spellings, allowed): self.marked(item, spellings, allowed)
                for key, item in value.items()
            }
        return [self.marked(item, spellings, allowed) for item in value] if isinstance(value, list) else value

    def plain(self, rendered: str) -> str:
        """Marks as characters, where a template has written them as JSON in ASCII."""
        return self._escaped.sub(lambda found: chr(int(found.group()[2:], 16)), rendered)

    def segments(self, rendered: str) -> list[Segment]:
        """The parts of a prompt, marks left out."""
        parts: list[Segment] = []
        pattern = f"{self.begin}([^{self.begin}{self.end}]*){self.end}"
        for at, text in enumerate(re.split(pattern, rendered)):
            text = self._any.sub("", text)
            if text:
                parts.append((text, at % 2 == 0))
        return parts

    def _marked(self, text: str, spellings: Spellings, allowed: Collection[str]) -> str:
        out, last = [], 0
        for start, end in spellings.places(text):
            if text[start:end] not in allowed:
                out += [text[last:start], self.begin, text[start:end], self.end]
                last = end
        return "".join([*out, text[last:]]) if out else text


def names_any(request: Any, spellings: Spellings) -> bool:
    """Whether a JSON value holds any spelling, at the cost of one pass."""
    return bool(spellings.places(json.dumps(request, ensure_ascii=False)))
