"""An answer goes on elsewhere from its ids and says the same, for every sampler and a grammar, cut at every place."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llmnode.engine.backend import Room
from llmnode.engine.fake import FakeBackend
from llmnode.engine.grammar import Grammars
from llmnode.engine.loop import Limits
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Finish, Logprob, Sampling, Text
from llmnode.wire.errors import InvalidRequest
from tests.node.engine_rig import Answer, running

ROOM = Room(slots=3, n_ctx=256, kv_cells=500, n_batch=48, sequences=6, rows=12)
PROMPT = tuple(b"the cat sat on the mat, the cat sat on the hat, the cat")
TOKENS = 48

SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "plain": Sampling(seed=1),
    "truncated": Sampling(0.9, 40, 0.9, 0.02, seed=2),
    "typical": Sampling(typical_p=0.8, seed=3),
    "top_n_sigma": Sampling(top_n_sigma=1.5, seed=4),
    "xtc": Sampling(xtc_probability=0.5, xtc_threshold=0.05, seed=5),
    "dry": Sampling(temperature=0.5, dry_multiplier=2.0, seed=6),
    "penalties": Sampling(repeat_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5, seed=7),
    "greedy with penalties": Sampling(temperature=0, repeat_penalty=1.5, repeat_last_n=-1),
    "bias": Sampling(logit_bias=((101, 5.0), (97, float("-inf"))), seed=8),
    "mirostat 1": Sampling(mirostat=1, mirostat_tau=3.0, seed=12),
    "mirostat 2": Sampling(mirostat=2, mirostat_tau=3.0, seed=10),
}


def whole(ask: Ask, limits: Limits | None = None) -> Answer:
    answer = Answer()
    with running(FakeBackend(ROOM), limits or Limits()) as engine:
        engine.submit(ask, answer)
        answer.wait()
    return answer


def spoken(ids: tuple[int, ...]) -> str:
    """The text of the fake's tokens: bytes, and control tokens, which have none."""
    return bytes(id for id in ids if id < 256).decode()


def said(ids: tuple[int, ...], stop: tuple[str, ...]) -> str:
    """What a reader has heard after these ids: not what may still turn out to be a stop text."""
    stream = TextStream(FakeBackend(ROOM).pieces, stop)
    return "".join(map(stream.push, ids))


def test_text_ids_and_end_of_an_answer_are_the_same_from_every_cut() -> None:
    for name, sampling in SAMPLINGS.items():
        ask = Ask(PROMPT, sampling, TOKENS, stop=("zqj",), ignore_eos=True)
        uncut = whole(ask, Limits(prompt_lookup=False))
        ids = uncut.ids
        assert len(ids) == TOKENS, name
        answers = {cut: Answer() for cut in range(TOKENS + 1)}
        with running(FakeBackend(ROOM)) as engine:
            for cut, answer in answers.items():
                engine.submit(Ask(PROMPT, sampling, TOKENS, ("zqj",), ignore_eos=True, replayed=ids[:cut]), answer)
            for cut, answer in answers.items():
                assert answer.done.finish is uncut.done.finish, (name, cut)
                assert answer.ids == ids[cut:], (name, cut)
                # With its last token an answer says all that it held back, so nothing is left to say after it.
                rest = uncut.text.removeprefix(said(ids[:cut], ("zqj",))) if cut < TOKENS else ""
                assert answer.text == rest, (name, cut)
                assert answer.done.usage.completion_tokens == TOKENS


def test_a_grammar_goes_on_where_it_was() -> None:
    backend = FakeBackend(ROOM)
    grammar = Grammars(backend.pieces, backend.end_tokens).gbnf(
        'root ::= "[" item ("," item)* "]"\nitem ::= "\\"" [a-f]{2,6} "\\"" | "{" [0-9]+ "}"\n'
    )
    ask = Ask(PROMPT, Sampling(seed=3), 60, grammar=grammar)
    uncut = whole(ask)
    assert uncut.text.startswith("[")
    for cut in range(len(uncut.ids) + 1):
        rest = whole(Ask(PROMPT, Sampling(seed=3), 60, grammar=grammar, replayed=uncut.ids[:cut]))
        assert uncut.text == uncut.text[:cut] + rest.text
        assert rest.done.finish is uncut.done.finish


def test_an_answer_that_was_whole_already_ends_at_once() -> None:
    ask = Ask(PROMPT, Sampling(seed=1), 10, ignore_eos=True)
    ids = whole(ask).ids
    answer = whole(Ask(PROMPT, Sampling(seed=1), 10, ignore_eos=True, replayed=ids))
    assert (answer.text, answer.done.finish) == ("", Finish.LENGTH)
    assert answer.done.usage.completion_tokens == 10
    text = "".join(map(chr, ids))
    stopped = whole(Ask(PROMPT, Sampling(seed=1), 30, stop=(text[3:6],), ignore_eos=True, replayed=ids[:6]))
    assert (stopped.text, stopped.done.finish) == ("", Finish.STOP)


def test_a_stop_text_across_the_cut_is_found() -> None:
    ask = Ask(PROMPT, Sampling(seed=1), 30, ignore_eos=True)
    ids = whole(ask).ids
    stop = spoken(ids)[10:14]
    uncut = whole(Ask(PROMPT, Sampling(seed=1), 30, (stop,), ignore_eos=True))
    assert uncut.done.finish is Finish.STOP
    for cut in range(1, uncut.done.usage.completion_tokens + 1):
        rest = whole(Ask(PROMPT, Sampling(seed=1), 30, (stop,), ignore_eos=True, replayed=ids[:cut]))
        assert uncut.text.endswith(rest.text) and len(rest.text) >= len(uncut.text) - cut
        assert rest.done.finish is Finish.STOP
        assert rest.done.usage == uncut.done.usage


def reported(answer: Answer) -> list[Logprob]:
    return [entry for event in answer.events if isinstance(event, Text) for entry in event.logprobs]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_an_answer_that_is_retold_is_whole_from_every_cut(logprobs: int | None) -> None:
    backend = FakeBackend(ROOM)
    grammar = Grammars(backend.pieces, backend.end_tokens).gbnf('root ::= [a-f]{9} "."')
    base = Ask(PROMPT, Sampling(seed=5), 24, logprobs=logprobs, ignore_eos=True)
    asks = [
        base,
        replace(base, sampling=SAMPLINGS["mirostat 2"]),
        replace(base, sampling=Sampling(seed=5, logit_bias=((257, 3.0),)), ignore_eos=False),  # ends by itself
        replace(base, grammar=grammar),
        replace(base, grammar=grammar, stop=("d", "e")),
    ]
    for ask in asks:
        uncut = whole(ask)
        for cut in range(len(uncut.ids) + 1):
            again = whole(replace(ask, replayed=uncut.ids[:cut], retold=True))
            assert (again.text, again.ids) == (uncut.text, uncut.ids), cut
            assert again.done.finish is uncut.done.finish
            assert again.done.usage.completion_tokens == uncut.done.usage.completion_tokens
            assert reported(again) == reported(uncut)
            assert len(reported(again)) == (0 if logprobs is None else len(uncut.ids))


def test_the_id_that_ends_an_answer_is_told_though_it_has_no_text() -> None:
    answer = whole(Ask(PROMPT, Sampling(temperature=0, logit_bias=((257, 100.0),)), 24))
    assert (answer.text, answer.ids, answer.done.finish) == ("", (257,), Finish.STOP)


def test_ids_past_the_end_of_an_answer_are_refused() -> None:
    ids = whole(Ask(PROMPT, Sampling(seed=1), 30, ignore_eos=True)).ids
    for ask in (
        Ask(PROMPT, Sampling(seed=1), 30, replayed=(*ids[:5], 257, 97)),
        Ask(PROMPT, Sampling(seed=1), 30, replayed=(*ids[:5], 257, 97), retold=True, logprobs=0),
        Ask(PROMPT, Sampling(seed=1), 30, (spoken(ids)[3:6],), replayed=ids[:7], ignore_eos=True),
    ):
        with running(FakeBackend(ROOM)) as engine, pytest.raises(InvalidRequest, match="ends after 6 of the 7 ids"):
            engine.submit(ask, Answer())


@pytest.mark.parametrize("sampling", [Sampling(seed=1), SAMPLINGS["mirostat 2"]])
def test_ids_that_the_grammar_does_not_allow_fail_that_answer_alone(sampling: Sampling) -> None:
    backend = FakeBackend(ROOM)
    grammar = Grammars(backend.pieces, backend.end_tokens).gbnf('root ::= "a"+ "."')
    wrong = Ask(PROMPT, sampling, 30, grammar=grammar, replayed=tuple(b"aaXaa"), retold=True, logprobs=1)
    with running(backend) as engine:
        broken, other = Answer(), Answer()
        engine.submit(wrong, broken)
        engine.submit(Ask(PROMPT, sampling, 5, ignore_eos=True), other)
        assert broken.error.code == "dead_end"
        assert other.done.finish is Finish.LENGTH


@pytest.mark.parametrize("replayed", [(1,) * 11, (999,), (-1,)])
def test_an_answer_so_far_that_cannot_be_is_refused(replayed: tuple[int, ...]) -> None:
    with running(FakeBackend(ROOM)) as engine, pytest.raises(InvalidRequest) as refusal:
        engine.submit(Ask(PROMPT, Sampling(), 10, replayed=replayed), Answer())
    assert refusal.value.param == "ids"


def test_guessing_ahead_changes_nothing_but_the_time() -> None:
    """The fake repeats nothing by itself, so its logits are bent towards a text that does."""
    line = b"one two three four five six seven eight nine ten. "

    class Repeating(FakeBackend):
        def logits(self):  # type: ignore[no-untyped-def]
            rows = super().logits()
            for row, place in zip(rows, self.places, strict=True):
                row[line[place % len(line)]] += 6.0
            return rows

        def decode(self, chunks):  # type: ignore[no-untyped-def]
            self.places = [c.start + len(c.tokens) - c.rows + at + 1 for c in chunks for at in range(c.rows)]
            return super().decode(chunks)

    asks = [Ask((line * 3)[: 60 + n], sampling, 90, ignore_eos=True) for n, sampling in enumerate(SAMPLINGS.values())]
    asks = [Ask(tuple(ask.prompt), ask.sampling, ask.max_tokens, ignore_eos=True) for ask in asks]
    results = []
    for lookup in (False, True):
        answers = [Answer() for _ in asks]
        with running(Repeating(ROOM), Limits(prompt_lookup=lookup)) as engine:
            for ask, answer in zip(asks, answers, strict=True):
                engine.submit(ask, answer)
            results.append([(answer.done.finish, answer.text, answer.ids) for answer in answers])
            timings = engine.stats().timings
        assert (timings.drafted > 0) == lookup
    assert results[0] == results[1]
    assert timings.accepted > 100


def test_logprobs_come_one_for_each_token_also_where_guesses_ran_past_the_end() -> None:
    dice = random.Random(3)
    for _ in range(5):
        ask = Ask(PROMPT, Sampling(0.3, seed=dice.randrange(100)), dice.randint(1, 40), logprobs=2, stop=("t",))
        answer = whole(ask)
        logprobs = [entry for event in answer.events[:-1] for entry in event.logprobs]  # type: ignore[union-attr]
        assert [entry.token for entry in logprobs] == list(answer.ids)
        assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in logprobs)
