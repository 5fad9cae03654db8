"""Control tokens that a reader has to see are written out, grammars can ask for them, and tokens can be forced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.chat.budget import ThinkingBudget, closing_text
from llmnode.chat.derive import derive
from llmnode.chat.enforce import calls_grammar
from llmnode.chat.format import Format, Thinking
from llmnode.chat.parse import parser
from llmnode.chat.pieces import gather
from llmnode.engine import llama
from llmnode.engine.backend import Room
from llmnode.engine.fake import END, SPECIALS, FakeBackend
from llmnode.engine.grammar import Grammars
from llmnode.engine.llama import LlamaBackend, LlamaOptions
from llmnode.engine.text import TextStream, spelled
from llmnode.engine.types import Ask, Finish, Sampling
from tests.node.engine_rig import Answer, running
from tests.node.format_rig import TOOLS, format_of, renderer, tool

ROOM = Room(slots=3, n_ctx=512, kv_cells=900, n_batch=48, sequences=6, rows=12)
FAKE = FakeBackend(ROOM)
THINK, THOUGHT = FAKE.specials["<|tool|>"], FAKE.specials["<|user|>"]
MARKED = spelled(FAKE.pieces, FAKE.specials, {"<|tool|>", "<|user|>", "<none>"})


def test_markers_are_written_out_and_other_control_tokens_are_not() -> None:
    stream = TextStream(MARKED, ("</s>",))
    ids = [*b"a", THINK, *b"b", FAKE.specials["<|system|>"], THOUGHT, END]
    assert "".join(map(stream.push, ids)) == "a<|tool|>b<|user|>"
    assert FAKE.pieces[THINK] == b""


def test_a_vocabulary_that_has_the_markers_as_text_is_left_as_it_is() -> None:
    assert spelled(FAKE.pieces, FAKE.specials, {"<none>"}) is FAKE.pieces
    assert spelled([b"a", b"<b>"], {"<b>": 1}, {"<b>"}) == [b"a", b"<b>"]


def test_a_stop_text_may_be_a_marker() -> None:
    stream = TextStream(MARKED, ("<|user|>",))
    assert stream.push(97) == "a" and stream.push(THOUGHT) == "" and stream.stopped


def test_a_grammar_allows_the_control_tokens_that_it_names_and_no_others() -> None:
    grammars = Grammars(FAKE.pieces, FAKE.end_tokens)
    matcher = grammars.lark(f'start: /[a-z]+/? <[{THINK}]> "x" <[{THOUGHT}]>').matcher()
    for id, allowed in [(97, {THINK}), (THINK, set()), (120, {THOUGHT}), (THOUGHT, {END})]:
        matcher.accept(id)
        silent = {256 + index for index in range(len(SPECIALS))}
        assert {token for token in silent if matcher.mask()[token]} == allowed
        assert {token for token in silent if matcher.allows(token)} == allowed
    assert matcher.finished


def answer_of(ask: Ask) -> Answer:
    answer = Answer()
    with running(FakeBackend(ROOM)) as engine:
        engine.submit(ask, answer)
        answer.wait()
    return answer


def budget(tokens: int, *, opened: bool = True) -> ThinkingBudget:
    return ThinkingBudget(tokens, (10, THOUGHT, 10), MARKED, "<|tool|>", "<|user|>", opened)


def test_reasoning_past_its_budget_is_ended_and_the_answer_goes_on() -> None:
    ask = Ask(tuple(b"Why?"), Sampling(seed=3), 60, ignore_eos=True, pieces=MARKED, forcing=budget(20))
    answer = answer_of(ask)
    assert answer.ids.index(THOUGHT) == 21 and answer.ids[20:23] == (10, THOUGHT, 10)
    assert len(answer.ids) == 60
    assert "\n<|user|>\n" in answer.text
    free = answer_of(replace(ask, forcing=None))
    assert free.ids[:20] == answer.ids[:20] and THOUGHT not in free.ids


def test_an_answer_with_a_budget_goes_on_elsewhere_from_every_cut() -> None:
    ask = Ask(tuple(b"Why?"), Sampling(seed=3), 40, ignore_eos=True, pieces=MARKED, forcing=budget(12))
    answer = answer_of(ask)
    with running(FakeBackend(ROOM)) as engine:
        for cut in range(40):
            rest = Answer()
            engine.submit(replace(ask, replayed=answer.ids[:cut]), rest)
            assert rest.done.finish is Finish.LENGTH
            assert rest.ids == answer.ids[cut:]


def test_a_greedy_answer_has_its_budget_too() -> None:
    ask = Ask(tuple(b"Why?"), Sampling(temperature=0), 30, ignore_eos=True, pieces=MARKED, forcing=budget(0))
    assert answer_of(ask).ids[:3] == (10, THOUGHT, 10)


def test_what_a_grammar_does_not_allow_is_not_forced() -> None:
    grammar = Grammars(FAKE.pieces, FAKE.end_tokens).lark("start: /[a-z ]{30}/")
    ask = Ask(tuple(b"Why?"), Sampling(seed=1), 60, grammar=grammar, pieces=MARKED, forcing=budget(5))
    answer = answer_of(ask)
    assert answer.done.finish is Finish.STOP and len(answer.text) == 30


@given(st.lists(st.sampled_from([97, 10, 32, THINK, THOUGHT, 0xC3, 0xA9, *b"<|user|>"]), max_size=40), st.booleans())
@settings(max_examples=200, deadline=None, database=None)
def test_the_account_forces_only_within_reasoning(ids: list[int], opened: bool) -> None:
    account = budget(3, opened=opened)()
    said, forced = b"", 0
    for id in ids:
        wanted = account.wanted()
        begun = opened or said.lstrip().startswith(b"<|tool|>")
        inside = begun and b"<|user|>" not in said
        assert wanted is None or (forced or inside)
        assert wanted is not None or not 0 < forced < 3
        if wanted is not None:
            assert wanted == (10, THOUGHT, 10)[forced]
            forced += 1
        token = id if wanted is None else wanted
        account.accept(token)
        said += MARKED[token]


def test_an_answer_that_does_not_reason_is_left_alone() -> None:
    account = budget(0, opened=False)()
    for id in b"Well, <|tool|> is nothing.":
        assert account.wanted() is None
        account.accept(id)
    account = budget(1, opened=False)()
    for id, wanted in [(10, None), (THINK, None), (97, None), (10, 10), (THOUGHT, THOUGHT), (10, 10), (97, None)]:
        assert account.wanted() == wanted
        account.accept(id)


def test_reasoning_is_not_ended_within_a_character() -> None:
    account = budget(1)()
    account.accept(0xC3)
    assert account.wanted() is None
    account.accept(0xA9)
    assert account.wanted() == 10


def test_reasoning_ends_the_way_the_template_writes_it() -> None:
    assert closing_text(format_of("tagged")) == "\n</think>\n\n"
    assert closing_text(format_of("channels")) == "<|end|><|start|>assistant"
    assert closing_text(Format(thinking=Thinking("<a>", "</a>"))) == "\n</a>"


# The real thing.


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[LlamaBackend]:
    backend = llama.load(LlamaOptions(tiny_model, threads=1, slots=2, n_ctx=1024))
    yield backend
    backend.close()


def test_a_models_control_tokens_are_known_by_their_spelling(model: LlamaBackend) -> None:
    token = model.specials["<|assistant|>"]
    assert model.pieces[token] == b"" and model.tokenize("<|assistant|>", special=True) == [token]
    assert all(len(model.tokenize(name, special=True)) >= 1 for name in model.specials)
    marked = spelled(model.pieces, model.specials, {"<|assistant|>"})
    assert [id for id, piece in enumerate(marked) if piece != model.pieces[id]] == [token]
    assert marked[token] == b"<|assistant|>"


def with_tokens(format: Format) -> Format:
    """The same format with markers that the tiny model's vocabulary has as control tokens."""
    text = json.dumps(format.to_json())
    for marker, token in [("<tool_call>", "<|assistant|>"), ("</tool_call>", "<|user|>"), ("<think>", "<|system|>")]:
        text = text.replace(marker, token)
    return Format.from_json(json.loads(text))


@pytest.mark.parametrize("name", ["tagged", "pairs", "quoted", "bare"])
@pytest.mark.parametrize("tokens", [True, False], ids=["control tokens", "text"])
def test_a_model_of_random_weights_calls_a_tool_where_it_must(tiny_model: Path, name: str, tokens: bool) -> None:
    backend = llama.load(LlamaOptions(tiny_model, threads=1, slots=4, n_ctx=1024))
    format = with_tokens(format_of(name)) if tokens else format_of(name)
    format = replace(format, thinking=None)
    days = {"type": "integer", "minimum": 1, "maximum": 9}
    forecast = tool("forecast", {"city": {"enum": ["Rome", "Oslo"]}, "days": days}, ["city", "days"])
    tools = [forecast, TOOLS[2]]  # no texts: such a model hardly ever ends one
    grammar = Grammars(backend.pieces, backend.end_tokens).lark(
        calls_grammar(format, tools, required=True, parallel=False, specials=backend.specials)
    )
    pieces = spelled(backend.pieces, backend.specials, format.markers)
    prompt = tuple(backend.tokenize("<s>What is the weather?", special=True))
    answers = [Answer() for _ in range(3)]
    with running(backend) as engine:
        for seed, answer in enumerate(answers):
            engine.submit(Ask(prompt, Sampling(seed=seed, top_k=40), 250, grammar=grammar, pieces=pieces), answer)
        ended = [answer for answer in answers if answer.done.finish is Finish.STOP]
    schemas = {given["function"]["name"]: given["function"]["parameters"] for given in tools}
    for answer in ended:
        reader = parser(format, tools)
        message = gather([*reader.feed(answer.text), *reader.flush()])
        (call,) = message.calls
        assert message.content == ""
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    assert ended


def test_the_tiny_models_own_template_is_derived(model: LlamaBackend) -> None:
    format = derive(renderer(model.info.chat_template), model.info.chat_template)
    assert format.generic and format.system and format.turn_ends == ("<|end|>",)
