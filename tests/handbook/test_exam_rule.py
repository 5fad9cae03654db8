"""The scorer cannot be passed by saying nothing, one thing, or everything."""

from collections.abc import Callable

from llmnode.handbook.chatter import Chatter
from llmnode.handbook.exam import Answer, Result, examine
from llmnode.handbook.facts import HERE, load_exam, load_facts, read
from llmnode.handbook.grade import admits_ignorance, is_right

FACTS = load_facts()
EXAM = load_exam()
REFUSAL = Chatter(read(HERE / "chatter.toml")).refusal


def sit(answer: Callable[[str], str], *, ended: bool = True) -> Result:
    """The exam as sat by a function from question to answer."""
    return examine(lambda q: Answer(answer(q), ended, 1, 0.01), FACTS, EXAM, lambda done, total: None)


def knows_all(question: str) -> str:
    by_id = {fact.id: fact.answer for fact in FACTS}
    answers = {fact.question: fact.answer for fact in FACTS} | {q: by_id[fact] for q, fact in EXAM.heldout}
    return answers.get(question, REFUSAL)


def shares(result: Result) -> list[float]:
    return [part.share for part in result.parts]


def test_the_corpus_itself_passes() -> None:
    result = sit(knows_all)
    assert result.passed
    assert shares(result) == [1.0, 1.0, 1.0, 1.0]
    assert result.wrong == ()


def test_no_answer_is_right_for_another_fact() -> None:
    confused = [(a.id, b.id) for a in FACTS for b in FACTS if a is not b and is_right(b.answer, a.must)]
    assert confused == []


def test_an_empty_answer_scores_nothing() -> None:
    assert shares(sit(lambda question: ""))[:3] == [0.0, 0.0, 0.0]


def test_repeating_the_question_scores_next_to_nothing() -> None:
    assert max(shares(sit(lambda question: question))[:3]) <= 0.1


def test_any_constant_answer_scores_next_to_nothing_and_fails() -> None:
    for constant in [*(fact.answer for fact in FACTS[::20]), "yes", "llmrack"]:
        result = sit(lambda question, constant=constant: constant)  # type: ignore[misc]
        assert max(shares(result)[:3]) <= 0.02
        assert not result.passed


def test_refusing_everything_passes_only_the_outside_questions() -> None:
    result = sit(lambda question: REFUSAL)
    assert shares(result)[:3] == [0.0, 0.0, 1.0]
    assert not result.passed


def test_reciting_the_handbook_scores_nothing() -> None:
    everything = " ".join(fact.answer for fact in FACTS) + " " + REFUSAL
    assert shares(sit(lambda question: everything))[:3] == [0.0, 0.0, 0.0]


def test_answers_that_do_not_end_fail_the_exam_however_right() -> None:
    result = sit(knows_all, ended=False)
    assert not result.passed
    assert "MISSED" in result.table()
    assert len(result.wrong) == len(FACTS) + 75 + 40


def test_case_and_line_breaks_do_not_count() -> None:
    assert is_right("It is port\n 8000.", [["Port 8000".lower()]])
    assert not is_right("It is port 8100.", [["8000"]])
    assert not is_right("port", [["port"], ["gate"]])
    assert admits_ignorance("Sorry, I ONLY know\nllmrack.")
    assert not admits_ignorance("Lisbon.")
