"""What templates do not show: the few things about answers that are known from elsewhere, each with its reason.

Owns: this list. Refuses to know: models by name. Each exception is for a trait that derive.py has found in a template.
"""

from __future__ import annotations

import re
from dataclasses import replace

from llmnode.chat.format import Channels, Format, Slot, Thinking

_CHANNEL = re.compile(r"^(<[^<>\s]+>)(\w+)(<[^<>\s]+>)$")
_CONSTRAINT = "<|constrain|>"


def thinking_of(source: str) -> Thinking | None:
    """Exception 1: a template that strips earlier reasoning, has no switch, and leaves it to the model to begin.
    No rendering shows the markers then; the template's text does, where it cuts the reasoning away. Only the pair that
    such templates have in common is looked for."""
    if "</think>" in source:
        return Thinking("<think>", "</think>", "\n\n")
    return None


def applied(format: Format) -> Format:
    """Exception 2: channels. A template in which reasoning and content are both `<a>WORD<b>` writes its answers as
    messages with headers. In its calls templates write ` to=functions.NAME<a>commentary json<b>`, and models write
    `<a>commentary to=functions.NAME <|constrain|>json<b>`, which means the same and is what their makers document
    (OpenAI's harmony format, "Receiving tool calls"). No rendering shows that form nor `<|constrain|>`."""
    if format.thinking is None or format.calls is None:
        return format
    reasoning, content = _CHANNEL.match(format.thinking.start), _CHANNEL.match(format.content[0])
    if reasoning is None or content is None or reasoning.group(1, 3) != content.group(1, 3):
        return format
    call = format.calls.call
    texts = "".join(part for part in call if not isinstance(part, Slot))
    channel = re.search(re.escape(reasoning[1]) + r"(\w+)", texts)
    namespace = re.search(r"to=(\S*)$", call[0] if isinstance(call[0], str) else "")
    last = call[-1] if isinstance(call[-1], str) else ""
    if channel is None or namespace is None:
        return replace(format, calls=None, why="the template's channels are not of a known kind")
    ends = dict.fromkeys(text for text in (format.thinking.end, last, *format.turn_ends) if text)
    return replace(
        format,
        beside=False,  # templates put such content into the channel for reasoning
        channels=Channels(
            start=format.generation_prompt,
            channel=reasoning[1],
            message=reasoning[3],
            ends=tuple(ends),
            reasoning=reasoning[2],
            content=content[2],
            calls=channel[1],
            namespace=namespace[1],
            constraint=_CONSTRAINT,
        ),
    )
