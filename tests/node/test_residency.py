"""What a node tells gates that it holds, against what the next turn then finds: over the fake model, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnode.api import schema
from llmnode.api.preparing import Served
from llmnode.api.residency import MOST_BLOCKS, Prefix, Residency, prefix
from llmnode.chat.renderer import Renderer
from llmnode.chat.rendering import Rendering
from llmnode.engine import memory
from llmnode.engine.backend import Room
from llmnode.engine.fake import BOS, FakeBackend
from llmnode.engine.loop import Engine, Limits
from llmnode.engine.types import Ask
from llmnode.wire import chain
from llmnode.wire.chain import BLOCK, Chain
from tests.node.engine_rig import Answer, running, until

SALT = chain.salt("fake", "default", "/v1/chat/completions")
Messages = list[dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def saving_always_pays() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_CHANCE", float("inf"))
        yield


def of(blocks: int, tokens: int, size: int | None = None) -> Prefix:
    return Prefix(Chain(tuple(range(1, blocks + 1)), 0, blocks * BLOCK if size is None else size), tokens)


def read(residency: Residency, *held: tuple[object, int], parts: bool = True) -> frozenset[int]:
    return chain.unpack(residency.report(held, parts=parts).blocks)


@pytest.mark.parametrize(("held", "blocks"), [(0, 0), (63, 0), (64, 1), (200, 3), (255, 3), (256, 4), (999, 4)])
def test_a_part_is_told_in_proportion_to_its_tokens(held: int, blocks: int) -> None:
    assert of(4, 256).blocks(held) == blocks
    assert read(Residency(), (of(4, 256), held)) == frozenset(range(1, blocks + 1))


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(0, 10**5))
def test_no_part_is_told_as_more_than_the_whole(size: int, tokens: int, held: int) -> None:
    whole = size // BLOCK
    told = of(whole, tokens, size).blocks(held)
    assert 0 <= told <= whole
    assert (told == whole) if held >= tokens else told * BLOCK * tokens <= size * held


def test_where_only_the_whole_is_of_use_its_last_block_is_told_beside_the_first() -> None:
    assert read(Residency(), (of(4, 256), 200), parts=False) == {1, 3}
    assert read(Residency(), (of(4, 256), 64), parts=False) == {1}
    assert read(Residency(), (of(4, 256), 10), parts=False) == frozenset()


def test_what_is_held_twice_or_is_nobodys_is_told_once_or_not_at_all() -> None:
    assert read(Residency(), (of(4, 4), 4), ("a stranger", 4), (of(2, 2), 2)) == {1, 2, 3, 4}


def test_the_report_is_made_anew_only_when_there_is_something_new() -> None:
    residency, known = Residency(), of(2, 2)
    held: tuple[tuple[object, int], ...] = ((known, 2),)
    first = residency.report(held, parts=True)
    assert residency.report(held, parts=True) is first
    residency.answered(known, Chain((1, 2, 3), 0, 3 * BLOCK), 3)
    assert chain.unpack(residency.report(((known, 3),), parts=True).blocks) == {1, 2, 3}
    assert residency.reported == 3


def test_the_report_has_a_limit() -> None:
    residency = Residency()
    many = [(Prefix(Chain(tuple(range(n * 100, n * 100 + 60)), 0, 60 * BLOCK), 60), 60) for n in range(1, 100)]
    assert len(read(residency, *many)) == residency.reported == MOST_BLOCKS
    assert len(residency.report(tuple(many), parts=True).blocks) < 44_000


def test_bytes_of_a_token_are_averaged_and_long_prompts_count_more() -> None:
    residency = Residency()
    assert residency.bytes_per_token == 0.0
    first, second = residency.asked(of(4, 100, 400), 2)
    assert first is not second
    assert residency.bytes_per_token == 4.0
    residency.asked(of(0, 10, 20), 1)
    assert 3.8 < residency.bytes_per_token < 3.9
    residency.asked(of(0, 90_000, 180_000), 1)
    assert residency.bytes_per_token == 2.0
    residency.asked(of(0, 0, 0), 1)  # will be refused


def test_a_text_that_becomes_a_message_is_not_gone_on_with() -> None:
    """At /inference a longer text is another message, so no request will begin with text and reply."""
    rules = schema.Rules(models=("fake",), n_vocab=256)
    text = schema.inference({"prompt": "p" * 300}, rules, seed=0)
    message = schema.ChatRequest(({"role": "user", "content": "p" * 300},), text.options)
    assert prefix(message, 300, SALT).answered is None
    assert prefix(message, 300, SALT).chain == chain.of_prompt("p" * 300, SALT)
    goes_on = prefix(text, 300, SALT).answered
    assert goes_on is not None and goes_on("a" * 300) == chain.of_prompt("p" * 300 + "a" * 300, SALT)


class Node:
    """Prompts, tags and reports as serving.py makes them, one request after the other and without a socket."""

    def __init__(self, engine: Engine, backend: FakeBackend) -> None:
        self._engine = engine
        source = backend.info.chat_template
        work = Rendering(source, backend.info.bos, backend.info.eos, ())
        self._served = Served(engine, backend, Renderer(source, work.do), (BOS,))
        self._rules = schema.Rules(models=("fake",), n_vocab=backend.info.n_vocab)
        self.residency = Residency()

    def ask(self, messages: Messages, most: int, *, leave: bool = False) -> tuple[str, int]:
        """The answer's text, and how many tokens of the prompt were found."""
        body = {"messages": messages, "max_tokens": most, "seed": 1}
        request = schema.chat(body, self._rules, seed=0)
        prompt = self._served.prepare(request, 0).prompt
        (tag,) = self.residency.asked(prefix(request, len(prompt), SALT), 1)
        answer = Answer()
        id = self._engine.submit(Ask(prompt, request.options.sampling, most, tag=tag), answer)
        if leave:
            self._engine.cancel(id)
        usage = answer.done.usage
        if not leave:
            assert tag.answered is not None
            self.residency.answered(tag, tag.answered(answer.text), usage.prompt_tokens + usage.completion_tokens)
        until(lambda: not self._engine.stats().load.running)
        return answer.text, usage.cached_tokens

    def depth(self, messages: Messages) -> int:
        """Blocks that a gate would believe the node to hold of this conversation."""
        held = self.residency.report(self._engine.stats().held, parts=self._engine.shares_parts)
        return chain.of_request({"messages": messages}, SALT).depth(chain.unpack(held.blocks))


def covered(messages: Messages, tokens: int) -> int:
    """Canonical bytes that so many tokens of a prompt stand for, by the fake's template: BOS, then for each message its
    role in one token, its bytes, and its end in one token."""
    found, left = 0, tokens - 1
    for message in messages:
        role, content = len(message["role"]), len(message["content"])
        found += (4 + role + 1 if left > 0 else 0) + max(0, min(left - 1, content)) + (1 if left > content + 1 else 0)
        left -= content + 2
    return found


def says(seed: int, length: int) -> dict[str, Any]:
    dice = random.Random(seed)
    return {"role": "user", "content": "".join(dice.choices("abcdefghijklmnopqrstuvwxyz ", k=length))}


def test_the_next_turn_is_told_whole_and_found_whole() -> None:
    backend = FakeBackend(Room(2, 4096, 8192, 256, sequences=4))
    with running(backend, Limits()) as engine:
        node = Node(engine, backend)
        asked = [says(1, 700)]
        text, _ = node.ask(asked, 300)
        turn = [*chain.with_reply(asked, text), says(2, 300)]
        told = node.depth(turn)
        assert told >= (700 + len(text)) // BLOCK
        assert covered(turn, node.ask(turn, 5)[1]) >= told * BLOCK
        assert node.depth([says(1, 700), says(3, 700)]) == 2
        assert node.depth([says(3, 700)]) == 0


numbers = st.integers(0, 10_000)
requests = st.tuples(st.sampled_from(["new", "goes on", "changes", "leaves"]), numbers, st.integers(40, 600), numbers)


@settings(max_examples=30, deadline=None)
@given(st.lists(requests, min_size=2, max_size=12), st.integers(1, 3), st.sampled_from([0, 40_000, 1 << 20]))
def test_no_turn_finds_less_than_was_told_but_for_one_block(
    asked: list[tuple[str, int, int, int]], slots: int, host: int
) -> None:
    backend = FakeBackend(Room(slots, 2048, 2048, 128, sequences=2 * slots, rows=slots + 8))
    with running(backend, Limits(host_bytes=host)) as engine:
        node = Node(engine, backend)
        conversations: list[Messages] = [[]]
        for kind, seed, length, most in asked:
            before = [] if kind == "new" else conversations[seed % len(conversations)]
            if sum(len(message["content"]) + 2 for message in before) + length > 1500:
                before = []
            if kind == "changes":
                before = [*before[:-1], says(seed, 50)]
            messages = [*before, says(seed + length, length)]
            told = node.depth(messages)
            text, found = node.ask(messages, 1 + most % 300, leave=kind == "leaves")
            if kind != "leaves":
                assert covered(messages, found) >= (told - 1) * BLOCK
                conversations.append(chain.with_reply(messages, text))
