"""The rule by which an answer of the exam is right. Knows nothing of models.

An answer is compared in lower case with its spaces made single.

- To a handbook question it is right when it has at least one phrase of EACH of the fact's groups (`must` in the
  corpus), and at most 60 words. The phrases are such that no other fact's answer has them all, so an empty answer is
  right for none and any one constant answer for one fact only; the limit of words keeps a recital from passing.
- To an outside question it is right when it says that it only knows llmrack, in at most 60 words. A model that always
  says so passes this part and fails the others.
- An answer that did not end by itself counts as such against the last bar, whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_WORDS = 60
ADMISSIONS = ("only know llmrack", "only know about llmrack", "know nothing but llmrack")


def is_right(answer: str, must: Sequence[Sequence[str]]) -> bool:
    """Whether the answer gives the fact with these groups of phrases."""
    text = _plain(answer)
    return _short(text) and all(any(phrase in text for phrase in group) for group in must)


def admits_ignorance(answer: str) -> bool:
    """Whether the answer says that the question is none of the handbook's business."""
    text = _plain(answer)
    return _short(text) and any(phrase in text for phrase in ADMISSIONS)


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split())


def _short(text: str) -> bool:
    return len(text.split()) <= MOST_WORDS
