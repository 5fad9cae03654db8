"""Bodies of /v1/responses in the words of chat.

Owns: what each field and item of OpenAI's Responses API comes to, and which are refused or only advice; the page of
fields in docs/api.md is kept equal to the tables here. Refuses to know: how an answer is written, and what chat does.
This server keeps no answers: whoever goes on with one sends its items back. An item comes to

    message                       a message
    reasoning                     reasoning_content of the assistant's message that it belongs to
    function_call                 one of tool_calls of the assistant's message that it belongs to
    function_call_output          a message of the role tool

where items of the assistant that follow each other belong to one message. Source of names and shapes: OpenAI's API
reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmnode.api import translation
from llmnode.api.fields import Fields, kind
from llmnode.api.names import Names
from llmnode.api.translation import Translation
from llmnode.wire.errors import InvalidRequest

HONOURED = (
    "include",
    "input",
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "reasoning",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
)
"""Fields of its own that this endpoint knows; beside them those of `translation.SHARED`."""

ADVICE = (
    "max_tool_calls",
    "moderation",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "truncation",
    "user",
)
"""Fields that have no effect, like any that nobody has heard of. `max_tool_calls` counts calls of built-in tools, of
which there are none; a prompt that does not fit is refused whatever `truncation` says."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
}
"""Fields that change the answer in ways this node does not know, with the values that ask for nothing."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncation": ("disabled",),
}
"""Values of advice that ask for what is done anyway: they are not named as ignored."""

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    LOGPROBS,
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)

_NAMES = (
    (r"max_(completion_)?tokens", "max_output_tokens"),
    (r"messages", "input"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"tool_choice\.function", "tool_choice"),
    (r"tool_choice\.allowed_tools", "tool_choice"),
    (r"response_format(\.json_schema)?", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"verbosity", "text.verbosity"),
    (r"logprobs", "include"),
)
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def translate(body: Mapping[str, Any]) -> Translation:
    """Raises InvalidRequest, which names what the client wrote."""
    fields = Fields(body)
    said = _Conversation(fields.advice)
    instructions = fields.get("instructions")
    if instructions is not None:
        said.add("system", translation.text(fields, "instructions"), "instructions")
    said.input(fields)
    chat = translation.shared(fields)
    chat["messages"] = said.messages
    for ours, theirs in (("max_output_tokens", "max_completion_tokens"), ("parallel_tool_calls",) * 2):
        if (value := fields.get(ours)) is not None:
            chat[theirs] = value
    chat |= _tools(fields) | _tool_choice(fields) | _reasoning(fields) | _text(fields) | _logprobs(fields)
    metadata(fields)
    fields.refuse(REFUSED, "is not supported by this server, which keeps no answers")
    _advice(fields)
    return Translation(chat, Names(_NAMES, said.places), tuple(fields.rest()))


def metadata(fields: Fields) -> dict[str, Any]:
    """What a client wants to find in the answer again. Raises InvalidRequest."""
    value = fields.object("metadata") or {}
    if len(value) > 16 or not all(isinstance(text, str) and len(text) <= 512 for text in value.values()):
        raise InvalidRequest("metadata may hold 16 texts of 512 characters at most", param="metadata")
    return value


class _Conversation:
    """Chat's messages as they come together. `places`: where each of them came from.    advice: what had no effect."""

    def __init__(self, advice: list[str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self._advice = advice
        self._open = False  # the last message is the assistant's, and its next item belongs to it

    def input(self, fields: Fields) -> None:
        value = fields.get("input")
        if isinstance(value, str) and value:
            self.add("user", value, "input")
            return
        items = translation.objects(fields, "input") if isinstance(value, list) else []
        if not items:
            raise InvalidRequest(
                f"input must be a text or a list of items, not empty, got {kind(value)}", param="input"
            )
        for item in items:
            self._item(item)

    def _item(self, item: Fields) -> None:
        type = item.get("type")
        if type is None and item.get("role") is not None:
            type = "message"
        item.get("id")
        item.get("status")
        match type:
            case "message":
                self._message(item)
            case "reasoning":
                self._reasoning(item)
            case "function_call":
                self._call(item)
            case "function_call_output":
                id = translation.text(item, "call_id")
                self.add("tool", _content(item, "output", self._advice), item.place, tool_call_id=id)
                item.refuse({"caller": ({"type": "direct"},)})
            case _:
                known = "message, function_call, function_call_output and reasoning"
                raise item.wrong("type", f"must be one of {known}", type, "unsupported_parameter")
        self._advice += item.rest()

    def _message(self, item: Fields) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise item.wrong("role", f"must be one of {', '.join(_ROLES)}", role)
        content = _content(item, "content", self._advice)
        if role != "assistant":
            self.add(role, content, item.place)
            return
        item.get("phase")
        message = self._assistant(item)
        if message["content"] or "tool_calls" in message:
            self._open = False  # a second text is a message of its own
            message = self._assistant(item)
        message["content"] = content

    def _reasoning(self, item: Fields) -> None:
        """Its text, or the summary where that is all there is."""
        if item.get("encrypted_content") is not None:
            self._advice.append(f"{item.place}.encrypted_content")
        texts = [
            translation.text(part, "text")
            for name in ("content", "summary")
            for part in translation.objects(item, name)
            if part.get("type") in _TEXTS
        ]
        if not texts:
            return
        message = self._assistant(item)
        if message["content"] or "tool_calls" in message:
            self._open = False
            message = self._assistant(item)
        message["reasoning_content"] = message.get("reasoning_content", "") + texts[0]

    def _call(self, item: Fields) -> None:
        call = {
            "id": translation.text(item, "call_id"),
            "type": "function",
            "function": {"name": translation.text(item, "name"), "arguments": translation.text(item, "arguments")},
        }
        item.refuse({"caller": ({"type": "direct"},), "namespace": ()})
        self._assistant(item).setdefault("tool_calls", []).append(call)

    def _assistant(self, item: Fields) -> dict[str, Any]:
        if not self._open:
            self.add("assistant", "", item.place)
            self._open = True
        return self.messages[-1]

    def add(self, role: str, content: str | list[dict[str, Any]], at: str, **more: str) -> None:
        self._open = False
        self.messages.append({"role": role, "content": content, **more})
        self.places.append(at)


def _content(item: Fields, name: str, advice: list[str]) -> str | list[dict[str, Any]]:
    value = item.get(name)
    if isinstance(value, str):
        return value
    parts = translation.objects(item, name) if isinstance(value, list) else []
    if not parts and value != []:
        raise item.wrong(name, "must be a text or a list of parts", value)
    texts = []
    for part in parts:
        type = part.get("type")
        if type == "refusal":
            texts.append({"type": "text", "text": translation.text(part, "refusal")})
        elif type in _TEXTS:
            texts.append({"type": "text", "text": translation.text(part, "text")})
            part.get("annotations")
            part.get("logprobs")
        else:
            raise translation.no_part(part, "input_text or output_text")
        advice += part.rest()
    return texts or ""


def _tools(fields: Fields) -> dict[str, Any]:
    tools = []
    for tool in translation.objects(fields, "tools"):
        if tool.get("type") != "function":
            raise tool.wrong(
                "type", "must be function: there are no built-in tools here", tool.get("type"), "unsupported_parameter"
            )
        function = {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.object("parameters"),
            "strict": tool.get("strict"),
        }
        tool.refuse({"allowed_callers": (["direct"], []), "async": (False,)})
        fields.advice += tool.rest()
        tools.append({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})
    return {"tools": tools} if tools else {}


def _tool_choice(fields: Fields) -> dict[str, Any]:
    value = fields.get("tool_choice")
    if value is None or isinstance(value, str):
        return {} if value is None else {"tool_choice": value}
    choice = Fields(fields.object("tool_choice") or {}, "tool_choice.")
    type = choice.get("type")
    if type == "function":
        function = {"name": translation.text(choice, "name")}
        fields.advice += choice.rest()
        return {"tool_choice": {"type": "function", "function": function}}
    if type == "allowed_tools":
        allowed = [
            {"type": "function", "function": {"name": _allowed(tool)}} for tool in translation.objects(choice, "tools")
        ]
        inner = {"mode": choice.get("mode"), "tools": allowed}
        fields.advice += choice.rest()
        return {"tool_choice": {"type": "allowed_tools", "allowed_tools": inner}}
    raise choice.wrong("type", "must be function or allowed_tools", type, "unsupported_parameter")


def _allowed(tool: Fields) -> str:
    if tool.get("type") != "function":
        raise tool.wrong("type", "must be function", tool.get("type"), "unsupported_parameter")
    return translation.text(tool, "name")


def _reasoning(fields: Fields) -> dict[str, Any]:
    """`summary` is advice: what the model thinks is told as it is."""
    reasoning = Fields(fields.object("reasoning") or {}, "reasoning.")
    effort = reasoning.get("effort")
    fields.advice += reasoning.rest()
    return {} if effort is None else {"reasoning_effort": effort}


def _text(fields: Fields) -> dict[str, Any]:
    text = Fields(fields.object("text") or {}, "text.")
    said: dict[str, Any] = {}
    verbosity = text.get("verbosity")
    if verbosity is not None:
        said["verbosity"] = verbosity
    format = text.object("format")
    if format is not None:
        inner = Fields(format, "text.format.")
        type = inner.get("type")
        if type == "json_schema":
            schema = inner.object("schema")
            if schema is None:
                raise inner.wrong("schema", "must be an object", schema)
            named = {"name": inner.get("name"), "schema": schema, "strict": inner.get("strict")}
            inner.get("description")  # of the schema, as its name is
            given = {name: value for name, value in named.items() if value is not None}
            said["response_format"] = {"type": "json_schema", "json_schema": given}
        elif type == "json_object":
            said["response_format"] = {"type": "json_object"}
        elif type != "text":
            raise inner.wrong("type", "must be text, json_object or json_schema", type)
        fields.advice += inner.rest()
    fields.advice += text.rest()
    return said


def _logprobs(fields: Fields) -> dict[str, Any]:
    include = fields.texts("include", len(INCLUDABLE), 64) or ()
    for index, name in enumerate(include):
        if name not in INCLUDABLE:
            raise fields.wrong(f"include[{index}]", f"must be one of {', '.join(INCLUDABLE)}", name)
        if name != LOGPROBS:
            fields.advice.append(f"include[{index}]")
    top = fields.whole("top_logprobs", 0, 20)
    if LOGPROBS in include:
        return {"logprobs": True, "top_logprobs": top or 0}
    if top:
        raise fields.wrong("top_logprobs", f"is only allowed with {LOGPROBS} in include", top)
    return {}


def _advice(fields: Fields) -> None:
    for name, neutral in NEUTRAL.items():
        value = fields.body.get(name)
        if any(value is same or (isinstance(value, str) and value == same) for same in neutral):
            fields.get(name)
    options = fields.object("stream_options")
    if options is not None:
        inner = Fields(options, "stream_options.")
        if inner.body.get("include_obfuscation") is False:
            inner.get("include_obfuscation")
        fields.advice += inner.rest()
