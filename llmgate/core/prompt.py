"""What a request says, as far as routing reads it: chains of block hashes (llmnode/wire/chain.py), made once and late.

Late, because most policies need none, and a prompt of 100,000 tokens takes 1.5 ms to hash. Once for each salt: nodes of
one model have the same, but for those that a roll has already given another template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmnode.wire import chain
from llmnode.wire.chain import Chain
from llmnode.wire.node import Model

NOTHING = Chain((), 0, 0)
"""The chain of a request that has no prompt, e.g. for embeddings."""
_PROMPTS = ("messages", "prompt", "input_prefix")
_OTHERS = {"/v1/responses": ("input",)}
"""Where prompts stand, and where they stand at some paths: what embeddings call `input` is none."""


class Prompt:
    """The prompt of one decoded request body, sent to `path`."""

    def __init__(self, body: Mapping[str, Any], path: str) -> None:
        self._body, self.path = body, path
        self._chains: dict[str, Chain] = {}

    def chain(self, model: Model) -> Chain:
        """Its chain at nodes that serve this model. Hashes it the first time: about 1 us for each 256 bytes."""
        if all(self._body.get(name) is None for name in (*_PROMPTS, *_OTHERS.get(self.path, ()))):
            return NOTHING
        salt = chain.salt(model.id, model.template, self.path)
        found = self._chains.get(salt)
        if found is None:
            found = self._chains[salt] = chain.of_request(self._body, salt)
        return found
