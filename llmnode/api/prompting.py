"""Reads what a chat says of its prompt: how the model should think, what its template is told, where the answer begins.

Owns: these fields and how they bear on each other. Refuses to know: what a template makes of them.
Sources: OpenAI's API reference for `reasoning_effort`; vLLM and llama.cpp's server for the others, which have one name
in common where both have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmnode.api.fields import Fields
from llmnode.api.messages import is_prefix
from llmnode.api.rules import Rules
from llmnode.wire.errors import InvalidRequest

EFFORTS = {"none": "none", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}
"""OpenAI's words, and the nearest of those that models were trained on."""
_BUDGETS = ("thinking_budget_tokens", "thinking_budget", "reasoning_budget")
_RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now", "raise_exception", "now"}
)
_MOST_KEYWORDS = 64


@dataclass(frozen=True)
class Prompting:
    """keywords: for the template.      continued: go on with the last message, which is the assistant's.
    prompted: open a turn of the assistant.     template: in place of the model's own.
    budget: tokens that the model may think; None for no limit.
    """

    keywords: Mapping[str, Any] = field(default_factory=dict)
    continued: bool = False
    prompted: bool = True
    template: str | None = None
    budget: int | None = None


def read(fields: Fields, messages: Sequence[Mapping[str, Any]], rules: Rules) -> Prompting:
    """Raises InvalidRequest."""
    keywords = _keywords(fields, rules)
    budget = _thinking(fields, keywords, rules)
    continued, prompted = _turn(fields, messages)
    return Prompting(keywords, continued, prompted, _template(fields, rules), budget)


def _keywords(fields: Fields, rules: Rules) -> dict[str, Any]:
    given = fields.object("chat_template_kwargs") or {}
    reserved = sorted(_RESERVED.intersection(given))
    if reserved:
        raise InvalidRequest(
            f"chat_template_kwargs may not hold {reserved[0]}, which the request has a field for",
            param=f"chat_template_kwargs.{reserved[0]}",
        )
    if len(given) > _MOST_KEYWORDS:
        raise InvalidRequest(
            f"chat_template_kwargs may hold {_MOST_KEYWORDS} fields at most, got {len(given)}",
            param="chat_template_kwargs",
        )
    rules.schema.check(given, "chat_template_kwargs")
    bad = next((name for name in given if not name.isidentifier()), None)
    if bad is not None:
        raise fields.wrong("chat_template_kwargs", "must hold names that a template can use", bad)
    return dict(given)


def _thinking(fields: Fields, keywords: dict[str, Any], rules: Rules) -> int | None:
    """Adds to the keywords; returns the budget. What the model's template knows nothing of had no effect."""
    switched: list[str] = []
    enabled = fields.get("enable_thinking")
    if enabled is not None:
        _switch(keywords, fields.flag("enable_thinking"))
        switched.append("enable_thinking")
    effort = fields.get("reasoning_effort")
    if effort is not None:
        if not isinstance(effort, str) or effort not in EFFORTS:
            raise fields.wrong("reasoning_effort", f"must be one of {', '.join(EFFORTS)}", effort)
        if enabled is None:
            _switch(keywords, effort != "none")
        if effort != "none":
            keywords.setdefault("reasoning_effort", EFFORTS[effort])
        switched.append("reasoning_effort")
    if not rules.switches:
        fields.advice += switched
    budget = _budget(fields, rules)
    if budget == 0:
        _switch(keywords, False)
    return budget


def _switch(keywords: dict[str, Any], on: bool) -> None:
    """Under both names that templates have for it."""
    keywords.setdefault("enable_thinking", on)
    keywords.setdefault("thinking", on)


def _budget(fields: Fields, rules: Rules) -> int | None:
    """-1 is no limit, as llama.cpp's server has it."""
    given = {name: value for name in _BUDGETS if (value := fields.whole(name, -1)) is not None}
    if len(set(given.values())) > 1:
        names = " and ".join(given)
        raise InvalidRequest(f"{names} contradict each other: send one", param=next(iter(given)))
    if given and not rules.thinks:
        fields.advice += given
        return None
    budget = next(iter(given.values()), -1)
    return None if budget < 0 else budget


def _turn(fields: Fields, messages: Sequence[Mapping[str, Any]]) -> tuple[bool, bool]:
    """A last message of the assistant is gone on with, unless the request says otherwise."""
    last = messages[-1]
    able = last["role"] == "assistant" and not last.get("tool_calls")
    opened, wanted = fields.get("add_generation_prompt"), fields.get("continue_final_message")
    if opened is not None:
        opened = fields.flag("add_generation_prompt")
    if wanted is not None:
        wanted = fields.flag("continue_final_message")
    if wanted and opened:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt contradict each other: one goes on with a turn, "
            "the other opens one",
            param="continue_final_message",
        )
    if wanted and not able:
        raise InvalidRequest(
            f"continue_final_message needs a last message of the assistant without calls, got one of {last['role']}",
            param="continue_final_message",
        )
    if wanted is None and able and opened is None:
        wanted = is_prefix(fields) is not False
    return bool(wanted), opened is not False and not wanted


def _template(fields: Fields, rules: Rules) -> str | None:
    source = fields.get("chat_template")
    if source is None:
        return None
    if not isinstance(source, str) or not source:
        raise fields.wrong("chat_template", "must be a text that is not empty", source)
    if not rules.request_templates:
        raise InvalidRequest(
            "chat_template is not taken here: the setting request_templates allows it",
            param="chat_template",
            code="unsupported_parameter",
        )
    return source
