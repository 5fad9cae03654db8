"""What a model wrote in its own format comes out as what it meant, however the text was cut on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.chat.format import Format, Slot, Thinking
from llmnode.chat.parse import parser
from llmnode.chat.pieces import Arguments, Call, CallBegun, Content, Message, Piece, Plain, Reasoning, gather
from tests.node.format_rig import OURS, PATHS, TOOLS, answer, format_of, tool

WEATHER: tuple[str, Mapping[str, Any]] = ("get_weather", {"city": 'São "Paulo" {x} \\ ☃ \U0001f9ea', "days": 3})
FILE: tuple[str, Mapping[str, Any]] = (
    "write-file",
    {
        "path": "/tmp/a b",
        "text": "line 1\nline </b> }] \"two\" 'three'\n\n  <tool_cal> [ARGS </thin>",
        "mode": {"deep": [1, 2.5, -3]},
        "tags": ["a", "b, c", "5"],
        "force": True,
        "size": 1.5,
    },
)
NOW: tuple[str, Mapping[str, Any]] = ("now", {})
CASES: dict[str, tuple[Sequence[tuple[str, Mapping[str, Any]]], str, str]] = {
    "no arguments": ([NOW], "", ""),
    "hard arguments": ([FILE], "", ""),
    "empty text": ([("get_weather", {"city": ""})], "", ""),
    "parallel": ([WEATHER, FILE, NOW], "", ""),
    "content": ([WEATHER], "Let me look.", ""),
    "reasoning": ([WEATHER], "", "I ponder.\n\nYes."),
    "all of it": ([WEATHER, NOW], "Let me\n\nlook.", "I ponder {it}.\nYes."),
    "no call": ([], 'Hello.\n\n{"name": "now"} [] <b>', "I ponder."),
}


def read(format: Format, text: str, *, opened: bool = False) -> Message:
    return said(format, [text], opened=opened)


def said(format: Format, texts: Sequence[str], *, opened: bool = False) -> Message:
    reader = parser(format, TOOLS, opened=opened)
    pieces = [piece for text in texts for piece in reader.feed(text)]
    return gather([*pieces, *reader.flush()])


def calls_of(message: Message) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PATHS)
def test_what_the_template_writes_is_read_back(name: str, case: str) -> None:
    format = format_of(name)
    calls, content, reasoning = CASES[case]
    assert format.calls is not None
    if len(calls) > 1 and not format.calls.parallel:
        calls = calls[:1]
    if calls and not format.beside:
        content = ""
    text = answer(name, calls, content, reasoning)
    assert text is not None
    # Templates leave reasoning out where they think it past, and some write content after the calls.
    expected = (list(calls), content, reasoning if reasoning in text else "")
    for texts in ([text], text):
        message = said(format, texts)
        assert (calls_of(message), message.content, message.reasoning) == expected


@pytest.mark.parametrize("name", sorted(path.stem for path in OURS.glob("*.jinja")))
def test_nothing_depends_on_where_the_text_was_cut(name: str) -> None:
    """At every border: what was said before it is what a parser says that gets that text at once, and the rest adds
    up to the same."""
    format = format_of(name)
    assert format.calls is not None
    calls = [FILE, NOW] if format.calls.parallel else [FILE]
    text = answer(name, calls, "I look." if format.beside else "", "Hm.")
    assert text is not None
    whole = read(format, text)
    assert calls_of(whole) == calls
    slow = parser(format, TOOLS)
    pieces: list[Piece] = []
    for at, character in enumerate(text, 1):
        pieces += slow.feed(character)
        fast = parser(format, TOOLS)
        begun = fast.feed(text[:at])
        assert gather(begun) == gather(pieces)
        assert gather([*begun, *fast.feed(text[at:]), *fast.flush()]) == whole
    assert gather([*pieces, *slow.flush()]) == whole


@pytest.mark.parametrize("name", sorted(path.stem for path in OURS.glob("*.jinja")))
def test_markers_within_an_argument_are_part_of_it(name: str) -> None:
    format = format_of(name)
    assert format.calls is not None
    members = format.calls.members
    # But for those that end an argument in this format, and those that no answer can hold, as they end it.
    ends = {*format.turn_ends, *({members.value_end.strip(), members.quote} if members is not None else ())}
    text = "".join(sorted(format.markers - ends)) + '"}]}\n</tool_call>'
    calls = [("write-file", {"text": text, "path": text})]
    written = answer(name, calls)
    assert written is not None
    assert calls_of(read(format, written)) == calls


def fragments(format: Format) -> list[str]:
    """Words of a language in which answers go wrong."""
    calls = format.calls
    assert calls is not None
    parts = [part for part in calls.call if not isinstance(part, Slot)]
    found = {*format.markers, *parts, *calls.section, calls.separator, calls.trigger, *format.content}
    if calls.members is not None:
        members = calls.members
        found |= {members.key_start, members.key_end, members.value_end, members.separator, members.quote}
    found |= {"get_weather", "now", "unknown", "{", "}", '"city"', "city", ":", ": 1", '{"city": "x"}', "{}", " ", "\n"}
    return sorted(found | {"a", "é", '"', "\\", ",", "[", "]", "'", "1", "true", "\\u00", "None", "-"} - {""})


@pytest.mark.parametrize("name", sorted(path.stem for path in OURS.glob("*.jinja")))
def test_any_text_is_read_the_same_in_any_pieces(name: str) -> None:
    format = format_of(name)

    @given(st.data(), st.booleans())
    @settings(max_examples=25, deadline=None, database=None)
    def check(data: st.DataObject, opened: bool) -> None:
        words = data.draw(st.lists(st.sampled_from(fragments(format)), max_size=14))
        good = answer(name, [WEATHER], "", "") or ""
        text = "".join(words[:4]) + (good if data.draw(st.booleans()) else "") + "".join(words[4:])
        opened = opened and format.thinking is not None
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
        texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        whole = read(format, text, opened=opened)
        assert said(format, texts, opened=opened) == whole
        assert said(format, text, opened=opened) == whole
        reader = parser(format, TOOLS, opened=opened)
        known = gather([piece for text in texts[:-1] for piece in reader.feed(text)])
        assert gather(parser(format, TOOLS, opened=opened).feed("".join(texts[:-1]))) == known
        assert whole.content.startswith(known.content) and whole.reasoning.startswith(known.reasoning)
        for call, later in zip(known.calls, whole.calls, strict=False):
            assert call.name == later.name and later.arguments.startswith(call.arguments)

    check()


TAGGED = format_of("tagged")


def test_arguments_come_out_as_they_come_in() -> None:
    reader = parser(TAGGED, TOOLS)
    assert reader.feed('Well. \n<tool_call>{"name": "get_wea') == [Content("Well.")]
    assert reader.feed('ther", "arguments": {"ci') == [CallBegun(0, "get_weather"), Arguments(0, '{"ci')]
    assert reader.feed('ty": "Ro') == [Arguments(0, 'ty": "Ro')]
    assert reader.feed('me"}}') == [Arguments(0, 'me"}')]
    assert reader.feed("\n</tool_call> ") == []
    assert reader.feed("Done ") == [Content("Done")]
    assert reader.flush() == [Content(" ")]


def test_arguments_in_text_come_out_as_json_as_they_come_in() -> None:
    reader = parser(format_of("parameters"), TOOLS)
    reader.feed("<call>\n<function=write-file>\n")
    assert reader.feed('<parameter=text>\nHe said "') == [Arguments(0, '"text": "He said \\"')]
    assert reader.feed("hi\n") == [Arguments(0, "hi")]
    assert reader.feed("\n</parameter>\n<parameter=size>\n1") == [Arguments(0, '\\n", "size": ')]
    assert reader.feed("5\n</parameter>\n</function>") == [Arguments(0, "15}")]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"nom": "now"}\n</tool_call>',
        "<tool_call>\nnow\n</tool_call>",
        "<tool_call>",
        "<tool_",
        '{"name": "now", "arguments": {}}',
        "It is </think> and </tool_call>",
        "I would write <tool_call> here, or <think>.",
        " <tool_call> <tool_call> ",
    ],
)
def test_what_is_no_call_is_content_as_it_stands(text: str) -> None:
    assert read(TAGGED, text) == Message(text)


def test_a_call_that_goes_wrong_after_its_name_ends_there() -> None:
    message = read(TAGGED, '<tool_call>\n{"name": "get_weather", "arguments": {"city": oops}}\n</tool_call>')
    assert message.calls[0].name == "get_weather" and message.calls[0].arguments == '{"city": '
    assert message.content == "oops}}\n</tool_call>"


def test_an_answer_that_is_cut_off_gives_what_came() -> None:
    assert read(TAGGED, "<think>\nSo I th") == Message(reasoning="So I th")
    assert read(TAGGED, '<tool_call>{"name": "now"') == Message(calls=(Call("now", ""),))
    message = read(TAGGED, '<think>a</think>b<tool_call>{"name": "get_weather", "arguments": {"city": "Pa')
    assert (message.reasoning, message.content) == ("a", "b")
    assert [(call.name, call.arguments) for call in message.calls] == [("get_weather", '{"city": "Pa')]


def test_order_and_spaces_within_a_call_do_not_matter() -> None:
    for text in (
        '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>',
        '<tool_call>\n\n  {"name" :"get_weather","arguments":\n{"city": "Rome"} }',
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
    ):
        assert calls_of(read(TAGGED, text)) == [("get_weather", {"city": "Rome"})], text


def test_reasoning_that_the_prompt_has_begun_ends_at_its_marker() -> None:
    forced = format_of("fenced")
    assert read(forced, "So. \n</think>\n\nYes.", opened=True) == Message("Yes.", "So.")
    assert read(forced, "So.", opened=True) == Message(reasoning="So.")
    assert read(forced, " </think>\n\nYes.") == Message("Yes.")
    assert read(forced, "So. </think> Yes.") == Message("So. </think> Yes.")


def test_without_tools_nothing_is_taken_for_a_call() -> None:
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    reader = parser(TAGGED, [])
    assert gather([*reader.feed(f"<think>x</think>{text}"), *reader.flush()]) == Message(text, "x")
    assert isinstance(parser(format_of("plain"), []), Plain)


def test_bare_json_is_a_call_only_where_it_begins_like_one() -> None:
    bare = format_of("bare")
    assert calls_of(read(bare, ' {"name": "now", "parameters": {}}')) == [("now", {})]
    for text in ('{"result": 1}', 'See {"name": "now", "parameters": {}}', '{"name": "else", "parameters": {}}', "{}"):
        assert read(bare, text) == Message(text)
    reader = parser(bare, TOOLS)
    assert reader.feed('{"res') == []
    assert reader.feed('ult": 1') == [Content('{"result": 1')]


def test_a_text_argument_ends_where_another_can_begin() -> None:
    text = (
        "<call>\n<function=write-file>\n<parameter=text>\nuse </parameter> so\n</parameter>\n"
        "<parameter=force>\nTrue\n</parameter>\n<parameter=tags>\n[1, 2\n</parameter>\n</function>\n</call>"
    )
    assert calls_of(read(format_of("parameters"), text)) == [
        ("write-file", {"text": "use </parameter> so", "force": True, "tags": "[1, 2"})
    ]


@pytest.mark.parametrize(
    ("schema", "written", "meant"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "number"}, "5", 5),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "[1]", "[1]"),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1]", [1]),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": True}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "integer"}, "many", "many"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"$ref": "#/$defs/x"}, "5", "5"),
        ({}, "5", 5),
        ({}, "five", "five"),
    ],
)
def test_the_schema_tells_what_a_text_stands_for(schema: Any, written: str, meant: Any) -> None:
    probe = tool("probe", {"x": schema})
    probe["function"]["parameters"]["$defs"] = {"x": {"type": "string"}}
    reader = parser(format_of("pairs"), [probe])
    text = f"<tool_call>probe\n<arg_key>x</arg_key>\n<arg_value>{written}</arg_value>\n</tool_call>"
    assert calls_of(gather([*reader.feed(text), *reader.flush()])) == [("probe", {"x": meant})]


def test_channels_are_read_as_models_write_them() -> None:
    channels = format_of("channels")
    message = read(
        channels,
        "<|channel|>analysis<|message|>I ponder.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}',
    )
    assert (message.reasoning, message.content) == ("I ponder.", "Wait.")
    assert calls_of(message) == [("get_weather", {"city": "Rome"})]
    assert read(channels, "<|channel|>final<|message|>Yes.") == Message("Yes.")
    assert read(channels, "Just text.") == Message("Just text.")
    unknown = "<|channel|>commentary to=python <|constrain|>code<|message|>1 + 1"
    assert read(channels, unknown) == Message(unknown)


def test_python_and_quoted_literals_become_json() -> None:
    python, quoted = format_of("python"), format_of("quoted")
    text = """<|calls|>[get_weather(city='it\\'s "so"', days=3), now(), write-file(mode={'deep': [1, None]}, force=False)]"""  # noqa: E501
    assert calls_of(read(python, text)) == [
        ("get_weather", {"city": 'it\'s "so"', "days": 3}),
        ("now", {}),
        ("write-file", {"mode": {"deep": [1, None]}, "force": False}),
    ]
    text = '<|tool_call>call:write-file{mode:{deep:[1,{a:<|"|>"}<|"|>}]},text:"plain",force:True}<tool_call|>'
    assert calls_of(read(quoted, text)) == [
        ("write-file", {"mode": {"deep": [1, {"a": '"}'}]}, "text": "plain", "force": True})
    ]


def test_a_list_as_python_writes_it_is_read_where_a_list_is_meant() -> None:
    text = (
        "<call>\n<function=write-file>\n<parameter=tags>\n['a', \"it's\"]\n</parameter>\n"
        "<parameter=mode>\n{'deep': [1, True]}\n</parameter>\n<parameter=text>\n['a']\n</parameter>\n"
        "</function>\n</call>"
    )
    ((_, arguments),) = calls_of(read(format_of("parameters"), text))
    assert arguments == {"tags": ["a", "it's"], "mode": {"deep": [1, True]}, "text": "['a']"}


def test_a_type_that_is_written_out_counts_more_than_the_schema() -> None:
    text = (
        '<|dsml|calls><|dsml|invoke name="get_weather"><|dsml|parameter name="city" string="false">5</|dsml|parameter>'
        '<|dsml|parameter name="days" string="true">7</|dsml|parameter></|dsml|invoke></|dsml|calls>'
    )
    assert calls_of(read(format_of("typed"), text)) == [("get_weather", {"city": 5, "days": "7"})]


def test_deep_nesting_costs_no_stack() -> None:
    deep = "[" * 20_000
    message = read(TAGGED, f'<tool_call>{{"name": "now", "arguments": {{"x": {deep}')
    assert message.calls[0].arguments == f'{{"x": {deep}'
    quoted = read(format_of("quoted"), f"<|tool_call>call:now{{x:{deep}")
    assert quoted.calls[0].arguments == f'{{"x": {deep}'


def test_reasoning_without_calls_is_read_too() -> None:
    format = Format(thinking=Thinking("[THINK]", "[/THINK]"))
    reader = parser(format, [])
    assert reader.feed("[THI") == []
    assert reader.feed("NK]a") == [Reasoning("a")]
    assert reader.feed(" [/") == []
    assert reader.feed("THINK] b") == [Content("b")]
    assert reader.flush() == []
