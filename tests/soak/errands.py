"""What clients do to a node, as errands: one request each, and how its client behaves.

Owns: the mix of errands and what each answer must look like. Refuses to know: sockets, time, the node's inside. The
same seed gives the same errands in the same order.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

WORDS = [
    "rack", "node", "slot", "cell", "prefix", "token", "stream", "batch", "queue", "drain", "lease", "model", "prompt",
    "answer", "cache", "memory", "core", "thread", "step", "clock", "seed", "grammar", "stop", "gate", "fleet", "shelf",
    "cable", "switch", "power", "fan", "disk", "copy", "move", "read", "write", "wait", "send",
]  # fmt: skip
COMMON = ("You are the night watch of a machine room. Report briefly and only what you know. " * 3)[:200]
STOPS = ("e", "a", " ", "ing", "\n", "th", "r", "0")

DIGITS = 'root ::= [0-9] [0-9]* "."'
YES_NO = 'root ::= ("yes" | "no") (" " ("yes" | "no"))*'
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "level": {"type": "string", "enum": ["low", "high"]}},
    "required": ["ok", "level"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Errand:
    """One request.

    kind: its name in the summary.      path, body: what is sent; bytes go as they are.
    statuses: what the node may answer. 503 is always allowed: it says when to come back.
    leave_after: reads of the stream after which the client leaves.     leave_at: seconds after which it does.
    check: raises AssertionError when the texts of a whole answer, one for each choice with its finish, cannot be right.
    """

    kind: str
    path: str
    body: Mapping[str, Any] | bytes
    statuses: frozenset[int] = frozenset({200})
    leave_after: int | None = None
    leave_at: float | None = None
    check: Callable[[list[tuple[str, str]]], None] = field(default=lambda choices: None)

    @property
    def streams(self) -> bool:
        return isinstance(self.body, Mapping) and bool(self.body.get("stream"))

    @property
    def choices(self) -> int:
        return int(self.body.get("n", 1)) if isinstance(self.body, Mapping) else 1

    @property
    def limit(self) -> int:
        """Answer tokens of one choice at most."""
        return int(self.body.get("max_tokens", 1 << 30)) if isinstance(self.body, Mapping) else 0


def errands(count: int, seed: int, n_ctx: int) -> list[Errand]:
    """`count` errands for a node whose requests may hold `n_ctx` tokens."""
    dice = random.Random(seed)
    kinds = list(_MIX)
    return [_MAKERS[dice.choices(kinds, [_MIX[k] for k in kinds])[0]](dice, n_ctx) for _ in range(count)]


_MIX = {
    "plain": 24, "shared prefix": 12, "sampled": 10, "stop": 8, "n": 6, "grammar": 8, "schema": 4, "logprobs": 4,
    "full context": 4, "hangs up": 10, "gives up": 6, "bad": 10,
}  # fmt: skip
"""Weights of the kinds."""


def _prompt(dice: random.Random, n_ctx: int, *, common: bool = False) -> str:
    """Mostly short, seldom half of a context; a word takes about two tokens here."""
    most = n_ctx // 4
    words = min(most, 1 + int(dice.expovariate(1 / 20)))
    return (COMMON if common else "") + " ".join(dice.choices(WORDS, k=words))


def _body(dice: random.Random, prompt: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """(path, body) of a chat or a completion, streamed or whole."""
    body: dict[str, Any] = {"max_tokens": 1 + int(dice.expovariate(1 / 40)), "seed": dice.randrange(1 << 30), **more}
    if dice.random() < 0.6:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if dice.random() < 0.5:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **body}
    return "/v1/completions", {"prompt": prompt, **body}


def _plain(dice: random.Random, n_ctx: int) -> Errand:
    path, body = _body(dice, _prompt(dice, n_ctx), temperature=dice.choice([0, 0.7, 1]))
    return Errand("plain", path, body)


def _shared(dice: random.Random, n_ctx: int) -> Errand:
    return Errand("shared prefix", *_body(dice, _prompt(dice, n_ctx // 2, common=True)))


def _sampled(dice: random.Random, n_ctx: int) -> Errand:
    options: dict[str, Any] = dice.choice(
        [
            {"top_k": 20, "top_p": 0.9},
            {"min_p": 0.1, "repeat_penalty": 1.2},
            {"frequency_penalty": 0.5, "presence_penalty": -0.5},
            {"typical_p": 0.8, "top_n_sigma": 1.0},
            {"mirostat": 2},
            {"mirostat": 1, "mirostat_tau": 4},
            {"dry_multiplier": 0.8, "xtc_probability": 0.5},
            {"logit_bias": {"100": 5, "200": -100}},
        ]
    )
    return Errand("sampled", *_body(dice, _prompt(dice, n_ctx), temperature=1.2, **options))


def _stop(dice: random.Random, n_ctx: int) -> Errand:
    stops = dice.sample(STOPS, k=dice.randint(1, 3))

    def check(choices: list[tuple[str, str]]) -> None:
        for text, _ in choices:
            assert not any(stop in text for stop in stops), f"one of {stops} is in {text!r}"

    return Errand("stop", *_body(dice, _prompt(dice, n_ctx), stop=stops), check=check)


def _several(dice: random.Random, n_ctx: int) -> Errand:
    return Errand("n", *_body(dice, _prompt(dice, n_ctx), n=dice.randint(2, 4)))


def _grammar(dice: random.Random, n_ctx: int) -> Errand:
    grammar, whole, part = dice.choice(
        [(DIGITS, r"[0-9]+\.", r"[0-9]*\.?"), (YES_NO, r"(yes|no)( (yes|no))*", r"[yesno ]*")]
    )
    return Errand("grammar", *_body(dice, _prompt(dice, n_ctx), grammar=grammar), check=_matches(whole, part))


def _matches(whole: str, part: str) -> Callable[[list[tuple[str, str]]], None]:
    def check(choices: list[tuple[str, str]]) -> None:
        for text, finish in choices:
            pattern = whole if finish == "stop" else part
            assert re.fullmatch(pattern, text), f"{text!r}, ended by {finish}, does not match {pattern}"

    return check


def _schema(dice: random.Random, n_ctx: int) -> Errand:
    wanted = {"type": "json_schema", "json_schema": {"name": "state", "schema": SCHEMA}}
    path, body = _body(dice, _prompt(dice, n_ctx), response_format=wanted)
    body["max_tokens"] = 60

    def check(choices: list[tuple[str, str]]) -> None:
        for text, finish in choices:
            if finish == "stop":
                value = json.loads(text)
                assert isinstance(value["ok"], bool) and value["level"] in ("low", "high"), text

    return Errand("schema", path, body, check=check)


def _logprobs(dice: random.Random, n_ctx: int) -> Errand:
    path, body = _body(dice, _prompt(dice, n_ctx))
    chat = {"logprobs": True, "top_logprobs": 3}
    return Errand("logprobs", path, {**body, **(chat if "messages" in body else {"logprobs": 2})})


def _full_context(dice: random.Random, n_ctx: int) -> Errand:
    """An answer that goes on until its context is full: with a few of these at once the cells do not suffice."""
    prompt = " ".join(dice.choices(WORDS, k=n_ctx // 8))
    path, body = _body(dice, prompt, ignore_eos=True, temperature=0)
    del body["max_tokens"]

    def check(choices: list[tuple[str, str]]) -> None:
        assert [finish for _, finish in choices] == ["length"], choices

    return Errand("full context", path, body, check=check)


def _hangs_up(dice: random.Random, n_ctx: int) -> Errand:
    path, body = _body(dice, _prompt(dice, n_ctx), max_tokens=n_ctx // 2, ignore_eos=True)
    body["stream"] = True
    return Errand("hangs up", path, body, leave_after=dice.randint(1, 12))


def _gives_up(dice: random.Random, n_ctx: int) -> Errand:
    """Leaves after a moment, wherever its request is: at the door, in the queue, in prefill, in its answer."""
    prompt = " ".join(dice.choices(WORDS, k=n_ctx // 5))
    path, body = _body(dice, prompt, max_tokens=n_ctx // 3, n=dice.randint(1, 3))
    return Errand("gives up", path, body, leave_at=dice.uniform(0.0, 0.25))


def _bad(dice: random.Random, n_ctx: int) -> Errand:
    path, body = _body(dice, _prompt(dice, n_ctx))
    wrong: list[dict[str, Any] | bytes] = [b'{"prompt": "x", ', b"\xff\xfe", b"[]"]
    wrong += [{**body, name: value} for name, value in _WRONG.items()]
    wrong.append({"prompt": "cell " * n_ctx, "messages": [{"role": "user", "content": "cell " * n_ctx}]})
    wrong.append({"prompt": [], "messages": []})
    return Errand("bad", path, dice.choice(wrong), statuses=frozenset({400, 404}))


_WRONG: Mapping[str, Any] = {
    "max_tokens": -1, "temperature": "hot", "stop": [""], "n": 1000, "model": "another", "seed": 1.5,
    "grammar": "root ::= (", "logit_bias": {"99999999": 1},
}  # fmt: skip
"""Fields that no answer can be given to."""


_MAKERS: Mapping[str, Callable[[random.Random, int], Errand]] = {
    "plain": _plain, "shared prefix": _shared, "sampled": _sampled, "stop": _stop, "n": _several, "grammar": _grammar,
    "schema": _schema, "logprobs": _logprobs, "full context": _full_context, "hangs up": _hangs_up,
    "gives up": _gives_up, "bad": _bad,
}  # fmt: skip
