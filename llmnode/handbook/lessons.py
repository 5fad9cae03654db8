"""Conversations to learn from, without end, under a seed. Owns the mixture; knows no tokens and no network.

What the exam keeps secret stays out: a question that shares more than 60% of the word 3-grams of any held-out or
outside question of the exam is drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from llmnode.handbook.chatter import Chatter, Turn
from llmnode.handbook.facts import HERE, Exam, Fact, load_exam, load_facts, read, trigrams
from llmnode.handbook.phrasing import Speech, pick, typed

SHARE = 0.6
"""At most this share of a secret question's 3-grams may be in one question of a lesson (a bar of the exam)."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the handbook model of llmrack.",
    "Answer briefly.",
    "You are a helpful, friendly assistant. Answer in one or two sentences.",
    "You answer questions about llmrack.",
    "Be concise.",
)


@dataclass(frozen=True)
class Mixture:
    """How often each kind of exchange comes, in parts."""

    facts: float = 66
    outside: float = 20
    small_talk: float = 4
    skills: float = 10


class Secrets:
    """Knows whether a text comes too near to a secret question."""

    def __init__(self, questions: Sequence[str]) -> None:
        self._sets = [trigrams(question) for question in questions]
        self._where: dict[tuple[str, ...], list[int]] = {}
        for number, grams in enumerate(self._sets):
            for gram in grams:
                self._where.setdefault(gram, []).append(number)

    def share(self, text: str) -> float:
        """The largest share of any secret question's 3-grams that the text has, 0 to 1."""
        hits: dict[int, int] = {}
        for gram in trigrams(text):
            for number in self._where.get(gram, ()):
                hits[number] = hits.get(number, 0) + 1
        return max((count / len(self._sets[number]) for number, count in hits.items()), default=0.0)


class Teacher:
    """Draws conversations. The same seed gives the same ones."""

    def __init__(
        self, seed: int, mixture: Mixture | None = None, facts: Sequence[Fact] | None = None, exam: Exam | None = None
    ) -> None:
        self._dice = random.Random(seed)
        self._mixture = mixture or Mixture()
        self._facts = tuple(facts if facts is not None else load_facts())
        self._speech = Speech(read(HERE / "speech.toml"))
        self._chatter = Chatter(read(HERE / "chatter.toml"))
        self._secrets = Secrets((exam or load_exam()).secret)
        # By line, not by reading: a line with many choices must not crowd out the others.
        self._deck: list[Fact] = []

    def conversation(self) -> list[Turn]:
        """One conversation: sometimes a system message, then mostly one exchange, sometimes up to four."""
        dice = self._dice
        turns: list[Turn] = [("system", dice.choice(SYSTEM_PROMPTS))] if dice.random() < 0.15 else []
        for _ in range(dice.choices((1, 2, 3, 4), (76, 14, 6, 4))[0]):
            turns += self.exchange()
        return turns

    def exchange(self) -> list[Turn]:
        """One exchange that no secret question is near to."""
        while True:
            turns = self._draw()
            if all(self._secrets.share(text) <= SHARE for role, text in turns if role == "user"):
                return turns

    def _draw(self) -> list[Turn]:
        mixture, dice = self._mixture, self._dice
        kinds = (mixture.facts, mixture.outside, mixture.small_talk, mixture.skills)
        kind = dice.choices(range(4), kinds)[0]
        if kind == 0:
            return self._fact()
        if kind == 1:
            turns = self._chatter.outside(dice)
            vary = self._speech.vary if dice.random() < 0.5 else typed
            return [("user", vary(turns[0][1], dice)), turns[1]]
        return self._chatter.small_talk(dice) if kind == 2 else self._chatter.skill(dice)

    def _fact(self) -> list[Turn]:
        dice = self._dice
        if not self._deck:
            # Every fact once before any comes again.
            self._deck = list(self._facts)
            dice.shuffle(self._deck)
        fact = self._deck.pop()
        line = dice.choice(fact.ask)
        question = pick(line, dice, {})
        question = self._speech.vary(question, dice) if dice.random() < 0.85 else typed(question, dice)
        return [("user", question), ("assistant", fact.answer)]
