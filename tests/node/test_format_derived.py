"""The format of a model's answers follows from its chat template, whoever wrote the template."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from llmnode.chat import generic
from llmnode.chat.derive import derive
from llmnode.chat.format import Format, Slot, Values
from tests.node.format_rig import COLLECTION, PATHS, TOOLS, format_of, renderer, source

DOCS = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


def shape(format: Format) -> str:
    """A call as the format writes it, on one line."""
    calls = format.calls
    assert calls is not None
    fills = {Slot.NAME: "NAME", Slot.ARGUMENTS: "{...}", Slot.INDEX: "0", Slot.ID: "ID"}
    if (members := calls.members) is not None:
        quote = "" if members.values is not Values.LITERAL else members.quote
        value = {"text": "TEXT", "json": "JSON", "literal": f"{quote}TEXT{quote}"}[members.values.value]
        fills[Slot.ARGUMENTS] = f"{members.key_start}KEY{members.key_end}{value}{members.value_end}"
    text = "".join(part if isinstance(part, str) else fills[part] for part in calls.call)
    return f"{calls.section[0]}{text}{calls.section[1]}".replace("\n", "\\n").strip()


SHAPES = {
    "actions": '<|START_ACTION|>[\\n    {"tool_call_id": "0", "tool_name": "NAME", "parameters": {...}}\\n]<|END_ACTION|>',  # noqa: E501
    "bare": '{"name": "NAME", "parameters": {...}}',
    "channels": "to=functions.NAME<|channel|>commentary json<|message|>{...}<|call|>",
    "counted": "<|calls_begin|><|call_begin|>functions.NAME:0<|call_argument_begin|>{...}<|call_end|><|calls_end|>",
    "fenced": "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜sep｜>NAME\\n```json\\n{...}\\n```"  # noqa: RUF001
    "<｜tool_call_end｜><｜tool_calls_end｜>",  # noqa: RUF001
    "invoked": '\\n<seed:calls>\\n<invoke name="NAME">\\n<parameter name="KEY">JSON</parameter>\\n</invoke>\\n'
    "</seed:calls>",
    "list": '[TOOL_CALLS][{"name": "NAME", "arguments": {...}, "id": "ID"}]',
    "marked": "[TOOL_CALLS]NAME[CALL_ID]ID[ARGS]{...}",
    "pairs": "<tool_call>NAME\\n<arg_key>KEY</arg_key>\\n<arg_value>TEXT</arg_value>\\n</tool_call>",
    "parameters": "\\n<call>\\n<function=NAME>\\n<parameter=KEY>\\nTEXT\\n</parameter>\\n</function>\\n</call>",
    "plain": '<tool_call>\\n{"name": "NAME", "arguments": {...}}\\n</tool_call>',
    "python": '<|calls|>[NAME(KEY="TEXT")]<|/calls|>',
    "quoted": '<|tool_call>call:NAME{KEY:<|"|>TEXT<|"|>}<tool_call|>',
    "tagged": '<tool_call>\\n{"name": "NAME", "arguments": {...}}\\n</tool_call>',
    "typed": '\\n\\n<|dsml|calls>\\n<|dsml|invoke name="NAME">\\n<|dsml|parameter name="KEY" string="true">TEXT'
    "</|dsml|parameter>\\n</|dsml|invoke>\\n</|dsml|calls>",
    "whole": '<|call|>{"type": "function", "function": {"name": "NAME", "arguments": {...}}}<|/call|>',
}
THINKING = {
    "actions": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "channels": ("<|channel|>analysis<|message|>", "<|end|>"),
    "fenced": ("<think>", "</think>"),
    "invoked": ("<seed:think>", "</seed:think>"),
    "marked": ("[THINK]", "[/THINK]"),
    "pairs": ("<think>", "</think>"),
    "quoted": ("<|channel>thought", "<channel|>"),
    "tagged": ("<think>", "</think>"),
    "typed": ("<think>", "</think>"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_call_is_found_as_the_template_writes_it(name: str) -> None:
    format = format_of(name)
    assert shape(format) == SHAPES[name]
    thinking = format.thinking
    assert (None if thinking is None else (thinking.start, thinking.end)) == THINKING.get(name)


@pytest.mark.parametrize("name", PATHS)
def test_all_of_it_can_be_sent_to_another_process(name: str) -> None:
    format = format_of(name)
    assert Format.from_json(json.loads(json.dumps(format.to_json()))) == format
    assert pickle.loads(pickle.dumps(format)) == format


def test_what_a_template_supports_is_found_by_trying() -> None:
    assert not format_of("list").system and format_of("tagged").system
    assert format_of("list").id_length == 9 and format_of("marked").id_length is None
    assert format_of("whole").arguments_text and not format_of("tagged").arguments_text
    assert format_of("bare").calls is not None and not format_of("bare").calls.parallel  # type: ignore[union-attr]
    assert format_of("tagged").calls.parallel  # type: ignore[union-attr]
    assert format_of("tagged").switches == ("enable_thinking",)
    assert format_of("channels").switches == ("reasoning_effort",)
    assert not format_of("fenced").tools and format_of("fenced").results and not format_of("fenced").generic
    assert format_of("plain").generic and format_of("plain").why


def test_the_prompt_tells_whether_reasoning_has_begun() -> None:
    user = [{"role": "user", "content": "Do you <think>"}]
    for name, keywords, opened in [
        ("fenced", {}, True),
        ("tagged", {}, False),
        ("tagged", {"enable_thinking": False}, False),
        ("plain", {}, False),
    ]:
        assert format_of(name).opened(renderer(source(name))(user, **keywords)) is opened, name


def test_markers_are_what_a_vocabulary_may_have_as_control_tokens() -> None:
    assert {"<tool_call>", "</tool_call>", "<think>", "</think>", "<|end|>"} == format_of("tagged").markers
    assert {'<|"|>', "<|tool_call>", "<tool_call|>", "<|tool_response>"} <= format_of("quoted").markers
    assert {"<|constrain|>", "<|call|>", "<|message|>", "<|start|>"} <= format_of("channels").markers


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ raise_exception('no') }}",
        "always the same",
        "{{ messages | tojson }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ tools }}{% for m in messages %}{{ m }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.type }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m.content[0] }}{{ m.tool_calls[0].function.arguments.x.y }}{% endfor %}",
        "{% for m in messages %}{{ m.content | reverse }}{% endfor %}",
    ],
)
def test_a_template_that_makes_no_sense_raises_nothing(template: str) -> None:
    format = derive(renderer(template), template)
    assert format.calls is not None or format.why


def test_a_model_that_knows_no_tools_is_told_of_them_in_plain_messages() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
        {"role": "tool", "tool_call_id": "a", "content": "12:01"},
        {"role": "user", "content": "Thanks"},
    ]
    plain = generic.written(messages, TOOLS)
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"].startswith("Be brief.\n\n# Tools") and '"name": "write-file"' in plain[0]["content"]
    assert plain[2]["content"].count('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>') == 2
    assert "12:00" in plain[3]["content"] and plain[3]["content"].endswith("Thanks")
    assert messages[2]["tool_calls"] == [call, call]


@pytest.mark.parametrize("name", ["fenced", "pairs", "python"])
def test_the_preamble_shows_a_call_in_the_models_own_format(name: str) -> None:
    calls = format_of(name).calls
    assert calls is not None
    assert generic.example(calls) in generic.preamble(TOOLS, calls)
    assert "NAME" in generic.example(calls) and "ARGUMENT" in generic.example(calls)


@pytest.mark.parametrize("path", sorted(COLLECTION.glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_of_real_models_are_derived_and_documented(path: Path) -> None:
    format = format_of(path.stem)
    assert format.calls is not None
    assert (format.why == "") or format.generic
    row = next((line for line in DOCS.read_text().splitlines() if line.startswith(f"| {path.stem} |")), "")
    assert row == table_row(path.stem, format), f"docs/architecture.md should say: {table_row(path.stem, format)}"


def table_row(name: str, format: Format) -> str:
    """The row of the table in docs/architecture.md, which is written by this."""
    thinking = "" if format.thinking is None else f"`{format.thinking.start}` `{format.thinking.end}`"
    calls = format.calls
    assert calls is not None
    notes = []
    if format.generic:
        notes.append("tools told and called the generic way")
    elif not format.tools:
        notes.append("tools told in the system message")
    if not calls.parallel:
        notes.append("one call at a time")
    if not calls.trigger:
        notes.append("no marker")
    if format.channels is not None:
        notes.append("channels")
    written = re.sub(r"\|", "\\|", shape(format))
    return f"| {name} | `` {written} `` | {re.sub('[|]', chr(92) + '|', thinking)} | {', '.join(notes)} |"
