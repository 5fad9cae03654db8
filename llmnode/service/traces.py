"""Sends spans to whoever collects traces, by OpenTelemetry's protocol over HTTP (OTLP): the only file that imports it.

Whoever has a span says it and goes on: one thread takes what was said, twice a second, and makes of it what the library
exports. What waits is bounded. While the collector cannot be reached spans are lost and counted, the log says so once,
and requests neither wait nor fail.

OpenTelemetry is an extra (`llmrack[telemetry]`), imported when the first `Traces` is made and not before.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmnode.service.settings import SettingError
from llmnode.service.spans import Context, Kind, Span

log = logging.getLogger("llmrack.traces")

_GATHER_S = 0.5
_WAITING = 4096
"""Spans that may wait to be sent: some 4 MB."""
_BATCH = 512
_EXPORT_S = 5.0
"""How long the library may try to deliver a batch."""
_LAST_S = 2.0
"""At the end, for what still waits."""
_LIBRARY = "opentelemetry.exporter.otlp.proto.http"


@dataclass(frozen=True)
class Receiver:
    """Who collects spans. endpoint: base URL; `/v1/traces` is below it.    headers_file: NAME=VALUE lines, for a token.

    ratio: of the traces that begin here, how many are recorded, 0 to 1.
    """

    endpoint: str
    headers_file: Path | None = None
    ratio: float = 1.0

    def check(self) -> None:
        """Raises SettingError that says what is wrong, without repeating a header. Loads no library."""
        url = urlsplit(self.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise SettingError(f"otlp_endpoint must be http://HOST:PORT or https://, got {self.endpoint!r}")
        if url.username or url.password or url.query:
            raise SettingError(
                "otlp_endpoint must hold no secret: what the receiver asks for goes to otlp_headers_file"
            )
        if not _installed():
            raise SettingError(
                "otlp_endpoint is set, and the packages for traces are missing: install llmrack[telemetry] "
                "(docs/operations.md, Traces)"
            )
        self.headers()

    def headers(self) -> dict[str, str]:
        """Raises SettingError, which names the line and never repeats it."""
        path = self.headers_file
        if path is None:
            return {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SettingError(f"cannot read otlp_headers_file {path}: {reason}") from error
        found = {}
        for number, line in enumerate(lines, 1):
            name, equals, value = line.partition("=")
            if not line.strip():
                continue
            if not equals or not name.strip().isascii() or not value.strip().isprintable():
                raise SettingError(f"otlp_headers_file {path}, line {number}: must be NAME=VALUE")
            found[name.strip().lower()] = value.strip()
        return found


class Traces:
    """Decides which traces are recorded, and sends what is said of them. Thread-safe."""

    def __init__(
        self,
        receiver: Receiver,
        who: Mapping[str, str],
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`who`: attributes of this program (`service.name`...). `entropy`: so many random bytes, for ids. Raises
        SettingError."""
        receiver.check()
        self._endpoint, self._ratio, self._entropy = receiver.endpoint, receiver.ratio, entropy
        self._export = _Exporter(receiver, {"host.name": os.uname().nodename, **who})
        self._spans: deque[Span] = deque()
        self._filled, self._closing = threading.Event(), threading.Event()
        self.lost = 0
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="traces", daemon=True)
        self._thread.start()

    def context(self, parent: str | None, state: str | None = None) -> tuple[Context, str]:
        """The context of a span that begins here, and the id of its parent, from the request's headers; a trace that
        begins here is recorded by chance, one that was begun elsewhere as was decided there."""
        before = Context.parse(parent, state)
        if before is not None:
            return before.child(self.id()), before.span
        trace = self._entropy(16).hex()
        # The last 7 bytes are random in every vendor's ids (Trace Context, level 2).
        return Context(trace, self.id(), int(trace[-14:], 16) < self._ratio * 2**56), ""

    def id(self) -> str:
        """A new span's."""
        return self._entropy(8).hex()

    def say(self, spans: Iterable[Span]) -> None:
        """Have spans sent; never blocks, never raises."""
        for span in spans:
            if len(self._spans) >= _WAITING:
                self.lost += 1
            else:
                self._spans.append(span)
        if not self._filled.is_set():
            self._filled.set()

    def close(self) -> None:
        """Send what waits, for two seconds at most."""
        self._closing.set()
        self._filled.set()
        self._thread.join(_LAST_S)
        self._export.close()

    def _work(self) -> None:
        closing = False
        while not closing:
            self._filled.wait()
            closing = self._closing.wait(_GATHER_S)
            self._filled.clear()  # before spans are taken: one that comes after them wakes the thread again
            while self._spans:
                self._send([self._spans.popleft() for _ in range(min(_BATCH, len(self._spans)))])

    def _send(self, spans: Sequence[Span]) -> None:
        why = self._export(spans)
        if why:
            self.lost += len(spans)
            if not self._failing:
                log.error("traces cannot be sent to %s, and are lost while that lasts: %s", self._endpoint, why)
        elif self._failing:
            log.warning("traces can be sent again; %d spans were lost", self.lost)
        self._failing = bool(why)


def start(receiver: Receiver, **who: str) -> Traces | None:
    """`Traces`, or None where nobody collects any. `who`: name, version and instance of the service. Raises
    SettingError."""
    if not receiver.endpoint:
        return None
    return Traces(
        receiver, {f"service.{name}": value for name, value in who.items()} | {"service.namespace": "llmrack"}
    )


class _Exporter:
    """OpenTelemetry, as one call: spans -> why they could not be delivered, "" when they were.

    Spans are made by the library's own tracer, with the ids and times that they have already. Used from one thread.
    """

    def __init__(self, receiver: Receiver, who: Mapping[str, str]) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SpanExportResult
        from opentelemetry.sdk.trace.id_generator import IdGenerator
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        class Given(IdGenerator):
            """The ids of the next span."""

            trace_id, span_id = 1, 1

            def generate_trace_id(self) -> int:
                return self.trace_id

            def generate_span_id(self) -> int:
                return self.span_id

        # What the library would tell of each try is told once, by us.
        self._said = _LastWords()
        library = logging.getLogger("opentelemetry")
        library.handlers[:], library.propagate = [self._said], False
        self._trace, self._ids, self._fine = trace, Given(), SpanExportResult.SUCCESS
        self._out = OTLPSpanExporter(
            endpoint=receiver.endpoint.rstrip("/") + "/v1/traces",
            headers=receiver.headers(),
            timeout=_EXPORT_S,
        )
        provider = TracerProvider(
            sampler=ALWAYS_ON, resource=Resource.create(dict(who)), shutdown_on_exit=False, id_generator=self._ids
        )
        self._tracer = provider.get_tracer(who.get("service.name", "llmrack"), who.get("service.version"))

    def __call__(self, spans: Sequence[Span]) -> str:
        self._said.text = ""
        try:
            done = self._out.export([self._made(span) for span in spans])
        except Exception as error:  # whatever it is, it must not end the thread
            return f"{type(error).__name__}: {error}"
        return "" if done is self._fine else self._said.text or "it was refused"

    def close(self) -> None:
        self._out.shutdown()  # type: ignore[no-untyped-call]

    def _made(self, span: Span) -> Any:
        trace = self._trace
        self._ids.trace_id, self._ids.span_id = int(span.context.trace, 16), int(span.context.span, 16)
        before = None
        if span.parent:
            parent = self._place(span.context.child(span.parent), remote=span.kind is Kind.SERVER)
            before = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        made = self._tracer.start_span(
            span.name,
            context=before or trace.set_span_in_context(trace.INVALID_SPAN),
            kind=trace.SpanKind[span.kind.name],
            attributes=dict(span.attributes) | ({"error.type": span.error} if span.error else {}),
            links=[trace.Link(self._place(one, remote=False)) for one in span.links],
            start_time=_nanoseconds(span.began),
            record_exception=False,
        )
        if span.error:
            made.set_status(trace.StatusCode.ERROR)
        made.end(_nanoseconds(max(span.began, span.ended)))
        return made

    def _place(self, context: Context, *, remote: bool) -> Any:
        trace = self._trace
        state = trace.TraceState.from_header([context.state]) if context.state else None
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        return trace.SpanContext(int(context.trace, 16), int(context.span, 16), remote, flags, state)


class _LastWords(logging.Handler):
    """Keeps the last of what was logged."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _installed() -> bool:
    try:
        return importlib.util.find_spec(_LIBRARY) is not None
    except ModuleNotFoundError:
        return False
