"""What prompt lookup gains on edits: our engine beside itself, over a model that is made to say a committed answer.

A model of random weights cannot edit. So the traces say what a trained one would answer (traces/*.txt: a document and
its edited version), and `Scripted` raises the logit of the trace's next token above all others in each row that was
computed. Everything else is real: the batches, their cost, the guesses that turn out wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmnode.engine import llama
from llmnode.engine.backend import Chunk
from llmnode.engine.loop import Engine, Limits
from llmnode.engine.types import Ask, Done, Event, Failed, Sampling, Text
from tests.bench.figures import TOKENS_PER_S, Figures
from tests.bench.servers import Room

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRACES = sorted((Path(__file__).parent / "traces").glob("*.txt"))
_CERTAIN = 1e4
_PATIENCE_S = 600.0


class Scripted:
    """A backend whose next answer is known: rows at and after the prompt's end favour the script's tokens.

    For one answer at a time. Knows of each row which position it belongs to, from the chunks.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._rows: list[int] = []
        self.prompt = 0
        self.answer: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def say(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """What the next ask's answer shall be."""
        self.prompt, self.answer = len(prompt), tuple(answer)

    def decode(self, chunks: Sequence[Chunk]) -> int:
        self._rows = [
            chunk.start + len(chunk.tokens) - chunk.rows + row for chunk in chunks for row in range(chunk.rows)
        ]
        return int(self._backend.decode(chunks))

    def logits(self) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._backend.logits()
        for row, position in enumerate(self._rows):
            said = position + 1 - self.prompt  # the row at a position tells the token after it
            if 0 <= said < len(self.answer):
                logits[row, self.answer[said]] = _CERTAIN
        return logits


@contextmanager
def sides(model: Path, room: Room, threads: int) -> Iterator[Callable[[bool, int], Figures]]:
    """Load two engines, with lookup and without. Yields (with lookup, seed) -> figures of all traces in turn."""
    options = llama.LlamaOptions(model, slots=room.slots, n_ctx=room.n_ctx, kv_cells=room.all_cells, threads=threads)
    with ExitStack() as stack:
        engines: dict[bool, tuple[Engine, Scripted]] = {}
        for on in (True, False):
            backend = Scripted(llama.load(options))
            engine = Engine(backend, Limits(prompt_lookup=on))
            engine.start()
            stack.callback(engine.stop)
            engines[on] = engine, backend

        def ask(on: bool, seed: int) -> Figures:
            return _edit(*engines[on], seed)

        for on in engines:
            ask(on, 0)
        yield ask


def _edit(engine: Engine, backend: Scripted, seed: int) -> Figures:
    tokens, took, steps = 0, 0.0, engine.stats().timings.steps
    for trace in TRACES:
        head, _, answer_text = trace.read_text().partition("--- answer ---\n")
        document = head.removeprefix("--- prompt ---\n")
        # Each pair begins with another line, so that no prompt is in the cache.
        prompt = backend.tokenize(f"{seed} is the number of this request.\n{document}", special=False)
        answer = backend.tokenize(answer_text, special=False)
        backend.say(prompt, answer)
        said, seconds = _answer(engine, Ask(tuple(prompt), Sampling(temperature=0), len(answer), ignore_eos=True))
        if said != tuple(answer):
            raise RuntimeError(f"the engine did not say {trace.name}: {len(said)} tokens of {len(answer)}")
        tokens, took = tokens + len(answer), took + seconds
    return {TOKENS_PER_S: tokens / took, "answer tokens": tokens, "steps": engine.stats().timings.steps - steps}


def _answer(engine: Engine, ask: Ask) -> tuple[tuple[int, ...], float]:
    """The ids of an answer, and the seconds from asking to its end, prefill included."""
    ids: list[int] = []
    ended = threading.Event()
    last: list[Event] = []

    def sink(event: Event) -> None:
        if isinstance(event, Text):
            ids.extend(event.ids)
        else:
            last.append(event)
            ended.set()

    began = time.perf_counter()
    engine.submit(ask, sink)
    if not ended.wait(_PATIENCE_S):
        raise RuntimeError(f"no answer within {_PATIENCE_S:g} s")
    took = time.perf_counter() - began
    if isinstance(last[0], Failed):
        raise RuntimeError(f"the engine failed: {last[0].error.message}")
    assert isinstance(last[0], Done)
    return tuple(ids), took
