"""`changed` says what `dataclasses.replace` says, and never less."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import pytest

from llmgate.core.copying import changed


@dataclasses.dataclass(frozen=True)
class Place:
    name: str
    busy: int = 0

    @cached_property
    def twice(self) -> int:
        return 2 * self.busy


def test_a_copy_differs_in_what_was_named_alone_and_the_first_stays_as_it_was() -> None:
    first = Place("a", 1)
    copy = changed(first, busy=3)
    assert copy == dataclasses.replace(first, busy=3) and first == Place("a", 1)
    assert hash(copy) == hash(Place("a", 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.busy = 4  # type: ignore[misc]


def test_what_the_first_has_computed_is_computed_anew() -> None:
    first = Place("a", 1)
    assert first.twice == 2
    assert changed(first, busy=3).twice == 6


def test_a_field_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="Place has no field bussy"):
        changed(Place("a"), bussy=3)
