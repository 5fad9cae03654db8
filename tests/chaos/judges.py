"""Whether an answer is the right one: equal to its undisturbed run, or one that the model could have given.

Owns: the two rules. Refuses to know: how an answer came. The fake backend has one right answer to each request,
whatever runs beside it; a real model's logits depend on that, so there the tokens are scored again, alone
(tests/rescoring.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from llmnode.chat.template import ChatTemplate
from llmnode.engine import llama
from llmnode.engine.llama import LlamaBackend, LlamaOptions
from llmnode.engine.types import Sampling
from llmnode.settings import HANDBOOK
from tests.chaos.answers import Answer
from tests.chaos.asks import Ask
from tests.rescoring import is_credible, is_credible_draw, rescored


class Judge(Protocol):
    def trouble(self, ask: Ask, answer: Answer) -> str:
        """What is wrong with a whole answer, nothing when it is right."""


class Undisturbed:
    """Knows the answers that a quiet node has given."""

    def __init__(self, expected: Mapping[int, Answer]) -> None:
        self._expected = expected

    @classmethod
    def of(cls, asks: list[Ask], given: list[Answer]) -> Undisturbed:
        return cls({id(ask): answer for ask, answer in zip(asks, given, strict=True)})

    def trouble(self, ask: Ask, answer: Answer) -> str:
        expected = self._expected[id(ask)]
        if answer == expected:
            return ""
        if str(answer) == str(expected):
            return f"logprobs differ: {answer.choices} is not {expected.choices}"
        return f"{answer} is not {expected}"


class Rescored:
    """Scores answers of `plain_asks` again with the embedded model. `close` it in the end."""

    def __init__(self, n_ctx: int) -> None:
        self._model: LlamaBackend = llama.load(LlamaOptions(HANDBOOK, threads=1, slots=1, n_ctx=n_ctx))
        info = self._model.info
        self._template = ChatTemplate(info.chat_template, bos=info.bos, eos=info.eos)
        self._ids = {piece: id for id, piece in enumerate(self._model.pieces) if piece}
        self._seen: set[tuple[int, tuple[int, ...]]] = set()

    def close(self) -> None:
        self._model.close()

    def trouble(self, ask: Ask, answer: Answer) -> str:
        (choice,) = answer.choices
        said = [bytes(token["bytes"]) for token in choice.logprobs["content"]]
        if b"".join(said).decode(errors="replace") != choice.text:
            return f"its tokens do not make its text: {said} is not {choice.text!r}"
        ids = tuple(self._ids[piece] for piece in said)
        if (id(ask), ids) in self._seen:
            return ""
        ends = choice.finish == "stop"
        if answer.completion_tokens != len(ids) + ends:
            return f"usage says {answer.completion_tokens} tokens, {len(ids)} came and it ended by {choice.finish}"
        prompt = tuple(self._model.tokenize(self._template.render(ask.body["messages"]), special=True))
        if answer.prompt_tokens != len(prompt):
            return f"usage says {answer.prompt_tokens} prompt tokens, there are {len(prompt)}"
        # The token that ends an answer is not listed; of those that can, any may have been it.
        wholes = [(*ids, end) for end in self._model.end_tokens] if ends else [ids]
        if not any(self._is_credible(ask, prompt, whole) for whole in wholes):
            return f"not what the model says: {choice.text!r} ({choice.finish})"
        self._seen.add((id(ask), ids))
        return ""

    def _is_credible(self, ask: Ask, prompt: tuple[int, ...], ids: tuple[int, ...]) -> bool:
        rows = rescored(self._model, prompt, ids)
        return is_credible(rows, ids) if ask.kind == "greedy" else is_credible_draw(rows, ids, _sampling(ask.body))


def _sampling(body: Mapping[str, Any]) -> Sampling:
    return Sampling(body["temperature"], body["top_k"], body["top_p"], seed=body["seed"])
