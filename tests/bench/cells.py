"""What cells that are in the way cost: `python -m tests.bench.cells`.

Eight sequences decode side by side, then with 8,192 cells of others in the cache, after these are gone, and after the
eight were saved and loaded again, which brings them down into the holes. Prints a table of milliseconds a step. No
rival: it is one engine beside itself, to show what `_compact` and `_clear_the_way` of llmnode/engine/memory.py are for.
"""

from __future__ import annotations

import argparse
import statistics
import time

from llmnode.engine import llama
from llmnode.engine.backend import OK, Chunk
from llmnode.engine.llama import LlamaBackend, LlamaOptions
from tests import tiny_model

STREAMS, OTHERS = range(8), (8, 9)
IN_THE_WAY, STEPS = 4096, 21


class Streams:
    """Sequences of one backend, and how far each is."""

    def __init__(self, backend: LlamaBackend) -> None:
        self._backend = backend
        self._length = dict.fromkeys((*STREAMS, *OTHERS), 0)

    def step(self, seqs: range | tuple[int, ...], tokens: int = 1) -> float:
        """Compute so many tokens more of each; returns the seconds it took."""
        chunks = [Chunk(seq, self._length[seq], [7] * tokens, 1) for seq in seqs]
        began = time.perf_counter()
        assert self._backend.decode(chunks) == OK
        took = time.perf_counter() - began
        for seq in seqs:
            self._length[seq] += tokens
        return took

    def forget(self, seq: int) -> None:
        self._backend.seq_remove(seq)
        self._length[seq] = 0

    def reload(self) -> None:
        saved = [self._backend.seq_save(seq) for seq in STREAMS]
        for seq in STREAMS:
            self._backend.seq_remove(seq)
        for seq, state in zip(STREAMS, saved, strict=True):
            assert self._backend.seq_load(seq, state)

    def measure(self) -> float:
        """Milliseconds of a step of the eight, median of STEPS."""
        return 1000 * statistics.median(self.step(STREAMS) for _ in range(STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(description="what cells in the way cost")
    parser.add_argument("--size", choices=sorted(tiny_model.SHAPES), default="15m")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    backend = llama.load(
        LlamaOptions(tiny_model.make(options.size), slots=10, n_ctx=8192, kv_cells=16384, threads=options.threads)
    )
    streams = Streams(backend)
    streams.step(STREAMS, 32)
    for _ in range(60):
        streams.step(STREAMS)
    rows = {"alone": streams.measure()}
    for seq in OTHERS:
        for _ in range(IN_THE_WAY // 512):
            streams.step((seq,), 512)
    rows["8,192 cells of others below their next ones"] = streams.measure()
    for seq in OTHERS:
        streams.forget(seq)
    rows["these are gone, their own lie above"] = streams.measure()
    streams.reload()
    rows["moved down"] = streams.measure()
    print("| 8 sequences of about 100 tokens | ms a step | |\n|---|---|---|")
    for name, took in rows.items():
        print(f"| {name} | {took:.1f} | {took / rows['alone']:.2f}x |")
    backend.close()


if __name__ == "__main__":
    main()
