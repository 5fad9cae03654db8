"""The turns of a conversation in one shape, whichever of three a client sends it in: what chains are made of.

Chat completions have `messages`; Anthropic's, beside them, `system`, and blocks in place of texts; Responses have
`instructions`, and `input`, a text or a list of items. All come to chat's messages, without what says nothing to the
model and differs from turn to turn. So the node knows a reply by what it said, and the gate knows it again in what the
next turn sends back.

Refuses to know what is valid: what makes no sense comes to something all the same. The node's readers
(api/anthropic/request.py, api/responses/request.py) say what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PASSING = frozenset({"cache_control", "signature", "prompt_cache_breakpoint", "annotations", "logprobs"})
"""Of parts and tools. Anthropic's clients move `cache_control` on to the last message each time."""
_PASSING_OF_ITEMS = frozenset({"id", "status", "type"})
_BLOCKS = frozenset({"tool_use", "tool_result", "thinking", "redacted_thinking"})
_BILLING = "x-anthropic-billing-header:"
"""Begins a part of the system text that no model gets (api/anthropic/request.py)."""


def turns(body: Mapping[str, Any]) -> list[Any] | None:
    """The messages of the conversation that a decoded body holds; None where it holds none."""
    messages, first = body.get("messages"), body.get("system")
    if not isinstance(messages, list):
        messages, first = body.get("input"), body.get("instructions")
        if body.get("prompt") is not None:
            return None
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        elif not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
            return None
    if isinstance(first, list):
        first = [part for part in first if not _is_billing(part)]
    found: list[Any] = [{"role": "system", "content": first}] if first else []
    for message in messages:
        _add(found, message)
    return found


def tools(body: Mapping[str, Any]) -> Any:
    """The tools that a decoded body holds, without what passes."""
    return _lasting(body.get("tools"))


def _add(found: list[Any], message: Any) -> None:
    if not isinstance(message, dict):
        found.append(message)
        return
    content = message.get("content")
    match message.get("type"):
        case "function_call":
            call = _call(message.get("call_id"), message.get("name"), message.get("arguments"))
            last = found[-1] if found else None
            if not isinstance(last, dict) or last.get("role") != "assistant":
                found.append({"role": "assistant", "content": "", "tool_calls": [call]})
            else:
                found[-1] = {**last, "tool_calls": [*_list(last.get("tool_calls")), call]}
        case "function_call_output":
            found.append(_result(message.get("call_id"), message.get("output")))
        case "reasoning":
            pass
        case _ if isinstance(content, list) and any(_type(block) in _BLOCKS for block in content):
            found += _unfolded(message.get("role"), content)
        case _:
            found.append(_message(message))


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in message.items() if name not in _PASSING_OF_ITEMS}
    if isinstance(told.get("content"), list):
        told["content"] = _lasting(told["content"])
    if isinstance(told.get("tool_calls"), list):
        told["tool_calls"] = [_chats(call) for call in told["tool_calls"]]
    return told


def _unfolded(role: Any, blocks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """A message of blocks: results are turns of their own, calls belong to the text."""
    texts: list[Any] = []
    calls: list[Any] = []
    for block in blocks:
        match _type(block):
            case "tool_result":
                if texts:
                    yield {"role": role, "content": _lasting(texts)}
                    texts = []
                yield _result(block.get("tool_use_id"), block.get("content"))
            case "tool_use":
                calls.append(_call(block.get("id"), block.get("name"), block.get("input")))
            case "thinking" | "redacted_thinking":
                pass
            case _:
                texts.append(block)
    if texts or calls:
        yield {"role": role, "content": _lasting(texts)} | ({"tool_calls": calls} if calls else {})


def _chats(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return _call(call.get("id"), function.get("name"), function.get("arguments"))


def _call(id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    """Some clients send the text of the arguments back, others what it stands for."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass
    return {"id": id, "name": name, "arguments": arguments}


def _result(id: Any, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": _lasting(content)}


def _lasting(value: Any) -> Any:
    """A list of parts or tools without what passes."""
    if not isinstance(value, list):
        return value
    return [
        {name: each for name, each in one.items() if name not in _PASSING} if isinstance(one, dict) else one
        for one in value
    ]


def _is_billing(part: Any) -> bool:
    text = part.get("text") if isinstance(part, dict) else None
    return isinstance(text, str) and text.startswith(_BILLING)


def _type(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
