"""From options to a context: sequences, cells, rows, the kernel for attention, and llama.cpp's parameters for them.

One cache for all sequences, or a part for each? Attention over a unified cache passes over the cells of all sequences
up to the highest in use, each for every row: with 32 answers of 128 tokens a step of the 15M model took 23.6 ms, and
18.0 in a parted cache (500M, 80 tokens: 261 and 222). A parted cache in turn shares prefixes by copying, and nobody
can have more than its part. So `auto` parts it where every slot has room for n_ctx anyway. It stays unified where cells
are to be lent (kv_cells below slots x n_ctx), for a single slot, which has nobody to pass over, and for models whose
state is not only attention.

Owns: what the zeros of the options come to. Refuses to know: what is computed in the context, and whether it fits the
memory (fit.py asks for a context that allocates nothing, and reads its log).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmnode.engine.backend import ModelLoadError, Room
from llmnode.engine.llama.model import Model
from llmnode.engine.llama.native import Found
from llmnode.engine.llama.options import (
    CACHE_TYPES,
    FLASH_ATTENTION,
    MICRO_BATCH,
    SMALL_MICRO_BATCH,
    Chosen,
    LlamaOptions,
    physical_cores,
)
from llmnode.engine.types import ModelInfo

DEFAULT_CONTEXT = 4096
_PAD = 256
"""llama.cpp rounds the cells of a sequence up to a multiple of it."""
SPARE_ROWS = 16
"""Rows of logits beyond one a slot, for tokens that are guessed and verified in one step."""
_IDLE_ROWS_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Opened:
    """A context. lines: what llama.cpp logged while it made it."""

    pointer: Any
    room: Room
    chosen: Chosen
    lines: Sequence[str]


def open_context(model: Model, options: LlamaOptions, devices: Sequence[Found]) -> Opened:
    """Make a context. Raises ModelLoadError when a size cannot be, it does not fit the memory, or the model cannot
    generate."""
    library, api = model.library, model.library.api
    if not api.llama_model_has_decoder(model.pointer):
        raise ModelLoadError(f"{model.path}: is a model that cannot generate text")
    room = plan_room(options, model)
    flash = options.flash_attn
    parameters = api.llama_context_default_params()
    parameters.n_ctx = room.kv_cells
    parameters.n_batch = room.n_batch
    parameters.n_ubatch = min(room.n_batch, SMALL_MICRO_BATCH if flash == "off" and not devices else MICRO_BATCH)
    parameters.n_seq_max = room.sequences
    # Without this, room for n_batch rows of logits is set aside. llama.cpp insists on one a sequence.
    parameters.n_outputs_max = max(room.rows, room.sequences)
    parameters.n_threads = options.threads or physical_cores()
    parameters.n_threads_batch = options.threads_batch or parameters.n_threads
    parameters.flash_attn_type = FLASH_ATTENTION[flash]
    parameters.type_k, parameters.type_v = CACHE_TYPES[options.cache_type_k], CACHE_TYPES[options.cache_type_v]
    parameters.swa_full = options.swa_full
    parameters.kv_unified = room.unified
    parameters.no_perf = True
    library.complaints.clear()
    with library.listening() as lines:
        context = api.llama_init_from_model(model.pointer, parameters)
    if not context:
        wanted = f"a context of {room.kv_cells} cells for {room.sequences} sequences"
        raise ModelLoadError(f"{model.path}: {wanted} cannot be made: {library.reason()}")
    if not api.llama_get_memory(context):
        api.llama_free(context)
        raise ModelLoadError(f"{model.path}: is a model that cannot generate text: it keeps nothing of a sequence")
    room = replace(room, kv_cells=api.llama_n_ctx(context), n_batch=api.llama_n_batch(context))
    # llama.cpp tells what became of `auto` in its log only.
    became = any("Flash Attention enabled" in line or "enabling flash_attn" in line for line in lines)
    chosen = Chosen(
        threads=parameters.n_threads,
        threads_batch=parameters.n_threads_batch,
        flash_attention=flash == "on" or (flash == "auto" and became),
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        kv_unified=room.unified,
        n_ctx=room.n_ctx,
        kv_cells=room.kv_cells,
        n_batch=room.n_batch,
        micro_batch=parameters.n_ubatch,
        sequences=room.sequences,
        rows=room.rows,
        devices=tuple(found.device.name for found in devices) or ("CPU",),
    )
    return Opened(context, room, chosen, lines)


def plan_room(options: LlamaOptions, model: Model) -> Room:
    """The sizes that the options ask for. Raises ModelLoadError, naming the one that cannot be."""
    info, most = model.info(), model.library.api.llama_max_parallel_sequences()
    n_ctx = options.n_ctx or min(info.n_ctx_train, DEFAULT_CONTEXT)
    if n_ctx > info.n_ctx_train:
        raise ModelLoadError(f"n_ctx is {n_ctx}; {options.path} was trained for {info.n_ctx_train} tokens")
    for name in ("slots", "sequences"):
        if getattr(options, name) > most:
            raise ModelLoadError(f"{name} is {getattr(options, name)}; llama.cpp holds {most} sequences at most")
    unified = _is_unified(options, info, n_ctx, recurrent=model.is_recurrent())
    cells = options.kv_cells or options.slots * n_ctx
    if unified:
        sequences = options.sequences or min(most, _sequences(options.slots, info, recurrent=model.is_recurrent()))
    else:
        part = -(-n_ctx // _PAD) * _PAD
        sequences = options.sequences or max(options.slots, min(most, cells // part))
        cells = sequences * part
    # llama.cpp keeps a row a sequence in any case.
    rows = min(max(options.slots, options.n_batch), max(options.slots + SPARE_ROWS, sequences))
    try:
        return Room(options.slots, n_ctx, cells, options.n_batch, sequences, rows, unified)
    except ValueError as error:
        raise ModelLoadError(str(error)) from error


def _is_unified(options: LlamaOptions, info: ModelInfo, n_ctx: int, *, recurrent: bool) -> bool:
    """Whether all sequences share one cache: see the module's text. Raises ModelLoadError for a cache that cannot be
    parted."""
    lent = 0 < options.kv_cells < options.slots * n_ctx
    stateful = recurrent or info.window > 0
    if options.kv_unified == "auto":
        return lent or stateful or options.slots == 1
    if options.kv_unified == "off" and lent:
        needed = options.slots * n_ctx
        raise ModelLoadError(
            f"kv_unified is off and kv_cells is {options.kv_cells}: a part of {n_ctx} tokens for each of "
            f"{options.slots} slots takes {needed}"
        )
    if options.kv_unified == "off" and stateful:
        raise ModelLoadError(f"kv_unified is off; {options.path} keeps more than attention, whose cache is unified")
    return options.kv_unified == "on"


def _sequences(slots: int, info: ModelInfo, *, recurrent: bool) -> int:
    """Sequences to hold when nobody says how many. The number costs no time (32 and 256 decode alike), but memory:
    llama.cpp keeps a row of logits for each, windows as many cells, recurrent models a whole state. And with more of
    them than tokens are computed at once, the compute buffer grows for a step of one token each."""
    if recurrent or info.window:
        return 2 * slots
    return max(slots, min(SMALL_MICRO_BATCH, slots + _IDLE_ROWS_BYTES // (4 * info.n_vocab)))
