"""What a body asks for, or what is wrong with it; and another name for its model, and not one other byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmgate.core.body import ModelMissing, asked, read, renamed

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(st.text(), VALUES, max_size=3))
def test_a_body_is_read_as_it_was_written(body: dict[str, Any]) -> None:
    assert read(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"a":"\xff"}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_what_is_no_body_is_told(body: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        read(body)


def test_the_only_model_need_not_be_named() -> None:
    assert asked({}, ["a"]) == asked({"model": None}, ["a"]) == "a"
    assert asked({"model": "b"}, ["a"]) == asked({"model": "b"}, []) == "b"
    with pytest.raises(ModelMissing, match="model is missing; models served: a, b"):
        asked({}, ["a", "b"])
    with pytest.raises(ModelMissing, match="models served: none"):
        asked({}, [])


@pytest.mark.parametrize("name", [5, "", [], {}, True])
def test_a_name_that_is_none_is_told(name: Any) -> None:
    with pytest.raises(ValueError, match="model must be a string of one character or more, got ") as caught:
        asked({"model": name}, ["a"])
    assert not isinstance(caught.value, ModelMissing)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":@}',
        b' \n{ "x" : 1.0e3 ,\t"model"\r\n:  @ , "y":[1, 2]}  ',
        b"{}",
        b'{"models":"a"}',
        # Inside strings, nested, in lists: other things that only look like it.
        b'{"x":"\\"model\\":\\"a\\"","model":@}',
        b'{"m":{"model":"a"},"model":@,"n":[{"model":"a"}]}',
        b'{"a":"model","model":@}',
        b'{"x":"}{][,:\\\\","model":@}',
        b'{"mod\\u0065l":@}',
        # Of two keys the last one counts, as it does for whoever reads the body.
        b'{"model":"first","model":@}',
        '{"é":"ü€𝄞","model":@}'.encode(),
        b'{"x":"\\ud800","model":@,"y":"\xed\xa0\x80"}',
    ],
)
@pytest.mark.parametrize("old", [b'"a"', b'"\\u0061"', '"ñ"'.encode(), b'{"a":["}"]}'])
def test_only_the_value_of_the_model_changes(body: bytes, old: bytes) -> None:
    json.loads(body.replace(b"@", old))
    assert renamed(body.replace(b"@", old), "NEW") == body.replace(b"@", b'"NEW"')


def test_a_name_is_written_as_json() -> None:
    assert json.loads(renamed(b'{"model":"a"}', 'q"uo\\te é'))["model"] == 'q"uo\\te é'


def test_encodings_that_python_reads_are_read() -> None:
    assert renamed('{"model":"a","é":1}'.encode("utf-16"), "b") == '{"model":"b","é":1}'.encode()


@given(
    before=st.dictionaries(st.text(), VALUES, max_size=4),
    after=st.dictionaries(st.text(), VALUES, max_size=4),
    old=st.text(),
    new=st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    ascii=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
)
def test_any_body_keeps_all_its_other_bytes(
    before: dict[str, Any], after: dict[str, Any], old: str, new: str, ascii: bool, indent: int | None
) -> None:
    after.pop("model", None)

    def written(pairs: dict[str, Any]) -> bytes:
        text = json.dumps(pairs, ensure_ascii=ascii, indent=indent)
        return text.encode("utf-8", "surrogatepass")

    head, middle, tail = written(before).rstrip()[:-1].rstrip(), b'"model" :', written(after).lstrip()[1:]
    comma_before = b"," if before else b""
    comma_after = b"," if after else b""
    value = json.dumps(old, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    body = head + comma_before + middle + value + comma_after + tail
    json.loads(body)
    wanted = head + comma_before + middle + json.dumps(new, ensure_ascii=False).encode() + comma_after + tail
    assert renamed(body, new) == wanted
