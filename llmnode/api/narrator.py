"""How an endpoint tells an answer: the seam between what a model says and what its client reads.

    engine events -> text -> Parser (chat/pieces.py) -> pieces -> Narrator -> bytes of a stream, or one JSON body

An endpoint brings a `Narrator`, made for each request from an `Occasion`. It gets what each choice says as pieces and
writes them down in the endpoint's words. Everything else is done around it: reading the model's format, holding back,
commit markers, keepalives and error events (wire/dialect.py has the endpoint's words for these), the end of the stream,
and going on with an answer that another node has begun.

The law of narrators: what is told is a function of (request, response id, created, ids). So
- no clock, no dice: ids of items and calls derive from the response id and their indexes (`call_id`);
- `singly` narrators, whose events have numbers or can be counted by the client, are called once for each id, so that
  it does not matter which ids came together;
- a narrator may keep state. Where it goes on, it is told the known ids again from the first one, and what it writes
  about them is thrown away (`Told`). It need not know that this is so;
- it writes nothing before a choice has said something (`say` with no pieces counts), since no frame may come without
  an id: what introduces a response is written by the first call.

`say` and `finish` are called in the order of a choice's ids, `finish` once, `end` once after all. A narrator that does
not stream is only asked for its `whole`.

Answers that are all content, which most are, need no parser: a narrator may have a quicker way for them (`plain`).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from llmnode.api.logprobs import LogprobWriter
from llmnode.api.schema import ChatRequest, CompletionRequest
from llmnode.chat.pieces import CallBegun, Message, Parser, Piece, Plain, gather
from llmnode.engine.backend import Backend
from llmnode.engine.types import Ask, Done, Finish, Logprob, Text
from llmnode.wire import sse
from llmnode.wire.node import Usage

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Ending:
    """Why a choice is over, in OpenAI's words: `stop`, `length`, `tool_calls`; `cancelled` when nobody will read it.

    stop: the stop string that ended it, "" for any other end.
    """

    finish: str
    stop: str = ""


@dataclass(frozen=True)
class Answer:
    """One choice that has come to its end. `logprobs`: one for each token, where they were asked for.

    said: what a stream would have told id by id: pieces, and the logprobs of the ids they came with.
    ids: of all its tokens.     end: what it came to, and how long it took where it ended.
    """

    message: Message
    ending: Ending
    logprobs: tuple[Logprob, ...] = ()
    said: tuple[tuple[Sequence[Piece], Sequence[Logprob]], ...] = ()
    ids: tuple[int, ...] = ()
    end: Done | None = None


@dataclass(frozen=True)
class Occasion:
    """What a narrator may know of its request.

    id, created: of the response.       model: as the client called it.
    request: with `options.choices`, `options.include_usage`, `options.stream` and the `options.body` as it came.
    prompt_tokens: how many the prompt has. Which of these were cached is known at the end, and differs between nodes.
    parsed: whether a parser reads the text, so that there may be reasoning and calls besides content.
    writers: one for each choice, where logprobs were asked for.
    asks: one for each choice: its prompt, and what of it is out already.       backend: what the tokens mean.
    """

    id: str
    created: int
    model: str
    request: ChatRequest | CompletionRequest
    prompt_tokens: int
    parsed: bool = False
    writers: Sequence[LogprobWriter] = ()
    asks: Sequence[Ask] = ()
    backend: Backend | None = None


class Teller(Protocol):
    """Writes down what engine events say, and what ends it all. Empty bytes: nothing to say now.

    terminator: comes after all when the answer is whole.
    """

    terminator: bytes

    def piece(self, index: int, text: Text) -> bytes:
        """More of a choice; a text without ids only introduces it."""

    def last(self, index: int, end: Done) -> bytes: ...

    def end(self, usage: Usage) -> bytes: ...


class Narrator(Protocol):
    """Writes one answer in an endpoint's words. Empty bytes: nothing to say now.

    singly: call `say` once for each id.        terminator: comes after all, in a stream that is whole.
    """

    singly: bool
    terminator: bytes

    def say(self, index: int, pieces: Sequence[Piece], logprobs: Sequence[Logprob]) -> bytes:
        """More of a choice. logprobs: of the ids that these pieces came with; a parser may hold their text back."""

    def finish(self, index: int, ending: Ending) -> bytes:
        """A choice is over."""

    def end(self, usage: Usage) -> bytes:
        """All are over."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Any:
        """The body of an answer that is not streamed, of the choices in their order. The same narrator has told
        nothing."""

    def reply(self, index: int, message: Message) -> Mapping[str, Any]:
        """A choice as the next turn of a conversation will send it back: how gates find the node that holds it."""

    def plain(self, out: Sequence[int]) -> Teller | None:
        """A quicker way for choices without parsers, which needs no telling again; None where there is none.
        out: how many ids of each choice are out already."""


Factory = Callable[[Occasion], Narrator]
Parsers = Sequence[Parser]
"""One for each choice."""


def call_id(response: str, choice: int, call: int) -> str:
    """The id of a tool call: 9 letters and digits, since some models (Mistral's) were trained on ids of that form and
    their templates refuse any other when it comes back."""
    digest = int.from_bytes(blake2b(f"{response} {choice} {call}".encode(), digest_size=8).digest(), "big")
    letters = []
    for _ in range(9):
        digest, at = divmod(digest, len(_LETTERS))
        letters.append(_LETTERS[at])
    return "".join(letters)


def read(text: str, parser: Parser) -> Message:
    """A whole text as a message."""
    return gather([*parser.feed(text), *parser.flush()])


def answer(
    text: str,
    end: Done,
    parser: Parser | None,
    logprobs: Sequence[Logprob] = (),
    ids: Sequence[int] = (),
    parts: Sequence[str] = (),
) -> Answer:
    """A choice that has come to its end. ids: those that its text came with.     parts: what each of them has made
    certain, which together is the text."""
    reader = parser or Plain()
    said: list[tuple[Sequence[Piece], Sequence[Logprob]]]
    if len(parts) > 1:
        said = [(reader.feed(part) if part else (), logprobs[at : at + 1]) for at, part in enumerate(parts)]
    else:
        said = [(reader.feed(text) if text else (), logprobs)]
    said.append((reader.flush(), ()))
    message = gather(piece for pieces, _ in said for piece in pieces)
    ending = _ending(end, called=bool(message.calls))
    return Answer(message, ending, tuple(logprobs), tuple(said), (*ids, *end.ids), end)


def _ending(end: Done, *, called: bool) -> Ending:
    if called and end.finish is Finish.STOP:
        return Ending("tool_calls", end.stop)
    return Ending(end.finish.value, end.stop)


class Told:
    """A narrator's stream.

    parsers: one for each choice.
    out: how many ids of each choice are out already. They are told again, first of all, and nobody hears it.
    """

    def __init__(self, narrator: Narrator, parsers: Parsers, out: Sequence[int]) -> None:
        self.terminator = narrator.terminator
        self._narrator, self._parsers = narrator, parsers
        self._out, self._heard = tuple(out), [0] * len(parsers)
        self._called = [False] * len(parsers)

    def piece(self, index: int, text: Text) -> bytes:
        said = []
        for part, ids, logprobs in self._cut(index, text):
            self._heard[index] += ids
            told = self._say(index, self._parsers[index].feed(part) if part else [], logprobs)
            if self._is_new(index):
                said.append(told)
        return b"".join(said)

    def last(self, index: int, end: Done) -> bytes:
        self._heard[index] += len(end.ids)
        told = self._say(index, self._parsers[index].flush(), ())
        told += self._narrator.finish(index, _ending(end, called=self._called[index]))
        return told if self._is_new(index) else b""

    def end(self, usage: Usage) -> bytes:
        return self._narrator.end(usage)

    def _say(self, index: int, pieces: Sequence[Piece], logprobs: Sequence[Logprob]) -> bytes:
        if not self._called[index] and any(isinstance(piece, CallBegun) for piece in pieces):
            self._called[index] = True
        return self._narrator.say(index, pieces, logprobs)

    def _is_new(self, index: int) -> bool:
        """Ids that end a choice say that its end is out, so what came with ids that are out is out."""
        return self._heard[index] > self._out[index] or not self._out[index]

    def _cut(self, index: int, text: Text) -> Iterator[tuple[str, int, Sequence[Logprob]]]:
        """A text as (text, how many ids, their logprobs): id by id for a narrator that wants it so, else in what is
        out and what is new."""
        size = len(text.ids)
        if not size and self._heard[index]:
            return
        if self._narrator.singly:
            cuts = list(range(1, size))
        else:
            known = self._out[index] - self._heard[index]
            cuts = [known] if 0 < known < size else []
        if not cuts:
            yield text.text, size, text.logprobs
            return
        for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
            yield "".join(text.parts[start:stop]), stop - start, text.logprobs[start:stop]


class Body:
    """An answer that its client does not stream, inside a stream that can be resumed: one event, at the end."""

    terminator = sse.DONE

    def __init__(self, narrator: Narrator, parsers: Parsers | None) -> None:
        self._narrator, self._parsers = narrator, parsers
        self._parts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[Logprob]] = {}
        self._ids: dict[int, list[int]] = {}
        self._answers: dict[int, Answer] = {}

    def piece(self, index: int, text: Text) -> bytes:
        self._parts.setdefault(index, []).extend(text.parts or (text.text,))
        self._logprobs.setdefault(index, []).extend(text.logprobs)
        self._ids.setdefault(index, []).extend(text.ids)
        return b""

    def last(self, index: int, end: Done) -> bytes:
        parser = self._parsers[index] if self._parsers else None
        parts, logprobs, ids = self._parts[index], self._logprobs[index], self._ids[index]
        self._answers[index] = answer("".join(parts), end, parser, logprobs, ids, parts)
        return b""

    def end(self, usage: Usage) -> bytes:
        return sse.event(self._narrator.whole([one for _, one in sorted(self._answers.items())], usage))
