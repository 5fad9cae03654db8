"""A node that dies under a stream: both SDKs read on to the end, and are told when there is no end to be had."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest

from tests.conftest import Start
from tests.system.fleet import Fleet, build

NODES = ("a", "b", "c")
SLOW = ["--backend", "fake", "--slots", "4", "--fake-step-delay-s", "0.03", "--drain-seconds", "0.1"]
HELLO: Any = [{"role": "user", "content": "Hello"}]
LONG = {"seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, start_module: Start) -> Fleet:
    return build(tmp_path_factory.mktemp("fleet"), start_module, SLOW, NODES)


def message(fleet: Fleet, begun: Callable[[str], None]) -> dict[str, Any]:
    client = anthropic.Anthropic(base_url=fleet.gate.url, api_key=fleet.key, max_retries=0)
    with client.messages.stream(model="test", messages=HELLO, max_tokens=40, extra_body=LONG) as stream:
        for count, _ in enumerate(stream.text_stream):
            if count == 3:
                begun(stream.response.headers["x-llmrack-node"])
        return stream.get_final_message().to_dict()


def response(fleet: Fleet, begun: Callable[[str], None]) -> dict[str, Any]:
    client = openai.OpenAI(base_url=fleet.gate.url + "/v1", api_key=fleet.key, max_retries=0)
    stream = client.responses.create(model="test", input="Hello", max_output_tokens=40, stream=True, extra_body=LONG)
    events = []
    for event in stream:
        events.append(event)
        if len(events) == 8:
            begun(stream.response.headers["x-llmrack-node"])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.incomplete"
    return last.response.to_dict()


def told(answer: dict[str, Any]) -> str:
    parts = answer.get("content") or [part for item in answer["output"] for part in item["content"]]
    return "".join(part["text"] for part in parts)


def test_an_sdks_stream_survives_its_node(fleet: Fleet) -> None:
    killed: list[str] = []

    def kill(node: str) -> None:
        killed.append(node)
        fleet.nodes[node].process.send_signal(signal.SIGKILL)

    for ask in (message, response):
        undisturbed = ask(fleet, lambda node: None)
        assert told(ask(fleet, kill)) == told(undisturbed)
        fleet.usable(len(NODES) - len(killed))
    assert len(set(killed)) == 2


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
def test_an_sdk_hears_of_a_stream_that_breaks_off(sdk: str, start: Start) -> None:
    """At a node, where nobody can go on with it."""
    node = start("llmnode", *SLOW, "--model-id", "test").ready()

    def stop(_: Any) -> None:
        node.process.send_signal(signal.SIGTERM)

    if sdk == "anthropic":
        client = anthropic.Anthropic(base_url=node.url, api_key="-", max_retries=0)
        asked: Any = {"model": "test", "messages": HELLO, "max_tokens": 400, "extra_body": LONG}
        with client.messages.stream(**asked) as stream:
            stop(next(iter(stream.text_stream)))
            with pytest.raises(anthropic.APIStatusError, match="the node is stopping") as caught:
                stream.until_done()
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "overloaded_error")
    else:
        openais = openai.OpenAI(base_url=node.url + "/v1", api_key="-", max_retries=0)
        events = openais.responses.create(
            model="test", input="Hello", max_output_tokens=400, stream=True, extra_body=LONG
        )
        stop(next(iter(events)))
        with pytest.raises(openai.APIError, match="the node is stopping"):
            list(events)
