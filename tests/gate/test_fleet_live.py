"""The gate's view of its nodes: polls, the nodes file, drain leases, and its own life."""

from __future__ import annotations

import hashlib
import signal
import socket
import threading
from collections.abc import Callable

import httpx
import pytest

from llmnode.service.release import release
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import free_port, wait_for

Mock = Callable[..., MockNode]
Two = tuple[GateUnderTest, MockNode, MockNode]


def drain(gate: GateUnderTest, name: str, **body: object) -> httpx.Response:
    with gate.client() as client:
        return client.post(f"/admin/nodes/{name}/drain", json=body)


def undrain(gate: GateUnderTest, name: str, **query: str) -> httpx.Response:
    with gate.client() as client:
        return client.delete(f"/admin/nodes/{name}/drain", params=query)


def ready_status(gate: GateUnderTest) -> int:
    return httpx.get(gate.url + "/ready").status_code


def test_a_node_that_goes_and_comes_back_is_noticed_both_ways(two: Two, mock: Mock) -> None:
    gate, a, _ = two
    a.stop()
    gone = gate.wait_node("a", lambda node: not node["usable"])
    assert (gone["state"], gone["why"]) == ("unreachable", "connection refused")
    mock("a", port=a.port)
    gate.wait_node("a", lambda node: node["usable"])
    assert gate.program is not None
    log = gate.program.output()
    assert log.count("node a takes no work: unreachable") == 1
    assert log.count("node a is up") == 2


def test_a_node_that_hangs_delays_no_other_and_goes_stale(gate: GateUnderTest, mock: Mock) -> None:
    a, b = mock("a"), mock("b")
    gate.list_nodes(a, b)
    gate.run("--stale-after-s", "2")
    gate.wait_node("a", lambda node: node["usable"])
    a.hold = "poll"
    before = b.polls
    hung = gate.wait_node("a", lambda node: not node["usable"])
    assert hung["state"] in ("stale", "unreachable")
    assert b.polls > before + 2
    assert gate.chat().headers["x-llmrack-node"] == "b"
    a.hold = ""
    gate.wait_node("a", lambda node: node["usable"])


def test_polls_use_etags(two: Two) -> None:
    _, a, _ = two
    wait_for(lambda: a.not_modified > 3, "polls answered with 304")


def test_the_less_loaded_node_is_chosen(two: Two) -> None:
    gate, a, b = two
    a.say(load={"running": 3})
    b.say(load={"running": 1})
    gate.wait_node("a", lambda node: node["load"]["running"] == 3)
    gate.wait_node("b", lambda node: node["load"]["running"] == 1)
    for _ in range(3):
        assert gate.chat().headers["x-llmrack-node"] == "b"


def test_running_work_counts_before_any_poll_says_so(two: Two) -> None:
    gate, a, b = two
    a.hold = b.hold = "post"
    threads = [threading.Thread(target=gate.chat) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(a.requests) + len(b.requests) == 4, "four requests at the nodes")
    assert len(a.requests) == len(b.requests) == 2
    assert gate.node("a")["in_flight"] == 2
    a.hold = b.hold = ""
    for thread in threads:
        thread.join()
    gate.wait_node("a", lambda node: node["in_flight"] == 0)


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
def test_a_node_that_is_not_ready_gets_no_work(two: Two, state: str) -> None:
    gate, a, b = two
    a.say(state=state, why="because")
    gate.wait_node("a", lambda node: node["state"] == state and node["why"] == "because")
    assert {gate.chat().headers["x-llmrack-node"] for _ in range(3)} == {"b"}
    b.say(state=state)
    gate.wait_node("b", lambda node: not node["usable"])
    answer = gate.chat()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "no_ready_node"
    assert "x-should-retry" not in answer.headers
    assert ready_status(gate) == 503


def test_a_model_of_a_node_not_yet_heard_of_is_not_denied(gate: GateUnderTest, mock: Mock) -> None:
    a, late = mock("a"), mock("b", model="late")
    late.hold = "poll"
    gate.list_nodes(a, late)
    gate.run()
    assert gate.chat(model="late").status_code == 503
    late.hold = ""
    gate.wait_node("b", lambda node: node["usable"])
    assert gate.chat(model="late").status_code == 200
    assert gate.chat(model="never").status_code == 404


def test_the_fleet_token_is_shown_and_a_wrong_one_is_said(gate: GateUnderTest, mock: Mock) -> None:
    token = gate.folder / "token"
    token.write_text("the-fleet-token-0123456789\nthe-old-one-is-of-no-use-here\n")
    good = mock("a", token="the-fleet-token-0123456789")
    bad = mock("b", token="something-else-entirely-0123")
    gate.list_nodes(good, bad)
    gate.run("--fleet-token-file", str(token))
    gate.wait_node("a", lambda node: node["usable"])
    assert "401" in gate.wait_node("b", lambda node: node["state"] == "unreachable")["why"]
    assert gate.chat().status_code == 200
    assert good.requests[-1]["headers"]["authorization"] == "Bearer the-fleet-token-0123456789"
    assert gate.program is not None
    assert "the-fleet-token" not in gate.program.output()


def test_the_nodes_file_is_read_again_and_a_bad_one_refused(two: Two, mock: Mock) -> None:
    gate, a, b = two
    c = mock("c")
    gate.list_nodes(b, c)
    gate.wait_node("c", lambda node: node["usable"])
    with gate.client() as client:
        assert {node["name"] for node in client.get("/admin/nodes").json()["nodes"]} == {"b", "c"}
        assert client.get("/admin/nodes/a").status_code == 404
    gate.nodes_file.write_text('[[nodes]]\nname = "d"\n')
    assert gate.program is not None
    program = gate.program
    wait_for(lambda: "the new nodes file is refused" in program.output(), "the refusal in the log")
    assert "url must look like" in program.output()
    assert gate.chat().status_code == 200
    polls, others = a.polls, b.polls
    wait_for(lambda: b.polls > others + 3, "polls")
    assert a.polls == polls


def test_a_drained_node_gets_no_work_until_its_owner_lifts_it(two: Two) -> None:
    gate, _, b = two
    lease = drain(gate, "a", owner="ansible", ttl_seconds=600, reason="kernel")
    assert lease.status_code == 200, lease.text
    assert lease.json()["owner"] == "ansible"
    assert 590 < lease.json()["ttl_seconds"] <= 600
    seen = gate.node("a")
    assert (seen["state"], seen["usable"], seen["why"]) == ("ready", False, "drained by ansible: kernel")
    assert {gate.chat().headers["x-llmrack-node"] for _ in range(3)} == {"b"}

    other = drain(gate, "a", owner="bob")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "lease_held")
    assert undrain(gate, "a", owner="bob").status_code == 409
    assert undrain(gate, "a").status_code == 400
    assert drain(gate, "a", owner="ansible", ttl_seconds=1200).json()["ttl_seconds"] > 1000

    assert undrain(gate, "a", owner="ansible").json() == {"node": "a", "released": True}
    assert undrain(gate, "a", owner="ansible").json() == {"node": "a", "released": False}
    assert gate.node("a")["usable"]
    assert len(b.requests) == 3


def test_a_drain_that_would_leave_no_room_needs_force(two: Two) -> None:
    gate, a, b = two
    a.say(load={"running": 3})
    b.say(load={"running": 3})
    gate.wait_node("a", lambda node: node["load"]["running"] == 3)
    gate.wait_node("b", lambda node: node["load"]["running"] == 3)
    refused = drain(gate, "a", owner="x", ttl_seconds=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "would_leave_no_room")
    assert "4 ready slots for 6 requests" in refused.json()["error"]["message"]
    assert drain(gate, "a", owner="x", ttl_seconds=60, force=True).status_code == 200
    assert drain(gate, "b", owner="x").status_code == 409
    assert drain(gate, "a", owner="y", ttl_seconds=60, force=True).json()["owner"] == "y"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "owner"),
        ({"owner": ""}, "owner"),
        ({"owner": 5}, "owner"),
        ({"owner": "x\n"}, "owner"),
        ({"owner": "x", "ttl_seconds": 0}, "ttl_seconds"),
        ({"owner": "x", "ttl_seconds": True}, "ttl_seconds"),
        ({"owner": "x", "ttl_seconds": "9"}, "ttl_seconds"),
        ({"owner": "x", "force": 1}, "force"),
        ({"owner": "x", "ttl": 5}, "ttl"),
    ],
)
def test_a_drain_with_a_bad_field_names_it(two: Two, body: dict[str, object], param: str) -> None:
    gate, _, _ = two
    answer = drain(gate, "a", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert drain(gate, "nobody", owner="x").status_code == 404


def test_a_lease_expires_by_itself(two: Two) -> None:
    gate, _, _ = two
    assert drain(gate, "a", owner="dead controller", ttl_seconds=0.5).status_code == 200
    gate.wait_node("a", lambda node: node["usable"] and node["lease"] is None)
    assert gate.program is not None
    assert "has expired" in gate.program.output()


def test_leases_survive_a_restart_of_the_gate(two: Two) -> None:
    gate, _, _ = two
    drain(gate, "a", owner="human")
    assert gate.program is not None
    gate.program.stop()
    gate.run()
    seen = gate.node("a")
    assert seen["lease"]["owner"] == "human"
    assert seen["lease"]["expires_at"] is None
    assert not seen["usable"]
    assert gate.chat().headers["x-llmrack-node"] == "b"


def test_sigterm_refuses_new_work_and_lets_streams_end(two: Two) -> None:
    gate, a, _ = two
    a.fault, a.hold = "wait", "stream"
    assert gate.program is not None
    program = gate.program
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(gate.chat(stream=True)))
    running.start()
    wait_for(lambda: a.open == 1, "the stream to run")
    program.signal(signal.SIGTERM)
    wait_for(lambda: ready_status(gate) == 503, "/ready to say no")
    refused = gate.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"]
    assert program.process.poll() is None
    a.hold = ""
    running.join()
    assert answers[0].content.endswith(b"data: [DONE]\n\n")
    assert program.wait() == 0


@pytest.mark.parametrize("how", ["drain_seconds", "second_sigterm"])
def test_a_drain_of_the_gate_has_an_end(gate: GateUnderTest, mock: Mock, how: str) -> None:
    a = mock("a")
    a.fault = "endless"
    gate.list_nodes(a)
    gate.run("--drain-seconds", "0.2" if how == "drain_seconds" else "600")
    assert gate.program is not None
    failed: list[Exception] = []

    def ask() -> None:
        try:
            gate.chat(stream=True)
        except httpx.HTTPError as error:
            failed.append(error)

    running = threading.Thread(target=ask)
    running.start()
    wait_for(lambda: a.open == 1, "the stream to run")
    gate.program.signal(signal.SIGTERM)
    if how == "second_sigterm":
        wait_for(lambda: ready_status(gate) == 503, "/ready to say no")
        gate.program.signal(signal.SIGTERM)
    assert gate.program.wait() == 0
    running.join()
    assert failed
    assert gate.lines(1)[-1]["end"] == "cut_by_shutdown"


def test_systemd_hears_ready_status_stopping_and_the_watchdog(gate: GateUnderTest, mock: Mock) -> None:
    address = gate.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(60)
        gate.list_nodes(mock("a"))
        gate.environ = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "200000"}
        gate.run()
        heard = ""

        def hear(what: str) -> None:
            nonlocal heard
            while what not in heard:
                heard += manager.recv(4096).decode() + "\n"

        hear("READY=1\nSTATUS=1 of 1 nodes take work")
        hear("WATCHDOG=1")
        assert gate.program is not None
        gate.program.signal(signal.SIGTERM)
        hear("STOPPING=1")
        assert gate.program.wait() == 0


def test_health_says_which_release_and_configuration_run(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    config = gate.folder / "llmgate.toml"
    config.write_text("tries = 2\n")
    gate.run("--config", str(config))
    health = httpx.get(gate.url + "/health").json()
    assert health["config"] == hashlib.sha256(config.read_bytes()).hexdigest()[:16]
    assert health["release"] == release()


def test_bad_configuration_is_exit_2_and_one_clear_line(gate: GateUnderTest, mock: Mock) -> None:
    def refused(*options: str) -> str:
        done = gate.cli("serve", *options)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        return done.stderr

    nodes = ("--nodes-file", str(gate.nodes_file))
    assert "nodes_file is not set" in refused()
    assert "No such file" in refused(*nodes)
    gate.nodes_file.write_text("[[nodes]\n")
    assert "not valid TOML" in refused(*nodes)
    gate.list_nodes(mock("a"))
    assert "tries" in refused(*nodes, "--tries", "0")
    assert "fleet token" in refused(*nodes, "--fleet-token-file", str(gate.folder / "none"))
    short = gate.folder / "short"
    short.write_text("hunter2\n")
    assert "hunter2" not in refused(*nodes, "--fleet-token-file", str(short))
    assert "cannot listen" in refused(*nodes, "--host", "192.0.2.1")
    assert "settings are good" in gate.cli("check", *nodes).stdout
    assert gate.cli("check", *nodes, "--poll-interval-s", "x").returncode == 2


def test_a_port_in_use_is_exit_4_and_named(two: Two) -> None:
    gate, _, _ = two
    assert gate.program is not None
    done = gate.cli("serve", "--nodes-file", str(gate.nodes_file), "--port", str(gate.program.port))
    assert done.returncode == 4
    assert f"127.0.0.1:{gate.program.port}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_database_that_is_none_is_exit_5(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.state.mkdir()
    (gate.state / "llmgate.db").write_text("this is no database, and long enough to be looked at" * 20)
    done = gate.cli("serve", "--nodes-file", str(gate.nodes_file), "--port", str(free_port()))
    assert done.returncode == 5, done.stderr
    assert "llmgate.db" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_nodes_command_shows_each_node(two: Two) -> None:
    gate, _, b = two
    table = gate.cli("nodes", "--nodes-file", str(gate.nodes_file))
    assert table.returncode == 0
    assert "tiny" in table.stdout
    b.stop()
    table = gate.cli("nodes", "--nodes-file", str(gate.nodes_file))
    assert table.returncode == 1
    assert "connection refused" in table.stdout
