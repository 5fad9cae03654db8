"""Bodies of /v1/rerank and its other names: read, and written.

Owns: fields, ranges, shapes, the order of the results. Refuses to know: Sanic, and how a score comes about.
Source of names and shapes: Jina's and Cohere's rerank, whose fields are the same; llama.cpp's server, which takes Text
Embeddings Inference's as well (`texts` in place of `documents`, and a bare list as the answer).

Scores are the classifier's own outputs, as llama.cpp's server gives them: they order documents, and are no
probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmnode.api import named
from llmnode.api.fields import Fields, kind
from llmnode.wire.errors import InvalidRequest

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "max_chunks_per_doc": (),
    "max_tokens_per_doc": (),
    "rank_fields": (["text"],),
    "raw_scores": (True,),
    "truncate": (False, "NONE"),
    "truncate_prompt_tokens": (),
}
"""Fields that change scores in ways this node does not know, with the values that ask for nothing."""


@dataclass(frozen=True)
class RerankRequest:
    """top: results wanted.     texts: the documents come back with their scores.
    bare: Text Embeddings Inference's shape. field: where the documents stood, for errors."""

    model: str
    query: str
    documents: tuple[str, ...]
    top: int
    texts: bool
    bare: bool
    field: str
    ignored: tuple[str, ...]


def read(body: Mapping[str, Any], names: Sequence[str], *, most: int, strict: bool) -> RerankRequest:
    """Read a body. names: of the model.     most: documents at most. Raises InvalidRequest, ModelNotFound."""
    fields = Fields(body)
    model = named.model(fields, names)
    query = fields.get("query")
    if not isinstance(query, str) or not query:
        raise InvalidRequest(f"query must be a text that is not empty, got {kind(query)}", param="query")
    bare = "documents" not in fields.body and "texts" in fields.body
    field = "texts" if bare else "documents"
    documents = _documents(fields.get(field), field, most)
    top = fields.whole("top_n", 1)
    texts = fields.flag("return_text" if bare else "return_documents")
    fields.refuse(REFUSED)
    ignored = named.ignored(fields, strict=strict)
    return RerankRequest(model, query, documents, top or len(documents), texts, bare, field, ignored)


def write(scores: Sequence[float], request: RerankRequest, tokens: int) -> Any:
    """The answer: the best first, of equals the one that came first."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top]
    if request.bare:
        return [
            {"index": index, "score": scores[index], **({"text": request.documents[index]} if request.texts else {})}
            for index in order
        ]
    results = [
        {
            "index": index,
            "relevance_score": scores[index],
            **({"document": {"text": request.documents[index]}} if request.texts else {}),
        }
        for index in order
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": request.model, "usage": usage, "results": results}


def _documents(value: Any, field: str, most: int) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{field} must be a list of texts, not empty, got {kind(value)}", param=field)
    if len(value) > most:
        raise InvalidRequest(f"{field} may hold {most} texts at most, got {len(value)}", param=field)
    texts = []
    for index, one in enumerate(value):
        text = one.get("text") if isinstance(one, dict) else one
        if not isinstance(text, str):
            at = f"{field}[{index}]"
            raise InvalidRequest(f"{at} must be a text, or an object with a text, got {kind(one)}", param=at)
        texts.append(text)
    return tuple(texts)
