"""Reads what an answer must match: a schema, a grammar, any JSON object.

Owns: the fields that say so, and the limits on what they hold. Refuses to know: how it is compiled, and whether all of
it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmnode.api.fields import Fields, kind
from llmnode.api.rules import Rules
from llmnode.wire.errors import InvalidRequest


@dataclass(frozen=True)
class Constraint:
    """What an answer must match, as the client wrote it. Compiling it may take long, so that is done elsewhere.

    field: where in the request it stood, for errors.       source: a GBNF text or a schema; None for any object.
    """

    kind: Literal["gbnf", "json_schema", "json_object"]
    field: str
    source: Any = None

    @property
    def schema(self) -> Any:
        """The schema of any JSON, where it is no GBNF text."""
        return {"type": "object"} if self.kind == "json_object" else self.source


def read(fields: Fields, rules: Rules) -> Constraint | None:
    """Raises InvalidRequest."""
    found = [one for one in (_response_format(fields), _json_schema(fields), _grammar(fields)) if one]
    for one in found:
        _check_size(one, rules)
    if len(found) > 1:
        raise InvalidRequest(
            f"{found[1].field} and {found[0].field} contradict each other: send one", param=found[1].field
        )
    return found[0] if found else None


def _check_size(one: Constraint, rules: Rules) -> None:
    if one.kind == "json_schema":
        rules.schema.check(one.source, one.field)
    elif one.kind == "gbnf":
        size = len(one.source.encode())
        if size > rules.max_grammar_bytes:
            raise InvalidRequest(
                f"{one.field} may hold {rules.max_grammar_bytes} bytes at most, got {size}", param=one.field
            )


def _grammar(fields: Fields) -> Constraint | None:
    text = fields.get("grammar")
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        raise InvalidRequest(f"grammar must be a text, got {kind(text)}", param="grammar")
    return Constraint("gbnf", "grammar", text)


def _json_schema(fields: Fields) -> Constraint | None:
    """llama.cpp's field: a schema as it is; an empty one stands for any object."""
    schema = fields.object("json_schema")
    if schema is None:
        return None
    return Constraint("json_schema", "json_schema", schema) if schema else Constraint("json_object", "json_schema")


def _response_format(fields: Fields) -> Constraint | None:
    """OpenAI's field, with llama.cpp's `schema` in a json_object. `strict: false` is held to the schema as well."""
    value = fields.object("response_format")
    if value is None:
        return None
    format = Fields(value, "response_format.")
    type = format.get("type")
    constraint = None
    if type == "json_object":
        schema = format.object("schema")
        constraint = Constraint("json_object", "response_format")
        if schema:
            constraint = Constraint("json_schema", "response_format.schema", schema)
    elif type == "json_schema":
        inner = Fields(format.object("json_schema") or {}, "response_format.json_schema.")
        schema = inner.object("schema")
        if schema is None:
            raise inner.wrong("schema", "must be an object", schema)
        inner.flag("strict")
        inner.get("name")  # OpenAI wants one; it names the schema and says nothing of the answer
        constraint = Constraint("json_schema", "response_format.json_schema.schema", schema)
        fields.advice += inner.rest()
    elif type != "text":
        raise format.wrong("type", "must be text, json_object or json_schema", type)
    fields.advice += format.rest()
    return constraint
