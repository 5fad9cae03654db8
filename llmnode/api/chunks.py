"""The narrators of OpenAI's chats and completions, and of /inference.

A stream of content alone is the path that is walked at every token, on the thread that shares the processor with the
model: what is the same in every chunk is written once, and only the text between is encoded anew (`Chunks`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

from llmnode.api.logprobs import LogprobWriter
from llmnode.api.narrator import Answer, Ending, Occasion, Teller
from llmnode.api.prompts import Gap, Prompt
from llmnode.api.schema import ChatRequest, CompletionRequest
from llmnode.api.shape import Shape
from llmnode.chat.pieces import Message, Piece
from llmnode.engine.types import Done, Logprob, Text
from llmnode.wire import sse
from llmnode.wire.node import Usage

_MARK = "\0"


class OpenAI:
    """Tells chats and completions."""

    singly = False
    terminator = sse.DONE

    def __init__(self, shape: Shape, *, include_usage: bool = False, writers: Sequence[LogprobWriter] = ()) -> None:
        self._shape, self._writers = shape, writers
        self._include_usage = include_usage
        self._usage = {"usage": None} if include_usage else {}
        self._introduced: set[int] = set()

    @classmethod
    def of(cls, occasion: Occasion) -> OpenAI:
        chat = isinstance(occasion.request, ChatRequest)
        shape = Shape(occasion.id, occasion.created, occasion.model, chat, occasion.parsed, _echoes(occasion))
        return cls(shape, include_usage=occasion.request.options.include_usage, writers=occasion.writers)

    def say(self, index: int, pieces: Sequence[Piece], logprobs: Sequence[Logprob]) -> bytes:
        """Logprobs go with the first of the pieces that their ids have made certain, or with none."""
        chunks = []
        if index not in self._introduced:
            self._introduced.add(index)
            chunks.append(self._shape.first(index))
        written = self._writers[index].write(logprobs) if logprobs and self._writers else None
        for piece in pieces:
            chunks.append(self._shape.delta(index, piece, written))
            written = None
        if written is not None:
            chunks.append(self._shape.silent(index, written))
        return b"".join([sse.event({**chunk, **self._usage}) for chunk in chunks if chunk])

    def finish(self, index: int, ending: Ending) -> bytes:
        return sse.event({**self._shape.last(index, ending.finish), **self._usage})

    def end(self, usage: Usage) -> bytes:
        return sse.event(self._shape.usage(usage)) if self._include_usage else b""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        found = [writer.write(one.logprobs) for writer, one in zip(self._writers, answers, strict=False)]
        return self._shape.whole(answers, usage, found)

    def reply(self, index: int, message: Message) -> Mapping[str, Any]:
        return self._shape.message(index, message)

    def plain(self, out: Sequence[int]) -> Teller:
        begun = {index for index, ids in enumerate(out) if ids}
        return Chunks(self._shape, include_usage=self._include_usage, writers=self._writers, begun=begun)


class Inference(OpenAI):
    """Tells the smallest answer there is."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        return {"result": answers[0].message.content}


class Chunks:
    """The bytes of the chunks of one stream of content.

    writers: one for each choice, where logprobs were asked for.
    begun: choices of which some is out already, so that it is known who speaks.
    """

    terminator = sse.DONE

    def __init__(
        self,
        shape: Shape,
        *,
        include_usage: bool,
        writers: Sequence[LogprobWriter] = (),
        begun: Collection[int] = (),
    ) -> None:
        self._shape = shape
        self._include_usage = include_usage
        self._usage = {"usage": None} if include_usage else {}
        self._writers = writers
        self._begun = begun
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def piece(self, index: int, text: Text) -> bytes:
        """A piece of a choice, behind the chunk that says who speaks where it is the first."""
        around = self._around.get(index)
        if around is None:
            return self._begin(index) + self.piece(index, text)
        said, logprobs = text.text, text.logprobs
        if not said and not logprobs:
            return b""
        if logprobs and self._writers:
            chunk = self._shape.piece(index, said, self._writers[index].write(logprobs))
            return sse.event({**chunk, **self._usage})
        head, tail = around
        if said.isascii():
            return head + encode_basestring(said).encode() + tail
        return head + _literal(said) + tail

    def last(self, index: int, end: Done) -> bytes:
        return sse.event({**self._shape.last(index, end.finish.value), **self._usage})

    def end(self, usage: Usage) -> bytes:
        return sse.event(self._shape.usage(usage)) if self._include_usage else b""

    def _begin(self, index: int) -> bytes:
        example = sse.event({**self._shape.piece(index, _MARK), **self._usage})
        head, _, tail = example.partition(_literal(_MARK))
        self._around[index] = head, tail
        first = None if index in self._begun else self._shape.first(index)
        return b"" if first is None else sse.event({**first, **self._usage})


def _echoes(occasion: Occasion) -> tuple[str, ...]:
    """What each choice begins with: its prompt, where that was asked for."""
    request = occasion.request
    if not isinstance(request, CompletionRequest) or not request.echo:
        return ()
    texts = [_spelled(prompt, occasion) for prompt in (request.prompt, *request.more)]
    return tuple(text for text in texts for _ in range(request.options.choices))


def _spelled(prompt: Prompt, occasion: Occasion) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Gap):
        return prompt.before
    assert occasion.backend is not None, "an answer has a model"
    pieces = [part.encode() if isinstance(part, str) else occasion.backend.spell(part) for part in prompt]
    return b"".join(pieces).decode("utf-8", "replace")


def _literal(text: str) -> bytes:
    """A text as the JSON of an event spells it."""
    return sse.event(text)[len(b"data: ") : -len(b"\n\n")]
