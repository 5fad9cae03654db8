"""Templates at work: what a confined process does for renderer.py. JSON in, JSON out.

Two tasks: `describe` a template (its Format, derived by probing it), and `render` a conversation. Owns the order of
things in a rendering: control tokens that a client spells out are marked, the conversation is put as the template
takes it, and where the template refuses the order of roles, that is put differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property, lru_cache
from typing import Any

from llmnode.chat.conversation import completed, fitted, merged_systems, text_of, variants
from llmnode.chat.derive import derive
from llmnode.chat.format import Format
from llmnode.chat.spelling import Marks, Segment, Spellings, names_any
from llmnode.chat.template import ChatTemplate, Refused, RenderError, TemplateError

_OVERRIDES = 8
"""Templates of requests that are kept, compiled and described."""
_WORD = "Numbat"
_EVERYTHING = (
    "{{ '\\n' }}{{ 'a b' | title }}{{ {'b': 1} | dictsort }}{{ '<' | e }}{{ 'x' | pprint }}{{ [1] | tojson }}"
    "{{ 'a' | urlize }}{{ 'x' | wordwrap(3) }}{{ 'é'.encode('utf-8') }}{{ [1] | random }}{{ strftime_now('%d %B') }}"
)


class _Known:
    """A template, and what is found out about it when it is first used."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        self.template = ChatTemplate(source, bos=bos, eos=eos)

    @cached_property
    def no_tools(self) -> list[Any] | None:
        """What stands for no tools: an empty list where the template goes through them, whether there are any or
        not."""
        return None if self._says(_WORD, None) or not self._says(_WORD, []) else []

    @cached_property
    def typed(self) -> bool:
        """Whether a text as content is lost, and a list of parts is not."""
        return not self._says(_WORD, self.no_tools) and self._says([{"type": "text", "text": _WORD}], self.no_tools)

    @cached_property
    def one_system(self) -> bool:
        """Whether of two system messages, one of them further down, any is lost."""
        messages = [{"role": role, "content": word} for role, word in (("system", "Dibbler"), ("user", _WORD))]
        messages.append({"role": "system", "content": "Bilby"})
        try:
            text = self._render(messages)
        except RenderError:
            return False  # which is for `variants`
        return "Dibbler" not in text or "Bilby" not in text

    @cached_property
    def format(self) -> Format:
        return derive(self._render, self.template.source)

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *rest: Any, **keywords: Any) -> str:
        """As `derive` renders: with texts as content, whatever the template reads."""
        if self.typed:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        return self.template.render(messages, self.no_tools if tools is None else tools, *rest, **keywords)

    def _says(self, content: Any, tools: Any) -> bool:
        try:
            return _WORD in self.template.render([{"role": "user", "content": content}], tools)
        except RenderError:
            return False


class Rendering:
    """The work. source, bos, eos: the model's.     controls: how its control tokens are written out."""

    def __init__(self, source: str, bos: str, eos: str, controls: Sequence[str]) -> None:
        _warm_up()
        self._spellings = Spellings(controls)
        self._model = _Known(source, bos, eos)
        self._override = lru_cache(_OVERRIDES)(lambda text: _Known(text, bos, eos))

    def do(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """One task; `op` says which."""
        return self._model.format.to_json() if task["op"] == "describe" else self._render(task)

    def _render(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """-> {"segments", "format" of an override}, or {"refused": message, "param"}."""
        override = task["template"]
        try:
            known = self._model if override is None else self._override(override)
        except TemplateError as error:
            return {"refused": str(error), "param": "chat_template"}
        try:
            segments = self._segments(known, task)
        except Refused as error:
            return {"refused": f"the model's chat template refuses these messages: {error}", "param": "messages"}
        except RenderError as error:
            return {"refused": f"the model's chat template cannot render these messages: {error}", "param": "messages"}
        return {"segments": segments, "format": known.format.to_json() if override is not None else None}

    def _segments(self, known: _Known, task: Mapping[str, Any]) -> list[Segment]:
        given = {name: task[name] for name in ("messages", "tools", "keywords")}
        spelled = names_any(given, self._spellings)
        marks = None
        if spelled or task["continued"]:
            marks = Marks(json.dumps(given, ensure_ascii=False) + known.template.source)
            if spelled:
                given = {name: self._marked(value, marks, known.format) for name, value in given.items()}
        text = _rendered(known, given, task, marks)
        if marks is None:
            return [(text, True)]
        text = marks.plain(text)
        if task["continued"]:
            text, stop, _ = text.rpartition(marks.stop)
            if not stop:
                raise RenderError("it leaves out the message to go on with, which is the last one")
        return marks.segments(text)

    def _marked(self, value: Any, marks: Marks, format: Format) -> Any:
        """What an assistant has said may hold the markers of its own reasoning and calls: clients send back what they
        got, and templates look for them there."""
        if not isinstance(value, list):
            return marks.marked(value, self._spellings)
        own = [format.markers if item.get("role") == "assistant" else frozenset[str]() for item in value]
        return [marks.marked(item, self._spellings, allowed) for item, allowed in zip(value, own, strict=True)]


def work(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What a confined process does (service/confined.py)."""
    return Rendering(setup["source"], setup["bos"], setup["eos"], setup["controls"]).do


def _rendered(known: _Known, given: Mapping[str, Any], task: Mapping[str, Any], marks: Marks | None) -> str:
    messages = list(given["messages"])
    if task["continued"] and marks is not None:
        last = messages[-1]
        messages[-1] = {**last, "content": text_of(last["content"]) + marks.stop}
    if known.one_system:
        messages = merged_systems(messages)
    fit, tools = fitted(messages, given["tools"], known.format, typed=known.typed)
    trouble: RenderError | None = None
    for variant in variants(fit):
        for told in (tools, completed(tools)) if tools else (known.no_tools,):
            try:
                return known.template.render(
                    variant,
                    told,
                    task["prompted"] and not task["continued"],
                    now=datetime.fromtimestamp(task["now"], timezone.utc),
                    **given["keywords"],
                )
            except RenderError as error:
                trouble = trouble or error
                if isinstance(error, Refused):
                    break  # other words for the tools will not help
    assert trouble is not None, "there is at least one variant"
    raise trouble


def _warm_up() -> None:
    """Have everything loaded that Jinja and Python load when it is first needed: no file can be opened later."""
    ChatTemplate(_EVERYTHING).render([])
    try:
        ChatTemplate("{{ 1 / 0 }}").render([])
    except RenderError:
        pass
