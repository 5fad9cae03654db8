"""A node that fails in the middle of an answer costs its client a pause, not the answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from llmnode.wire import sse
from llmnode.wire.headers import RESUMABLE
from llmnode.wire.node import State
from llmnode.wire.resume import PATH, Fixed, Origin, Resume
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_answer import Script
from tests.gate.mock_node import MockNode
from tests.processes import wait_for

TINY = ("a", "b", "c")
ALONE = ("d", "e")


class Fleet:
    """A gate in front of mock nodes that speak resume: a, b and c serve the same model, d and e another one, in two
    versions of it. Which of them is asked first is the policy's business: the next faults are anybody's."""

    def __init__(self, gate: GateUnderTest, nodes: dict[str, MockNode]) -> None:
        self.gate, self.nodes = gate, nodes
        self.client = gate.client()
        self.faults: list[tuple[str, int]] = []
        for node in nodes.values():
            node.faults = self.faults

    def reset(self) -> None:
        self.faults.clear()
        for node in self.nodes.values():
            node.fault, node.at, node.hold, node.closed = "", 0, "", 0
            node.requests.clear()
        # A node that dies waits until the gate has read its last words: its stream may outlast the test.
        wait_for(lambda: not any(node.open for node in self.nodes.values()), "the streams before to be over")

    def ask(self, model: str = "tiny", *, stream: bool = True, **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": stream, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def begun(self) -> tuple[MockNode, Script]:
        """The node that was asked to begin, and what there was to say."""
        for node in self.nodes.values():
            for request in node.requests:
                if request["path"] != PATH:
                    fixed = Fixed.parse(request["headers"][RESUMABLE])
                    assert fixed is not None
                    return node, Script(request["body"], fixed, node.report.models[0].id)
        raise AssertionError("nobody was asked")

    def resumes(self) -> list[tuple[str, Resume]]:
        sent = [(n.name, r) for n in self.nodes.values() for r in n.requests if r["path"] == PATH]
        return [(name, Resume.parse(request["body"])) for name, request in sent]

    def line(self, answer: httpx.Response) -> dict[str, Any]:
        return self.gate.line(answer.headers["x-request-id"])

    def metric(self, name: str) -> float:
        text = httpx.get(self.gate.url + "/metrics").text
        return sum(float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(name))


@pytest.fixture(scope="module")
def everyone(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    with ExitStack() as stack:
        nodes = {name: stack.enter_context(MockNode(name, resume=True)) for name in TINY}
        for name, digest in zip(ALONE, ("d1", "d2"), strict=True):
            nodes[name] = stack.enter_context(MockNode(name, model="alone", resume=True, digest=digest))
        gate.list_nodes(*nodes.values())
        gate.run("--stall-timeout-s", "1")
        for name in nodes:
            gate.wait_node(name, lambda node: node["usable"])
        yield Fleet(gate, nodes)


@pytest.fixture
def fleet(everyone: Fleet) -> Fleet:
    everyone.reset()
    return everyone


MARKED = ["die", "die_before_marker", "die_in_marker", "die_in_frame", "wrong_count", "no_count", "late_wrong_count"]
MARKED += ["handover", "error", "overloaded", "stall", "keepalive_then_stall", "die_at_end"]


@pytest.mark.parametrize("fault", MARKED)
def test_a_stream_survives_its_node(fleet: Fleet, fault: str) -> None:
    fleet.faults[:] = [(fault, 3)]
    answer = fleet.ask(n=2, stream_options={"include_usage": True})
    node, script = fleet.begun()
    assert answer.content.replace(sse.KEEPALIVE, b"") == script.heard()
    assert answer.headers["x-llmrack-node"] == node.name
    ((heir, resume),) = fleet.resumes()
    assert heir != node.name
    line = fleet.line(answer)
    first, second = line["attempts"]
    assert (first["node"], second["node"], second["resume"]) == (node.name, heir, True)
    assert (first["ids"], second["ids"]) == (sum(map(len, resume.ids)), sum(map(len, script.ids)))
    assert second["outcome"] == "answered"
    expected = {"handover": "handover", "error": "failed 500", "overloaded": "failed 503"}
    assert first["outcome"] == expected.get(fault, "stalled" if "stall" in fault else "broke")
    assert (line["end"], line["status"], line["node"]) == ("done", 200, heir)
    assert line["completion_tokens"] == script.usage.completion_tokens


@pytest.mark.parametrize("fault", ["die", "wrong_count", "handover", "error", "stall", "die_at_end"])
def test_an_answer_that_is_not_streamed_survives_its_node(fleet: Fleet, fault: str) -> None:
    fleet.faults[:] = [(fault, 3)]
    answer = fleet.ask(stream=False, n=2)
    node, script = fleet.begun()
    assert answer.json() == script.whole()
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-llmrack-ignored"] == "store"
    assert answer.headers["x-llmrack-node"] == node.name
    assert len(fleet.resumes()) == 1
    assert fleet.line(answer)["completion_tokens"] == script.usage.completion_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_before_the_first_id_another_node_begins(fleet: Fleet, stream: bool) -> None:
    fleet.faults[:] = [("hang_up", 0), ("die", 0), ("handover", 0)]
    answer = fleet.ask(stream=stream)
    assert answer.status_code == 200
    assert fleet.resumes() == []
    assert [attempt["outcome"] for attempt in fleet.line(answer)["attempts"]] == [
        "broke",
        "broke",
        "handover",
        "answered",
    ]


def test_an_answer_may_move_many_times(fleet: Fleet) -> None:
    fleet.faults[:] = [("die", 1), ("handover", 2), ("die_in_frame", 3), ("refuse_503", 0), ("die", 5), ("error", 6)]
    before = fleet.metric("llmgate_stream_pause_seconds_count")
    answer = fleet.ask()
    assert answer.content == fleet.begun()[1].heard()
    assert [attempt.get("ids") for attempt in fleet.line(answer)["attempts"]] == [1, 2, 3, 3, 5, 6, 8]
    assert fleet.metric("llmgate_stream_pause_seconds_count") > before


def test_a_node_that_wakes_up_does_not_speak_again(fleet: Fleet) -> None:
    """As after SIGSTOP and SIGCONT: its connection is closed by then, and its bytes go nowhere."""
    for node in fleet.nodes.values():
        node.hold = "stream"
    fleet.faults[:] = [("sleep", 3)]
    answer = fleet.ask()
    sleeper, script = fleet.begun()
    assert answer.content == script.heard()
    assert sleeper.closed == 0
    sleeper.hold = ""
    wait_for(lambda: sleeper.closed == 1, "the woken node to find its connection closed")


def test_a_resumed_stream_that_skips_a_token_is_noticed(fleet: Fleet) -> None:
    """By the gate where ids and count differ; by the comparison that these tests make where they do not."""
    fleet.faults[:] = [("die", 3), ("skip", 3)]
    answer = fleet.ask()
    assert answer.content == fleet.begun()[1].heard()
    assert [attempt["outcome"] for attempt in fleet.line(answer)["attempts"]] == ["broke", "broke", "answered"]
    fleet.reset()
    fleet.faults[:] = [("die", 3), ("skip_unseen", 3)]
    answer = fleet.ask(seed=2)
    assert answer.content != fleet.begun()[1].heard()


def test_a_request_that_ends_every_node_is_given_up(fleet: Fleet) -> None:
    lost = 'llmgate_streams_lost_total{model="tiny",reason="same_place"}'
    before = fleet.metric(lost), fleet.metric("llmgate_resumes_total")
    fleet.faults[:] = [("die", 3)] * 50
    answer = fleet.ask()
    assert 50 - len(fleet.faults) == 5
    heard, _, error = answer.content.rpartition(b"data: ")
    assert fleet.begun()[1].heard().startswith(heard)
    said = json.loads(error)["error"]
    assert said["code"] == "stream_broken"
    assert "5 nodes failed at the same place" in said["message"]
    assert b"[DONE]" not in answer.content
    line = fleet.line(answer)
    assert (line["end"], line["status"]) == ("stream_broken", 200)
    assert (fleet.metric(lost), fleet.metric("llmgate_resumes_total")) == (before[0] + 1, before[1] + 4)
    fleet.faults.clear()
    assert fleet.ask(stream=False).status_code == 200


def test_a_node_that_cannot_go_on_is_passed_over(fleet: Fleet) -> None:
    fleet.faults[:] = [("die", 3), ("conflict", 0), ("refuse_503", 0), ("error_500", 0)]
    answer = fleet.ask()
    assert answer.content == fleet.begun()[1].heard()
    assert len(fleet.resumes()) == 4


def test_what_no_node_can_go_on_with_is_said(fleet: Fleet) -> None:
    fleet.faults[:] = [("die", 3), ("bad_request", 0)]
    answer = fleet.ask()
    assert b'"code":"stream_broken"' in answer.content
    assert b"cannot be gone on with" in answer.content
    assert len(fleet.resumes()) == 1
    fleet.faults[:] = [("die", 3), ("bad_request", 0)]
    assert fleet.ask(stream=False).status_code == 200


def test_a_clients_own_error_late_in_a_stream_is_handed_on(fleet: Fleet) -> None:
    fleet.faults[:] = [("client_error", 3)]
    answer = fleet.ask()
    assert answer.content.endswith(b'"code":"invalid_value"}}\n\n')
    assert b"[DONE]" not in answer.content
    assert fleet.resumes() == []


def test_a_node_that_came_back_with_other_weights_begins_for_those(fleet: Fleet) -> None:
    """Between two polls: the gate learns it from the answer, and whoever has these weights goes on."""
    d, e = (fleet.nodes[name] for name in ALONE)
    before, d.hold = d.report, "poll"
    d.say(models=e.report.models, boot="another")
    d.fault, d.at = "error", 3
    try:
        answers = [fleet.ask("alone").content for _ in ALONE]  # once at least d is the one to begin
    finally:
        d.report, d.hold = before, ""
    assert {(heir, resume.origin) for heir, resume in fleet.resumes()} == {("e", Origin("alone", "d2", "t1"))}
    assert all(answer.endswith(sse.DONE) for answer in answers)


def test_the_only_node_is_waited_for_and_no_other_version_goes_on(fleet: Fleet) -> None:
    """Also while a client waits, it hears a keepalive every 10 s."""
    d, e = (fleet.nodes[name] for name in ALONE)
    e.say(state=State.LOADING)
    fleet.gate.wait_node("e", lambda node: not node["usable"])
    d.fault, d.at, d.hold = "sleep", 3, "stream"
    heard: list[bytes] = []
    answers = threading.Thread(target=lambda: heard.append(fleet.ask("alone").content))
    answers.start()
    wait_for(lambda: d.open == 1, "the stream to run")
    d.stop()
    e.say(state=State.READY)
    fleet.gate.wait_node("e", lambda node: node["usable"])
    _, script = fleet.begun()
    answers.join(11)
    assert answers.is_alive()
    with MockNode("d", model="alone", port=d.port, resume=True) as back:
        answers.join()
        fleet.gate.wait_node("d", lambda node: node["usable"])
        assert [request["path"] for request in back.requests] == [PATH]
    assert e.requests == []
    assert heard[0].count(sse.KEEPALIVE) == 1
    assert heard[0].replace(sse.KEEPALIVE, b"") == script.heard()
    e.say(state=State.READY)


@pytest.mark.parametrize("where", ["in a resume", "while waiting"])
def test_a_client_that_leaves_is_noticed_also_between_nodes(fleet: Fleet, where: str) -> None:
    fleet.faults[:] = [("die", 3)]
    for name in TINY:
        fleet.nodes[name].fault = "sleep" if where == "in a resume" else "refuse_503"
        fleet.nodes[name].hold = "stream"
    asked = [{"role": "user", "content": "hello"}]
    with fleet.client.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": "tiny", "messages": asked, "stream": True},
        headers={"x-request-id": where.replace(" ", "-")},
    ) as answer:
        chunks = answer.iter_bytes()  # kept: httpx closes the connection when it is dropped
        next(chunks)
        wait_for(lambda: len(fleet.resumes()) > 0, "a resume")
    line = fleet.gate.line(where.replace(" ", "-"))
    assert (line["end"], line["status"]) == ("client_left", 200)
    tried = len(fleet.resumes())
    for name in TINY:
        fleet.gate.wait_node(name, lambda node: node["in_flight"] == 0)
        fleet.nodes[name].hold = ""
    assert len(fleet.resumes()) == tried
    if where == "in a resume":
        wait_for(lambda: sum(fleet.nodes[name].closed for name in TINY) == 1, "the node to see its connection closed")


def test_a_broken_stream_waits_no_longer_than_its_deadline(gate: GateUnderTest, mock: Callable[..., MockNode]) -> None:
    a = mock("a", resume=True)
    a.faults = [("die", 3), ("conflict", 0)]
    gate.list_nodes(a)
    gate.run("--request-timeout-s", "4")
    gate.wait_node("a", lambda node: node["usable"])
    answer = gate.chat(stream=True)
    assert b'"code":"stream_broken"' in answer.content
    assert b"before its deadline" in answer.content
    assert [request["path"] for request in a.requests][1:] == [PATH]
    assert int(a.requests[0]["headers"]["x-llmrack-deadline-ms"]) <= 4000
    assert 'llmgate_streams_lost_total{model="tiny",reason="no_node"} 1.0' in httpx.get(gate.url + "/metrics").text
