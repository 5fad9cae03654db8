"""Reads the messages of a chat: roles, texts, earlier calls and their results.

Owns: what a message may hold, with the path of whatever is wrong in it. Refuses to know: what a template makes of them.
Source of names and shapes: OpenAI's API reference; `reasoning_content` (also `reasoning`) and `prefix` are the names
that open servers share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmnode.api.fields import Fields, kind
from llmnode.wire.errors import BodyTooLarge, InvalidRequest

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles that a message may have, and what the template calls them: `developer` is OpenAI's new word for `system`."""

_MEDIA = {
    "image_url": "images",
    "input_image": "images",
    "image": "images",
    "input_audio": "audio",
    "audio": "audio",
    "video_url": "video",
    "file": "files",
    "input_file": "files",
}
_OTHER_WORDS = {"function": "role tool", "function_call": "tool_calls"}
"""Names of OpenAI's first way to call functions, and what took their place."""
_LONGEST_ID = 256


def read(fields: Fields, most: int) -> tuple[Mapping[str, Any], ...]:
    """The messages, each with `role` and `content` (a text), and what else it has of `name`, `reasoning_content`,
    `tool_calls`, `tool_call_id`. Raises InvalidRequest, BodyTooLarge."""
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"messages must be a list with at least one message, got {kind(value)}", param="messages")
    if len(value) > most:
        raise BodyTooLarge(f"messages may hold {most} messages at most, got {len(value)}", param="messages")
    return tuple(_message(message, f"messages[{index}]", fields.advice) for index, message in enumerate(value))


def is_prefix(fields: Fields) -> bool | None:
    """What the last message says of itself: whether it is to be gone on with."""
    last = fields.get("messages")[-1]
    return last.get("prefix") if isinstance(last.get("prefix"), bool) else None


def _message(value: Any, where: str, advice: list[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be an object with role and content, got {kind(value)}", param=where)
    fields = Fields(value, where + ".")
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLES:
        hint = f"; {_OTHER_WORDS[role]} took its place" if isinstance(role, str) and role in _OTHER_WORDS else ""
        raise fields.wrong("role", f"must be one of {', '.join(ROLES)}{hint}", role)
    fields.refuse({"function_call": ()}, f"is not supported: {_OTHER_WORDS['function_call']} took its place")
    fields.refuse({"audio": ()})
    message: dict[str, Any] = {"role": ROLES[role]}
    calls = _calls(fields, where, advice) if role == "assistant" else ()
    reasoning = _text(fields, "reasoning_content") or _text(fields, "reasoning")
    refusal = _text(fields, "refusal") if role == "assistant" else ""
    may_be_empty = role == "tool" or bool(calls or reasoning or refusal)
    message["content"] = _content(fields, where, advice, role, may_be_empty=may_be_empty) or refusal
    if role == "assistant" and reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if role == "tool" and (id := _id(fields, "tool_call_id")):
        message["tool_call_id"] = id
    if name := _text(fields, "name"):
        message["name"] = name
    if role == "assistant":
        fields.flag("prefix")
    advice += fields.rest()
    return message


def _content(fields: Fields, where: str, advice: list[str], role: str, *, may_be_empty: bool) -> str:
    """The text of a message; parts of type text are put together without anything between them."""
    value = fields.get("content")
    if isinstance(value, str):
        return value
    if may_be_empty and value in (None, []):
        return ""
    param = f"{where}.content"
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{param} must be a text or a list of parts, got {kind(value)}", param=param)
    texts = []
    for index, item in enumerate(value):
        at = f"{param}[{index}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{at} must be an object with a type, got {kind(item)}", param=at)
        part = Fields(item, at + ".")
        texts.append(_part(part, at, role))
        advice += part.rest()
    return "".join(texts)


def _part(part: Fields, at: str, role: str) -> str:
    type = part.get("type")
    name = "refusal" if type == "refusal" and role == "assistant" else "text"
    text = part.get(name)
    if type not in ("text", name):
        if isinstance(type, str) and type in _MEDIA:
            raise InvalidRequest(
                f"{at}.type must be text, which is all that this model takes, and {_MEDIA[type]} are not: got {type}",
                param=f"{at}.type",
                code="unsupported_modality",
            )
        raise part.wrong("type", "must be text, which is all that this model takes", type)
    if not isinstance(text, str):
        raise InvalidRequest(f"{at}.{name} must be a text, got {kind(text)}", param=f"{at}.{name}")
    return text


def _calls(fields: Fields, where: str, advice: list[str]) -> list[Mapping[str, Any]]:
    value = fields.get("tool_calls")
    if value is None:
        return []
    if not isinstance(value, list):
        raise fields.wrong("tool_calls", "must be a list of calls", value)
    return [_call(call, f"{where}.tool_calls[{index}]", advice) for index, call in enumerate(value)]


def _call(value: Any, at: str, advice: list[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{at} must be an object with a function, got {kind(value)}", param=at)
    call = Fields(value, at + ".")
    if call.get("type") not in (None, "function"):
        raise call.wrong("type", "must be function", call.get("type"), "unsupported_parameter")
    inner = Fields(call.object("function") or {}, f"{at}.function.")
    name, arguments = inner.get("name"), inner.get("arguments")
    if not isinstance(name, str) or not name:
        raise inner.wrong("name", "must be the name of the function that was called", name)
    id = _id(call, "id")
    call.get("index")  # of a stream's chunks, which some clients send back as they came
    advice += call.rest() + inner.rest()
    return {"id": id, "type": "function", "function": {"name": name, "arguments": _arguments(inner, arguments)}}


def _arguments(fields: Fields, value: Any) -> str:
    """The JSON text of an object. Some clients send the object itself."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if value is None or value == "":
        return "{}"
    if not isinstance(value, str):
        raise fields.wrong("arguments", "must be the JSON text of an object", value)
    try:
        object = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise fields.wrong("arguments", f"must be the JSON text of an object ({error})", value) from None
    if not isinstance(object, dict):
        raise fields.wrong("arguments", "must be the JSON text of an object", value)
    return value


def _id(fields: Fields, name: str) -> str:
    id = _text(fields, name)
    if len(id) > _LONGEST_ID:
        raise fields.wrong(name, f"may have {_LONGEST_ID} characters at most", id)
    return id


def _text(fields: Fields, name: str) -> str:
    text = fields.get(name)
    if text is not None and not isinstance(text, str):
        full = fields.where + name
        raise InvalidRequest(f"{full} must be a text, got {kind(text)}", param=full)
    return text or ""
