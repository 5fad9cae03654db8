"""Closes the schema of a tool's arguments: a call names no argument that its tool does not have.

In JSON Schema an object may hold more than its `properties` unless `additionalProperties` says otherwise, and few
authors of tools say so. A model that is held to such a schema may then go on with arguments of its own invention, and
small ones do. So an object that names its properties is taken to name them all. What is said under the closed schema
is valid under the open one, so nobody is given what they did not ask for. llama.cpp's server does the same.

Where schemas are combined, an object in one of them may be completed by another: those parts stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OPEN = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"})
"""Keywords by which an object says itself what else it may hold."""
_COMBINED = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "$ref", "$dynamicRef"})
"""Keywords whose schemas bear on the same value."""
_LISTS, _MAPS, _ONE = ("anyOf", "oneOf", "prefixItems"), ("properties",), ("items", "contains")
_NAMED = ("$defs", "definitions")


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema, closed. Changes nothing in it itself."""
    found: Mapping[str, Any] = _closed(schema, named=not _completes(schema))
    return found


def _closed(schema: Any, *, named: bool) -> Any:
    if not isinstance(schema, Mapping) or "allOf" in schema or ("properties" in schema and _COMBINED & schema.keys()):
        return schema
    found = dict(schema)
    for key in _ONE:
        if key in found:
            found[key] = _closed(found[key], named=named)
    for key in _LISTS:
        if isinstance(found.get(key), list):
            found[key] = [_closed(one, named=named) for one in found[key]]
    for key in (*_MAPS, *(_NAMED if named else ())):
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _closed(one, named=named) for name, one in found[key].items()}
    if found.get("properties") and not _OPEN & found.keys():
        found["additionalProperties"] = False
    return found


def _completes(schema: Any) -> bool:
    """Whether a named schema may be combined with another one somewhere."""
    if isinstance(schema, list):
        return any(map(_completes, schema))
    if not isinstance(schema, Mapping):
        return False
    reference = "$ref" in schema and len(schema.keys() - {"$ref", "title", "description", "default", "$defs"}) > 0
    return "allOf" in schema or reference or any(map(_completes, schema.values()))
