"""What clients are promised of embeddings and reranking, asked of real models that were made here."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from llmnode.engine import llama
from llmnode.engine.backend import OK
from llmnode.engine.llama import LlamaOptions, LlamaPooling
from tests import tiny_model as recipe
from tests.conftest import Start
from tests.processes import Program

TEXTS = ["hello world", "der schnelle braune Fuchs", "a", "x y z " * 30, "Grüße aus Berlin"]
WIDTH = 64


def options(kind: str, pooling: str = "model") -> LlamaOptions:
    return LlamaOptions(recipe.make(kind), slots=8, threads=1, pooling=pooling)


@pytest.fixture(scope="module")
def embedder(start_module: Start) -> Program:
    model = str(recipe.make("bert"))
    return start_module(
        "llmnode", "--model", model, "--model-id", "bert", "--threads", "1", "--matryoshka", "--max-texts", "40"
    ).ready()


@pytest.fixture(scope="module")
def reranker(start_module: Start) -> Program:
    model = str(recipe.make("reranker"))
    return start_module("llmnode", "--model", model, "--model-id", "rr", "--threads", "1", "--max-texts", "40").ready()


@pytest.fixture(scope="module")
def bert() -> Iterator[LlamaPooling]:
    made = llama.load_pooling(options("bert"))
    yield made
    made.close()


def post(node: Program, path: str, body: Any, status: int = 200, **headers: str) -> Any:
    answer = httpx.post(node.url + path, json=body, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def vectors_of(body: Any) -> np.ndarray:
    return np.array([one["embedding"] for one in body["data"]], np.float32)


def direct(backend: LlamaPooling, texts: list[str]) -> np.ndarray:
    ids = [backend.tokenize(text, special=False, ends=True) for text in texts]
    rows = []
    for text in ids:
        assert backend.pool([text]) == OK
        rows.append(backend.vector(0).copy())
    return np.stack(rows)


def test_embeddings_are_those_of_llama_cpp_in_openais_shape(embedder: Program, bert: LlamaPooling) -> None:
    body = post(embedder, "/v1/embeddings", {"model": "bert", "input": TEXTS, "user": "me"})
    assert set(body) == {"object", "model", "usage", "data"}
    assert (body["object"], body["model"]) == ("list", "bert")
    assert [(one["object"], one["index"]) for one in body["data"]] == [("embedding", i) for i in range(len(TEXTS))]
    tokens = sum(len(bert.tokenize(text, special=False, ends=True)) for text in TEXTS)
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    truth = direct(bert, TEXTS)
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    assert np.abs(vectors_of(body) - truth).max() < 0.01
    assert np.linalg.norm(vectors_of(body), axis=1) == pytest.approx(1, abs=1e-5)


def test_base64_holds_the_same_numbers_bit_for_bit(embedder: Program) -> None:
    asked = {"input": TEXTS[0]}
    numbers = vectors_of(post(embedder, "/v1/embeddings", asked))
    packed = post(embedder, "/v1/embeddings", {**asked, "encoding_format": "base64"})["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), numbers[0])


def test_texts_may_come_as_token_ids(embedder: Program, bert: LlamaPooling) -> None:
    ids = [bert.tokenize(text, special=False, ends=True) for text in TEXTS[:2]]
    by_text = vectors_of(post(embedder, "/v1/embeddings", {"input": TEXTS[:2]}))
    assert np.abs(vectors_of(post(embedder, "/v1/embeddings", {"input": ids})) - by_text).max() < 0.01
    assert np.abs(vectors_of(post(embedder, "/v1/embeddings", {"input": ids[0]})) - by_text[0]).max() < 0.01


def test_fewer_dimensions_are_the_first_ones_scaled_again(embedder: Program) -> None:
    whole = vectors_of(post(embedder, "/v1/embeddings", {"input": TEXTS[0]}))[0]
    cut = vectors_of(post(embedder, "/v1/embeddings", {"input": TEXTS[0], "dimensions": 16}))[0]
    assert cut.shape == (16,)
    assert np.abs(cut - whole[:16] / np.linalg.norm(whole[:16])).max() < 1e-6


def test_llama_servers_own_paths_give_its_own_shape(embedder: Program, bert: LlamaPooling) -> None:
    raw = direct(bert, TEXTS[:1])[0]
    for path in ("/embedding", "/embeddings"):
        (one,) = post(embedder, path, {"content": TEXTS[0]})
        assert set(one) == {"index", "embedding"}
        assert one["index"] == 0
        assert np.abs(np.array(one["embedding"]) - raw / np.linalg.norm(raw)).max() < 0.01
    for norm, length in [
        (-1, 1.0),
        (0, np.abs(raw).max() / 32760),
        (1, np.abs(raw).sum()),
        (3, np.cbrt((np.abs(raw) ** 3).sum())),
    ]:
        (one,) = post(embedder, "/embedding", {"content": TEXTS[0], "embd_normalize": norm})
        assert np.array(one["embedding"][0]) * length == pytest.approx(raw, abs=0.05), norm
    two = post(embedder, "/embeddings", {"input": TEXTS[:2]})
    assert [one["index"] for one in two] == [0, 1]


def test_a_vector_for_each_token_where_nothing_is_pooled(start: Start) -> None:
    node = start("llmnode", "--model", str(recipe.make("bert")), "--pooling", "none", "--threads", "1").ready()
    backend = llama.load_pooling(options("bert", "none"))
    ids = backend.tokenize(TEXTS[0], special=False, ends=True)
    assert backend.pool([ids]) == OK
    (one,) = post(node, "/embeddings", {"content": TEXTS[0]})
    assert np.array(one["embedding"]) == pytest.approx(backend.vector(0), abs=0.05)
    backend.close()
    assert "pooling is none" in post(node, "/v1/embeddings", {"input": "x"}, 400)["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "input", "got nothing"),
        ({"input": ""}, "input", "got a text that is empty"),
        ({"input": []}, "input", "got a list that is empty"),
        ({"input": ["a", ""]}, "input[1]", "not empty, got a text that is empty"),
        ({"input": ["a", 5]}, "input[1]", "must be a text or token ids"),
        ({"input": [5, "a"]}, "input", 'must hold token ids, got "a"'),
        ({"input": [30522]}, "input", "token ids must be from 0 to 30521"),
        ({"input": ["a"] * 41}, "input", "40 texts at most, got 41"),
        ({"input": ["a", [5] * 513]}, "input[1]", "513 tokens and the model takes 512 at most"),
        ({"input": "word " * 600}, "input", "602 tokens and the model takes 512 at most"),
        ({"input": "a", "dimensions": 65}, "dimensions", "from 1 to 64, got 65"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", 'must be float or base64, got "int8"'),
        ({"input": "a", "truncate": "END"}, "truncate", "not supported"),
        ({"input": "a", "model": "other"}, "model", "models served here: bert"),
    ],
)  # fmt: skip
def test_what_cannot_be_embedded_is_named(embedder: Program, body: Any, param: str, says: str) -> None:
    error = post(embedder, "/v1/embeddings", body, 404 if "model" in body else 400)["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_vectors_are_cut_only_where_the_operator_says_that_they_may_be(start: Start) -> None:
    node = start("llmnode", "--backend", "fake", "--kind", "embed").ready()
    assert len(vectors_of(post(node, "/v1/embeddings", {"input": "a", "dimensions": 32}))[0]) == 32
    error = post(node, "/v1/embeddings", {"input": "a", "dimensions": 8}, 400)["error"]
    assert error["param"] == "dimensions"
    assert "matryoshka" in error["message"]


def test_documents_come_back_by_their_scores(reranker: Program) -> None:
    backend = llama.load_pooling(options("reranker"))
    query, documents = "what is a panda?", [*TEXTS, "the giant panda is a bear"]
    scores = []
    for document in documents:
        assert backend.pool([backend.pair(query, document)]) == OK
        scores.append(float(backend.vector(0)[0]))
    tokens = sum(len(backend.pair(query, document)) for document in documents)
    backend.close()
    body = post(reranker, "/v1/rerank", {"model": "rr", "query": query, "documents": documents})
    assert set(body) == {"object", "model", "usage", "results"}
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    told = {one["index"]: one["relevance_score"] for one in body["results"]}
    assert [told[index] for index in range(len(documents))] == pytest.approx(scores, abs=0.02)
    assert [one["relevance_score"] for one in body["results"]] == sorted(told.values(), reverse=True)
    for path in ("/rerank", "/v1/reranking", "/reranking"):
        asked = {"query": query, "documents": [{"text": text} for text in documents], "top_n": 2}
        top = post(reranker, path, {**asked, "return_documents": True})["results"]
        assert [one["index"] for one in top] == [one["index"] for one in body["results"][:2]]
        assert [one["document"] for one in top] == [{"text": documents[one["index"]]} for one in top]
    bare = post(reranker, "/rerank", {"query": query, "texts": documents, "return_text": True})
    assert [(one["index"], one["text"]) for one in bare] == [
        (one["index"], documents[one["index"]]) for one in body["results"]
    ]
    assert set(bare[0]) == {"index", "score", "text"}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"documents": ["a"]}, "query", "must be a text that is not empty, got nothing"),
        ({"query": "q"}, "documents", "must be a list of texts, not empty, got nothing"),
        ({"query": "q", "documents": []}, "documents", "got a list that is empty"),
        ({"query": "q", "documents": ["a", 5]}, "documents[1]", "a text, or an object with a text"),
        ({"query": "q", "documents": ["a"] * 41}, "documents", "40 texts at most, got 41"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n", "from 1, got 0"),
        ({"query": "q", "documents": ["word " * 600]}, "documents", "tokens and the model takes 512 at most"),
        ({"query": "word " * 600, "documents": ["a"]}, "query", "600 tokens and the model takes 512 at most"),
        ({"query": "q", "documents": ["a"], "max_chunks_per_doc": 5}, "max_chunks_per_doc", "not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked_is_named(reranker: Program, body: Any, param: str, says: str) -> None:
    error = post(reranker, "/v1/rerank", body, 400)["error"]
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/inference", "/v1/rerank", "/apply-template"]
)
def test_a_model_says_what_it_serves_instead(embedder: Program, path: str) -> None:
    error = post(embedder, path, {"messages": [], "prompt": "x"}, 400)["error"]
    assert error["code"] == "wrong_kind"
    assert error["message"] == f"the model 'bert' cannot answer {path}; it serves: embedding"


def test_a_node_reports_what_its_model_is_for(embedder: Program, reranker: Program) -> None:
    for node, kind in [(embedder, "embedding"), (reranker, "rerank")]:
        report = httpx.get(node.url + "/node").json()
        assert report["models"][0]["kinds"] == [kind]
        (card,) = httpx.get(node.url + "/v1/models").json()["data"]
        assert card["kinds"] == [kind]
        assert httpx.get(f"{node.url}/v1/models/{card['id']}").json() == card
        assert card["meta"] == {
            "vocab_type": 3, "n_vocab": 30522, "n_ctx": 512, "n_ctx_train": 512, "n_embd": WIDTH,
            "n_params": report["models"][0]["n_params"], "size": report["models"][0]["size_bytes"],
        }  # fmt: skip


def test_what_vectors_cost_is_counted(embedder: Program) -> None:
    def count() -> float:
        page = httpx.get(embedder.url + "/metrics").text
        counted = [line for line in page.splitlines() if line.startswith('llmnode_tokens_total{kind="prompt"}')]
        return float(counted[0].split()[-1]) if counted else 0.0

    before = count()
    answer = httpx.post(
        embedder.url + "/v1/embeddings", json={"input": "hello"}, headers={"x-llmrack-report-usage": "1"}
    )
    assert answer.headers["x-llmrack-usage"] == "3 0 0"
    assert count() - before == 3


def test_a_model_that_generates_can_be_made_to_embed(start: Start, tiny_model: Path) -> None:
    node = start("llmnode", "--model", str(tiny_model), "--kind", "embed", "--n-ctx", "128", "--threads", "1").ready()
    assert vectors_of(post(node, "/v1/embeddings", {"input": "hello"})).shape == (1, WIDTH)
