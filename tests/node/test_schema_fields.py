"""JSON to engine types: what is read, with which defaults, and the shapes that go back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from llmnode.api import constraints, embeddings, messages, native, rerank, schema, tokens, tools
from llmnode.api.chunks import OpenAI
from llmnode.api.constraints import Constraint
from llmnode.api.fields import Fields
from llmnode.api.logprobs import LogprobWriter
from llmnode.api.narrator import Answer, Ending
from llmnode.api.rules import Rules
from llmnode.api.schema import REFUSED, ChatRequest, CompletionRequest
from llmnode.api.shape import Shape
from llmnode.api.tools import SchemaLimits
from llmnode.chat.pieces import Message
from llmnode.engine.types import Logprob, Sampling
from llmnode.wire.errors import ApiError, InvalidRequest
from llmnode.wire.node import Usage

RULES = Rules(models=("m", "alias"), n_vocab=100)
HELLO = [{"role": "user", "content": "Hello"}]


def chat(rules: Rules = RULES, **fields: Any) -> ChatRequest:
    return schema.chat({"messages": HELLO, **fields}, rules, seed=5)


def completion(rules: Rules = RULES, **fields: Any) -> CompletionRequest:
    return schema.completion({"prompt": "a", **fields}, rules, seed=5)


def refusal(**fields: Any) -> InvalidRequest:
    """The error that a chat with these fields is refused with."""
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


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


def test_every_sampler_that_the_engine_has_can_be_asked_for() -> None:
    """The names are llama.cpp's; what is asked for differs from every default. `infill` is of /completion alone."""
    asked = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "seed": 11, "typical_p": 0.8, "top_n_sigma": 1.5,
        "xtc_probability": 0.3, "xtc_threshold": 0.2, "dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3,
        "dry_penalty_last_n": 100, "dry_sequence_breakers": [".", "!"], "repeat_penalty": 1.1, "repeat_last_n": 32,
        "frequency_penalty": -0.5, "presence_penalty": 0.6, "logit_bias": {"3": -100, "99": 5}, "mirostat": 2,
        "mirostat_tau": 4, "mirostat_eta": 0.2,
    }  # fmt: skip
    wanted = Sampling(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=11, typical_p=0.8, top_n_sigma=1.5,
        xtc_probability=0.3, xtc_threshold=0.2, dry_multiplier=0.8, dry_base=2.0, dry_allowed_length=3,
        dry_last_n=100, dry_breakers=(".", "!"), repeat_penalty=1.1, repeat_last_n=32,
        frequency_penalty=-0.5, presence_penalty=0.6, logit_bias=((3, -100.0), (99, 5.0)), mirostat=2,
        mirostat_tau=4.0, mirostat_eta=0.2,
    )  # fmt: skip
    for options in (chat(**asked).options, completion(**asked).options):
        assert options.sampling == wanted
        assert options.ignored == ()
    plain = Sampling()
    same = [
        field.name
        for field in dataclasses.fields(Sampling)
        if getattr(wanted, field.name) == getattr(plain, field.name)
    ]
    assert same == ["infill"], "a new sampler: read it, then ask for it here"


def test_llama_cpps_minus_one_switches_off() -> None:
    options = chat(top_k=-1, top_n_sigma=-1.0, seed=-1).options
    assert options.sampling == Sampling(seed=5)
    everything = chat(repeat_last_n=-1, dry_penalty_last_n=-1).options.sampling
    assert (everything.repeat_last_n, everything.dry_last_n) == (-1, -1)


def test_an_off_window_is_not_the_default_one() -> None:
    sampling = chat(repeat_penalty=1.2, repeat_last_n=0, dry_penalty_last_n=0, dry_allowed_length=0).options.sampling
    assert (sampling.repeat_last_n, sampling.dry_last_n, sampling.dry_allowed_length) == (0, 0, 0)
    assert chat(dry_sequence_breakers=[]).options.sampling.dry_breakers == ()


def test_each_name_of_the_repetition_penalty_means_what_its_server_does() -> None:
    ours, theirs = chat(repeat_penalty=1.3).options.sampling, chat(repetition_penalty=1.3).options.sampling
    assert (ours.repeat_penalty, ours.repeat_last_n) == (1.3, 64)
    assert (theirs.repeat_penalty, theirs.repeat_last_n) == (1.3, -1)
    assert chat(repetition_penalty=1.3, repeat_last_n=9).options.sampling.repeat_last_n == 9
    assert chat(repetition_penalty=1.3, repeat_penalty=1.3).options.sampling == ours
    assert "contradict" in refusal(repetition_penalty=1.3, repeat_penalty=1.2).message


def test_a_bias_is_an_object_or_pairs_and_false_forbids() -> None:
    def biases(value: Any) -> Any:
        return chat(logit_bias=value).options.sampling.logit_bias

    assert biases({"0": 1, "99": -2.5}) == ((0, 1.0), (99, -2.5))
    assert biases([[0, 1], [99, -2.5]]) == ((0, 1.0), (99, -2.5))
    assert biases([[7, False]]) == ((7, -math.inf),)
    assert biases({"7": 0}) == () == biases({}) == biases([])
    assert len(biases({str(token): 1 for token in range(100)})) == 100


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("5", "an object of token ids"),
        ({"100": 1}, "from 0 to 99, got 100"),
        ({"-1": 1}, 'from 0 to 99, got "-1"'),
        ({"1_0": 1}, 'got "1_0"'),
        ({"Hello": 1}, 'got "Hello"'),
        ({"5": 100.5}, "from -100 to 100 for token 5, got 100.5"),
        ({"5": "1"}, "from -100 to 100 for token 5"),
        ({"5": True}, "from -100 to 100 for token 5, got true"),
        ({"5": False}, "from -100 to 100 for token 5, got false"),
        ({"5": None}, "from -100 to 100 for token 5, got nothing"),
        ([[5]], "pairs of a token id and a bias, got [5]"),
        ([5], "pairs of a token id and a bias, got 5"),
        ([["Hello", 1]], 'from 0 to 99, got "Hello"'),
        ([[5, 1], [5, 2]], "names a token twice, got 5"),
        ([[5, True]], "for token 5, got true"),
        ({str(token): 1 for token in range(1025)}, "1024 tokens at most, got 1025"),
    ],
)
def test_a_bad_bias_is_named(value: Any, says: str) -> None:
    error = refusal(logit_bias=value)
    assert error.param == "logit_bias"
    assert says in error.message


def test_logprobs_are_asked_for_as_each_endpoint_has_it() -> None:
    assert chat().options.logprobs is None
    assert chat(logprobs=False, top_logprobs=0).options.logprobs is None
    assert chat(logprobs=True).options.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).options.logprobs == 20
    assert completion().options.logprobs is None
    assert completion(logprobs=False).options.logprobs is None
    assert completion(logprobs=0).options.logprobs == 0
    assert completion(logprobs=5).options.logprobs == 5
    assert "only allowed with logprobs: true" in refusal(top_logprobs=3).message
    with pytest.raises(InvalidRequest, match="top_logprobs is not supported"):
        completion(top_logprobs=3)
    with pytest.raises(InvalidRequest, match="logprobs must be a whole number from 0 to 20, got true"):
        completion(logprobs=True)


def test_choices_are_bounded_by_what_could_ever_run_here() -> None:
    assert (chat().options.choices, chat(n=16).options.choices) == (1, 16)
    assert refusal(n=17).message == "n must be a whole number from 1 to 16, got 17"
    small = Rules(models=("m",), n_vocab=100, max_choices=2)
    with pytest.raises(InvalidRequest, match="from 1 to 2, got 3"):
        chat(small, n=3)
    assert chat(n=3, best_of=3).options.choices == 3
    assert refusal(n=3, best_of=4).param == "best_of"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"grammar": 'root ::= "a"'}, Constraint("gbnf", "grammar", 'root ::= "a"')),
        ({"grammar": ""}, None),
        ({"json_schema": SCHEMA}, Constraint("json_schema", "json_schema", SCHEMA)),
        ({"json_schema": {}}, Constraint("json_object", "json_schema")),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object", "response_format")),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            Constraint("json_schema", "response_format.schema", SCHEMA),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            Constraint("json_schema", "response_format.json_schema.schema", SCHEMA),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            Constraint("json_schema", "response_format.json_schema.schema", {}),
        ),
    ],
)
def test_a_constraint_is_read_from_wherever_clients_put_it(fields: Any, constraint: Constraint | None) -> None:
    for options in (chat(**fields).options, completion(**fields).options):
        assert options.constraint == constraint
        assert options.ignored == ()


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"grammar": 5}, "grammar", "must be a text, got a number"),
        ({"json_schema": "x"}, "json_schema", "must be an object, got a text"),
        ({"response_format": "json"}, "response_format", "must be an object, got a text"),
        ({"response_format": {}}, "response_format.type", "text, json_object or json_schema, got nothing"),
        ({"response_format": {"type": "regex"}}, "response_format.type", 'got "regex"'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "got nothing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
            "response_format.json_schema.schema",
            "must be an object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
            "response_format.json_schema.strict",
            "true or false, got 1",
        ),
        (
            {"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'},
            "grammar",
            "grammar and response_format contradict each other",
        ),
        ({"json_schema": SCHEMA, "grammar": 'root ::= "a"'}, "grammar", "contradict"),
        ({"json_schema": SCHEMA, "response_format": {"type": "json_object"}}, "json_schema", "contradict"),
        ({"grammar": 'root ::= "a"', "ignore_eos": True}, "ignore_eos", "contradict"),
    ],
)
def test_a_bad_constraint_is_named_by_its_place(fields: Any, param: str, says: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert says in error.message
    assert len(error.message) < 300


def test_a_value_nested_to_the_edge_of_what_can_be_read_is_refused_and_does_not_break_the_reader() -> None:
    for depth in (900, 950, 970, 980, 985, 990, 995):
        deep: Any = []
        for _ in range(depth):
            deep = [deep]
        for field in ("temperature", "n", "stop", "logit_bias", "grammar", "audio"):
            assert refusal(**{field: deep}).param == field


def test_what_a_schema_says_beside_itself_is_advice() -> None:
    inner = {"name": "x", "description": "a thing", "schema": SCHEMA}
    options = chat(response_format={"type": "json_schema", "json_schema": inner, "x": 1}).options
    assert options.ignored == ("response_format.json_schema.description", "response_format.x")


def test_inference_answers_with_one_text() -> None:
    for field, value in (("n", 2), ("logprobs", 1), ("stream", True)):
        with pytest.raises(InvalidRequest, match="not supported at /inference") as caught:
            schema.inference({"prompt": "a", field: value}, RULES, seed=0)
        assert caught.value.param == field
    plain = schema.inference({"prompt": "a", "n": 1, "logprobs": False, "stream": False}, RULES, seed=0)
    assert plain.options.choices == 1


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


USAGE = Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2)
FRAME = {"id": "i", "created": 1, "model": "m", "system_fingerprint": None}
CHAT, TEXT = Shape("i", 1, "m", chat=True), Shape("i", 1, "m", chat=False)


def test_the_shapes_are_openais() -> None:
    assert CHAT.whole([Answer(Message("hi"), Ending("stop"))], USAGE) == {
        **FRAME,
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
    assert CHAT.last(0, "length") == {
        **FRAME,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}],
    }
    assert TEXT.piece(1, "hi") == {
        **FRAME,
        "object": "text_completion",
        "choices": [{"index": 1, "text": "hi", "logprobs": None, "finish_reason": None}],
    }
    assert TEXT.first(0) is None


PIECES = [b"He", b"llo", b"\xe2\x82", b"\xac", b"", b"!"]
DRAWN = (
    Logprob(0, -0.5, ((0, -0.5), (1, -1.5))),
    Logprob(2, -3.0, ((1, -0.25), (4, -2.0))),
    Logprob(3, -math.inf, ((3, -0.1), (0, -20000.0))),
    Logprob(5, 0.0, ((5, 0.0), (2, -5.0))),
    Logprob(4, -0.1, ((4, -0.1), (0, -3.0))),
)
"""The last one ends the answer: it is no part of it."""
ANSWER = Answer(Message("He€!"), Ending("stop"), DRAWN)


def test_a_chat_reports_logprobs_in_openais_shape() -> None:
    writer = LogprobWriter(PIECES, chat=True, top=2, ends={4})
    (body,) = OpenAI(CHAT, writers=[writer]).whole([ANSWER], USAGE)["choices"]
    assert set(body["logprobs"]) == {"content", "refusal"}
    first, half, rest, last = body["logprobs"]["content"]
    assert first == {
        "token": "He",
        "logprob": -0.5,
        "bytes": [72, 101],
        "top_logprobs": [
            {"token": "He", "logprob": -0.5, "bytes": [72, 101]},
            {"token": "llo", "logprob": -1.5, "bytes": [108, 108, 111]},
        ],
    }
    assert (half["token"], half["bytes"]) == ("\\xe2\\x82", [0xE2, 0x82])
    assert half["top_logprobs"][1] == {"token": "token_id:4", "logprob": -2.0, "bytes": None}
    assert (rest["logprob"], rest["top_logprobs"][1]["logprob"]) == (-9999.0, -9999.0)
    assert bytes(first["bytes"] + half["bytes"] + rest["bytes"] + last["bytes"]).decode() == "He€!"
    assert json.loads(json.dumps(body, allow_nan=False)) == body


def test_a_completion_reports_logprobs_in_openais_older_shape() -> None:
    writer = LogprobWriter(PIECES, chat=False, top=2, ends={4})
    (body,) = OpenAI(TEXT, writers=[writer]).whole([ANSWER], USAGE)["choices"]
    assert body["logprobs"] == {
        "tokens": ["He", "bytes:\\xe2\\x82", "bytes:\\xac", "!"],
        "token_logprobs": [-0.5, -3.0, -9999.0, 0.0],
        "top_logprobs": [
            {"He": -0.5, "llo": -1.5},
            {"llo": -0.25, "token_id:4": -2.0, "bytes:\\xe2\\x82": -3.0},
            {"bytes:\\xac": -0.1, "He": -9999.0},
            {"!": 0.0, "bytes:\\xe2\\x82": -5.0},
        ],
        "text_offset": [0, 2, 2, 3],
    }
    writer = LogprobWriter(PIECES, chat=False, top=0, ends={4})
    (bare,) = OpenAI(TEXT, writers=[writer]).whole([ANSWER], USAGE)["choices"]
    assert bare["logprobs"]["top_logprobs"] is None


def test_a_control_token_that_an_answer_goes_on_past_is_listed_by_its_id() -> None:
    chat = LogprobWriter(PIECES, chat=True, top=0, ends=()).write(DRAWN)
    assert [one["token"] for one in chat["content"]] == ["He", "\\xe2\\x82", "\\xac", "!", "token_id:4"]
    assert (chat["content"][-1]["token"], chat["content"][-1]["bytes"]) == ("token_id:4", None)
    text = LogprobWriter(PIECES, chat=False, top=2, ends=()).write(DRAWN)
    assert (text["tokens"][-1], text["text_offset"][-1]) == ("token_id:4", 4)
    assert text["top_logprobs"][-1] == {"token_id:4": -0.1, "He": -3.0}


@pytest.mark.parametrize("chat", [True, False])
def test_logprobs_in_pieces_are_those_of_the_whole(chat: bool) -> None:
    whole = LogprobWriter(PIECES, chat=chat, top=2, ends={4}).write(DRAWN)
    for cut in range(len(DRAWN) + 1):
        writer = LogprobWriter(PIECES, chat=chat, top=2, ends={4})
        parts = [writer.write(DRAWN[:cut]), writer.write(DRAWN[cut:])]
        for name, value in whole.items():
            if isinstance(value, list):
                assert parts[0][name] + parts[1][name] == value


SAMPLES: dict[str, Any] = {
    "messages": HELLO, "model": "m", "n": 2, "stop": "x", "stream": True, "seed": 1, "max_tokens": 5,
    "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.5, "frequency_penalty": 1, "presence_penalty": 1,
    "logit_bias": {"1": 1}, "logprobs": True, "tool_choice": "none", "parallel_tool_calls": False,
    "tools": [{"type": "function", "function": {"name": "f"}}], "response_format": {"type": "json_object"},
    "reasoning_effort": "low", "enable_thinking": False, "thinking_budget_tokens": 5, "thinking_budget": 5,
    "reasoning_budget": 5, "chat_template_kwargs": {"x": 1}, "continue_final_message": False, "chat_template": "x",
    "add_generation_prompt": False, "audio": {"voice": "a"}, "modalities": ["text", "audio"], "verbosity": "low",
    "web_search_options": {}, "functions": [{"name": "f"}], "function_call": "auto", "metadata": {"a": "b"},
    "store": True, "user": "u", "safety_identifier": "s", "service_tier": "flex", "prompt_cache_key": "k",
    "prompt_cache_retention": "24h", "prediction": {"type": "content", "content": "x"},
}  # fmt: skip
"""A value that asks for something, for each field of OpenAI's chat request and those that open servers share."""
WITH: dict[str, dict[str, Any]] = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}
SAMPLES |= {"stream_options": {"include_usage": True}, "top_logprobs": 2}


def test_the_docs_say_what_becomes_of_every_field_of_a_chat() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    table = page.partition("| field of a chat |")[2].partition("\n\n")[0].splitlines()[2:]
    said = {name: verdict for row in table for names, verdict in [row.strip("| ").split(" | ", 1)]
            for name in re.findall("`([a-z_]+)`", names)}  # fmt: skip
    assert set(said) == set(SAMPLES)
    rules = dataclasses.replace(RULES, switches=("enable_thinking",), thinks=True)
    for name, verdict in said.items():
        fields = {**WITH.get(name, {}), name: SAMPLES[name]}
        try:
            ignored = chat(rules, **fields).options.ignored
            found = "advice" if ignored == (name,) else "honoured" if ignored == () else f"{ignored}"
        except InvalidRequest as error:
            assert error.param == name
            found = "refused"
        assert verdict.startswith(found) or name == "chat_template", (name, found, verdict)
    assert chat(dataclasses.replace(RULES, request_templates=True), chat_template="x").prompting.template == "x"


def test_what_a_model_cannot_do_is_said_to_have_no_effect() -> None:
    request = chat(reasoning_effort="high", thinking_budget_tokens=5)
    assert request.options.ignored == ("reasoning_effort", "thinking_budget_tokens")
    assert request.prompting.budget is None


@pytest.mark.parametrize(
    ("limit", "fields", "status", "param", "says"),
    [
        ({"max_messages": 1}, {"messages": HELLO * 2}, 413, "messages", "1 messages at most, got 2"),
        (
            {"max_tools": 1},
            {"tools": [{"function": {"name": n}} for n in "ab"]},
            400,
            "tools",
            "1 tools at most, got 2",
        ),
        ({"max_stops": 1}, {"stop": ["a", "b"]}, 400, "stop", "1 texts at most, got 2"),
        ({"max_stop_characters": 2}, {"stop": "abc"}, 400, "stop", "2 characters at most, got 3"),
        ({"max_logit_bias": 1}, {"logit_bias": {"1": 1, "2": 1}}, 400, "logit_bias", "1 tokens at most, got 2"),
        ({"max_choices": 2}, {"n": 3}, 400, "n", "from 1 to 2, got 3"),
        ({"max_grammar_bytes": 5}, {"grammar": "root ::= x"}, 400, "grammar", "5 bytes at most, got 10"),
        ({"schema": SchemaLimits(bytes=5)}, {"json_schema": {"type": "null"}}, 400, "json_schema", "5 bytes at most"),
        (
            {"schema": SchemaLimits(depth=2)},
            {"tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {}}}}}]},
            400,
            "tools[0].function.parameters",
            "2 levels deep at most",
        ),
    ],
)
def test_limits_of_a_chat_are_named(
    limit: dict[str, Any], fields: dict[str, Any], status: int, param: str, says: str
) -> None:
    with pytest.raises(ApiError, match=re.escape(says)) as caught:
        chat(dataclasses.replace(RULES, **limit), **fields)
    assert (caught.value.status, caught.value.param) == (status, param)


def test_deep_schemas_are_measured_without_recursion() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match="levels deep"):
        chat(json_schema=deep)


def test_every_field_that_is_read_is_in_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: set[str] = set()

    class Spy(Fields):
        def get(self, name: str) -> Any:
            looked_at.add(name)
            return super().get(name)

    for module in (schema, constraints, messages, tools):
        monkeypatch.setattr(module, "Fields", Spy)
    chat(stream=True, stream_options={}, response_format={"type": "json_schema", "json_schema": {"schema": {}}})
    completion(response_format={"type": "json_object"})
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    inner = {"role", "content", "name", "reasoning", "refusal", "prefix", "text", "function"}
    inner |= {"include_usage", "type", "schema", "strict", "json_schema", "tool_call_id"}
    missing = {name for name in looked_at - set(REFUSED) - inner if f"`{name}`" not in page}
    assert not missing


def test_every_field_of_the_other_endpoints_is_in_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: set[str] = set()

    class Spy(Fields):
        def get(self, name: str) -> Any:
            looked_at.add(name)
            return super().get(name)

    for module in (embeddings, rerank, tokens, native):
        monkeypatch.setattr(module, "Fields", Spy)
    names, allowed = ("m",), {"most": 9, "strict": False}
    embeddings.read({"input": "a"}, names, embeddings.Scale(4, False, 9), native=True, pools=True, **allowed)
    rerank.read({"query": "a", "documents": ["b"]}, names, **allowed)
    rerank.read({"query": "a", "texts": ["b"]}, names, **allowed)
    tokens.read_text({"content": "a"}, names, 9, strict=False)
    tokens.read_ids({"tokens": [1]}, names, 9, strict=False)
    native.completion({"prompt": "a"}, RULES, seed=1)
    native.infill({"input_prefix": "a", "input_suffix": "b"}, RULES, seed=1)
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    refused = {*embeddings.REFUSED, *rerank.REFUSED, "model"}
    assert {name for name in looked_at - refused if f"`{name}`" not in page} == set()
