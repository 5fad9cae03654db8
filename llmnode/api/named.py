"""What bodies of every kind share: the model they name, and the fields that have no effect on what comes back."""

from __future__ import annotations

from collections.abc import Sequence

from llmnode.api.fields import Fields, show
from llmnode.wire.errors import InvalidRequest, ModelNotFound


def model(fields: Fields, known: Sequence[str]) -> str:
    """The name under which the model is asked for; the first of those known where there is none, since a node serves
    one model. Raises InvalidRequest, ModelNotFound."""
    name = fields.get("model")
    if name is None:
        return known[0]
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"model must be the name of a model, got {show(name)}", param="model")
    if name not in known:
        raise ModelNotFound(name, list(known))
    return name


def ignored(fields: Fields, *, strict: bool) -> tuple[str, ...]:
    """The fields that nobody has looked at, once all have been read. Raises InvalidRequest for the first of them where
    fields without effect are refused."""
    names = tuple(fields.rest())
    if names and strict:
        raise InvalidRequest(
            f"{names[0]} has no effect here, and strict_fields refuses such fields",
            param=names[0],
            code="unknown_parameter",
        )
    return names
