"""Bytes that are no request, or another one than they seem: refused, never guessed at, and no way around the door."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator

import pytest

from llmnode.service import framing
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode

Mock = Callable[..., MockNode]
One = tuple[GateUnderTest, MockNode]
BODY = b'{"model":"tiny","messages":[{"role":"user","content":"x"}]}'


@pytest.fixture(scope="module")
def one(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[One]:
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    with MockNode("a") as node:
        gate.list_nodes(node)
        yield gate.run("--receive-timeout-s", "5"), node


LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: last\r\nconnection: close\r\n\r\n"
KEPT = 0
"""Stands for the answer to LAST, behind those to what was sent before it: the connection was still good."""


def said(gate: GateUnderTest, sent: bytes) -> bytes:
    """All that the gate answers until it hangs up, at the latest after LAST."""
    assert gate.program is not None
    with socket.create_connection(("127.0.0.1", gate.program.port), timeout=60) as raw:
        raw.sendall(sent + LAST)
        whole = b""
        try:
            while piece := raw.recv(65536):
                whole += piece
        except ConnectionResetError:
            pass
    return whole


def statuses(answers: bytes) -> list[int]:
    found = answers.split(b"HTTP/1.1 ")[1:]
    return [KEPT if b"x-request-id: last\r\n" in part.lower() else int(part[:3]) for part in found]


def chat(gate: GateUnderTest, *fields: bytes, body: bytes = BODY, version: bytes = b"HTTP/1.1") -> bytes:
    """A request for an answer, with these header lines beside host and key."""
    lines = [
        b"POST /v1/chat/completions " + version,
        b"host: x",
        b"authorization: Bearer " + gate.secret.encode(),
        *fields,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


LENGTH = b"content-length: %d" % len(BODY)
CHUNKED = b"transfer-encoding: chunked"
SMUGGLED = b"GET /admin/nodes HTTP/1.1\r\nhost: x\r\n\r\n"


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        pytest.param((LENGTH, CHUNKED), chunks(BODY), id="both framings"),
        pytest.param((CHUNKED, LENGTH), chunks(BODY), id="both framings, the other way round"),
        pytest.param((LENGTH, LENGTH), BODY, id="two lengths"),
        pytest.param((LENGTH, b"content-length: 5"), BODY, id="two different lengths"),
        pytest.param((LENGTH + b", 5",), BODY, id="a list of lengths"),
        pytest.param((b"content-length: +5",), BODY, id="a length with a sign"),
        pytest.param((b"content-length: 0x5",), BODY, id="a length in hex"),
        pytest.param((b"content-length: 5_0",), BODY, id="a length with an underscore"),
        pytest.param((b"content-length: \xef\xbc\x95",), BODY, id="a length in other digits"),
        pytest.param((b"content-length: ",), BODY, id="no length"),
        pytest.param((b"content-length: " + b"9" * 5000,), BODY, id="a length without end"),
        pytest.param((CHUNKED, CHUNKED), chunks(BODY), id="chunked twice"),
        pytest.param((b"transfer-encoding: gzip, chunked",), chunks(BODY), id="another coding"),
        pytest.param((b"transfer-encoding: identity",), BODY, id="identity"),
        pytest.param((b"transfer-encoding: xchunked",), chunks(BODY), id="nearly chunked"),
        pytest.param((b"transfer-encoding : chunked",), chunks(BODY), id="a space before the colon"),
        pytest.param((b"transfer-encoding\x0b: chunked", LENGTH), BODY, id="a control in a name"),
        pytest.param((b"x: y\ntransfer-encoding: chunked", LENGTH), BODY, id="a bare LF"),
        pytest.param((b"x: y\rtransfer-encoding: chunked", LENGTH), BODY, id="a bare CR"),
        pytest.param((b"x: y\x00z", LENGTH), BODY, id="a NUL in a value"),
        pytest.param((b"x: y", b" transfer-encoding: chunked", LENGTH), BODY, id="a folded line"),
        pytest.param((b": y", LENGTH), BODY, id="no name"),
        pytest.param((b"nothing", LENGTH), BODY, id="no colon"),
        pytest.param((CHUNKED,), b"0x3b\r\n" + BODY + b"\r\n0\r\n\r\n", id="a chunk's size as a number of C"),
        pytest.param((CHUNKED,), b"+3b\r\n" + BODY + b"\r\n0\r\n\r\n", id="a chunk's size with a sign"),
        pytest.param((CHUNKED,), b"\r\n" + BODY + b"\r\n0\r\n\r\n", id="no size"),
        pytest.param((CHUNKED,), b"3b;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n", id="a bare LF in an extension"),
        pytest.param((CHUNKED,), b"3b\r\n" + BODY + b"XX0\r\n\r\n", id="a chunk that ends in something else"),
        pytest.param((CHUNKED,), b"3b\n" + BODY + b"\n0\n\n", id="chunks with bare LF"),
        pytest.param((CHUNKED,), b"3b\r\n" + BODY + b"\r\n0\r\nx: y\r\n\r\n", id="a trailer"),
        pytest.param((CHUNKED,), b"3b;" + b"x" * 5000 + b"\r\n" + BODY + b"\r\n0\r\n\r\n", id="a long extension"),
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused_and_the_connection_closed(
    one: One, fields: tuple[bytes, ...], body: bytes
) -> None:
    gate, node = one
    before = len(node.requests)
    assert statuses(said(gate, chat(gate, *fields, body=body) + SMUGGLED)) == [400]
    assert len(node.requests) == before


def test_what_is_no_header_but_was_one_to_sanic_is_refused_before_its_body_is_looked_at(one: One) -> None:
    gate, _ = one
    answer = said(gate, chat(gate, b"x y: z", LENGTH) + SMUGGLED)
    assert statuses(answer) == [400]
    assert b"connection: close" in answer.lower()
    error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "bad_request")


def test_chunks_of_any_size_are_put_together(one: One) -> None:
    gate, node = one
    for body in (chunks(BODY), chunks(*(BODY[at : at + 1] for at in range(len(BODY)))), b"3B ;a=b" + chunks(BODY)[2:]):
        assert statuses(said(gate, chat(gate, CHUNKED, body=body))) == [200, KEPT]
        assert node.requests[-1]["body"] == BODY
    padded = b" " * 40_000 + BODY
    pieces = [padded[at : at + 20] for at in range(0, len(padded), 20)]
    assert statuses(said(gate, chat(gate, CHUNKED, body=chunks(*pieces)))) == [200, KEPT]
    assert node.requests[-1]["body"] == padded


@pytest.mark.parametrize("key", ["good", "none"])
def test_a_body_in_thousands_of_tiny_chunks_is_not_taken_apart(one: One, key: str) -> None:
    gate, node = one
    before = len(node.requests)
    request = chat(gate, CHUNKED, body=chunks(*[b" "] * 5000, BODY))
    if key == "none":
        request = request.replace(gate.secret.encode(), b"sk-llmrack-nobody-0123456789abcdef")
    assert statuses(said(gate, request + SMUGGLED)) == [400 if key == "good" else 401]
    assert len(node.requests) == before


def test_requests_behind_one_another_are_answered_in_order(one: One) -> None:
    gate, _ = one
    health = b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: n%d\r\n\r\n"
    answers = said(gate, b"".join(health % number for number in range(200)))
    assert [number for number in range(200) if b"x-request-id: n%d\r\n" % number in answers.lower()] == list(range(200))
    assert statuses(answers) == [200] * 200 + [KEPT]
    mixed = said(gate, chat(gate, LENGTH) + chat(gate, CHUNKED, body=chunks(BODY)) + SMUGGLED)
    assert statuses(mixed) == [200, 200, 401, KEPT]


def test_http_1_0_is_answered_once_and_has_no_chunks(one: One) -> None:
    gate, _ = one
    answer = said(gate, b"GET /health HTTP/1.0\r\n\r\n" * 2)
    assert statuses(answer) == [200]
    assert b"connection: close" in answer.lower()
    assert statuses(said(gate, chat(gate, LENGTH, version=b"HTTP/1.0"))) == [200]
    assert statuses(said(gate, chat(gate, CHUNKED, body=chunks(BODY), version=b"HTTP/1.0"))) == [400]
    for version in (b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"http/1.1", b""):
        assert statuses(said(gate, b"GET /health " + version + b"\r\n\r\n")) == [400]


def test_a_head_that_is_too_large_is_431_and_a_body_413(one: One) -> None:
    gate, _ = one
    answer = said(gate, chat(gate, b"x-long: " + b"y" * 9000, LENGTH))
    assert statuses(answer) == [431]
    assert b"head_too_large" in answer and b"8192 bytes" in answer
    many = said(gate, chat(gate, *[b"x: y"] * 2000, LENGTH))
    assert statuses(many) == [431]
    endless = said(gate, b"GET /" + b"x" * 20_000)
    assert statuses(endless) == [431]
    assert statuses(said(gate, chat(gate, b"content-length: 99999999999"))) == [413]


@pytest.mark.parametrize(
    "path",
    [
        "//admin/nodes", "/admin//nodes", "/admin/nodes/", "/./admin/nodes", "/v1/../admin/nodes", "/admin%2fnodes",
        "/%61dmin/nodes", "/admin/nodes%00", "/ADMIN/nodes", "/admin;x/nodes", "/admin/nodes?x=/health",
        "/health/../admin/nodes", "/health%2f..%2fadmin%2fnodes", "http://x/admin/nodes", "http://x@y/admin/nodes",
        "/admin/nodes#/health", "\\admin\\nodes", "/admin/.%2e/admin/nodes", "*", "x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "get", "OPTIONS", "TRACE", "CONNECT"])
def test_no_spelling_of_a_path_leads_around_the_key(one: One, path: str, method: str) -> None:
    gate, _ = one
    answer = said(gate, f"{method} {path} HTTP/1.1\r\nhost: x\r\nx-original-url: /health\r\n\r\n".encode())
    status, *rest = statuses(answer)
    assert (status in (401, 404, 405) and rest == [KEPT]) or (status == 400 and not rest)
    assert b"127.0.0.1:" not in answer, "no node is told of"


def test_a_request_whose_key_is_unknown_is_refused_before_its_body_has_come(one: One) -> None:
    gate, _ = one
    assert gate.program is not None
    for path in ("/v1/chat/completions", "/admin/nodes/a/drain", "/health"):
        with socket.create_connection(("127.0.0.1", gate.program.port), timeout=60) as raw:
            method = "GET" if path == "/health" else "POST"
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 10000000\r\n\r\n"
            raw.sendall(head.encode())
            assert raw.recv(12) == (b"HTTP/1.1 200" if path == "/health" else b"HTTP/1.1 401")


def test_headers_between_gate_and_nodes_are_not_the_clients_to_set(one: One) -> None:
    gate, node = one
    fields = (
        b"x-llmrack-resumable: 1", b"x-llmrack-report-usage: 0", b"x-llmrack-deadline-ms: 1", b"x-llmrack-origin: x",
        b"x-forwarded-for: 1.2.3.4", b"cookie: a=b", b"connection: keep-alive, x-request-id",
        b"authorization: Bearer another", b"x-api-key: another",
    )  # fmt: skip
    assert statuses(said(gate, chat(gate, *fields, LENGTH)))[:1] == [200]
    headers = node.requests[-1]["headers"]
    seen = {name.lower(): value for name, value in headers.items()}
    assert not {"x-llmrack-origin", "x-forwarded-for", "cookie", "x-api-key", "authorization"} & set(seen)
    assert seen.get("x-llmrack-deadline-ms") != "1"
    assert seen.get("x-llmrack-resumable") != "1" and seen.get("x-llmrack-report-usage") != "0"


def test_names_in_a_body_break_out_of_no_header_and_no_log_line(one: One) -> None:
    gate, _ = one
    name = 'tiny\r\nset-cookie: a=b\r\n\r\n{"id": "forged"}\n'
    answer = gate.chat(model=name)
    assert answer.status_code == 404
    assert "set-cookie" not in answer.headers
    line = gate.line(answer.headers["x-request-id"])
    assert line["model"] == name
    assert not any(row.get("id") == "forged" for row in gate.lines(1))
    odd = gate.chat(**{name: 1})
    assert odd.status_code == 200
    assert "set-cookie" not in odd.headers


def test_the_grammar_takes_what_clients_send_and_no_more() -> None:
    assert framing.is_head(b"GET /v1/models?x=%20 HTTP/1.1\r\nHost: a:80\r\nX-A:\t b \xc3\xa9\r\nempty:")
    assert framing.is_head(b"OPTIONS * HTTP/1.0") and framing.is_head(b"GET *x HTTP/1.1")
    for bad in (
        b"",
        b"GET * HTTP/1.1",
        b"GET  / HTTP/1.1",
        b"GET /\x80 HTTP/1.1",
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\na b: c",
    ):
        assert not framing.is_head(bad)
    assert framing.number("17 ") == 17 and framing.number("1F", 16) == 31
    for text in ("", " 1", "-1", "0x1", "1e2", "\u0661", "1" * 16):
        with pytest.raises(ValueError):
            framing.number(text)
    assert not framing.too_fine(1000, 1) and framing.too_fine(1001, 1001) and not framing.too_fine(10_000, 160_000)
