"""A GGUF in memory: what it says of itself, its vocabulary, where its layers go.

Owns: loading and freeing a model, and the choice of GPUs. Refuses to know: contexts, sequences, sampling.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llmnode.engine.backend import ModelLoadError
from llmnode.engine.llama.native import Found, Native
from llmnode.engine.llama.options import LlamaOptions
from llmnode.engine.llama.tensors import tensor_sizes
from llmnode.engine.pooling import POOLINGS
from llmnode.engine.types import InfillTokens, ModelInfo

# llama.h, enum llama_load_mode, by (mmap, mlock): auto maps the file unless a device cannot read from a mapping.
_LOAD_MODES = {(True, False): -1, (False, False): 0, (False, True): 2, (True, True): 3}


def check_file(path: Path) -> None:
    """Raise ModelLoadError when the file cannot be a GGUF, before llama.cpp has a look at it.

    Source: ggml's docs/gguf.md: magic "GGUF", version as 32 bits, counts of tensors and of metadata as 64 bits each.
    """
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    if head[:4] != b"GGUF":
        raise ModelLoadError(f"{path}: is not a GGUF file: it begins with {head[:4]!r}, not b'GGUF'")
    if len(head) < 24:
        raise ModelLoadError(f"{path}: is cut off: {len(head)} bytes, a GGUF header alone has 24")
    version = int.from_bytes(head[4:8], "little")
    if version > 0xFFFF:
        raise ModelLoadError(f"{path}: is a big-endian GGUF, which this machine cannot read")
    if version not in (2, 3):
        raise ModelLoadError(f"{path}: is GGUF version {version}; versions 2 and 3 can be read")


def fingerprint(path: Path) -> bytes:
    """Sixteen bytes that differ between models: of the size and of 64 blocks spread over the file. Reads 256 KiB, since
    a digest of the whole would take minutes where a model is large."""
    size, digest = path.stat().st_size, blake2b(digest_size=16)
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for block in range(64):
            file.seek(max(0, size - 4096) * block // 63)
            digest.update(file.read(4096))
    return digest.digest()


class Model:
    """A loaded model, which lives as long as somebody holds it. As a context manager it is held for the block.

    only_look: read what the file says of itself and of its tensors, but no weights.
    """

    def __init__(
        self,
        library: Native,
        options: LlamaOptions,
        chosen: Sequence[Found],
        progress: Callable[[float], None] = lambda done: None,
        *,
        only_look: bool = False,
    ) -> None:
        self.library, self.path, self._api = library, options.path, library.api
        self._holders, self._count = 0, threading.Lock()
        raised: list[BaseException] = []

        def report(done: float, _: Any) -> bool:
            try:
                progress(done)
            except BaseException as error:  # it cannot pass through C
                raised.append(error)
            return not raised

        parameters = self._api.llama_model_default_params()
        parameters.n_gpu_layers = options.n_gpu_layers
        parameters.load_mode = 0 if only_look else _LOAD_MODES[options.mmap, options.mlock]
        parameters.no_alloc = only_look
        parameters.use_extra_bufts = not library.uses_amx()
        callback = self._api.llama_progress_callback(report)
        parameters.progress_callback = callback
        handles = (ctypes.c_void_p * (len(chosen) + 1))(*(found.handle for found in chosen))
        if chosen:
            parameters.devices = ctypes.addressof(handles)
        split = (ctypes.c_float * self._api.llama_max_devices())(*options.tensor_split)
        if options.tensor_split:
            parameters.tensor_split = split
        library.complaints.clear()
        self.pointer: Any = self._api.llama_model_load_from_file(os.fsencode(options.path), parameters)
        if raised:
            self._free()
            raise raised[0]
        if not self.pointer:
            raise ModelLoadError(f"{options.path}: {library.reason()}")
        self.vocab = self._api.llama_model_get_vocab(self.pointer)

    def __enter__(self) -> Model:
        return self.hold()

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold(self) -> Model:
        with self._count:
            self._holders += 1
        return self

    def release(self) -> None:
        """Give up one hold; the last one frees the model. Contexts on several threads may hold one model."""
        with self._count:
            self._holders -= 1
            last = self._holders == 0
        if last:
            self._free()

    def info(self) -> ModelInfo:
        api, model, vocab = self._api, self.pointer, self.vocab
        template = api.llama_model_chat_template(model, None)
        architecture = self.metadata("general.architecture")
        return ModelInfo(
            name=self.metadata("general.name") or self.path.stem,
            architecture=architecture,
            n_vocab=api.llama_vocab_n_tokens(vocab),
            n_ctx_train=int(self.metadata(f"{architecture}.context_length") or 0),
            n_params=api.llama_model_n_params(model),
            size_bytes=self.path.stat().st_size,
            chat_template=template.decode("utf-8", "replace") if template else "",
            bos=self._token_text(api.llama_vocab_bos(vocab)),
            eos=self._token_text(api.llama_vocab_eos(vocab)),
            add_bos=api.llama_vocab_get_add_bos(vocab),
            cell_bytes=self._cell_bytes(architecture),
            window=api.llama_model_n_swa(model),
            digest=fingerprint(self.path).hex(),
            n_embd=api.llama_model_n_embd(model),
            vocab_type=api.llama_vocab_type(vocab),
            infill=self._infill_tokens(),
        )

    def _infill_tokens(self) -> InfillTokens | None:
        names = ("pre", "suf", "mid", "rep", "sep")
        found = [int(getattr(self._api, f"llama_vocab_fim_{name}")(self.vocab)) for name in names]
        if min(found[:3]) < 0:
            return None
        return InfillTokens(*found[:3], *(token if token >= 0 else None for token in found[3:]))

    def purpose(self) -> str:
        """What it was made for, by its own metadata: "generate", "embed" or "rerank".

        A model that says how its vectors are pooled was made for vectors, whatever its architecture; so was one that
        has no decoder, or in which every token sees those behind it.
        """
        architecture = self.metadata("general.architecture")
        said = self.metadata(f"{architecture}.pooling_type")
        kind = POOLINGS[int(said)] if said.isdigit() and int(said) < len(POOLINGS) else "none"
        if kind == "rank":
            return "rerank"
        causal = self.metadata(f"{architecture}.attention.causal") != "false"
        generates = causal and bool(self._api.llama_model_has_decoder(self.pointer))
        return "generate" if kind == "none" and generates else "embed"

    def is_recurrent(self) -> bool:
        """Whether some of its state is one row a sequence, not one cell a token."""
        return bool(self._api.llama_model_is_recurrent(self.pointer) or self._api.llama_model_is_hybrid(self.pointer))

    def head_sizes(self) -> tuple[int, ...]:
        """Values in a head of keys and of values; empty when the metadata do not say it plainly."""
        architecture = self.metadata("general.architecture")
        heads = self.metadata(f"{architecture}.attention.head_count")
        if not heads.isdigit() or not int(heads):
            return ()
        even = self._api.llama_model_n_embd(self.pointer) // int(heads)
        lengths = (self.metadata(f"{architecture}.attention.{name}_length") for name in ("key", "value"))
        return tuple(int(length) if length.isdigit() else even for length in lengths)

    def pieces(self) -> list[bytes]:
        """The bytes of every token as text, once: asking at each token would cost 5 us."""
        return list(self._spelled(range(self._api.llama_vocab_n_tokens(self.vocab)), special=False))

    def specials(self) -> dict[str, int]:
        """The tokens that are more than a text, by their spelling: those that the vocabulary has as control tokens, and
        those that its makers have added to it. Of several with one spelling, the first."""
        api, marked = self._api, self._api.LLAMA_TOKEN_ATTR_CONTROL | self._api.LLAMA_TOKEN_ATTR_USER_DEFINED
        tokens = [token for token in range(api.llama_vocab_n_tokens(self.vocab)) if self._attributes(token) & marked]
        names: dict[str, int] = {}
        for token, spelling in zip(tokens, self._spelled(tokens, special=True), strict=True):
            names.setdefault(spelling.decode("utf-8", "replace"), token)
        names.pop("", None)
        return names

    def _attributes(self, token: int) -> int:
        attributes: int = self._api.llama_vocab_get_attr(self.vocab, token)
        return attributes

    def _spelled(self, tokens: Iterable[int], *, special: bool) -> Iterator[bytes]:
        buffer = ctypes.create_string_buffer(1024)
        for token in tokens:
            size = self._api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = self._api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
            yield buffer.raw[:size]

    def spell(self, token: int) -> bytes:
        """The bytes of one token, of a control token those of its name. Raises IndexError for one that does not exist,
        of which llama.cpp would end the process."""
        if not 0 <= token < self._api.llama_vocab_n_tokens(self.vocab):
            raise IndexError(f"there is no token {token}")
        buffer = ctypes.create_string_buffer(256)
        size = self._api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:size]

    def has_classifier(self) -> bool:
        try:
            return not {"cls.weight", "cls.output.weight"}.isdisjoint(tensor_sizes(self.path))
        except (OSError, ValueError):
            return False

    def end_tokens(self) -> frozenset[int]:
        count, is_end = self._api.llama_vocab_n_tokens(self.vocab), self._api.llama_vocab_is_eog
        return frozenset(token for token in range(count) if is_end(self.vocab, token))

    def tokenize(self, text: str, *, special: bool, ends: bool = False) -> list[int]:
        """Ids of a text. special: control tokens written out in it count as such. ends: with the model's first and last
        tokens around it."""
        data = text.encode()
        size = len(data) + 4  # a token has at least one byte; some vocabularies put a space in front; two ends
        ids = (ctypes.c_int32 * size)()
        count = self._api.llama_tokenize(self.vocab, data, len(data), ids, size, ends, special)
        if count < 0:
            raise ValueError(f"{len(data)} bytes of text cannot be tokenized")
        return ids[:count]

    def pair(self, query: str, document: str) -> list[int]:
        """Ids of two texts for a ranking model: by its own template where it has one, else one after the other with the
        model's first, separating and last tokens."""
        api, vocab = self._api, self.vocab
        template = api.llama_model_chat_template(self.pointer, b"rerank")
        if template:
            parts = re.split(r"(\{query\}|\{document\})", template.decode("utf-8", "replace"))
            texts = {"{query}": query, "{document}": document}
            whole = self.tokenize("".join(texts.get(part, part) for part in parts), special=True)
            if not any(self._names_tokens(text) for text in texts.values()):
                return whole
            # What looks like a control token in a text is none. Cutting the prompt there moves a border or two.
            cut = (self.tokenize(texts.get(part, part), special=part not in texts) for part in parts)
            return [token for part in cut for token in part]
        end = [api.llama_vocab_eos(vocab)] if api.llama_vocab_get_add_eos(vocab) else []
        between = [api.llama_vocab_sep(vocab)] if api.llama_vocab_get_add_sep(vocab) else []
        first = [api.llama_vocab_bos(vocab)] if api.llama_vocab_get_add_bos(vocab) else []
        left, right = (self.tokenize(text, special=False) for text in (query, document))
        return [*first, *left, *end, *between, *right, *(end or between)]

    def _names_tokens(self, text: str) -> bool:
        return self.tokenize(text, special=True) != self.tokenize(text, special=False)

    def metadata(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        size = self._api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if size > 0 else ""

    def _free(self) -> None:
        if self.pointer:
            self._api.llama_model_free(self.pointer)
            self.pointer = None

    def _cell_bytes(self, architecture: str) -> int:
        """Keys and values of one token in all layers, as 16-bit floats; 0 when the metadata do not say it plainly."""
        texts = [self.metadata(f"{architecture}.{name}") for name in ("block_count", "attention.head_count_kv")]
        if not all(text.isdigit() for text in texts):
            return 0
        layers, kv_heads = map(int, texts)
        return sum(2 * layers * kv_heads * size for size in self.head_sizes())

    def _token_text(self, token: int) -> str:
        return self._api.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace") if token >= 0 else ""


def choose_devices(options: LlamaOptions, known: Sequence[Found]) -> list[Found]:
    """The GPUs to use; none means the CPU. Raises ModelLoadError for one that is not there: never the wrong card."""
    gpus = [found for found in known if found.is_gpu]
    names = ", ".join(f"{gpu.device.name} ({gpu.device.uuid or gpu.address or 'no UUID'})" for gpu in gpus) or "none"
    if not gpus and (options.n_gpu_layers > 0 or options.tensor_split):
        raise ModelLoadError("n_gpu_layers and tensor_split need a GPU, and llama.cpp finds none here")
    chosen = []
    for name in options.devices:
        match = [gpu for gpu in gpus if gpu.answers_to(name)]
        if not match:
            raise ModelLoadError(f"there is no GPU {name!r} here; known GPUs: {names}")
        chosen += match
    if len(options.tensor_split) > len(chosen or gpus):
        raise ModelLoadError(f"tensor_split names {len(options.tensor_split)} shares for the GPUs {names}")
    return chosen or (gpus if options.n_gpu_layers else [])
