"""Requests made up from the description of the admin API: none brings it down, and it answers what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from llmnode.wire.openapi.document import Operation, document, served
from llmnode.wire.openapi.operation import EVENTS
from tests.conftest import Start
from tests.gate.conftest import GateUnderTest
from tests.gate.mock_node import MockNode

EXAMPLES = 12
"""Requests made up for each operation, as many again with mistakes in them."""
CHECKS: list[Any] = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
]  # fmt: skip
OPERATIONS = [one for one in served("gate") if one.path.startswith("/admin") and one.answer != EVENTS]


@pytest.fixture(scope="module")
def alone(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GateUnderTest]:
    """A gate that nobody else needs, as its keys and leases are played with. It has answered something already."""
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    with MockNode("handbook") as a, MockNode("b") as b:
        gate.list_nodes(a, b)
        gate.run()
        gate.chat()
        yield gate


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")
def test_whatever_is_sent_is_answered_as_the_description_says(
    alone: GateUnderTest, operation: Operation, mode: GenerationMode
) -> None:
    gate = alone
    described = schemathesis.openapi.from_dict(document("gate", "x"))
    bounded = settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    asked = 0
    found: Any = described[operation.path][operation.method.upper()]

    @bounded
    @given(case=found.as_strategy(generation_mode=mode))
    def ask(case: Case[Any]) -> None:
        nonlocal asked
        asked += 1
        headers = {"authorization": f"Bearer {gate.secret}"}
        answer = case.call(base_url=gate.url, headers=headers, timeout=60)
        case.validate_response(answer, checks=CHECKS)

    try:
        ask()
    except schemathesis.errors.InvalidSchema as error:  # nothing can be wrong in what takes nothing
        assert mode is GenerationMode.NEGATIVE, error
        pytest.skip("nothing to be wrong in")
    assert asked
    assert gate.program is not None
    said = gate.program.output()
    assert "Traceback" not in said and "is gone" not in said, said[-3000:]
    assert httpx.get(gate.url + "/admin/nodes", headers={"x-api-key": gate.secret}).status_code == 200
