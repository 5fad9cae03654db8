"""OpenAI's chats and completions: the shapes of their answers, whole and in chunks.

Owns: what an answer looks like on the wire, field for field. Refuses to know: requests, and when a piece is sent.
`reasoning_content` is not OpenAI's: it is the name by which open servers tell what a model wrote before it answered.
Source of the other names and shapes: OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmnode.api.narrator import Answer, call_id
from llmnode.chat.pieces import Arguments, CallBegun, Content, Message, Piece, Reasoning
from llmnode.wire.node import Usage


@dataclass(frozen=True)
class Shape:
    """How the answers to one request are written down. `index` counts the choices from 0.

    parsed: whether content is told from other things. Then a message without content has null there.
    echoes: what the text of each completion begins with, before what the model says; empty where that is nothing.
    """

    id: str
    created: int
    model: str
    chat: bool
    parsed: bool = False
    echoes: tuple[str, ...] = ()

    def whole(self, answers: Sequence[Answer], usage: Usage, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The body of answers that are not streamed; `logprobs`, one for each, where they were asked for."""
        choices = []
        for index, answer in enumerate(answers):
            message = answer.message
            text = self.echoes[index] + message.content if self.echoes else message.content
            said = {"message": self.message(index, message)} if self.chat else {"text": text}
            found = logprobs[index] if logprobs else None
            choices.append({"index": index, **said, "logprobs": found, "finish_reason": answer.ending.finish})
        return {**self._frame("chat.completion" if self.chat else "text_completion", choices), "usage": usage.openai()}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that says who speaks, or what a completion begins with."""
        if self.chat:
            return self._chunk(index, {"role": "assistant", "content": self._nothing}, None, None)
        return self._chunk(index, self.echoes[index], None, None) if self.echoes else None

    def piece(self, index: int, text: str, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        """A chunk of content."""
        return self._chunk(index, {"content": text} if self.chat else text, None, logprobs)

    def delta(self, index: int, piece: Piece, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        """A chunk of any kind of piece."""
        match piece:
            case Content(text):
                delta: dict[str, Any] = {"content": text}
            case Reasoning(text):
                delta = {"reasoning_content": text}
            case CallBegun(call, name):
                delta = {"tool_calls": [{"index": call, **self._call(index, call, name, "")}]}
            case Arguments(call, text):
                delta = {"tool_calls": [{"index": call, "function": {"arguments": text}}]}
        return self._chunk(index, delta, None, logprobs)

    def silent(self, index: int, logprobs: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a token whose text is not out yet, or is none."""
        return self._chunk(index, {} if self.chat else "", None, logprobs)

    def last(self, index: int, finish: str) -> dict[str, Any]:
        return self._chunk(index, {} if self.chat else "", finish, None)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk without choices that ends a stream when stream_options.include_usage asks for it."""
        return {**self._frame("chat.completion.chunk" if self.chat else "text_completion", []), "usage": usage.openai()}

    @property
    def _nothing(self) -> str | None:
        return None if self.parsed else ""

    def message(self, index: int, message: Message) -> dict[str, Any]:
        written: dict[str, Any] = {"role": "assistant", "content": message.content or self._nothing, "refusal": None}
        if message.reasoning:
            written["reasoning_content"] = message.reasoning
        if message.calls:
            written["tool_calls"] = [
                self._call(index, at, call.name, call.arguments) for at, call in enumerate(message.calls)
            ]
        return written

    def _call(self, index: int, call: int, name: str, arguments: str) -> dict[str, Any]:
        id = call_id(self.id, index, call)
        return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _chunk(self, index: int, delta: Any, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        content = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return self._frame("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _frame(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }
