"""Makes small GGUFs of random weights with a real tokenizer's vocabulary, for tests and benchmarks.

The vocabulary is that of Phi-3 (32,064 tokens, with chat tokens), taken from the pinned llama-cpp-python source
archive; the weights come from a seeded generator, so the same call always makes the same file. What such a model says
is gibberish, but its logits have the spread of a trained one (standard deviation about 2.5), so that arg max and
sampling mean something. Files are made once and kept in the cache, named by a digest of this recipe.

Sizes tiny, 15m and 500m are Llamas; the others are tiny models of other kinds, by tests/tiny_kinds.py.

    python -m tests.tiny_model [--size tiny|15m|500m|...] [--out FILE]     prints the file's path
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WHEELHOUSE = ROOT / "roles" / "llmrack_artifacts" / "files" / "wheelhouse.py"
VOCABULARIES = "vendor/llama.cpp/models/ggml-vocab-{}.gguf"
SEED = 20

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama-architecture model."""

    embedding: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    context: int


SHAPES = {
    "tiny": Shape(64, 176, 2, 4, 2, 2048),
    "15m": Shape(288, 768, 6, 6, 6, 32768),
    "500m": Shape(1152, 3840, 24, 16, 8, 32768),
}


def make(size: str = "tiny", out: Path | None = None) -> Path:
    """Return the path of the model of that size, making it first when it is not there yet."""
    if size not in SHAPES:
        from tests import tiny_kinds

        return tiny_kinds.make(size, out)
    return made(f"random-{size}", out, [Path(__file__)], lambda part: _write(part, SHAPES[size], size))


def made(name: str, out: Path | None, recipe: list[Path], write: Callable[[Path], None]) -> Path:
    """The path of a model, written first where it is not there yet. The recipe's files are part of its name."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in recipe)).hexdigest()[:12]
    path = out or cache() / "models" / f"{name}-{digest}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        write(part)
        part.replace(path)
    return path


def cache() -> Path:
    """Where what takes long to make is kept between checkouts."""
    return Path(os.environ.get("LLMRACK_CACHE") or Path.home() / ".cache" / "llmrack")


def vocabulary(name: str = "phi-3") -> Path:
    """A GGUF that holds a real tokenizer and nothing else, from the pinned source archive."""
    wanted = VOCABULARIES.format(name)
    path = cache() / "models" / Path(wanted).name
    if not path.exists():
        sdist = subprocess.run(
            [sys.executable, str(WHEELHOUSE), "sdist"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(sdist) as archive:
            member = next(m for m in archive if m.name.endswith(wanted))
            source = archive.extractfile(member)
            assert source is not None
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_bytes(source.read())
            part.replace(path)
    return path


def _write(path: Path, shape: Shape, size: str) -> None:
    reader = gguf.GGUFReader(vocabulary())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {size}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embedding)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.embedding // shape.heads)
    tokens = copy_tokenizer(reader, writer)
    writer.add_vocab_size(tokens)
    writer.add_chat_template(TEMPLATE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    dice = np.random.default_rng(SEED)
    width, hidden = shape.embedding, shape.feed_forward
    kv_width = width // shape.heads * shape.kv_heads

    def matrix(name: str, rows: int, columns: int, spread: float) -> None:
        weights = dice.standard_normal((rows, columns), dtype=np.float32) * np.float32(spread)
        kind = gguf.GGMLQuantizationType.Q8_0 if columns % 32 == 0 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weights, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    matrix("token_embd.weight", tokens, width, 1.0)
    # The final norm leaves vectors of length sqrt(width), so this spread gives logits of standard deviation 2.5.
    matrix("output.weight", tokens, width, 2.5 / width**0.5)
    ones("output_norm.weight")
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        ones(block + "attn_norm.weight")
        matrix(block + "attn_q.weight", width, width, width**-0.5)
        matrix(block + "attn_k.weight", kv_width, width, width**-0.5)
        matrix(block + "attn_v.weight", kv_width, width, width**-0.5)
        matrix(block + "attn_output.weight", width, width, width**-0.5)
        ones(block + "ffn_norm.weight")
        matrix(block + "ffn_gate.weight", hidden, width, width**-0.5)
        matrix(block + "ffn_up.weight", hidden, width, width**-0.5)
        matrix(block + "ffn_down.weight", width, hidden, hidden**-0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_tokenizer(reader: Any, writer: Any) -> int:
    """Copy every `tokenizer.*` key; return the number of tokens."""
    count = 0
    for field in reader.fields.values():
        if not field.name.startswith("tokenizer.") or field.name == "tokenizer.chat_template":
            continue
        kind = field.types[0]
        value = field.contents()
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(field.name, value, kind, sub_type=field.types[-1])
        else:
            writer.add_key_value(field.name, value, kind)
        if field.name == "tokenizer.ggml.tokens":
            count = len(value)
    return count


if __name__ == "__main__":
    from tests.tiny_kinds import KINDS

    parser = argparse.ArgumentParser(description="make a small GGUF of random weights")
    parser.add_argument("--size", choices=[*sorted(SHAPES), *sorted(KINDS)], default="tiny")
    parser.add_argument("--out", type=Path, help="where to write it (default: in the cache)")
    options = parser.parse_args()
    print(make(options.size, options.out))
