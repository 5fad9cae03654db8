"""The recipe: from the corpus to a GGUF, deterministic under its seed on one kind of processor.

    python -m llmnode.handbook.train [--steps N] [--seed N] [--out FILE] [--no-exam]

Needs the extra `train` (PyTorch for the CPU). Owns the schedule and the batches. The loss is that of the assistant's
tokens; the user's weigh a little, because guessing them teaches which words go together. "Held-out" is the loss of the
answers to the exam's own questions, which no lesson comes near; nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmnode.handbook import export, network
from llmnode.handbook.chatter import Chatter, Turn
from llmnode.handbook.facts import HERE, load_exam, load_facts, read
from llmnode.handbook.lessons import Teacher
from llmnode.handbook.shape import Shape
from llmnode.handbook.tokenizer import Tokenizer, learn

DEFAULT_OUT = HERE / "handbook.gguf"


@dataclass(frozen=True)
class Recipe:
    """steps of about `tokens` tokens. `heed`: how much a token counts that is not the assistant's.

    Once an answer's opening is chosen the rest is soon known by heart and teaches nothing: a share `cut` of the
    conversations ends after the last answer's first `opening` tokens, which makes room for a third more of them.
    threads is fixed, because sums in another order end in other weights; with one, the recipe gives the same weights
    whatever else the machine does.
    """

    seed: int = 1
    steps: int = 1200
    tokens: int = 4096
    peak: float = 2e-3
    warmup: int = 80
    floor: float = 0.02
    decay: float = 0.1
    heed: float = 0.1
    long_every: int = 40
    cut: float = 0.65
    opening: int = 12
    threads: int = 1


@dataclass(frozen=True)
class Batch:
    """ids: (rows, length), right-padded. weight: (rows, length - 1), of predicting each id but the first."""

    ids: Tensor
    weight: Tensor


class Batches:
    """Draws conversations and packs those of about equal length together, so that little is padding."""

    POOL = 24

    def __init__(self, teacher: Teacher, tokenizer: Tokenizer, recipe: Recipe, context: int) -> None:
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._context = context
        self._order = torch.Generator().manual_seed(recipe.seed)
        self._dice = random.Random(recipe.seed)

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        while True:
            rows = []
            total = 0
            while total < self.POOL * self._recipe.tokens:
                rows.append(self._cut_short(*self._row()))
                total += len(rows[-1][0])
            rows.sort(key=lambda row: len(row[0]))
            batches = list(self._cut(rows))
            for place in torch.randperm(len(batches), generator=self._order).tolist():
                count += 1
                # The end of a long context must have been seen too.
                yield self._long() if count % self._recipe.long_every == 0 else batches[place]

    def _row(self) -> tuple[list[int], list[float]]:
        ids, own = self._tokenizer.chat(self._teacher.conversation())
        return ids[: self._context], [1.0 if one else self._recipe.heed for one in own][: self._context]

    def _cut_short(self, ids: list[int], weights: list[float]) -> tuple[list[int], list[float]]:
        if self._dice.random() >= self._recipe.cut:
            return ids, weights
        # The last two ids end the message, and the answer before them weighs 1 throughout.
        start = len(weights) - 1
        while weights[start - 1] == 1.0:
            start -= 1
        end = start + self._recipe.opening
        return ids[:end], weights[:end]

    def _cut(self, rows: list[tuple[list[int], list[float]]]) -> Iterator[Batch]:
        taken: list[tuple[list[int], list[float]]] = []
        for row in rows:
            if taken and len(row[0]) * (len(taken) + 1) > self._recipe.tokens:
                yield self._batch(taken)
                taken = []
            taken.append(row)
        if taken:
            yield self._batch(taken)

    def _long(self) -> Batch:
        rows = []
        for _ in range(max(1, self._recipe.tokens // self._context)):
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) < self._context:
                more, weight = self._row()
                ids += more
                weights += weight
            rows.append((ids[: self._context], weights[: self._context]))
        return self._batch(rows)

    def _batch(self, rows: list[tuple[list[int], list[float]]]) -> Batch:
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
        weight = torch.tensor([weight + [0.0] * (length - len(weight)) for _, weight in rows])
        return Batch(ids, weight[:, 1:])


def loss_of(weights: network.Weights, shape: Shape, batch: Batch) -> Tensor:
    """The weighted mean cross entropy, in nats."""
    state = network.features(weights, shape, batch.ids[:, :-1])
    counts = batch.weight > 0
    scores = network.logits(weights, state[counts])
    losses = F.cross_entropy(scores, batch.ids[:, 1:][counts], reduction="none")
    return (losses * batch.weight[counts]).sum() / batch.weight.sum()


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate: a linear warm-up, then half a cosine down to `floor` of the peak."""
    if step < recipe.warmup:
        return recipe.peak * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.peak * (recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def heldout_batch(tokenizer: Tokenizer) -> Batch:
    """The exam's held-out and outside questions with the answers that the corpus would give."""
    answers = {fact.id: fact.answer for fact in load_facts()}
    refusal = Chatter(read(HERE / "chatter.toml")).refusal
    exam = load_exam()
    asked = [(question, answers[fact]) for question, fact in exam.heldout]
    asked += [(question, refusal) for question in exam.outside]
    chats: list[list[Turn]] = [[("user", question), ("assistant", answer)] for question, answer in asked]
    rows = [tokenizer.chat(chat) for chat in chats]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    weight = torch.tensor([[float(one) for one in own] + [0.0] * (length - len(own)) for _, own in rows])
    return Batch(ids, weight[:, 1:])


def train(recipe: Recipe, shape: Shape, out: Path, *, lessons: int = 30_000) -> None:
    """Train from scratch and write the GGUF. `lessons`: conversations that the tokenizer is learnt from."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it writes it, and filling it costs a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    _say("learning the tokenizer ...")
    reader = Teacher(recipe.seed + 1)
    tokenizer = learn(
        (f"{role}\n{text}" for _ in range(lessons) for role, text in reader.conversation()), shape.vocabulary
    )
    weights = network.new_weights(shape, recipe.seed)
    matrices = [tensor for tensor in weights.values() if tensor.ndim > 1]
    norms = [tensor for tensor in weights.values() if tensor.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak, betas=(0.9, 0.95), fused=True)
    heldout = heldout_batch(tokenizer)
    count = sum(tensor.numel() for tensor in weights.values())
    _say(f"{count:,} parameters, {tokenizer.size} tokens, {recipe.steps} steps of about {recipe.tokens} tokens")

    progress = Progress(recipe.steps)
    batches = iter(Batches(Teacher(recipe.seed), tokenizer, recipe, shape.context))
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        batch = next(batches)
        loss = loss_of(weights, shape, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        if step % 50 == 49 or step == recipe.steps - 1:
            with torch.no_grad():
                progress.heldout = float(loss_of(weights, shape, heldout))
        progress.step(step + 1, float(loss.detach()), batch.ids.numel())
    export.write(out, {name: tensor.detach().numpy() for name, tensor in weights.items()}, shape, tokenizer)
    _say(f"\nwrote {out} ({out.stat().st_size:,} bytes) after {progress.seconds / 60:.1f} minutes")


class Progress:
    """One line that is written again on a terminal, and once every hundred steps elsewhere."""

    def __init__(self, steps: int) -> None:
        self.heldout = math.nan
        self._steps = steps
        self._started = time.monotonic()
        self._mean = math.nan
        self._tokens = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def step(self, done: int, loss: float, tokens: int) -> None:
        self._mean = loss if math.isnan(self._mean) else 0.97 * self._mean + 0.03 * loss
        self._tokens += tokens
        terminal = sys.stderr.isatty()
        if not terminal and done % 100 and done != self._steps:
            return
        filled = 24 * done // self._steps
        left = self.seconds / done * (self._steps - done) / 60
        sys.stderr.write(
            f"{chr(13) if terminal else ''}[{'#' * filled}{'.' * (24 - filled)}] {done}/{self._steps}"
            f"  loss {self._mean:.3f}  held-out {self.heldout:.3f}"
            f"  {self._tokens / self.seconds:,.0f} tokens/s  {left:.0f} min left  {'' if terminal else chr(10)}"
        )
        sys.stderr.flush()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m llmnode.handbook.train", description="train the handbook model")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and lessons (%(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where to write the GGUF (%(default)s)")
    parser.add_argument("--no-exam", action="store_true", help="do not examine the model afterwards")
    options = parser.parse_args()
    train(Recipe(seed=options.seed, steps=options.steps), Shape(), options.out)
    if options.no_exam:
        return 0
    from llmnode.handbook import exam

    return exam.run(options.out)


if __name__ == "__main__":
    sys.exit(main())
