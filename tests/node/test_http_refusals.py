"""Bad input: each is answered with a clear error in OpenAI's shape that names the thing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Start
from tests.processes import Program

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
        "llmnode", "--backend", "fake", "--n-ctx", "100", "--body-limit-bytes", "20000", "--max-tokens", "50",
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
        ("top_k", -1, "whole number from 0, got -1"),
        ("min_p", 1.5, "from 0 to 1, got 1.5"),
        ("seed", 2**32 - 1, f"from 0 to {2**32 - 2}, got {2**32 - 1}"),
        ("max_tokens", 0, "whole number from 1 to 50, got 0"),
        ("max_tokens", 51, "whole number from 1 to 50, got 51"),
        ("max_completion_tokens", 1.5, "whole number from 1 to 50, got 1.5"),
        ("n", 2, "n must be 1"),
        ("stop", [""], "none empty"),
        ("stop", ["x"] * 17, "16 texts at most, got 17"),
        ("stream", "yes", "true or false"),
        ("stream_options", {"include_usage": True}, "only allowed with stream"),
        ("messages", [], "at least one message"),
        ("messages", "Hello", "got a text"),
        ("tools", [{"type": "function"}], "not supported"),
        ("response_format", {"type": "json_object"}, "not supported"),
        ("logprobs", True, "not supported"),
        ("presence_penalty", 0.5, "not supported"),
        ("logit_bias", {"5": 1}, "not supported"),
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
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        ("Hello", "messages[0]"),
    ],
)  # fmt: skip
def test_a_bad_message_is_named_by_its_place(client: httpx.Client, message: Any, param: str) -> None:
    error = refused(client.post("/v1/chat/completions", json={"messages": [message]}), 400)
    assert error["param"] == param
    assert param in error["message"]


def test_neutral_values_of_unsupported_fields_are_fine(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "tools": [], "presence_penalty": 0.0, "logprobs": False, "n": 1}
    assert client.post("/v1/chat/completions", json={**body, "logit_bias": None}).status_code == 200


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


@pytest.mark.parametrize("prompt", [None, "", [], [300], [-1], ["a", "b"], [[1], [2]], [True], {"a": 1}])
def test_a_bad_prompt_is_refused_by_name(client: httpx.Client, prompt: Any) -> None:
    error = refused(client.post("/v1/completions", json={"prompt": prompt}), 400)
    assert error["param"] == "prompt"


def test_a_body_over_the_limit_is_a_413_that_names_it(client: httpx.Client) -> None:
    error = refused(client.post("/v1/chat/completions", content=b" " * 30000), 413)
    assert "20000" in error["message"]


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


def test_an_answer_past_its_deadline_is_a_504(start: Start) -> None:
    node = start("llmnode", "--backend", "fake", "--fake-step-delay-s", "0.05", "--request-timeout-s", "1").ready()
    asked = {"messages": MESSAGES, "ignore_eos": True}
    error = refused(httpx.post(node.url + "/v1/chat/completions", json=asked, timeout=60), 504)
    assert error["type"] == "timeout_error"
    stream = httpx.post(node.url + "/v1/chat/completions", json={**asked, "stream": True}, timeout=60)
    assert stream.status_code == 200
    assert '"timeout_error"' in stream.text.rstrip().rpartition("\n")[2]
    assert "[DONE]" not in stream.text
