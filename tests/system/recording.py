"""What the previous release says between gate and node, recorded from its own programs: `recording.json`.

Owns the recording and how it is made: a gate and two nodes of that release, each node behind a wire that writes down
what the gate sends; the first is cut in the middle of an answer, so that the gate asks the second one to go on.

    python -m tests.system.recording      records anew; takes the history of the repository (tests/previous.py)
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from llmnode.wire import headers, sse
from llmnode.wire.resume import PATH, read_marker
from tests import previous
from tests.processes import Program, free_port, wait_for

FILE = Path(__file__).with_name("recording.json")
NODE = ("--backend", "fake", "--model-id", "tiny", "--slots", "4", "--fake-step-delay-s", "0.02")
ASKED = {
    "model": "tiny", "messages": [{"role": "user", "content": "Tell me of the fox and the hen"}], "temperature": 0,
    "max_tokens": 24, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
}  # fmt: skip
CUT_AFTER = 9
"""Commit markers of the answer, after which its node is gone."""


@dataclass(frozen=True)
class Recording:
    """report: the body of `GET /node`.    begin: headers and body of the gate's request for an answer.

    answer: the node's frames to it, whole, and its headers.    resume: the body with which the gate asked the second
    node to go on.
    """

    commit: str
    report: dict[str, Any]
    begin: tuple[dict[str, str], str]
    answer: tuple[dict[str, str], list[str]]
    resume: str

    @classmethod
    def load(cls) -> Recording:
        return cls(**json.loads(FILE.read_text()))

    @property
    def frames(self) -> list[bytes]:
        return [frame.encode() for frame in self.answer[1]]

    @property
    def begun(self) -> list[bytes]:
        """The frames that were out when the first node was gone."""
        count = 0
        for number, frame in enumerate(self.frames):
            count += read_marker(frame) is not None
            if count == CUT_AFTER:
                return self.frames[: number + 1]
        raise ValueError("the answer is too short to be cut")


class Wire:
    """Carries bytes to a node and back. `requests`: the POSTs that went there, as (path, headers, body)."""

    def __init__(self, target: int, cut: threading.Event) -> None:
        self.requests: list[tuple[str, dict[str, str], str]] = []
        self._target, self._cut = target, cut
        self._loop = asyncio.new_event_loop()
        started = self._loop.run_until_complete(asyncio.start_server(self._carry, "127.0.0.1", 0))
        self.port: int = started.sockets[0].getsockname()[1]
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, away = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._out(reader, away), self._back(there, writer), return_exceptions=True)
        writer.close()
        away.close()

    async def _out(self, reader: asyncio.StreamReader, away: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            first, *lines = head.decode("latin-1").split("\r\n")
            fields = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines if line)}
            body = await reader.readexactly(int(fields.get("content-length", "0")))
            method, path, _ = first.split(" ")
            if method == "POST":
                self.requests.append((path, fields, body.decode()))
            away.write(head + body)

    async def _back(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = b""
        while piece := await there.read(65536):
            seen += piece
            if seen.count(b"\n: t ") >= CUT_AFTER and not self._cut.is_set():
                whole = seen.split(b": t ", CUT_AFTER)
                writer.write(piece[: len(piece) - len(whole[-1].partition(b"\n\n")[2])])
                await writer.drain()
                await asyncio.sleep(0.2)
                self._cut.set()
                writer.transport.abort()
                raise ConnectionResetError
            writer.write(piece)
            await writer.drain()


def record(folder: Path) -> Recording:
    tree = previous.unpack(folder / "tree")
    running: list[Program] = []

    def start(module: str, *arguments: str) -> Program:
        port = free_port()
        program = Program(
            module, ["serve", "--port", str(port), *arguments], port, folder / f"{len(running)}.log",
            env={"PYTHONPATH": str(tree)}, command=(sys.executable, "-P", "-m", module),
        )  # fmt: skip
        running.append(program)
        return program

    try:
        nodes = [start("llmnode", "--name", name, *NODE).ready() for name in "ab"]
        cut = threading.Event()
        wires = [Wire(node.port, cut) for node in nodes]
        listing = folder / "nodes.toml"
        listing.write_text(
            "".join(f'[[nodes]]\nname = "n{w.port}"\nurl = "http://127.0.0.1:{w.port}"\n' for w in wires)
        )
        state = ("--state-dir", str(folder / "state"), "--require-keys", "off")
        gate = start("llmgate", "--nodes-file", str(listing), *state).ready()
        wait_for(lambda: len(httpx.get(f"{gate.url}/v1/models").json()["data"]) == 1, "the gate to know the model")
        answer = httpx.post(f"{gate.url}/v1/chat/completions", json=ASKED, timeout=60)
        assert answer.status_code == 200 and answer.content.endswith(sse.DONE) and cut.is_set(), answer.text
        sent = [request for wire in wires for request in wire.requests]
        (begin,) = (request for request in sent if request[0] != PATH)
        (resume,) = (request for request in sent if request[0] == PATH)
        ours = {name: value for name, value in begin[1].items() if name.startswith("x-") or name == "content-type"}
        said = httpx.post(nodes[0].url + begin[0], content=begin[2], headers=ours, timeout=60)
        told = {name: said.headers[name] for name in (headers.RESUMABLE, headers.ORIGIN, "content-type")}
        report = httpx.get(f"{nodes[0].url}/node").json()
        frames = [frame.decode() for frame in sse.Frames().feed(said.content)]
        return Recording(previous.COMMIT, report, (ours, begin[2]), (told, frames), resume[2])
    finally:
        for program in running:
            program.stop()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE.write_text(json.dumps(asdict(record(Path(name))), indent=1, ensure_ascii=False) + "\n")
