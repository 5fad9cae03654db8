"""What the client calls what chat names, for errors from behind the reader of its body."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llmnode.wire.errors import ApiError


@dataclass(frozen=True)
class Names:
    """table: patterns of chat's names, each matched at the start, and what stands in their place; the first that
    matches counts.     places: where each of chat's messages came from.
    """

    table: Sequence[tuple[str, str]] = ()
    places: Sequence[str] = ()

    def own(self, name: str) -> str:
        message = re.match(r"messages\[(\d+)\]", name)
        if message and int(message[1]) < len(self.places):
            return self.places[int(message[1])]
        for pattern, instead in self.table:
            found = re.match(pattern, name)
            if found:
                return found.expand(instead) + name[found.end() :]
        return name

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Errors from inside name what the client wrote."""
        try:
            yield
        except ApiError as error:
            if error.param is not None:
                own = self.own(error.param)
                if error.message.startswith(error.param):
                    error.message = own + error.message[len(error.param) :]
                    error.args = (error.message,)
                error.param = own
            raise
