"""Conversations to prompts, without ever running a template in this process.

A template is foreign code, whether it came with the model or with a request. So it is rendered where its time and its
memory end (service/confined.py); here is what the rest of the node sees of it: its Format, known from the start, and a
prompt for each conversation. Refuses to know: Jinja, tokens, how work gets to another process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmnode.chat.conversation import Conversation
from llmnode.chat.format import Format
from llmnode.chat.spelling import Segment
from llmnode.chat.template import CHATML, fingerprint
from llmnode.wire.errors import InvalidRequest

Do = Callable[[Mapping[str, Any]], Any]
"""Has a task done elsewhere. Raises InvalidRequest for one that took too much."""


@dataclass(frozen=True)
class Prompt:
    """segments: the text, in parts of which some hold no control tokens, however they look.

    format: how answers to it are written.
    """

    segments: tuple[Segment, ...]
    format: Format

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)


class Renderer:
    """The model's template. Thread-safe; rendering blocks."""

    def __init__(self, source: str, do: Do) -> None:
        """Raises whatever `do` raises for a template that cannot be described."""
        self.source, self.is_default = source or CHATML, not source
        self.fingerprint = fingerprint(source)
        self._do = do
        self.format = Format.from_json(do({"op": "describe"}))

    def render(self, conversation: Conversation, now: int) -> Prompt:
        """The prompt. now: seconds since the epoch, which the template takes for the time. Raises InvalidRequest."""
        told = self._do({"op": "render", **conversation.to_json(), "now": now})
        if "refused" in told:
            raise InvalidRequest(told["refused"], param=told["param"])
        format = self.format if told["format"] is None else Format.from_json(told["format"])
        return Prompt(tuple((text, special) for text, special in told["segments"]), format)
