"""The engine over real llama.cpp with a small model of random weights.

Logits depend a little on the shape of a batch, so an answer from a mixed batch is not compared letter by letter with
the same answer alone. Each answer is scored again, alone, and must be one that the model could have given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmnode.engine import llama
from llmnode.engine.backend import BAD_BATCH, OK, Chunk, FatalEngineError, ModelLoadError
from llmnode.engine.llama import LlamaBackend, LlamaOptions
from llmnode.engine.loop import Limits
from llmnode.engine.types import Ask, Finish, Sampling
from tests.node.engine_rig import Answer, running, until
from tests.rescoring import is_credible, is_credible_draw, rescored

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def scorer(tiny_model: Path) -> Iterator[LlamaBackend]:
    """A backend of its own, which computes one sequence at a time."""
    backend = llama.load(LlamaOptions(tiny_model, threads=1, slots=1, n_ctx=512))
    yield backend
    backend.close()


def answers_to(tiny_model: Path, asks: list[Ask], slots: int = 4) -> tuple[list[Answer], list[int]]:
    """Every answer, and how many sequences each step carried."""
    backend = llama.load(LlamaOptions(tiny_model, threads=1, slots=slots, n_ctx=512, n_batch=64))
    widths: list[int] = []
    decode = backend.decode

    def watched(chunks: list[Chunk]) -> int:
        widths.append(len(chunks))
        return decode(chunks)

    backend.decode = watched  # type: ignore[method-assign, assignment]
    answers = [Answer() for _ in asks]
    with running(backend) as engine:
        for ask, answer in zip(asks, answers, strict=True):
            engine.submit(ask, answer)
        for answer in answers:
            answer.wait()
    return answers, widths


def prompts(scorer: LlamaBackend) -> list[tuple[int, ...]]:
    texts = ["Hello", "The quick brown fox " * 20, "One two three", "Wer reitet so spät " * 5, "x", "def main():\n    "]
    return [tuple(scorer.tokenize(f"<s>{text}", special=True)) for text in texts]


def test_greedy_answers_of_a_mixed_batch_stand_up_alone(scorer: LlamaBackend, tiny_model: Path) -> None:
    asks = [Ask(prompt, GREEDY, max_tokens=60, ignore_eos=True) for prompt in prompts(scorer)]
    answers, widths = answers_to(tiny_model, asks)
    assert max(widths) == 4
    for ask, answer in zip(asks, answers, strict=True):
        ids = answer.ids
        assert len(ids) >= 50
        rows = rescored(scorer, ask.prompt, ids)
        assert is_credible(rows, ids)
        assert not is_credible(rows, ids[1:] + ids[:1]), "an answer with its tokens moved must not pass"


def test_seeded_answers_of_a_mixed_batch_are_redraws_or_close(scorer: LlamaBackend, tiny_model: Path) -> None:
    asks = [Ask(prompt, Sampling(0.8, 40, 0.95, seed=9), max_tokens=40, ignore_eos=True) for prompt in prompts(scorer)]
    answers, _ = answers_to(tiny_model, asks)
    for ask, answer in zip(asks, answers, strict=True):
        rows = rescored(scorer, ask.prompt, answer.ids)
        assert is_credible_draw(rows, answer.ids, ask.sampling)


def test_many_sequences_share_steps(tiny_model: Path, scorer: LlamaBackend) -> None:
    asks = [Ask(prompts(scorer)[0], GREEDY, max_tokens=30, ignore_eos=True)] * 8
    _, widths = answers_to(tiny_model, asks, slots=8)
    assert widths.count(8) >= 25
    assert len(widths) <= 40


def test_rows_of_logits_belong_to_their_sequences(scorer: LlamaBackend, tiny_model: Path) -> None:
    backend = llama.load(LlamaOptions(tiny_model, threads=1, slots=3, n_ctx=512))
    first, second, third = prompts(scorer)[:3]
    chunks = [Chunk(0, 0, first, 1), Chunk(1, 0, second, 0), Chunk(2, 0, third, 1)]
    assert backend.decode(chunks) == OK
    rows = backend.logits().copy()
    backend.close()
    assert rows.shape == (2, backend.info.n_vocab)
    for row, prompt in zip(rows, (first, third), strict=True):
        assert np.abs(row - rescored(scorer, prompt, (1,))[0]).max() < 0.5


def test_forgetting_sharing_and_length_agree(scorer: LlamaBackend, tiny_model: Path) -> None:
    backend = llama.load(LlamaOptions(tiny_model, threads=1, slots=2, n_ctx=512))
    prompt = prompts(scorer)[1]
    assert backend.decode([Chunk(0, 0, prompt, 1)]) == OK
    expected = backend.logits()[0].copy()
    backend.seq_copy(0, 1, len(prompt) - 1)
    assert (backend.seq_length(0), backend.seq_length(1)) == (len(prompt), len(prompt) - 1)
    assert backend.decode([Chunk(1, len(prompt) - 1, prompt[-1:], 1)]) == OK
    assert np.abs(backend.logits()[0] - expected).max() < 0.5
    assert backend.seq_remove(0, 5)
    assert backend.seq_remove(1)
    assert (backend.seq_length(0), backend.seq_length(1)) == (5, 0)
    backend.close()


def test_a_batch_that_cannot_be_is_refused_without_harm(scorer: LlamaBackend) -> None:
    assert scorer.decode([Chunk(0, 0, [1] * (scorer.room.n_batch + 1), 1)]) == BAD_BATCH
    assert scorer.decode([Chunk(0, 0, [10**6], 1)]) == BAD_BATCH
    assert scorer.decode([Chunk(scorer.room.sequences, 0, [1], 1)]) == BAD_BATCH
    assert scorer.seq_length(0) == 0


def test_text_becomes_tokens_and_back(scorer: LlamaBackend) -> None:
    text = " Grüße, 世界! 😀"
    ids = scorer.tokenize(text, special=False)
    assert b"".join(scorer.pieces[id] for id in ids).decode().strip() == text.strip()
    plain, special = scorer.tokenize("<|user|>", special=False), scorer.tokenize("<|user|>", special=True)
    assert len(plain) > len(special) == 1
    assert scorer.pieces[special[0]] == b""
    assert scorer.tokenize("", special=True) == []


def test_an_end_token_ends_an_answer(scorer: LlamaBackend, tiny_model: Path) -> None:
    backend = llama.load(LlamaOptions(tiny_model, threads=1, slots=1, n_ctx=512))
    prompt = prompts(scorer)[0]
    assert backend.decode([Chunk(0, 0, prompt, 1)]) == OK
    best = int(backend.logits()[0].argmax())
    backend.seq_remove(0)
    backend.end_tokens = frozenset({best})
    answer = Answer()
    with running(backend) as engine:
        engine.submit(Ask(prompt, GREEDY), answer)
        assert (answer.done.finish, answer.text) == (Finish.STOP, "")


def test_the_file_speaks_for_itself(tiny_model: Path, scorer: LlamaBackend) -> None:
    looked_at = llama.inspect(tiny_model)
    assert looked_at == scorer.info
    assert (looked_at.architecture, looked_at.n_vocab, looked_at.n_ctx_train) == ("llama", 32064, 2048)
    assert (looked_at.bos, looked_at.cell_bytes) == ("<s>", 2 * 2 * 2 * 2 * 16)
    assert "<|assistant|>" in looked_at.chat_template


def test_progress_rises_to_one_and_can_end_a_load(tiny_model: Path) -> None:
    seen: list[float] = []
    llama.load(LlamaOptions(tiny_model), seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0

    def enough(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llama.load(LlamaOptions(tiny_model), enough)


def broken(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    return path


def test_a_file_that_is_no_gguf_is_named_with_what_is_wrong(tmp_path: Path, tiny_model: Path) -> None:
    whole = tiny_model.read_bytes()
    cases = {
        b"": "begins with b''",
        b"<html>not found</html>....": "begins with b'<htm'",
        whole[:20]: "is cut off: 20 bytes",
        b"GGUF" + (9).to_bytes(4, "little") + bytes(16): "version 9",
        b"GGUF" + (3).to_bytes(4, "big") + bytes(16): "big-endian",
        whole[: len(whole) // 2]: "corrupted or incomplete",
        whole[:5000]: "broken.gguf: ",
    }
    for data, complaint in cases.items():
        path = broken(tmp_path, data)
        for attempt in (llama.inspect, lambda path: llama.load(LlamaOptions(path))):
            with pytest.raises(ModelLoadError) as refusal:
                attempt(path)
            assert str(path) in str(refusal.value)
            assert complaint in str(refusal.value)
    with pytest.raises(ModelLoadError, match="No such file"):
        llama.inspect(tmp_path / "missing.gguf")


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"n_ctx": 4096}, "trained for 2048"),
        ({"slots": 300}, "256 sequences at most"),
        ({"slots": 64, "n_batch": 32}, "n_batch .* must be at least slots"),
        ({"kv_cells": 100}, "kv_cells .* must be at least n_ctx"),
        ({"devices": ("GPU-none",)}, "no GPU 'GPU-none' here; known GPUs: "),
    ],
)
def test_a_size_or_device_that_cannot_be_is_refused(tiny_model: Path, options: dict, complaint: str) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        llama.load(LlamaOptions(tiny_model, **options))


def test_a_gpu_is_known_by_its_uuid_whatever_its_number(tmp_path: Path) -> None:
    card = tmp_path / "0000:c1:00.0"
    card.mkdir()
    (card / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 99\nGPU UUID: \t GPU-5af1-77\n")
    assert llama.nvidia_uuid("0000:C1:00.0", tmp_path) == "GPU-5af1-77"
    assert llama.nvidia_uuid("0000:c2:00.0", tmp_path) == ""
    assert llama.nvidia_uuid("", tmp_path) == ""


def test_the_host_shows_its_cpu_as_a_device() -> None:
    assert any(device.backend == "CPU" and device.memory_total_bytes > 0 for device in llama.devices())


def test_random_arrivals_and_cancels_leave_every_cell_free(tiny_model: Path) -> None:
    dice = np.random.default_rng(5)
    backend = llama.load(LlamaOptions(tiny_model, threads=1, slots=4, n_ctx=256, kv_cells=512, n_batch=48))
    fatal: list[FatalEngineError] = []
    with running(backend, Limits(queue_limit=100), on_fatal=fatal.append) as engine:
        answers = []
        for number in range(60):
            prompt = tuple(dice.integers(3, 30000, int(dice.integers(1, 200))).tolist())
            answers.append(Answer())
            id = engine.submit(Ask(prompt, Sampling(seed=number), max_tokens=int(dice.integers(1, 40))), answers[-1])
            if number % 4 == 0:
                engine.cancel(id)
        for answer in answers:
            assert answer.done.finish in Finish
        until(lambda: engine.stats().load.running == 0 and engine.stats().step_deadline is None)
        last = Answer()
        engine.submit(Ask((1, 2, 3), GREEDY, max_tokens=2), last)
        assert last.done.usage.completion_tokens == 2
        until(lambda: engine.stats().load.running == 0)
        steps = engine.stats().heartbeat
        until(lambda: engine.stats().heartbeat > steps)  # an idle tick, which compares the account with llama.cpp's
    assert fatal == []
    assert engine.stats().timings.failed == 0
