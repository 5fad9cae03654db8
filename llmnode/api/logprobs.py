"""Log probabilities to JSON, in the two shapes of OpenAI's API.

Owns: how a token is named, and where in a completion it stands. Refuses to know: how they come about.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Any

from llmnode.engine.types import Logprob

_FLOOR = -9999.0
"""JSON has no infinity; OpenAI writes this for a probability of nothing."""


class LogprobWriter:
    """The `logprobs` object of one choice, piece by piece: pieces put together say what one call over all would.

    pieces: bytes of each token as text.        top: how many alternatives were asked for.
    ends: tokens that end this answer.

    Every token is listed that the answer goes on from: but for one of `ends`, which is no part of it. A token that is
    half a character is written with its bytes escaped, as `\\xe2\\x82`. A control token has no text: it is written as
    `token_id:ID`, the way vLLM names tokens by their ids, with `bytes` null. As part of an answer it is rare: a model
    that goes on past its end because it must (`ignore_eos`), or that says another one of them of its own accord.
    """

    def __init__(self, pieces: Sequence[bytes], *, chat: bool, top: int, ends: Collection[int]) -> None:
        self._pieces = pieces
        self._ends = ends
        self._chat = chat
        self._top = top
        self._offset = 0
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def write(self, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        """The object for these tokens, which come after those of the calls before."""
        logprobs = [one for one in logprobs if one.token not in self._ends]
        if self._chat:
            return {"content": [self._entry(one) for one in logprobs], "refusal": None}
        return {
            "tokens": [self._name(one.token) for one in logprobs],
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [self._alternatives(one) for one in logprobs] if self._top else None,
            "text_offset": [self._place(one.token) for one in logprobs],
        }

    def skip(self, tokens: Sequence[int]) -> None:
        """These tokens were reported elsewhere; what is written next comes after them."""
        for token in tokens:
            self._place(token)

    def _entry(self, one: Logprob) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in one.top]
        return {**self._named(one.token, one.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._pieces[token]
        text = piece.decode("utf-8", "backslashreplace") if piece else f"token_id:{token}"
        return {"token": text, "logprob": _finite(logprob), "bytes": list(piece) if piece else None}

    def _name(self, token: int) -> str:
        """A token in a completion, where the bytes have no field of their own: OpenAI marks those that are no text."""
        piece = self._pieces[token]
        if not piece:
            return f"token_id:{token}"
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + piece.decode("utf-8", "backslashreplace")

    def _alternatives(self, one: Logprob) -> dict[str, float]:
        """The most probable tokens and the drawn one, which may be none of them."""
        found = {self._name(token): _finite(logprob) for token, logprob in one.top}
        found.setdefault(self._name(one.token), _finite(one.logprob))
        return found

    def _place(self, token: int) -> int:
        """How many characters of the answer were complete when this token began."""
        place = self._offset
        self._offset += len(self._decode(self._pieces[token]))
        return place


def _finite(logprob: float) -> float:
    return logprob if logprob > _FLOOR else _FLOOR
