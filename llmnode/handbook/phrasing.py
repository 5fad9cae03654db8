"""More ways to ask a question than the corpus spells out. Owns what speech.toml means; knows no facts.

A drawn question goes through: another opening, synonyms, something before, after or in between, then how it was typed
(case, question mark, a keyword query, a typing mistake). Each step happens with a chance of its own, so that the plain
question stays common and no two lessons are quite alike.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

_ASKS = re.compile(
    r"what|which|who|why|where|when|how|is|are|do|does|did|can|could|may|must|should|will|would|am|was|were"
)

_ONSETS: list[str] = [*"bcdfghjklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gl", "pl", "qu", "sk", "sp", "st", "tr"]
_ENDS: list[str] = [*"nlrkxm", "ng", "st", "sh", ""]


class Speech:
    """Turns a question into another way to ask it. Stateless: all chance comes from the dice passed in."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._openings: list[tuple[str, list[str]]] = [(start, others) for start, others in table["openings"]]
        self._before: list[str] = table["before"]
        self._after: list[str] = table["after"]
        self._asides: list[str] = table["asides"]
        self._fillers: list[str] = table["fillers"]
        self._small = frozenset(table["small_words"])
        self._synonyms: dict[str, list[list[str]]] = {}
        for line in table["synonyms"]:
            for word in line:
                self._synonyms.setdefault(word.lower(), []).append([one for one in line if one != word])
        longest_first = sorted(self._synonyms, key=len, reverse=True)
        self._known = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])", re.I)

    def vary(self, question: str, dice: random.Random) -> str:
        """Another way to ask the question."""
        text = question
        if dice.random() < 0.5:
            text = self._reopen(text, dice)
        if dice.random() < 0.5:
            text = self._replace(text, dice, 0.4)
        kind = dice.random()
        if kind < 0.10:
            text = self._keywords(text, dice)
        elif kind < 0.25:
            text = dice.choice(self._before) + text
        elif kind < 0.32:
            text = text + dice.choice(self._after)
        elif kind < 0.50:
            text = self._beside(text, dice)
        elif kind < 0.70:
            text = self._blur(text, dice)
        return typed(text, dice)

    def _reopen(self, text: str, dice: random.Random) -> str:
        for start, others in self._openings:
            if text.startswith(start):
                return dice.choice(others) + text[len(start) :]
        return text

    def _replace(self, text: str, dice: random.Random, chance: float) -> str:
        def swap(match: re.Match[str]) -> str:
            if dice.random() >= chance:
                return match.group(0)
            return dice.choice(dice.choice(self._synonyms[match.group(0).lower()]))

        return self._known.sub(swap, text)

    def _beside(self, text: str, dice: random.Random) -> str:
        aside = dice.choice(self._asides)
        return f"{aside}, {text}" if dice.random() < 0.5 else f"{text}, {aside}"

    def _blur(self, text: str, dice: random.Random) -> str:
        """Words left out and others slipped in: what remains must be enough to tell what is asked."""
        words: list[str] = []
        for word in text.split():
            if dice.random() < 0.15:
                words.append(dice.choice(self._fillers))
            if dice.random() > (0.4 if word.lower() in self._small else 0.12):
                words.append(word)
        return " ".join(words) or text

    def _keywords(self, text: str, dice: random.Random) -> str:
        words = [word for word in text.split() if word.lower() not in self._small]
        if len(words) < 2:
            return text
        if dice.random() < 0.3:
            dice.shuffle(words)
        return " ".join(words)


def typed(text: str, dice: random.Random) -> str:
    """The text as somebody types it: capital letters, a mark at the end, now and then a mistake."""
    text = text.strip()
    if dice.random() < 0.08:
        text = _mistype(text, dice)
    asks = any(_ASKS.fullmatch(word) for word in re.findall(r"[a-z]+", text.lower())[:6])
    if asks and dice.random() < 0.65:
        text += "?"
    elif not asks and dice.random() < 0.3:
        text += "."
    form = dice.random()
    if form < 0.5:
        return text[:1].upper() + text[1:]
    if form < 0.7:
        return text.lower()
    if form < 0.71:
        return text.upper()
    return text


def _mistype(text: str, dice: random.Random) -> str:
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i - 1].isalpha()]
    if not places:
        return text
    i = dice.choice(places)
    kind = dice.randrange(4)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    if kind == 2:
        return text[:i] + dice.choice(string.ascii_lowercase) + text[i + 1 :]
    return text[: i - 1] + text[i] + text[i - 1] + text[i + 1 :]


def pick(line: str, dice: random.Random, lists: Mapping[str, Sequence[str]]) -> str:
    """One reading of a line with `{a|b}` choices and `<name>` places; `<nonword>` is a word that nobody knows."""
    innermost = re.compile(r"\{([^{}]*)\}")
    while match := innermost.search(line):
        line = line[: match.start()] + dice.choice(match.group(1).split("|")) + line[match.end() :]

    def fill(match: re.Match[str]) -> str:
        return nonword(dice) if match.group(1) == "nonword" else dice.choice(lists[match.group(1)])

    return " ".join(re.sub(r"<(\w+)>", fill, line).split())


def nonword(dice: random.Random) -> str:
    """A word that means nothing, such as "brivel"."""
    parts = [dice.choice(_ONSETS) + dice.choice("aeiou") for _ in range(dice.randint(1, 3))]
    return "".join(parts) + dice.choice(_ENDS)
