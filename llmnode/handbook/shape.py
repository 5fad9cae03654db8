"""The shape of the network: its sizes, and the names and sizes of its tensors. Knows no PyTorch and no GGUF."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama whose output matrix is its embedding. Every width is a multiple of 32, the block of Q8_0.

    vocabulary, context in tokens; width of a token's state; hidden: width inside a feed-forward block.
    """

    vocabulary: int = 2048
    width: int = 192
    hidden: int = 512
    layers: int = 5
    heads: int = 6
    context: int = 2048
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """(rows, columns) of each matrix and (width,) of each norm, by llama.cpp's names."""
        sizes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, self.width),
            "output_norm.weight": (self.width,),
        }
        for layer in range(self.layers):
            block = f"blk.{layer}."
            sizes[block + "attn_norm.weight"] = (self.width,)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                sizes[f"{block}{name}.weight"] = (self.width, self.width)
            sizes[block + "ffn_norm.weight"] = (self.width,)
            sizes[block + "ffn_gate.weight"] = (self.hidden, self.width)
            sizes[block + "ffn_up.weight"] = (self.hidden, self.width)
            sizes[block + "ffn_down.weight"] = (self.width, self.hidden)
        return sizes
