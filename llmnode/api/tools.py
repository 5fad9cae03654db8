"""Reads the tools of a chat, and which of them may or must be called.

Owns: what a tool may be, the limits on its schema. Refuses to know: how a model calls, and how schemas are enforced.
Source of names and shapes: OpenAI's API reference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmnode.api.fields import Fields, kind
from llmnode.wire.errors import InvalidRequest

Tool = Mapping[str, Any]
"""`{"type": "function", "function": {"name", "description"?, "parameters"?, "strict"?}}`"""

_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class ToolUse:
    """listed: what the model is told of.       callable: of these, those that it may call now.

    mode: `auto` lets the model choose, `required` wants a call.        parallel: more than one in an answer.
    strict: names of tools whose schemas must be held also where the model chooses.
    """

    listed: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    mode: Literal["auto", "required"] = "auto"
    parallel: bool = True

    @property
    def strict(self) -> bool:
        """Whether a tool asks that its schema be held in any case."""
        return any(tool["function"].get("strict") for tool in self.callable)


NO_TOOLS = ToolUse()


@dataclass(frozen=True)
class SchemaLimits:
    """Of a JSON schema: its length as JSON, and how deep it is nested."""

    bytes: int = 65_536
    depth: int = 64

    def check(self, schema: Any, param: str) -> None:
        """Raises InvalidRequest."""
        depth = _depth(schema, self.depth)
        if depth > self.depth:
            raise InvalidRequest(f"{param} may be nested {self.depth} levels deep at most", param=param)
        size = len(json.dumps(schema, ensure_ascii=False).encode())
        if size > self.bytes:
            raise InvalidRequest(f"{param} may hold {self.bytes} bytes at most, got {size}", param=param)


def read(fields: Fields, most: int, limits: SchemaLimits) -> ToolUse:
    """What a request says of tools. Raises InvalidRequest."""
    value = fields.get("tools")
    if value is not None and not isinstance(value, list):
        raise fields.wrong("tools", "must be a list of tools", value)
    if value and len(value) > most:
        raise InvalidRequest(f"tools may hold {most} tools at most, got {len(value)}", param="tools")
    tools: dict[str, Tool] = {}
    for index, item in enumerate(value or ()):
        tool = _tool(item, f"tools[{index}]", fields.advice, limits)
        name = tool["function"]["name"]
        if name in tools:
            raise InvalidRequest(f"tools[{index}].function.name {name!r} is there twice", param=f"tools[{index}]")
        tools[name] = tool
    parallel = fields.get("parallel_tool_calls")
    if parallel is not None:
        parallel = fields.flag("parallel_tool_calls")
    use = _choice(fields, tools)
    return ToolUse(use.listed, use.callable, use.mode, parallel is not False)


def _tool(value: Any, at: str, advice: list[str], limits: SchemaLimits) -> Tool:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{at} must be an object with a function, got {kind(value)}", param=at)
    tool = Fields(value, at + ".")
    if tool.get("type") not in (None, "function"):
        raise tool.wrong("type", "must be function", tool.get("type"), "unsupported_parameter")
    function = tool.object("function")
    if function is None:
        raise tool.wrong("function", "must be an object with a name", function)
    inner = Fields(function, f"{at}.function.")
    name, description = inner.get("name"), inner.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise inner.wrong("name", "must be 1 to 128 letters, digits and _ - . :", name)
    if description is not None and not isinstance(description, str):
        raise inner.wrong("description", "must be a text", description)
    parameters = inner.object("parameters")
    read: dict[str, Any] = {"name": name}
    if description:
        read["description"] = description
    if parameters is not None:
        limits.check(parameters, f"{at}.function.parameters")
        read["parameters"] = parameters
    if inner.flag("strict"):
        read["strict"] = True
    advice += tool.rest() + inner.rest()
    return {"type": "function", "function": read}


def _choice(fields: Fields, tools: Mapping[str, Tool]) -> ToolUse:
    value = fields.get("tool_choice")
    everything = tuple(tools.values())
    if not tools:
        if value not in (None, "none", "auto"):
            raise fields.wrong("tool_choice", "needs tools", value)
        return NO_TOOLS
    if value is None or value == "auto":
        return ToolUse(everything, everything)
    if value == "none":
        return NO_TOOLS
    if value in ("required", "any"):
        return ToolUse(everything, everything, "required")
    if not isinstance(value, dict):
        raise fields.wrong("tool_choice", "must be none, auto, required or an object that names a function", value)
    choice = Fields(value, "tool_choice.")
    type = choice.get("type")
    if type == "function":
        return ToolUse(everything, (_named(choice.object("function"), "tool_choice.function", tools),), "required")
    if type == "allowed_tools":
        return _allowed(choice, tools)
    raise choice.wrong("type", "must be function or allowed_tools", type, "unsupported_parameter")


def _allowed(choice: Fields, tools: Mapping[str, Tool]) -> ToolUse:
    at = "tool_choice.allowed_tools"
    inner = Fields(choice.object("allowed_tools") or {}, at + ".")
    mode, listed = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required"):
        raise inner.wrong("mode", "must be auto or required", mode)
    if not isinstance(listed, list) or not listed:
        raise inner.wrong("tools", "must be a list with at least one tool", listed)
    allowed = [
        _named(item.get("function") if isinstance(item, dict) else item, f"{at}.tools[{index}].function", tools)
        for index, item in enumerate(listed)
    ]
    return ToolUse(tuple(tools.values()), tuple(allowed), "required" if mode == "required" else "auto")


def _named(function: Any, at: str, tools: Mapping[str, Tool]) -> Tool:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in tools:
        known = ", ".join(tools)
        raise InvalidRequest(f"{at}.name must be the name of one of the tools ({known}), got {name!r}", param=at)
    return tools[name]


def _depth(value: Any, most: int) -> int:
    """How deep a JSON value is nested; looks no further than one beyond `most`."""
    level, depth = [value], 0
    while level and depth <= most:
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, (dict, list))
        ]
        depth += 1
    return depth
