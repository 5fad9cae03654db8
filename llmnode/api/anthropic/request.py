"""Bodies of /v1/messages in the words of chat.

Owns: what each field and block of Anthropic's Messages API comes to, and which are refused or only advice; the page of
fields in docs/api.md is kept equal to the tables here. Refuses to know: how an answer is written, and what chat does.
What is a block here is a message or a field there:

    system                        a message of the role system, first
    text                          text of its message
    thinking                      reasoning_content of its message
    tool_use                      one of tool_calls of its message
    tool_result                   a message of the role tool

Source of names and shapes: Anthropic's API reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmnode.api import translation
from llmnode.api.fields import Fields, kind
from llmnode.api.names import Names
from llmnode.api.translation import Translation
from llmnode.wire.errors import InvalidRequest

HONOURED = (
    "max_tokens",
    "messages",
    "output_config",
    "output_format",
    "stop_sequences",
    "system",
    "thinking",
    "tool_choice",
    "tools",
)
"""Fields of its own that this endpoint knows; beside them those of `translation.SHARED`."""

ADVICE = (
    "betas",
    "cache_control",
    "context_management",
    "diagnostics",
    "inference_geo",
    "metadata",
    "service_tier",
    "speed",
    "user_profile_id",
    "workspace_id",
)
"""Fields that have no effect, like any that nobody has heard of."""

REFUSED: Mapping[str, tuple[Any, ...]] = {"container": (), "mcp_servers": ([],)}
"""Fields that change the answer in ways this node does not know, with the values that ask for nothing."""

_NAMES = (
    (r"stop(?!_)", "stop_sequences"),
    (r"max_completion_tokens", "max_tokens"),
    (r"tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"tool_choice\.function\.name", "tool_choice.name"),
    (r"tool_choice\.function", "tool_choice"),
    (r"parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    (r"reasoning_effort", "output_config.effort"),
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_BILLING = "x-anthropic-billing-header:"
"""Claude Code puts a line of this kind in front of its system text, with a checksum that differs in every request. It
is not meant for the model, and would keep every prompt from being found in the cache."""


def translate(body: Mapping[str, Any]) -> Translation:
    """Raises InvalidRequest, which names what the client wrote."""
    fields = Fields(body)
    said = _Conversation(fields.advice)
    said.system(fields)
    for message in _messages(fields):
        said.message(message)
    chat = translation.shared(fields)
    chat["messages"] = said.messages
    for ours, theirs in (("max_tokens", "max_tokens"), ("stop_sequences", "stop")):
        if (value := fields.get(ours)) is not None and value != []:
            chat[theirs] = value
    chat |= _tools(fields) | _tool_choice(fields) | _thinking(fields) | _output(fields)
    fields.refuse(REFUSED)
    format = "output_format" if fields.get("output_format") is not None else "output_config.format"
    table = [(r"response_format(\.json_schema)?", format), *_NAMES]
    if fields.get("thinking") is not None:
        table.append((r"(enable_thinking|thinking_budget_tokens)", "thinking"))
    names = Names(table, said.places)
    return Translation(chat, names, tuple(fields.rest()))


class _Conversation:
    """Chat's messages as they come together. `places`: where each of them came from.    advice: what had no effect."""

    def __init__(self, advice: list[str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self._advice = advice

    def system(self, fields: Fields) -> None:
        value = fields.get("system")
        if value is None or value == "" or value == []:
            return
        if isinstance(value, str):
            self._add("system", value, "system")
            return
        parts = [self._text(block) for block in translation.objects(fields, "system") if not self._is_billing(block)]
        if parts:
            self._add("system", parts, "system")

    def message(self, fields: Fields) -> None:
        at = fields.place
        role = fields.get("role")
        if role not in ("user", "assistant", "system"):
            raise fields.wrong("role", "must be user, assistant or system", role)
        content = fields.get("content")
        if isinstance(content, str):
            self._add(role, content, at)
        elif role == "assistant":
            self._assistant(fields, at)
        else:
            self._user(fields, role, at)
        self._advice += fields.rest()

    def _assistant(self, fields: Fields, at: str) -> None:
        texts: list[dict[str, Any]] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for block in _blocks(fields):
            match block.get("type"):
                case "text":
                    texts.append(self._text(block))
                    continue
                case "thinking":
                    thoughts.append(translation.text(block, "thinking"))
                    block.get("signature")
                case "redacted_thinking":
                    self._advice.append(block.place)  # nobody but Anthropic can read it
                    block.get("data")
                case "tool_use":
                    calls.append(_call(block))
                    block.refuse({"caller": ({"type": "direct"},), "toolset_name": ()})
                case _:
                    raise translation.no_part(block, "text, thinking, redacted_thinking or tool_use")
            self._advice += block.rest()
        message: dict[str, Any] = {"role": "assistant", "content": texts or ""}
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)
        self.places.append(at)

    def _user(self, fields: Fields, role: str, at: str) -> None:
        """Results of tools become messages of their own, in the order in which they stand among the texts."""
        texts: list[dict[str, Any]] = []
        for block in _blocks(fields):
            match block.get("type"):
                case "text":
                    texts.append(self._text(block))
                case "tool_result" if role == "user":
                    if texts:
                        self._add(role, texts, at)
                        texts = []
                    self._result(block)
                case _:
                    raise translation.no_part(block, "text or tool_result" if role == "user" else "text")
        if texts:
            self._add(role, texts, at)

    def _result(self, block: Fields) -> None:
        id = translation.text(block, "tool_use_id")
        content = block.get("content")
        if content is None:
            content = ""
        elif not isinstance(content, str):
            parts = translation.objects(block, "content")
            for part in parts:
                if part.get("type") != "text":
                    raise translation.no_part(part, "text")
            content = [self._text(part) for part in parts] or ""
        if block.flag("is_error"):
            self._advice.append(f"{block.place}.is_error")  # what went wrong is in the content
        block.refuse({"toolset_name": ()})
        self._advice += block.rest()
        self.messages.append({"role": "tool", "tool_call_id": id, "content": content})
        self.places.append(block.place)

    def _text(self, block: Fields) -> dict[str, Any]:
        if block.get("type") != "text":
            raise translation.no_part(block, "text")
        part = {"type": "text", "text": translation.text(block, "text")}
        self._advice += block.rest()
        return part

    def _is_billing(self, block: Fields) -> bool:
        text = block.get("text")
        found = isinstance(text, str) and text.startswith(_BILLING)
        if found:
            self._advice.append(block.place)
        return found

    def _add(self, role: str, content: str | list[dict[str, Any]], at: str) -> None:
        self.messages.append({"role": role, "content": content})
        self.places.append(at)


def _messages(fields: Fields) -> list[Fields]:
    found = translation.objects(fields, "messages")
    if not found:
        value = fields.get("messages")
        raise InvalidRequest(f"messages must be a list with at least one message, got {kind(value)}", param="messages")
    return found


def _blocks(message: Fields) -> list[Fields]:
    found = translation.objects(message, "content")
    if not found:
        value = message.get("content")
        at = f"{message.place}.content"
        raise InvalidRequest(f"{at} must be a text or a list of blocks, got {kind(value)}", param=at)
    return found


def _call(block: Fields) -> dict[str, Any]:
    name = translation.text(block, "name")
    arguments = block.object("input")
    if arguments is None:
        raise block.wrong("input", "must be an object", arguments)
    written = json.dumps(arguments, ensure_ascii=False)
    id = translation.text(block, "id")
    return {"id": id, "type": "function", "function": {"name": name, "arguments": written}}


def _tools(fields: Fields) -> dict[str, Any]:
    tools = []
    for tool in translation.objects(fields, "tools"):
        if tool.get("type") not in (None, "custom"):
            raise tool.wrong(
                "type",
                "must be custom, or be left out: tools that Anthropic defines are not known here",
                tool.get("type"),
                "unsupported_parameter",
            )
        schema = tool.object("input_schema")
        if schema is None:
            raise tool.wrong("input_schema", "must be an object", schema)
        function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": schema}
        if tool.get("strict") is not None:
            function["strict"] = tool.flag("strict")
        tool.refuse({"allowed_callers": (["direct"], [])})
        fields.advice += tool.rest()
        tools.append({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})
    return {"tools": tools} if tools else {}


def _tool_choice(fields: Fields) -> dict[str, Any]:
    value = fields.object("tool_choice")
    if value is None:
        return {}
    choice = Fields(value, "tool_choice.")
    said: dict[str, Any] = {}
    type = choice.get("type")
    if type == "tool":
        said["tool_choice"] = {
            "type": "function",
            "function": {"name": translation.text(choice, "name")},
        }
    elif type in _CHOICES:
        said["tool_choice"] = _CHOICES[type]
    else:
        raise choice.wrong("type", "must be auto, any, tool or none", type)
    if choice.flag("disable_parallel_tool_use"):
        said["parallel_tool_calls"] = False
    fields.advice += choice.rest()
    return said


def _thinking(fields: Fields) -> dict[str, Any]:
    value = fields.object("thinking")
    if value is None:
        return {}
    thinking = Fields(value, "thinking.")
    type = thinking.get("type")
    if type not in ("enabled", "adaptive", "disabled", "between_tools"):
        raise thinking.wrong("type", "must be enabled, adaptive or disabled", type)
    said: dict[str, Any] = {"enable_thinking": type != "disabled"}
    budget = thinking.whole("budget_tokens", 1)
    if budget is not None and type == "enabled":
        said["thinking_budget_tokens"] = budget
    display = thinking.get("display")
    if display not in (None, "summarized", "omitted"):
        raise thinking.wrong("display", "must be summarized or omitted", display)
    fields.advice += thinking.rest()
    return said


def _output(fields: Fields) -> dict[str, Any]:
    """`output_config`, and `output_format`, which is what its format was called before."""
    value = fields.object("output_config") or {}
    config = Fields(value, "output_config.")
    said: dict[str, Any] = {}
    effort = config.get("effort")
    if effort is not None:
        if not isinstance(effort, str):
            raise config.wrong("effort", "must be a text", effort)
        said["reasoning_effort"] = "xhigh" if effort == "max" else effort
    format, place = config.object("format"), "output_config.format."
    if format is None:
        format, place = fields.object("output_format"), "output_format."
    elif fields.get("output_format") is not None:
        raise InvalidRequest(
            "output_format and output_config.format contradict each other: send one", param="output_format"
        )
    if format is not None:
        inner = Fields(format, place)
        if inner.get("type") != "json_schema":
            raise inner.wrong("type", "must be json_schema", inner.get("type"))
        schema = inner.object("schema")
        if schema is None:
            raise inner.wrong("schema", "must be an object", schema)
        said["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
        fields.advice += inner.rest()
    fields.advice += config.rest()
    return said
