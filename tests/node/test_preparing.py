"""From a chat to what the engine needs, for every template that is at hand: grammar and parser agree."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from llmnode.api import schema
from llmnode.api.preparing import Prepared, Served
from llmnode.api.rules import Rules
from llmnode.chat.pieces import Call, Message, Plain, gather
from llmnode.chat.renderer import Renderer
from llmnode.chat.rendering import Rendering
from llmnode.engine.backend import Room
from llmnode.engine.fake import END, FakeBackend
from llmnode.wire.errors import InvalidRequest
from tests.node.test_template_rendering import COLLECTION

OURS = Path(__file__).parent / "data" / "templates"
TEMPLATES = [*sorted(OURS.glob("*.jinja")), *sorted(COLLECTION.glob("*.jinja"))]
USER = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}]
IN_FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}}


@lru_cache
def served(path: Path) -> Served:
    source = path.read_text(encoding="utf-8")
    renderer = Renderer(source, Rendering(source, "<s>", "</s>", ()).do)
    return Served(None, FakeBackend(Room(1, 4096, 4096, 8)), renderer, ())  # type: ignore[arg-type]


def prepare(path: Path, **body: Any) -> Prepared:
    model = served(path)
    thinks = model.renderer.format.thinking is not None
    rules = Rules(models=("m",), n_vocab=262, switches=model.renderer.format.switches, thinks=thinks)
    return model.prepare(schema.chat({"messages": USER, **body}, rules, seed=0), 0)


def read(prepared: Prepared, text: str) -> Message:
    parser = prepared.parser() if prepared.parser else Plain()
    return gather([*parser.feed(text), *parser.flush()])


def accepted(prepared: Prepared, text: str) -> bool:
    """Whether the grammar lets the model write this, and end there."""
    assert prepared.grammar is not None
    matcher = prepared.grammar.matcher()
    for byte in text.encode():
        if not matcher.allows(byte):
            return False
        matcher.accept(byte)
    return matcher.allows(END)


def around(path: Path, content: str, *, opened: bool) -> str:
    """An answer in the words of the template, after a thought where the prompt has begun one."""
    format = served(path).renderer.format
    if format.channels is not None:
        return f"{format.channels.channel}{format.channels.content}{format.channels.message}{content}"
    thought = f"So.{format.thinking.end}{format.thinking.after}" if opened and format.thinking else ""
    return thought + format.content[0].lstrip() + content + format.content[1].rstrip()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("tools", [(), TOOLS], ids=["alone", "with tools"])
def test_an_answer_of_a_given_form_is_held_to_it_after_the_reasoning(path: Path, tools: Any) -> None:
    prepared = prepare(path, **IN_FORM, tools=list(tools))
    opened = served(path).renderer.format.opened(bytes(b for b in prepared.prompt if b < 256).decode())
    text = around(path, '{"a": 7}', opened=opened)
    assert accepted(prepared, text)
    assert json.loads(read(prepared, text).content) == {"a": 7}
    if tools and path.stem.startswith(("bare", "meta-llama")):  # whose calls are bare objects too
        call = '{"name": "look", "parameters": {"a": 7}}'
        assert accepted(prepared, call) and read(prepared, call).calls == (Call("look", '{"a": 7}'),)
    for wrong in ('{"a": "x"}', '{"b": 1}', "seven", '{"a": 7} and'):
        assert not accepted(prepared, around(path, wrong, opened=opened)), wrong


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("fields", [{}, {"enable_thinking": False}], ids=["", "quiet"])
def test_what_comes_after_a_message_that_is_gone_on_with_is_content(path: Path, fields: dict[str, Any]) -> None:
    prepared = prepare(path, messages=[*USER, {"role": "assistant", "content": "Well, I "}], **fields)
    assert read(prepared, "think so.") == Message("think so.")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_kind_of_tool_choice_has_a_grammar(path: Path) -> None:
    look = {"type": "function", "function": {"name": "look"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [look]}}
    for choice in ("auto", "required", look, allowed):
        assert prepare(path, tools=TOOLS, tool_choice=choice).grammar is not None
        assert prepare(path, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).grammar is not None
    assert prepare(path, tools=TOOLS, tool_choice="none").grammar is None


def test_a_schema_that_cannot_be_held_is_refused_only_for_a_tool_that_is_strict() -> None:
    path = OURS / "tagged.jinja"
    parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}
    tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}  # type: ignore[dict-item]
    assert prepare(path, tools=[tool]).grammar is not None
    assert prepare(path, tools=[tool], tool_choice="required").grammar is not None
    with pytest.raises(InvalidRequest) as caught:
        prepare(path, tools=[strict])
    assert caught.value.param == "tools"
