"""How long a model may think: after so many tokens of reasoning, the tokens that end it are forced.

Owns: where in an answer the reasoning is, token by token. Refuses to know: the engine, which asks what must come next
(engine.types.Forcing), and templates. All that is wanted follows from the tokens so far, so an answer can move to
another node.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmnode.chat.format import Format

_MOST_PATIENCE = 4
"""Tokens past the budget to wait for the rest of a character, so that none is cut in half."""


@dataclass(frozen=True)
class ThinkingBudget:
    """For `Ask.forcing`: called, it makes the account of one answer.

    tokens: of reasoning at most.       closing: the ids that end it, tokenized from `closing_text`.
    pieces: each token's text, with the format's markers spelled.
    start, end: the markers.            opened: whether the prompt has begun the reasoning.
    """

    tokens: int
    closing: tuple[int, ...]
    pieces: Sequence[bytes] = field(repr=False)
    start: str
    end: str
    opened: bool

    def __call__(self) -> Account:
        return Account(self)


def closing_text(format: Format) -> str:
    """What ends the reasoning, so that the answer follows as the model has seen it in training."""
    assert format.thinking is not None
    if format.channels is not None:
        return format.thinking.end + format.channels.start
    return f"\n{format.thinking.end}{format.thinking.after}"


class Account:
    """One answer's reasoning. Reasoning that the prompt has not begun counts from its marker, which must come first."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._start, self._end = budget.start.encode(), budget.end.encode()
        self._thinking = budget.opened
        self._over = False
        self._spent = 0
        self._closed = 0  # of the closing tokens, those that have come
        self._tail = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def wanted(self) -> int | None:
        budget = self._budget
        if self._over or not self._thinking or self._spent < budget.tokens or not budget.closing:
            return None
        half = bool(self._decoder.getstate()[0])
        if half and not self._closed and self._spent < budget.tokens + _MOST_PATIENCE:
            return None
        return budget.closing[self._closed]

    def accept(self, token: int) -> None:
        if self._over:
            return
        if self._thinking and self._spent >= self._budget.tokens and token == self.wanted():
            self._closed += 1
            self._over = self._closed == len(self._budget.closing)
            return
        piece = self._budget.pieces[token]
        self._tail += piece
        self._closed = 0
        if not self._thinking:
            said = self._tail.lstrip()
            if said.startswith(self._start):
                self._thinking, self._tail = True, said[len(self._start) :]
            elif not self._start.startswith(said):
                self._over = True  # it answers without reasoning
            return
        self._spent += 1
        self._decoder.decode(piece)
        if self._end in self._tail:
            self._over = True
        self._tail = self._tail[-len(self._end) :]
