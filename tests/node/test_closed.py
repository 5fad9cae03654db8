"""A closed schema allows no more than the open one, names what the open one names, and leaves combined ones alone."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from llmnode.chat.closed import closed

TEXT = {"type": "string"}
CITY = {"type": "object", "properties": {"city": TEXT}}
SHUT = {**CITY, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (CITY, SHUT),
        ({"type": "object"}, {"type": "object"}),  # names none, so it may hold any
        ({**CITY, "additionalProperties": TEXT}, {**CITY, "additionalProperties": TEXT}),
        ({**CITY, "patternProperties": {"^x": TEXT}}, {**CITY, "patternProperties": {"^x": TEXT}}),
        ({"properties": {"a": CITY}}, {"properties": {"a": SHUT}, "additionalProperties": False}),
        ({"type": "array", "items": CITY}, {"type": "array", "items": SHUT}),
        ({"anyOf": [CITY, {"type": "null"}]}, {"anyOf": [SHUT, {"type": "null"}]}),
        ({"allOf": [CITY, {"properties": {"b": TEXT}}]}, {"allOf": [CITY, {"properties": {"b": TEXT}}]}),
        ({**CITY, "anyOf": [{"required": ["city"]}]}, {**CITY, "anyOf": [{"required": ["city"]}]}),
        (
            {"properties": {"a": {"$ref": "#/$defs/c"}}, "$defs": {"c": CITY}},
            {"properties": {"a": {"$ref": "#/$defs/c"}}, "$defs": {"c": SHUT}, "additionalProperties": False},
        ),
        (
            {
                "properties": {"a": {"allOf": [{"$ref": "#/$defs/c"}, {"properties": {"b": TEXT}}]}},
                "$defs": {"c": CITY},
            },
            {
                "properties": {"a": {"allOf": [{"$ref": "#/$defs/c"}, {"properties": {"b": TEXT}}]}},
                "$defs": {"c": CITY},
                "additionalProperties": False,
            },
        ),
    ],
)
def test_objects_that_name_their_properties_name_them_all(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    before = repr(schema)
    assert closed(schema) == expected
    assert repr(schema) == before
    Draft202012Validator.check_schema(closed(schema))


@pytest.mark.parametrize("value", [{"city": "x"}, {}, {"city": "x", "more": 1}, {"a": {"city": "x", "b": 2}}])
@pytest.mark.parametrize("schema", [CITY, {"properties": {"a": CITY}}, {"anyOf": [CITY, {"type": "null"}]}])
def test_what_the_closed_one_allows_the_open_one_allows(schema: dict[str, Any], value: Any) -> None:
    if Draft202012Validator(closed(schema)).is_valid(value):
        assert Draft202012Validator(schema).is_valid(value)
