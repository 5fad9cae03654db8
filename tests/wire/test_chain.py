"""Chains: what shares a beginning shares blocks, what does not shares none, and a turn finds the one before it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmnode.wire import chain
from llmnode.wire.chain import BLOCK

texts = st.text(max_size=600)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}), max_size=6
)


def shared(a: chain.Chain, b: chain.Chain) -> int:
    return next((n for n, (x, y) in enumerate(zip(a.blocks, b.blocks, strict=False)) if x != y), len(a.blocks))


@given(messages, messages)
def test_a_longer_conversation_begins_with_the_blocks_of_a_shorter_one(
    first: list[dict[str, Any]], more: list[dict[str, Any]]
) -> None:
    short, long = chain.of_chat(None, first, "m"), chain.of_chat(None, [*first, *more], "m")
    assert long.blocks[: len(short.blocks)] == short.blocks
    assert long.size >= short.size
    assert len(short.blocks) == short.size // BLOCK


@given(texts, texts)
def test_a_longer_prompt_begins_with_the_blocks_of_a_shorter_one(first: str, more: str) -> None:
    short, long = chain.of_prompt(first, "m"), chain.of_prompt(first + more, "m")
    assert long.blocks[: len(short.blocks)] == short.blocks


def test_the_next_turn_begins_with_what_the_node_says_it_holds() -> None:
    asked = [{"role": "system", "content": "s" * 700}, {"role": "user", "content": "u" * 300}]
    answer = "a" * 900
    held = chain.of_chat(None, chain.with_reply(asked, answer), "m")
    sent_back = {"role": "assistant", "content": answer, "refusal": None, "tool_calls": []}
    turn = chain.of_chat(None, [*asked, sent_back, {"role": "user", "content": "more"}], "m")
    assert turn.depth(frozenset(held.blocks)) == len(held.blocks) > 6


def test_messages_that_begin_alike_share_blocks_though_their_lengths_differ() -> None:
    document = "d" * 1000
    first, other = ([{"role": "user", "content": document + question}] for question in ("What?", "And why is that so?"))
    assert shared(chain.of_chat(None, first, "m"), chain.of_chat(None, other, "m")) == 3


def test_text_parts_and_text_are_the_same_turn() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a" * 300}, {"type": "text", "text": "b" * 300}]}]
    plain = [{"role": "user", "content": "a" * 300 + "b" * 300}]
    assert chain.of_chat(None, parts, "m") == chain.of_chat(None, plain, "m")


@pytest.mark.parametrize(
    ("tools", "messages", "salt"),
    [
        ([{"type": "function"}], [{"role": "user", "content": "x" * 600}], "m"),
        (None, [{"role": "system", "content": "x" * 600}], "m"),
        (None, [{"role": "user", "content": "y" + "x" * 599}], "m"),
        (None, [{"role": "user", "content": "x" * 600, "name": "n"}], "m"),
        (None, [{"role": "user", "content": "x" * 600}], "other"),
    ],
)
def test_whatever_differs_at_the_start_shares_nothing(tools: Any, messages: list[Any], salt: str) -> None:
    plain = chain.of_chat(None, [{"role": "user", "content": "x" * 600}], "m")
    other = chain.of_chat(tools, messages, salt)
    assert shared(plain, other) == 0
    assert plain.root != other.root


def test_conversations_that_begin_alike_have_one_root() -> None:
    begun = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    later = [*begun, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]
    assert chain.of_chat(None, begun, "m").root == chain.of_chat(None, later, "m").root
    other = [begun[0], {"role": "user", "content": "w"}]
    assert chain.of_chat(None, other, "m").root != chain.of_chat(None, begun, "m").root


def test_a_prompt_that_is_gone_on_with_begins_with_what_the_node_says_it_holds() -> None:
    held = chain.of_answered({"prompt": "p" * 300}, "a" * 300, "m")
    assert held == chain.of_prompt("p" * 300 + "a" * 300, "m")
    chat = {"messages": [{"role": "user", "content": "u" * 300}], "tools": [{"type": "function"}]}
    turn = chain.of_chat(chat["tools"], chain.with_reply(chat["messages"], "a" * 300), "m")
    assert chain.of_answered(chat, "a" * 300, "m") == turn
    ids = {"prompt": [1] * 300}  # whose answer comes as text
    assert chain.of_answered(ids, "a", "m") == chain.of_request(ids, "m")


def test_models_and_templates_have_salts_of_their_own() -> None:
    salts = {chain.salt(*names) for names in (("a", "b", "c"), ("ab", "", "c"), ("", "ab", "c"), ("b", "a", "c"))}
    assert len(salts) == 4


def test_one_text_at_two_endpoints_has_two_chains() -> None:
    """It is the prompt itself at one, and a user's message at the other: other tokens, of which none are shared."""
    body = {"prompt": "p" * 1000}
    ways = [chain.of_request(body, chain.salt("m", "t", path)) for path in ("/v1/completions", "/inference")]
    assert ways[0].depth(set(ways[1].blocks)) == 0


paths = st.lists(st.integers(0, 1) | st.sampled_from([[0] * 60, [1] * 90]), max_size=30)


def blocks(path: list[Any]) -> tuple[int, ...]:
    """Blocks as a chain has them: each stands for all before it. Lists in a path are stretches without a fork."""
    found, state = [], 0
    for step in [one for part in path for one in (part if isinstance(part, list) else [part])]:
        state = hash((state, step)) & (2**64 - 1)
        found.append(state)
    return tuple(found)


@given(st.lists(paths, max_size=6), paths)
def test_whoever_goes_on_with_a_published_chain_finds_all_of_it(told: list[list[Any]], asked: list[Any]) -> None:
    chains = [blocks(path) for path in told]
    hashes = chain.publish(chains, 10_000)
    assert len(hashes) == len(set(hashes)) <= 10_000
    for held in chains:
        assert chain.Chain((*held, 1, 2), 0, 0).depth(set(hashes)) == len(held)
    true = chain.Chain(blocks(asked), 0, 0).depth({block for held in chains for block in held})
    found = chain.Chain(blocks(asked), 0, 0).depth(set(hashes))
    assert true - chain.STEP < found <= true
    assert found == true or true > chain.DENSE


@given(st.lists(paths, max_size=6), st.integers(0, 200))
def test_a_published_set_keeps_its_limit_and_begins_with_the_chains_used_last(
    told: list[list[Any]], limit: int
) -> None:
    chains = [blocks(path) for path in told]
    hashes, all_of_them = chain.publish(chains, limit), chain.publish(chains, 10_000)
    assert len(hashes) == min(limit, len(all_of_them))
    whole = [n for n in range(len(chains)) if len(chain.publish(chains[: n + 1], 10_000)) <= limit]
    assert all(chain.Chain(chains[n], 0, 0).depth(set(hashes)) == len(chains[n]) for n in whole)
    # What is told only in part is told from its start, and gates look no further where the first block is missing.
    assert all(held[0] in hashes for held in chains if set(held) & set(hashes))
    assert set(hashes) <= {block for held in chains for block in held}
    cut = chains[len(whole)] if len(whole) < len(chains) else ()
    at = [n for n, block in enumerate(cut) if block in hashes]
    assert all(n in at for n in range(min(len(at), chain.DENSE)))


def test_a_very_long_chain_leaves_room_for_others() -> None:
    long = blocks([[0] * 1600])
    assert len(chain.publish([long], 4096)) == chain.DENSE + (1600 - chain.DENSE) // chain.STEP + 1


@pytest.mark.parametrize("body", [{}, {"prompt": [1, 2, 3]}, {"messages": [1, None, "x"]}, {"prompt": {"a": 1}}])
def test_nonsense_has_a_chain_too(body: dict[str, Any]) -> None:
    assert chain.of_request(body, "m").blocks == ()


def test_depth_counts_from_the_deepest_block_that_is_held() -> None:
    found = chain.of_prompt("x" * (5 * BLOCK), "m")
    assert [found.depth({found.blocks[at]}) for at in range(5)] == [1, 2, 3, 4, 5]
    assert found.depth(frozenset()) == 0


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_packed_hashes_are_read_back(blocks: list[int]) -> None:
    assert chain.unpack(chain.pack(blocks)) == frozenset(blocks)


@pytest.mark.parametrize("text", ["AAAA", "not base64!"])
def test_what_is_not_packed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        chain.unpack(text)


def test_a_chain_is_the_same_on_every_machine() -> None:
    """A gate and a node one release apart must agree."""
    found = chain.of_chat(None, [{"role": "user", "content": "x" * 300}], "salt")
    assert [f"{block:016x}" for block in found.blocks] == ["fa879f87f062d4d2"]


SYSTEM, QUESTION, REPLY, MORE = "s" * 700, "u" * 450, "a" * 900, "and then"
MARK = {"cache_control": {"type": "ephemeral"}}
TURNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Anthropic's, whose mark of the cache moves on": (
        {
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
                {"type": "text", "text": SYSTEM, **MARK},
            ],
            "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION, **MARK}]}],
        },
        {
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cch=2;"},
                {"type": "text", "text": SYSTEM, **MARK},
            ],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
                {"role": "assistant", "content": [{"type": "text", "text": REPLY}]},
                {"role": "user", "content": [{"type": "text", "text": MORE, **MARK}]},
            ],
        },
    ),
    "Responses, a text and then items as they came": (
        {"instructions": SYSTEM, "input": QUESTION},
        {
            "instructions": SYSTEM,
            "input": [
                {"role": "user", "content": QUESTION},
                {
                    "id": "msg_1",
                    "type": "message",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": REPLY, "annotations": [], "logprobs": []}],
                },
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": MORE}]},
            ],
        },
    ),
}


CALL = {"role": "assistant", "content": "I look.", "reasoning_content": "Hm."}
CALL["tool_calls"] = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}]  # type: ignore[assignment]
RESULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chat's": (
        {"messages": [{"role": "user", "content": QUESTION}]},
        {"messages": [{"role": "user", "content": QUESTION}, CALL, {"role": "tool", "tool_call_id": "c1"}]},
    ),
    "Anthropic's": (
        {"messages": [{"role": "user", "content": QUESTION}]},
        {
            "messages": [
                {"role": "user", "content": QUESTION},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 2, "b": 1}, **MARK},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "yes"}]},
            ]
        },
    ),
    "Responses": (
        {"input": QUESTION},
        {
            "input": [
                {"role": "user", "content": QUESTION},
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "Hm."}],
                },
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
                {"type": "function_call", "id": "fc", "call_id": "c1", "name": "f", "arguments": '{"a": 2, "b": 1}'},
                {"type": "function_call_output", "call_id": "c1", "output": "yes"},
            ]
        },
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_shape_of_a_call_that_is_sent_back_is_found(name: str) -> None:
    """The question is cut so that the call is in a block of its own, and nothing else is."""
    first, then = RESULTS[name]
    held = chain.of_answered(first, CALL, "m")
    whole = chain.of_request(then, "m")
    assert len(held.blocks) == 2 < held.size / BLOCK

    assert whole.depth(frozenset(held.blocks)) == len(held.blocks)
    assert chain.of_request(RESULTS["chat's"][1], "m").blocks[: len(held.blocks)] == held.blocks


@pytest.mark.parametrize("name", TURNS)
def test_every_shape_of_a_next_turn_begins_with_what_the_node_says_it_holds(name: str) -> None:
    first, then = TURNS[name]
    held = chain.of_answered(first, REPLY, "m")
    assert len(held.blocks) > 7
    assert chain.of_request(then, "m").depth(frozenset(held.blocks)) == len(held.blocks)
    plain = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    assert chain.of_request(first, "m") == chain.of_chat(None, plain, "m")


def test_marks_of_the_cache_within_parts_and_tools_change_nothing() -> None:
    def body(mark: dict[str, Any]) -> dict[str, Any]:
        result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r" * 300, **mark}]}
        return {
            "tools": [{"name": "find", "input_schema": {"type": "object"}, **mark}],
            "messages": [
                {"role": "user", "content": [{**result, **mark}, {"type": "text", "text": "x" * 300, **mark}]}
            ],
        }

    assert chain.of_request(body(MARK), "m") == chain.of_request(body({}), "m")
    other = {**body({}), "tools": [{"name": "found", "input_schema": {"type": "object"}}]}
    assert shared(chain.of_request(body({}), "m"), chain.of_request(other, "m")) == 0


def test_what_is_to_be_embedded_is_no_conversation() -> None:
    for texts_or_ids in (["a text", "another"], [[1, 2]], [1, 2], None):
        assert not chain.converses({"input": texts_or_ids})
    assert chain.converses({"input": "a text"})
    assert not chain.converses({"input": "a text", "prompt": "this goes on"})
