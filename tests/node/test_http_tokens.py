"""Texts to tokens and back, and messages to a prompt, in llama-server's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Start
from tests.processes import Program

TEXT = "Grüße, <|user|> 🦙"


@pytest.fixture(scope="module")
def node(start_module: Start, tiny_model: Path) -> Program:
    return start_module("llmnode", "--model", str(tiny_model), "--model-id", "tiny", "--n-ctx", "256").ready()


def post(node: Program, path: str, body: Any, status: int = 200) -> Any:
    answer = httpx.post(node.url + path, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_text_comes_back_from_its_tokens(node: Program) -> None:
    body = post(node, "/tokenize", {"content": TEXT, "model": "tiny"})
    assert set(body) == {"tokens"}
    assert all(isinstance(token, int) for token in body["tokens"])
    # The vocabulary puts a space in front of a text and of what comes behind a control token.
    said = post(node, "/detokenize", {"tokens": body["tokens"]})
    assert set(said) == {"content"}
    assert said["content"].replace(" ", "") == TEXT.replace(" ", "")


def test_tokens_are_told_with_their_texts(node: Program) -> None:
    plain = post(node, "/tokenize", {"content": TEXT})["tokens"]
    named = post(node, "/tokenize", {"content": TEXT, "with_pieces": True})["tokens"]
    assert [one["id"] for one in named] == plain
    assert {"<|user|>"} <= {one["piece"] for one in named if isinstance(one["piece"], str)}
    halves = [one["piece"] for one in named if isinstance(one["piece"], list)]
    assert bytes(byte for half in halves for byte in half).decode() == "🦙", "no text by itself, so as bytes"


def test_control_tokens_count_and_begin_a_text_as_asked(node: Program) -> None:
    user = post(node, "/tokenize", {"content": "<|user|>"})["tokens"]
    assert len(user) == 1
    assert user[0] not in post(node, "/tokenize", {"content": "<|user|>", "parse_special": False})["tokens"]
    bare, begun = (post(node, "/tokenize", {"content": "hi", "add_special": flag})["tokens"] for flag in (False, True))
    assert begun == [1, *bare]
    assert post(node, "/tokenize", {"content": [5, "hi", 6], "add_special": True})["tokens"] == [5, *bare, 6]
    assert post(node, "/tokenize", {"content": ""})["tokens"] == []


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/tokenize", {}, "content", "got nothing"),
        ("/tokenize", {"content": [99999]}, "content", "must hold token ids from 0 to 32063, got 99999"),
        ("/tokenize", {"content": "a", "add_special": 1}, "add_special", "true or false, got 1"),
        ("/tokenize", {"content": "a" * 1048577}, "content", "1048576 characters at most, got 1048577"),
        ("/detokenize", {"tokens": [1] * 1048577}, "tokens", "1048576 ids at most, got 1048577"),
        ("/detokenize", {"tokens": "1"}, "tokens", "must be a list of token ids, got a text"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "must hold token ids from 0 to 32063, got -1"),
        ("/apply-template", {}, "messages", "got nothing"),
    ],
)
def test_what_cannot_be_read_is_named(node: Program, path: str, body: Any, param: str, says: str) -> None:
    error = post(node, path, body, 400)["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_messages_become_the_prompt_that_a_chat_begins_with(node: Program) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = post(node, "/apply-template", {"messages": messages})["prompt"]
    assert prompt == "<|user|>\nHello<|end|>\n<|assistant|>\n"
    counted = post(node, "/v1/chat/completions", {"messages": messages, "max_tokens": 1})["usage"]["prompt_tokens"]
    assert counted == len(post(node, "/tokenize", {"content": prompt, "add_special": True})["tokens"])
