"""What the tests of formats share: templates, a way to render them, and conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2.sandbox import SandboxedEnvironment

from llmnode.chat import generic
from llmnode.chat.derive import derive
from llmnode.chat.format import Format

OURS = Path(__file__).parent / "data" / "templates"
COLLECTION = Path(__file__).resolve().parents[3] / "shared" / "data" / "chat-templates"
"""Templates as their makers published them, where they are at hand."""
PATHS = {path.stem: path for folder in (OURS, COLLECTION) for path in sorted(folder.glob("*.jinja"))}
BOS, EOS = "<s>", "</s>"


def renderer(source: str) -> Callable[..., str]:
    """`render` as derive.py wants it. Namespaces hold lists that templates append to, hence no immutable sandbox."""
    environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **given: json.dumps(value, **{"ensure_ascii": False, **given})

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    environment.globals.update(
        raise_exception=refuse,
        strftime_now=lambda form: datetime(2031, 5, 4).strftime(form),
        bos_token=BOS,
        eos_token=EOS,
    )
    template = environment.from_string(source)

    def render(
        messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = True, **keywords: Any
    ) -> str:
        if tools is not None:
            keywords["tools"] = tools
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **keywords)

    return render


@cache
def source(name: str) -> str:
    return PATHS[name].read_text(encoding="utf-8")


@cache
def format_of(name: str) -> Format:
    return derive(renderer(source(name)), source(name))


def tool(name: str, properties: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {
                "type": "object",
                "properties": {key: {"description": f"The {key}.", **value} for key, value in properties.items()},
                "required": list(required),
                "additionalProperties": False,
            },
        },
    }


TOOLS = [
    tool("get_weather", {"city": {"type": "string"}, "days": {"type": "integer"}}, ["city"]),
    tool(
        "write-file",
        {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "mode": {"type": "object", "properties": {"deep": {"type": "array", "items": {"type": "number"}}}},
            "tags": {"type": "array", "items": {"type": "string"}},
            "force": {"type": "boolean"},
            "size": {"type": "number"},
        },
    ),
    tool("now", {}),
]
Calls = Sequence[tuple[str, Mapping[str, Any]]]


def answer(name: str, calls: Calls = (), content: str = "", reasoning: str = "") -> str | None:
    """What the model would write for this message, by its template: the difference to the prompt. None where the
    template refuses."""
    format, render = format_of(name), renderer(source(name))
    user: dict[str, Any] = {"role": "user", "content": "Please do."}
    message: dict[str, Any] = {"role": "assistant", "content": content}
    keywords: dict[str, Any] = {}
    if format.thinking is not None and format.thinking.field:
        message[format.thinking.field] = reasoning
        keywords = {"enable_thinking": True, "thinking": True}
    if calls:
        if format.content_none and not content:
            message["content"] = None
        message["tool_calls"] = [
            {
                "id": f"call{number:05}",
                "type": "function",
                "function": {
                    "name": tool,
                    "arguments": json.dumps(given, ensure_ascii=False) if format.arguments_text else given,
                },
            }
            for number, (tool, given) in enumerate(calls)
        ]
    if format.generic:
        message = generic.written([message], [])[0]
    try:
        prompt = render([user], TOOLS, True, **keywords)
        text = render([user, message], TOOLS, False, **keywords)
    except Exception:
        return None
    after, tail = text[text.rindex("Please do.") :], prompt[prompt.rindex("Please do.") :]
    thinking = format.thinking
    if thinking is not None and format.channels is None and thinking.start in tail:
        # Some prompts begin the reasoning, or begin and end it. The whole of it is part of the answer here.
        tail = tail[: tail.rindex(thinking.start)]
    elif thinking is not None and format.channels is None:
        tail = tail.removesuffix(thinking.end)
    if not after.startswith(tail):
        return None
    said = after[len(tail) :]
    # What ends a turn is an end token, which no parser sees. Some templates go on with the beginning of the next turn.
    for end in format.turn_ends:
        said = said.split(end)[0] if end.strip() else said.removesuffix(end)
    return said
