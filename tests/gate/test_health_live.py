"""Health of nodes as clients and operators meet it: broken nodes are left alone, tried again, and come back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx

from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import WORDS, MockNode
from tests.processes import wait_for

Mock = Callable[..., MockNode]


def up(gate: GateUnderTest, *names: str) -> None:
    for name in names:
        gate.wait_node(name, lambda node: node["usable"])


def health(gate: GateUnderTest, name: str) -> dict[str, Any]:
    found: dict[str, Any] = gate.node(name)["health"]
    return found


def ask_until(gate: GateUnderTest, done: Callable[[], bool], what: str) -> None:
    """Ask one request after the other until it is so; each of them must be answered."""

    def asked() -> bool:
        answer = gate.chat()
        assert answer.status_code == 200, answer.text
        return done()

    wait_for(asked, what)


def test_a_node_that_fails_everything_is_left_alone_tried_again_and_comes_back(gate: GateUnderTest, mock: Mock) -> None:
    a, b = mock("a"), mock("b")
    gate.list_nodes(a, b)
    gate.run("--eject-after", "3", "--eject-s", "0.1", "--slow-start-s", "0.1")
    up(gate, "a", "b")
    a.fault = "error_500"
    ask_until(gate, lambda: health(gate, "a")["ejections"] >= 1, "the node to be ejected")
    assert len(a.requests) == 3
    ask_until(gate, lambda: health(gate, "a")["ejections"] >= 3, "it to be tried, and ejected again")
    assert len(a.requests) == 5, "one request is enough to see that it is still broken"
    assert health(gate, "a")["level"] == 3

    a.fault = ""
    ask_until(gate, lambda: health(gate, "a")["state"] == "up", "the node to come back")
    assert {gate.chat().headers["x-llmrack-node"] for _ in range(4)} == {"a", "b"}
    assert gate.program is not None
    log = gate.program.output()
    assert log.count("node a takes no work: ejected (refused 500: the mock node says internal_error") == 3
    assert "node a is half open" in log
    assert "node b takes no work" not in log
    metrics = httpx.get(gate.url + "/metrics").text
    assert 'llmgate_node_transitions_total{node="a",to="ejected"} 3.0' in metrics
    assert 'llmgate_node_state{node="a",state="up"} 1.0' in metrics
    assert 'llmgate_node_state{node="a",state="ejected"} 0.0' in metrics
    assert 'llmgate_node_share{node="b"} 1.0' in metrics


def test_an_ejected_node_is_shown_with_the_reason_and_a_restart_clears_its_record(
    gate: GateUnderTest, mock: Mock
) -> None:
    a, b = mock("a"), mock("b")
    gate.list_nodes(a, b)
    gate.run("--eject-after", "2", "--eject-s", "600", "--slow-start-s", "600")
    up(gate, "a", "b")
    a.fault = "hang_up"
    ask_until(gate, lambda: gate.node("a")["state"] == "ejected", "the node to be ejected")
    seen = gate.node("a")
    assert not seen["usable"]
    assert seen["why"].startswith("broke: ")
    assert 0 < seen["health"]["ends_in_seconds"] <= 600
    assert seen["health"]["share"] == 0.0
    a.fault = ""
    a.say(boot="another process")
    gate.wait_node("a", lambda node: node["usable"])
    back = health(gate, "a")
    assert (back["state"], back["ejections"], back["level"]) == ("slow-start", 0, 0)
    assert 0.1 <= back["share"] < 0.5


def test_a_full_node_is_never_ejected(gate: GateUnderTest, mock: Mock) -> None:
    a, b = mock("a"), mock("b")
    a.fault = "refuse_503"
    gate.list_nodes(a, b)
    gate.run("--eject-after", "1")
    up(gate, "a", "b")
    ask_until(gate, lambda: len(a.requests) >= 5, "the full node to be asked")
    seen = health(gate, "a")
    assert (seen["state"], seen["failures_in_a_row"], seen["recent_failed"]) == ("up", 0, 0)


def test_the_last_node_is_asked_however_often_it_fails(gate: GateUnderTest, mock: Mock) -> None:
    a = mock("a")
    a.fault = "error_500"
    gate.list_nodes(a)
    gate.run("--eject-after", "2", "--eject-s", "600")
    up(gate, "a")
    assert [gate.chat().status_code for _ in range(6)] == [500] * 6
    assert gate.node("a")["usable"]
    a.fault = ""
    assert gate.chat().status_code == 200


def test_an_ejected_node_is_called_back_when_the_others_are_gone(gate: GateUnderTest, mock: Mock) -> None:
    a, b = mock("a"), mock("b")
    gate.list_nodes(a, b)
    gate.run("--eject-after", "2", "--eject-s", "600")
    up(gate, "a", "b")
    a.fault = "error_500"
    ask_until(gate, lambda: gate.node("a")["state"] == "ejected", "the node to be ejected")
    a.fault = ""
    b.stop()
    gate.wait_node("a", lambda node: node["usable"])
    assert gate.chat().headers["x-llmrack-node"] == "a"


def test_a_flapping_node_costs_no_request(gate: GateUnderTest, mock: Mock) -> None:
    a, b = mock("a"), mock("b")
    gate.list_nodes(a, b)
    gate.run("--eject-after", "2", "--eject-s", "0.05", "--slow-start-s", "0")
    up(gate, "a", "b")
    for bout in range(1, 4):
        a.fault = "error_500"
        ask_until(gate, lambda bout=bout: health(gate, "a")["ejections"] >= bout, f"ejection {bout}")  # type: ignore[misc]
        a.fault = ""
        ask_until(gate, lambda: health(gate, "a")["state"] == "up", "the node to come back")
    for _ in range(3):
        a.stop()
        ask_until(gate, lambda: gate.node("a")["state"] == "unreachable", "the node to be missed")
        a = mock("a", port=a.port)
        ask_until(gate, lambda: gate.node("a")["usable"], "the node to be back")


def test_nodes_that_leave_and_join_under_load_disturb_nobody(gate: GateUnderTest, mock: Mock) -> None:
    a, b, c = mock("a"), mock("b"), mock("c")
    gate.list_nodes(a)
    gate.run("--slow-start-s", "600")
    up(gate, "a")
    a.fault, a.hold = "wait", "stream"
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(gate.chat(stream=True)))
    running.start()
    wait_for(lambda: a.open == 1, "the stream to run")

    def listed() -> set[str]:
        with gate.client() as client:
            return {node["name"] for node in client.get("/admin/nodes").json()["nodes"]}

    gate.list_nodes(a, b, c)
    ask_until(gate, lambda: listed() == {"a", "b", "c"}, "two nodes to join")
    up(gate, "b", "c")
    for name in ("b", "c"):
        assert health(gate, name)["state"] == "slow-start"
    assert health(gate, "a")["state"] == "up"
    gate.list_nodes(b, c)
    ask_until(gate, lambda: listed() == {"b", "c"}, "the node to leave")
    polls = b.polls
    ask_until(gate, lambda: b.polls > polls + 2, "some time to pass")
    assert a.open == 1, "the stream of a node that left was cut"
    a.hold = ""
    running.join()
    assert [word for word in WORDS if f'"content":"{word}"' in answers[0].text] == list(WORDS)
    assert answers[0].content.endswith(b"data: [DONE]\n\n")

    a.fault = ""
    gate.list_nodes(a, b, c)
    ask_until(gate, lambda: listed() == {"a", "b", "c"}, "the node to join again")
    up(gate, "a")
    assert health(gate, "a")["state"] == "slow-start"
    assert gate.node("a")["in_flight"] == 0
