"""A typed request to what the engine needs: ids of the prompt, a grammar, and what reads the answers.

Owns: how a model's format, its vocabulary and a request come together. Refuses to know: HTTP, the node's life, where
templates and grammars are tried. Everything here may take long (a foreign template, a long text, a large schema): call
it off the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llmnode.api import prompts
from llmnode.api.constraints import Constraint
from llmnode.api.foreign import TOO_COMPLEX
from llmnode.api.prompts import Gap, Laid, lay_out
from llmnode.api.schema import ChatRequest, CompletionRequest
from llmnode.chat import enforce
from llmnode.chat.budget import ThinkingBudget, closing_text
from llmnode.chat.conversation import Conversation
from llmnode.chat.format import Format
from llmnode.chat.parse import parser
from llmnode.chat.pieces import Parser, Plain
from llmnode.chat.renderer import Prompt, Renderer
from llmnode.chat.spelling import Segment
from llmnode.engine.backend import Backend
from llmnode.engine.grammar import Grammar, Grammars
from llmnode.engine.loop import Engine
from llmnode.engine.text import TextStream, spelled
from llmnode.engine.types import Ask, Forcing
from llmnode.wire.errors import InvalidRequest

Trial = Callable[[str, str, str], None]
"""Whether a grammar can be compiled within limits: its kind, its text, the field it is from. Raises InvalidRequest."""


@dataclass(frozen=True)
class Prepared:
    """What a request comes to for the engine, and how its answers are read.

    parser: makes one for each answer; None where an answer is all content.
    pieces: each token's text as a parser wants it, markers written out; None for the vocabulary's own.
    forcing: what ends reasoning that is over its budget.
    whole: nothing of the prompt was left out to make it fit; another node may leave out more or less.
    """

    prompt: tuple[int, ...]
    grammar: Grammar | None = None
    parser: Callable[[], Parser] | None = None
    pieces: Sequence[bytes] | None = None
    forcing: Callable[[], Forcing] | None = None
    whole: bool = True


@dataclass(frozen=True)
class Served:
    """A loaded model: the engine that runs it, and what turns requests into its token ids.

    trial: made of a grammar before it is compiled here.
    """

    engine: Engine
    backend: Backend
    renderer: Renderer
    bos: tuple[int, ...]
    trial: Trial | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it serves, in the words of the node's report."""
        return ("chat", "completion", *(("infill",) if self.backend.info.infill else ()))

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles constraints for this vocabulary; made when the first request brings one."""
        return Grammars(self.backend.pieces, self.backend.end_tokens, trial=self.trial)

    def prepare(self, request: ChatRequest | CompletionRequest, created: int) -> Prepared:
        """Raises InvalidRequest.

        created: what the template takes for now, in seconds since the epoch. It sees UTC: another node, which may go on
        with the answer, may be in another time zone.
        """
        if isinstance(request, ChatRequest):
            return _Chat(self, request, created).prepared()
        constraint = request.options.constraint
        grammar = None if constraint is None else self.compiled(constraint)
        laid = self._laid(request.prompt, request.options.max_tokens)
        return Prepared(laid.ids, grammar, whole=laid.whole)

    def rendered(self, request: ChatRequest, created: int) -> str:
        """The prompt of a chat as text. Arguments, errors and time as of `prepare`."""
        return _Chat(self, request, created).text

    def _laid(self, prompt: prompts.Prompt, max_tokens: int | None) -> Laid:
        """Ids of a prompt that is no conversation. BOS goes in front of a first text, and of no id."""
        if isinstance(prompt, Gap):
            n_ctx = self.backend.room.n_ctx
            room = n_ctx - min(max_tokens or n_ctx // 4, n_ctx // 2)
            return lay_out(prompt, self.backend, self.bos if self.backend.info.add_bos else (), room)
        if isinstance(prompt, str):
            return Laid(self.ids([(prompt, True)]))
        ids: list[int] = []
        for index, part in enumerate(prompt):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.ids([(part, True)]) if index == 0 else self.backend.tokenize(part, special=True)
        return Laid(tuple(ids))

    def compiled(self, constraint: Constraint) -> Grammar:
        if constraint.kind == "gbnf":
            return self.grammars.gbnf(constraint.source)
        return self.grammars.json_schema(constraint.schema, param=constraint.field)

    def said_elsewhere(self, ask: Ask) -> str:
        """The text of an answer that another node has sent before this one went on with it."""
        text = TextStream(self.backend.pieces if ask.pieces is None else ask.pieces, ask.stop)
        return "" if ask.retold else "".join(map(text.push, ask.replayed))

    def ids(self, segments: Sequence[Segment]) -> tuple[int, ...]:
        """BOS goes in front where the model wants it, unless the template has put it there already.

        Parts are tokenized one by one: where a client has spelled out a control token, that moves a border or two."""
        tokenize = self.backend.tokenize
        ids = tuple(id for text, special in segments for id in tokenize(text, special=special))
        if self.backend.info.add_bos and ids[: len(self.bos)] != self.bos:
            return self.bos + ids
        return ids or self.bos

    def spelled(self, format: Format) -> Sequence[bytes]:
        """The text of each token, with the format's markers written out."""
        return self._spelled if format is self.renderer.format else self._spell(format)

    @cached_property
    def _spelled(self) -> Sequence[bytes]:
        return self._spell(self.renderer.format)

    def _spell(self, format: Format) -> Sequence[bytes]:
        return spelled(self.backend.pieces, self.backend.specials, format.markers)

    @cached_property
    def end_spellings(self) -> frozenset[str]:
        return frozenset(text for text, id in self.backend.specials.items() if id in self.backend.end_tokens)


class _Chat:
    """One chat's preparation, which begins with its prompt: that says how far the answer has begun already."""

    def __init__(self, served: Served, request: ChatRequest, created: int) -> None:
        self._served, self._request = served, request
        self._tools, self._constraint = request.tools, request.options.constraint
        prompting = request.prompting
        conversation = Conversation(
            request.messages,
            request.tools.listed,
            prompting.keywords,
            continued=prompting.continued,
            prompted=prompting.prompted,
            template=prompting.template,
        )
        self._prompt: Prompt = served.renderer.render(conversation, created)
        self._format = self._prompt.format
        self._opened = self._format.opened(self._prompt.text)
        # What a grammar leaves room for: a request that wants no thinking leaves none for it.
        quiet = prompting.keywords.get("enable_thinking") is False and not self._opened
        self._bound = replace(self._format, thinking=None) if quiet else self._format

    @property
    def text(self) -> str:
        return self._prompt.text

    def prepared(self) -> Prepared:
        make = self._parser()
        return Prepared(
            self._served.ids(self._prompt.segments),
            self._grammar(),
            make,
            self._served.spelled(self._format) if make is not None else None,
            self._forcing(),
        )

    def _parser(self) -> Callable[[], Parser] | None:
        """None where the answer is all content: also for one that must match a grammar of the client's own, which says
        itself what there is."""
        if self._constraint is not None and self._constraint.kind == "gbnf":
            return None
        begun = self._begun()

        def make() -> Parser:
            made = parser(self._format, self._tools.callable, opened=self._opened and not begun)
            made.feed(begun)  # the client has that already
            return made

        return None if isinstance(make(), Plain) else make

    def _begun(self) -> str:
        """What the prompt has of the answer, where it goes on with a message."""
        opening = self._format.generation_prompt
        if not self._request.prompting.continued or not opening:
            return ""
        _, found, begun = self._prompt.text.rpartition(opening)
        return begun if found else ""

    def _grammar(self) -> Grammar | None:
        constraint, tools = self._constraint, self._tools
        if constraint is not None and constraint.kind == "gbnf":
            if tools.callable:
                raise InvalidRequest("grammar and tools contradict each other: no call matches it", param="grammar")
            return self._served.compiled(constraint)
        if constraint is not None:
            return self._structured(constraint)
        if not tools.callable:
            return None
        if self._request.prompting.continued and tools.mode == "auto":
            return None  # where in a call a message is to be gone on with is not known
        return self._calls()

    def _calls(self) -> Grammar | None:
        """Schemas are held where they can be; where not, only a tool that is strict is refused for that."""
        grammars, required = self._served.grammars, self._tools.mode == "required"
        try:
            return grammars.lark(self._calls_text(loose=False))
        except InvalidRequest as error:
            if self._tools.strict or self._format.calls is None or error.code == TOO_COMPLEX:
                raise
        try:
            return grammars.lark(self._calls_text(loose=True))
        except InvalidRequest:
            if required:
                raise
            return None

    def _calls_text(self, *, loose: bool) -> str:
        return enforce.calls_grammar(
            self._bound,
            self._tools.callable,
            required=self._tools.mode == "required",
            parallel=self._tools.parallel,
            opened=self._opened,
            loose=loose,
            specials=self._served.backend.specials,
            ends=self._served.end_spellings,
        )

    def _structured(self, constraint: Constraint) -> Grammar:
        """Content that a schema describes, with reasoning before it where the model reasons, or calls instead."""
        format = self._bound
        plain = format.thinking is None and format.channels is None and not format.content[0]
        if self._request.prompting.continued or (plain and not self._tools.callable):
            return self._served.compiled(constraint)
        text = enforce.schema_grammar(
            format,
            constraint.schema,
            self._tools.callable,
            parallel=self._tools.parallel,
            opened=self._opened,
            specials=self._served.backend.specials,
            ends=self._served.end_spellings,
        )
        return self._served.grammars.lark(text, param=constraint.field)

    def _forcing(self) -> Callable[[], Forcing] | None:
        budget, thinking = self._request.prompting.budget, self._format.thinking
        if budget is None or thinking is None:
            return None
        closing = self._served.backend.tokenize(closing_text(self._format), special=True)
        return ThinkingBudget(
            budget, tuple(closing), self._served.spelled(self._format), thinking.start, thinking.end, self._opened
        )
