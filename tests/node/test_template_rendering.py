"""Chat templates: what models expect of the environment, what is refused, and that real ones render."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from llmnode.chat.conversation import Conversation
from llmnode.chat.renderer import Prompt, Renderer
from llmnode.chat.rendering import Rendering
from llmnode.chat.spelling import Marks, Spellings
from llmnode.chat.template import ChatTemplate, Refused, RenderError, TemplateError
from llmnode.wire.errors import InvalidRequest

COLLECTION = Path(__file__).resolve().parents[3] / "shared" / "data" / "chat-templates"
HELLO = [{"role": "user", "content": "Hello there"}]
NOON = datetime(2031, 5, 4, 12, 0, 0)


def render(source: str, messages: list[dict[str, str]] = HELLO) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>", clock=lambda: NOON).render(messages)


CONTROLS = ["<|im_start|>", "<|im_end|>", "<think>"]


def renderer(source: str) -> Renderer:
    return Renderer(source, Rendering(source, "<s>", "</s>", CONTROLS).do)


def prompt(source: str, messages: list[dict[str, Any]], **more: Any) -> Prompt:
    """As a node renders it, but in this process."""
    return renderer(source).render(Conversation(messages, **more), 1_900_000_000)


def test_a_model_without_a_template_gets_chatml() -> None:
    assert renderer("").is_default
    assert ChatTemplate("").render(HELLO) == "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"


def test_the_environment_is_the_one_templates_are_written_for() -> None:
    assert render("{{ bos_token }}{{ eos_token }}") == "<s></s>"
    assert render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n") == (
        "Hello there\n"
    )
    assert render('{{ {"a": "<é>"} | tojson }}') == '{"a": "<é>"}'
    assert render('{{ {"a": 1} | tojson(indent=2) }}') == '{\n  "a": 1\n}'
    assert render("{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}") == (
        '{"a":"\\u00e9","b":1}'
    )
    assert render("{{ ('[1, 2]' | from_json)[1] }}{{ ('{}' | fromjson) }}") == "2{}"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hello there"
    assert render("{% set n = namespace(x=[]) %}{% set _ = n.x.append('a') %}{{ n.x[0].upper() }}") == "A"
    assert render("{{ strftime_now('%d %b %Y') }}") == "04 May 2031"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% if tools %}tools{% endif %}{{ add_generation_prompt }}") == "True"


def test_a_template_that_refuses_makes_a_400_that_names_messages() -> None:
    with pytest.raises(Refused, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        prompt("{{ raise_exception('roles must alternate') }}", HELLO)
    assert caught.value.param == "messages"
    assert caught.value.status == 400


@pytest.mark.parametrize("source", ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ none.x.y }}"])
def test_a_template_that_breaks_makes_a_400_too(source: str) -> None:
    with pytest.raises(RenderError):
        render(source)
    with pytest.raises(InvalidRequest) as caught:
        prompt(source, HELLO)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RenderError):
        render(source)


def test_a_template_sees_nothing_of_what_it_calls() -> None:
    assert render("{{ raise_exception.__globals__ }}") == ""


def test_a_template_that_does_not_compile_is_told_apart() -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate("{% if %}")


def test_rendering_leaves_the_messages_as_they_were() -> None:
    messages = [{"role": "user", "content": "x"}]
    render("{% set _ = messages.append(messages[0]) %}{% set _ = messages[0].update({'content': 'y'}) %}", messages)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.skipif(not COLLECTION.is_dir(), reason=f"no collection of templates at {COLLECTION}")
def test_the_collection_is_there_to_be_tried() -> None:
    assert len(list(COLLECTION.glob("*.jinja"))) >= 10


@pytest.mark.parametrize("path", sorted(COLLECTION.glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_of_real_models_render_a_conversation(path: Path) -> None:
    text = prompt(
        path.read_text(encoding="utf-8"),
        [
            {"role": "user", "content": "What is a rack?"},
            {"role": "assistant", "content": "A frame for machines."},
            {"role": "user", "content": "How tall is one?"},
        ],
    ).text
    places = [text.find(words) for words in ("What is a rack?", "A frame for machines.", "How tall is one?")]
    assert -1 not in places
    assert places == sorted(places)
    assert len(text) > text.index("How tall is one?") + len("How tall is one?")  # the answer's turn is opened


CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_of_another", "type": "function", "function": {"name": "look", "arguments": '{"at": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_of_another", "content": "wet"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}}]


@pytest.mark.parametrize("path", sorted(COLLECTION.glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_of_real_models_take_tools_calls_and_results(path: Path) -> None:
    text = prompt(path.read_text(encoding="utf-8"), CALLS, tools=TOOLS).text
    places = [text.find(word) for word in ("Rain?", "Oslo", "wet")]
    assert -1 not in places, text
    assert places == sorted(places)
    assert "look" in text[: places[1]]


@pytest.mark.parametrize("path", sorted(COLLECTION.glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_of_real_models_go_on_with_a_message(path: Path) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "It was a dark and "}]
    assert prompt(path.read_text(encoding="utf-8"), messages, continued=True).text.endswith("It was a dark and ")


@pytest.mark.parametrize("path", sorted(COLLECTION.glob("*.jinja")), ids=lambda path: path.stem)
def test_a_system_message_reaches_every_model(path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "system", "content": "Be kind."}]
    text = prompt(path.read_text(encoding="utf-8"), messages).text
    assert "Be brief." in text and "Be kind." in text


PLAIN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if loop.index0 % 2 != (m.role == 'assistant') | int %}{{ raise_exception('alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_roles_that_a_template_refuses_are_put_as_it_takes_them() -> None:
    messages = [{"role": "system", "content": "S"}, *HELLO, {"role": "user", "content": "again"}]
    assert prompt(PLAIN, messages).text == "[user]S\n\nHello there\nagain[assistant]"


def test_a_template_that_reads_parts_gets_parts() -> None:
    source = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    assert prompt(source, HELLO).text == "Hello there"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert prompt(source, parts).text == prompt("{{ messages[0].content }}", parts).text == "ab"


def test_control_tokens_that_a_client_spells_out_are_text() -> None:
    messages = [{"role": "user", "content": "a<|im_end|>b<|im_end"}, {"role": "assistant", "content": "<think>c"}]
    made = prompt("", messages)
    assert made.text == ChatTemplate("").render(messages)
    assert [text for text, special in made.segments if not special] == ["<|im_end|>", "<think>"]
    assert made.segments[0] == ("<|im_start|>user\na", True)
    escaped = prompt("{{ messages[0].content | tojson(ensure_ascii=true) }}", messages)
    assert escaped.segments == (('"a', True), ("<|im_end|>", False), ('b<|im_end"', True))
    cut = prompt("{{ messages[0].content.split('im_')[0] }}", messages)
    assert cut.segments == (("a<|", True),)
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_start|>"}}]
    assert ("<|im_start|>", False) in prompt("", HELLO, tools=tools).segments


def test_marks_are_none_of_the_texts_characters() -> None:
    marks = Marks("".join(map(chr, range(0xE000, 0xE100))))
    marked = marks.marked("x<|im_end|>\ue000", Spellings(CONTROLS))
    assert marks.segments(marked) == [("x", True), ("<|im_end|>", False), ("\ue000", True)]


def test_spellings_are_found_longest_first_and_in_linear_time() -> None:
    found = Spellings(["<a>", "<a>b", "<", "<ab"])
    assert found.places("<<a>b<a><ab<a") == [(1, 5), (5, 8), (8, 11)]
    assert Spellings([]).places("<a>") == []


def test_an_override_is_rendered_with_a_format_of_its_own() -> None:
    source = "{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}"
    made = renderer("").render(Conversation(HELLO, template=source), 0)
    assert made.text == "Hello there<think>"
    with pytest.raises(InvalidRequest, match="does not compile") as caught:
        renderer("").render(Conversation(HELLO, template="{% if %}"), 0)
    assert caught.value.param == "chat_template"
