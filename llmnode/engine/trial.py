"""Grammars tried before they are compiled for good: what a confined process does (service/confined.py).

Most of what a grammar costs is the same for any vocabulary: 30 bytes of schema, `multipleOf: 999983`, take 20 s and
400 MB. So a vocabulary of bytes is enough to find out whether it can be afforded. A trial takes as long as compiling,
mostly 1 ms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from llmnode.engine.grammar import Grammars
from llmnode.wire.errors import InvalidRequest

_BYTES = [bytes([byte]) for byte in range(256)]
_TOKEN, _CONTROL = re.compile(r"<\[\d+\]>"), "<[257]>"
"""A token by its id in a grammar; what stands for any of them in the vocabulary of bytes."""


def work(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """setup: `grammar_bytes`, the longest one. Tasks: `kind`, `source`, and `param`, the client's field
    -> {}, or {"refused": message, "param"}."""
    grammars = Grammars([*_BYTES, b"", b""], frozenset({256}), max_bytes=setup["grammar_bytes"], kept=0)
    grammars.prepare()

    def tried(task: Mapping[str, Any]) -> dict[str, Any]:
        source, param = task["source"], task["param"]
        try:
            match task["kind"]:
                case "gbnf":
                    grammars.gbnf(source)
                case "json_schema":
                    grammars.json_schema(source, param=param)
                case _:
                    grammars.lark(_TOKEN.sub(_CONTROL, source), param=param)
        except InvalidRequest as error:
            return {"refused": error.message, "param": error.param}
        return {}

    return tried
