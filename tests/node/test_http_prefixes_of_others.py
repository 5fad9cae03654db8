"""What /node says that it holds of conversations in Anthropic's words and in those of the Responses API, calls of tools
included: enough for a gate to route the next turn by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from llmnode.wire import chain
from llmnode.wire.chain import BLOCK
from llmnode.wire.node import Report
from tests.conftest import Start
from tests.processes import Program, wait_for

TEMPLATE = Path(__file__).parents[1] / "data" / "agent.jinja"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
DOCUMENT = "fox and hen " * 60
CALLING = {"logit_bias": {str(byte): -100 for byte in b" \t\r\nh"}}
FORM = {"type": "object", "properties": {"late": {"type": "string", "minLength": 300, "maxLength": 400}}}
FORM |= {"required": ["late"], "additionalProperties": False}


@pytest.fixture(scope="module")
def node(start_module: Start) -> Program:
    return start_module(
        "llmnode", "--backend", "fake", "--model-id", "m", "--chat-template-file", str(TEMPLATE)
    ).ready()


def asked(path: str, begins: str, *, calls: bool) -> dict[str, Any]:
    """A request that begins as no other does, whose answer is some blocks long."""
    if path == MESSAGES:
        body = {"system": begins, "messages": [{"role": "user", "content": begins + DOCUMENT}], "max_tokens": 600}
        tool: dict[str, Any] = {"name": "f", "input_schema": FORM}
        choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    else:
        body = {"instructions": begins, "input": begins + DOCUMENT, "max_output_tokens": 600}
        tool = {"type": "function", "name": "f", "parameters": FORM, "strict": True}
        choice = "required"
    if not calls:
        return {**body, "logit_bias": {"257": -100, "60": -100}}
    return {**body, **CALLING, "tools": [tool], "tool_choice": choice, "parallel_tool_calls": False}


def next_turn(path: str, body: dict[str, Any], answer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(What the client would send next if it had nothing to say, and that with something said.)"""
    if path == MESSAGES:
        told = [*body["messages"], {"role": "assistant", "content": answer["content"]}]
        return {**body, "messages": told}, {**body, "messages": [*told, {"role": "user", "content": "And now?"}]}
    told = [{"role": "user", "content": body["input"]}, *answer["output"]]
    return {**body, "input": told}, {**body, "input": [*told, {"role": "user", "content": "And now?"}]}


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_the_next_turn_is_at_home_where_the_last_one_was_answered(path: str, calls: bool, node: Program) -> None:
    body = asked(path, f"{path} {calls} ", calls=calls)
    before = chain.of_request(body, "").size // BLOCK
    posted = httpx.post(node.url + path, json=body, timeout=60)
    assert posted.status_code == 200, posted.text
    held, then = next_turn(path, body, posted.json())

    def is_held() -> bool:
        report = Report.parse(httpx.get(node.url + "/node", timeout=10).json())
        (model,) = report.models
        salt = chain.salt(model.id, model.template, path)
        blocks = chain.unpack(report.cache.blocks)
        whole = len(chain.of_request(held, salt).blocks)
        assert whole > before
        return chain.of_request(then, salt).depth(blocks) == whole

    wait_for(is_held, "the report to tell of the reply", 20)
