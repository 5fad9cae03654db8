"""A llama.cpp context that makes vectors or scores of texts: `PoolingBackend` over a model, or over one that generates.

Owns: the context and what it may be asked for. Refuses to know: who waits for the vectors.

Every batch begins with an empty memory, which is this context's own: what other contexts over the same model hold stays
as it is. A text must fit one batch, since what is pooled must be computed at once; llama.cpp also asserts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmnode.engine.backend import BAD_BATCH, OK, Chunk, ModelLoadError, Room
from llmnode.engine.llama.batch import Batch
from llmnode.engine.llama.model import Model
from llmnode.engine.llama.native import Found
from llmnode.engine.llama.options import FLASH_ATTENTION, LlamaOptions, physical_cores
from llmnode.engine.pooling import POOLINGS
from llmnode.engine.types import ModelInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS_BYTES = 256 * 2**20
_SHORT = 512
"""Tokens that a text may always have, if the model takes them."""


def pooling_room(options: LlamaOptions, info: ModelInfo, most: int) -> Room:
    """Sizes of a pooling context. Raises ModelLoadError, naming the one that cannot be. most: sequences at most.

    n_ctx: as many tokens as 256 MiB of rows hold (llama.cpp makes one of the whole vocabulary for every token), but 512
    at least and what the model was trained for at most.
    """
    room_for = max(_SHORT, _ROWS_BYTES // (4 * info.n_vocab))
    n_ctx = options.n_ctx or min(info.n_ctx_train, room_for)
    if n_ctx > info.n_ctx_train:
        raise ModelLoadError(f"n_ctx is {n_ctx}; {options.path} was trained for {info.n_ctx_train} tokens")
    n_batch = max(options.n_batch, n_ctx)
    texts = min(options.slots, n_batch)
    if texts > most:
        raise ModelLoadError(f"slots is {texts}; llama.cpp holds {most} sequences at most")
    return Room(texts, n_ctx, n_batch, n_batch, rows=n_batch)


def open_pooling(model: Model, options: LlamaOptions, devices: Sequence[Found], kind: str) -> tuple[Any, Sequence[str]]:
    """Make a context; also returns what llama.cpp logged. Raises ModelLoadError when it cannot be made."""
    library, api = model.library, model.library.api
    room = pooling_room(options, model.info(), api.llama_max_parallel_sequences())
    parameters = api.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = room.n_batch
    parameters.n_seq_max = room.sequences
    parameters.n_threads = options.threads or physical_cores()
    parameters.n_threads_batch = options.threads_batch or parameters.n_threads
    # No cell is kept from one text to the next, so a CPU gains nothing by flash attention, and vectors keep closer to
    # what they are alone (0.01 against 0.02 in values of about 1, tests/tiny_kinds.py's BERT).
    flash = "off" if options.flash_attn == "auto" and not devices else options.flash_attn
    parameters.flash_attn_type = FLASH_ATTENTION[flash]
    parameters.pooling_type = POOLINGS.index(kind)
    parameters.embeddings = True
    parameters.kv_unified = True
    parameters.no_perf = True
    library.complaints.clear()
    with library.listening() as lines:
        context = api.llama_init_from_model(model.pointer, parameters)
    if not context:
        wanted = f"a pooling context of {room.n_batch} tokens"
        raise ModelLoadError(f"{model.path}: {wanted} cannot be made: {library.reason()}")
    return context, lines


def pooling_kind(model: Model, asked: str) -> str:
    """How to pool: as asked, or as the model says, or else the last token where each sees those before it only, and the
    mean where all see all. Raises ModelLoadError for a name that does not exist or a rank without a classifier."""
    if asked not in ("model", *POOLINGS):
        raise ModelLoadError(f"pooling is {asked!r}; it can be model, {', '.join(POOLINGS)}")
    kind, architecture = asked, model.metadata("general.architecture")
    if kind == "model":
        # llama.h, enum llama_pooling_type: the numbers are the places in POOLINGS.
        said = model.metadata(f"{architecture}.pooling_type")
        causal = model.metadata(f"{architecture}.attention.causal") != "false"
        kind = POOLINGS[int(said)] if said.isdigit() and int(said) < len(POOLINGS) else "last" if causal else "mean"
    if kind == "rank" and not model.has_classifier():
        raise ModelLoadError(f"{model.path}: cannot rank: it has no classifier (cls or cls.output)")
    return kind


class LlamaPooling:
    """One pooling context over a model. See pooling.PoolingBackend for what each method promises."""

    def __init__(self, model: Model, options: LlamaOptions, devices: Sequence[Found]) -> None:
        api = model.library.api
        self.info = model.info()
        self.room = pooling_room(options, self.info, api.llama_max_parallel_sequences())
        self.pooling = pooling_kind(model, options.pooling)
        self.devices = tuple(found.device for found in devices)
        outputs = api.llama_model_n_cls_out if self.pooling == "rank" else api.llama_model_n_embd_out
        self.width = int(outputs(model.pointer))
        self._api = api
        self._context, _ = open_pooling(model, options, devices, self.pooling)
        self._memory = api.llama_get_memory(self._context)  # encoders have none
        self._batch = Batch(api, self.room)
        self._ends = np.zeros(1, np.int64)
        model.library.complaints.clear()
        code = self.pool([[0], [0]][: self.room.sequences])
        if code != OK:
            api.llama_free(self._context)
            raise ModelLoadError(f"{model.path}: a first batch ended with code {code}: {model.library.reason()}")
        self._shared: Model | None = model.hold()
        self._tokenize, self._pair, self._spell = model.tokenize, model.pair, model.spell

    def tokenize(self, text: str, *, special: bool, ends: bool = False) -> list[int]:
        return self._tokenize(text, special=special, ends=ends)

    def spell(self, token: int) -> bytes:
        return self._spell(token)

    def pair(self, query: str, document: str) -> list[int]:
        return self._pair(query, document)

    def pool(self, texts: Sequence[Sequence[int]]) -> int:
        if not 0 < len(texts) <= self.room.sequences or not all(len(text) for text in texts):
            return BAD_BATCH
        if self._batch.fill([Chunk(seq, 0, text, len(text)) for seq, text in enumerate(texts)]) < 0:
            return BAD_BATCH
        self._ends = np.cumsum([0, *map(len, texts)])
        if self._memory:
            self._api.llama_memory_clear(self._memory, False)
        code = int(self._api.llama_decode(self._context, self._batch.struct))
        self._api.llama_synchronize(self._context)
        return code

    def vector(self, index: int) -> NDArray[np.float32]:
        if self.pooling == "none":
            first, beyond = int(self._ends[index]), int(self._ends[index + 1])
            rows = np.ctypeslib.as_array(
                self._api.llama_get_embeddings(self._context), (int(self._ends[-1]), self.width)
            )
            return rows[first:beyond]
        return np.ctypeslib.as_array(self._api.llama_get_embeddings_seq(self._context, index), (self.width,))

    def close(self) -> None:
        if self._shared is None:
            return
        self._api.llama_free(self._context)
        self._shared.release()
        self._shared = None
