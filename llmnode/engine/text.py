"""Tokens to text: whole characters only, and nothing that may still turn out to be a stop string.

Owns: the bytes and characters of one answer that are not out yet. Refuses to know: where tokens come from, why an
answer ends otherwise. What comes out is a function of the token ids alone, not of when they came.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Mapping, Sequence


def spelled(pieces: Sequence[bytes], specials: Mapping[str, int], markers: Collection[str]) -> Sequence[bytes]:
    """The pieces of a vocabulary with some of its control tokens written out: those whose spelling is a marker.

    They have no text otherwise, so a reader of the text would not see where reasoning ends and a call begins. Made once
    for a model and its chat template; where nothing has to be written out, it is the same list.
    """
    known = {token: marker.encode() for marker in markers if (token := specials.get(marker)) is not None}
    if all(pieces[token] for token in known):
        return pieces
    return [piece or known.get(token, b"") for token, piece in enumerate(pieces)]


class TextStream:
    """The text of one answer, token by token.

    `push` returns what is now certain. A token can be half a character: its bytes wait for the other half; bytes that
    no continuation could make UTF-8 become U+FFFD. Characters that may be the beginning of a stop string wait too.
    Among several stop strings the one that is complete first wins, and of two complete at once the longer, so that the
    answer does not depend on where the borders between tokens lie.

    stopped: the stop string that ended the answer, "" while none has.
    """

    __slots__ = ("_decode", "_held", "_pieces", "_stops", "stopped")

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        self._pieces = pieces
        self._stops = tuple(stop for stop in stops if stop)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""
        self.stopped = ""

    def push(self, token: int) -> str:
        """The characters that this token makes certain. Sets `stopped` once a stop string is complete."""
        text = self._decode(self._pieces[token])
        return self._screen(text) if self._stops else text

    def flush(self) -> str:
        """What was held back, at the end of an answer that no stop string ended. Half a character is dropped."""
        text, self._held = self._held, ""
        return text

    def _screen(self, new: str) -> str:
        if not new:
            return ""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at = min(found)
            self.stopped = text[at:end]
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`, short of all of them."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
