"""A text that comes bit by bit, and reading JSON and its relatives from it.

Owns: how a reader waits for more text, and the grammar of values. Refuses to know: calls, reasoning, formats.

Readers are generators: they yield where the text so far does not tell how to go on, and are resumed when there is more
or when there will be no more. They look at nothing but the text, so what they find does not depend on how it was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A reader that returns T."""
Emit = Callable[[str], None]

SPACES = " \n\r\t"
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBERS = {
    ("start", "-"): "sign",
    **{(state, "0"): "zero" for state in ("start", "sign")},
    **{(state, "digit"): "digits" for state in ("start", "sign")},
    **{("digits", kind): "digits" for kind in ("0", "digit")},
    **{(state, "."): "point" for state in ("zero", "digits")},
    **{(state, kind): "decimals" for state in ("point", "decimals") for kind in ("0", "digit")},
    **{(state, "e"): "e" for state in ("zero", "digits", "decimals")},
    **{("e", sign): "e sign" for sign in "+-"},
    **{(state, kind): "exponent" for state in ("e", "e sign", "exponent") for kind in ("0", "digit")},
}
"""How a JSON number is read (RFC 8259, 6): from a state, by a character, to the next."""
_WHOLE_NUMBERS = frozenset({"zero", "digits", "decimals", "exponent"})
_WORD_END = frozenset(",:}])= \n\r\t<")
_WORDS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}
_LONGEST_WORD = 400
"""Of a bare key, a word, or whitespace within a marker. Nobody meant a longer one, and it is looked at again with each
piece of text."""


class Malformed(Exception):
    """The text is not what it began to be. The place of the text is where that showed."""


class CutOff(Exception):
    """The text ended within."""


class Tape:
    """The text that has come, and the place up to which it is read. `mark`: a place to go back to."""

    __slots__ = ("_mark", "at", "final", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.final = False
        self._mark: int | None = None

    def add(self, text: str) -> None:
        """More text has come. What was read is forgotten, up to the mark."""
        done = self.at if self._mark is None else self._mark
        self.text = self.text[done:] + text
        self.at -= done
        if self._mark is not None:
            self._mark = 0

    def set_mark(self) -> None:
        self._mark = self.at

    def drop_mark(self) -> None:
        self._mark = None

    @property
    def marked(self) -> bool:
        return self._mark is not None

    def go_back(self) -> None:
        assert self._mark is not None
        self.at, self._mark = self._mark, None

    # Readers.

    def more(self) -> Reading[bool]:
        """Wait for at least one character. False when there is none left to come."""
        while self.at >= len(self.text):
            if self.final:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """The next character. Raises CutOff."""
        if self.at >= len(self.text) and not (yield from self.more()):
            raise CutOff
        return self.text[self.at]

    def skip_spaces(self) -> Reading[bool]:
        """Go past whitespace. False when the text ends there."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACES:
                self.at += 1
            if self.at < len(self.text):
                return True
            if not (yield from self.more()):
                return False

    def take(self, literal: str, *, loose: bool = True) -> Reading[bool]:
        """Go past the literal if it comes next. loose: whatever whitespace, or none, stands where it has whitespace;
        what it has at its end is left. At the end of the text, a beginning of it does not count."""
        while True:
            end = match(self.text, self.at, literal, loose=loose)
            if end is not None:
                if end < 0:
                    return False
                self.at = end
                return True
            if self.final:
                return False
            yield

    def take_until(self, ends: str, limit: int) -> Reading[str]:
        """The characters before the first one of `ends`. Raises Malformed where there are more than `limit`."""
        size = 0
        while True:
            while self.at + size < len(self.text):
                if self.text[self.at + size] in ends:
                    taken = self.text[self.at : self.at + size]
                    self.at += size
                    return taken
                size += 1
                if size > limit:
                    raise Malformed
            if self.final:
                raise CutOff
            yield


def match(text: str, at: int, literal: str, *, loose: bool = True) -> int | None:
    """Where the literal ends that begins at `at`; -1 when another text is there; None when it may yet come."""
    if not loose:
        end = at + len(literal)
        if text.startswith(literal, at):
            return end
        return None if len(text) < end and literal.startswith(text[at:]) else -1
    for word in literal.split():
        most = at + _LONGEST_WORD
        while at < len(text) and text[at] in SPACES:
            at += 1
            if at > most:
                return -1
        if text.startswith(word, at):
            at += len(word)
        elif word.startswith(text[at:]):
            return None
        else:
            return -1
    return at


def overlap(text: str, start: int, marker: str) -> int:
    """How many characters at the end of `text`, from `start` on, are the beginning of the marker, short of all."""
    for size in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def string(tape: Tape, emit: Emit) -> Reading[str]:
    """A JSON string, emitted as it is written. Returns what it says."""
    if (yield from tape.peek()) != '"':
        raise Malformed
    written = ['"']
    emit('"')
    tape.at += 1
    while True:
        character = yield from tape.peek()
        run = _STRING_RUN.match(tape.text, tape.at)
        if run:
            piece = run[0]
        elif character == '"':
            piece = '"'
        elif character == "\\":
            piece = yield from _escape(tape)
        else:
            raise Malformed
        written.append(piece)
        emit(piece)
        tape.at += len(piece)
        if character == '"':
            text: str = json.loads("".join(written))
            return text


def _escape(tape: Tape) -> Reading[str]:
    while True:
        rest = tape.text[tape.at : tape.at + 6]
        if len(rest) >= 2:
            if rest[1] in '"\\/bfnrt':
                return rest[:2]
            if rest[1] != "u" or not re.fullmatch(r"[0-9a-fA-F]*", rest[2:]):
                raise Malformed
            if len(rest) == 6:
                return rest
        if tape.final:
            raise CutOff
        yield


def value(tape: Tape, emit: Emit) -> Reading[None]:
    """A JSON value, emitted as it is written, whitespace within included."""
    closers: list[str] = []
    while True:
        yield from _spaces(tape, emit)
        character = yield from tape.peek()
        if character in "{[":
            closers.append("}" if character == "{" else "]")
            emit(character)
            tape.at += 1
            yield from _spaces(tape, emit)
            if (yield from tape.peek()) != closers[-1]:
                if closers[-1] == "}":
                    yield from _key(tape, emit)
                continue
        elif character == '"':
            yield from string(tape, emit)
        else:
            yield from _scalar(tape, emit)
        while closers:
            yield from _spaces(tape, emit)
            character = yield from tape.peek()
            if character == closers[-1]:
                closers.pop()
            elif character != ",":
                raise Malformed
            emit(character)
            tape.at += 1
            if character == ",":
                if closers[-1] == "}":
                    yield from _spaces(tape, emit)
                    yield from _key(tape, emit)
                break
        else:
            return


def _key(tape: Tape, emit: Emit) -> Reading[None]:
    yield from string(tape, emit)
    yield from _spaces(tape, emit)
    if (yield from tape.peek()) != ":":
        raise Malformed
    emit(":")
    tape.at += 1


def _spaces(tape: Tape, emit: Emit) -> Reading[None]:
    while (yield from tape.peek()) in SPACES:
        emit(tape.text[tape.at])
        tape.at += 1


def _scalar(tape: Tape, emit: Emit) -> Reading[None]:
    """A number or a word."""
    if (yield from tape.peek()) in "-0123456789":
        yield from _number(tape, emit)
        return
    for word in ("true", "false", "null"):
        if (yield from tape.take(word, loose=False)):
            emit(word)
            return
    if tape.final and any(word.startswith(tape.text[tape.at :]) for word in ("true", "false", "null")):
        raise CutOff
    raise Malformed


def _number(tape: Tape, emit: Emit) -> Reading[None]:
    """A number, emitted as it comes: models can write very long ones. It ends where it can go no further."""
    state = "start"
    while True:
        try:
            character = yield from tape.peek()
        except CutOff:
            return
        kind = "digit" if character in "123456789" else character.lower()
        following = _NUMBERS.get((state, kind))
        if following is None:
            break
        emit(character)
        tape.at += 1
        state = following
    if state not in _WHOLE_NUMBERS:
        raise Malformed


def _word(tape: Tape, ends: frozenset[str]) -> Reading[str]:
    size = 0
    while True:
        while tape.at + size < len(tape.text):
            if tape.text[tape.at + size] in ends:
                word = tape.text[tape.at : tape.at + size]
                tape.at += size
                return word
            size += 1
            if size > _LONGEST_WORD:
                raise Malformed
        if tape.final:
            raise CutOff
        yield


def literal(tape: Tape, quote: str, emit: Emit) -> Reading[None]:
    """A value with bare keys, the words of Python, or strings in other quotes, emitted as JSON.

    quote: what stands around strings; a mark of several characters knows no escapes. JSON's own quote always counts.
    """
    closers: list[str] = []
    pairs = {"{": "}", "[": "]", "(": ")"}
    while True:
        yield from tape.peek()
        yield from tape.skip_spaces()
        character = yield from tape.peek()
        if (yield from _quoted(tape, quote, emit)):
            pass
        elif character in pairs:
            closers.append(pairs[character])
            emit("{" if character == "{" else "[")
            tape.at += 1
            yield from tape.skip_spaces()
            if (yield from tape.peek()) != closers[-1]:
                if closers[-1] == "}":
                    yield from _bare_key(tape, quote, emit)
                continue
        elif character in "-0123456789":
            yield from _number(tape, emit)
        else:
            word = yield from _word(tape, _WORD_END)
            if word not in _WORDS:
                tape.at -= len(word)
                raise Malformed
            emit(_WORDS[word])
        while closers:
            if not (yield from tape.skip_spaces()):
                raise CutOff
            character = tape.text[tape.at]
            if character == ",":
                tape.at += 1
                yield from tape.skip_spaces()
                if (yield from tape.peek()) != closers[-1]:
                    emit(", ")
                    if closers[-1] == "}":
                        yield from _bare_key(tape, quote, emit)
                    break
                character = closers[-1]  # a comma after the last one, as in Python
            if character != closers[-1]:
                raise Malformed
            closer = closers.pop()
            emit("}" if closer == "}" else "]")
            tape.at += 1
        else:
            return


def _bare_key(tape: Tape, quote: str, emit: Emit) -> Reading[None]:
    if not (yield from _quoted(tape, quote, emit)):
        word = yield from _word(tape, _WORD_END)
        if not word:
            raise Malformed
        emit(json.dumps(word, ensure_ascii=False))
    yield from tape.skip_spaces()
    if (yield from tape.peek()) != ":":
        raise Malformed
    emit(": ")
    tape.at += 1


def _quoted(tape: Tape, quote: str, emit: Emit) -> Reading[bool]:
    """A string in any of the quotes that may be used. False when none comes next."""
    character = yield from tape.peek()
    if len(quote) > 1 and (yield from tape.take(quote, loose=False)):
        emit('"')
        yield from until(tape, quote, lambda text: emit(json.dumps(text, ensure_ascii=False)[1:-1]))
        tape.at += len(quote)
        emit('"')
        return True
    if character == '"' or (character == "'" and quote in "'\""):
        yield from _python_string(tape, emit)
        return True
    return False


def _python_string(tape: Tape, emit: Emit) -> Reading[None]:
    quote = tape.text[tape.at]
    tape.at += 1
    emit('"')
    while True:
        character = yield from tape.peek()
        if character == quote:
            break
        if character == "\\":
            if tape.at + 1 >= len(tape.text):
                if tape.final:
                    raise CutOff
                yield
                continue
            if tape.text[tape.at + 1] == "'":
                emit("'")
                tape.at += 2
            else:
                piece = yield from _escape(tape)
                emit(piece)
                tape.at += len(piece)
            continue
        emit(json.dumps(character, ensure_ascii=False)[1:-1])
        tape.at += 1
    tape.at += 1
    emit('"')


def until(tape: Tape, marker: str, emit: Emit) -> Reading[None]:
    """Emit the text before the marker, as it comes. Raises CutOff after emitting what there is."""
    while True:
        found = tape.text.find(marker, tape.at)
        if found >= 0:
            if found > tape.at:
                emit(tape.text[tape.at : found])
            tape.at = found
            return
        kept = 0 if tape.final else overlap(tape.text, tape.at, marker)
        end = len(tape.text) - kept
        if end > tape.at:
            emit(tape.text[tape.at : end])
            tape.at = end
        if tape.final:
            raise CutOff
        yield
