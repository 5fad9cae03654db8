"""Ids and bytes agree: wherever an answer is cut, its client has heard exactly what the committed ids say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgate.core.reader import Reader
from llmnode.wire import sse
from llmnode.wire.node import Usage
from llmnode.wire.resume import HANDOVER, Committed, Fixed, marker
from tests.gate.mock_answer import Script

LIMIT = 1 << 20
ENDS = [
    b"",
    HANDOVER,
    b'data: {"error":{"type":"server_error"}}\n\n',
    b": t 0 77 5\n\n",
    b": t what\n\n",
    b": t 0 1 x\n\n",
]


def script(**fields: object) -> Script:
    body = {"messages": ["hi"], "stream": True, "stream_options": {"include_usage": True}, **fields}
    return Script(json.dumps(body).encode(), Fixed("abc", 1_700_000_000, 7))


def spoken(answer: Script, out: tuple[tuple[int, ...], ...] = ()) -> bytes:
    """All that a node sends that goes on from these ids, keepalives between the steps."""
    steps = [step.frames + step.marker + sse.KEEPALIVE for step in answer.steps(out)]
    *rest, done = answer.ending()
    return b"".join([*steps, *rest, sse.usage_comment(answer.usage), done])


def without_comments(data: bytes) -> bytes:
    return b"".join(f + b"\n\n" for f in data.split(b"\n\n")[:-1] if not f.startswith(b":"))


def chunks(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return (data[a:b] for a, b in itertools.pairwise(edges))


@given(
    st.integers(1, 3),
    st.integers(3, 9),
    st.integers(0, 99),
    st.lists(
        st.tuples(st.integers(0, 5000), st.sampled_from(ENDS), st.lists(st.integers(0, 5000), max_size=12)), max_size=6
    ),
    st.lists(st.integers(0, 5000), max_size=12),
)
def test_no_cut_loses_or_repeats_a_byte(
    choices: int, length: int, seed: int, cuts: list[tuple[int, bytes, list[int]]], edges: list[int]
) -> None:
    """Any number of nodes, each cut after any byte, with any last words, the network cutting chunks anywhere."""
    answer = script(n=choices, max_tokens=length, seed=seed)
    committed, heard = Committed(), b""
    for where, last_words, borders in cuts:
        said = spoken(answer, committed.ids())
        said = said[: where % len(said)] + last_words
        reader = Reader(committed, LIMIT)
        heard += b"".join(map(reader.feed, chunks(said, borders)))
        assert not reader.done
    reader = Reader(committed, LIMIT)
    heard += b"".join(map(reader.feed, chunks(spoken(answer, committed.ids()), edges)))
    assert reader.done
    assert reader.usage == answer.usage
    assert without_comments(heard) == answer.heard()
    assert b"\n\n: t " not in heard
    assert b"\n\n: u " not in heard
    assert committed.ids() == answer.ids


def test_a_resumed_stream_that_skips_one_token_is_noticed() -> None:
    """In the count by the reader, in the text by the comparison above."""
    answer = script()
    committed = Committed()
    steps = list(answer.steps())
    told = Reader(committed, LIMIT).feed(b"".join(s.frames + s.marker for s in steps[:3]))
    rest = list(answer.steps(committed.ids()))
    reader = Reader(committed, LIMIT)
    assert reader.feed(b"".join(s.frames + s.marker for s in rest[1:])) == b""
    assert "do not make 5" in reader.broken
    reader = Reader(committed, LIMIT)
    unseen = b"".join((s.frames if s is not rest[1] else b"") + s.marker for s in rest) + b"".join(answer.ending())
    assert told + reader.feed(unseen) != answer.heard()
    assert reader.done


def test_frames_wait_for_their_marker_and_comments_for_nobody() -> None:
    reader = Reader(Committed(), LIMIT)
    frame = sse.event({"a": 1})
    assert reader.feed(frame) == b""
    assert not reader.content
    assert reader.feed(sse.KEEPALIVE) == sse.KEEPALIVE
    assert not reader.content
    assert reader.feed(marker(0, 1, [5])[:-1]) == b""
    assert reader.feed(b"\n" + sse.KEEPALIVE) == frame + sse.KEEPALIVE
    assert reader.content
    assert reader.feed(sse.KEEPALIVE) == sse.KEEPALIVE
    assert not reader.content


def test_what_was_committed_before_a_fault_goes_on_all_the_same() -> None:
    for fault in ENDS[1:]:
        committed = Committed()
        reader = Reader(committed, LIMIT)
        frame = sse.event({"a": 1})
        assert reader.feed(frame + marker(0, 1, [5]) + frame + fault + frame + marker(0, 2, [6])) == frame
        assert reader.over
        assert not reader.done
        assert committed.ids() == ((5,),)
        assert reader.feed(frame) == b""


def test_an_answer_without_markers_goes_on_frame_by_frame() -> None:
    reader = Reader(None, LIMIT)
    frame = sse.event({"a": 1})
    assert reader.feed(frame + frame[:5]) == frame
    assert reader.feed(frame[5:] + sse.usage_comment(Usage(1, 2, 3)) + sse.DONE) == frame + sse.DONE
    assert reader.done
    assert reader.usage == Usage(1, 2, 3)


@pytest.mark.parametrize("said", [b"data: " + b"x" * 99, b"data: x\n\n" * 14])
def test_what_waits_is_bounded(said: bytes) -> None:
    reader = Reader(Committed(), 90)
    assert reader.feed(said) == b""
    assert "more than 90 bytes" in reader.broken


def test_a_long_body_in_small_chunks_takes_linear_time() -> None:
    """16 MiB in chunks of 4 KiB: copying all that is there for each would be 32 GiB."""
    reader = Reader(Committed(), 1 << 26)
    body = b"data: " + b"x" * (1 << 24) + b"\n\n"
    for at in range(0, len(body), 4096):
        assert reader.feed(body[at : at + 4096]) == b""
    assert reader.feed(sse.DONE) == body + sse.DONE


def test_an_endpoint_without_done_ends_in_a_comment_that_nobody_hears() -> None:
    committed = Committed()
    reader = Reader(committed, LIMIT)
    first, ping, last = (sse.event({"type": name}, name) for name in ("message_start", "ping", "message_stop"))
    assert reader.feed(first + ping) == ping, "a sign of life has no place in the order, and waits for no marker"
    assert not reader.content
    assert reader.feed(marker(0, 1, [7])) == first
    assert reader.feed(last + sse.usage_comment(Usage(1, 0, 1)) + sse.END + b": more\n\n") == last
    assert reader.done and reader.usage == Usage(1, 0, 1)
