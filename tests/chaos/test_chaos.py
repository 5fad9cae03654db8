"""Promises of chaos: a small storm leaves no harm, a token that is dropped on the way is noticed, and the verdict is
what the rules say."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llmnode.wire import sse
from tests.chaos import chaos
from tests.chaos import faults as dice
from tests.chaos.answers import Answer, Broken, Choice, streamed, whole
from tests.chaos.asks import Ask, asks, plain_asks
from tests.chaos.chaos import Report, Storm, weather
from tests.chaos.client import Outcome, judge
from tests.chaos.faults import Fault, Kind
from tests.chaos.fleet import Readiness
from tests.chaos.shim import Shim

SMALL = Storm(seed=3, seconds=60, streams=20, tokens=60, step_s=0.03, stall_s=3.0)
ASK = Ask("greedy", "/v1/chat/completions", {"stream": True})


def test_a_small_storm_leaves_no_harm(tmp_path: Path) -> None:
    faults = [
        Fault(Kind.KILL, "node-1", 0.2, 0.5),
        Fault(Kind.RELOAD, "gate-1", 0.5, 0.0),
        Fault(Kind.STOP, "node-2", 4.5, 0.5),
        Fault(Kind.RESTART, "gate-2", 0.0, 0.0),
        Fault(Kind.DRAIN, "node-3", 0.2, 0.5),
        Fault(Kind.LEASE, "node-1", 0.5, 0.5),
    ]
    report = asyncio.run(weather(SMALL, tmp_path, faults))
    assert not report.violations, str(report)
    assert sum(report.faults.values()) == len(faults)
    assert report.moved > 0, "no answer had to move: the faults hit nobody"


def test_a_resumed_stream_that_skips_one_token_fails_the_run(tmp_path: Path) -> None:
    shims: list[Shim] = []

    def through_a_shim(url: str) -> str:
        shims.append(Shim(url))
        return shims[-1].url

    async def main() -> Report:
        storm = dataclasses.replace(SMALL, nodes=2, gates=1, disturbed=1)
        try:
            return await weather(storm, tmp_path, [Fault(Kind.KILL, "node-1", 0.2, 0.0)], seen_at=through_a_shim)
        finally:
            await asyncio.gather(*(shim.stop() for shim in shims))

    report = asyncio.run(main())
    dropped = sum(shim.dropped for shim in shims)
    assert dropped > 0, "the fault hit nobody"
    assert len(report.lost) == dropped
    assert report.violations


def chunk(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    delta = {"content": text} if text else {}
    choice = {"index": 0, "delta": delta | more.pop("delta", {}), "logprobs": None, "finish_reason": finish}
    body = {"id": "chatcmpl-1", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    return sse.event({**body, "choices": [choice], **more})


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
FIRST, A, B = chunk(delta={"role": "assistant", "content": ""}), chunk("a"), chunk("b")
LAST, TOKENS = chunk(finish="stop"), chunk(usage=USAGE, choices=[])
STREAM = FIRST + A + sse.KEEPALIVE + B + LAST + TOKENS + sse.DONE
ANSWER = Answer((Choice("ab", "stop"),), 3, 2)


def test_a_stream_and_a_body_of_the_same_answer_are_equal() -> None:
    message = {"role": "assistant", "content": "ab"}
    choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert streamed(STREAM, 1) == whole(json.dumps({"choices": choices, "usage": USAGE}).encode(), 1) == ANSWER


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (STREAM[:-5], "within an event"),
        (STREAM.removesuffix(sse.DONE), r"without \[DONE\]"),
        (STREAM + sse.DONE, "more than once"),
        (STREAM + A, r"without \[DONE\]"),
        (STREAM.replace(LAST, b""), "no end"),
        (STREAM.replace(LAST, LAST + A), "goes on after its end"),
        (STREAM.replace(LAST, LAST + LAST), "goes on after its end"),
        (STREAM.replace(A, FIRST + A), "introduced twice"),
        (STREAM.replace(TOKENS, b""), "no usage"),
        (STREAM.replace(TOKENS, TOKENS + TOKENS), "usage came more than once"),
        (STREAM.replace(B, B.replace(b"chatcmpl-1", b"chatcmpl-2")), "goes on with"),
        (STREAM.replace(B, B.replace(b'"created":1', b'"created":2')), "goes on with"),
        (STREAM.replace(B, b": t 0 1 97\n\n" + B), "between gate and node"),
        (STREAM.replace(B, b": handover\n\n" + B), "between gate and node"),
        (STREAM.replace(B, sse.event({"error": {"message": "x"}})), "an error event"),
    ],
)
def test_a_stream_with_a_flaw_is_no_answer(body: bytes, why: str) -> None:
    with pytest.raises(Broken, match=why):
        streamed(body, 1)


def test_an_answer_lacks_a_choice_only_where_none_was_asked_for() -> None:
    with pytest.raises(Broken, match="1 choices came, 2 were asked for"):
        streamed(STREAM, 2)


def error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


def test_a_refusal_is_a_status_before_the_first_byte_that_says_when_to_come_again() -> None:
    assert judge(ASK, 0, 1, 503, "2", error("full"), "").refused == "503: full"
    assert judge(ASK, 0, 1, 429, "", error("slow down"), "").refused
    assert judge(ASK, 0, 1, 503, "", error("full"), "").lost
    assert judge(ASK, 0, 1, 500, "", error("broken"), "").lost
    assert judge(ASK, 0, 1, 400, "", error("bad"), "").lost


def test_a_door_that_does_not_open_and_a_stream_that_breaks_off_are_losses() -> None:
    assert "refused" in judge(ASK, 0, 1, 0, "", b"", "ClientConnectorError: connection refused").lost
    assert "broke off" in judge(ASK, 0, 1, 200, "", STREAM[:40], "ClientPayloadError: broke off").lost
    assert judge(ASK, 0, 1, 200, "", STREAM, "").answer == ANSWER


def verdict(*outcomes: Outcome, lost: int = 0) -> Report:
    return Report(list(outcomes), lost=["x"] * lost)


def test_ninety_five_in_a_hundred_must_be_answered_and_none_lost() -> None:
    good, refused, broken = Outcome(ASK, 0, 1, ANSWER), Outcome(ASK, 0, 1, refused="503"), Outcome(ASK, 0, 1, lost="x")
    assert not verdict(*[good] * 95, *[refused] * 5).violations
    assert "94 of 100 requests" in verdict(*[good] * 94, *[refused] * 6).violations[0]
    assert verdict(*[good] * 99, broken, lost=1).violations == ["lost: x"]
    assert verdict(*[good] * 100, lost=1).answered == 99, "an answer that is not the right one is none"
    assert verdict().violations


def test_a_refusal_is_founded_only_while_no_node_was_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1)
    monkeypatch.setattr("tests.chaos.fleet.time.monotonic", lambda: float(next(clock)))
    readiness = Readiness()
    for name, ready in (("a", True), ("b", True), ("a", False), ("b", False), ("a", True), ("b", True)):
        readiness.note(name, ready)  # at 1, 2, ... 6: nobody is ready from 4 to 5
    assert not readiness.none_within(2.5, 3.9)
    assert readiness.none_within(3.5, 4.0)
    assert readiness.none_within(4.2, 4.8)
    assert readiness.none_within(4.9, 9.0)
    assert not readiness.none_within(5.0, 9.0)


def test_the_same_seed_brings_the_same_faults_and_every_kind_once_a_round() -> None:
    def faults(seed: int) -> list[Fault]:
        drawn = dice.drawn(seed, ["node-1", "node-2"], ["gate-1"], dice.NETWORKED, stall_s=2.0)
        return list(itertools.islice(drawn, 4 * len(dice.NETWORKED)))

    assert faults(1) == faults(1) != faults(2)
    for at in range(0, 4 * len(dice.NETWORKED), len(dice.NETWORKED)):
        assert {fault.kind for fault in faults(1)[at : at + len(dice.NETWORKED)]} == set(Kind)
    assert all(fault.target.startswith("gate") == fault.kind.of_gates for fault in faults(1))


def test_the_same_seed_asks_the_same_and_leaves_nothing_to_chance() -> None:
    for make in (asks, plain_asks):
        assert make(40, 1, 50) == make(40, 1, 50) != make(40, 2, 50)
        assert all("seed" in ask.body for ask in make(40, 1, 50))
    assert {ask.kind for ask in asks(14, 1, 50)} >= {"grammar", "schema", "n", "stop", "logprobs"}
    assert {ask.streams for ask in asks(40, 1, 50)} == {True, False}


def test_without_root_links_are_not_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(chaos, "end_cleanly", lambda: None)
    assert chaos.main(["--network", "--seed", "1"]) == 2
    assert "run it as root" in capsys.readouterr().err
