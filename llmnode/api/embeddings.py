"""Bodies of /v1/embeddings, and of llama-server's /embedding and /embeddings: read, and written.

Owns: fields, ranges and shapes; how a vector is cut and scaled. Refuses to know: Sanic, tokenizers, how vectors come
about.
Source of names and shapes: OpenAI's API reference; the README of llama.cpp's server for the other two.

Numbers are written with nine digits, which is what it takes to tell any two 32-bit floats apart: the text is half as
long as that of the same numbers as doubles, and read as 32-bit floats they are those that base64 carries.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmnode.api import named
from llmnode.api.fields import Fields, kind, show
from llmnode.engine.pooling import finished
from llmnode.wire.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = Sequence[NDArray[np.float32]]

EUCLIDEAN = 2
_MAX_NORM = 100
_LARGEST_INT16 = 32760
"""What llama.cpp scales the largest value to where it normalises by that, so that vectors can be kept as 16 bits."""
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "truncate_prompt_tokens": (),
    "truncate": (False, "NONE"),
    "task": (),
    "input_type": (),
    "embedding_types": (["float"],),
    "late_chunking": (False,),
}
"""Fields of other servers that change a vector, with the values that ask for nothing."""


@dataclass(frozen=True)
class Scale:
    """What is allowed of a model's vectors. width: values in each.      cut: whether fewer may be asked for.
    n_ctx: tokens of a text at most."""

    width: int
    cut: bool
    n_ctx: int


@dataclass(frozen=True)
class EmbeddingRequest:
    """inputs: texts, or token ids that are used as they are.      field: where they stood, for errors.

    native: llama-server's shape, a list without usage.     norm: by which the vectors are scaled, as `embd_normalize`.
    dimensions: None for all.       base64: the vectors as little-endian 32-bit floats.
    """

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    field: str
    ignored: tuple[str, ...]
    native: bool = False
    dimensions: int | None = None
    norm: int = EUCLIDEAN
    base64: bool = False


def read(
    body: Mapping[str, Any], names: Sequence[str], scale: Scale, *, most: int, strict: bool, native: bool, pools: bool
) -> EmbeddingRequest:
    """Read a body. names: of the model.     most: inputs at most.     native: of /embedding or /embeddings.
    pools: whether a text comes to one vector. Raises InvalidRequest, ModelNotFound."""
    fields = Fields(body)
    model = named.model(fields, names)
    if not native and not pools:
        raise InvalidRequest(
            "this model gives a vector for each token (pooling is none), which only /embeddings can show", param="model"
        )
    at = "content" if native and fields.get("content") is not None else "input"
    inputs = _inputs(fields.get(at), at, most, scale.n_ctx)
    encoding = fields.get("encoding_format")
    if encoding not in (None, "float", *(() if native else ("base64",))):
        raise fields.wrong("encoding_format", "must be float" if native else "must be float or base64", encoding)
    norm = fields.whole("embd_normalize", -1, _MAX_NORM)
    dimensions = _dimensions(fields, scale)
    fields.refuse(REFUSED)
    return EmbeddingRequest(
        model,
        inputs,
        at,
        named.ignored(fields, strict=strict),
        native,
        dimensions,
        EUCLIDEAN if norm is None else norm,
        encoding == "base64",
    )


def scaled(vectors: Vectors, request: EmbeddingRequest, *, pools: bool) -> list[NDArray[np.float32]]:
    """The vectors as the request wants them. Those of single tokens stay as they are, as llama-server leaves them."""
    if not pools:
        return [finished(vector, normalized=False, dimensions=request.dimensions) for vector in vectors]
    return [_scaled(vector, request) for vector in vectors]


def write(vectors: Vectors, request: EmbeddingRequest, tokens: int) -> bytes:
    """The body of the answer. Takes a millisecond for 2,000 numbers: call it off the event loop, which can go on
    between two vectors."""
    if request.native:
        return b"[%s]" % b",".join(
            b'{"index":%d,"embedding":[%s]}' % (index, b",".join(map(_numbers, np.atleast_2d(vector))))
            for index, vector in enumerate(vectors)
        )
    data = (
        b'{"object":"embedding","index":%d,"embedding":%s}'
        % (index, _packed(vector) if request.base64 else _numbers(vector))
        for index, vector in enumerate(vectors)
    )
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    head = json.dumps({"object": "list", "model": request.model, "usage": usage}, separators=(",", ":")).encode()
    return head[:-1] + b',"data":[%s]}' % b",".join(data)


def _inputs(value: Any, at: str, most: int, n_ctx: int) -> tuple[str | tuple[int, ...], ...]:
    """One input or a list of them, where a list of numbers is one."""
    shapes = "a text, a list of texts, token ids or lists of token ids"
    if value in (None, "", []) or not isinstance(value, (str, list)):
        raise InvalidRequest(f"{at} must be {shapes}, none empty, got {kind(value)}", param=at)
    several = isinstance(value, list) and not _is_number(value[0])
    inputs = value if several else [value]
    if len(inputs) > most:
        raise InvalidRequest(f"{at} may hold {most} texts at most, got {len(inputs)}", param=at)
    return tuple(_input(one, f"{at}[{index}]" if several else at, n_ctx) for index, one in enumerate(inputs))


def _input(value: Any, at: str, n_ctx: int) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{at} must be a text or token ids, not empty, got {kind(value)}", param=at)
    if len(value) > n_ctx:
        raise InvalidRequest(
            f"{at} has {len(value)} tokens and the model takes {n_ctx} at most",
            param=at,
            code="context_length_exceeded",
        )
    for token in value:
        if not _is_number(token) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise InvalidRequest(f"{at} must hold token ids, got {show(token)}", param=at)
    return tuple(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _dimensions(fields: Fields, scale: Scale) -> int | None:
    wanted = fields.whole("dimensions", 1, scale.width)
    if wanted is not None and wanted != scale.width and not scale.cut:
        raise fields.wrong(
            "dimensions",
            f"can only be {scale.width} with this model: it is not known as one whose vectors may be cut "
            "(the setting matryoshka)",
            wanted,
            "unsupported_parameter",
        )
    return wanted


def _scaled(vector: NDArray[np.float32], request: EmbeddingRequest) -> NDArray[np.float32]:
    if request.norm == EUCLIDEAN:
        return finished(vector, normalized=True, dimensions=request.dimensions)
    kept = finished(vector, normalized=False, dimensions=request.dimensions)
    if request.norm < 0:
        return kept
    size = np.abs(kept, dtype=np.float64)
    length = (size**request.norm).sum() ** (1 / request.norm) if request.norm else size.max() / _LARGEST_INT16
    return (kept / length).astype(np.float32) if length > 0 else kept


def _numbers(vector: NDArray[np.float32]) -> bytes:
    return b"[%s]" % ",".join(map("%.9g".__mod__, vector.tolist())).encode()


def _packed(vector: NDArray[np.float32]) -> bytes:
    return b'"%s"' % base64.b64encode(vector.astype("<f4").tobytes())
