"""Bodies of /tokenize and /detokenize: read, and answered by a tokenizer.

Owns: fields and shapes. Refuses to know: Sanic, and which model the tokenizer is of.
Source of names and shapes: the README of llama.cpp's server. There a request without `content` or `tokens` gets an
empty answer; here it is refused, and so are ids that do not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmnode.api import named
from llmnode.api.fields import Fields, kind, show
from llmnode.engine.backend import Tokenizer
from llmnode.wire.errors import InvalidRequest

MOST = 1024 * 1024
"""Characters of a text, and ids: the answer to more would keep the process busy for long enough to be felt."""


@dataclass(frozen=True)
class TokenizeRequest:
    """parts: texts, and ids that stay as they are.      ends: with the tokens around it that the model wants there.
    special: control tokens written out in texts count as such.     pieces: each id with its text."""

    parts: tuple[str | int, ...]
    ends: bool
    special: bool
    pieces: bool
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class DetokenizeRequest:
    tokens: tuple[int, ...]
    ignored: tuple[str, ...]


def read_text(body: Mapping[str, Any], names: Sequence[str], n_vocab: int, *, strict: bool) -> TokenizeRequest:
    """Read a body of /tokenize. Raises InvalidRequest, ModelNotFound."""
    fields = Fields(body)
    named.model(fields, names)
    content = fields.get("content")
    if not isinstance(content, (str, list)):
        raise InvalidRequest(
            f"content must be a text, or a list of texts and token ids, got {kind(content)}", param="content"
        )
    parts: list[str | int] = [content] if isinstance(content, str) else content
    _require_size("content", sum(len(part) if isinstance(part, str) else 1 for part in parts))
    for part in parts:
        if not isinstance(part, str):
            _require_token(part, "content", n_vocab)
    ends, pieces = fields.flag("add_special"), fields.flag("with_pieces")
    special = fields.get("parse_special") is None or fields.flag("parse_special")
    return TokenizeRequest(tuple(parts), ends, special, pieces, named.ignored(fields, strict=strict))


def read_ids(body: Mapping[str, Any], names: Sequence[str], n_vocab: int, *, strict: bool) -> DetokenizeRequest:
    """Read a body of /detokenize. Raises InvalidRequest, ModelNotFound."""
    fields = Fields(body)
    named.model(fields, names)
    tokens = fields.get("tokens")
    if not isinstance(tokens, list):
        raise InvalidRequest(f"tokens must be a list of token ids, got {kind(tokens)}", param="tokens")
    _require_size("tokens", len(tokens))
    for token in tokens:
        _require_token(token, "tokens", n_vocab)
    return DetokenizeRequest(tuple(tokens), named.ignored(fields, strict=strict))


def tokenize(request: TokenizeRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer of /tokenize. Takes as long as the text is: call it off the event loop."""
    ids = mixed(request.parts, tokenizer, special=request.special, ends=request.ends)
    if not request.pieces:
        return {"tokens": ids}
    pieces = {id: _piece(tokenizer.spell(id)) for id in set(ids)}  # each once: asking takes 5 us
    return {"tokens": [{"id": id, "piece": pieces[id]} for id in ids]}


def detokenize(request: DetokenizeRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer of /detokenize: control tokens by their names; what is half a character becomes U+FFFD."""
    pieces = {id: tokenizer.spell(id) for id in set(request.tokens)}
    return {"content": b"".join(map(pieces.__getitem__, request.tokens)).decode("utf-8", "replace")}


def mixed(parts: Sequence[str | int], tokenizer: Tokenizer, *, special: bool, ends: bool) -> list[int]:
    """Ids of texts and ids in their order. With `ends`, what the model wants around a text stands around a first part
    that is one."""
    ids: list[int] = []
    for index, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += tokenizer.tokenize(part, special=special, ends=ends and index == 0)
    return ids


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _require_token(value: Any, field: str, n_vocab: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n_vocab:
        raise InvalidRequest(f"{field} must hold token ids from 0 to {n_vocab - 1}, got {show(value)}", param=field)


def _require_size(field: str, size: int) -> None:
    if size > MOST:
        what = "characters" if field == "content" else "ids"
        raise InvalidRequest(f"{field} may hold {MOST} {what} at most, got {size}", param=field)
