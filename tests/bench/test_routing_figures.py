"""Promises of the parts of `make bench-routing`: what chats share, and what counts as an answered turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.bench.chats import Chats, read
from tests.bench.routing import ROWS, SHARED, SIDES, UNSHARED, Row


class Numbers:
    """Words that are numbers, none of them twice."""

    def prompts(self, count: int, tokens: int, seed: int) -> list[str]:
        return [" ".join(f"{seed}-{n}-{k}" for k in range(tokens)) for n in range(count)]


def drawn(chats: Chats, seed: int = 1) -> list[list[dict[str, str]]]:
    return chats.drawn(Numbers(), seed)  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_chats_and_another_shares_nothing_with_it() -> None:
    assert drawn(SHARED) == drawn(SHARED)

    def texts(seed: int) -> set[str]:
        return {message["content"] for chat in drawn(SHARED, seed) for message in chat}

    assert not texts(1) & texts(2)


def test_chats_of_a_group_share_their_system_prompt_and_nothing_else() -> None:
    chats = drawn(SHARED)
    systems = [chat[0]["content"] for chat in chats]
    assert len(chats) == SHARED.groups * SHARED.chats
    assert {systems.count(text) for text in systems} == {SHARED.chats}
    assert all([m["role"] for m in chat] == ["system", *["user"] * SHARED.turns] for chat in chats)
    said = [message["content"] for chat in chats for message in chat[1:]]
    assert len(set(said)) == len(said)


def test_chats_with_nothing_to_share_share_nothing() -> None:
    firsts = [chat[0]["content"] for chat in drawn(UNSHARED)]
    assert len(set(firsts)) == len(firsts) == UNSHARED.groups


def test_few_enough_prompts_are_cold_that_a_p90_tells_of_the_others() -> None:
    """The first request of each group finds its prompt nowhere, under any policy."""
    assert SHARED.groups / (SHARED.groups * SHARED.chats * SHARED.turns) < 0.09


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
STREAM = (
    event(choices=[{"delta": {"role": "assistant"}}])
    + b": keepalive\n\n"
    + event(choices=[{"delta": {"content": "a"}}])
    + event(choices=[{"delta": {"content": "b"}, "finish_reason": "length"}])
    + event(choices=[], usage=USAGE)
    + b"data: [DONE]\n\n"
)


def test_the_first_token_is_the_first_text_however_the_bytes_were_cut() -> None:
    at = STREAM.index(b'"a"')
    turn = read(1.0, [(2.0, STREAM[:at]), (3.0, STREAM[at:-5]), (9.0, STREAM[-5:])])
    assert turn is not None
    assert (turn.first_token_s, turn.text) == (2.0, "ab")
    assert (turn.prompt_tokens, turn.cached_tokens) == (9, 4)


@pytest.mark.parametrize("gone", [b"data: [DONE]\n\n", event(choices=[], usage=USAGE), b'"content": '])
def test_a_turn_without_text_usage_or_end_is_not_answered(gone: bytes) -> None:
    assert read(1.0, [(2.0, STREAM.replace(gone, b'"x": ' if b"content" in gone else b""))]) is None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_bar_belongs_to_a_figure_and_every_side_exists(row: Row) -> None:
    assert set(row.bars) <= set(row.figures)
    assert {row.ours, row.rival} <= set(SIDES)
