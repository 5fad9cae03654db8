"""Bad input: each is answered with a clear error in OpenAI's shape that names the thing."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Start
from tests.processes import Program, wait_for

TOKEN = "fleet-token-0123456789"
OTHER = "fleet-token-9876543210"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "fleet-token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture(scope="module")
def node(start_module: Start, token_file: Path) -> Program:
    return start_module(
        "llmnode", "--backend", "fake", "--n-ctx", "100", "--body-limit-bytes", "100000", "--max-tokens", "50",
        "--fleet-token-file", str(token_file),
    ).ready()  # fmt: skip


@pytest.fixture(scope="module")
def client(node: Program) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=node.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        yield client


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, after checking its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", 2.1, "from 0 to 2, got 2.1"),
        ("temperature", "hot", 'from 0 to 2, got "hot"'),
        ("temperature", True, "from 0 to 2, got true"),
        ("top_p", 0, "above 0 and at most 1, got 0"),
        ("top_k", -2, f"whole number from -1 to {2**31 - 1}, got -2"),
        ("min_p", 1.5, "from 0 to 1, got 1.5"),
        ("typical_p", 0, "above 0 and at most 1, got 0"),
        ("top_n_sigma", -2, "from -1 to 100, got -2"),
        ("xtc_probability", 1.1, "from 0 to 1, got 1.1"),
        ("xtc_threshold", -0.1, "from 0 to 1, got -0.1"),
        ("dry_multiplier", -1, "from 0 to 100, got -1"),
        ("dry_base", 0.5, "from 1 to 100, got 0.5"),
        ("dry_allowed_length", 1.5, "whole number from 0 to 1024, got 1.5"),
        ("dry_penalty_last_n", -2, f"from -1 to {2**31 - 1}, got -2"),
        ("dry_sequence_breakers", "x", "list of texts, none empty"),
        ("dry_sequence_breakers", ["x" * 65], "texts of 64 characters at most, got 65"),
        ("repeat_penalty", 0, "above 0 and at most 10, got 0"),
        ("repetition_penalty", 11, "above 0 and at most 10, got 11"),
        ("repeat_last_n", -2, f"from -1 to {2**31 - 1}, got -2"),
        ("frequency_penalty", 2.5, "from -2 to 2, got 2.5"),
        ("presence_penalty", "much", 'from -2 to 2, got "much"'),
        ("logit_bias", {"262": 1}, "token ids from 0 to 261, got 262"),
        ("logit_bias", {"5": 101}, "from -100 to 100 for token 5, got 101"),
        ("mirostat", 3, "whole number from 0 to 2, got 3"),
        ("mirostat_tau", 0, "above 0 and at most 100, got 0"),
        ("mirostat_eta", 1.5, "from 0 to 1, got 1.5"),
        ("seed", 2**32 - 1, f"from -1 to {2**32 - 2}, got {2**32 - 1}"),
        ("max_tokens", 0, "whole number from 1 to 50, got 0"),
        ("max_tokens", 51, "whole number from 1 to 50, got 51"),
        ("max_completion_tokens", 1.5, "whole number from 1 to 50, got 1.5"),
        ("n", 0, "whole number from 1 to 16, got 0"),
        ("n", 17, "whole number from 1 to 16, got 17"),
        ("best_of", 2, "not supported"),
        ("logprobs", 3, "true or false, got 3"),
        ("top_logprobs", 21, "whole number from 0 to 20, got 21"),
        ("top_logprobs", 3, "only allowed with logprobs: true"),
        ("stop", [""], "none empty"),
        ("stop", ["x"] * 17, "16 texts at most, got 17"),
        ("stream", "yes", "true or false"),
        ("stream_options", {"include_usage": True}, "only allowed with stream"),
        ("messages", [], "at least one message"),
        ("messages", "Hello", "got a text"),
        ("tools", {"type": "function"}, "must be a list of tools"),
        ("response_format", "json", "must be an object, got a text"),
        ("json_schema", [], "must be an object, got a list"),
        ("grammar", "root ::= unknown-rule", "grammar"),
        ("grammar", "x" * 70000, "65536 bytes at most, got 70000"),
        ("json_schema", {"enum": ["x" * 70000]}, "65536 bytes at most, got 700"),
        ("samplers", ["top_k"], "not supported"),
        ("stop_token_ids", [5], "not supported"),
    ],
)  # fmt: skip
def test_a_field_out_of_range_is_named_with_its_limit_and_value(
    client: httpx.Client, field: str, value: Any, says: str
) -> None:
    error = refused(client.post("/v1/chat/completions", json={"messages": MESSAGES, field: value}), 400)
    assert error["param"] == field
    assert error["message"].startswith(field)
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function.name"),
        ("Hello", "messages[0]"),
    ],
)  # fmt: skip
def test_a_bad_message_is_named_by_its_place(client: httpx.Client, message: Any, param: str) -> None:
    error = refused(client.post("/v1/chat/completions", json={"messages": [message]}), 400)
    assert error["param"] == param
    assert param in error["message"]


def test_neutral_values_of_unsupported_fields_are_fine(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "tools": [], "samplers": None, "best_of": 1, "echo": False}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert "x-llmrack-ignored" not in answer.headers


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": 'other ::= "a"'}, "grammar"),
        ({"grammar": "x" * 70000}, "grammar"),
        ({"json_schema": {"type": "nothing"}}, "json_schema"),
        ({"json_schema": {"enum": ["x" * 70000]}}, "json_schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": 5}}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_a_constraint_that_does_not_compile_is_named_by_its_place(
    client: httpx.Client, stream: bool, fields: Any, param: str
) -> None:
    """At each endpoint, and before a stream has begun."""
    for path, text in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        error = refused(client.post(path, json={**text, **fields, "stream": stream}), 400)
        assert error["param"] == param


@pytest.mark.parametrize(
    "names", [["a\r\nset-cookie: x"], ["a\x01\x7f"], ["\u20ac"], [f"field{n}" for n in range(4000)]]
)
def test_names_of_fields_that_no_header_can_hold_do_not_break_the_answer(
    client: httpx.Client, names: list[str]
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, **dict.fromkeys(names, 1)}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    assert re.fullmatch("[ -~]{1,4003}", answer.headers["x-llmrack-ignored"])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "fake", }', "line 1, column 19"),
        (b"", "line 1, column 1"),
        (b"[1]", "JSON object, got a list"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}", "nested too deeply"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
    ],
)  # fmt: skip
def test_a_malformed_body_says_where(client: httpx.Client, body: bytes, says: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/inference"):
        error = refused(client.post(path, content=body), 400)
        assert error["code"] == "invalid_json"
        assert says in error["message"]


def test_a_wrong_content_type_is_no_reason_to_refuse(client: httpx.Client) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert client.post("/v1/chat/completions", content=body, headers={"content-type": kind}).status_code == 200


def test_an_unknown_model_is_a_404_that_lists_what_there_is(client: httpx.Client) -> None:
    error = refused(client.post("/v1/chat/completions", json={"model": "gpt-9", "messages": MESSAGES}), 404)
    assert error["code"] == "model_not_found"
    assert "gpt-9" in error["message"] and "fake" in error["message"]


def test_a_prompt_longer_than_the_context_is_told_both_numbers(client: httpx.Client) -> None:
    long = "x" * 150
    for path, body, param in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}], "stream": True}, "messages"),
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/inference", {"prompt": long}, "prompt"),
    ):
        error = refused(client.post(path, json=body), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == param
        assert "100" in error["message"] and "15" in error["message"]


@pytest.mark.parametrize("prompt", [None, "", [], [300], [-1], ["a", ""], [[1], []], ["a", [300]], [True], {"a": 1}])
def test_a_bad_prompt_is_refused_by_name(client: httpx.Client, prompt: Any) -> None:
    error = refused(client.post("/v1/completions", json={"prompt": prompt}), 400)
    assert error["param"] == "prompt"


def test_a_body_over_the_limit_is_a_413_that_names_it(client: httpx.Client) -> None:
    error = refused(client.post("/v1/chat/completions", content=b" " * 150000), 413)
    assert "100000" in error["message"]


def test_unknown_paths_and_methods_have_the_same_shape(client: httpx.Client) -> None:
    assert "/v1/nothing" in refused(client.get("/v1/nothing"), 404)["message"]
    error = refused(client.get("/v1/chat/completions"), 405)
    assert error["code"] == "method_not_allowed"
    assert "POST" in error["message"]


def test_a_request_that_is_no_http_is_answered_and_cut(node: Program) -> None:
    with socket.create_connection(("127.0.0.1", node.port), timeout=30) as raw:
        raw.sendall(b"this is not http\r\n\r\n")
        answer = b""
        while piece := raw.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"invalid_request_error"' in answer


@pytest.mark.parametrize("path", ["/v1/models", "/node", "/v1/nothing"])
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"])
def test_without_the_fleet_token_nothing_is_told(node: Program, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    error = refused(httpx.get(node.url + path, headers=headers, timeout=10), 401)
    assert error["code"] == "invalid_api_key"
    assert TOKEN not in error["message"]


def test_health_ready_and_metrics_are_open(node: Program) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(node.url + path, timeout=10).status_code == 200


def test_the_fleet_token_is_rotated_without_a_restart(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    node = start("llmnode", "--backend", "fake", "--fleet-token-file", str(path)).ready()

    def status(token: str) -> int:
        return httpx.get(node.url + "/node", headers={"authorization": f"Bearer {token}"}, timeout=10).status_code

    assert (status(TOKEN), status(OTHER)) == (200, 401)
    path.write_text(f"{TOKEN}\n{OTHER}\n")
    assert (status(TOKEN), status(OTHER)) == (200, 200)
    path.write_text(OTHER)
    assert (status(TOKEN), status(OTHER)) == (401, 200)
    path.write_text("")  # a bad file is refused loudly and the old token stays
    assert status(OTHER) == 200
    assert "keeping the old fleet token" in node.output()
    assert TOKEN not in node.output() and OTHER not in node.output()


@pytest.mark.parametrize("given", ["a b", "x" * 129, "a,b", ""])
def test_a_request_id_that_could_forge_a_log_line_is_replaced(client: httpx.Client, given: str) -> None:
    answer = client.get("/health", headers={"x-request-id": given})
    assert answer.headers["x-request-id"].startswith("req-")


def test_a_full_queue_is_a_503_with_retry_after(start: Start) -> None:
    node = start("llmnode", "--backend", "fake", "--slots", "1", "--queue-limit", "0", "--fake-step-delay-s", "0.05")
    node.ready()
    asked = {"messages": MESSAGES, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", node.url + "/v1/chat/completions", json=asked, timeout=60) as held:
        pieces = held.iter_raw()  # kept: a dropped iterator closes its response, and the slot would be free again
        next(pieces)
        answer = httpx.post(node.url + "/v1/chat/completions", json=asked, timeout=60)
        error = refused(answer, 503)
        assert error["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1


def test_more_choices_than_could_ever_run_are_a_400_and_more_than_run_now_a_503(start: Start) -> None:
    node = start("llmnode", "--backend", "fake", "--slots", "1", "--queue-limit", "1", "--fake-step-delay-s", "0.05")
    node.ready()
    asked = {"messages": MESSAGES, "ignore_eos": True, "max_tokens": 3000}
    error = refused(httpx.post(node.url + "/v1/chat/completions", json={**asked, "n": 3}, timeout=60), 400)
    assert error["message"] == "n must be a whole number from 1 to 2, got 3"
    with httpx.stream("POST", node.url + "/v1/chat/completions", json={**asked, "stream": True}, timeout=60) as held:
        pieces = held.iter_raw()
        next(pieces)
        error = refused(httpx.post(node.url + "/v1/chat/completions", json={**asked, "n": 2}, timeout=60), 503)
        assert error["code"] == "overloaded"
        # The choice that did fit has been taken back: the one place in the queue is free.
        wait_for(lambda: node.get("/node").json()["load"]["waiting"] == 0, "the queue to be empty")


def test_an_answer_past_its_deadline_is_a_504(start: Start) -> None:
    node = start("llmnode", "--backend", "fake", "--fake-step-delay-s", "0.05", "--request-timeout-s", "1").ready()
    asked = {"messages": MESSAGES, "ignore_eos": True}
    error = refused(httpx.post(node.url + "/v1/chat/completions", json=asked, timeout=60), 504)
    assert error["type"] == "timeout_error"
    stream = httpx.post(node.url + "/v1/chat/completions", json={**asked, "stream": True}, timeout=60)
    assert stream.status_code == 200
    assert '"timeout_error"' in stream.text.rstrip().rpartition("\n")[2]
    assert "[DONE]" not in stream.text
