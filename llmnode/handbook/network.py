"""A small Llama in PyTorch, as functions over named tensors. Owns the forward pass.

The tensors have llama.cpp's own names, and rotary positions turn neighbouring pairs, as llama.cpp's `llama` does: what
is trained here is exported as it is. The output matrix is the embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmnode.handbook.shape import Shape

Weights = dict[str, Tensor]
SPREAD = 0.02


def new_weights(shape: Shape, seed: int) -> Weights:
    """Fresh weights: normal with SPREAD, less where a layer adds to the residual stream; norms are ones."""
    dice = torch.Generator().manual_seed(seed)
    quiet = 1 / math.sqrt(2 * shape.layers)
    weights: Weights = {}
    for name, size in shape.tensors().items():
        if len(size) == 1:
            weights[name] = torch.ones(size).requires_grad_()
        else:
            adds = name.endswith(("attn_output.weight", "ffn_down.weight"))
            spread = SPREAD * quiet if adds else SPREAD
            weights[name] = (torch.randn(size, generator=dice) * spread).requires_grad_()
    return weights


def features(weights: Weights, shape: Shape, ids: Tensor) -> Tensor:
    """(batch, length) ids -> (batch, length, width), normed: what `logits` turns into scores of the next token."""
    batch, length = ids.shape
    turn = _angles(shape, length)
    state = F.embedding(ids, weights["token_embd.weight"])
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        normed = F.rms_norm(state, (shape.width,), weights[block + "attn_norm.weight"], shape.epsilon)
        query, key, value = (
            F.linear(normed, weights[f"{block}attn_{name}.weight"]).view(batch, length, shape.heads, -1).transpose(1, 2)
            for name in "qkv"
        )
        seen = F.scaled_dot_product_attention(_rotate(query, turn), _rotate(key, turn), value, is_causal=True)
        seen = seen.transpose(1, 2).reshape(batch, length, shape.width)
        state = state + F.linear(seen, weights[block + "attn_output.weight"])
        normed = F.rms_norm(state, (shape.width,), weights[block + "ffn_norm.weight"], shape.epsilon)
        gate = F.silu(F.linear(normed, weights[block + "ffn_gate.weight"]))
        up = F.linear(normed, weights[block + "ffn_up.weight"])
        state = state + F.linear(gate * up, weights[block + "ffn_down.weight"])
    return F.rms_norm(state, (shape.width,), weights["output_norm.weight"], shape.epsilon)


def logits(weights: Weights, state: Tensor) -> Tensor:
    """(..., width) features -> (..., vocabulary) scores."""
    return F.linear(state, weights["token_embd.weight"])


def _angles(shape: Shape, length: int) -> Tensor:
    """Unit complex numbers, (length, head width / 2): how far each pair turns at each position."""
    half = shape.width // shape.heads // 2
    speed = shape.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), speed)
    return torch.complex(angle.cos(), angle.sin())


def _rotate(heads: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)
