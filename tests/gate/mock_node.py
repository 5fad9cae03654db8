"""A node without a model: speaks /node, the chat endpoint and, when asked to, /resume, and misbehaves on demand.

Runs in a thread of the test with an event loop of its own, on a raw asyncio server, so that it can do what no framework
allows: hang up in the middle of a frame, answer half a header, never read on.

    with MockNode("a") as node:
        node.fault = "die_mid_stream"

A node with `resume` answers the gate's requests with commit markers, as `mock_answer.py` says, and its faults strike
when `at` ids of a choice are out, those counted that were out before it was asked to go on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from llmnode.wire import headers as names
from llmnode.wire import sse
from llmnode.wire.node import Load, Model, Report, State, Usage
from llmnode.wire.resume import HANDOVER, PATH, VERSION, Fixed, Origin, Resume
from tests.gate.mock_answer import Script, Step

_boots = itertools.count()
WORDS = ("one", "two", "three", "four", "five")


class MockNode:
    """One fake node. Attributes may be changed while it runs.

    fault: what to do with a POST instead of answering it well; the names are those that `_post`, `_stream` and
           `_strike` look for.    at: see above.
    faults: (fault, at) of the next POSTs, one each, before `fault` counts again; several nodes may share the list.
    requests: every POST seen: {"path", "headers", "body"}.
    usage: what it says that each answer cost.
    open: streams running now.   closed: answers that the gate hung up on.   sent_bytes: of streams, taken by the gate.
    load: what its answers that can be resumed say of its load, as a header.
    hold: while set, a POST is not looked at, a poll is not answered, and a stream with the fault "wait", or "drip" that
          sends each byte by itself, stays at its second word.
    """

    def __init__(
        self,
        name: str,
        model: str = "tiny",
        port: int = 0,
        token: str = "",
        n_ctx: int = 4096,
        resume: bool = False,
        digest: str = "d1",
        template: str = "t1",
    ) -> None:
        self.name = name
        self.token = token
        self.fault = ""
        self.at = 0
        self.faults: list[tuple[str, int]] = []
        self.report = Report(
            boot=f"boot-{name}-{next(_boots)}",
            release="r1",
            config="c1",
            state=State.READY,
            models=(Model(model, (f"{model}-alias",), n_ctx=n_ctx, template=template, digest=digest),),
            load=Load(slots=4),
            resume=VERSION if resume else 0,
        )
        self.requests: list[dict[str, Any]] = []
        self.usage = Usage(11, 3, len(WORDS))
        self.polls = 0
        self.not_modified = 0
        self.open = 0
        self.closed = 0
        self.sent_bytes = 0
        self.hold = ""
        self.load = ""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MockNode:
        self._socket.listen(64)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close everything: from now on connections are refused. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._socket.close()

    def say(self, **changes: Any) -> None:
        """Change fields of the report; `load` fields by load={...}."""
        if "load" in changes:
            changes["load"] = dataclasses.replace(self.report.load, **changes["load"])
        self.report = dataclasses.replace(self.report, **changes)

    @property
    def paths(self) -> list[str]:
        return [request["path"] for request in self.requests]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._socket))
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")
                method, path, _ = first.split(" ", 2)
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if method == "GET":
                    await self._get(path, headers, writer)
                else:
                    self.requests.append({"path": path, "headers": headers, "body": body})
                    await self._post(path, headers, body, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, _HangUp, asyncio.CancelledError):
            pass  # cancelled: the node is being stopped, which ends this task all the same
        finally:
            writer.transport.abort()

    async def _get(self, path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        self.polls += 1
        await self._held("poll")
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            await self._answer(writer, 401, _error("invalid_api_key", "authentication_error"))
            return
        body = json.dumps(self.report.json()).encode()
        etag = '"' + hashlib.sha256(body).hexdigest()[:16] + '"'
        if headers.get("if-none-match") == etag:
            self.not_modified += 1
            await self._answer(writer, 304, b"", etag=etag)
        else:
            await self._answer(writer, 200, body, etag=etag)

    async def _post(
        self,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        await self._held("post")
        fault, at = self.faults.pop(0) if self.faults else (self.fault, self.at)
        fixed = Fixed.parse(headers[names.RESUMABLE]) if self.report.resume and names.RESUMABLE in headers else None
        if fault == "refuse_503":
            await self._answer(writer, 503, _error("overloaded", "overloaded_error"), **{"retry-after": "7"})
        elif fault == "error_500":
            await self._answer(writer, 500, _error("internal_error", "server_error"))
        elif fault == "error_401":
            await self._answer(writer, 401, _error("invalid_api_key", "authentication_error"))
        elif fault == "not_found":
            await self._answer(writer, 404, _error("model_not_found"))
        elif fault == "bad_request":
            await self._answer(writer, 400, _error("invalid_value"))
        elif fault == "conflict":
            await self._answer(writer, 409, _error("model_differs"))
        elif fault == "too_long":
            await self._answer(writer, 400, _error("context_length_exceeded"))
        elif fault == "hang_up":
            raise _HangUp
        elif fault == "stall" and not at:
            await self._until_closed(reader)
        elif path == PATH:
            resume = Resume.parse(body)
            await self._marked(
                Script(resume.body, resume.fixed, resume.origin.model), resume.ids, fault, at, reader, writer
            )
        elif fixed:
            await self._marked(Script(body, fixed, self.report.models[0].id), (), fault, at, reader, writer)
        elif json.loads(body).get("stream"):
            await self._stream(fault, reader, writer)
        elif fault == "die_in_body":
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id":')
            await writer.drain()
            raise _HangUp
        else:
            await self._answer(writer, 200, json.dumps(self._completion()).encode())

    async def _stream(self, fault: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._streaming(writer):
            if fault in ("keepalive_then_die", "error_event"):
                await self._chunk(writer, sse.KEEPALIVE)
                if fault == "error_event":
                    await self._chunk(writer, b"data: " + _error("internal_error", "server_error") + b"\n\n")
                raise _HangUp
            number = 0
            while fault in ("endless", "huge") or number < len(WORDS):
                word = "x" * 60_000 if fault == "huge" else WORDS[number % len(WORDS)]
                await self._chunk(writer, sse.event(self._delta(word)))
                number += 1
                if fault == "die_mid_stream" and number == 2:
                    raise _HangUp
                if fault == "error_event_late" and number == 2:
                    await self._chunk(writer, b"data: " + _error("internal_error", "server_error") + b"\n\n")
                    raise _HangUp
                if fault == "stall_mid_stream" and number == 2:
                    await self._until_closed(reader)
                if fault in ("wait", "drip") and number == 2:
                    await self._held("stream")
                if fault == "endless":
                    await asyncio.sleep(0.01)
            await self._chunk(writer, sse.KEEPALIVE)
            if self.requests[-1]["headers"].get("x-llmrack-report-usage") == "1":
                await self._chunk(writer, sse.usage_comment(self.usage))
            await self._chunk(writer, sse.DONE)

    async def _marked(
        self,
        script: Script,
        out: tuple[tuple[int, ...], ...],
        fault: str,
        at: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        model = self.report.models[0]
        origin = Origin(model.id, model.digest, model.template).header()
        told = [f"{names.LOAD}: {self.load}"] if self.load else []
        async with self._streaming(writer, f"{names.RESUMABLE}: {VERSION}", f"{names.ORIGIN}: {origin}", *told):
            struck = not fault
            for step in script.steps(out):
                if not struck and step.count > at:
                    struck = True
                    await self._strike(fault, step, reader, writer)
                    if fault == "skip":
                        continue
                    if fault == "skip_unseen":
                        step = Step(b"", step.marker, step.count)
                await self._chunk(writer, step.frames + step.marker)
            if fault == "die_at_end":
                await self._read_by_gate()
                raise _HangUp
            *rest, done = script.ending()
            await self._chunk(writer, b"".join([*rest, sse.usage_comment(script.usage), done]))

    @asynccontextmanager
    async def _streaming(self, writer: asyncio.StreamWriter, *headers: str) -> AsyncIterator[None]:
        """The head of a stream before what is sent in it, and its end behind. Counts it while it is open, and when the
        gate hangs up on it."""
        lines = ("HTTP/1.1 200 OK", "content-type: text/event-stream", f"{names.IGNORED}: store", *headers)
        writer.write("\r\n".join((*lines, "transfer-encoding: chunked")).encode() + b"\r\n\r\n")
        self.open += 1
        try:
            yield
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.closed += 1
            raise
        finally:
            self.open -= 1

    async def _strike(self, fault: str, step: Step, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What goes wrong in an answer with markers, instead of the step or before it."""
        bad = b": t 0 999 1\n\n"
        said = {
            "die_before_marker": step.frames,
            "die_in_marker": step.frames + step.marker[:-4],
            "die_in_frame": step.frames[:20] or step.marker[:4],
            "wrong_count": step.frames + bad,
            "no_count": step.frames + b": t x\n\n",
            "late_wrong_count": step.frames + step.marker + bad,
            "handover": HANDOVER,
            "keepalive_then_stall": sse.KEEPALIVE,
            "error": b"data: " + _error("internal_error", "server_error") + b"\n\n",
            "overloaded": b"data: " + _error("node_stopping", "overloaded_error") + b"\n\n",
            "client_error": b"data: " + _error("invalid_value") + b"\n\n",
        }.get(fault)
        if said:
            await self._chunk(writer, said)
        if fault in ("stall", "keepalive_then_stall"):
            await self._until_closed(reader)
        if fault == "sleep":
            await self._held("stream")
        elif fault == "die" or said is not None:  # a step whose text is still withheld has no frames: empty, not None
            await self._read_by_gate()
            raise _HangUp

    async def _read_by_gate(self) -> None:
        """Wait until the gate has read what was sent: its event loop has come round when it has polled twice more.

        What is still unread when a connection is reset, the gate's HTTP library throws away.
        """
        polls = self.polls
        while self.polls < polls + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _held(self, what: str) -> None:
        """Wait while the test holds this back. Polled: the test sets it from another thread."""
        while self.hold == what:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if writer.transport.is_closing():
            raise ConnectionResetError
        written = b"%x\r\n%s\r\n" % (len(data), data)
        for part in map(bytes, zip(written)) if self.fault == "drip" else (written,):
            writer.write(part)
            await writer.drain()
        self.sent_bytes += len(data)

    async def _until_closed(self, reader: asyncio.StreamReader) -> None:
        """Stay silent until the gate hangs up."""
        if not await reader.read(1):
            self.closed += 1
        raise _HangUp

    async def _answer(self, writer: asyncio.StreamWriter, status: int, body: bytes, **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()

    def _completion(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": f"{' '.join(WORDS)} from {self.name}"}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": self.report.models[0].id,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": self.usage.openai(),
        }

    def _delta(self, word: str) -> dict[str, Any]:
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": self.report.models[0].id,
            "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
        }


class _HangUp(Exception):
    """Close the connection here and now."""


def _error(code: str, kind: str = "invalid_request_error") -> bytes:
    error = {"message": f"the mock node says {code}", "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}, separators=(",", ":")).encode()
