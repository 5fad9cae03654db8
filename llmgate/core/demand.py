"""What a request may use of its key's tokens, as far as that is known before it is answered; and what it has used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmgate.core.cost import BYTES_PER_TOKEN
from llmgate.core.limits import MOST, Hold
from llmgate.core.plan import Got
from llmgate.core.policy import ANSWERS, EMBEDDING, RERANK, WHOLE, Choice
from llmnode.wire.node import Usage

_MAXIMA = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
_ANSWERS = ("n", "n_cmpl")
_MOST_ANSWERS = 1024
"""Of `n`: beyond it a node refuses the request anyway."""
_COMPUTED = frozenset(path for path, kinds in WHOLE.items() if kinds in (EMBEDDING, RERANK))
"""Where a prompt is computed and nothing generated. At the other paths of `WHOLE`, texts are only turned to tokens."""


def prompt_tokens(choice: Choice, size: int) -> int:
    """Tokens of a request's prompt, as estimated; the gate has no tokenizer. size: bytes of its body.

    By bytes of the prompt where a policy has counted them (core/cost.py), else by those of the whole body.
    """
    cost = choice.ranked[0].cost if choice.ranked else None
    return (cost.prompt if cost else 0) or math.ceil(size / BYTES_PER_TOKEN)


def spent(usage: Usage | None, got: Got, prompt: int, hold: Hold | None) -> int:
    """Tokens that a request has used, however it ended.

    Its node says it of an answer that came to its end. Of one that broke off, the ids that are out are known if another
    node could have gone on with it, else what was reserved stands. One of which nothing came has used nothing.
    """
    if usage:
        return usage.prompt_tokens + usage.completion_tokens
    if got.ids and got.resumable:
        return prompt + got.ids
    return hold.tokens if hold and got.content else 0


def demand(body: Mapping[str, Any], path: str, prompt_tokens: int, *, default_max: int, n_ctx: int) -> int:
    """The most tokens that a request may use, as far as that can be known before: its prompt once, and of each answer
    what the client allows, or `default_max`, up to what a context holds.

    prompt_tokens: of all its prompts together, as estimated.    n_ctx: 0 for unknown.
    """
    if path not in ANSWERS:
        return prompt_tokens if path in _COMPUTED else 0
    most = max(_named(body, _MAXIMA, 0), default=default_max)
    if n_ctx:
        most = min(most, n_ctx)
    answers = min(max(_named(body, _ANSWERS, 1), default=1), _MOST_ANSWERS)
    return prompt_tokens + most * answers * _prompts(body.get("prompt"))


def _prompts(prompt: Any) -> int:
    """How many prompts that is: a list of texts, or of lists of ids, is one for each."""
    several = isinstance(prompt, list) and any(isinstance(one, (str, list)) for one in prompt)
    return len(prompt) if several else 1


def _named(body: Mapping[str, Any], names: Sequence[str], least: int) -> list[int]:
    """The values of these fields that a node might take. One that it refuses costs nothing in the end."""
    values = (body.get(name) for name in names)
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and least <= v <= MOST]
