"""llama-server's own endpoints: what scripts and editors that were written for it send, and what they read."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnode.wire import headers, sse
from llmnode.wire.resume import read_marker
from tests import tiny_model as recipe
from tests.conftest import Start
from tests.node.stitching import FIXED, begun, envelope, heard, resumed
from tests.processes import Program, wait_for
from tests.tiny_kinds import FILL_IN

WHOLE = {
    "index", "content", "tokens", "id_slot", "stop", "model", "tokens_predicted", "tokens_evaluated", "prompt",
    "generation_settings", "has_new_line", "truncated", "stop_type", "stopping_word", "tokens_cached", "timings",
}  # fmt: skip
CHUNK = {"index", "content", "tokens", "stop", "id_slot", "tokens_predicted", "tokens_evaluated"}
TIMINGS = {
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
    "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
}  # fmt: skip
SETTINGS = {
    "seed", "temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p", "top_n_sigma",
    "xtc_probability", "xtc_threshold", "typical_p", "repeat_last_n", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "mirostat", "mirostat_tau", "mirostat_eta", "stop", "max_tokens", "n_predict", "n_keep",
    "n_discard", "ignore_eos", "stream", "logit_bias", "n_probs", "min_keep", "grammar", "samplers",
    "timings_per_token", "post_sampling_probs", "lora",
}  # fmt: skip
SLOT = {"id", "id_task", "n_ctx", "speculative", "is_processing", "params", "next_token"}

VIM = {
    "id_slot": 0,
    "input_prefix": "def add(a, b):\n",
    "input_suffix": "\nprint(add(1, 2))\n",
    "input_extra": [{"text": "import sys\n", "time": [1, 2], "filename": "main.py"}],
    "prompt": "    return ",
    "n_predict": 16,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": [
        "content", "timings/prompt_n", "timings/prompt_ms", "timings/prompt_per_token_ms", "timings/prompt_per_second",
        "timings/predicted_n", "timings/predicted_ms", "timings/predicted_per_token_ms", "timings/predicted_per_second",
        "truncated", "tokens_cached",
    ],
}  # fmt: skip
"""As llama.vim asks for a completion."""
VIM_AHEAD = {
    "id_slot": 0, "input_prefix": "", "input_suffix": "", "input_extra": VIM["input_extra"], "prompt": "",
    "n_predict": 0, "temperature": 0.0, "samplers": [], "stream": False, "cache_prompt": True,
    "t_max_prompt_ms": 1, "t_max_predict_ms": 1, "response_fields": [""],
}  # fmt: skip
"""As llama.vim sends context ahead, to have it in the cache."""


@pytest.fixture(scope="module")
def fake(start_module: Start) -> Program:
    return start_module("llmnode", "--backend", "fake", "--model-id", "m", "--slots", "16").ready()


@pytest.fixture(scope="module")
def slow(start_module: Start) -> Program:
    """Tokens come one by one, so that each has a marker."""
    return start_module(
        "llmnode", "--backend", "fake", "--model-id", "m", "--slots", "16", "--fake-step-delay-s", "0.02"
    ).ready()


@pytest.fixture(scope="module")
def coder(start_module: Start) -> Program:
    model = str(recipe.make("coder"))
    return start_module("llmnode", "--model", model, "--model-id", "coder", "--n-ctx", "256", "--slots", "2").ready()


def ask(node: Program, path: str, body: Any, status: int = 200, **said: str) -> httpx.Response:
    answer = httpx.post(node.url + path, json=body, headers=said, timeout=60)
    assert answer.status_code == status, answer.text
    return answer


def post(node: Program, path: str, body: Any, status: int = 200) -> Any:
    return ask(node, path, body, status).json()


def chunks(text: str) -> list[Any]:
    return [json.loads(frame[6:]) for frame in text.split("\n\n") if frame.startswith("data: ")]


def test_an_answer_has_llama_servers_shape(fake: Program) -> None:
    body = post(fake, "/completion", {"prompt": "Once upon", "n_predict": 12, "seed": 7, "stop": ["zz"]})
    assert set(body) == WHOLE
    assert set(body["timings"]) == TIMINGS
    assert set(body["generation_settings"]) == SETTINGS
    assert (body["stop"], body["truncated"], body["model"], body["index"]) == (True, False, "m", 0)
    assert body["prompt"] == "<|bos|>Once upon"
    assert body["tokens"] == [], "only where return_tokens asks for them"
    assert body["tokens_evaluated"] == len("Once upon") + 1
    assert body["timings"]["predicted_n"] == body["tokens_predicted"] <= 12
    assert body["timings"]["prompt_n"] + body["timings"]["cache_n"] == body["tokens_evaluated"]
    given = body["generation_settings"]
    assert {name: given[name] for name in ("seed", "n_predict", "stop")} == {"seed": 7, "n_predict": 12, "stop": ["zz"]}
    defaults = {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")}
    assert defaults == {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
    assert (
        post(fake, "/completions", {"prompt": "Once upon", "n_predict": 12, "seed": 7, "stop": ["zz"]})["content"]
        == body["content"]
    )


@pytest.mark.parametrize("path", ["/completion", "/infill"])
def test_a_stream_says_what_a_body_says(fake: Program, path: str) -> None:
    asked = {"prompt": "Once", "input_prefix": "a", "input_suffix": "b"} if path == "/infill" else {"prompt": "Once"}
    asked = {**asked, "n_predict": 30, "seed": 3, "ignore_eos": True, "n_probs": 2}
    whole = post(fake, path, {**asked, "return_tokens": True})
    text = ask(fake, path, {**asked, "stream": True}).text
    assert "[DONE]" not in text, "llama-server ends its own streams without"
    *pieces, last = chunks(text)
    for piece in pieces:
        assert set(piece) == CHUNK | {"completion_probabilities"}
        assert piece["stop"] is False
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"]
    assert pieces[-1]["tokens_predicted"] == 30
    told = [one for piece in pieces for one in piece["completion_probabilities"]]
    assert told == whole.pop("completion_probabilities")
    assert set(told[0]) == {"id", "token", "bytes", "logprob", "top_logprobs"}
    assert [set(one) for one in told[0]["top_logprobs"]] == [{"id", "token", "bytes", "logprob"}] * 2
    assert set(last) == WHOLE
    differing = {"content", "tokens", "timings", "tokens_cached", "generation_settings"}
    assert {name: last[name] for name in WHOLE - differing} == {name: whole[name] for name in WHOLE - differing}


@pytest.mark.parametrize(
    ("more", "stop_type", "word"),
    [
        ({"n_predict": 3, "ignore_eos": True}, "limit", ""),
        ({"grammar": 'root ::= "abSTOPcd"', "stop": ["STOP", "never"]}, "word", "STOP"),
        ({"grammar": 'root ::= "ab\\n"'}, "eos", ""),
    ],
)
def test_it_says_why_it_ended(fake: Program, more: dict[str, Any], stop_type: str, word: str) -> None:
    for stream in (False, True):
        *_, last = chunks(ask(fake, "/completion", {"prompt": "x", "stream": True, **more}).text)
        body = last if stream else post(fake, "/completion", {"prompt": "x", **more})
        assert (body["stop_type"], body["stopping_word"]) == (stop_type, word)
        assert body["has_new_line"] == (stop_type == "eos")


def test_several_prompts_of_any_form_give_a_list(fake: Program) -> None:
    wanted = ["hello", [104, 105], ["h", 105, "x"]]
    asked = {"n_predict": 5, "seed": 1, "return_tokens": True, "ignore_eos": True}
    found = post(fake, "/completion", {"prompt": wanted, **asked})
    assert [one["index"] for one in found] == [0, 1, 2]
    assert [one["prompt"] for one in found] == ["<|bos|>hello", "hi", "<|bos|>hix"]
    for prompt, one in zip(wanted, found, strict=True):
        # Lists of texts and ids are one prompt where nothing else stands beside them.
        alone = post(fake, "/completion", {"prompt": prompt, **asked})
        assert alone["content"] == one["content"]
    twice = post(fake, "/completion", {"prompt": "hello", "n_cmpl": 2, **asked})
    assert [one["index"] for one in twice] == [0, 1]
    assert twice[0]["content"] == found[0]["content"] != twice[1]["content"]


def test_only_the_fields_asked_for_come_back(fake: Program) -> None:
    asked = {"prompt": "x", "n_predict": 2, "response_fields": ["content", "timings/prompt_n", "no/such", "stop/x"]}
    assert set(post(fake, "/completion", asked)) == {"content", "prompt_n"}
    *_, last = chunks(ask(fake, "/completion", {**asked, "stream": True}).text)
    assert set(last) == {"content", "prompt_n"}


def test_n_predict_0_computes_the_prompt_and_says_nothing(fake: Program) -> None:
    body = post(fake, "/completion", {"prompt": "A prompt to be held in the cache", "n_predict": 0})
    assert (body["content"], body["tokens_predicted"], body["generation_settings"]["n_predict"]) == ("", 0, 0)
    again = post(fake, "/completion", {"prompt": "A prompt to be held in the cache", "n_predict": 1})
    assert again["tokens_cached"] > 20


def test_samplers_that_are_not_named_are_off(fake: Program) -> None:
    asked = {"prompt": "x", "n_predict": 1, "temperature": 0.1, "top_k": 3, "top_p": 0.5, "repeat_penalty": 2}
    given = post(fake, "/completion", {**asked, "samplers": ["penalties", "top_k"]})["generation_settings"]
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    assert [given[name] for name in names] == [1.0, 3, 1.0, 0.0, 2.0]
    given = post(fake, "/completion", {**asked, "samplers": ["top_k", "top_p", "temperature"]})["generation_settings"]
    assert [given[name] for name in names] == [0.1, 3, 0.5, 0.0, 1.0]


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/completion", {}, "prompt", "not empty, got nothing"),
        ("/completion", {"prompt": [1, "a", None]}, "prompt", "prompt[2] must be a token id"),
        ("/completion", {"prompt": [["a"], [999]]}, "prompt", "prompt[1][0] must be a token id from 0 to 261, got 999"),
        ("/completion", {"prompt": ["a"] * 100}, "prompt", "80 prompts at most, got 100"),
        ("/completion", {"prompt": ["a"] * 20, "n_cmpl": 5}, "prompt", "20 prompts of 5 answers each"),
        ("/completion", {"prompt": "a", "n_predict": -3}, "n_predict", "from -2, got -3"),
        ("/completion", {"prompt": "a", "n_predict": 3, "max_tokens": 4}, "n_predict", "contradict"),
        ("/completion", {"prompt": "a", "n_probs": 21}, "n_probs", "from 0 to 20, got 21"),
        ("/completion", {"prompt": "a", "samplers": ["top_p", "top_k"]}, "samplers", "in the order penalties, dry"),
        ("/completion", {"prompt": "a", "samplers": ["adaptive_p"]}, "samplers", 'got "adaptive_p"'),
        ("/completion", {"prompt": "a", "samplers": "kp"}, "samplers", "list of names"),
        ("/completion", {"prompt": "a", "response_fields": "content"}, "response_fields", "list of texts"),
        ("/completion", {"prompt": "a", "lora": [{"id": 0, "scale": 1}]}, "lora", "not supported"),
        ("/completion", {"prompt": "a", "post_sampling_probs": True}, "post_sampling_probs", "not supported"),
        ("/completion", {"prompt": "a", "dynatemp_range": 0.5}, "dynatemp_range", "not supported"),
        ("/infill", {"input_suffix": "b"}, "input_prefix", "must be a text, got nothing"),
        ("/infill", {"input_prefix": "a"}, "input_suffix", "must be a text, got nothing"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b", "prompt": [1]}, "prompt", "got a list"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": "x"}, "input_extra", "list of objects"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": [{}]}, "input_extra[0]", "with a text"),
        ("/v1/completions", {"prompt": ["a", "b"], "suffix": "c"}, "suffix", "one prompt that is a text"),
        ("/v1/completions", {"prompt": "a", "suffix": 5}, "suffix", "must be a text, got a number"),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo", "echo with logprobs"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of", "not supported"),
        ("/v1/chat/completions", {"messages": [], "echo": True}, "echo", "not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(fake: Program, path: str, body: Any, param: str, says: str) -> None:
    error = post(fake, path, body, 400)["error"]
    assert error["param"] == param
    assert says in error["message"]


def tokens_of(node: Program, text: str) -> list[int]:
    found: list[int] = post(node, "/tokenize", {"content": text, "parse_special": False})["tokens"]
    return found


def test_a_gap_is_laid_out_as_the_model_was_trained(coder: Program) -> None:
    mark = FILL_IN
    answer = ask(coder, "/infill", {**VIM, "response_fields": ["prompt", "tokens_evaluated", "content"]})
    body = answer.json()
    before, after, begun_with = VIM["input_prefix"], VIM["input_suffix"], VIM["prompt"]
    expected = [
        1, mark["rep"], *tokens_of(coder, "myproject\n"), mark["sep"], *tokens_of(coder, "main.py\n"),
        *tokens_of(coder, "import sys\n"), mark["sep"], *tokens_of(coder, "filename\n"),
        mark["pre"], *tokens_of(coder, str(before)), mark["suf"], *tokens_of(coder, str(after)),
        mark["mid"], *tokens_of(coder, str(begun_with)),
    ]  # fmt: skip
    assert body["prompt"] == post(coder, "/detokenize", {"tokens": expected})["content"]
    assert body["tokens_evaluated"] == len(expected)
    assert answer.headers[headers.IGNORED] == "cache_prompt, id_slot, n_indent, t_max_predict_ms, t_max_prompt_ms"


def test_an_editor_gets_the_fields_that_it_reads(coder: Program) -> None:
    assert post(coder, "/infill", VIM_AHEAD) == {}
    body = post(coder, "/infill", VIM)
    assert set(body) == {"content", "truncated", "tokens_cached"} | TIMINGS - {"cache_n"}
    assert body["tokens_cached"] > 0, "what was sent ahead is in the cache"


def test_what_does_not_fit_of_a_gap_is_left_out_at_its_ends(coder: Program) -> None:
    """The answer can then not be gone on with elsewhere, where more might fit, so it has no markers."""
    body = {"input_prefix": "near " * 300 + "before", "input_suffix": "after" + " far" * 300, "n_predict": 8}
    body["input_extra"] = [{"text": "other " * 50}]
    answer = ask(coder, "/infill", body, **{headers.RESUMABLE: FIXED.header()})
    assert headers.RESUMABLE not in answer.headers
    found = answer.json()
    assert found["tokens_evaluated"] == 256 - 8
    told = found["prompt"]
    before, after = told.split("<|placeholder2|>")
    assert before.endswith("near before")
    assert after.startswith(" after far")
    assert 2 < before.count("near") / after.count("far") < 4
    assert "other" not in told


def test_a_model_without_the_tokens_refuses_to_fill_in(start: Start, tiny_model: Path) -> None:
    node = start("llmnode", "--model", str(tiny_model), "--model-id", "tiny", "--n-ctx", "64").ready()
    assert "infill" not in httpx.get(node.url + "/v1/models").json()["data"][0]["kinds"]
    for path, body, param in [
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "model"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ]:
        error = post(node, path, body, 400)["error"]
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
        assert "no tokens to fill in with" in error["message"]


def test_completions_answer_each_prompt_in_turn(fake: Program) -> None:
    asked = {"max_tokens": 6, "seed": 4, "ignore_eos": True, "n": 2}
    body = post(fake, "/v1/completions", {"prompt": ["one", "three"], **asked})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    alone = [post(fake, "/v1/completions", {"prompt": prompt, **asked}) for prompt in ("one", "three")]
    assert [c["text"] for c in body["choices"]] == [c["text"] for one in alone for c in one["choices"]]
    assert body["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
    assert body["usage"]["completion_tokens"] == 24
    text = ask(fake, "/v1/completions", {"prompt": ["one", "three"], **asked, "stream": True}).text
    told = dict.fromkeys(range(4), "")
    for event in chunks(text.replace("data: [DONE]\n\n", "")):
        told[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(told.values()) == [choice["text"] for choice in body["choices"]]


def test_echo_puts_the_prompt_in_front(fake: Program) -> None:
    asked = {"prompt": ["one", [104, 105]], "max_tokens": 4, "seed": 4, "ignore_eos": True}
    plain = [choice["text"] for choice in post(fake, "/v1/completions", asked)["choices"]]
    echoed = [choice["text"] for choice in post(fake, "/v1/completions", {**asked, "echo": True})["choices"]]
    assert echoed == ["one" + plain[0], "hi" + plain[1]]
    text = ask(fake, "/v1/completions", {**asked, "echo": True, "stream": True}).text
    told = {0: "", 1: ""}
    for event in chunks(text.replace("data: [DONE]\n\n", "")):
        told[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(told.values()) == echoed


def test_a_suffix_is_a_gap_to_be_filled_in(fake: Program) -> None:
    """The same prompt as /infill makes of it, drawn in the same way."""
    asked = {"max_tokens": 9, "seed": 4, "temperature": 0}
    filled = post(fake, "/v1/completions", {"prompt": "ab", "suffix": "yz", **asked})
    native = post(fake, "/infill", {"input_prefix": "ab", "input_suffix": "yz", **asked})
    assert filled["choices"][0]["text"] == native["content"]
    assert native["prompt"] == "<|bos|><|system|>ab<|user|>yz<|assistant|>"


NATIVE = {"prompt": "Once upon a time", "n_predict": 20, "stream": True, "seed": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("/completion", {**NATIVE, "ignore_eos": True}),
    "native, no seed": ("/completions", {"prompt": "x", "n_predict": 20, "stream": True}),
    "native, halves of characters": ("/completion", {**NATIVE, "logit_bias": [[195, 12], [169, 12], [10, 9]]}),
    "native, probabilities": ("/completion", {**NATIVE, "n_probs": 1, "ignore_eos": True}),
    "native, a stop text": ("/completion", {**NATIVE, "grammar": 'root ::= "ab\\nSTxSTOPyy"', "stop": ["STOP"]}),
    "native, several": ("/completion", {**NATIVE, "prompt": ["a", "bc"], "n_cmpl": 2, "ignore_eos": True}),
    "native, whole": ("/completion", {**NATIVE, "stream": False, "return_tokens": True, "prompt": ["a", "bc"]}),
    "native, nothing said": ("/completion", {**NATIVE, "n_predict": 0}),
    "a gap": ("/infill", {**VIM, "stream": True, "n_predict": 20, "seed": 2, "response_fields": None}),
    "completions, several echoed": (
        "/v1/completions",
        {"prompt": ["a", "bc"], "max_tokens": 8, "n": 2, "echo": True, "stream": True, "ignore_eos": True},
    ),
    "completions, a suffix": ("/v1/completions", {"prompt": "a", "suffix": "z", "max_tokens": 9, "stream": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_cut_at_any_marker_is_finished_elsewhere(name: str, slow: Program, fake: Program) -> None:
    path, body = CASES[name]
    frames = begun(slow, path, body)
    whole = heard(frames)
    assert whole.ended
    cuts = [0] + [at + 1 for at, frame in enumerate(frames) if read_marker(frame)]

    def finished(cut: int) -> None:
        client = heard(frames[:cut])
        heard(resumed(fake, envelope(path, body, client.committed.ids())), client)
        assert client.ended
        assert told(client.frames) == told(whole.frames), cut
        assert client.committed.ids() == whole.committed.ids()

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(finished, cuts[:: max(1, len(cuts) // 8)]))


def told(frames: list[bytes]) -> Any:
    """What a client can tell of a stream, wherever it is cut into chunks: each choice's chunks put together, then how
    it ended. Timings and what was cached are of the node that came to the end."""
    said: dict[Any, Any] = {}
    for frame in frames:
        if not frame.startswith(b"data: {") and not frame.startswith(b"data: ["):
            continue
        event = json.loads(frame[6:]) if frame != sse.DONE else {"done": True}
        for one in event if isinstance(event, list) else [event]:
            one.pop("timings", None)
            one.pop("tokens_cached", None)
        if isinstance(event, dict) and "choices" in event and event["choices"]:
            (choice,) = event["choices"]
            part = said.setdefault(choice["index"], {"text": "", "end": None})
            part["text"] += choice["text"]
            part["end"] = part["end"] or choice["finish_reason"]
        elif isinstance(event, dict) and event.get("stop") is False:
            part = said.setdefault(event["index"], {"content": "", "tokens": [], "probabilities": []})
            part["content"] += event["content"]
            part["tokens"] += event["tokens"]
            part["probabilities"] += event.get("completion_probabilities", [])
            part["count"] = event["tokens_predicted"]
        elif isinstance(event, dict) and event.get("stop") is True:
            said[event["index"], "end"] = event
        else:
            said.setdefault("rest", []).append(event)
    return said


def test_a_server_says_what_it_is(coder: Program) -> None:
    body = httpx.get(coder.url + "/props").json()
    slot = body["default_generation_settings"]
    assert set(slot) == SLOT | {"prompt"}
    assert set(slot["params"]) == SETTINGS
    assert slot["params"]["temperature"] == 0.8
    assert slot["n_ctx"] == 256
    assert body["total_slots"] == 2
    assert body["model_path"].endswith(".gguf")
    assert body["modalities"] == {"vision": False, "audio": False, "video": False}
    assert {"chat_template", "chat_template_caps", "bos_token", "eos_token", "build_info", "is_sleeping"} <= set(body)
    assert httpx.get(coder.url + "/health").json()["status"] == "ok"
    assert httpx.get(coder.url + "/models").json() == httpx.get(coder.url + "/v1/models").json()


def test_slots_say_which_of_them_are_busy(slow: Program) -> None:
    found = httpx.get(slow.url + "/slots").json()
    assert [slot["id"] for slot in found] == list(range(16))
    assert set(found[0]) == SLOT
    assert not any(slot["is_processing"] for slot in found)
    long = {"prompt": "x", "n_predict": 400, "ignore_eos": True, "stream": True, "n_cmpl": 16}
    with httpx.stream("POST", slow.url + "/completion", json=long, timeout=60) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        wait_for(lambda: all(slot["is_processing"] for slot in httpx.get(slow.url + "/slots").json()), "busy slots")
        full = httpx.get(slow.url + "/slots?fail_on_no_slot=1")
        assert (full.status_code, full.json()["error"]["code"]) == (503, "no_slot_available")
