"""One trace from the gate through its attempts to the work of the nodes, as a collector of OpenTelemetry's gets it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Start
from tests.processes import Program, free_port, wait_for
from tests.system.collector import Collector, Seen, collector
from tests.system.fleet import Fleet, create_key

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER, CALLER, INSIDE = 2, 3, 1
CHAT = "POST /v1/chat/completions"
ASKED = {"model": "test", "messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"32": -100}}
TOKEN = "collector-token-0123456789"


@pytest.fixture(scope="module")
def there() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def fleet(start_module: Start, tmp_path_factory: pytest.TempPathFactory, there: Collector) -> Fleet:
    """A gate and two slow nodes that tell traces to `there`."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "headers").write_text(f"authorization=Bearer {TOKEN}\n")
    told = ("--otlp-endpoint", there.url, "--otlp-headers-file", str(folder / "headers"))
    nodes = {
        name: start_module(
            "llmnode", "--name", name, "--backend", "fake", "--model-id", "test", "--slots", "4",
            "--fake-step-delay-s", "0.02", *told,
        )
        for name in ("a", "b")
    }  # fmt: skip
    (folder / "nodes.toml").write_text("".join(f'[[nodes]]\nname = "{n}"\nurl = "{p.url}"\n' for n, p in nodes.items()))
    state = folder / "state"
    state.mkdir()
    key, admin = create_key(state, "client"), create_key(state, "operator", "--admin")
    gate = start_module(
        "llmgate", "--nodes-file", str(folder / "nodes.toml"), "--state-dir", str(state), "--request-log",
        str(folder / "log"), "--poll-interval-s", "0.2", "--slow-start-s", "0", *told, port=free_port(),
    )  # fmt: skip
    for node in nodes.values():
        node.ready()
    made = Fleet(gate.ready(), nodes, key, admin, folder / "log")
    made.usable(2)
    return made


def ask(fleet: Fleet, body: dict[str, Any], parent: str = "", **headers: str) -> httpx.Response:
    sent = {"authorization": f"Bearer {fleet.key}", **headers} | ({"traceparent": parent} if parent else {})
    return httpx.post(fleet.gate.url + "/v1/chat/completions", json={**ASKED, **body}, headers=sent, timeout=120)


def of(spans: list[Seen], service: str, name: str) -> list[Seen]:
    return [span for span in spans if (span.service, span.name) == (service, name)]


def test_a_clients_trace_goes_on_through_the_gate_to_the_work_of_the_node(fleet: Fleet, there: Collector) -> None:
    answer = ask(fleet, {"max_tokens": 5}, f"00-{TRACE}-{CLIENT}-01", tracestate="vendor=1")
    assert answer.status_code == 200, answer.text
    spans = there.trace(TRACE, CHAT, CHAT, "queue", "queue", "chat test", "prefill", "decode")
    (door,), (waited,), (attempt,) = (of(spans, "llmgate", name) for name in (CHAT, "queue", "chat test"))
    (node,), *parts = (of(spans, "llmnode", name) for name in (CHAT, "queue", "prefill", "decode"))
    assert [span.parent for span in (door, waited, attempt, node)] == [CLIENT, door.id, door.id, attempt.id]
    assert [span.parent for (span,) in parts] == [node.id] * 3
    assert [door.kind, waited.kind, attempt.kind, node.kind] == [SERVER, INSIDE, CALLER, SERVER]
    assert len({span.id for span in spans}) == len(spans) == 7
    ((queue,), (prefill,), (decode,)) = parts
    assert queue.ended == prefill.began
    assert prefill.ended == decode.began
    assert door.began <= attempt.began <= attempt.ended <= door.ended
    assert decode.ended - decode.began >= 4 * 0.02 * 0.9, "five tokens are four steps behind the first"
    assert not any(span.failed for span in spans)

    usage = answer.json()["usage"]
    for span in (door, node):
        assert span.attributes["gen_ai.operation.name"] == "chat"
        assert span.attributes["gen_ai.request.model"] == "test"
        assert span.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert span.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 5
        assert span.attributes["http.response.status_code"] == 200
        assert span.attributes["llmrack.request_id"] == answer.headers["x-request-id"]
    assert node.attributes["gen_ai.response.id"] == answer.json()["id"]
    by = answer.headers["x-llmrack-node"]
    assert attempt.attributes["llmrack.node"] == by
    assert attempt.attributes["server.port"] == fleet.nodes[by].port
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in there.headers)


def test_an_answer_that_moved_is_one_trace_with_a_link_to_what_broke(fleet: Fleet, there: Collector) -> None:
    trace = "1" * 32
    got: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: got.append(ask(fleet, {"max_tokens": 60, "ignore_eos": True}, f"00-{trace}-{CLIENT}-01"))
    )
    asking.start()
    busy = wait_for(lambda: next((name for name, node in fleet.nodes.items() if decoded(node) > 15), ""), "an answer")
    before = decoded(fleet.nodes[busy])
    wait_for(lambda: decoded(fleet.nodes[busy]) > before + 5, "more of it")
    fleet.nodes[busy].signal(signal.SIGKILL)
    asking.join()
    assert got[0].status_code == 200, got[0].text
    spans = there.trace(trace, CHAT, "chat test", "chat test", "POST /resume", "decode")
    broke, went_on = of(spans, "llmgate", "chat test")
    (node,) = of(spans, "llmnode", "POST /resume")
    assert broke.attributes["llmrack.node"] == busy
    assert broke.failed
    assert broke.attributes["error.type"] == "broke"
    assert went_on.links == [broke.id]
    assert went_on.attributes["llmrack.resume"] is True
    assert not went_on.failed
    assert node.parent == went_on.id
    assert node.attributes["gen_ai.operation.name"] == "chat"
    assert node.attributes["llmrack.committed_ids"] == broke.attributes["llmrack.committed_ids"] > 0
    (door,) = of(spans, "llmgate", CHAT)
    assert door.attributes["llmrack.resumed"] == 1
    assert door.attributes["gen_ai.usage.output_tokens"] == 60


def decoded(node: Program) -> int:
    page = node.get("/metrics")
    rows = page.text.splitlines() if page else []
    head = 'llmnode_engine_tokens_total{kind="completion"}'
    return next((int(float(row.split()[1])) for row in rows if row.startswith(head)), 0)


def test_a_trace_that_its_client_does_not_want_recorded_is_not(fleet: Fleet, there: Collector) -> None:
    unwanted, wanted = "2" * 32, "3" * 32
    assert ask(fleet, {"max_tokens": 1}, f"00-{unwanted}-{CLIENT}-00").status_code == 200
    assert ask(fleet, {"max_tokens": 1}, f"00-{wanted}-{CLIENT}-01").status_code == 200
    there.trace(wanted, CHAT, CHAT, "decode")
    assert [span for span in there.spans if span.trace == unwanted] == []


def test_who_shows_no_key_leaves_no_trace(fleet: Fleet, there: Collector) -> None:
    refused, wanted = "4" * 32, "5" * 32
    assert ask(fleet, {}, f"00-{refused}-{CLIENT}-01", authorization="Bearer nobody").status_code == 401
    assert ask(fleet, {"messages": 1}, f"00-{wanted}-{CLIENT}-01").status_code == 400
    (door,) = of(there.trace(wanted, CHAT, CHAT), "llmgate", CHAT)
    assert not door.failed, "a client's mistake is no failure of the server"
    assert [span for span in there.spans if span.trace == refused] == []


def test_traces_begin_at_the_gate_for_who_brings_none(fleet: Fleet, there: Collector) -> None:
    answer = ask(fleet, {"max_tokens": 1})

    def found() -> list[Seen] | None:
        id = answer.headers["x-request-id"]
        seen = [span for span in list(there.spans) if span.attributes.get("llmrack.request_id") == id]
        return seen if len(seen) == 2 else None

    door, node = sorted(wait_for(found, "both spans of the request"), key=lambda span: span.service)
    assert door.trace == node.trace
    assert door.parent == ""


def test_a_collector_that_is_away_costs_nobody_anything_and_is_told_of_once(
    start: Start, tmp_path: Path, there: Collector
) -> None:
    node = start(
        "llmnode", "--backend", "fake", "--model-id", "test", "--otlp-endpoint", f"http://127.0.0.1:{free_port()}"
    )
    node.ready()
    for _ in range(3):
        answer = httpx.post(node.url + "/v1/chat/completions", json={**ASKED, "max_tokens": 1}, timeout=60)
        assert answer.status_code == 200
        wait_for(lambda: "traces cannot be sent to" in node.output(), "the one complaint")
    node.signal(signal.SIGTERM)
    assert node.wait() == 0
    assert node.output().count("traces cannot be sent to") == 1
    assert "Traceback" not in node.output()


@pytest.mark.parametrize("program", ["llmnode", "llmgate"])
def test_a_program_that_lacks_the_packages_for_traces_says_so_before_it_starts(program: str, tmp_path: Path) -> None:
    (tmp_path / "nodes.toml").write_text('[[nodes]]\nname = "a"\nurl = "http://127.0.0.1:1"\n')
    gate = ["--nodes-file", str(tmp_path / "nodes.toml"), "--state-dir", str(tmp_path)]
    code = f"import sys; sys.modules['opentelemetry'] = None; from {program}.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--port", str(free_port()), "--otlp-endpoint", "http://127.0.0.1:4318"]
        + (["--backend", "fake"] if program == "llmnode" else gate),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "install llmrack[telemetry]" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("program", ["llmnode", "llmgate"])
def test_without_a_collector_nothing_of_opentelemetry_is_loaded(program: str) -> None:
    code = f"""
import sys
from {program} import app
from llmnode.service import traces
assert traces.start(traces.Receiver(""), name="x") is None
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
