"""What the previous release says on the wire (recording.py) is understood today, and what it reads is still said.

The fake backend has one right answer, so an answer that one release begins and the other ends must be the recorded one.
`make lab-full` has both releases at work (tests/lab/test_lab_releases.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from llmnode.wire import headers
from llmnode.wire.node import Report
from llmnode.wire.resume import PATH, Fixed, Origin, Resume
from tests import previous
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_answer import Step
from tests.gate.mock_node import MockNode
from tests.node.stitching import heard, joined, opened, resumed
from tests.processes import Program
from tests.system.recording import ASKED, NODE, Recording

OLD = Recording.load()


class OldNode(MockNode):
    """A node of the previous release: it says what was recorded, and is gone in the middle of the answer."""

    async def _get(self, path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        self.polls += 1
        await self._answer(writer, 200, json.dumps(OLD.report).encode())

    async def _post(
        self,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        lines = [f"{name}: {value}" for name, value in OLD.answer[0].items()]
        writer.write("\r\n".join(["HTTP/1.1 200 OK", *lines, "transfer-encoding: chunked"]).encode() + b"\r\n\r\n")
        for frame in OLD.begun:
            await self._chunk(writer, frame)
        await self._strike("die", Step(b"", b"", 0), reader, writer)


@pytest.fixture(scope="module")
def node(start_module: Start) -> Program:
    return start_module("llmnode", *NODE).ready()


@pytest.fixture
def old() -> Iterator[OldNode]:
    with OldNode("old") as node:
        yield node


def test_the_recording_is_of_the_release_that_is_called_the_previous_one() -> None:
    assert OLD.commit == previous.COMMIT, "record anew: python -m tests.system.recording"


def test_all_that_an_old_node_says_of_itself_is_read() -> None:
    assert _lacks(json.loads(json.dumps(Report.parse(OLD.report).json())), OLD.report, values=True) == []


def test_all_that_an_old_gate_reads_of_a_node_is_still_said(node: Program) -> None:
    response = node.get("/node")
    assert response and _lacks(response.json(), OLD.report, values=False) == []


def test_an_old_gates_request_gets_the_answer_that_it_knows_how_to_read(node: Program) -> None:
    asked, body = OLD.begin
    with opened(node, "/v1/chat/completions", body.encode(), **asked) as frames:
        assert joined(heard(frames).frames) == joined(heard(OLD.frames).frames)
    said = httpx.post(f"{node.url}/v1/chat/completions", content=body, headers=asked, timeout=60).headers
    assert {name: said[name] for name in OLD.answer[0]} == OLD.answer[0]


def test_a_node_goes_on_with_what_an_old_gate_has_of_an_old_nodes_answer(node: Program) -> None:
    got = heard(OLD.begun)
    assert Resume.parse(OLD.resume.encode()).ids == got.committed.ids()
    whole = heard(resumed(node, OLD.resume.encode()), got)
    assert whole.ended and joined(whole.frames) == joined(heard(OLD.frames).frames)


def test_what_a_gate_asks_an_old_node_is_what_the_old_gate_asked() -> None:
    fixed = OLD.begin[0][headers.RESUMABLE]
    parsed = Fixed.parse(fixed)
    assert parsed and parsed.header() == fixed
    head, _, body = OLD.resume.partition("\n")
    written, _, same = Resume.parse(OLD.resume.encode()).write().decode().partition("\n")
    assert _lacks(json.loads(written), json.loads(head), values=True) == [] and same == body


def test_an_answer_that_an_old_node_began_is_ended_by_todays(
    node: Program, old: OldNode, start: Start, tmp_path: Path
) -> None:
    gate = GateUnderTest(start, tmp_path)
    gate.list_nodes(old, SimpleNamespace(name="today", url=node.url))
    gate.run("--slow-start-s", "0")
    for name in ("old", "today"):
        gate.wait_node(name, lambda seen: seen["usable"])
    answers = [gate.chat(**ASKED) for _ in range(2)]
    tried = [gate.line(answer.headers["x-request-id"])["attempts"] for answer in answers]
    assert any([one["node"] for one in attempts] == ["old", "today"] for attempts in tried), tried
    assert [text(answer.content) for answer in answers] == [text("".join(OLD.answer[1]).encode())] * 2
    (asked,) = {request["headers"][headers.RESUMABLE].split()[0] for request in old.requests}
    assert asked == OLD.answer[0][headers.RESUMABLE] and PATH not in old.paths
    assert Origin.parse(OLD.answer[0][headers.ORIGIN]).model == "tiny"


def text(stream: bytes) -> str:
    """What a client of the stream reads."""
    events = [json.loads(line[6:]) for line in stream.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


def _lacks(said: Any, old: Any, *, values: bool, at: str = "") -> list[str]:
    """Places of `old` that `said` does not have, or has with another kind of value, or with `values` another value."""
    if isinstance(old, dict):
        if not isinstance(said, dict):
            return [at]
        pairs = ((name, said.get(name), value) for name, value in old.items())
        return [place for name, new, value in pairs for place in _lacks(new, value, values=values, at=f"{at}/{name}")]
    if isinstance(old, list) and old and isinstance(old[0], dict):
        return _lacks((said or [None])[0], old[0], values=values, at=f"{at}/0")
    same = said == old if values else isinstance(said, type(old))
    return [] if same else [at]
