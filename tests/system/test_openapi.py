"""The API's description is the API: no route, no field and no status that only one of the two has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from llmnode.wire import headers
from llmnode.wire.openapi.document import Operation, Side, document, served
from llmnode.wire.openapi.page import page
from tests.system.conftest import House

EXAMPLES = 5
"""Requests made up for each operation, well and badly formed."""
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
CALL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
RANK = {"query": "x", "documents": ["a", "b"]}
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "Hello"},
    "/v1/responses/input_tokens": {"input": "Hello"},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": CHAT,
    "/v1/completions": {"prompt": "Hello"},
    "/inference": {"prompt": "Hello"},
    "/v1/embeddings": {"input": "Hello"},
    "/embedding": {"content": "Hello"},
    "/embeddings": {"content": "Hello"},
    "/v1/rerank": RANK,
    "/rerank": RANK,
    "/v1/reranking": RANK,
    "/reranking": RANK,
    "/tokenize": {"content": "Hello"},
    "/detokenize": {"tokens": [72]},
    "/apply-template": CHAT,
    "/completion": {"prompt": "Hello"},
    "/completions": {"prompt": "Hello"},
    "/infill": {"input_prefix": "Hello", "input_suffix": "."},
}
"""The smallest body of each path that takes one from clients."""


def model_for(path: str) -> str:
    if "embedding" in path:
        return "embedder"
    return "reranker" if "rerank" in path else "handbook"


CASES = [operation for operation in served("gate") if operation.path in LEAST]


def test_every_path_that_takes_a_body_has_an_example() -> None:
    bodies = {one.path for one in served("gate") if one.body is not None and not one.path.startswith("/admin")}
    assert bodies == set(LEAST)


@pytest.mark.parametrize("side", ["node", "gate"])
def test_every_route_is_described_and_every_description_is_a_route(house: House, side: Side) -> None:
    """Asked of the program itself, which knows its routes."""
    described = {(one.method, one.path) for one in served(side)}
    with httpx.Client(base_url=house.url(side), headers=house.headers(side), timeout=60) as client:
        for method, path in sorted(described):
            body = {} if method == "post" else None
            with client.stream(method, path.replace("{name}", "handbook"), json=body) as answer:
                if answer.status_code != 200:
                    answer.read()  # events have no end
            assert answer.status_code not in (405, 500), (path, answer.text)
            unknown = answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
            assert not unknown, path
        assert document(side, "x")["paths"] == client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("operation", CASES, ids=lambda one: one.path)
def test_every_field_that_is_described_is_honoured(house: House, operation: Operation) -> None:
    """None of them is taken for advice, and none for unsupported. What needs other fields beside it may say so."""
    assert operation.body is not None
    least, model = LEAST[operation.path], model_for(operation.path)
    with httpx.Client(base_url=house.gate.url, headers={"authorization": f"Bearer {house.key}"}, timeout=60) as client:
        for name, schema in operation.body["properties"].items():
            if name == "model":
                continue
            body = {**least, "model": model, **beside(operation.path, name), name: example(name, schema)}
            answer = client.post(operation.path, json=body)
            said = answer.headers.get(headers.IGNORED, "")
            assert name not in said.split(", "), name
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error.get("code") in ALLOWED, (name, answer.text)


ALLOWED = {"wrong_kind", "no_infill"}
"""What a model of this fleet may lack: tokens to fill gaps with."""
CALLS = {
    "/v1/responses": {"type": "function", "name": "add", "parameters": {"type": "object"}},
    "/v1/messages": {"name": "add", "input_schema": {"type": "object"}},
}


def beside(path: str, name: str) -> dict[str, Any]:
    """What a field needs beside it to mean something."""
    if name in ("tool_choice", "parallel_tool_calls"):
        return {"tools": [next((call for begin, call in CALLS.items() if path.startswith(begin)), CALL)]}
    if name in ("continue_final_message", "add_generation_prompt"):
        return {"messages": [*CHAT["messages"], {"role": "assistant", "content": "He"}]}
    if name == "texts":
        return {"documents": None}
    if name == "top_logprobs":
        return {"include": ["message.output_text.logprobs"]} if path.startswith("/v1/responses") else {"logprobs": True}
    return {"stream": True} if name == "stream_options" else {}


def example(name: str, schema: Mapping[str, Any]) -> Any:
    """A value for a field, as little as may be."""
    known: dict[str, Any] = {
        "grammar": 'root ::= "a"',
        "dimensions": 32,
        "response_format": {"type": "json_object"},
        "messages": CHAT["messages"],
    }
    if name in known:
        return known[name]
    return least_of(schema)


def least_of(schema: Mapping[str, Any]) -> Any:
    if "anyOf" in schema:
        return least_of(schema["anyOf"][0])
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: least_of(schema["properties"][name]) for name in schema.get("required", ())}
    if kind == "array":
        return [least_of(schema["items"])] * schema.get("minItems", 0)
    if kind in ("integer", "number"):
        return max(1, schema.get("minimum", 1)) if schema.get("maximum", 1) >= 1 else schema["maximum"]
    return True if kind == "boolean" else "x"


@pytest.mark.parametrize("side", ["node", "gate"])
def test_requests_made_up_from_the_description_bring_no_failure_and_no_status_that_it_lacks(
    house: House, side: Side
) -> None:
    described = schemathesis.openapi.from_dict(document(side, "x"))
    bounded = settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    asked = 0
    for result in described.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]
        if "drain" in operation.path or operation.path == "/metrics" or operation.path.endswith("/events"):
            continue

        @bounded
        @given(case=operation.as_strategy())
        def ask(case: Case[Any]) -> None:
            nonlocal asked
            asked += 1
            answer = case.call(base_url=house.url(side), headers=house.headers(side), timeout=60)
            case.validate_response(answer, checks=[not_a_server_error, status_code_conformance])

        try:
            ask()
        except BaseException:
            print(house.nodes["handbook"].output()[-6000:])
            raise
    assert asked > EXAMPLES


def test_the_page_names_every_operation_and_brings_nothing_from_elsewhere(house: House) -> None:
    shown = httpx.get(house.gate.url + "/docs", timeout=60)
    assert shown.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    for operation in served("gate"):
        assert f'id="{operation.name}"' in shown.text
    assert "<script" not in shown.text and "http://" not in shown.text and "https://" not in shown.text
    assert httpx.get(house.nodes["handbook"].url + "/docs", timeout=60).status_code == 401


def test_what_a_description_says_is_shown_as_text() -> None:
    hostile = document("gate", "<b>1</b>")
    hostile["paths"]["/v1/models"]["get"]["summary"] = "<script>alert(1)</script>"
    assert "<script>" not in page(hostile) and "<b>1" not in page(hostile)
