"""Tiny GGUFs of random weights whose memory is not plain attention, and models that embed or rank.

    mamba      recurrent: one state a sequence, no cells      (Gu and Dao, 2023)
    lfm2       hybrid: short convolutions and attention       (Liquid AI, 2025)
    gemma3     sliding windows of 64 tokens beside full attention
    bert       an encoder that embeds: mean pooling, a vocabulary of its own (30,522 word pieces)
    reranker   the same encoder with a classifier: one score for a pair of texts
    coder      a Llama with control tokens to fill in with

Names and shapes of tensors and keys: src/models/*.cpp of the pinned llama.cpp. All have 64 dimensions, the generating
ones Phi-3's vocabulary and logits of standard deviation 2.5, as tests/tiny_model.py explains.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from tests import tiny_model

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 176, 4, 4, 2, 2048
HEAD = WIDTH // HEADS
WINDOW = 64
FILL_IN = {"pre": 32002, "suf": 32003, "mid": 32004, "rep": 32005, "sep": 32008}
"""Tokens of the vocabulary that stand for nothing else."""


class Weights:
    """Writes one GGUF: keys, a tokenizer, tensors of seeded random numbers."""

    def __init__(self, path: Path, architecture: str, vocabulary: str = "phi-3", context: int = CONTEXT) -> None:
        self.writer = gguf.GGUFWriter(path, architecture)
        self._dice = np.random.default_rng(tiny_model.SEED)
        self.writer.add_name(f"random {architecture}")
        self.writer.add_context_length(context)
        self.writer.add_embedding_length(WIDTH)
        self.writer.add_block_count(LAYERS)
        self.writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        self.tokens = tiny_model.copy_tokenizer(gguf.GGUFReader(tiny_model.vocabulary(vocabulary)), self.writer)
        self.writer.add_vocab_size(self.tokens)

    def matrix(self, name: str, rows: int, columns: int, spread: float | None = None, *, plain: bool = False) -> None:
        """A matrix whose products keep the spread of what they multiply, or one of another spread. plain: as floats."""
        wide = np.float32(columns**-0.5 if spread is None else spread)
        weights = self._dice.standard_normal((rows, columns), dtype=np.float32) * wide
        kind = gguf.GGMLQuantizationType.F32 if plain or columns % 32 else gguf.GGMLQuantizationType.Q8_0
        self.writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    def values(self, name: str, length: int, value: float = 1.0) -> None:
        self.writer.add_tensor(name, np.full(length, value, dtype=np.float32))

    def feed_forward(self, block: str) -> None:
        self.matrix(block + "ffn_gate.weight", HIDDEN, WIDTH)
        self.matrix(block + "ffn_up.weight", HIDDEN, WIDTH)
        self.matrix(block + "ffn_down.weight", WIDTH, HIDDEN)

    def attention(self, block: str, kv_heads: int = KV_HEADS) -> None:
        self.matrix(block + "attn_q.weight", WIDTH, WIDTH)
        self.matrix(block + "attn_k.weight", kv_heads * HEAD, WIDTH)
        self.matrix(block + "attn_v.weight", kv_heads * HEAD, WIDTH)
        self.matrix(block + "attn_output.weight", WIDTH, WIDTH)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def _mamba(path: Path) -> None:
    inner, state, convolution, rank = 2 * WIDTH, 16, 4, 4
    file = Weights(path, "mamba")
    file.writer.add_feed_forward_length(0)
    file.writer.add_head_count(0)
    file.writer.add_ssm_conv_kernel(convolution)
    file.writer.add_ssm_inner_size(inner)
    file.writer.add_ssm_state_size(state)
    file.writer.add_ssm_time_step_rank(rank)
    file.writer.add_layer_norm_rms_eps(1e-5)
    file.matrix("token_embd.weight", file.tokens, WIDTH, 1.0)
    file.matrix("output.weight", file.tokens, WIDTH, 2.5 / WIDTH**0.5)
    file.values("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        file.values(block + "attn_norm.weight", WIDTH)
        file.matrix(block + "ssm_in.weight", 2 * inner, WIDTH)
        file.matrix(block + "ssm_conv1d.weight", inner, convolution, plain=True)
        file.values(block + "ssm_conv1d.bias", inner, 0.0)
        file.matrix(block + "ssm_x.weight", rank + 2 * state, inner)
        file.matrix(block + "ssm_dt.weight", inner, rank)
        file.values(block + "ssm_dt.bias", inner, -2.0)  # time steps of about 0.13: a memory of tens of tokens
        decay = -np.arange(1, state + 1, dtype=np.float32)
        file.writer.add_tensor(block + "ssm_a", np.tile(decay, (inner, 1)))
        file.values(block + "ssm_d", inner)
        file.matrix(block + "ssm_out.weight", WIDTH, inner)
    file.close()


def _lfm2(path: Path) -> None:
    kernel = 3
    file = Weights(path, "lfm2")
    file.writer.add_feed_forward_length(HIDDEN)
    file.writer.add_head_count(HEADS)
    file.writer.add_head_count_kv([0 if layer % 2 == 0 else KV_HEADS for layer in range(LAYERS)])
    file.writer.add_layer_norm_rms_eps(1e-5)
    file.writer.add_shortconv_l_cache(kernel)
    file.writer.add_rope_dimension_count(HEAD)
    file.matrix("token_embd.weight", file.tokens, WIDTH, 1.0)
    file.matrix("output.weight", file.tokens, WIDTH, 2.5 / WIDTH**0.5)
    file.values("token_embd_norm.weight", WIDTH)  # what llama.cpp calls the norm before the output
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        file.values(block + "attn_norm.weight", WIDTH)
        file.values(block + "ffn_norm.weight", WIDTH)
        file.feed_forward(block)
        if layer % 2 == 0:
            file.matrix(block + "shortconv.conv.weight", WIDTH, kernel, plain=True)
            file.matrix(block + "shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            file.matrix(block + "shortconv.out_proj.weight", WIDTH, WIDTH)
        else:
            file.attention(block)
            file.values(block + "attn_q_norm.weight", HEAD)
            file.values(block + "attn_k_norm.weight", HEAD)
    file.close()


def _gemma3(path: Path) -> None:
    file = Weights(path, "gemma3")
    file.writer.add_feed_forward_length(HIDDEN)
    file.writer.add_head_count(HEADS)
    file.writer.add_head_count_kv(KV_HEADS)
    file.writer.add_layer_norm_rms_eps(1e-5)
    file.writer.add_key_length(HEAD)
    file.writer.add_value_length(HEAD)
    file.writer.add_sliding_window(WINDOW)
    file.writer.add_sliding_window_pattern([layer % 2 == 0 for layer in range(LAYERS)])
    file.matrix("token_embd.weight", file.tokens, WIDTH, WIDTH**-0.5)  # multiplied by sqrt(width) when read
    file.matrix("output.weight", file.tokens, WIDTH, 2.5 / WIDTH**0.5)
    file.values("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            file.values(f"{block}{norm}.weight", WIDTH)
        file.attention(block)
        file.values(block + "attn_q_norm.weight", HEAD)
        file.values(block + "attn_k_norm.weight", HEAD)
        file.feed_forward(block)
    file.close()


def _bert(path: Path, *, ranks: bool = False) -> None:
    context = 512
    file = Weights(path, "bert", vocabulary="bert-bge", context=context)
    file.writer.add_feed_forward_length(HIDDEN)
    file.writer.add_head_count(HEADS)
    file.writer.add_layer_norm_eps(1e-12)
    file.writer.add_causal_attention(False)
    file.writer.add_pooling_type(gguf.PoolingType.RANK if ranks else gguf.PoolingType.MEAN)
    file.matrix("token_embd.weight", file.tokens, WIDTH, 1.0)
    file.matrix("token_types.weight", 2, WIDTH, 0.1, plain=True)
    file.matrix("position_embd.weight", context, WIDTH, 0.3, plain=True)
    _norm(file, "token_embd_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        file.attention(block, HEADS)
        _norm(file, block + "attn_output_norm")
        file.matrix(block + "ffn_up.weight", HIDDEN, WIDTH)
        file.values(block + "ffn_up.bias", HIDDEN, 0.0)
        file.matrix(block + "ffn_down.weight", WIDTH, HIDDEN)
        file.values(block + "ffn_down.bias", WIDTH, 0.0)
        _norm(file, block + "layer_output_norm")
    if ranks:
        file.matrix("cls.weight", WIDTH, WIDTH)
        file.values("cls.bias", WIDTH, 0.0)
        file.matrix("cls.output.weight", 1, WIDTH, plain=True)
        file.values("cls.output.bias", 1, 0.0)
    file.close()


def _coder(path: Path) -> None:
    file = Weights(path, "llama")
    file.writer.add_feed_forward_length(HIDDEN)
    file.writer.add_head_count(HEADS)
    file.writer.add_head_count_kv(KV_HEADS)
    file.writer.add_layer_norm_rms_eps(1e-5)
    file.writer.add_rope_dimension_count(HEAD)
    for name, token in FILL_IN.items():
        file.writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", token)
    file.matrix("token_embd.weight", file.tokens, WIDTH, 1.0)
    file.matrix("output.weight", file.tokens, WIDTH, 2.5 / WIDTH**0.5)
    file.values("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        file.values(block + "attn_norm.weight", WIDTH)
        file.attention(block)
        file.values(block + "ffn_norm.weight", WIDTH)
        file.feed_forward(block)
    file.close()


def _norm(file: Weights, name: str) -> None:
    file.values(f"{name}.weight", WIDTH)
    file.values(f"{name}.bias", WIDTH, 0.0)


KINDS: dict[str, Callable[[Path], None]] = {
    "mamba": _mamba,
    "lfm2": _lfm2,
    "gemma3": _gemma3,
    "bert": _bert,
    "reranker": lambda path: _bert(path, ranks=True),
    "coder": _coder,
}


def make(kind: str, out: Path | None = None) -> Path:
    """Return the path of the model of that kind, making it first when it is not there yet."""
    recipe = [Path(__file__), Path(tiny_model.__file__)]
    return tiny_model.made(f"random-{kind}", out, recipe, KINDS[kind])
