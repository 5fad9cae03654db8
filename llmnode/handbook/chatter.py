"""Simple English around the handbook: small talk, refusals, and small skills that make the model general a little.

Owns what chatter.toml means. Every function returns turns: (role, text) pairs that end with the assistant's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from llmnode.handbook.phrasing import pick, typed

Turn = tuple[str, str]


class Chatter:
    """Makes conversations that are not about facts. Stateless: all chance comes from the dice passed in."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table
        self.refusal: str = table["refusal"]
        self._skills = (
            self._count, self._count_back, self._sort, self._sum, self._minus, self._greet, self._recall, self._repeat,
            self._story, self._longest, self._first_letter, self._tool,
        )  # fmt: skip

    def small_talk(self, dice: random.Random) -> list[Turn]:
        lines, answer = dice.choice(self._table["smalltalk"])
        text = typed(pick(dice.choice(lines), dice, self._table), dice)
        return [("user", text.rstrip(".?") + dice.choice(["", "", "!", ".", "?"])), ("assistant", answer)]

    def outside(self, dice: random.Random) -> list[Turn]:
        """A question about something else, and the refusal."""
        question = pick(dice.choice(self._table["outside"]), dice, self._table)
        return [("user", question), ("assistant", self.refusal)]

    def skill(self, dice: random.Random) -> list[Turn]:
        return dice.choice(self._skills)(dice)

    def _name(self, dice: random.Random) -> str:
        return str(dice.choice(self._table["names"]))

    def _words(self, dice: random.Random, least: int, most: int) -> list[str]:
        return dice.sample(self._table["words"], dice.randint(least, most))

    def _count(self, dice: random.Random) -> list[Turn]:
        first = dice.choice([1, 1, dice.randint(0, 30)])
        last = first + dice.randint(2, 9)
        ask = f"from {first} to {last}" if first != 1 or dice.random() < 0.3 else f"to {last}"
        text = dice.choice(["count ", "please count ", "can you count "]) + ask
        return [("user", typed(text, dice)), ("assistant", ", ".join(map(str, range(first, last + 1))) + ".")]

    def _count_back(self, dice: random.Random) -> list[Turn]:
        first = dice.randint(3, 12)
        text = dice.choice(["count down from ", "count backwards from ", "please count down from "]) + str(first)
        return [("user", typed(text, dice)), ("assistant", ", ".join(map(str, range(first, 0, -1))) + ".")]

    def _sort(self, dice: random.Random) -> list[Turn]:
        words = self._words(dice, 3, 5)
        ask = dice.choice(["sort these words: ", "put these words in order: ", "sort: ", "please sort "])
        return [("user", typed(ask, dice) + " " + ", ".join(words)), ("assistant", ", ".join(sorted(words)) + ".")]

    def _sum(self, dice: random.Random) -> list[Turn]:
        a, b = dice.randint(0, 12), dice.randint(0, 12)
        text = dice.choice([f"what is {a} + {b}", f"what is {a} plus {b}", f"{a} + {b}", f"how much is {a} and {b}"])
        return [("user", typed(text, dice)), ("assistant", f"{a} + {b} = {a + b}.")]

    def _minus(self, dice: random.Random) -> list[Turn]:
        a = dice.randint(0, 12)
        b = dice.randint(0, a)
        text = dice.choice([f"what is {a} - {b}", f"what is {a} minus {b}", f"{a} - {b}", f"take {b} from {a}"])
        return [("user", typed(text, dice)), ("assistant", f"{a} - {b} = {a - b}.")]

    def _greet(self, dice: random.Random) -> list[Turn]:
        name = self._name(dice)
        text = dice.choice(["my name is {}", "I am {}", "hello, I am {}", "hi, my name is {}", "call me {}"])
        return [("user", text.format(name)), ("assistant", f"Hello {name}! Ask me anything about llmrack.")]

    def _recall(self, dice: random.Random) -> list[Turn]:
        turns = self._greet(dice)
        name = turns[-1][1].split("!")[0].removeprefix("Hello ")
        ask = typed(dice.choice(["what is my name", "who am I", "do you remember my name", "say my name"]), dice)
        return [*turns, ("user", ask), ("assistant", f"Your name is {name}.")]

    def _repeat(self, dice: random.Random) -> list[Turn]:
        text = " ".join(self._words(dice, 1, 4)) if dice.random() < 0.6 else self._name(dice)
        ask = dice.choice(["repeat: ", "say ", "echo ", "repeat after me: ", "please say ", "just say "])
        return [("user", ask + text), ("assistant", text[:1].upper() + text[1:] + ".")]

    def _story(self, dice: random.Random) -> list[Turn]:
        name, animal = self._name(dice), dice.choice(self._table["animal"])
        place, find = dice.choice(self._table["places"]), dice.choice(self._table["finds"])
        colour = dice.choice(self._table["colours"])
        about = dice.choice(["", f" about {name}", f" about a {animal}", f" about {name} and a {animal}"])
        ask = dice.choice(["tell me a story", "tell me a short story", "tell a story", "please tell me a story"])
        ends = [
            f"They showed it to {self._name(dice)}, and everyone was glad.",
            f"{name} kept it, and the {animal} stayed for ever.",
            "They brought it back, and went home happy.",
        ]
        # "a elephant" would be wrong, and which article a word takes is no lesson for this model.
        told = f"{name} lived in a {place} with one {colour} {animal}. One day they found {find}. {dice.choice(ends)}"
        return [("user", typed(ask + about, dice)), ("assistant", told)]

    def _longest(self, dice: random.Random) -> list[Turn]:
        words = self._words(dice, 2, 4)
        ask = dice.choice(["which word is the longest: ", "find the longest word: ", "longest word of: "])
        return [("user", ask + ", ".join(words)), ("assistant", max(words, key=len).capitalize() + ".")]

    def _first_letter(self, dice: random.Random) -> list[Turn]:
        word = dice.choice(self._table["words"])
        ask = dice.choice(["what is the first letter of {}", "first letter of {}", "which letter does {} begin with"])
        return [("user", typed(ask.format(word), dice)), ("assistant", word[0].upper() + ".")]

    def _tool(self, dice: random.Random) -> list[Turn]:
        node, number = f"node-{dice.randint(1, 9)}", dice.randint(0, 40)
        states = ["starting", "loading", "ready", "draining", "failed"]
        if dice.random() < 0.5:
            state = dice.choice(states)
            ask = dice.choice(
                [f"what is the state of {node} now", f"how is {node}", f"look up {node}", f"state of {node}"]
            )
            return [("user", typed(ask, dice)), ("tool", f"{node}: {state}"), ("assistant", f"{node} is {state}.")]
        ask = dice.choice(
            [f"how many requests are on {node} now", f"requests on {node} now", f"look up the load of {node}"]
        )
        answer = f"{node} has {number} running requests."
        return [("user", typed(ask, dice)), ("tool", f"{node}: running {number}"), ("assistant", answer)]
