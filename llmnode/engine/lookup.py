"""Prompt lookup: guesses the next tokens of an answer from what stands after its last few tokens earlier on. Pure.

Owns: the n-grams of one sequence, and how often its guesses have lately been right. Refuses to know: the model,
batches, and
what a guess costs: that is pace.py's. Sources: Saxena, "Prompt Lookup Decoding" (2023), for the idea; Leviathan et al.,
"Fast Inference from Transformers via Speculative Decoding" (2023), for the expected gain.

Every drawn token is also a test of the guess that could have been made, whether it was made or not. So the chance of
the
next guess is known without paying for it: a sequence that repeats nothing never costs a draft, and one that begins to
repeat itself is noticed.
"""

from __future__ import annotations

from array import array

_LONG, _SHORT = 4, 2
"""Lengths of n-grams, in tokens. The longer one is trusted first."""
_PER_STEP = 1024
"""Tokens indexed in one call at most: about 1 ms, so that a prompt of 100,000 does not stall the others."""
_AT_ONCE = 32
"""More new tokens than this are a prompt, or an answer that was generated elsewhere."""
_MEMORY = 0.15
"""Weight of the latest guess in the chance of the next."""


class Lookup:
    """The n-grams of `tokens`, which grows. `chance`: of the next guess; `streak`: of one after a right one."""

    __slots__ = ("_at", "_guess", "_hit", "_indexed", "_long", "_short", "_tokens", "fresh", "streak")

    def __init__(self, tokens: array[int]) -> None:
        self._tokens = tokens
        self._long: dict[tuple[int, ...], int] = {}
        self._short: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._at = -1
        self._guess = -1
        self._hit = False
        self.fresh = 0.5
        self.streak = 0.7

    @property
    def chance(self) -> float:
        """That the next guess is right, 0 when there is none."""
        if self._at < 0:
            return 0.0
        return self.streak if self._hit else self.fresh

    def advance(self) -> None:
        """Tokens were added: score the guess that stood for each, index them, find the next guess."""
        size = len(self._tokens)
        if size - self._indexed > _AT_ONCE:
            # A prompt: nothing was guessed there. A long one is indexed over several steps, and drafts wait for that.
            self._index(min(size, self._indexed + _PER_STEP))
            self._at = self._guess = -1
            if self._indexed == size:
                self._find(size)
            return
        for at in range(self._indexed, size):
            if self._guess >= 0:
                self._score(self._tokens[at] == self._guess)
            self._index(at + 1)
            self._find(at + 1)

    def draft(self, length: int) -> array[int]:
        """Up to `length` tokens that may come next; a loop is gone round again."""
        tokens, at = self._tokens, self._at
        if at < 0 or length <= 0:
            return array("i")
        draft = tokens[at : at + length]
        period = len(tokens) - at
        while len(draft) < length:
            draft.append(draft[len(draft) - period])
        return draft

    def _score(self, hit: bool) -> None:
        if self._hit:
            self.streak += (hit - self.streak) * _MEMORY
        else:
            self.fresh += (hit - self.fresh) * _MEMORY
        self._hit = hit

    def _find(self, size: int) -> None:
        tokens = self._tokens
        if self._hit and 0 <= self._at < size - 1:
            self._at += 1  # the passage that was right goes on
        else:
            key = tuple(tokens[max(0, size - _LONG) : size])
            at = self._long.get(key, -1)
            if at < 0:
                at = self._short.get(key[-_SHORT:], -1)
            self._at = at
        self._guess = tokens[self._at] if self._at >= 0 else -1

    def _index(self, size: int) -> None:
        """Enter the n-grams that end before the last of the first `size` tokens, with the place after each."""
        tokens = self._tokens
        for end in range(max(self._indexed, 1), size):
            if end >= _LONG:
                self._long[tuple(tokens[end - _LONG : end])] = end
            if end >= _SHORT:
                self._short[tuple(tokens[end - _SHORT : end])] = end
        self._indexed = size
