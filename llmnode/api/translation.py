"""A request in the words of chat: what endpoints with shapes of their own come to, and their names for what chat says.

/v1/messages and /v1/responses are no second way to the engine: each writes its body down as the body of a chat
completion, and schema.py reads that. Owns what the two have in common. Refuses to know: any endpoint's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmnode.api import schema
from llmnode.api.fields import Fields, kind
from llmnode.api.names import Names
from llmnode.api.rules import Rules
from llmnode.api.schema import ChatRequest
from llmnode.wire.errors import InvalidRequest

SHARED = (
    "chat_template_kwargs",
    "dry_allowed_length",
    "dry_base",
    "dry_multiplier",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "enable_thinking",
    "frequency_penalty",
    "grammar",
    "ignore_eos",
    "json_schema",
    "logit_bias",
    "min_p",
    "mirostat",
    "mirostat_eta",
    "mirostat_tau",
    "model",
    "presence_penalty",
    "repeat_last_n",
    "repeat_penalty",
    "repetition_penalty",
    "seed",
    "stream",
    "temperature",
    "thinking_budget_tokens",
    "top_k",
    "top_n_sigma",
    "top_p",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
)
"""Fields of chat that these endpoints take under the same name: neither API knows all of them, and clients of open
servers send them with either."""

_MEDIA = ("audio", "document", "file", "image", "input_audio", "input_file", "input_image")


@dataclass(frozen=True)
class Translation:
    """A request in the words of chat. body: of a chat completion.    ignored: what had no effect, by its own names."""

    body: dict[str, Any]
    names: Names = field(default_factory=Names)
    ignored: tuple[str, ...] = ()


Translate = Callable[[Mapping[str, Any]], Translation]


def read(translate: Translate, body: Mapping[str, Any], rules: Rules, *, seed: int) -> ChatRequest:
    """The typed request that a body of another shape comes to. Raises InvalidRequest, ModelNotFound."""
    translation = translate(body)
    ignored = translation.ignored
    if ignored and rules.strict:
        raise InvalidRequest(
            f"{ignored[0]} has no effect here, and strict_fields refuses such fields",
            param=ignored[0],
            code="unknown_parameter",
        )
    names = translation.names
    with names.speaking():
        asked = schema.chat(translation.body, rules, seed=seed)
    options = asked.options
    constraint = options.constraint
    if constraint is not None:
        constraint = replace(constraint, field=names.own(constraint.field))
    told = tuple(sorted({*ignored, *map(names.own, options.ignored)}))
    return replace(asked, options=replace(options, ignored=told, constraint=constraint, body=body), names=names)


def shared(fields: Fields) -> dict[str, Any]:
    """Those of a body's fields that chat takes as they are."""
    found = {name: fields.get(name) for name in SHARED}
    return {name: value for name, value in found.items() if value is not None}


def objects(fields: Fields, name: str) -> list[Fields]:
    """The objects of a list, each knowing its place; none where the list is absent. Raises InvalidRequest."""
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise fields.wrong(name, "must be a list of objects", value)
    full = f"{fields.place}.{name}" if fields.place else name
    found = []
    for index, item in enumerate(value):
        at = f"{full}[{index}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{at} must be an object, got {kind(item)}", param=at)
        found.append(Fields(item, at + "."))
    return found


def no_part(part: Fields, known: str) -> InvalidRequest:
    """The error for a part of a type that is none of those known."""
    type = part.get("type")
    code = "unsupported_modality" if type in _MEDIA else "unsupported_parameter"
    return part.wrong("type", f"must be {known}, which is all that is known here", type, code)


def text(fields: Fields, name: str) -> str:
    """A text, which may be empty and must be there. Raises InvalidRequest."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise fields.wrong(name, "must be a text", value)
    return value
