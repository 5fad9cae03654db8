"""An answer that is gone on with elsewhere says exactly what it would have said: over recorded logits, with every
sampler and a grammar, cut at every position."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.engine.grammar import Grammar, Grammars
from llmnode.engine.sampler import Drawn, Sampler, Vocabulary
from llmnode.engine.types import Sampling

LENGTH = 60
WORDS = [b"the ", b"an", b"d", b"(", b")", b"[", b"]", b"1", b"23", b"\n", b": ", b"\xc3", b"\xa9", b"then", b"e"]
VOCABULARY = Vocabulary([*WORDS, *(bytes([97 + n]) for n in range(26)), b"", b""], frozenset({42}))
SIZE = len(VOCABULARY.pieces)
GRAMMARS = Grammars(VOCABULARY.pieces, VOCABULARY.end_tokens)
PROMPT = (0, 13, 1, 2, 0, 13, 1, 9, 3, 20, 21, 0)

SETTINGS = {
    "greedy": Sampling(temperature=0),
    "temperature": Sampling(temperature=1.3),
    "top_k": Sampling(top_k=5),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(min_p=0.1),
    "typical_p": Sampling(typical_p=0.6),
    "top_n_sigma": Sampling(top_n_sigma=1.0),
    "xtc": Sampling(xtc_probability=0.5, xtc_threshold=0.05),
    "dry": Sampling(dry_multiplier=2.0, dry_allowed_length=1, top_k=3),
    "dry, last 8": Sampling(temperature=0, dry_multiplier=2.0, dry_allowed_length=1, dry_last_n=8),
    "repeat": Sampling(repeat_penalty=1.5, repeat_last_n=10),
    "repeat, all": Sampling(temperature=0, repeat_penalty=1.5, repeat_last_n=-1),
    "frequency": Sampling(temperature=0, frequency_penalty=0.7),
    "presence": Sampling(presence_penalty=1.0),
    "logit_bias": Sampling(logit_bias=((20, 3.0), (0, -math.inf))),
    "mirostat 1": Sampling(mirostat=1, mirostat_tau=2.0),
    "mirostat 2": Sampling(mirostat=2, mirostat_tau=2.0, mirostat_eta=0.3),
    "mirostat 2 and penalties": Sampling(mirostat=2, mirostat_tau=3.0, repeat_penalty=1.2, frequency_penalty=0.4),
    "everything": Sampling(
        temperature=1.5,
        top_k=20,
        top_p=0.95,
        min_p=0.01,
        typical_p=0.9,
        top_n_sigma=2.0,
        xtc_probability=0.4,
        xtc_threshold=0.1,
        dry_multiplier=1.0,
        repeat_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.2,
        logit_bias=((7, 1.0),),
    ),
}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Logits before each token of the answer; a few words come often, so that there is something to penalise."""
    rows = np.random.default_rng(7).normal(0, 1.5, (LENGTH, SIZE)).astype(np.float32)
    rows[:, [0, 13, 1, 20, 21]] += 2
    rows[:, 42] -= 6
    return rows


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    """Balanced brackets around words: its state after a text is a stack."""
    rules = r"""
        root ::= (word | "(" root ")" | "[" root "]")+
        word ::= [a-z: é]{1,3} [0-9]{0,2}
    """
    return GRAMMARS.gbnf(rules)


def sampler_of(sampling: Sampling, grammar: Grammar | None) -> Sampler:
    matcher = None if grammar is None else grammar.matcher()
    return Sampler(sampling, PROMPT, vocabulary=VOCABULARY, matcher=matcher, logprobs=2)


def go_on(sampler: Sampler, rows: np.ndarray, start: int = 0) -> list[Drawn]:
    answer = []
    for position in range(start, LENGTH):
        drawn = sampler.draw(rows[position], int(rows[position].argmax()), position)
        assert drawn is not None
        sampler.accept(drawn.token, rows[position])
        answer.append(drawn)
    return answer


def ids(answer: list[Drawn]) -> list[int]:
    return [drawn.token for drawn in answer]


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_an_answer_cut_anywhere_goes_on_as_if_it_had_not_been(
    name: str, constrained: bool, rows: np.ndarray, grammar: Grammar
) -> None:
    sampling = SETTINGS[name]
    over = grammar if constrained else None
    whole = go_on(sampler_of(sampling, over), rows)
    assert len(set(ids(whole))) > 1
    for cut in range(LENGTH):
        sampler = sampler_of(sampling, over)
        for position, drawn in enumerate(whole[:cut]):
            sampler.accept(drawn.token, rows[position] if sampling.needs_replayed_logits else None)
        assert go_on(sampler, rows, cut) == whole[cut:]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "greedy"])
def test_each_of_these_settings_has_a_say(name: str, rows: np.ndarray) -> None:
    plain = go_on(sampler_of(Sampling(temperature=SETTINGS[name].temperature and 1.0), None), rows)
    assert ids(go_on(sampler_of(SETTINGS[name], None), rows)) != ids(plain)


def test_a_skipped_token_is_noticed(rows: np.ndarray) -> None:
    for name in ("dry", "repeat", "frequency", "mirostat 2"):
        whole = go_on(sampler_of(SETTINGS[name], None), rows)
        differs = False
        for cut in range(10, LENGTH):
            sampler = sampler_of(SETTINGS[name], None)
            for position in range(cut - 1):
                sampler.accept(whole[position].token, rows[position])
            differs |= go_on(sampler, rows, cut) != whole[cut:]
        assert differs, name


@given(st.sampled_from(sorted(SETTINGS)), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_asking_for_a_token_changes_nothing(name: str, constrained: bool, data: st.DataObject) -> None:
    rows = np.random.default_rng(3).normal(0, 2, (LENGTH, SIZE)).astype(np.float32)
    rows[:, 42] -= 9
    over = GRAMMARS.gbnf('root ::= ("(" root ")" | [a-z ]+)+') if constrained else None
    asked, left_alone = sampler_of(SETTINGS[name], over), sampler_of(SETTINGS[name], over)
    for position in range(20):
        for _ in range(data.draw(st.integers(0, 2))):
            other = rows[data.draw(st.integers(0, LENGTH - 1))]
            asked.draw(other, int(other.argmax()), data.draw(st.integers(0, 100)))
        row = rows[position]
        first = asked.draw(row, int(row.argmax()), position)
        assert first == left_alone.draw(row, int(row.argmax()), position)
        assert first is not None
        asked.accept(first.token, row)
        left_alone.accept(first.token, row)
