"""One answer in the making: its tokens, how far they are computed, and what its reader has not heard yet.

Owns: the state of one answer. Refuses to know: other answers, the queue, where its cells are. The engine's thread
changes it; before `Engine.submit` hands it over, the submitting thread has it alone.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from llmnode.engine.lookup import Lookup
from llmnode.engine.sampler import Sampler
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Finish, Logprob, Sink, Text
from llmnode.wire.errors import InvalidRequest

NOWHERE = -1


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer.

    limit: answer tokens at most.       seq: its number in the backend, NOWHERE while it waits.
    tokens: prompt and answer.          computed: tokens whose cells exist.
    answered: tokens of the answer.     sampled: of these, those that the sampler has taken in.
    fresh, parts, logprobs: ids, the text that each made certain, and log probabilities since the last event.
    unsent: whether there is any text among them.
    loose: of the computed ones, those that were computed one by one.
    cached: prompt tokens that were found and not computed; None before the first admission.
    leader, follow: another sequence that computes the same prompt, and how many of its tokens to wait for.
    yielded: how often it had to give way.          passed: how often others were admitted past it.
    ended: why it was over before it began: an answer that was whole when its node died.
    submitted, admitted, first: moments on the loop's clock; None before they happened.
    """

    id: int
    ask: Ask
    sink: Sink
    limit: int
    text: TextStream
    sampler: Sampler
    submitted: float
    end_tokens: frozenset[int]
    lookup: Lookup | None = None
    tokens: array[int] = field(init=False)
    seq: int = NOWHERE
    computed: int = 0
    answered: int = 0
    sampled: int = 0
    fresh: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    unsent: bool = False
    logprobs: list[Logprob] = field(default_factory=list)
    loose: int = 0
    cached: int | None = None
    leader: Sequence | None = None
    follow: int = 0
    yielded: int = 0
    passed: int = 0
    ended: Finish | None = None
    admitted: float | None = None
    first: float | None = None

    def __post_init__(self) -> None:
        self.tokens = array("i", self.ask.prompt)

    @property
    def behind(self) -> int:
        """Tokens known and not computed."""
        return len(self.tokens) - self.computed

    @property
    def remaining(self) -> int:
        """Answer tokens that may still come."""
        return self.limit - self.answered

    @property
    def rows_from(self) -> int:
        """The first position whose logits are wanted: the one before the first token that the sampler has not seen."""
        return len(self.ask.prompt) + self.sampled - 1

    def take(self, token: int) -> Finish | None:
        """Add a token to the answer. Returns why it ends the answer, if it does. The sampler is the caller's
        business."""
        self.tokens.append(token)
        self.fresh.append(token)
        self.answered += 1
        finish, stream = None, self.text
        if token in self.end_tokens and (not self.ask.ignore_eos or self.ask.grammar is not None):
            text, finish = stream.flush(), Finish.STOP
        else:
            text = stream.push(token)
            if stream.stopped:
                finish = Finish.STOP
            elif self.answered >= self.limit:
                text, finish = text + stream.flush(), Finish.LENGTH
        self.parts.append(text)
        if text:
            self.unsent = True
        return finish

    def replay(self) -> Finish | None:
        """Take in `ask.replayed`, tokens of this answer that were generated elsewhere, without saying them again unless
        they are to be retold.

        Returns why they end the answer, if they do. A sampler that needs logits gets its part when these positions are
        computed. Where their logprobs are retold, the last one is left to be taken like a drawn one: an answer that it
        ends must not end before they are there. Raises InvalidRequest when they go on past the answer's end."""
        ask, finish = self.ask, None
        for token in ask.replayed[:-1] if ask.retells_logprobs else ask.replayed:
            if not ask.needs_replayed_logits:
                self.sampler.accept(token)
                self.sampled += 1
            finish = self.take(token)
            if finish is not None:
                break
        if finish is not None and self.answered < len(ask.replayed):
            raise InvalidRequest(
                f"the answer ends after {self.answered} of the {len(ask.replayed)} ids that it should go on from",
                param="ids",
            )
        if not ask.retold:
            self.fresh.clear()
            self.parts.clear()
            self.unsent = False
        return finish

    def event(self) -> Text | None:
        """What its reader has not heard yet, None when there is nothing. Tokens whose text is held back wait with
        it."""
        if not self.unsent and not self.logprobs:
            return None
        parts = self.parts
        if len(parts) == 1:
            event = Text(parts[0], (self.fresh[0],), tuple(self.logprobs[:1]))
        else:
            event = Text("".join(parts), tuple(self.fresh), tuple(self.logprobs[: len(parts)]), tuple(parts))
        parts.clear()
        self.unsent = False
        self.fresh.clear()
        self.logprobs.clear()
        return event
