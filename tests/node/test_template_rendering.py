"""Chat templates: what models expect of the environment, what is refused, and that real ones render."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from llmnode.chat.template import ChatTemplate, TemplateError
from llmnode.wire.errors import InvalidRequest

COLLECTION = Path(__file__).resolve().parents[3] / "shared" / "data" / "chat-templates"
HELLO = [{"role": "user", "content": "Hello there"}]
NOON = datetime(2031, 5, 4, 12, 0, 0)


def render(source: str, messages: list[dict[str, str]] = HELLO) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>", clock=lambda: NOON).render(messages)


def test_a_model_without_a_template_gets_chatml() -> None:
    template = ChatTemplate("")
    assert template.is_default
    assert template.render(HELLO) == "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"


def test_the_environment_is_the_one_templates_are_written_for() -> None:
    assert render("{{ bos_token }}{{ eos_token }}") == "<s></s>"
    assert render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n") == (
        "Hello there\n"
    )
    assert render('{{ {"a": "<é>"} | tojson }}') == '{"a": "<é>"}'
    assert render('{{ {"a": 1} | tojson(indent=2) }}') == '{\n  "a": 1\n}'
    assert render("{{ strftime_now('%d %b %Y') }}") == "04 May 2031"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% if tools %}tools{% endif %}{{ add_generation_prompt }}") == "True"


def test_a_template_that_refuses_makes_a_400_that_names_messages() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"
    assert caught.value.status == 400


@pytest.mark.parametrize("source", ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ none.x.y }}"])
def test_a_template_that_breaks_makes_a_400_too(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


def test_a_template_sees_nothing_of_what_it_calls() -> None:
    assert render("{{ raise_exception.__globals__ }}") == ""


def test_a_template_that_does_not_compile_is_told_apart() -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate("{% if %}")


def test_rendering_leaves_the_messages_as_they_were() -> None:
    messages = [{"role": "user", "content": "x"}]
    render("{% set m = messages[0] %}{{ m.content }}", messages)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.skipif(not COLLECTION.is_dir(), reason=f"no collection of templates at {COLLECTION}")
def test_the_collection_is_there_to_be_tried() -> None:
    assert len(list(COLLECTION.glob("*.jinja"))) >= 10


@pytest.mark.parametrize("path", sorted(COLLECTION.glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_of_real_models_render_a_conversation(path: Path) -> None:
    template = ChatTemplate(path.read_text(encoding="utf-8"), bos="<s>", eos="</s>", clock=lambda: NOON)
    prompt = template.render(
        [
            {"role": "user", "content": "What is a rack?"},
            {"role": "assistant", "content": "A frame for machines."},
            {"role": "user", "content": "How tall is one?"},
        ]
    )
    places = [prompt.find(text) for text in ("What is a rack?", "A frame for machines.", "How tall is one?")]
    assert -1 not in places
    assert places == sorted(places)
    assert len(prompt) > prompt.index("How tall is one?") + len("How tall is one?")  # the answer's turn is opened
