"""Vectors and scores by llama.cpp, with tiny models made here, alone and beside a model that generates."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llmnode.engine import llama
from llmnode.engine.backend import BAD_BATCH, OK, Chunk, ModelLoadError
from llmnode.engine.llama import LlamaBackend, LlamaOptions, LlamaPooling
from llmnode.engine.llama.native import native
from llmnode.engine.pooling import Pooled, PoolingAsk, PoolingEngine, PoolingEvent
from tests import tiny_model as recipe

TEXTS = ["hello world", "der schnelle braune Fuchs", "a", "x y z " * 30, "Grüße aus Berlin", "one two three four"]
MIB = 2**20


def options(kind: str, **more: Any) -> LlamaOptions:
    return LlamaOptions(recipe.make(kind), **{"slots": 8, "threads": 1, **more})


@pytest.fixture(params=["bert", "reranker", "tiny"])
def backend(request: pytest.FixtureRequest) -> Iterator[LlamaPooling]:
    made = llama.load_pooling(options(request.param, n_ctx=512))
    yield made
    made.close()


def vectors(backend: LlamaPooling, texts: list[list[int]]) -> list[np.ndarray]:
    assert backend.pool(texts) == OK
    return [backend.vector(index).copy() for index in range(len(texts))]


def test_a_vector_is_the_same_alone_and_in_company(backend: LlamaPooling) -> None:
    ids = [backend.tokenize(text, special=False, ends=True) for text in TEXTS]
    together = vectors(backend, ids)
    assert together[0].shape == (backend.width,)
    for text, vector in zip(ids, together, strict=True):
        assert np.abs(vectors(backend, [text])[0] - vector).max() < 0.02
    assert np.abs(together[0] - together[1]).max() > 0.05, "vectors of different texts differ"


def test_pooling_is_what_its_name_says() -> None:
    """Of an encoder's vectors of all tokens, each pooling can be had by hand."""
    made = {name: llama.load_pooling(options("bert", pooling=name)) for name in ("none", "mean", "cls", "last")}
    ids = [made["mean"].tokenize(text, special=False, ends=True) for text in TEXTS]
    rows = vectors(made["none"], ids)
    assert [row.shape for row in rows] == [(len(text), 64) for text in ids]
    by_hand = {"mean": lambda row: row.mean(axis=0), "cls": lambda row: row[0], "last": lambda row: row[-1]}
    for name, pool in by_hand.items():
        for row, vector in zip(rows, vectors(made[name], ids), strict=True):
            assert np.abs(pool(row) - vector).max() < 1e-3, name
    for backend in made.values():
        backend.close()


def test_the_model_says_how_to_pool() -> None:
    for kind, pooling in [("bert", "mean"), ("reranker", "rank"), ("tiny", "last")]:
        backend = llama.load_pooling(options(kind))
        assert backend.pooling == pooling
        backend.close()


def test_texts_and_pairs_get_the_ends_that_the_model_wants() -> None:
    bert, tiny = llama.load_pooling(options("bert")), llama.load_pooling(options("tiny"))
    cls, sep = 101, 102
    hello, world = (
        bert.tokenize("hello", special=False, ends=True)[1:-1],
        bert.tokenize("world", special=False, ends=True)[1:-1],
    )
    assert bert.tokenize("hello", special=False, ends=True) == [cls, *hello, sep]
    assert bert.pair("hello", "world") == [cls, *hello, sep, *world, sep]
    assert bert.tokenize("[SEP]", special=False, ends=True) != [cls, sep, sep], (
        "a control token written out in a text is text"
    )
    assert bert.tokenize("", special=False, ends=True) == [cls, sep]
    assert tiny.tokenize("hello", special=False, ends=True)[0] == 1
    bert.close()
    tiny.close()


def test_a_batch_that_cannot_be_is_refused_without_harm(backend: LlamaPooling) -> None:
    room = backend.room
    too_many = [[5]] * (room.sequences + 1)
    for texts in ([], [[]], [[5], []], too_many, [[5] * (room.n_batch + 1)], [[5] * room.n_batch, [5]], [[10**6]]):
        assert backend.pool(texts) == BAD_BATCH
    assert backend.pool([[5] * room.n_ctx]) == OK


def test_many_texts_are_split_over_batches() -> None:
    backend = llama.load_pooling(options("bert", slots=4, n_ctx=64, n_batch=100))
    expected = [vectors(backend, [backend.tokenize(text, special=False, ends=True)])[0] for text in TEXTS[:3]]
    ids = tuple(tuple(backend.tokenize(text, special=False, ends=True)) for text in TEXTS[:3]) * 20
    engine = PoolingEngine(backend)
    came = threading.Event()
    got: list[PoolingEvent] = []

    def sink(event: PoolingEvent) -> None:
        got.append(event)
        came.set()

    engine.submit(PoolingAsk(ids, normalized=True), sink)
    engine.start()
    assert came.wait(60)
    engine.stop()
    (pooled,) = got
    assert isinstance(pooled, Pooled)
    assert len(pooled.vectors) == 60
    for index, vector in enumerate(pooled.vectors):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        truth = expected[index % 3] / np.linalg.norm(expected[index % 3])
        assert np.abs(vector - truth).max() < 0.01


def generate(backend: LlamaBackend, count: int) -> np.ndarray:
    """Logits of every step of a greedy answer."""
    rows = []
    ids = [7, 8, 9]
    for _ in range(count):
        assert backend.decode([Chunk(0, backend.seq_length(0), ids, 1)]) == OK
        rows.append(backend.logits()[0].copy())
        ids = [int(rows[-1].argmax())]
    assert backend.seq_remove(0)
    return np.stack(rows)


def test_a_stream_beside_it_is_not_disturbed() -> None:
    """The same model, one context that generates and one that pools, each on its thread: not a bit changes."""
    backend = llama.load(LlamaOptions(recipe.make("tiny"), slots=2, n_ctx=512, threads=1))
    undisturbed = generate(backend, 60)
    pooling = llama.load_pooling(LlamaOptions(recipe.make("tiny"), slots=8, n_ctx=128, threads=1), beside=backend)
    vector = vectors(pooling, [[5, 6, 7]])[0]
    engine = PoolingEngine(pooling)
    dice = np.random.default_rng(3)
    counted = threading.Semaphore(0)
    done: list[PoolingEvent] = []

    def sink(event: PoolingEvent) -> None:
        done.append(event)
        counted.release()

    for _ in range(40):
        engine.submit(PoolingAsk(tuple(tuple(dice.integers(3, 30000, 50).tolist()) for _ in range(5))), sink)
    engine.submit(PoolingAsk(((5, 6, 7),)), sink)
    engine.start()
    disturbed = generate(backend, 60)
    assert np.array_equal(disturbed, undisturbed)
    for _ in range(41):
        assert counted.acquire(timeout=60)
    assert all(isinstance(event, Pooled) for event in done)
    last = next(event for event in done if isinstance(event, Pooled) and len(event.vectors) == 1)
    assert np.abs(last.vectors[0] - vector).max() < 0.02
    backend.close()
    late = threading.Event()
    engine.submit(PoolingAsk(((5, 6, 7),)), lambda event: late.set())
    assert late.wait(60), "the model lives as long as somebody uses it"
    engine.stop()
    with pytest.raises(ValueError, match="closed"):
        backend.borrow()


@pytest.mark.parametrize(
    "kind, more, complaint",
    [
        ("bert", {"pooling": "max"}, "pooling is 'max'; it can be model, none, mean, cls, last, rank"),
        ("bert", {"pooling": "rank"}, "cannot rank: it has no classifier"),
        ("bert", {"n_ctx": 1000}, "n_ctx is 1000; .* was trained for 512 tokens"),
        ("bert", {"slots": 300}, "slots is 300; llama.cpp holds 256 sequences at most"),
    ],
)
def test_what_a_pooling_context_cannot_be_is_refused_by_name(kind: str, more: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        llama.load_pooling(options(kind, **more))


def test_a_model_that_only_embeds_is_not_asked_to_generate() -> None:
    with pytest.raises(ModelLoadError, match="cannot generate text"):
        llama.load(options("bert"))


@pytest.mark.parametrize("kind", ["bert", "tiny"])
def test_the_estimate_is_what_llama_cpp_then_takes(kind: str) -> None:
    fit = llama.estimate_pooling(options(kind)).fit
    with native().listening() as lines:
        llama.load_pooling(options(kind, fit_check=False)).close()
    counted = {part.what: part.size for part in fit.parts}
    for what, name in [("weights", "model"), ("cache", "KV"), ("compute buffer", "compute")]:
        found = [re.search(rf" {name} buffer size = +([\d.]+) MiB", line) for line in lines]
        taken = sum(float(match[1]) * MIB for match in found if match)
        assert counted.get(what, 0) == pytest.approx(taken, abs=0.1 * MIB), what
    with pytest.raises(ModelLoadError, match="does not fit"):
        llama.load_pooling(options("tiny", n_ctx=2048, n_batch=10**6))
