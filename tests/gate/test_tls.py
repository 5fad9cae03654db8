"""The gate's door behind TLS, and its connections to nodes that want a certificate. The nodes are real ones."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest

from tests.certificates import Authority, Pair, served, told_ends
from tests.conftest import Start
from tests.processes import Program, free_port, wait_for

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "stream": True}


def node(start: Start, authority: Authority, own: Pair) -> Program:
    pair = ("--tls-cert-file", str(own.certificate), "--tls-key-file", str(own.key))
    asked = ("--tls-client-ca-file", str(authority.file))
    return start("llmnode", "--backend", "fake", "--fake-step-delay-s", "0.02", *pair, *asked)


class Fleet:
    """A gate with TLS on both sides, in front of one node."""

    def __init__(self, start: Start, folder: Path) -> None:
        self.folder, self.start = folder, start
        self.public, self.internal = Authority(folder, "public"), Authority(folder, "internal")
        self.door, self.own = self.public.issue("door"), self.internal.issue("gate")
        self.context = self.public.client()
        self.host = "127.0.0.1"

    def run(self, node: Program, *more: str, shown: Pair | None = None) -> Program:
        (self.folder / "nodes.toml").write_text(f'[[nodes]]\nname = "n"\nurl = "https://{self.host}:{node.port}"\n')
        door = ("--tls-cert-file", str(self.door.certificate), "--tls-key-file", str(self.door.key))
        shown = shown or self.own
        inner = ("--node-cert-file", str(shown.certificate), "--node-key-file", str(shown.key))
        files = ("--nodes-file", str(self.folder / "nodes.toml"), "--state-dir", str(self.folder / "state"))
        rest = ("--require-keys", "false", "--poll-interval-s", "0.1")
        self.gate = self.start(
            "llmgate", *files, *door, "--node-ca-file", str(self.internal.file), *inner, *rest, *more
        )
        self.gate.url = self.gate.url.replace("http:", "https:")
        return self.gate

    def answers(self, path: str) -> bool:
        assert self.gate.process.poll() is None, self.gate.output()
        answer = self.gate.get(path, verify=self.context)
        return answer is not None and answer.status_code == 200

    def ends(self) -> dict[str, float]:
        """When the certificates end that the gate shows, by its own account."""
        return told_ends(httpx.get(self.gate.url + "/metrics", verify=self.context, timeout=10).text)

    def ready(self) -> None:
        wait_for(lambda: self.answers("/ready"), "the gate's /ready")


@pytest.fixture
def fleet(start: Start, tmp_path: Path) -> Fleet:
    return Fleet(start, tmp_path)


def test_a_stream_passes_a_door_with_tls_and_a_node_with_mutual_tls(fleet: Fleet) -> None:
    gate = fleet.run(node(fleet.start, fleet.internal, fleet.internal.issue("node")))
    fleet.ready()
    answer = httpx.post(gate.url + "/v1/chat/completions", json=CHAT, verify=fleet.context, timeout=60)
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    with pytest.raises(httpx.TransportError):
        httpx.get(gate.url.replace("https:", "http:") + "/health", timeout=10)
    assert "Traceback" not in gate.output()


def test_a_gate_with_another_authoritys_certificate_gets_nothing(fleet: Fleet) -> None:
    gate = fleet.run(
        node(fleet.start, fleet.internal, fleet.internal.issue("node")), shown=fleet.public.issue("stranger")
    )
    wait_for(lambda: "node n takes no work: unreachable" in gate.output(), "the gate to say so")
    assert not fleet.answers("/ready")


@pytest.mark.parametrize("other", ["authority", "address"])
def test_a_node_that_is_not_who_it_should_be_gets_no_request(fleet: Fleet, other: str) -> None:
    own = fleet.public.issue("node") if other == "authority" else fleet.internal.issue("node", "192.0.2.1")
    gate = fleet.run(node(fleet.start, fleet.internal, own))
    wait_for(lambda: "its certificate is not good: " in gate.output(), "the gate to say so")
    why = "unable to get local issuer" if other == "authority" else "IP address mismatch"
    assert why in gate.output()
    assert not fleet.answers("/ready")


def test_a_reload_takes_new_certificates_on_both_sides_and_cuts_no_stream(fleet: Fleet) -> None:
    gate = fleet.run(node(fleet.start, fleet.internal, fleet.internal.issue("node")))
    fleet.ready()
    first = fleet.door.der()
    assert fleet.ends() == {"clients": fleet.door.end(), "nodes": fleet.own.end()}
    body = {**CHAT, "ignore_eos": True, "max_tokens": 200}
    url = gate.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=body, verify=fleet.context, timeout=60) as stream:
        pieces = stream.iter_text()
        next(pieces)
        fleet.public.issue("door", days=2)
        fleet.internal.issue("gate", days=3)
        gate.signal(signal.SIGHUP)
        wait_for(lambda: served(gate.port, fleet.context) == fleet.door.der() != first, "the new certificate")
        assert "".join(pieces).endswith("data: [DONE]\n\n")
    answer = httpx.post(url, json=CHAT, verify=fleet.context, timeout=60)
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert fleet.ends() == {"clients": fleet.door.end(), "nodes": fleet.own.end()}


def test_a_reload_of_a_key_that_does_not_fit_is_refused_and_nothing_changes(fleet: Fleet) -> None:
    gate = fleet.run(node(fleet.start, fleet.internal, fleet.internal.issue("node")))
    fleet.ready()
    before = fleet.door.der()
    fleet.door.certificate.write_bytes(fleet.public.issue("other").certificate.read_bytes())
    gate.signal(signal.SIGHUP)
    wait_for(lambda: "is refused, generation 1 stays" in gate.output(), "the refusal")
    assert "key values mismatch" in gate.output()
    assert served(gate.port, fleet.context) == before


def test_check_and_nodes_use_the_same_certificates(fleet: Fleet) -> None:
    behind = node(fleet.start, fleet.internal, fleet.internal.issue("node"))
    fleet.run(behind)
    fleet.ready()
    command = [*fleet.gate.command[:3], "nodes", *fleet.gate.command[6:]]
    seen = Program("llmgate", [], behind.port, fleet.folder / "said.log", command=command)
    assert seen.wait() == 0, seen.output()
    assert f"https://127.0.0.1:{behind.port}" in seen.output()
    broken = ["--node-cert-file", str(fleet.own.certificate), "--node-key-file", str(fleet.door.key)]
    command = [*fleet.gate.command[:3], "check", *fleet.gate.command[6:], *broken]
    refused = Program("llmgate", [], free_port(), fleet.folder / "refused.log", command=command)
    assert refused.wait() == 2
    assert "node_cert_file" in refused.output() and "key values mismatch" in refused.output()
