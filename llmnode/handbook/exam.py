"""The exam: asks a GGUF through llmnode's own engine, greedy, and prints how it did.

    python -m llmnode.handbook.exam [GGUF] [--wrong]      exit code 0 when every bar is met, 1 when one is missed

Owns the questions' order and the bars; grade.py owns what is right. One request at a time on one thread, so that the
answers do not depend on what else shares a batch.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmnode.chat.template import ChatTemplate
from llmnode.engine.backend import ModelLoadError
from llmnode.engine.llama import LlamaOptions, load
from llmnode.engine.loop import Engine, Limits
from llmnode.engine.types import Ask, Done, Event, Failed, Finish, Sampling, Text
from llmnode.handbook.chatter import Turn
from llmnode.handbook.facts import HERE, Exam, Fact, load_exam, load_facts
from llmnode.handbook.grade import admits_ignorance, is_right

DEFAULT_MODEL = HERE / "handbook.gguf"
MOST_TOKENS = 200
"""More than any answer of the corpus takes. An answer that gets this long has not ended by itself."""
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Answer:
    """text: what was said.        ended: whether it ended by itself.        tokens, seconds: of the answer alone."""

    text: str
    ended: bool
    tokens: int
    seconds: float
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Part:
    """One row of the table. `bar` is the least share of right answers, 0 to 1."""

    name: str
    right: int
    asked: int
    bar: float

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def passed(self) -> bool:
        return self.share >= self.bar


@dataclass(frozen=True)
class Result:
    """wrong: (part, question, answer) of each wrong or unended answer.        speed: tokens per second on one core."""

    parts: tuple[Part, ...]
    wrong: tuple[tuple[str, str, str], ...]
    speed: float

    @property
    def passed(self) -> bool:
        return all(part.passed for part in self.parts)

    def table(self) -> str:
        rows = [f"{'part':<36} {'right':>9} {'share':>7} {'bar':>6}"]
        for part in self.parts:
            count = f"{part.right}/{part.asked}"
            verdict = "" if part.passed else "  MISSED"
            rows.append(f"{part.name:<36} {count:>9} {part.share:>7.1%} {part.bar:>6.0%}{verdict}")
        return "\n".join([*rows, f"speed on one core: {self.speed:,.0f} tokens/s"])


class Examinee:
    """A model behind an engine, asked one question after another."""

    def __init__(self, model: Path) -> None:
        backend = load(LlamaOptions(path=model, slots=1, threads=1, n_gpu_layers=0))
        info = backend.info
        self._template = ChatTemplate(info.chat_template, bos=info.bos, eos=info.eos)
        self._tokenize = backend.tokenize
        self._engine = Engine(backend, Limits())
        self._engine.start()

    def answer(self, question: str) -> Answer:
        """Put a question and wait for the whole answer. Raises the engine's error when it fails."""
        return self.go_on([("user", question)])

    def go_on(self, turns: Sequence[Turn]) -> Answer:
        """The answer to a conversation so far."""
        messages = [{"role": role, "content": text} for role, text in turns]
        prompt = self._tokenize(self._template.render(messages), special=True)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._engine.submit(Ask(tuple(prompt), Sampling(temperature=0), MOST_TOKENS), events.put)
        said: list[str] = []
        while True:
            event = events.get(timeout=PATIENCE_S)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Text):
                said.append(event.text)
            if isinstance(event, Done):
                ended = event.finish is Finish.STOP
                tokens = event.usage.completion_tokens
                return Answer("".join(said), ended, tokens, event.decode_s, len(prompt))

    def close(self) -> None:
        self._engine.stop()


def examine(
    ask: Callable[[str], Answer], facts: Sequence[Fact], exam: Exam, show: Callable[[int, int], None]
) -> Result:
    """Ask everything. `show` is called with (asked so far, of how many)."""
    by_id = {fact.id: fact for fact in facts}
    handbook = [(fact.question, fact) for fact in facts]
    heldout = [(question, by_id[fact]) for question, fact in exam.heldout]
    total = len(handbook) + len(heldout) + len(exam.outside)
    answers: list[Answer] = []
    wrong: list[tuple[str, str, str]] = []

    def right(part: str, question: str, judge: Callable[[str], bool]) -> bool:
        answer = ask(question)
        answers.append(answer)
        show(len(answers), total)
        good = judge(answer.text)
        if not good or not answer.ended:
            wrong.append((part, question, answer.text))
        return good

    parts = []
    for name, asked, bar in (("handbook questions", handbook, 0.95), ("held-out rephrasings", heldout, 0.60)):
        count = sum(
            right(name, question, lambda text, fact=fact: is_right(text, fact.must))  # type: ignore[misc]
            for question, fact in asked
        )
        parts.append(Part(name, count, len(asked), bar))
    count = sum(right("outside questions", question, admits_ignorance) for question in exam.outside)
    parts.append(Part("outside questions: says it only knows llmrack", count, len(exam.outside), 0.80))
    parts.append(Part("answers that end by themselves", sum(one.ended for one in answers), total, 1.0))
    seconds = sum(one.seconds for one in answers)
    speed = sum(one.tokens for one in answers) / seconds if seconds else 0.0
    return Result(tuple(parts), tuple(wrong), speed)


def run(model: Path, *, show_wrong: bool = False) -> int:
    """Examine the model, print the table, return the exit code."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\rquestion {done}/{total} " + ("\n" if done == total else ""))

    try:
        examinee = Examinee(model)
    except ModelLoadError as error:
        print(f"handbook exam: {error}", file=sys.stderr)
        return 1
    try:
        result = examine(examinee.answer, load_facts(), load_exam(), show)
    finally:
        examinee.close()
    if show_wrong:
        for part, question, text in result.wrong:
            print(f"{part}\n  Q: {question}\n  A: {text}")
    print(result.table())
    return 0 if result.passed else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m llmnode.handbook.exam", description="examine the handbook model")
    parser.add_argument("model", nargs="?", type=Path, default=DEFAULT_MODEL, help="the GGUF (%(default)s)")
    parser.add_argument("--wrong", action="store_true", help="print the answers that were not right")
    options = parser.parse_args()
    return run(options.model, show_wrong=options.wrong)


if __name__ == "__main__":
    sys.exit(main())
