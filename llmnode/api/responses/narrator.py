"""Answers in the words of OpenAI's Responses API, as events and whole.

    response.created  response.in_progress
      response.output_item.added
        response.content_part.added                        of a message or of reasoning
          response.output_text.delta ...  .done            or reasoning_text, or function_call_arguments
        response.content_part.done
      response.output_item.done                            for each item
    response.completed, or response.incomplete where max_output_tokens cut it off

An item goes on for as long as pieces of its kind come: a message, reasoning, or one call of a function. The whole
response is put together by telling the stream's events to nobody, so the two cannot differ. `sequence_number` counts
the events; one id of a token comes to the same events wherever it is told. Source: OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmnode.api.logprobs import LogprobWriter
from llmnode.api.narrator import Answer, Ending, Occasion, Teller, call_id
from llmnode.api.schema import Options
from llmnode.api.shape import Shape
from llmnode.chat.pieces import CallBegun, Content, Message, Piece, Reasoning
from llmnode.engine.types import Logprob
from llmnode.wire import sse
from llmnode.wire.node import Usage

_MESSAGE, _REASONING, _CALL = "message", "reasoning", "function_call"
_PARTS = {_MESSAGE: "output_text", _REASONING: "reasoning_text"}


class Responses:
    """Tells one response. `frame`: the fields that are the same from its first event to its last.

    writer: of logprobs, where they were asked for: those of the tokens of messages are told.
    """

    singly = True
    terminator = sse.END

    def __init__(self, frame: Mapping[str, Any], writer: LogprobWriter | None = None) -> None:
        self._frame, self._writer = frame, writer
        self._id = frame["id"]
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open = ""  # the kind of the item that goes on
        self._parts: list[str] = []
        self._logprobs: list[Any] = []  # of the message that goes on
        self._waiting: list[Any] = []  # of tokens whose text is held back
        self._ids, self._thoughts = 0, 0
        self._ending = Ending("stop")

    @classmethod
    def of(cls, occasion: Occasion) -> Responses:
        frame = _frame(occasion.id, occasion.created, occasion.model, occasion.request.options)
        return cls(frame, occasion.writers[0] if occasion.writers else None)

    def say(self, index: int, pieces: Sequence[Piece], logprobs: Sequence[Logprob]) -> bytes:
        said = [self._start()]
        self._ids += 1
        if self._writer is not None and logprobs:
            self._waiting += self._writer.write(logprobs)["content"]
        for piece in pieces:
            said.append(self._piece(piece))
        return b"".join(said)

    def finish(self, index: int, ending: Ending) -> bytes:
        self._ending = ending
        said = self._start()
        if self._open == _MESSAGE and self._waiting:
            said += self._delta(_MESSAGE, "")  # tokens whose text never came
        return said + self._close("incomplete" if ending.finish == "length" else "completed")

    def end(self, usage: Usage) -> bytes:
        response = self._response(usage)
        return self._event(f"response.{response['status']}", response=response)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        for pieces, logprobs in answers[0].said:
            self.say(0, pieces, logprobs)
        self.finish(0, answers[0].ending)
        return self._response(usage)

    def reply(self, index: int, message: Message) -> Mapping[str, Any]:
        return Shape(self._id, 0, "", chat=True, parsed=True).message(index, message)

    def plain(self, begun: Collection[int]) -> Teller | None:
        return None

    def _response(self, usage: Usage) -> dict[str, Any]:
        cut = self._ending.finish == "length"
        return {
            **self._frame,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self._thoughts},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _start(self) -> bytes:
        if self._number:
            return b""
        return b"".join(
            self._event(f"response.{name}", response=dict(self._frame)) for name in ("created", "in_progress")
        )

    def _piece(self, piece: Piece) -> bytes:
        kind = _CALL
        if isinstance(piece, Content):
            kind = _MESSAGE
        elif isinstance(piece, Reasoning):
            kind = _REASONING
            self._thoughts += self._ids
        self._ids = 0
        if kind != _MESSAGE:
            self._waiting.clear()
        if isinstance(piece, CallBegun):
            return self._close() + self._begin_call(piece)
        if not piece.text:
            return b""
        said = b""
        if self._open != kind:
            assert kind != _CALL, "arguments come right behind their call"
            said = self._close() + self._begin(kind)
        self._parts.append(piece.text)
        return said + self._delta(kind, piece.text)

    def _begin(self, kind: str) -> bytes:
        """An item with one part, of text."""
        item: dict[str, Any] = {"id": self._item_id("msg" if kind == _MESSAGE else "rs"), "type": kind}
        if kind == _MESSAGE:
            item |= {"role": "assistant", "content": [], "status": "in_progress"}
        else:
            item |= {"summary": [], "content": [], "status": "in_progress"}
        said = self._added(kind, item)
        return said + self._told("response.content_part.added", content_index=0, part=self._part(kind, ""))

    def _begin_call(self, call: CallBegun) -> bytes:
        item = {
            "id": self._item_id("fc"),
            "type": _CALL,
            "call_id": call_id(self._id, 0, call.index),
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        return self._added(_CALL, item)

    def _added(self, kind: str, item: dict[str, Any]) -> bytes:
        self._open = kind
        self._output.append(item)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _delta(self, kind: str, text: str) -> bytes:
        if kind == _CALL:
            return self._told("response.function_call_arguments.delta", delta=text)
        if kind == _REASONING:
            return self._told("response.reasoning_text.delta", content_index=0, delta=text)
        logprobs, self._waiting = self._waiting, []
        self._logprobs += logprobs
        return self._told("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _close(self, status: str = "completed") -> bytes:
        """The end of the item that goes on, if one does."""
        kind, text = self._open, "".join(self._parts)
        if not kind:
            return b""
        said = []
        if kind == _CALL:
            self._output[-1]["arguments"] = text
            said.append(self._told("response.function_call_arguments.done", arguments=text))
        else:
            part = self._part(kind, text)
            logprobs = {"logprobs": part["logprobs"]} if kind == _MESSAGE else {}
            name = f"response.{_PARTS[kind]}.done"
            said.append(self._told(name, content_index=0, text=text, **logprobs))
            said.append(self._told("response.content_part.done", content_index=0, part=part))
            self._output[-1]["content"] = [part]
        self._output[-1]["status"] = status
        said.append(self._event("response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1]))
        self._open = ""
        self._parts.clear()
        return b"".join(said)

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        if kind == _REASONING:
            return {"type": "reasoning_text", "text": text}
        logprobs, self._logprobs = self._logprobs, []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id.removeprefix('resp_')}_{len(self._output)}"

    def _told(self, type: str, **more: Any) -> bytes:
        """An event of the item that goes on."""
        return self._event(type, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **more)

    def _event(self, type: str, **more: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse.event({"type": type, **more, "sequence_number": number}, type)


def _frame(id: str, created: int, model: str, options: Options) -> dict[str, Any]:
    """What a response says of its request, with the values that stand for fields that were not sent."""
    body = options.body
    reasoning, text = body.get("reasoning") or {}, body.get("text") or {}
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "metadata": body.get("metadata") or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": options.sampling.temperature,
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [_tool(tool) for tool in body.get("tools") or ()],
        "top_logprobs": body.get("top_logprobs") or 0,
        "top_p": options.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.get("user"),
    }


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": None, "parameters": None, "strict": None, **tool}
