"""Who collects traces, for tests: a real receiver of OTLP over HTTP, which reads what programs send."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.processes import wait_for


@dataclass(frozen=True)
class Seen:
    """A span as it came. kind: by OTLP's number, 2 a server's and 3 a client's.    times: in seconds."""

    service: str
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    began: float
    ended: float
    attributes: dict[str, Any]
    links: list[str]
    failed: bool


@dataclass
class Collector:
    """What has come. `status`: what it answers with.    headers, bodies: of the requests."""

    url: str
    spans: list[Seen] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    status: int = 200

    def trace(self, id: str, *names: str) -> list[Seen]:
        """The spans of a trace, in the order in which they began, once as many of each name are there."""

        def found() -> list[Seen] | None:
            seen = sorted((s for s in list(self.spans) if s.trace == id), key=lambda s: (s.began, s.ended))
            left = [span.name for span in seen]
            for name in names:
                if name not in left:
                    return None
                left.remove(name)
            return seen

        return wait_for(found, f"spans {names} of {id}; there are {[(s.service, s.name) for s in self.spans]}")


@contextmanager
def collector() -> Iterator[Collector]:
    """Collect until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(there.status if self.path == "/v1/traces" else 404)
            self.send_header("content-length", "0")
            self.end_headers()
            there.headers.append({name.lower(): value for name, value in self.headers.items()})
            there.bodies.append(body)
            if there.status == 200:
                there.spans.extend(_read(body))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield there
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _read(body: bytes) -> Iterator[Seen]:
    for of_program in ExportTraceServiceRequest.FromString(body).resource_spans:
        who = _attributes(of_program.resource)
        for scope in of_program.scope_spans:
            for span in scope.spans:
                yield Seen(
                    who["service.name"],
                    span.name,
                    span.kind,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano / 1e9,
                    span.end_time_unix_nano / 1e9,
                    _attributes(span),
                    [link.span_id.hex() for link in span.links],
                    span.status.code == 2,
                )


def _attributes(of: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}
