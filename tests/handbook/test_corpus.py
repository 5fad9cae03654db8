"""What the corpus promises of itself."""

import re

import pytest

from llmnode.handbook.facts import HERE, Fact, load_exam, load_facts, overlap, read, readings, trigrams
from llmnode.handbook.lessons import SHARE, Secrets, Teacher

FACTS = load_facts()
EXAM = load_exam()

CHANGEABLE = re.compile(
    r"\b(?:8000|81\d\d)\b|`(?:make|llmnode|llmgate|ansible)|playbooks/|--\w|/(?:opt|etc|srv|v1|metrics|ready)\b"
    r"|\b(?:n_ctx|kv_cells|n_batch|queue_limit|drain_seconds|strict_fields|n_gpu_layers)\b|exit code"
)
"""Ports, commands, flags, paths, setting names."""


def test_there_are_at_least_150_facts_with_many_phrasings_each() -> None:
    assert len(FACTS) >= 150
    counts = {fact.id: len(set(fact.phrasings())) for fact in FACTS}
    assert min(counts.values()) >= 4, sorted(counts.items(), key=lambda item: item[1])[:5]
    assert sum(counts.values()) / len(counts) >= 12


def test_no_two_facts_have_the_same_answer_or_question() -> None:
    assert len({fact.answer for fact in FACTS}) == len(FACTS)
    asked = [(question.lower(), fact.id) for fact in FACTS for question in set(fact.phrasings())]
    owners: dict[str, set[str]] = {}
    for question, owner in asked:
        owners.setdefault(question, set()).add(owner)
    assert {question: ids for question, ids in owners.items() if len(ids) > 1} == {}


def test_answers_are_short_and_plain() -> None:
    for fact in FACTS:
        assert fact.answer.isascii(), fact.id
        assert len(fact.answer.split()) <= 40, fact.id
        assert fact.answer.endswith("."), fact.id


def test_facts_that_the_product_may_change_are_in_one_file() -> None:
    astray = []
    for path in sorted((HERE / "corpus").glob("*.toml")):
        if path.name != "product.toml":
            astray += [(path.name, entry["id"]) for entry in read(path)["fact"] if CHANGEABLE.search(entry["answer"])]
    assert astray == []


def test_the_exam_has_75_rephrasings_of_different_facts_and_40_outside_questions() -> None:
    assert len(EXAM.heldout) == 75
    assert len({fact for _, fact in EXAM.heldout}) == 75
    assert {fact for _, fact in EXAM.heldout} <= {fact.id for fact in FACTS}
    assert len(set(EXAM.outside)) == 40


def test_no_rephrasing_shares_more_than_60_percent_of_its_3_grams_with_a_phrasing_of_the_corpus() -> None:
    phrasings = [question for fact in FACTS for question in fact.phrasings()]
    near = [
        (question, phrasing)
        for question, _ in EXAM.heldout
        for phrasing in phrasings
        if overlap(question, phrasing) > SHARE
    ]
    assert near == []


def test_no_lesson_comes_near_a_secret_question() -> None:
    secrets = {question: trigrams(question) for question in EXAM.secret}
    watched = frozenset().union(*secrets.values())
    teacher = Teacher(seed=1)
    for _ in range(20_000):
        for role, text in teacher.conversation():
            if role != "user" or not (grams := trigrams(text) & watched):
                continue
            for question, wanted in secrets.items():
                assert len(grams & wanted) <= SHARE * len(wanted), (question, text)


def test_a_lesson_that_comes_near_is_noticed() -> None:
    secrets = Secrets(["what is the colour of a slot"])
    assert secrets.share("What is the colour of a slot?") == 1.0
    assert secrets.share("please tell me what is the colour of a SLOT") == 1.0
    assert secrets.share("what is the colour of money") == pytest.approx(3 / 5)
    assert secrets.share("a slot") == 0.0


def test_lessons_are_the_same_under_the_same_seed_and_others_under_another() -> None:
    first, again, other = ([t.conversation() for _ in range(50)] for t in (Teacher(3), Teacher(3), Teacher(4)))
    assert first == again
    assert first != other


def test_lessons_are_ascii_and_end_with_the_assistant() -> None:
    teacher = Teacher(seed=5)
    for _ in range(3000):
        turns = teacher.conversation()
        assert turns[-1][0] == "assistant"
        assert all(text.isascii() and text.strip() for _, text in turns), turns


def test_choices_may_be_nested_and_empty() -> None:
    assert readings("how {do|can {I|we}} start {it|}") == [
        "how do start it",
        "how do start",
        "how can I start it",
        "how can I start",
        "how can we start it",
        "how can we start",
    ]


def test_an_answer_without_its_own_phrase_is_refused(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "corpus").mkdir()
    entry = '[[fact]]\nid = "a"\nanswer = "It is red."\nmust = [["blue"]]\nask = "what colour is it"\n'
    (tmp_path / "corpus" / "one.toml").write_text(entry)
    monkeypatch.setattr("llmnode.handbook.facts.HERE", tmp_path)
    with pytest.raises(ValueError, match="the answer of a lacks"):
        load_facts()


def test_the_first_reading_is_the_handbooks_own_question() -> None:
    assert Fact("a", "Yes.", (), ("is {it|this} so", "really")).question == "is it so"
