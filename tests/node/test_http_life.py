"""The life of a node, seen from outside: loading, clients that leave, draining, systemd, what it says of itself."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnode.wire.node import Report, State
from tests.conftest import Start
from tests.processes import Program, wait_for

ENDLESS = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True, "max_tokens": 4000}
SLOW = ("--backend", "fake", "--fake-step-delay-s", "0.02")


class Reader:
    """A client that reads a stream in a thread, so that the test can do something else meanwhile."""

    def __init__(self, node: Program, path: str = "/v1/chat/completions", **more: Any) -> None:
        self.text = ""
        self.status: int | None = None
        self.error: Exception | None = None
        self._body = {**ENDLESS, "stream": True, **more}
        self._url = node.url + path
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
                self.status = response.status_code
                for piece in response.iter_text():
                    self.text += piece
        except httpx.HTTPError as error:
            self.error = error

    def speaking(self) -> Reader:
        wait_for(lambda: "content" in self.text, "the first piece of a stream")
        return self

    def finish(self) -> str:
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.text


class Systemd:
    """The receiving end of sd_notify: a real datagram socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self._heard = ""

    def heard(self, what: str) -> bool:
        try:
            while True:
                self._heard += self._socket.recv(4096).decode() + "\n"
        except BlockingIOError:
            return what in self._heard

    def forget(self) -> None:
        self.heard("")
        self._heard = ""

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    listener = Systemd(tmp_path / "notify")
    yield listener
    listener.close()


def report(node: Program) -> Report:
    return Report.parse(httpx.get(node.url + "/node", timeout=10).json())


def metric(node: Program, name: str) -> float:
    lines = httpx.get(node.url + "/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize(("stream", "size"), [(True, 0), (False, 0), (False, 4_000_000)])
def test_a_client_that_leaves_frees_its_slot(start: Start, stream: bool, size: int) -> None:
    node = start("llmnode", *SLOW, "--slots", "1").ready()
    with socket.create_connection(("127.0.0.1", node.port)) as raw:
        body = json.dumps({**ENDLESS, "stream": stream, "padding": "x" * size}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        raw.sendall(head + body)
        wait_for(lambda: report(node).load.running == 1, "the request to run")
    wait_for(lambda: report(node).load.running == 0, "the slot to be free")
    assert metric(node, 'llmnode_engine_requests_total{end="cancelled"}') == 1
    wait_for(lambda: "status=499" in node.output(), "the access line of the client that left")
    assert "Traceback" not in node.output()


def test_a_waiting_client_that_leaves_is_forgotten(start: Start) -> None:
    node = start("llmnode", *SLOW, "--slots", "1").ready()
    first = Reader(node, max_tokens=100).speaking()
    with pytest.raises(httpx.TimeoutException):
        httpx.post(node.url + "/v1/chat/completions", json=ENDLESS, timeout=0.3)
    wait_for(lambda: report(node).load.waiting == 0, "the queue to be empty")
    assert first.finish().endswith("data: [DONE]\n\n")


def test_many_streams_run_side_by_side(start: Start) -> None:
    node = start("llmnode", *SLOW, "--slots", "4").ready()
    readers = [Reader(node, max_tokens=100) for _ in range(4)]
    wait_for(lambda: report(node).load.running == 4, "four requests at the same time")
    assert all(reader.finish().endswith("data: [DONE]\n\n") for reader in readers)
    wait_for(lambda: report(node).load.running == 0, "all slots to be free")


def test_a_reader_that_stops_reading_holds_up_nobody(start: Start) -> None:
    node = start("llmnode", "--backend", "fake", "--slots", "2", "--n-ctx", "30000").ready()
    with socket.create_connection(("127.0.0.1", node.port)) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({**ENDLESS, "max_tokens": 20000, "stream": True}).encode()
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert Reader(node, max_tokens=50).finish().endswith("data: [DONE]\n\n")
        # All of the answer is computed though its reader has taken none of it: it waits in the mailbox.
        wait_for(lambda: metric(node, 'llmnode_engine_tokens_total{kind="completion"}') >= 20050, "the whole answer")
        assert httpx.get(node.url + "/health", timeout=10).status_code == 200


def test_sigterm_lets_running_answers_finish_and_takes_no_new_ones(start: Start) -> None:
    node = start("llmnode", *SLOW).ready()
    running = Reader(node, max_tokens=150).speaking()
    node.signal(signal.SIGTERM)

    def draining() -> bool:
        answer = node.get("/ready")
        return answer is not None and answer.status_code == 503

    wait_for(draining, "/ready to say no")
    assert report(node).state is State.DRAINING
    refusal = httpx.post(node.url + "/v1/chat/completions", json=ENDLESS, timeout=10)
    assert refusal.status_code == 503
    assert refusal.json()["error"]["code"] == "draining"
    assert int(refusal.headers["retry-after"]) >= 1
    assert httpx.get(node.url + "/health", timeout=10).status_code == 200
    assert running.finish().endswith("data: [DONE]\n\n")
    assert node.wait() == 0


def test_what_is_left_when_the_drain_ends_gets_an_error_event(start: Start) -> None:
    node = start("llmnode", *SLOW, "--drain-seconds", "0.5").ready()
    stream = Reader(node).speaking()
    whole = Reader(node, stream=False)
    wait_for(lambda: report(node).load.running == 2, "both to run")
    node.signal(signal.SIGTERM)
    last = stream.finish().rstrip().rpartition("\n")[2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "node_stopping"
    assert "[DONE]" not in stream.text
    assert json.loads(whole.finish())["error"]["code"] == "node_stopping"
    assert whole.status == 503
    assert node.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(start: Start, number: signal.Signals) -> None:
    node = start("llmnode", *SLOW, "--drain-seconds", "1000").ready()
    stream = Reader(node).speaking()
    node.signal(number)
    wait_for(lambda: "draining 1 requests" in node.output(), "the drain to begin")
    node.signal(number)
    assert node.wait() == 0
    stream.finish()
    assert "Traceback" not in node.output()


def test_ctrl_c_on_an_idle_node_ends_it_quietly(start: Start) -> None:
    node = start("llmnode", "--backend", "fake").ready()
    node.signal(signal.SIGINT)
    assert node.wait() == 0
    assert "Traceback" not in node.output()
    assert "WARNING" not in node.output()


def test_systemd_is_told_of_each_stage(start: Start, systemd: Systemd) -> None:
    env = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "400000"}
    node = start("llmnode", *SLOW, env=env).ready()
    wait_for(lambda: systemd.heard("READY=1\nSTATUS=ready: 0 running, 0 waiting, 0.0 tokens/s"), "READY=1")
    assert systemd.heard("EXTEND_TIMEOUT_USEC=")
    systemd.forget()
    for _ in range(2):
        wait_for(lambda: systemd.heard("WATCHDOG=1"), "the watchdog to be fed")
        systemd.forget()
    reader = Reader(node).speaking()
    wait_for(lambda: systemd.heard("STATUS=ready: 1 running, 0 waiting, "), "a status line")
    node.signal(signal.SIGTERM)
    wait_for(lambda: systemd.heard("STOPPING=1\nSTATUS=draining: 1 running"), "STOPPING=1")
    systemd.forget()
    wait_for(lambda: systemd.heard("WATCHDOG=1"), "the watchdog to be fed while draining")
    node.signal(signal.SIGTERM)
    reader.finish()


def test_a_manager_that_does_not_listen_holds_up_nobody(start: Start, systemd: Systemd) -> None:
    """Its socket is there and nothing reads it, so the queue between the two is full after some messages."""
    node = start("llmnode", "--backend", "fake", env={"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "20000"})
    node.ready()
    for _ in range(20):
        assert httpx.get(node.url + "/health", timeout=10).status_code == 200
    node.signal(signal.SIGKILL)  # its goodbye is said once, so it would wait for the listener


@pytest.mark.timeout(300)
def test_a_wedged_step_fails_health_and_starves_the_watchdog(start: Start, systemd: Systemd) -> None:
    env = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "400000"}
    node = start("llmnode", "--backend", "fake", "--fake-step-delay-s", "1000", env=env).ready()
    # One token: what a step may take grows with its tokens, and this test waits for that time to pass.
    Reader(node, path="/v1/completions", prompt=[104])

    def sick() -> httpx.Response | None:
        answer = node.get("/health")
        return answer if answer is not None and answer.status_code == 503 else None

    answer = wait_for(sick, "/health to notice")
    assert "step" in answer.json()["error"]["message"]
    systemd.forget()
    wait_for(lambda: "the watchdog is not fed" in node.output(), "the log to say so")
    assert not systemd.heard("WATCHDOG=1")
    ready = node.get("/ready")
    assert ready is not None and ready.status_code == 503
    assert "step" in report(node).why


def test_node_reports_itself_and_answers_304_when_nothing_changed(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('backend = "fake"\nmodel_id = "m"\naliases = ["other"]\nslots = 3\nn_ctx = 500\n')
    node = start("llmnode", "--config", str(config)).ready()
    said = report(node)
    (model,) = said.models
    assert (said.state, said.protocol, said.progress) == (State.READY, 1, 1.0)
    assert (model.id, model.aliases, model.n_ctx) == ("m", ("other",), 500)
    assert (said.load.slots, said.load.kv_cells) == (3, 1500)
    assert len(said.config) == 16 and said.boot
    assert said.host.cpu_count >= 1 and said.host.memory_total_bytes > 0 and said.host.process_rss_bytes > 0

    def unchanged() -> bool:
        first = httpx.get(node.url + "/node", timeout=10)
        again = httpx.get(node.url + "/node", headers={"if-none-match": first.headers["etag"]}, timeout=10)
        return again.status_code == 304 and not again.content

    wait_for(unchanged, "a 304")
    etag = httpx.get(node.url + "/node", timeout=10).headers["etag"]
    node.signal(signal.SIGTERM)
    node.wait()
    second = start("llmnode", "--config", str(config)).ready()
    assert httpx.get(second.url + "/node", headers={"if-none-match": etag}, timeout=10).status_code == 200


def test_metrics_count_what_happened(start: Start) -> None:
    node = start("llmnode", "--backend", "fake").ready()
    asked = {**ENDLESS, "max_tokens": 10}
    prompt = httpx.post(node.url + "/v1/chat/completions", json=asked, timeout=60).json()["usage"]["prompt_tokens"]
    httpx.post(node.url + "/v1/chat/completions", json={**asked, "stream": True}, timeout=60)
    httpx.post(node.url + "/v1/chat/completions", json={"n": 2}, timeout=60)
    httpx.get(node.url + "/no/such/path", timeout=60)
    wait_for(lambda: metric(node, 'llmnode_requests_total{route="/v1/chat/completions",status="200"}') == 2, "both")
    assert metric(node, 'llmnode_requests_total{route="/v1/chat/completions",status="400"}') == 1
    assert metric(node, 'llmnode_requests_total{route="unknown",status="404"}') == 1
    assert metric(node, 'llmnode_tokens_total{kind="completion"}') == 20
    assert metric(node, 'llmnode_tokens_total{kind="prompt"}') == 2 * prompt
    assert metric(node, "llmnode_time_to_first_token_seconds_count") == 2
    assert metric(node, "llmnode_inter_token_seconds_count") > 0
    assert metric(node, "llmnode_engine_steps_total") > 0
    assert metric(node, "llmnode_engine_seconds_total") > 0
    assert metric(node, "llmnode_host_memory_bytes") > 0


def test_each_request_leaves_one_line_with_its_id_and_cost(start: Start) -> None:
    node = start("llmnode", "--backend", "fake", "--log-format", "json").ready()
    asked = {**ENDLESS, "max_tokens": 10, "stream": True}
    httpx.post(node.url + "/v1/chat/completions", json=asked, headers={"x-request-id": "mine"}, timeout=60)

    def lines() -> list[Any]:
        return [json.loads(line) for line in node.output().splitlines() if '"mine"' in line]

    wait_for(lines, "the access line")
    (line,) = lines()
    assert line["logger"] == "llmnode.access"
    assert (line["status"], line["method"], line["path"]) == (200, "POST", "/v1/chat/completions")
    assert line["completion_tokens"] == 10
    assert line["prompt_tokens"] > 0 and line["ms"] > 0 and line["first_token_ms"] > 0
