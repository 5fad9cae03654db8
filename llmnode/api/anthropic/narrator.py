"""Answers in the words of Anthropic's Messages API, as events and whole.

    message_start
      content_block_start  content_block_delta ...  content_block_stop      for each block
    message_delta          why it ended, and what it cost
    message_stop

A block goes on for as long as pieces of its kind come: text, thinking, or one use of a tool. The whole message is put
together by telling the stream's events to nobody, so the two cannot differ. Source: Anthropic's API reference.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmnode.api.narrator import Answer, Ending, Occasion, Teller, call_id
from llmnode.api.shape import Shape
from llmnode.chat.pieces import Arguments, CallBegun, Content, Message, Piece, Reasoning
from llmnode.engine.types import Logprob
from llmnode.wire import sse
from llmnode.wire.node import Usage

SIGNATURE = "llmrack"
"""Anthropic signs what its models think; clients send it back unread, and some of them only where it is not empty."""

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Messages:
    """Tells one message. `omits_thinking`: the client wants to know that there was some, and not what.

    Answers do not depend on how many ids came together: blocks have indexes, and deltas none.
    """

    singly = False
    terminator = sse.END

    def __init__(self, id: str, model: str, *, prompt_tokens: int = 0, omits_thinking: bool = False) -> None:
        self._id, self._model = id, model
        self._prompt_tokens = prompt_tokens
        self._omits_thinking = omits_thinking
        self._begun = False
        self._blocks: list[dict[str, Any]] = []
        self._parts: list[str] = []
        self._ending = Ending("stop")

    @classmethod
    def of(cls, occasion: Occasion) -> Messages:
        thinking = occasion.request.options.body.get("thinking")
        omits = isinstance(thinking, dict) and thinking.get("display") == "omitted"
        return cls(occasion.id, occasion.model, prompt_tokens=occasion.prompt_tokens, omits_thinking=omits)

    def say(self, index: int, pieces: Sequence[Piece], logprobs: Sequence[Logprob]) -> bytes:
        said = [self._start()]
        said += [self._piece(piece) for piece in pieces]
        return b"".join(said)

    def finish(self, index: int, ending: Ending) -> bytes:
        self._ending = ending
        return self._start() + self._close()

    def end(self, usage: Usage) -> bytes:
        said = {"type": "message_delta", "delta": self._why(), "usage": _usage(usage)}
        return _event(said) + _event({"type": "message_stop"})

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        for pieces, logprobs in answers[0].said:
            self.say(0, pieces, logprobs)
        self.finish(0, answers[0].ending)
        return {**self._frame(), **self._why(), "content": self._blocks, "usage": _usage(usage)}

    def reply(self, index: int, message: Message) -> Mapping[str, Any]:
        return Shape(self._id, 0, "", chat=True, parsed=True).message(index, message)

    def plain(self, begun: Collection[int]) -> Teller | None:
        return None

    def _start(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        # What of the prompt was cached is known at the end; the counts of `message_delta` take the place of these.
        usage = _usage(Usage(self._prompt_tokens))
        return _event({"type": "message_start", "message": {**self._frame(), "usage": usage}})

    def _frame(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _why(self) -> dict[str, Any]:
        ending = self._ending
        reason = _STOP_REASONS.get(ending.finish, "end_turn")
        if ending.stop and reason == "end_turn":
            return {"stop_reason": "stop_sequence", "stop_sequence": ending.stop}
        return {"stop_reason": reason, "stop_sequence": None}

    def _piece(self, piece: Piece) -> bytes:
        match piece:
            case Content(text):
                return self._more("text", text, {"type": "text_delta", "text": text}) if text else b""
            case Reasoning(text):
                if self._omits_thinking:
                    text = ""
                return self._more("thinking", text, {"type": "thinking_delta", "thinking": text})
            case CallBegun(call, name):
                id = call_id(self._id, 0, call)
                return self._open({"type": "tool_use", "id": id, "name": name, "input": {}})
            case Arguments(_, text):
                return self._more("tool_use", text, {"type": "input_json_delta", "partial_json": text})

    def _more(self, kind: str, text: str, delta: dict[str, Any]) -> bytes:
        said = b""
        if not self._is_open or self._blocks[-1]["type"] != kind:
            assert kind != "tool_use", "arguments come right behind their call"
            empty = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            said = self._open(empty)
        if not text:
            return said
        self._parts.append(text)
        return said + _event({"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta})

    _is_open = False

    def _open(self, block: dict[str, Any]) -> bytes:
        said = self._close()
        self._blocks.append(block)
        self._is_open = True
        return said + _event({"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block})

    def _close(self) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        block, index, said = self._blocks[-1], len(self._blocks) - 1, b""
        text = "".join(self._parts)
        self._parts.clear()
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            block[block["type"]] = text
        if block["type"] == "thinking":
            block["signature"] = SIGNATURE
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            said = _event({"type": "content_block_delta", "index": index, "delta": delta})
        return said + _event({"type": "content_block_stop", "index": index})


def _event(payload: dict[str, Any]) -> bytes:
    return sse.event(payload, payload["type"])


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts apart what OpenAI counts among the prompt: tokens that were found in the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call. Those that `max_tokens` has cut off are no object: then none are told."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
