"""An answer that its node cannot finish is finished by another one, and its client cannot tell.

The fake backend's tokens are the 256 bytes and some control tokens, 257 among them ends an answer.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from llmnode.api.preparing import Served
from llmnode.api.schema import ChatRequest, Options
from llmnode.chat.renderer import Renderer
from llmnode.chat.rendering import Rendering
from llmnode.chat.template import fingerprint
from llmnode.engine import llama
from llmnode.engine.backend import Room
from llmnode.engine.fake import FakeBackend
from llmnode.engine.llama import LlamaOptions
from llmnode.engine.types import Sampling
from llmnode.settings import HANDBOOK
from llmnode.wire import headers
from llmnode.wire.node import Load, Report
from llmnode.wire.resume import Origin, Resume, read_marker
from tests.conftest import Start
from tests.node.stitching import (
    FIXED,
    Heard,
    begun,
    envelope,
    finish_everywhere,
    heard,
    joined,
    opened,
    resumed,
)
from tests.processes import Program, wait_for
from tests.rescoring import is_credible, rescored

CHAT, COMPLETION, INFERENCE = "/v1/chat/completions", "/v1/completions", "/inference"
ASKED = {"messages": [{"role": "user", "content": "Tell me of the fox and the hen"}], "max_tokens": 20, "stream": True}
TEXT = {"prompt": "Once upon a time", "max_tokens": 20, "stream": True}
BYTES = {str(byte): 12 for byte in "é€".encode()} | {"255": 8}
"""Characters of two and three bytes, in any order of these bytes, so halves of characters too."""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["xy", "é"]}},
    "required": ["a", "b"],
}
IN_FORM = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
STOPS = {"grammar": 'root ::= [a-z]{4} "ST" [a-z]{3} "STO" [0-9] "STOP" [a-z]*', "stop": ["STOP", "TOPS"]}

FAKE = ("--backend", "fake", "--model-id", "m", "--slots", "16")
SLOW = (*FAKE, "--fake-step-delay-s", "0.02")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, {**ASKED, "temperature": 0}),
    "a seed of its own": (CHAT, {**ASKED, "seed": 7, "top_p": 0.9, "ignore_eos": True}),
    "no seed": (CHAT, {**ASKED, "min_p": 0.05, "xtc_probability": 0.5, "xtc_threshold": 0.05}),
    "penalties": (CHAT, {**ASKED, "repeat_penalty": 1.3, "frequency_penalty": 0.4, "dry_multiplier": 1.0}),
    "mirostat": (COMPLETION, {**TEXT, "mirostat": 2, "mirostat_tau": 3, "logprobs": 1, "ignore_eos": True}),
    "three choices": (CHAT, {**ASKED, "n": 3, "logit_bias": {"257": 2}, "stream_options": {"include_usage": True}}),
    "logprobs": (CHAT, {**ASKED, "logprobs": True, "top_logprobs": 2, "logit_bias": {"257": 1}}),
    "halves of characters": (CHAT, {**ASKED, "logit_bias": BYTES, "ignore_eos": True}),
    "halves with logprobs": (COMPLETION, {**TEXT, "logit_bias": BYTES, "logprobs": 2, "ignore_eos": True, "n": 2}),
    "a grammar": (COMPLETION, {**TEXT, "grammar": 'root ::= ("é" | "€" | [a-z])+ "."', "max_tokens": 24}),
    "a schema": (CHAT, {**ASKED, **IN_FORM, "max_tokens": 60, "logit_bias": {"32": -20}}),
    "stop texts": (CHAT, {**ASKED, **STOPS, "max_tokens": 40}),
    "stop texts with logprobs": (COMPLETION, {**TEXT, **STOPS, "max_tokens": 40, "logprobs": 0}),
    "a prompt of ids": (COMPLETION, {**TEXT, "prompt": [256, 104, 105], "stream_options": {"include_usage": True}}),
    "whole": (CHAT, {**ASKED, "stream": False, "logit_bias": {"257": 1}}),
    "whole, two with logprobs": (
        CHAT,
        {**ASKED, "stream": False, "n": 2, "logprobs": True, "top_logprobs": 1, "logit_bias": BYTES | {"257": 4}},
    ),
    "whole with mirostat": (COMPLETION, {**TEXT, "stream": False, "mirostat": 1, "logprobs": 1, "ignore_eos": True}),
    "whole with stop texts": (COMPLETION, {**TEXT, **STOPS, "max_tokens": 40, "stream": False}),
    "the smallest call": (INFERENCE, {"prompt": "Hello", "max_tokens": 20}),
}


@pytest.fixture(scope="module")
def second(start_module: Start) -> Program:
    return start_module("llmnode", *FAKE).ready()


@pytest.fixture(scope="module")
def undisturbed(start_module: Start) -> dict[str, list[bytes]]:
    """Every case's frames. Steps of the first node are slow, so that tokens come one by one and each has a marker."""
    node = start_module("llmnode", *SLOW).ready()
    with ThreadPoolExecutor(len(CASES)) as clients:
        answers = clients.map(lambda case: begun(node, *case), CASES.values())
        return dict(zip(CASES, answers, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_an_answer_cut_at_any_marker_is_finished_elsewhere(
    name: str, second: Program, undisturbed: dict[str, list[bytes]]
) -> None:
    path, body = CASES[name]
    finish_everywhere(second, path, body, undisturbed[name])


def test_a_resume_that_skips_one_token_is_noticed(second: Program, undisturbed: dict[str, list[bytes]]) -> None:
    """The comparison above would be worth little if it passed then."""
    for name in ("greedy", "three choices", "halves with logprobs", "whole, two with logprobs"):
        path, body = CASES[name]
        frames = undisturbed[name]
        expected = joined(heard(frames).frames)
        for cut in [at + 1 for at, frame in enumerate(frames) if read_marker(frame)][::-5]:
            client = heard(frames[:cut])
            ids = [list(row) for row in client.committed.ids()]
            if len(ids[0]) < 2:
                break
            if ids[0][-2] == ids[0][-1]:
                continue  # without one of two equal ids this is only an earlier cut
            del ids[0][-2]
            after = [frame for frame in resumed(second, envelope(path, body, ids)) if not read_marker(frame)]
            assert joined([*client.frames, *after]) != expected, (name, cut)


class Client:
    """Reads an answer in a thread until its connection ends, however that happens."""

    def __init__(self, node: Program, path: str, body: dict[str, Any]) -> None:
        self.heard = Heard()
        self._asked = node, path, body
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        node, path, body = self._asked
        try:
            with opened(node, path, json.dumps(body).encode(), **{headers.RESUMABLE: FIXED.header()}) as frames:
                heard(frames, self.heard)
        except httpx.HTTPError:  # the node is gone
            pass

    def finished_by(self, other: Program) -> dict[str, Any]:
        """What the client has in the end, when its node's connection is gone and the other one has done the rest."""
        self._thread.join(120)
        assert not self.heard.ended and self.heard.committed.size
        _, path, body = self._asked
        heard(resumed(other, envelope(path, body, self.heard.committed.ids())), self.heard)
        assert self.heard.ended
        return joined(self.heard.frames)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_answers_of_a_node_that_goes_are_finished_by_another(
    start: Start, second: Program, number: signal.Signals
) -> None:
    """A drain that ends hands over what is left, and only to those who asked for it."""
    first = start("llmnode", *SLOW, "--drain-seconds", "0.3").ready()
    long = {**ASKED, "max_tokens": 500, "ignore_eos": True, "seed": 3, "logprobs": True}
    bodies = [(CHAT, long), (CHAT, {**long, "n": 2}), (CHAT, {**long, "stream": False})]
    clients = [Client(first, path, body) for path, body in bodies]
    plain = ThreadPoolExecutor(1).submit(httpx.post, first.url + CHAT, json=long, timeout=60)
    wait_for(lambda: all(client.heard.committed.size > 2 for client in clients), "all answers to be under way")
    first.signal(number)
    for client, (path, body) in zip(clients, bodies, strict=True):
        assert client.finished_by(second) == joined(heard(begun(second, path, body)).frames)
        assert client.heard.handed_over == (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        assert plain.result().text.count('"node_stopping"') == 1
        assert first.wait() == 0


def test_a_plain_answer_says_nothing_of_resuming(second: Program) -> None:
    for said in ({}, {headers.RESUMABLE: "2 whatever may come"}):
        answer = httpx.post(second.url + CHAT, json=ASKED, headers=said, timeout=60)
        assert headers.RESUMABLE not in answer.headers
        assert ": t " not in answer.text
        whole = httpx.post(second.url + CHAT, json={**ASKED, "stream": False}, headers=said, timeout=60)
        assert whole.json()["object"] == "chat.completion"


@pytest.mark.parametrize("path", [CHAT, COMPLETION, INFERENCE])
@pytest.mark.parametrize(("name", "value"), [(headers.RESUMABLE, "1 a b c"), (headers.DEADLINE_MS, "soon")])
def test_a_malformed_header_is_refused_by_name(second: Program, path: str, name: str, value: str) -> None:
    body = {"prompt": "x"} if path != CHAT else {"messages": ASKED["messages"]}
    answer = httpx.post(second.url + path, json=body, headers={name: value}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert name in answer.json()["error"]["message"]


def refusal(node: Program, data: bytes, status: int) -> Any:
    answer = httpx.post(node.url + "/resume", content=data, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_an_envelope_that_makes_no_sense_is_refused_by_name(second: Program) -> None:
    good = Resume.parse(envelope(CHAT, ASKED, [(97,)]))
    assert "the resume envelope" in refusal(second, b"no JSON\n{}", 400)["message"]
    old = good.write().replace(b'"version":1', b'"version":0')
    assert "version" in refusal(second, old, 400)["message"]
    assert refusal(second, replace(good, path="/v1/models").write(), 400)["param"] == "path"
    assert refusal(second, replace(good, origin=Origin("other", "", "")).write(), 404)["code"] == "model_not_found"
    for what in ("digest", "template"):
        other = replace(good, origin=replace(good.origin, **{what: "0" * 32}))
        assert refusal(second, other.write(), 409) | {"message": ""} == {
            "message": "",
            "type": "invalid_request_error",
            "param": what,
            "code": "model_differs",
        }
    for ids in (((97,), (98,)), ((999,),), ((97,) * 21,), ((97, 257, 97),)):
        assert refusal(second, replace(good, ids=ids).write(), 400)["param"] == "ids"
    assert refusal(second, replace(good, body=b'{"messages": 1}').write(), 400)["param"] == "messages"
    late = httpx.post(
        second.url + "/resume", content=good.write(), headers={headers.DEADLINE_MS: "-1"}, timeout=60
    ).json()
    assert late["error"]["param"] == headers.DEADLINE_MS


def test_a_node_says_what_it_takes_to_resume_its_answers(second: Program) -> None:
    report = Report.parse(httpx.get(second.url + "/node", timeout=10).json())
    (model,) = report.models
    assert report.resume == 1
    assert len(model.digest) == 32 and model.digest == FakeBackend(Room(1, 8, 8, 8)).info.digest
    assert model.template == f"model:{fingerprint(FakeBackend(Room(1, 8, 8, 8)).info.chat_template)}"
    said = {headers.RESUMABLE: FIXED.header()}
    with httpx.stream("POST", second.url + CHAT, json=ASKED, headers=said, timeout=60) as answer:
        origin = Origin.parse(answer.headers[headers.ORIGIN])
        load = Load.parse(answer.headers[headers.LOAD])
    assert load.slots == report.load.slots and load.running <= 1  # it may have ended already
    assert origin == Origin(model.id, model.digest, model.template)
    frames = resumed(second, replace(Resume.parse(envelope(CHAT, ASKED, [])), origin=origin).write())
    assert heard(frames).ended


def test_an_answer_keeps_the_name_of_the_model_that_began_it(start: Start) -> None:
    """Its request may name none, and the other node may call it otherwise."""
    node = start("llmnode", "--backend", "fake", "--model-id", "mine", "--aliases", "m").ready()
    chunks = joined(heard(resumed(node, envelope(CHAT, ASKED, []))).frames)["choices"][0]
    assert {chunk["model"] for chunk in chunks} == {"m"}


def test_an_answer_may_be_longer_than_any_body(start: Start, second: Program) -> None:
    node = start("llmnode", *FAKE, "--body-limit-bytes", "1024").ready()
    body = {**ASKED, "max_tokens": 800, "ignore_eos": True}
    whole = heard(begun(node, CHAT, body))
    (ids,) = whole.committed.ids()
    data = envelope(CHAT, body, [ids[:-1]])
    assert len(data) > 2 * 1024
    assert heard(frame for frame in resumed(node, data) if not read_marker(frame)).ended
    assert refusal(node, envelope(CHAT, {**body, "user": "x" * 1024}, []), 413)["code"] == "body_too_large"
    answer = httpx.post(node.url + CHAT, json={**body, "user": "x" * 1024}, timeout=60)
    assert answer.status_code == 413


@pytest.mark.parametrize(("ours", "given"), [("60", "200"), ("1", "60000")])
def test_the_shorter_deadline_counts(start: Start, ours: str, given: str) -> None:
    node = start("llmnode", *SLOW, "--request-timeout-s", ours).ready()
    endless = {**ASKED, "max_tokens": 4000, "ignore_eos": True}
    said = {headers.DEADLINE_MS: given}
    whole = httpx.post(node.url + CHAT, json={**endless, "stream": False}, headers=said, timeout=60)
    assert whole.status_code == 504
    said[headers.RESUMABLE] = FIXED.header()
    streamed = httpx.post(node.url + CHAT, json=endless, headers=said, timeout=60)
    assert '"timeout_error"' in streamed.text.rstrip().rpartition("\n")[2]
    assert ": handover" not in streamed.text and "[DONE]" not in streamed.text


def test_the_template_sees_the_time_that_was_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(Room(1, 512, 512, 8))
    source = "{{ strftime_now('%Y-%m-%d %H:%M') }}"
    served = Served(None, backend, Renderer(source, Rendering(source, "", "", ()).do), ())  # type: ignore[arg-type]
    request = ChatRequest(({"role": "user", "content": "x"},), Options("m", Sampling(), 1, (), False, True, False, ()))
    assert served.prepare(request, 253_402_300_799)
    for zone in ("UTC", "Asia/Tokyo", "America/Lima"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        ids = served.prepare(request, 1_900_000_000).prompt
        assert bytes(ids) == b"2030-03-17 17:46"
    monkeypatch.undo()
    time.tzset()


def test_a_real_model_goes_on_in_its_own_words(start_module: Start) -> None:
    """Its logits depend a little on the shape of a batch, so what it says is scored, not compared."""
    first, other = (start_module("llmnode", "--model-id", "m", "--threads", "1").ready() for _ in range(2))
    scorer = llama.load(LlamaOptions(HANDBOOK, threads=1, slots=1, n_ctx=512))
    prompt = [*scorer.tokenize("What is a slot? A slot is", special=True)]
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "stream": True, "logprobs": 0}
    (model,) = Report.parse(httpx.get(first.url + "/node", timeout=10).json()).models
    assert model.digest
    origin = Origin(model.id, model.digest, model.template)
    frames = begun(first, COMPLETION, body)
    cuts = [at + 1 for at, frame in enumerate(frames) if read_marker(frame)]
    for cut in (0, cuts[0], cuts[len(cuts) // 2], cuts[-1]):
        client = heard(frames[:cut])
        data = replace(Resume.parse(envelope(COMPLETION, body, client.committed.ids())), origin=origin).write()
        heard(resumed(other, data), client)
        (ids,) = client.committed.ids()
        assert is_credible(rescored(scorer, tuple(prompt), ids), ids)
        told = joined(client.frames)
        piece, last = (chunk["choices"][0] for chunk in told["choices"][0])
        assert piece["text"] == b"".join(scorer.pieces[id] for id in ids).decode()
        assert piece["logprobs"]["tokens"] == [scorer.pieces[id].decode() for id in ids if scorer.pieces[id]]
        assert last["finish_reason"] in ("stop", "length")
        assert told["rest"] == [(len(prompt), len(ids)), "[DONE]"]
    scorer.close()
