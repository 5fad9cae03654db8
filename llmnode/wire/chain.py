"""Prefix chains: one request as a chain of block hashes, the same at the gate and at the node, without a tokenizer.

A conversation is written down as records (a JSON array would end in a bracket and so be no prefix of a longer one),
tools first, then each message. A record's length comes behind it: before it, two messages that begin with the same
document and go on with different questions would share nothing. The bytes are cut in blocks of `BLOCK`; each whole
block is hashed together with the hash before it. So one hash stands for everything up to the end of its block: two
requests share so many blocks from the start, and a set of hashes says all that a node holds. The salt keeps models,
templates and endpoints apart.

Hash: BLAKE2b of 8 bytes, keyed by nothing, since it is in the standard library and takes 0.7 us a block; a client that
looks for collisions could at most mislead routing, never an answer.
"""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from llmnode.wire.turns import tools, turns

BLOCK = 256
"""Bytes: about 64 tokens of English."""
DENSE = 64
"""Blocks from the start that are all published: system prompts and documents end there, and so conversations part."""
STEP = 4
"""Of those beyond, every so manieth is published, so that one prompt of 100,000 tokens takes 450 hashes, not 1,600."""
_ROOT_BYTES = 1024
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_UNTOLD = frozenset({"role", "content", "reasoning_content", "reasoning", "refusal"})
"""Fields of a message that are written in their own way, or not at all: some clients send earlier reasoning back, and
most templates leave it out."""


@dataclass(frozen=True)
class Chain:
    """blocks: a hash for each whole block, each standing for all before it.    size: bytes in all.

    root: hash of what the conversation began with (tools, system text and the first user's), or of the first KiB of a
    plain prompt: where it lives when nobody holds any of it.
    """

    blocks: tuple[int, ...]
    root: int
    size: int

    def depth(self, held: frozenset[int] | set[int]) -> int:
        """How many blocks from the start are held."""
        # From the end: whoever holds a block holds those before it, though it may not name them all.
        for at in range(len(self.blocks), 0, -1):
            if self.blocks[at - 1] in held:
                return at
        return 0


def salt(model: str, template: str, path: str) -> str:
    """What keeps chains apart that stand for different tokens: of different models, of one model under different chat
    templates, and of one text that is the prompt itself at one endpoint and a user's message at another. `Model.id` and
    `Model.template` of the node's report, and the path that the request was sent to."""
    return f"{model}\0{template}\0{path}"


def of_request(body: Mapping[str, Any], salt: str) -> Chain:
    """The chain of a decoded request body: of its conversation, of the parts of a text to be filled in, or else of its
    prompt. Never raises: what makes no sense has a chain too, and the node that gets it says what is wrong."""
    try:
        found = turns(body)
        if found is not None:
            return of_chat(tools(body), found, salt)
        if "input_prefix" in body:
            return of_gap(body, salt)
        return of_prompt(body.get("prompt"), salt)
    except RecursionError:  # nested deeper than can be written down again
        return Chain((), 0, 0)


def converses(body: Mapping[str, Any]) -> bool:
    """Whether a body holds a conversation, whose next turn brings it back with the answer in it."""
    return turns(body) is not None


def of_chat(tools: Any, messages: Sequence[Any], salt: str) -> Chain:
    """The chain of a conversation."""
    written = bytearray() if tools in _EMPTY else bytearray(_record(_json(tools)))
    begins = 0
    for message in messages:
        written += _record(_message(message))
        if not begins and isinstance(message, dict) and message.get("role") == "user":
            begins = len(written)
    return _chain(written, salt, begins or len(written))


def of_prompt(prompt: Any, salt: str) -> Chain:
    """The chain of a plain prompt: a text, or a list of token ids."""
    if isinstance(prompt, str):
        written = prompt.encode("utf-8", "surrogatepass")
    elif isinstance(prompt, list) and all(isinstance(id, int) and 0 <= id < 2**31 for id in prompt):
        written = array("i", prompt).tobytes()
    else:
        written = _json(prompt)
    return _chain(written, salt, min(len(written), _ROOT_BYTES))


def of_gap(body: Mapping[str, Any], salt: str) -> Chain:
    """The chain of a text with a gap: other files first, then what is before the gap, as the model reads them. The root
    is that of the files, or of the first KiB where there are none."""
    files = body.get("input_extra")
    written = bytearray()
    for file in files if isinstance(files, list) else []:
        written += _record(_json(file))
    begins = len(written)
    for name in ("input_prefix", "input_suffix", "prompt"):
        text = body.get(name) or ""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else _json(text)
        written += _record(data)
    return _chain(written, salt, begins or min(len(written), _ROOT_BYTES))


def of_answered(body: Mapping[str, Any], reply: str | Mapping[str, Any], salt: str) -> Chain:
    """The chain that the next request begins with when this one was answered with `reply`, a text or a message: a
    conversation with the answer in it, or a text that goes on. Never raises."""
    prompt = body.get("prompt")
    try:
        found = turns(body)
    except RecursionError:
        return Chain((), 0, 0)
    if found is not None:
        return of_request({"tools": body.get("tools"), "messages": with_reply(found, reply)}, salt)
    goes_on = isinstance(prompt, str) and isinstance(reply, str)
    return of_request({"prompt": prompt + reply} if goes_on else body, salt)  # type: ignore[operator]


def with_reply(messages: Sequence[Any], reply: str | Mapping[str, Any]) -> list[Any]:
    """The conversation as its next turn will send it back, with the answer in it."""
    message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
    return [*messages, message]


def publish(chains: Iterable[Sequence[int]], limit: int) -> list[int]:
    """The hashes by which a node tells that it holds these chains, the first ones first; `limit` of them at most.

    Of each chain the first DENSE blocks, then every STEP-th, and the last: `Chain.depth` looks from the deepest end, so
    whoever goes on with a chain finds all of it, and who leaves it on the way finds all but STEP - 1 blocks. A block
    that several chains have in common counts once. The chain that no longer fits is told as far as it does, from its
    start: who names any block of a chain names its first.
    """
    told: dict[int, None] = {}
    for blocks in chains:
        fresh = []
        last = len(blocks) - 1
        for at in range(last, -1, -1):
            if at < DENSE or at % STEP == 0 or at == last:
                if blocks[at] in told:
                    break  # and with it what is before
                fresh.append(blocks[at])
        told.update(dict.fromkeys(reversed(fresh[max(0, len(told) + len(fresh) - limit) :])))
        if len(told) >= limit:
            break
    return list(told)


def pack(blocks: Iterable[int]) -> str:
    """Hashes as one text for JSON: base64 of 8 bytes each, little-endian."""
    return base64.b64encode(_swapped(array("Q", blocks)).tobytes()).decode()


def unpack(text: str) -> frozenset[int]:
    """Raises ValueError."""
    data = base64.b64decode(text, validate=True)
    if len(data) % 8:
        raise ValueError(f"packed hashes are 8 bytes each, got {len(data)} bytes")
    return frozenset(_swapped(array("Q", data)))


def _chain(written: bytes | bytearray, salt: str, begins: int) -> Chain:
    state = blake2b(salt.encode(), digest_size=8).digest()
    root = blake2b(state + written[:begins], digest_size=8).digest()
    blocks = array("Q")
    for start in range(0, len(written) - BLOCK + 1, BLOCK):
        state = blake2b(state + written[start : start + BLOCK], digest_size=8).digest()
        blocks.frombytes(state)
    return Chain(tuple(_swapped(blocks)), int.from_bytes(root, "little"), len(written))


def _message(message: Any) -> bytes:
    """A message's canonical bytes. Fields that are absent and fields that are empty are the same; a list of text parts
    is the text, since clients send the same turn either way."""
    if not isinstance(message, dict):
        return _json(message)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    role = message.get("role")
    rest = {k: v for k, v in message.items() if k not in _UNTOLD and v not in _EMPTY}
    if not isinstance(content, str) and content not in _EMPTY:
        rest["content"] = content
        content = ""
    parts = (str(role), _json(rest).decode("utf-8", "surrogatepass") if rest else "", content or "")
    return "\0".join(parts).encode("utf-8", "surrogatepass")


def _record(data: bytes) -> bytes:
    return data + len(data).to_bytes(4, "big")


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _swapped(hashes: array[int]) -> array[int]:
    """Between this machine's order of bytes and little-endian."""
    if sys.byteorder == "big":  # pragma: no cover - no such machine is at hand
        hashes.byteswap()
    return hashes
