"""Contexts of traces as W3C has them, who collects spans, and what is decided about a trace that begins here."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmnode.service.settings import SettingError
from llmnode.service.spans import Context, known, operation
from llmnode.service.traces import Receiver, Traces

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_context_is_read_and_written_as_it_came() -> None:
    context = Context.parse(GOOD, "a=1,b=2")
    assert context == Context(TRACE, SPAN, True, "a=1,b=2")
    assert context.headers() == {"traceparent": GOOD, "tracestate": "a=1,b=2"}
    assert context.child("1" * 16).headers()["traceparent"] == f"00-{TRACE}-{'1' * 16}-01"
    assert Context.parse(f"00-{TRACE}-{SPAN}-00") == Context(TRACE, SPAN, False)
    assert Context.parse(f"00-{TRACE}-{SPAN}-02") == Context(TRACE, SPAN, False), "only the last bit is ours"
    assert Context.parse(f"cc-{TRACE}-{SPAN}-01-what-comes-later") == Context(TRACE, SPAN, True)


@pytest.mark.parametrize(
    "parent",
    [
        None,
        "",
        "nothing of the kind",
        GOOD.upper(),
        GOOD + "-more",
        GOOD[:-1],
        GOOD + "\n",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
    ],
)
def test_a_context_that_cannot_be_read_is_none(parent: str | None) -> None:
    assert Context.parse(parent) is None


@pytest.mark.parametrize("state", ["x" * 513, "a=é", "a=1\r\nb: 2"])
def test_a_state_that_no_header_could_hold_stays_behind(state: str) -> None:
    assert Context.parse(GOOD, state) == Context(TRACE, SPAN, True)


def test_an_endpoint_is_about_what_the_conventions_call_it() -> None:
    assert operation("/v1/messages") == "chat"
    assert operation("/infill") == "text_completion"
    assert operation("/apply-template") == "apply_template"
    assert known({"a": None, "b": "", "c": 0, "d": False}) == {"c": 0, "d": False}


def test_who_collects_is_checked_before_anything_starts(tmp_path: Path) -> None:
    headers = tmp_path / "headers"
    headers.write_text("Authorization=Bearer a=b\n\n x-scope = me \n")
    receiver = Receiver("http://127.0.0.1:4318", headers)
    receiver.check()
    assert receiver.headers() == {"authorization": "Bearer a=b", "x-scope": "me"}
    with pytest.raises(SettingError, match="http://HOST:PORT"):
        Receiver("127.0.0.1:4318").check()
    with pytest.raises(SettingError, match="must hold no secret") as found:
        Receiver("http://me:hunter2@collector").check()
    assert "hunter2" not in str(found.value)
    headers.write_text("a secret without a sign of equality\n")
    with pytest.raises(SettingError, match="line 1: must be NAME=VALUE") as found:
        receiver.check()
    assert "a secret" not in str(found.value)
    headers.unlink()
    with pytest.raises(SettingError, match="cannot read otlp_headers_file"):
        receiver.check()


def test_so_many_of_the_traces_that_begin_here_are_recorded_and_others_as_their_clients_want() -> None:
    def recorded(ratio: float) -> int:
        number = iter(range(1_000_000))

        def entropy(size: int) -> bytes:
            """Bytes of which those that decide are spread evenly."""
            return bytes(size - 7) + bytes([next(number) % 256]) + b"\1" * 6

        traces = Traces(Receiver("http://127.0.0.1:9", ratio=ratio), {}, entropy)
        try:
            assert traces.context(f"00-{TRACE}-{SPAN}-01")[0].sampled
            assert not traces.context(f"00-{TRACE}-{SPAN}-00")[0].sampled
            return sum(traces.context(None)[0].sampled for _ in range(128))
        finally:
            traces.close()

    assert [recorded(ratio) for ratio in (0.0, 0.25, 1.0)] == [0, 32, 128]
