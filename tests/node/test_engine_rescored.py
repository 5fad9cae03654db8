"""The engine at its hardest on the model that comes with llmrack: every answer is one that the model could have given.

Shared prompts, a cache far too small, guesses, answers that were cut and go on elsewhere: each is scored again, alone,
by the rule of tests/rescoring.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from llmnode.engine import llama
from llmnode.engine.llama import LlamaBackend, LlamaOptions
from llmnode.engine.loop import Limits
from llmnode.engine.types import Ask, Sampling
from llmnode.settings import HANDBOOK
from tests.node.engine_rig import Answer, running
from tests.rescoring import is_credible, rescored

GREEDY = Sampling(temperature=0)
TOKENS = 80


@pytest.fixture(scope="module")
def scorer() -> Iterator[LlamaBackend]:
    backend = llama.load(LlamaOptions(HANDBOOK, threads=1, slots=1, n_ctx=512))
    yield backend
    backend.close()


def prompts(scorer: LlamaBackend) -> list[tuple[int, ...]]:
    common = "llmrack is an LLM service that a team runs on its own machines. " * 4
    ends = ["What is a slot?", "What is a node?", "What does the gate do?", "What is llmrack?", "one two three one two"]
    return [tuple(scorer.tokenize(text, special=True)) for text in [*(common + end for end in ends), *ends]]


def answered(asks: list[Ask]) -> tuple[list[Answer], dict[str, int]]:
    options = LlamaOptions(HANDBOOK, threads=1, slots=6, n_ctx=256, kv_cells=256, n_batch=64)
    answers = [Answer() for _ in asks]
    with running(llama.load(options), Limits()) as engine:
        for ask, answer in zip(asks, answers, strict=True):
            engine.submit(ask, answer)
        for answer in answers:
            answer.wait()
        timings = engine.stats().timings
    counts = {name: getattr(timings, name) for name in ("cached_tokens", "swapped", "dropped", "drafted", "failed")}
    return answers, counts


def test_answers_out_of_a_full_cache_stand_up_alone(scorer: LlamaBackend) -> None:
    asks = [Ask(prompt, GREEDY, TOKENS, ignore_eos=True) for prompt in prompts(scorer)]
    answers, counts = answered(asks)
    assert counts["failed"] == 0
    assert counts["cached_tokens"] > 100, counts
    assert counts["swapped"] + counts["dropped"] > 0, counts
    for ask, answer in zip(asks, answers, strict=True):
        assert is_credible(rescored(scorer, ask.prompt, answer.ids), answer.ids)


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_answers_that_go_on_elsewhere_stand_up_alone(scorer: LlamaBackend, cut: int) -> None:
    asks = [Ask(prompt, GREEDY, TOKENS, ignore_eos=True) for prompt in prompts(scorer)]
    firsts, _ = answered(asks)
    halves = [answer.ids[:cut] for answer in firsts]
    resumed = [
        Ask(a.prompt, GREEDY, TOKENS, ignore_eos=True, replayed=half) for a, half in zip(asks, halves, strict=True)
    ]
    seconds, _ = answered(resumed)
    noticed = 0
    for ask, half, answer in zip(asks, halves, seconds, strict=True):
        ids = half + answer.ids
        if len(ids) < cut + 2:
            continue  # all that came after the cut is control tokens, which nobody hears of
        assert is_credible(rescored(scorer, ask.prompt, ids), ids)
        gone = ids[:cut] + ids[cut + 1 :]
        skipped = rescored(scorer, ask.prompt, gone)
        gap = skipped.max(axis=1) - skipped[np.arange(len(gone)), list(gone)]
        noticed += gap.max() > 0.5  # where a token is said again and again, one less is no other text
    assert noticed, "an answer that skips a token must not pass"
