"""What clients ask during chaos: requests of all kinds, drawn from a seed, each with a seed of its own.

Owns: the mix. Refuses to know: sockets, nodes, what the right answer is. Each request has exactly one right answer on
the fake backend, so every one that leaves something to chance brings a `seed`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.soak.errands import DIGITS, WORDS, YES_NO

MODEL = "chaos"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "level": {"type": "string", "enum": ["low", "high"]},
        "parts": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 8},
    },
    "required": ["name", "level", "parts"],
    "additionalProperties": False,
}
SAMPLERS: tuple[Mapping[str, Any], ...] = (
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.1, "repeat_penalty": 1.2},
    {"frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"typical_p": 0.8, "top_n_sigma": 1.0},
    {"mirostat": 1, "mirostat_tau": 4},
    {"mirostat": 2},
    {"dry_multiplier": 0.8, "xtc_probability": 0.5},
    {"logit_bias": {"100": 5, "101": -100}},
)


@dataclass(frozen=True)
class Ask:
    """One request. kind: its name in the counts.      body: what is sent, as JSON."""

    kind: str
    path: str
    body: Mapping[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body["stream"])

    @property
    def choices(self) -> int:
        return int(self.body.get("n", 1))


def asks(count: int, seed: int, tokens: int) -> list[Ask]:
    """`count` requests of all kinds in turn, with answers of about `tokens` tokens for the most part."""
    dice = random.Random(seed)
    kinds = list(_KINDS)
    return [_ask(kinds[number % len(kinds)], dice, tokens) for number in range(count)]


def plain_asks(count: int, seed: int, tokens: int) -> list[Ask]:
    """`count` requests whose answers can be scored again: greedy and seeded, each with the tokens it was made of."""
    dice = random.Random(seed)
    out = []
    for number in range(count):
        sampling = {"temperature": 0} if number % 2 else {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": _question(dice)}], "max_tokens": tokens,
            "seed": dice.randrange(1 << 30), "logprobs": True, "stream": number % 4 < 3, **sampling,
        }  # fmt: skip
        kind = "greedy" if number % 2 else "seeded"
        out.append(Ask(kind, "/v1/chat/completions", _with_usage(body)))
    return out


def _ask(kind: str, dice: random.Random, tokens: int) -> Ask:
    text = " ".join(dice.choices(WORDS, k=dice.randint(1, 30)))
    body: dict[str, Any] = {
        "model": MODEL, "max_tokens": max(1, round(tokens * dice.uniform(0.3, 1.2))), "seed": dice.randrange(1 << 30),
        "temperature": dice.choice([0.7, 1.0, 1.3]), "stream": dice.random() < 0.7,
    }  # fmt: skip
    chat = dice.random() < 0.5
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    body |= _KINDS[kind](dice, chat)
    return Ask(kind, "/v1/chat/completions" if chat else "/v1/completions", _with_usage(body))


def _with_usage(body: dict[str, Any]) -> dict[str, Any]:
    return body | ({"stream_options": {"include_usage": True}} if body["stream"] else {})


def _question(dice: random.Random) -> str:
    return f"What is a {dice.choice(WORDS)}, and what has it to do with a {dice.choice(WORDS)}?"


_KINDS: Mapping[str, Callable[[random.Random, bool], dict[str, Any]]] = {
    "greedy": lambda dice, chat: {"temperature": 0, "ignore_eos": True},
    "sampled": lambda dice, chat: {**dice.choice(SAMPLERS), "ignore_eos": dice.random() < 0.8},
    "grammar": lambda dice, chat: {"grammar": dice.choice([DIGITS, YES_NO])},
    "schema": lambda dice, chat: {
        "response_format": {"type": "json_schema", "json_schema": {"name": "part", "schema": SCHEMA}}
    },
    "n": lambda dice, chat: {"n": dice.randint(2, 3), "ignore_eos": True},
    "stop": lambda dice, chat: {"stop": dice.sample(["ab", "e ", "xyz", "th", "q"], k=2), "ignore_eos": True},
    "logprobs": lambda dice, chat: {
        "ignore_eos": True,
        **({"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}),
    },
}
