"""JSON to engine types: what is read, with which defaults, and the shapes that go back."""

from __future__ import annotations

from typing import Any

import pytest

from llmnode.api import schema
from llmnode.api.schema import REFUSED, ChatRequest, Rules, Shape
from llmnode.engine.types import Finish, Sampling
from llmnode.wire.errors import InvalidRequest
from llmnode.wire.node import Usage

RULES = Rules(models=("m", "alias"), n_vocab=100)
HELLO = [{"role": "user", "content": "Hello"}]


def chat(rules: Rules = RULES, **fields: Any) -> ChatRequest:
    return schema.chat({"messages": HELLO, **fields}, rules, seed=5)


def test_a_bare_request_leaves_the_distribution_as_it_is() -> None:
    options = chat().options
    assert options.sampling == Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=5)
    assert (options.max_tokens, options.stop, options.stream, options.ignored) == (None, (), False, ())


def test_every_honoured_field_arrives() -> None:
    options = chat(
        model="alias", temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=9, stop="x", max_completion_tokens=4,
        stream=True, stream_options={"include_usage": True}, ignore_eos=True, n=1,
    ).options  # fmt: skip
    assert options.sampling == Sampling(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1, seed=9)
    assert (options.model, options.stop, options.max_tokens) == ("alias", ("x",), 4)
    assert options.stream and options.include_usage and options.ignore_eos
    assert options.ignored == ()


def test_null_counts_as_absent() -> None:
    names = ("temperature", "top_p", "seed", "stop", "max_tokens", "n", "stream", "tools", "user", "logprobs")
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_no_field_that_changes_the_answer_is_dropped_in_silence(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        chat(**{name: ["something"]})
    assert caught.value.param == name
    for neutral in REFUSED[name]:
        assert chat(**{name: neutral}).options.ignored == ()


def test_advice_is_named_wherever_it_stands() -> None:
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}
    request = schema.chat({"messages": [{"role": "user", "content": [part]}], "user": "u", "x": 1}, RULES, seed=0)
    assert request.options.ignored == ("messages[0].content[0].cache_control", "user", "x")
    with pytest.raises(InvalidRequest, match="strict_fields"):
        chat(Rules(models=("m",), n_vocab=100, strict=True), x=1)


def test_parts_of_a_message_are_put_together() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    request = schema.chat({"messages": [{"role": "developer", "content": parts}]}, RULES, seed=0)
    assert request.messages == ({"role": "system", "content": "Hello"},)


def test_the_two_names_of_max_tokens_must_agree() -> None:
    assert chat(max_tokens=3, max_completion_tokens=3).options.max_tokens == 3
    with pytest.raises(InvalidRequest, match="contradict"):
        chat(max_tokens=3, max_completion_tokens=4)


def test_the_setting_max_tokens_is_default_and_limit() -> None:
    rules = Rules(models=("m",), n_vocab=100, max_tokens=10)
    assert chat(rules).options.max_tokens == 10
    with pytest.raises(InvalidRequest, match="from 1 to 10, got 11"):
        chat(rules, max_tokens=11)


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), -0.1, "1", [], {}, False])
def test_numbers_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(temperature=value)
    assert caught.value.param == "temperature"
    assert len(caught.value.message) < 200


def test_one_prompt_in_a_list_is_one_prompt() -> None:
    assert schema.completion({"prompt": ["a"]}, RULES, seed=0).prompt == "a"
    assert schema.completion({"prompt": [[1, 2]]}, RULES, seed=0).prompt == (1, 2)
    assert schema.completion({"prompt": [1, 2]}, RULES, seed=0).prompt == (1, 2)


def test_completions_do_not_know_the_chat_name_of_max_tokens() -> None:
    request = schema.completion({"prompt": "a", "max_completion_tokens": 3}, RULES, seed=0)
    assert request.options.ignored == ("max_completion_tokens",)


def test_the_shapes_are_openais() -> None:
    usage = Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2)
    frame = {"id": "i", "created": 1, "model": "m", "system_fingerprint": None}
    chat, text = Shape("i", 1, "m", chat=True), Shape("i", 1, "m", chat=False)
    assert chat.whole("hi", Finish.STOP, usage) == {
        **frame,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
    assert chat.last(Finish.LENGTH) == {
        **frame,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}],
    }
    assert text.piece("hi") == {
        **frame,
        "object": "text_completion",
        "choices": [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": None}],
    }
    assert text.first() is None
