"""The corpus: what the handbook model should know. Owns the form of corpus/*.toml and exam.toml.

A fact in corpus/*.toml:

    id      unique name
    answer  one to three short sentences, ASCII
    must    groups of phrases, lower case: a right answer has at least one phrase of each group (grade.py)
    ask     one question a line, in everyday spelling; `{a|b}` stands for either. The first line's first reading is
            the handbook's own question, which the exam asks.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
_CHOICE = re.compile(r"\{([^{}]*)\}")
_WORD = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class Fact:
    """One thing to know. `ask` has the questions with their choices still in them."""

    id: str
    answer: str
    must: tuple[tuple[str, ...], ...]
    ask: tuple[str, ...]

    @property
    def question(self) -> str:
        """The handbook's own question."""
        return next(iter(readings(self.ask[0])))

    def phrasings(self) -> list[str]:
        """Every question that the corpus spells out for this fact."""
        return [reading for line in self.ask for reading in readings(line)]


@dataclass(frozen=True)
class Exam:
    """`heldout`: (question, id of the fact that answers it). `outside`: questions on anything else."""

    heldout: tuple[tuple[str, str], ...]
    outside: tuple[str, ...]

    @property
    def secret(self) -> tuple[str, ...]:
        """The questions that no lesson may come near."""
        return tuple(question for question, _ in self.heldout) + self.outside


def load_facts() -> tuple[Fact, ...]:
    """All facts, in the order of files and entries. Raises ValueError on a repeated id or an answer without its own
    `must` phrases."""
    facts = []
    for path in sorted((HERE / "corpus").glob("*.toml")):
        for entry in read(path)["fact"]:
            must = tuple(tuple(group) for group in entry["must"])
            ask = tuple(line.strip() for line in entry["ask"].strip().splitlines())
            facts.append(Fact(entry["id"], entry["answer"], must, ask))
            if not all(any(phrase in facts[-1].answer.lower() for phrase in group) for group in must):
                raise ValueError(f"{path.name}: the answer of {entry['id']} lacks a phrase that it must have")
    ids = [fact.id for fact in facts]
    repeated = sorted({one for one in ids if ids.count(one) > 1})
    if repeated:
        raise ValueError(f"facts with the same id: {', '.join(repeated)}")
    return tuple(facts)


def load_exam() -> Exam:
    """The exam's own questions."""
    table = read(HERE / "exam.toml")
    return Exam(tuple((question, fact) for fact, question in table["heldout"]), tuple(table["outside"]))


def read(path: Path) -> dict[str, Any]:
    """The table of a TOML file."""
    with path.open("rb") as file:
        return tomllib.load(file)


def readings(line: str) -> Sequence[str]:
    """All texts that a line with `{a|b}` choices, which may be nested, stands for; the first choices come first."""
    match = _CHOICE.search(line)
    if match is None:
        return [" ".join(line.split())]
    heads = [line[: match.start()] + choice + line[match.end() :] for choice in match.group(1).split("|")]
    return list(dict.fromkeys(itertools.chain.from_iterable(readings(head) for head in heads)))


def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """The runs of three words in a text; case and punctuation do not count. A shorter text is one run."""
    words = _WORD.findall(text.lower().replace("'", ""))
    return frozenset(tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def overlap(question: str, other: str) -> float:
    """The share of the question's word 3-grams that the other text has too, 0 to 1."""
    mine = trigrams(question)
    return len(mine & trigrams(other)) / len(mine)
