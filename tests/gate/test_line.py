"""What supervisor and workers say to each other arrives whole, and its end is noticed."""

from __future__ import annotations

import json

import pytest

from llmgate import line
from llmgate.line import Line, News, Order, Post


def test_words_arrive_in_order_with_their_details_and_the_end_last() -> None:
    ours, theirs = line.pair()
    worker = Line(theirs)
    assert list(worker.heard()) == []
    ours.say(Order.LEAVE)
    ours.say(Order.HURRY)
    worker.say(News.ALIVE, status="2 of 2 nodes take work", active=3)
    assert list(ours.heard()) == [(News.ALIVE, {"status": "2 of 2 nodes take work", "active": 3})]
    ours.close()
    assert not worker.ended
    assert [word for word, _ in worker.heard()] == [Order.LEAVE, Order.HURRY]
    assert worker.ended
    worker.say(News.READY)  # nobody hears it, and that is no error


def test_a_word_of_another_release_is_ignored_and_a_long_reason_is_cut() -> None:
    ours, theirs = line.pair()
    worker = Line(theirs)
    worker.socket.send(json.dumps({"say": "sing", "loud": True}).encode())
    worker.say(News.FAILED, why="no " * 100_000)
    ((word, details),) = ours.heard()
    assert word is News.FAILED
    assert details["why"].startswith("no no ") and len(details["why"]) == 2000


def test_a_post_is_read_as_it_was_written() -> None:
    post = Post(1, 2, 3, 4, "/tmp/a folder")
    assert Post.parse(post.text()) == post
    assert Post.parse(post.text()[:-1] + ', "colour": "red"}') == post
    with pytest.raises(ValueError, match="not a worker's post"):
        Post.parse('{"place": 1}')
