"""The gate's door behind TLS, and its connections to nodes that want a certificate. The nodes are real ones."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
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


def test_new_certificates_are_taken_without_a_reload_and_open_connections_stay(fleet: Fleet) -> None:
    """As certbot does it: a link is moved to the new files. Those for nodes are written anew, in place."""
    live = fleet.folder / "live"
    live.symlink_to(fleet.folder)
    first, fleet.door = fleet.door, Pair(live / "door.crt", live / "door.key")
    gate = fleet.run(node(fleet.start, fleet.internal, fleet.internal.issue("node")), "--workers", "2")
    fleet.ready()
    body = {**CHAT, "ignore_eos": True, "max_tokens": 100}
    with (
        httpx.Client(base_url=gate.url, verify=fleet.context, timeout=60) as kept,
        httpx.stream("POST", gate.url + "/v1/chat/completions", json=body, verify=fleet.context, timeout=60) as stream,
    ):
        before = kept.get("/health").json()
        pieces = stream.iter_text()
        next(pieces)
        newer = fleet.folder / "newer"
        newer.mkdir()
        fleet.public._folder = newer
        second = fleet.public.issue("door", days=2)
        fleet.internal.issue("gate", days=3)
        draft = fleet.folder / "live.new"
        draft.symlink_to(newer)
        draft.replace(live)
        # Each worker takes it by itself: enough connections to have met both.
        wait_for(
            lambda: {served(gate.port, fleet.context) for _ in range(16)} == {second.der()},
            "the new one, from all workers",
        )
        wait_for(lambda: fleet.ends() == {"clients": second.end(), "nodes": fleet.own.end()}, "the figures to follow")
        assert "".join(pieces).endswith("data: [DONE]\n\n")
        assert kept.get("/health").json() == before, "the same connection, worker and generation"
    assert first.der() != second.der()
    answer = httpx.post(gate.url + "/v1/chat/completions", json=CHAT, verify=fleet.context, timeout=60)
    assert answer.status_code == 200


def test_a_pair_that_does_not_fit_is_said_once_and_the_old_one_stays_until_it_does(fleet: Fleet) -> None:
    gate = fleet.run(node(fleet.start, fleet.internal, fleet.internal.issue("node")))
    fleet.ready()
    before, end = fleet.door.der(), fleet.door.end()
    other = fleet.public.issue("other", days=2)
    fleet.door.certificate.write_bytes(other.certificate.read_bytes())
    wait_for(lambda: "the new certificate for clients is refused, the old one stays" in gate.output(), "the refusal")
    assert "key values mismatch" in gate.output()
    time.sleep(2)
    assert gate.output().count("is refused") == 1
    assert served(gate.port, fleet.context) == before and fleet.ends()["clients"] == end
    fleet.door.key.write_bytes(other.key.read_bytes())
    wait_for(lambda: served(gate.port, fleet.context) == other.der(), "the whole new pair")
    assert fleet.ends()["clients"] == other.end()


def test_a_client_that_begins_a_handshake_and_no_more_costs_a_place_for_a_while(fleet: Fleet) -> None:
    gate = fleet.run(
        node(fleet.start, fleet.internal, fleet.internal.issue("node")), "--connections-limit", "4",
        "--receive-timeout-s", "1",
    )  # fmt: skip
    fleet.ready()
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", gate.port), timeout=60))
        assert fleet.answers("/health"), "the oldest gave way"
        assert silent.recv(1) == b"", "the last was given its second, and no more"
    assert "closed: " in gate.output() and "that had asked for nothing" in gate.output()
    assert "Traceback" not in gate.output()


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
