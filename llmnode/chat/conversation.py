"""A conversation as OpenAI's API has it, and as a template wants it.

Owns: what is put differently for a template that takes no system message, reads content as parts, wants the arguments
of calls as an object or as text, knows no tools... Refuses to know: Jinja, tokens, HTTP. Which of it a template wants
is its `Format`'s to say, and that was found out by trying, so nothing here goes by a model's name.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from llmnode.chat import generic
from llmnode.chat.format import Calls, Format

Message = dict[str, Any]

REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
"""Keys under which templates look for what an earlier turn has reasoned."""
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
_GAP = "\n\n"
"""Between two messages that become one."""
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Conversation:
    """What a prompt is made of.

    messages: with `role`, `content` (a text, None, or a list of text parts), and what OpenAI's API has besides:
    `tool_calls` (whose `arguments` are JSON text), `tool_call_id`, `name`; and `reasoning_content`.
    tools: as OpenAI's API has them.        keywords: for the template, beside what is always there.
    continued: go on with the last message, which is the assistant's.
    prompted: open a turn of the assistant; not both.
    template: to be used in place of the model's own.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    continued: bool = False
    prompted: bool = True
    template: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def fitted(
    messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], format: Format, *, typed: bool
) -> tuple[list[Message], list[Message] | None]:
    """Messages and tools as a template takes them. typed: it reads content as parts only."""
    fit = [_message(message, format) for message in messages]
    _name_results(fit)
    if format.id_length is not None:
        _shorten_ids(fit, format.id_length)
    given: list[Message] | None = [dict(tool) for tool in tools] or None
    if format.generic:
        fit, given = generic.written(fit, tools), None
    elif tools and not format.tools:
        fit, given = [{"role": "system", "content": _told(tools, format.calls)}, *fit], None
        fit = merged_systems(fit)
    if not format.system:
        fit = without_system(fit)
    if typed:
        fit = [{**message, "content": _parts(message.get("content"))} for message in fit]
    return fit, given


def merged_systems(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """One system message, in front."""
    told = [text_of(message["content"]) for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": _joined(told)}, *rest] if told else rest


def without_system(messages: Sequence[Message]) -> list[Message]:
    """What system messages say, in front of what the user says first."""
    first, *rest = merged_systems(messages) or [{"role": "user"}]
    if first["role"] != "system":
        return [first, *rest]
    for at, message in enumerate(rest):
        if message["role"] == "user":
            rest[at] = {**message, "content": _joined([first["content"], message["content"]])}
            return rest
    return [{"role": "user", "content": first["content"]}, *rest]


def merged_neighbours(messages: Sequence[Message]) -> list[Message]:
    """No two messages of the user one after the other, nor of the assistant without calls."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        same = last is not None and last["role"] == message["role"] and message["role"] in ("user", "assistant")
        if same and last is not None and not last.get("tool_calls"):
            merged[-1] = {**last, **message, "content": _joined([last["content"], message["content"]])}
        else:
            merged.append(message)
    return merged


def without_doubled_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Of an earlier turn that said something and called, only that."""
    return [
        {key: value for key, value in message.items() if key not in REASONING}
        if message.get("tool_calls") and message.get("content")
        else message
        for message in messages
    ]


def variants(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages, and what may be put in their place where a template refuses them: roles in an order that it does
    not know, or more in one message than it takes, are no reason to refuse a client."""
    yield messages
    single = without_doubled_reasoning(messages)
    if single != messages:
        yield single
    one_system = merged_systems(single)
    if one_system != single:
        yield one_system
    merged = merged_neighbours(one_system)
    if merged != one_system:
        yield merged


def completed(tools: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Tools with an empty description and parameters where they have none, for templates that read them unasked."""
    return [{**tool, "function": _described({"parameters": _NO_PARAMETERS, **tool["function"]})} for tool in tools]


def _described(function: Mapping[str, Any]) -> Message:
    parameters = function["parameters"]
    properties = {
        name: {"type": "", "description": "", **one} if isinstance(one, dict) else one
        for name, one in (parameters.get("properties") or {}).items()
    }
    return {"description": "", **function, "parameters": {**parameters, "properties": properties}}


def _message(message: Mapping[str, Any], format: Format) -> Message:
    fit = dict(message)
    content = fit.get("content")
    if isinstance(content, list):
        content = text_of(content)
    calls = fit.get("tool_calls")
    fit["content"] = None if calls and not content and format.content_none else content or ""
    if calls:
        fit["tool_calls"] = [_call(call, as_text=format.arguments_text) for call in calls]
    reasoning = fit.get("reasoning_content")
    if reasoning and format.thinking is not None and format.thinking.field:
        fit[format.thinking.field] = reasoning
    return fit


def _call(call: Mapping[str, Any], *, as_text: bool) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str) and not as_text:
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments}}


def _name_results(messages: Iterable[Message]) -> None:
    """Results name the call that they belong to; some templates want the tool's name with them."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call.get("id", "")] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]


def _shorten_ids(messages: Iterable[Message], length: int) -> None:
    """Ids of calls in the one length that the template takes; equal ones stay equal."""

    def short(id: str) -> str:
        if len(id) == length and id.isascii() and id.isalnum():
            return id
        number, letters = int.from_bytes(blake2b(id.encode()).digest(), "big"), []
        for _ in range(length):
            number, at = divmod(number, len(_LETTERS))
            letters.append(_LETTERS[at])
        return "".join(letters)

    for message in messages:
        if message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": short(call.get("id", ""))} for call in message["tool_calls"]]
        if message.get("tool_call_id"):
            message["tool_call_id"] = short(message["tool_call_id"])


def _told(tools: Sequence[Mapping[str, Any]], calls: Calls | None) -> str:
    return generic.preamble(tools, calls) if calls is not None else generic.preamble(tools)


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []


def text_of(content: Any) -> str:
    """Content as one text."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def _joined(texts: Iterable[str | None]) -> str:
    return _GAP.join(text for text in texts if text)
