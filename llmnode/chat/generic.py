"""Calls of tools for models whose template knows none.

Owns: the words in which such a model is told of its tools, and how earlier calls and results are written in plain
messages. Refuses to know: templates, how answers are read.

The layout is the one that most models have seen, whoever trained them: tools as JSON in `<tools>`, a call as JSON in
`<tool_call>`, a result in `<tool_response>` (Nous Research's Hermes, Qwen, Granite).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmnode.chat.format import Calls, Keys, Slot, Values

CALLS = Calls(
    call=('<tool_call>\n{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}\n</tool_call>"),
    separator="\n",
    parallel=True,
    keys=Keys(("name",), ("arguments",), ("name", "arguments")),
)


def example(calls: Calls) -> str:
    """A call as the format has it, for a model to follow."""
    members = calls.members
    if members is None:
        arguments = '{"ARGUMENT": "VALUE"}'
    else:
        quote = "" if members.values is Values.TEXT else members.quote
        arguments = f"{members.key_start}ARGUMENT{members.key_end}{quote}VALUE{quote}{members.value_end}"
    fills = {Slot.NAME: "NAME", Slot.ARGUMENTS: arguments, Slot.INDEX: "0", Slot.ID: "000000000"}
    call = "".join(part if isinstance(part, str) else fills[part] for part in calls.call)
    return f"{calls.section[0]}{call}{calls.section[1]}".strip()


def preamble(tools: Iterable[Mapping[str, Any]], calls: Calls = CALLS) -> str:
    """What the system message says of the tools, each as OpenAI's API has it: for templates that tell of none."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\n"
        f"These functions can be called, each given by its JSON schema:\n<tools>\n{listed}\n</tools>\n\n"
        f"To call one, write exactly this, with its name and arguments:\n{example(calls)}"
    )


def written(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in system, user and assistant messages of plain text.

    The tools are told in the system message, calls in the assistant's text, results in the user's, several together
    and with the user's next words, since many templates want the two to take turns.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        role, content = message.get("role"), message.get("content") or ""
        if role == "assistant" and message.get("tool_calls"):
            calls = [_call(call) for call in message["tool_calls"]]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append({**rest, "content": "\n".join(filter(None, [content, *calls]))})
        elif role == "tool":
            _add(plain, f"<tool_response>\n{content}\n</tool_response>")
        elif role == "user" and plain and plain[-1].get("role") == "user" and isinstance(content, str):
            _add(plain, content)
        else:
            plain.append(dict(message))
    if tools:
        told = preamble(tools)
        if plain and plain[0].get("role") == "system":
            plain[0]["content"] = f"{plain[0].get('content') or ''}\n\n{told}".strip()
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain


def _add(plain: list[dict[str, Any]], text: str) -> None:
    if plain and plain[-1].get("role") == "user" and isinstance(plain[-1].get("content"), str):
        plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{text}"}
    else:
        plain.append({"role": "user", "content": text})


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function") or call
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {text or "{}"}}}\n</tool_call>'
