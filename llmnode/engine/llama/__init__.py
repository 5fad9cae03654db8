"""llama.cpp behind the seam of backend.py. Nothing outside this package imports llama_cpp, inside it native.py alone.

native.py   the shared libraries, their log, devices        options.py  what to load and how
model.py    a GGUF in memory                                parameters.py  from options to a context
context.py  one context as a Backend                        batch.py    chunks as llama.cpp's batch
pooling.py  one context as a PoolingBackend                 saved.py    the seal on a saved sequence
fit.py      what is taken of the memory, before it is       tensors.py  names and sizes of a GGUF's tensors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llmnode.engine.backend import ModelLoadError, Room
from llmnode.engine.llama.context import LlamaBackend
from llmnode.engine.llama.fit import Fit, pooling_parts, refuse, sum_up
from llmnode.engine.llama.fit import estimate as fit_of
from llmnode.engine.llama.model import Model, check_file, choose_devices
from llmnode.engine.llama.native import Found, Native, leave, native, nvidia_uuid
from llmnode.engine.llama.options import CACHE_TYPES, Chosen, LlamaOptions, check
from llmnode.engine.llama.parameters import plan_room
from llmnode.engine.llama.pooling import LlamaPooling, open_pooling, pooling_kind, pooling_room
from llmnode.engine.types import ModelInfo
from llmnode.wire.node import Device

__all__ = [
    "CACHE_TYPES",
    "Chosen",
    "Estimate",
    "Fit",
    "LlamaBackend",
    "LlamaOptions",
    "LlamaPooling",
    "ModelLoadError",
    "PoolingEstimate",
    "check_file",
    "devices",
    "estimate",
    "estimate_pooling",
    "inspect",
    "load",
    "load_pooling",
    "nvidia_uuid",
    "plan",
    "purpose",
]


class Estimate(NamedTuple):
    """What `load` would make of some options. fit: what that takes of the memory, and whether it is free."""

    info: ModelInfo
    room: Room
    chosen: Chosen
    fit: Fit


class PoolingEstimate(NamedTuple):
    """What `load_pooling` would make of some options: how it pools, and on which devices by name."""

    info: ModelInfo
    room: Room
    pooling: str
    devices: tuple[str, ...]
    fit: Fit


def load(
    options: LlamaOptions,
    progress: Callable[[float], None] = lambda done: None,
    on_abort: Callable[[str], None] = leave,
) -> LlamaBackend:
    """Load a model and make a context for it. Takes as long as reading the file: do it in a thread.

    progress: called with 0.0 to 1.0 on the calling thread; what it raises ends the load and comes out of here.
    on_abort: called with the reason when llama.cpp ends the process (a failed assertion, a CUDA error), from then on
        and for the whole process. By default the reason is logged and the process leaves with exit code 5.
    Raises ModelLoadError when the file, a device or a size cannot be used, or the memory is too small.
    """
    library = native()
    library.on_abort = on_abort
    chosen = _choose(options, library)
    if options.fit_check:
        refuse(options.path, _estimate(options, library, chosen).fit)
    with Model(library, options, chosen, progress) as model:
        return LlamaBackend(model, options, chosen)


def load_pooling(
    options: LlamaOptions,
    progress: Callable[[float], None] = lambda done: None,
    on_abort: Callable[[str], None] = leave,
    *,
    beside: LlamaBackend | None = None,
) -> LlamaPooling:
    """Load a model that makes vectors or scores of texts (`LlamaOptions.pooling`). Arguments and errors as of `load`.

    beside: a backend whose model to use, weights and all, in place of loading `options.path` again. It may be closed
        before or after this one.
    """
    library = native()
    if beside is not None:
        with beside.borrow() as model:
            options = replace(options, path=model.path)
            if options.fit_check:
                with Model(library, options, beside.found, only_look=True) as looked:
                    refuse(options.path, _pooling_fit(options, looked, beside.found, []))
            return LlamaPooling(model, options, beside.found)
    library.on_abort = on_abort
    chosen = _choose(options, library)
    if options.fit_check:
        refuse(options.path, estimate_pooling(options).fit)
    with Model(library, options, chosen, progress) as model:
        return LlamaPooling(model, options, chosen)


def estimate_pooling(options: LlamaOptions) -> PoolingEstimate:
    """What `load_pooling` would make of these options and what it would take, without reading weights. Raises
    ModelLoadError as it does, but for a memory that is too small."""
    library = native()
    chosen = _choose(options, library)
    with library.listening() as lines, Model(library, options, chosen, only_look=True) as model:
        fit = _pooling_fit(options, model, chosen, lines)
        room = pooling_room(options, model.info(), library.api.llama_max_parallel_sequences())
        names = tuple(found.device.name for found in chosen) or ("CPU",)
        return PoolingEstimate(model.info(), room, pooling_kind(model, options.pooling), names, fit)


def inspect(path: Path) -> ModelInfo:
    """What a GGUF says of itself, without reading its weights. Raises ModelLoadError when it is not a whole GGUF."""
    library = native()
    check_file(path)
    with Model(library, LlamaOptions(path, n_gpu_layers=0), (), only_look=True) as model:
        return model.info()


def purpose(path: Path) -> str:
    """What the model in a file was made for: "generate", "embed" or "rerank". Reads no weights. Raises ModelLoadError
    when it is not a whole GGUF."""
    library = native()
    check_file(path)
    with Model(library, LlamaOptions(path, n_gpu_layers=0), (), only_look=True) as model:
        return model.purpose()


def plan(options: LlamaOptions) -> tuple[ModelInfo, Room]:
    """What `load` would serve of these options, without reading weights. Raises ModelLoadError as `load` does, but for
    a memory that is too small."""
    library = native()
    with Model(library, options, _choose(options, library), only_look=True) as model:
        return model.info(), plan_room(options, model)


def estimate(options: LlamaOptions) -> Estimate:
    """What `load` would make of these options and what it would take, without reading weights. Raises ModelLoadError as
    `load` does, but for a memory that is too small: that is `not estimate.fit.fits`."""
    library = native()
    return _estimate(options, library, _choose(options, library))


def devices() -> tuple[Device, ...]:
    """What llama.cpp could compute on here, with the memory in use now."""
    return tuple(found.device for found in native().devices())


def _choose(options: LlamaOptions, library: Native) -> list[Found]:
    check(options)
    check_file(options.path)
    return choose_devices(options, library.devices())


def _estimate(options: LlamaOptions, library: Native, chosen: Sequence[Found]) -> Estimate:
    with library.listening() as lines, Model(library, options, chosen, only_look=True) as model:
        fit, opened = fit_of(options, model, chosen, lines)
        return Estimate(model.info(), opened.room, opened.chosen, fit)


def _pooling_fit(options: LlamaOptions, model: Model, chosen: Sequence[Found], lines: Sequence[str]) -> Fit:
    context, said = open_pooling(model, options, chosen, pooling_kind(model, options.pooling))
    model.library.api.llama_free(context)
    room = pooling_room(options, model.info(), model.library.api.llama_max_parallel_sequences())
    return sum_up(pooling_parts(model, options, chosen, lines, said, room), chosen)
