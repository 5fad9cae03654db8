"""What gate and nodes say to each other of an answer that moves: read as written, or refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmnode.wire import sse
from llmnode.wire.resume import HANDOVER, Committed, Fixed, Marker, Origin, Resume, check_choices, marker, read_marker

FIXED = Fixed("abc-1_Z", 1_700_000_000, 2**32 - 2)
ORIGIN = Origin("tiny", "d1", "t1")
ids = st.lists(st.integers(0, 2**31 - 1), max_size=20).map(tuple)


def test_what_the_gate_fixes_is_read_as_it_was_written() -> None:
    assert Fixed.parse(FIXED.header()) == FIXED


def test_another_version_is_no_error_but_no_resume_either() -> None:
    assert Fixed.parse("2 whatever may come") is None


@pytest.mark.parametrize("text", ["", "x", "1 a 2", "1 a b 3", "1 a/b 2 3", "1 a 2 4294967295", "1 a -2 3", "1  2 3"])
def test_a_malformed_header_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        Fixed.parse(text)


@given(st.lists(ids, max_size=4).map(tuple), st.binary(max_size=200))
def test_a_resume_is_read_as_it_was_written(rows: tuple[tuple[int, ...], ...], body: bytes) -> None:
    resume = Resume("/v1/chat/completions", ORIGIN, FIXED, rows, body)
    assert Resume.parse(resume.write()) == resume


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 2}, "version"),
        ({"path": None}, "path"),
        ({"model": 3}, "model"),
        ({"digest": None}, "digest"),
        ({"template": 1}, "template"),
        ({"ids": [[-1]]}, "ids"),
        ({"ids": [["a"]]}, "ids"),
        ({"ids": None}, "ids"),
        ({"id": ""}, "id"),
        ({"created": 1.5}, "created"),
        ({"created": 253_402_300_800}, "created"),
        ({"seed": 2**32 - 1}, "seed"),
    ],
)
def test_a_wrong_resume_names_its_field(change: dict[str, object], named: str) -> None:
    head, _, body = Resume("/p", ORIGIN, FIXED, ((1, 2),), b"{}").write().partition(b"\n")
    with pytest.raises(ValueError, match=named):
        Resume.parse(json.dumps(json.loads(head) | change).encode() + b"\n" + body)


def test_a_resume_of_the_release_before_names_no_template() -> None:
    head, _, body = Resume("/p", ORIGIN, FIXED, ((1, 2),), b"{}").write().partition(b"\n")
    older = {name: value for name, value in json.loads(head).items() if name != "template"}
    assert Resume.parse(json.dumps(older).encode() + b"\n" + body).origin == Origin("tiny", "d1", "")


@given(st.text(), st.text(), st.text())
def test_an_origin_is_read_as_it_was_written_whatever_its_names(model: str, digest: str, template: str) -> None:
    text = Origin(model, digest, template).header()
    assert text.isascii() and text.isprintable()
    assert Origin.parse(text) == Origin(model, digest, template)


@pytest.mark.parametrize("text", ["", "d1", "[]", "{}", '{"model": "m", "digest": 1, "template": ""}'])
def test_a_malformed_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"origin|must be a string"):
        Origin.parse(text)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]\n", b"{\n", b"1\nx"])
def test_what_is_no_resume_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Resume.parse(data)


@given(st.integers(0, 200), st.integers(0, 10**6), ids)
def test_a_marker_is_read_as_it_was_written(choice: int, before: int, new: tuple[int, ...]) -> None:
    frame = marker(choice, before + len(new), new)
    assert sse.Frames().feed(frame) == [frame]
    assert read_marker(frame) == Marker(choice, before + len(new), new)


@pytest.mark.parametrize("frame", [sse.DONE, sse.KEEPALIVE, HANDOVER, b"data: : t 0 1 2\n\n", b": u 1 2 3\n\n"])
def test_other_frames_are_no_markers(frame: bytes) -> None:
    assert read_marker(frame) is None


@pytest.mark.parametrize("frame", [b": t \n\n", b": t 0 1\n\n", b": t 0 1 2 3\n\n", b": t 0 x 2\n\n", b": t 0 1 a\n\n"])
def test_a_malformed_marker_is_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match="commit marker"):
        read_marker(frame)


def test_committed_ids_follow_without_gap_or_repeat() -> None:
    committed = Committed()
    committed.add(Marker(1, 2, (5, 6)))
    committed.add(Marker(1, 2, ()))
    committed.add(Marker(0, 1, (9,)))
    assert (committed.ids(), committed.size) == (((9,), (5, 6)), 3)
    for wrong in (
        Marker(0, 3, (1,)),
        Marker(0, 1, (1,)),
        Marker(7, 3, (1,)),
        Marker(-1, 1, (1,)),
        Marker(5000, 1, (1,)),
    ):
        with pytest.raises(ValueError, match="choice"):
            committed.add(wrong)
    for wrong in (Marker(0, 2, (2**32,)), Marker(0, 2, (-1,))):
        with pytest.raises(ValueError, match="2\\*\\*32 - 1"):
            committed.add(wrong)
    assert (committed.ids(), committed.size) == (((9,), (5, 6)), 3)


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 4), st.lists(st.integers(-1, 2**32), max_size=3))))
def test_markers_are_added_alike_read_or_as_they_stand(marks: list[tuple[int, int, list[int]]]) -> None:
    one, other = Committed(), Committed()
    for choice, count, new in marks:
        frame = marker(choice, count, new)
        said = []
        for add, given_form in ((one.add, read_marker(frame)), (other.read, frame[:-2])):
            try:
                add(given_form)  # type: ignore[operator]
                said.append("")
            except ValueError as error:
                said.append(str(error))
        assert said[0] == said[1]
        assert (one.ids(), one.size) == (other.ids(), other.size)


def test_choices_that_have_not_begun_are_empty() -> None:
    assert check_choices([[1, 2]], 3) == ((1, 2), (), ())
    with pytest.raises(ValueError, match="2 lists"):
        check_choices([[1], [2]], 1)
