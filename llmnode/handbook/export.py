"""Writes the trained network and its tokenizer as a GGUF. Owns the file's keys; knows no training.

Matrices are Q8_0, norms float32. The file says of itself what llama.cpp, llmnode and a reader of the model card need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from llmnode.handbook.shape import Shape
from llmnode.handbook.tokenizer import CONTROLS, END, END_OF_TEXT, PRE, TEMPLATE, Tokenizer, printable

NAME = "llmrack handbook"


def write(path: Path, weights: Mapping[str, NDArray[np.float32]], shape: Shape, tokenizer: Tokenizer) -> None:
    """Write the GGUF beside `path` and move it there once it is whole."""
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name(NAME)
    writer.add_license("apache-2.0")
    writer.add_description("A tiny model that answers questions about llmrack")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            data = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    pieces = [printable(piece) for piece in tokenizer.pieces()]
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE)
    writer.add_token_list([*pieces, *CONTROLS])
    writer.add_token_types([normal] * len(pieces) + [control] * len(CONTROLS))
    writer.add_token_merges([f"{pieces[left]} {pieces[right]}" for left, right in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.control(END_OF_TEXT))
    writer.add_eos_token_id(tokenizer.control(END))
    writer.add_eot_token_id(tokenizer.control(END))
    writer.add_pad_token_id(tokenizer.control(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
