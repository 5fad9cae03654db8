"""docs/api.md says of every field of the Responses and Messages endpoints what becomes of it, and so does the code."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmnode.api import translation
from llmnode.api.anthropic import request as anthropic
from llmnode.api.fields import Fields
from llmnode.api.responses import request as responses

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()


def names(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+)`", text))


def section(title: str) -> str:
    return PAGE.partition(f"\n### {title}\n")[2].partition("\n### ")[0]


@pytest.mark.parametrize(("title", "module"), [("Responses", responses), ("Messages", anthropic)])
def test_the_page_of_fields_is_the_codes(title: str, module: ModuleType) -> None:
    told: dict[str, set[str]] = {"honoured": set(), "refused": set(), "advice": set()}
    for fields, what in re.findall(r"^\| (`.+?`) \| (honoured|refused|advice) \|", section(title), re.MULTILINE):
        told[what] |= names(fields)
    assert told == {"honoured": set(module.HONOURED), "refused": set(module.REFUSED), "advice": set(module.ADVICE)}


def test_the_fields_that_chats_have_too_are_named() -> None:
    assert names(section("Messages").partition("Both endpoints also take")[2]) == set(translation.SHARED)


@pytest.mark.parametrize("module", [responses, anthropic])
def test_what_the_tables_call_honoured_is_read_and_what_they_call_advice_is_not(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that is read and in no table, or the other way round, would make the page a lie."""
    read: set[str] = set()

    class Spy(Fields):
        def get(self, name: str) -> Any:
            if not self.place:
                read.add(name)
            return super().get(name)

    monkeypatch.setattr(module, "Fields", Spy)
    module.translate({"messages": [{"role": "user", "content": "Hello"}], "input": "Hello"})
    read -= {"stream_options"}  # of which a part is the neutral one
    assert read == {*module.HONOURED, *module.REFUSED, *translation.SHARED}
