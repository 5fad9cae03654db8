"""The gate's part of an answer that can be resumed, as plainly as it can be written: what tests hold the node against.

`Heard` keeps what one client would have got: frames up to the last commit marker, and the ids that the markers brought.
`joined` is what such a client can tell of them: how a choice's text is cut into chunks depends on when its tokens came,
so neighbouring chunks of a choice are put together, and everything else is compared as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from llmnode.wire import headers, sse
from llmnode.wire.resume import HANDOVER, PATH, Committed, Fixed, Origin, Resume, read_marker
from tests.processes import Program

FIXED = Fixed("r1-A_z", 1_900_000_000, 4_000_000_000)


class Heard:
    """What a client has of an answer. `frames` are out; `ended`: all of it is; `handed_over`: a node said so."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.committed = Committed()
        self.ended = self.handed_over = False
        self._held: list[bytes] = []

    def take(self, frame: bytes) -> None:
        mark = read_marker(frame)
        if mark is not None:
            assert mark.ids, "a marker without an id"
            self.committed.add(mark)
        elif frame == HANDOVER:
            assert not self._held, f"a handover between frames and their marker: {self._held}"
            self.handed_over = True
            return
        elif frame != sse.KEEPALIVE:
            self._held.append(frame)
        self.ended = frame in (sse.DONE, sse.END)
        if mark is not None or self.ended:
            self.frames += self._held
            self._held = []


def heard(frames: Iterable[bytes], into: Heard | None = None) -> Heard:
    into = into or Heard()
    for frame in frames:
        into.take(frame)
    return into


@contextmanager
def opened(node: Program, path: str, data: bytes, **more: str) -> Iterator[Iterator[bytes]]:
    """The frames of a stream as they come."""
    said = {"content-type": "application/json", headers.REPORT_USAGE: "1", **more}
    with httpx.stream("POST", node.url + path, content=data, headers=said, timeout=120) as response:
        if response.status_code != 200:
            raise AssertionError(response.read())
        assert response.headers[headers.RESUMABLE] == "1"
        assert response.headers["content-type"] == "text/event-stream"
        whole = sse.Frames()
        yield (frame for piece in response.iter_raw() for frame in whole.feed(piece))


def begun(node: Program, path: str, body: dict[str, Any], fixed: Fixed = FIXED) -> list[bytes]:
    """All frames of an answer that can be resumed."""
    with opened(node, path, json.dumps(body).encode(), **{headers.RESUMABLE: fixed.header()}) as frames:
        return list(frames)


def envelope(
    path: str, body: dict[str, Any], ids: Sequence[Sequence[int]], fixed: Fixed = FIXED, model: str = "m"
) -> bytes:
    return Resume(path, Origin(model, "", ""), fixed, tuple(map(tuple, ids)), json.dumps(body).encode()).write()


def resumed(node: Program, data: bytes) -> list[bytes]:
    with opened(node, PATH, data) as frames:
        return list(frames)


def finish_everywhere(node: Program, path: str, body: dict[str, Any], frames: list[bytes]) -> None:
    """An answer is cut at every marker, and `node` goes on with it: no client can tell."""
    whole = heard(frames)
    assert whole.ended
    expected, ids = joined(whole.frames), whole.committed.ids()
    assert expected["rest"][-2][1] == whole.committed.size, "usage counts each id"
    cuts = [0] + [at + 1 for at, frame in enumerate(frames) if read_marker(frame)]
    assert len(cuts) > 1

    def finished(cut: int) -> None:
        client = heard(frames[:cut])
        heard(resumed(node, envelope(path, body, client.committed.ids())), client)
        assert client.ended
        assert joined(client.frames) == expected, cut
        assert client.committed.ids() == ids

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(finished, cuts))


def joined(frames: Iterable[bytes]) -> dict[str, Any]:
    """choices: the chunks of each, neighbouring pieces put together.
    logprobs: of each chat's choice, which may come with any of its chunks.
    rest: what comes after them, or in one body.

    How much of a prompt was reused is a node's own affair, and is left out."""
    choices: dict[int, list[Any]] = {}
    logprobs: dict[int, list[Any]] = {}
    rest: list[Any] = []
    for frame in frames:
        usage = sse.read_usage(frame)
        if usage is not None:
            rest.append((usage.prompt_tokens, usage.completion_tokens))
            continue
        if frame == sse.DONE:
            rest.append("[DONE]")
            continue
        event = json.loads(frame.removeprefix(b"data: "))
        if event.get("usage"):
            reused = event["usage"].pop("prompt_tokens_details")["cached_tokens"]
            assert 0 <= reused <= event["usage"]["prompt_tokens"]
        told = event.get("choices", ())
        if len(told) == 1 and "message" not in told[0]:
            if "delta" in told[0] and told[0]["logprobs"]:
                logprobs.setdefault(told[0]["index"], []).extend(told[0]["logprobs"]["content"])
                told[0]["logprobs"] = None
            _add(choices.setdefault(told[0]["index"], []), event)
        else:
            rest.append(event)
    return {"choices": choices, "logprobs": logprobs, "rest": rest}


def _add(chunks: list[Any], event: Any) -> None:
    before = chunks[-1]["choices"][0] if chunks else None
    choice = event["choices"][0]
    if _is_piece(choice) and choice.get("delta") in ({}, {"content": ""}):
        return
    if before is None or not _is_piece(before) or not _is_piece(choice):
        chunks.append(event)
        return
    if "text" in choice:
        before["text"] += choice["text"]
    elif not _join(before["delta"], choice["delta"]):
        chunks.append(event)
        return
    if choice["logprobs"]:
        for name, value in choice["logprobs"].items():
            if isinstance(value, list):
                before["logprobs"][name] += value


def _join(before: dict[str, Any], delta: dict[str, Any]) -> bool:
    """Add a piece to the one before where both are of one kind: content, reasoning, arguments of one call."""
    if "tool_calls" not in delta:
        (name,) = delta
        if name in before:
            before[name] += delta[name]
        return name in before
    (call,) = delta["tool_calls"]
    last = before.get("tool_calls", [{}])[0]
    if last.get("index") != call["index"] or "id" in call:
        return False
    last["function"]["arguments"] += call["function"]["arguments"]
    return True


def _is_piece(choice: Any) -> bool:
    return choice["finish_reason"] is None and "role" not in choice.get("delta", {})
