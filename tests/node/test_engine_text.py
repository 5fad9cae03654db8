"""Tokens become whole characters, and no part of a stop string ever gets out."""

from __future__ import annotations

import random

import pytest

from llmnode.engine.text import TextStream

BYTES = [bytes([byte]) for byte in range(256)]


def said(pieces: list[bytes], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(pieces, stops)
    out = []
    for token in range(len(pieces)):
        out.append(stream.push(token))
        if stream.stopped:
            return out, True
    return [*out, stream.flush()], False


def test_a_character_comes_out_once_its_last_byte_is_there() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(byte) for byte in "é€😀".encode()] == ["", "é", "", "", "€", "", "", "", "😀"]


def test_bytes_that_cannot_be_text_become_the_replacement_character() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(0xC3), stream.push(0x28), stream.push(0x80)] == ["", "�(", "�"]


def test_half_a_character_at_the_end_is_dropped() -> None:
    stream = TextStream(BYTES)
    assert stream.push(0xE2) + stream.push(0x82) + stream.flush() == ""


def test_a_stop_string_across_token_borders_is_cut_out() -> None:
    assert said([b"ab", b"c<", b"e", b"n", b"d>x"], ("<end>",)) == (["ab", "c", "", "", ""], True)


def test_text_that_only_began_like_a_stop_string_comes_out() -> None:
    assert said([b"a<e", b"nd", b"!"], ("<end>",)) == (["a", "", "<end!", ""], False)


def test_what_was_held_back_comes_out_at_the_end() -> None:
    assert said([b"a<e", b"nd"], ("<end>",)) == (["a", "", "<end"], False)


def test_a_stop_string_that_overlaps_itself_is_found() -> None:
    assert said([b"a", b"a", b"ab"], ("aab",)) == (["", "", "a"], True)


def test_a_stop_string_of_several_bytes_a_character_is_found_across_half_characters() -> None:
    data = "x→←y".encode()
    assert said([data[:2], data[2:5], data[5:]], ("→←",)) == (["x", "", ""], True)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert said([b"xabcd"], ("abcd", "bc")) == (["xa"], True)
    assert said([b"xabc"], ("bc", "abc")) == (["x"], True)


@pytest.mark.parametrize("seed", range(200))
def test_the_answer_does_not_depend_on_where_token_borders_lie(seed: int) -> None:
    dice = random.Random(seed)
    letters = "aabb→é"
    text = "".join(dice.choice(letters) for _ in range(40))
    stops = tuple("".join(dice.choice(letters) for _ in range(dice.randint(1, 5))) for _ in range(dice.randint(1, 3)))
    whole = "".join(said([text.encode()], stops)[0])
    data, pieces = text.encode(), []
    while data:
        size = dice.randint(1, 4)
        pieces.append(data[:size])
        data = data[size:]
    assert "".join(said(pieces, stops)[0]) == whole
    assert not any(stop in whole for stop in stops)
    assert text.startswith(whole)
