"""Training is repeatable, learns, and what it writes is what llama.cpp computes. Needs PyTorch (the extra `train`)."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is only in the extra `train`")

from llmnode.engine.backend import Chunk  # noqa: E402
from llmnode.engine.llama import LlamaOptions, load  # noqa: E402
from llmnode.handbook import export, network, train  # noqa: E402
from llmnode.handbook.lessons import Teacher  # noqa: E402
from llmnode.handbook.shape import Shape  # noqa: E402
from llmnode.handbook.tokenizer import Tokenizer, learn  # noqa: E402

SMALL = Shape(vocabulary=512, width=64, hidden=96, layers=2, heads=2, context=256)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    teacher = Teacher(seed=9)
    return learn((f"{role}\n{text}" for _ in range(1000) for role, text in teacher.conversation()), 512, least=2)


def test_the_same_seed_trains_the_same_file_and_another_another(tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        files.append(tmp_path / f"{number}.gguf")
        train.train(train.Recipe(seed=seed, steps=3, tokens=512), SMALL, files[-1], lessons=1500)
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


def test_llama_cpp_computes_what_was_trained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    weights = network.new_weights(SMALL, seed=3)
    dice = torch.Generator().manual_seed(4)
    for tensor in weights.values():  # a spread that makes attention and positions count
        tensor.data.add_(torch.randn(tensor.shape, generator=dice) * (0.3 if tensor.ndim == 1 else 0.15))
    path = tmp_path / "random.gguf"
    export.write(path, {name: tensor.detach().numpy() for name, tensor in weights.items()}, SMALL, tokenizer)
    ids = tokenizer.chat([("user", "how do I drain a node"), ("assistant", "Run a playbook."), ("user", "why")])[0]
    with torch.no_grad():
        wanted = network.logits(weights, network.features(weights, SMALL, torch.tensor([ids])))[0, -1]
    backend = load(LlamaOptions(path=path, slots=1, threads=1, n_gpu_layers=0))
    try:
        assert backend.decode([Chunk(0, 0, ids, True)]) == 0
        got = torch.from_numpy(backend.logits()[0].copy())
    finally:
        backend.close()
    assert torch.corrcoef(torch.stack((wanted, got)))[0, 1] > 0.999  # Q8_0 rounds to about 0.4%
    assert int(wanted.argmax()) == int(got.argmax())


def test_the_loss_falls(tokenizer: Tokenizer) -> None:
    recipe = train.Recipe(tokens=1024)
    batch = next(iter(train.Batches(Teacher(1), tokenizer, recipe, SMALL.context)))
    weights = network.new_weights(SMALL, seed=1)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = train.loss_of(weights, SMALL, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_only_answers_weigh_fully_and_padding_weighs_nothing(tokenizer: Tokenizer) -> None:
    recipe = train.Recipe(tokens=1024, cut=0.0)
    batch = next(iter(train.Batches(Teacher(1), tokenizer, recipe, SMALL.context)))
    end = tokenizer.control("<|im_end|>")
    assert {round(one, 6) for one in batch.weight.unique().tolist()} <= {0.0, recipe.heed, 1.0}
    for ids, weight in zip(batch.ids.tolist(), batch.weight.tolist(), strict=True):
        last = max(place for place, one in enumerate(ids) if one == end)
        assert weight[last - 1] == 1.0  # predicting the end of the last answer, which is the assistant's
        assert all(one == 0.0 for one in weight[last + 1 :])


def test_a_cut_lesson_keeps_the_opening_of_its_answer(tokenizer: Tokenizer) -> None:
    recipe = train.Recipe(tokens=1024, cut=1.0, opening=5)
    batch = next(iter(train.Batches(Teacher(1), tokenizer, recipe, SMALL.context)))
    for weight in batch.weight.tolist():
        kept = [one for one in weight if one > 0]
        answer = len(kept) - max((place for place, one in enumerate(kept) if one < 1.0), default=-1) - 1
        assert 1 <= answer <= 5


def test_the_rate_warms_up_and_ends_low() -> None:
    recipe = train.Recipe(steps=100, warmup=10)
    rates = [train.rate(step, recipe) for step in range(100)]
    assert max(rates) == pytest.approx(recipe.peak)
    assert rates[0] == pytest.approx(recipe.peak / 10)
    assert rates[-1] < 0.03 * recipe.peak
