"""Who gets in, with what, and what is said to the others."""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import wait_for

Mock = Callable[..., MockNode]
One = tuple[GateUnderTest, MockNode]
Two = tuple[GateUnderTest, MockNode, MockNode]


@pytest.fixture(scope="module")
def one(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[One]:
    """A gate and its one node, for the tests that change neither."""
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    with MockNode("a") as node:
        gate.list_nodes(node)
        yield gate.run(), node


def assert_error(answer: httpx.Response, status: int, code: str, *says: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    for text in says:
        assert text in error["message"]
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": ""}, {"authorization": "Basic abc"}, {"authorization": "Bearer"}, {"x-api-key": ""}],
)
@pytest.mark.parametrize("path", ["/v1/models", "/admin/nodes"])
def test_no_key_no_entry(one: One, headers: dict[str, str], path: str) -> None:
    gate, _ = one
    assert_error(httpx.get(gate.url + path, headers=headers), 401, "missing_api_key")


def test_a_wrong_key_is_refused_and_not_repeated(one: One) -> None:
    gate, node = one
    before = len(node.requests)
    wrong = gate.secret[:-1] + ("0" if gate.secret[-1] != "0" else "1")
    answer = gate.chat(wrong)
    assert_error(answer, 401, "invalid_api_key")
    assert wrong not in answer.text
    assert len(node.requests) == before


def test_either_header_carries_the_key(one: One) -> None:
    gate, _ = one
    assert httpx.get(gate.url + "/v1/models", headers={"x-api-key": gate.secret}).status_code == 200
    assert httpx.get(gate.url + "/v1/models", headers={"authorization": f"bearer {gate.secret}"}).status_code == 200


def test_keys_come_and_go_while_the_gate_runs(one: One) -> None:
    gate, _ = one
    secret = gate.create_key("later")
    wait_for(lambda: gate.chat(secret).status_code == 200, "the new key to work")
    assert gate.cli("keys", "revoke", "later").returncode == 0
    wait_for(lambda: gate.chat(secret).status_code == 401, "the revoked key to be refused")
    assert gate.chat().status_code == 200


def test_a_key_reaches_only_its_models(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a", model="tiny"), mock("b", model="other"))
    gate.run()
    for name in ("a", "b"):
        gate.wait_node(name, lambda node: node["usable"])
    narrow = gate.create_key("narrow", "--models", "tiny,unused")
    wait_for(lambda: gate.chat(narrow).status_code == 200, "the new key to work")
    assert_error(gate.chat(narrow, model="other"), 403, "model_not_allowed", "other", "tiny")
    assert_error(gate.chat(narrow, model="nothing"), 404, "model_not_found", "nothing", "models served here: tiny")
    with gate.client(narrow) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny"]
        assert client.get("/v1/models/tiny").status_code == 200
        assert_error(client.get("/v1/models/other"), 403, "model_not_allowed")
    with gate.client() as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["other", "tiny"]
    # The narrow key has one model to choose from, the wide one has two.
    assert gate.chat(narrow, model=None).headers["x-llmrack-node"] == "a"
    answer = gate.chat(model=None)
    assert_error(answer, 400, "missing_field", "other, tiny")
    assert answer.json()["error"]["param"] == "model"


def test_an_ordinary_key_is_no_admin(one: One) -> None:
    gate, _ = one
    plain = gate.create_key("plain")
    wait_for(lambda: gate.chat(plain).status_code == 200, "the new key to work")
    with gate.client(plain) as client:
        assert_error(client.get("/admin/nodes"), 403, "admin_only")
        assert_error(client.get("/admin/nodes/a"), 403, "admin_only")
        assert_error(client.post("/admin/nodes/a/drain", json={"owner": "x"}), 403, "admin_only")
        assert_error(client.delete("/admin/nodes/a/drain?owner=x"), 403, "admin_only")


def test_without_required_keys_anybody_may_ask_but_nobody_is_admin(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.run("--require-keys=false")
    assert httpx.get(gate.url + "/v1/models").status_code == 200
    assert_error(httpx.get(gate.url + "/admin/nodes"), 403, "admin_only")
    assert_error(gate.chat("sk-llmrack-wrong"), 401, "invalid_api_key")


def test_secrets_are_hashed_at_rest_and_in_no_log(two: Two) -> None:
    gate, _, _ = two
    gate.chat()
    gate.chat("sk-llmrack-some-wrong-secret-0001")
    gate.lines(2)
    assert gate.program is not None
    written = gate.program.output().encode() + gate.log_file.read_bytes()
    written += b"".join(path.read_bytes() for path in gate.state.iterdir())
    assert gate.secret.encode() not in written
    assert b"some-wrong-secret" not in written
    assert b"a secret prompt" not in written
    assert (gate.state / "llmgate.db").stat().st_mode & 0o077 == 0
    assert gate.state.stat().st_mode & 0o077 == 0


def test_the_request_log_says_who_what_where_and_why(two: Two) -> None:
    gate, _, _ = two
    answer = gate.chat(model="tiny-alias")
    line = gate.line(answer.headers["x-request-id"])
    assert line["key"] == "tester"
    assert line["path"] == "/v1/chat/completions"
    assert line["model"] == "tiny"
    assert line["node"] == "a"
    assert line["status"] == 200
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (11, 3, 5)
    assert 0 < line["time_to_first_token_seconds"] <= line["duration_seconds"]
    (tried,) = line["attempts"]
    assert (tried["node"], tried["outcome"]) == ("a", "answered")
    assert 0 <= tried["at"] <= tried["at"] + tried["seconds"] <= line["duration_seconds"] + 0.001
    assert line["resumed"] == 0
    assert line["route"] == "least-loaded (load): a 0/4, b 0/4"
    refused = gate.chat("sk-llmrack-wrong-0123456789abcdef")
    line = gate.line(refused.headers["x-request-id"])
    assert (line["key"], line["status"], line["end"], line["model"]) == (None, 401, "invalid_api_key", None)


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, 'q"uote', "umläut"])
def test_a_request_id_that_is_none_is_replaced(one: One, sent: str) -> None:
    gate, _ = one
    answer = httpx.get(gate.url + "/health", headers={"x-request-id": sent.encode()})
    assert answer.headers["x-request-id"].startswith("req-")
    assert httpx.get(gate.url + "/health", headers={"x-request-id": "A.b_c-9"}).headers["x-request-id"] == "A.b_c-9"


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"", "invalid_json", "not valid JSON"),
        (b"{", "invalid_json", "not valid JSON"),
        (b"[1]", "invalid_json", "must be a JSON object"),
        (b'"text"', "invalid_json", "must be a JSON object"),
        (b'{"model":"\xff"}', "invalid_json", "not valid JSON"),
        (b"[" * 100_000, "invalid_json", "nested too deeply"),
        (b'{"model":5}', "invalid_value", "model must be a string"),
        (b'{"model":""}', "invalid_value", "model must be a string"),
    ],
)
def test_a_malformed_body_is_named(one: One, body: bytes, code: str, says: str) -> None:
    gate, node = one
    before = len(node.requests)
    with gate.client() as client:
        assert_error(client.post("/v1/chat/completions", content=body), 400, code, says)
    assert len(node.requests) == before


def test_a_body_over_the_limit_is_413(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.run("--body-limit-bytes", "2000")
    assert gate.chat(padding="x" * 1000).status_code == 200
    assert_error(gate.chat(padding="x" * 2000), 413, "body_too_large", "2000")


def test_unknown_paths_and_methods_are_errors_in_the_same_shape(one: One) -> None:
    gate, _ = one
    with gate.client() as client:
        assert_error(client.get("/v1/nothing"), 404, "not_found", "/v1/nothing")
        assert_error(client.get("/v1/chat/completions"), 405, "method_not_allowed", "GET")
        assert_error(client.delete("/v1/models"), 405, "method_not_allowed")
    assert gate.program is not None
    with socket.create_connection(("127.0.0.1", gate.program.port)) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        answer = raw.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"


def test_inference_and_completions_are_relayed_too(one: One) -> None:
    gate, node = one
    with gate.client() as client:
        assert client.post("/inference", json={"prompt": "x"}).status_code == 200
        assert client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 200
    assert node.paths[-2:] == ["/inference", "/v1/completions"]


def test_a_model_offered_for_another_use_is_not_a_candidate(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    gate.list_nodes(node)
    gate.run()
    model = node.report.models[0]
    node.say(models=(type(model)(id="tiny", kinds=("embedding",), n_ctx=5),))
    gate.wait_node("a", lambda seen: seen["models"][0]["n_ctx"] == 5)
    assert_error(gate.chat(), 400, "wrong_kind", "it serves: embedding")


def test_key_commands_converge_for_a_playbook(gate: GateUnderTest) -> None:
    path = gate.folder / "secret"
    path.write_text("0123456789abcdef01234567\n")
    create = ("keys", "create", "robot", "--from-file", str(path))
    assert gate.cli(*create).stdout == "created\n"
    assert gate.cli(*create, "--if-absent").stdout == "unchanged\n"
    assert gate.cli(*create, "--if-absent", "--admin").stdout == "updated\n"
    assert gate.cli(*create, "--if-absent", "--admin", "--priority", "low").stdout == "updated\n"
    assert gate.cli(*create, "--if-absent", "--admin", "--priority", "low").stdout == "unchanged\n"
    assert gate.cli(*create, "--priority", "urgent").returncode == 2
    again = gate.cli(*create)
    assert again.returncode == 1
    assert "robot" in again.stderr
    twin = gate.cli("keys", "create", "twin", "--from-file", str(path))
    assert twin.returncode == 1
    assert "with that secret" in twin.stderr
    path.write_text("another-secret-0123456789\n")
    other = gate.cli(*create, "--if-absent")
    assert other.returncode == 1
    path.write_text("short\n")
    short = gate.cli(*create)
    assert short.returncode == 2
    assert "24" in short.stderr
    assert "short" not in short.stderr.replace("secret", "")
    piped = gate.cli("keys", "create", "piped", "--from-file", "-", said="a-secret-through-a-pipe-01\n")
    assert (piped.stdout, piped.returncode) == ("created\n", 0)
    assert gate.cli("keys", "revoke", "piped").returncode == 0
    listed = json.loads(gate.cli("keys", "list", "--json").stdout)
    assert [(key["name"], key["admin"], key["priority"], key["revoked"]) for key in listed][:1] == [
        ("robot", True, "low", None)
    ]
    assert gate.cli("keys", "revoke", "robot").returncode == 0
    assert gate.cli("keys", "revoke", "robot").returncode == 1
    assert "revoked" in gate.cli("keys", "list").stdout
    assert gate.cli("keys", "create", "bad name").returncode == 2
    with sqlite3.connect(gate.state / "llmgate.db") as db:
        assert "0123456789abcdef" not in "\n".join(db.iterdump())
