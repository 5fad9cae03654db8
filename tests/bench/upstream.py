"""The upstream of `make bench-gate`: a node without a model, as cheap as one process of Python can be.

Owns: the bytes of a node that the gate can use: /node, chat completions as JSON and as streams of 50 chunks, with
commit markers and the usage comment where the gate asks for them, without where a rival asks. All answers are written
before the first request comes. Refuses to know: who asks, what for, and what a real node takes for an answer.

A stream's chunks go out one by one, each in a turn of the event loop of its own, so that a proxy sees them as separate
reads while it keeps up. One process listens on several ports, which are so many nodes to whoever routes.

    python -m tests.bench.upstream PORT [PORT ...]
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import cast

import uvloop

from llmnode.wire import headers, resume, sse
from llmnode.wire.node import Load, Model, Report, State, Usage

CHUNKS = 50
"""Chunks of a stream that bring text."""
MODEL = "bench"
HOLD = "hold"
"""A request with a message that says this gets the first chunk of its stream and no more. (A field could get lost.)"""
SLOTS = 1 << 20
"""More than anybody asks for: what a full node does to a gate is not measured here."""

_STREAM = re.compile(rb'"stream"\s*:\s*true')
_HOLD = re.compile(rb'"content"\s*:\s*"%s"' % HOLD.encode())
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_MARKED = re.compile(rb"\r\n%s:" % headers.RESUMABLE.encode(), re.IGNORECASE)
_COUNTED = re.compile(rb"\r\n%s:" % headers.REPORT_USAGE.encode(), re.IGNORECASE)
_ETAG = re.compile(rb"\r\nif-none-match:\s*(\S+)", re.IGNORECASE)
_VERSION = b"%s: %d" % (headers.RESUMABLE.encode(), resume.VERSION)
_USAGE = Usage(prompt_tokens=120, cached_tokens=64, completion_tokens=CHUNKS)


def _chunk(choices: list[dict[str, object]], **more: object) -> bytes:
    body = {"id": "chatcmpl-0123456789", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return sse.event({**body, "choices": choices, **more})


def _events(marked: bool, counted: bool) -> Iterator[bytes]:
    """What a stream writes, one item a turn."""
    for number in range(1, CHUNKS + 1):
        delta = {"role": "assistant", "content": " word"} if number == 1 else {"content": " word"}
        piece = _chunk([{"index": 0, "delta": delta, "finish_reason": None}])
        yield piece + (resume.marker(0, number, [number]) if marked else b"")
    last = _chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if marked:
        last += resume.marker(0, CHUNKS + 1, [CHUNKS + 1])
    last += _chunk([], usage=_USAGE.openai())
    yield last + (sse.usage_comment(_USAGE) if counted else b"") + sse.DONE


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _head(*lines: bytes) -> bytes:
    return b"\r\n".join((b"HTTP/1.1 200 OK", *lines)) + b"\r\n\r\n"


def _whole(body: bytes, *lines: bytes) -> bytes:
    return _head(b"content-type: application/json", b"content-length: %d" % len(body), *lines) + body


def _stream(marked: bool, counted: bool) -> tuple[bytes, ...]:
    version = (_VERSION,) if marked else ()
    head = _head(b"content-type: text/event-stream", *version, b"transfer-encoding: chunked")
    first, *rest = map(_http_chunk, _events(marked, counted))
    return (head + first, *rest[:-1], rest[-1] + _http_chunk(b""))


_ANSWER = json.dumps(
    {
        "id": "chatcmpl-0123456789",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " word" * CHUNKS},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE.openai(),
    },
    separators=(",", ":"),
).encode()


def _whole_as_stream(counted: bool) -> bytes:
    """An answer that the client does not stream, to a gate that wants to be able to resume it."""
    ids = range(1, CHUNKS + 2)
    events = resume.marker(0, len(ids), ids) + b"data: " + _ANSWER + b"\n\n"
    events += (sse.usage_comment(_USAGE) if counted else b"") + sse.DONE
    head = _head(b"content-type: text/event-stream", _VERSION, b"transfer-encoding: chunked")
    return head + _http_chunk(events) + _http_chunk(b"")


def _report(name: str) -> bytes:
    model = Model(id=MODEL, n_ctx=4096, digest="0" * 16, template="model")
    load = Load(slots=SLOTS, kv_cells=SLOTS, prefill_tps=1000.0, decode_tps=1000.0, bytes_per_token=4.0)
    report = Report(
        boot=name, release="bench", config="bench", state=State.READY, models=(model,), load=load, resume=resume.VERSION
    )
    return json.dumps(report.json()).encode()


class Answers:
    """Everything that one node ever says, ready to be written."""

    def __init__(self, name: str) -> None:
        flags = [(marked, counted) for marked in (False, True) for counted in (False, True)]
        self.streams = {flag: _stream(*flag) for flag in flags}
        self.wholes = {
            (marked, counted): _whole_as_stream(counted) if marked else _whole(_ANSWER) for marked, counted in flags
        }
        report = _report(name)
        etag = b'"%s"' % hashlib.sha256(report).hexdigest()[:16].encode()
        self.report, self.etag = _whole(report, b"etag: " + etag), etag
        self.same = b"HTTP/1.1 304 Not Modified\r\netag: %s\r\n\r\n" % etag
        self.ready = _whole(b'{"state":"ready"}')
        self.marked = self.plain = 0

    def counts(self) -> bytes:
        """How many requests asked for commit markers, and how many did not."""
        return _whole(json.dumps({"marked": self.marked, "plain": self.plain}).encode())


class Connection(asyncio.Protocol):
    """One connection; requests on it are answered one after the other."""

    def __init__(self, answers: Answers, later: Callable[[Callable[[], None]], object]) -> None:
        self._answers, self._later = answers, later
        self._input = b""
        self._pending: Iterator[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it

    def data_received(self, data: bytes) -> None:
        self._input += data
        self._read()

    def _read(self) -> None:
        while self._pending is None:
            head, found, rest = self._input.partition(b"\r\n\r\n")
            if not found:
                return
            length = _LENGTH.search(head)
            size = int(length.group(1)) if length else 0
            if len(rest) < size:
                return
            self._input = rest[size:]
            self._answer(head, rest[:size])

    def _answer(self, head: bytes, body: bytes) -> None:
        answers = self._answers
        if head.startswith(b"GET /node"):
            known = _ETAG.search(head)
            self._transport.write(answers.same if known and known.group(1) == answers.etag else answers.report)
        elif head.startswith(b"GET "):
            self._transport.write(answers.counts() if head.startswith(b"GET /counts") else answers.ready)
        else:
            flags = bool(_MARKED.search(head)), bool(_COUNTED.search(head))
            answers.marked += flags[0]
            answers.plain += not flags[0]
            if not _STREAM.search(body):
                self._transport.write(answers.wholes[flags])
            elif _HOLD.search(body):
                self._transport.write(answers.streams[flags][0])
            else:
                self._pending = iter(answers.streams[flags])
                self._go_on()

    def _go_on(self) -> None:
        assert self._pending is not None
        piece = next(self._pending, None)
        if piece is None:
            self._pending = None
            self._read()
        elif not self._transport.is_closing():
            self._transport.write(piece)
            self._later(self._go_on)


async def serve(ports: list[int]) -> None:
    """Listen on all the ports of loopback until the process is ended."""
    loop = asyncio.get_running_loop()
    servers = []
    for port in ports:
        answers = Answers(f"node-{port}")
        make = lambda answers=answers: Connection(answers, loop.call_soon)  # noqa: E731
        servers.append(await loop.create_server(make, "127.0.0.1", port, backlog=4096))
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    try:
        uvloop.run(serve([int(port) for port in sys.argv[1:]]))
    except KeyboardInterrupt:
        pass
