"""Server-sent events: frames survive any cut of the network, and comments cannot be mistaken for data."""

from __future__ import annotations

import json

import pytest

from llmnode.wire import errors, sse
from llmnode.wire.node import Usage

FRAMES = [
    sse.KEEPALIVE,
    sse.event({"text": "line\n\nline", "sign": "é…🙂"}),
    sse.event({"text": "\n: u 1 2 3\n\n"}),
    sse.usage_comment(Usage(11, 3, 5)),
    sse.DONE,
]
STREAM = b"".join(FRAMES)


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_frames_are_the_same_wherever_the_network_cuts(cut: int) -> None:
    frames = sse.Frames()
    assert frames.feed(STREAM[:cut]) + frames.feed(STREAM[cut:]) == FRAMES
    assert frames.rest == b""


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_frames_are_the_same_in_chunks_of_any_size(size: int) -> None:
    frames = sse.Frames()
    parts = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    assert [frame for part in parts for frame in frames.feed(part)] == FRAMES


def test_an_unfinished_frame_is_kept_back() -> None:
    frames = sse.Frames()
    assert frames.feed(b"data: {") == []
    assert frames.rest == b"data: {"


def test_a_frame_without_end_is_refused_at_the_limit() -> None:
    frames = sse.Frames(limit=100)
    assert frames.feed(b"x" * 100) == []
    with pytest.raises(ValueError, match="100 bytes"):
        frames.feed(b"x")


def test_text_can_never_look_like_a_frame_or_a_comment() -> None:
    for text in ("\n\n", "\n: u 1 2 3\n\n", "data: [DONE]\n\n", "\r\n\r\n", "\u2028\n"):
        frame = sse.event({"t": text})
        assert frame.count(b"\n") == 2
        assert json.loads(frame.removeprefix(b"data: "))["t"] == text


@pytest.mark.parametrize("usage", [Usage(), Usage(1, 2, 3), Usage(2**40, 0, 7)])
def test_usage_is_read_as_it_was_written(usage: Usage) -> None:
    assert sse.read_usage(sse.usage_comment(usage)) == usage


@pytest.mark.parametrize(
    "frame",
    [sse.KEEPALIVE, sse.DONE, b"", b": u\n\n", b": u 1 2\n\n", b": u 1 2 3 4\n\n", b": u 1 2 -3\n\n", b": u a b c\n\n",
     b"data: : u 1 2 3\n\n", b": u 1 2 3.0\n\n"],
)  # fmt: skip
def test_other_frames_are_no_usage(frame: bytes) -> None:
    assert sse.read_usage(frame) is None


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60")])
def test_retry_after_is_a_whole_number_of_seconds_and_never_too_early(seconds: float, header: str) -> None:
    assert errors.Overloaded("full", retry_after=seconds).headers() == {"retry-after": header}


def test_every_error_has_openais_shape() -> None:
    error = errors.ModelNotFound("x", ["b", "a"])
    assert error.status == 404
    assert error.body() == {
        "error": {
            "message": "the model 'x' does not exist; models served here: a, b",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert error.headers() == {}


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n"])
def test_an_event_is_one_line_also_for_clients_that_split_as_text_does(sign: str) -> None:
    frame = sse.event({"text": f"é{sign}é"})
    lines = frame.decode().splitlines()
    assert len(lines) == 2 and lines[1] == ""
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": f"é{sign}é"}
