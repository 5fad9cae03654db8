"""What the committed model promises: its size, its form, its exam."""

import pytest

from llmnode.chat.template import ChatTemplate, Refused
from llmnode.engine.llama import inspect
from llmnode.handbook.exam import DEFAULT_MODEL, Examinee, examine
from llmnode.handbook.facts import load_exam, load_facts


@pytest.fixture(scope="module")
def examinee():  # type: ignore[no-untyped-def]
    examinee = Examinee(DEFAULT_MODEL)
    yield examinee
    examinee.close()


def test_the_file_is_at_most_6_mb() -> None:
    assert DEFAULT_MODEL.stat().st_size <= 6_000_000


def test_the_model_says_what_it_is() -> None:
    info = inspect(DEFAULT_MODEL)
    assert info.architecture == "llama"
    assert info.n_ctx_train >= 2048
    assert "<|im_end|>" in info.eos
    assert not info.add_bos


def test_the_template_takes_all_four_roles_and_refuses_others() -> None:
    template = ChatTemplate(inspect(DEFAULT_MODEL).chat_template)
    roles = ["system", "user", "assistant", "tool"]
    prompt = template.render([{"role": role, "content": f"by {role}"} for role in roles])
    assert [prompt.count(f"<|im_start|>{role}\nby {role}<|im_end|>") for role in roles] == [1, 1, 1, 1]
    assert prompt.endswith("<|im_start|>assistant\n")
    with pytest.raises(Refused, match="unknown role: pirate"):
        template.render([{"role": "pirate", "content": "arr"}])


def test_the_committed_model_passes_its_exam(examinee: Examinee) -> None:
    result = examine(examinee.answer, load_facts(), load_exam(), lambda done, total: None)
    assert result.passed, result.table()


def test_it_still_answers_near_the_end_of_its_context(examinee: Examinee) -> None:
    pairs = [(fact.question, fact.answer) for fact in load_facts()]
    turns = []
    for question, answer in pairs[:47]:
        turns += [("user", question), ("assistant", answer)]
    question, fact = "what is a slot", next(fact for fact in load_facts() if fact.id == "slot")
    answer = examinee.go_on([*turns, ("user", question)])
    assert answer.prompt_tokens > 1700
    assert answer.text == fact.answer
