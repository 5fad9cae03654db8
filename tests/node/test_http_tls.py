"""A node behind TLS: who may connect, what it shows, and how it takes a new certificate."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path

import httpx
import pytest

from tests.certificates import Authority, Pair, served, told_ends
from tests.conftest import Start
from tests.processes import Program, wait_for

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "stream": True}


def flags(own: Pair, clients: Authority | None = None) -> list[str]:
    asked = ["--tls-client-ca-file", str(clients.file)] if clients else []
    return ["--backend", "fake", "--tls-cert-file", str(own.certificate), "--tls-key-file", str(own.key), *asked]


def ends(node: Program, context: ssl.SSLContext) -> dict[str, float]:
    return told_ends(httpx.get(node.url + "/metrics", verify=context, timeout=10).text)


def ready(node: Program, context: ssl.SSLContext) -> Program:
    node.url = node.url.replace("http:", "https:")

    def answered() -> bool:
        assert node.process.poll() is None, node.output()
        answer = node.get("/ready", verify=context)
        return answer is not None and answer.status_code == 200

    wait_for(answered, "the node's /ready")
    return node


def test_a_node_with_mutual_tls_answers_those_of_its_authority_alone(start: Start, tmp_path: Path) -> None:
    fleet, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    gate = fleet.client(fleet.issue("gate"))
    node = ready(start("llmnode", *flags(fleet.issue("node"), fleet)), gate)

    answer = httpx.post(node.url + "/v1/chat/completions", json=CHAT, verify=gate, timeout=60)
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")

    disguised = fleet.client(stranger.issue("guest"))
    for context in (fleet.client(), disguised):
        with pytest.raises(httpx.TransportError):
            httpx.get(node.url + "/health", verify=context, timeout=10)
    with pytest.raises(httpx.TransportError):
        httpx.get(node.url.replace("https:", "http:") + "/health", timeout=10)
    assert httpx.get(node.url + "/health", verify=gate, timeout=10).status_code == 200
    assert "Traceback" not in node.output()


def test_a_reload_takes_a_new_certificate_and_cuts_no_stream(start: Start, tmp_path: Path) -> None:
    fleet = Authority(tmp_path)
    own, context = fleet.issue("node"), fleet.client()
    node = ready(start("llmnode", *flags(own), "--fake-step-delay-s", "0.02"), context)
    first = own.der()
    assert served(node.port, context) == first
    assert ends(node, context) == {"": own.end()}

    body = {**CHAT, "ignore_eos": True, "max_tokens": 200}
    with httpx.stream("POST", node.url + "/v1/chat/completions", json=body, verify=context, timeout=60) as stream:
        pieces = stream.iter_text()
        next(pieces)
        fleet.issue("node", days=2)
        node.signal(signal.SIGHUP)
        wait_for(lambda: served(node.port, context) == own.der() != first, "the new certificate")
        assert "".join(pieces).endswith("data: [DONE]\n\n")
    assert ends(node, context) == {"": own.end()}


def test_a_new_certificate_is_taken_without_being_asked_to_and_a_bad_one_is_not(start: Start, tmp_path: Path) -> None:
    fleet = Authority(tmp_path)
    own, context = fleet.issue("node"), fleet.client()
    node = ready(start("llmnode", *flags(own)), context)
    with httpx.Client(base_url=node.url, verify=context, timeout=60) as kept:
        assert kept.get("/health").status_code == 200
        fleet.issue("node", days=2)
        wait_for(lambda: served(node.port, context) == own.der(), "the new certificate")
        wait_for(lambda: ends(node, context) == {"": own.end()}, "the figure to follow")
        assert kept.get("/health").status_code == 200
    good = own.der()
    own.certificate.write_text("this is none")
    wait_for(lambda: "keeping the old certificate" in node.output(), "its refusal")
    assert served(node.port, context) == good


def test_a_node_with_mutual_tls_tells_when_its_certificate_ends_also_when_it_has(start: Start, tmp_path: Path) -> None:
    fleet = Authority(tmp_path)
    gate = fleet.client(fleet.issue("gate"))
    gate.verify_flags |= 0x200000  # X509_V_FLAG_NO_CHECK_TIME
    own = fleet.issue("node", days=-1)
    node = ready(start("llmnode", *flags(own, fleet)), gate)
    assert ends(node, gate) == {"": own.end()}


def test_a_node_without_tls_tells_of_no_certificate(start: Start) -> None:
    node = start("llmnode", "--backend", "fake")
    wait_for(lambda: node.get("/health") is not None, "the node")
    assert told_ends(httpx.get(node.url + "/metrics", timeout=10).text) == {}


def test_a_reload_of_a_pair_that_does_not_fit_keeps_the_old_one(start: Start, tmp_path: Path) -> None:
    fleet = Authority(tmp_path)
    own, context = fleet.issue("node"), fleet.client()
    node = ready(start("llmnode", *flags(own)), context)
    before = own.der()
    own.certificate.write_bytes(fleet.issue("other").certificate.read_bytes())
    node.signal(signal.SIGHUP)
    wait_for(lambda: "keeping the old certificate" in node.output(), "its refusal")
    assert "key values mismatch" in node.output()
    assert served(node.port, context) == before


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--tls-cert-file", "{crt}"], "tls_cert_file and tls_key_file must be set together, got {crt} and (not set)"),
        (["--tls-client-ca-file", "{crt}"], "must be set together, got (not set) and (not set)"),
        (["--tls-cert-file", "{crt}", "--tls-key-file", "/no/key"], "cannot read tls_key_file /no/key: No such file"),
        (["--tls-cert-file", "{key}", "--tls-key-file", "{key}"], "cannot be used together: "),
        (
            ["--tls-cert-file", "{crt}", "--tls-key-file", "{key}", "--tls-client-ca-file", "{key}"],
            "tls_client_ca_file {key} holds no certificate",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(start: Start, tmp_path: Path, given: list[str], complaint: str) -> None:
    own = Authority(tmp_path).issue("node")
    names = {"crt": own.certificate, "key": own.key}
    node = start("llmnode", "--backend", "fake", *(word.format(**names) for word in given))
    assert node.wait() == 2
    assert complaint.format(**names) in node.output()
    assert "PRIVATE" not in node.output()
