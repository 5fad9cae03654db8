"""What to load and how, as asked (`LlamaOptions`) and as it came out (`Chosen`).

Owns: names of cache types and flash attention, and what the zeros of an option stand for. Refuses to know: llama.cpp's
structs, files, devices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmnode.engine.backend import ModelLoadError

CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}
"""Names and numbers of enum ggml_type (ggml/include/ggml.h) that a cache can have."""

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
"""enum llama_flash_attn_type of llama.h."""

KV_UNIFIED = ("auto", "on", "off")

MICRO_BATCH = 512
"""Tokens that llama.cpp computes at once; a longer batch is cut. Compute buffers grow with it, speed no longer does."""

SMALL_MICRO_BATCH = 128
"""The same where plain attention computes on a CPU: scores of every head, cell and token are kept, and 128 tokens at
once prefill as fast as 512 (3177 against 3065 tokens a second with 15M parameters)."""


@dataclass(frozen=True)
class LlamaOptions:
    """What to load and how. Zeros choose, and `Chosen` tells what: n_ctx min(trained, 4096); kv_cells slots * n_ctx;
    threads physical cores; threads_batch as threads; sequences what `parameters.py` finds affordable.

    n_gpu_layers: -1 is all of them where there is a GPU and none where there is not.
    devices: GPUs by UUID, PCI address or llama.cpp's name; empty is all.   tensor_split: share of each device.
    flash_attn: auto, on or off. `parameters.flash_attention` says what auto comes to.
    cache_type_k, cache_type_v: how keys and values are kept, by a name of CACHE_TYPES. Quantised values need flash
        attention.
    swa_full: keep all cells of sliding-window layers: costs memory, and any prefix can be reused.
    kv_unified: one cache for all sequences (on), a part for each (off), or what suits model and sizes (auto): see
        `parameters.py`.
    sequences: sequences that can be held, answered or idle.
    mmap: map the weights from the file rather than read them.   mlock: keep them from being swapped out.
    pooling: how a pooling context makes one vector of a text (pooling.POOLINGS); `model` is what the model says. There,
        slots are texts computed at once, n_ctx the tokens in one of them at most.
    fit_check: refuse a model that cannot fit the memory before it is loaded (fit.py).
    """

    path: Path
    slots: int = 4
    n_ctx: int = 0
    kv_cells: int = 0
    n_batch: int = 512
    threads: int = 0
    n_gpu_layers: int = -1
    tensor_split: tuple[float, ...] = ()
    devices: tuple[str, ...] = ()
    flash_attn: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    swa_full: bool = False
    kv_unified: str = "auto"
    threads_batch: int = 0
    sequences: int = 0
    mmap: bool = True
    mlock: bool = False
    pooling: str = "model"
    fit_check: bool = True


@dataclass(frozen=True)
class Chosen:
    """What a loaded backend runs with, where options left it open.

    flash_attention, kv_unified: what `auto` came to.      kv_cells: rounded up to what llama.cpp makes of it.
    micro_batch: tokens computed at once; a batch of n_batch is cut into such parts.
    """

    threads: int
    threads_batch: int
    flash_attention: bool
    cache_type_k: str
    cache_type_v: str
    kv_unified: bool
    n_ctx: int
    kv_cells: int
    n_batch: int
    micro_batch: int
    sequences: int
    rows: int
    devices: tuple[str, ...]


def check(options: LlamaOptions) -> None:
    """Raise ModelLoadError for names that do not exist and for combinations that llama.cpp cannot compute."""
    for name in ("cache_type_k", "cache_type_v"):
        value = getattr(options, name)
        if value not in CACHE_TYPES:
            raise ModelLoadError(f"{name} is {value!r}; the types of a cache are {', '.join(CACHE_TYPES)}")
    if options.flash_attn not in FLASH_ATTENTION:
        raise ModelLoadError(f"flash_attn is {options.flash_attn!r}; it can be {', '.join(FLASH_ATTENTION)}")
    if options.kv_unified not in KV_UNIFIED:
        raise ModelLoadError(f"kv_unified is {options.kv_unified!r}; it can be {', '.join(KV_UNIFIED)}")
    if options.cache_type_v.startswith("q") and options.flash_attn == "off":
        raise ModelLoadError(
            f"cache_type_v is {options.cache_type_v} and flash_attn is off: quantised values need flash attention"
        )


def physical_cores() -> int:
    """Cores this process may use; hyper-threads do not help matrix products."""
    return max(1, min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0))))
