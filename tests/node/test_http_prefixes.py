"""What /node says of the prompts that a node holds, asked of the real program: enough to route the next turn by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnode.wire import chain
from llmnode.wire.chain import BLOCK
from llmnode.wire.node import Report
from llmnode.wire.resume import Marker
from tests.conftest import Start
from tests.node.stitching import Heard, begun, envelope, heard, joined, resumed
from tests.processes import Program, wait_for

CHAT, COMPLETION, INFERENCE = "/v1/chat/completions", "/v1/completions", "/inference"
FAKE = ("--backend", "fake", "--model-id", "m", "--aliases", "other")
NO_END = {"257": -100}


@pytest.fixture(scope="module")
def node(start_module: Start) -> Program:
    return start_module("llmnode", *FAKE).ready()


@pytest.fixture(scope="module")
def real(start_module: Start, tiny_model: Path) -> Program:
    """Holds one request at a time, and remembers none that had to make way for it."""
    cells = ("--slots", "1", "--n-ctx", "512", "--kv-cells", "512", "--prompt-cache-bytes", "0")
    return start_module("llmnode", "--model", str(tiny_model), "--model-id", "m", *cells).ready()


def said(node: Program) -> Report:
    return Report.parse(httpx.get(node.url + "/node", timeout=10).json())


def depth(node: Program, body: dict[str, Any], path: str = CHAT) -> int:
    """How many blocks of a request the node holds, as a gate finds it out."""
    report = said(node)
    (model,) = report.models
    found = chain.of_request(body, chain.salt(model.id, model.template, path))
    return found.depth(chain.unpack(report.cache.blocks))


def post(node: Program, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(node.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def chat(begins: str, length: int = 900, **more: Any) -> dict[str, Any]:
    """A conversation that begins as no other does."""
    told = {"role": "user", "content": begins + " " + "fox and hen " * (length // 12)}
    return {"messages": [{"role": "system", "content": begins}, told], "max_tokens": 300, "logit_bias": NO_END, **more}


def next_turn(body: dict[str, Any], text: str) -> dict[str, Any]:
    more = {"role": "user", "content": "And then? " * 30}
    return {**body, "messages": [*chain.with_reply(body["messages"], text), more]}


def found(node: Program, body: dict[str, Any]) -> int:
    return int(post(node, CHAT, body)["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("stream", [True, False])
def test_the_next_turn_is_at_home_where_the_last_one_was_answered(node: Program, stream: bool) -> None:
    body = chat(f"stream {stream}", model="other")
    assert depth(node, body) == 0
    if stream:
        frames = joined(heard(begun(node, CHAT, {**body, "stream": True})).frames)
        text = frames["choices"][0][1]["choices"][0]["delta"]["content"]
    else:
        text = post(node, CHAT, body)["choices"][0]["message"]["content"]
    assert len(text) == 300
    turn = next_turn(body, text)
    whole = chain.of_answered(body, text, "").size // BLOCK
    wait_for(lambda: depth(node, turn) == whole, "the reply to be told")
    assert depth(node, next_turn(body, "something else" * 20)) == chain.of_request(body, "").size // BLOCK
    assert found(node, turn) >= whole * BLOCK * 0.95  # a token of the fake is a byte, and a message has some more


def test_each_choice_is_told_with_its_own_reply(node: Program) -> None:
    body = chat("three choices", n=3)
    texts = [choice["message"]["content"] for choice in post(node, CHAT, body)["choices"]]
    assert len(set(texts)) == 3
    for text in texts:
        turn = next_turn(body, text)
        whole = chain.of_answered(body, text, "").size // BLOCK
        wait_for(lambda turn=turn, whole=whole: depth(node, turn) == whole, "each reply to be told")  # type: ignore[misc]


def test_a_text_is_told_as_far_as_another_request_could_go_on_with_it(node: Program) -> None:
    body = {"prompt": "Once upon a time " * 50, "max_tokens": 300, "logit_bias": NO_END}
    text = post(node, COMPLETION, body)["choices"][0]["text"]
    longer = {"prompt": body["prompt"] + text + "!" * BLOCK}
    wait_for(lambda: depth(node, longer, COMPLETION) == (850 + 300) // BLOCK, "the text to be told")
    twice = {"prompt": "Twice " + body["prompt"], "max_tokens": 300, "logit_bias": NO_END}
    post(node, INFERENCE, twice)
    assert depth(node, twice, INFERENCE) == 856 // BLOCK
    assert depth(node, twice, COMPLETION) == 0  # where the same text is no message


def test_an_answer_that_began_elsewhere_is_told_whole(node: Program) -> None:
    body = chat("begun elsewhere", stream=True)
    whole = heard(begun(node, CHAT, body))
    text = joined(whole.frames)["choices"][0][1]["choices"][0]["delta"]["content"]
    other = chat("resumed from here", stream=True)
    client, ids = Heard(), whole.committed.ids()[0][:200]
    client.committed.add(Marker(0, 200, ids))
    heard(resumed(node, envelope(CHAT, other, [ids])), client)
    text = text[:200] + joined(client.frames)["choices"][0][0]["choices"][0]["delta"]["content"]
    assert len(text) == 300
    turn, blocks = next_turn(other, text), chain.of_answered(other, text, "").size // BLOCK
    wait_for(lambda: depth(node, turn) == blocks, "the whole reply to be told")


def test_the_report_says_how_long_a_token_is_and_does_not_change_by_itself(node: Program) -> None:
    post(node, CHAT, chat("bytes per token"))
    assert 0.9 < said(node).load.bytes_per_token < 1.1  # of the fake, whose tokens are bytes
    assert said(node).load.wait_s == 0.0

    def unchanged() -> bool:
        first = httpx.get(node.url + "/node", timeout=10)
        assert Report.parse(first.json()).cache.blocks
        again = httpx.get(node.url + "/node", headers={"if-none-match": first.headers["etag"]}, timeout=10)
        return again.status_code == 304

    wait_for(unchanged, "a 304")
    lines = httpx.get(node.url + "/metrics", timeout=10).text.splitlines()
    assert f"llmnode_reported_blocks {len(chain.unpack(said(node).cache.blocks)):.1f}" in lines


def test_who_leaves_keeps_what_was_computed_of_the_prompt(start: Start) -> None:
    node = start("llmnode", *FAKE, "--fake-step-delay-s", "0.05").ready()
    body = chat("leaves", stream=True, max_tokens=3000)
    with httpx.stream("POST", node.url + CHAT, json=body, timeout=60) as response:
        next(response.iter_text())
        blocks = chain.of_request(body, "").size // BLOCK
        wait_for(lambda: depth(node, body) == blocks, "the prompt of a running answer to be told")
    wait_for(lambda: said(node).load.running == 0, "the slot to be free")
    assert depth(node, body) == blocks


@pytest.mark.parametrize("model", ["fake", "real"])
def test_what_had_to_make_way_is_told_no_more(start: Start, request: pytest.FixtureRequest, model: str) -> None:
    cells = ("--slots", "1", "--n-ctx", "1600", "--kv-cells", "1600", "--prompt-cache-bytes", "0")
    node = start("llmnode", *FAKE, *cells).ready() if model == "fake" else request.getfixturevalue("real")
    asked = [chat(f"number {number}", max_tokens=20, logit_bias={}) for number in range(4)]
    turn = next_turn(asked[0], post(node, CHAT, asked[0])["choices"][0]["message"]["content"])
    mine = chain.of_request(asked[0], "").size // BLOCK
    wait_for(lambda: depth(node, turn) >= mine, "the prompt to be told")
    told = depth(node, turn)
    cached = found(node, turn)
    assert cached * said(node).load.bytes_per_token >= (told - 1) * BLOCK * 0.9
    for body in asked[1:]:
        post(node, CHAT, body)
    wait_for(lambda: depth(node, asked[-1]) >= mine, "the last prompt to be told")
    assert depth(node, asked[0]) == 0
    assert found(node, {**asked[0], "max_tokens": 1}) < BLOCK
