"""llama.cpp behind the seam of backend.py. The only file that imports llama_cpp.

Owns: loading (the library's plug-ins, the model, the context), devices, and the translation of chunks into llama.cpp's
batches. Refuses to know: requests, scheduling, sampling.

The binding is used below its high-level classes: its structs and functions only. Struct layouts and signatures change
between releases, so `native` asserts the exact version that this file was written against.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import llama_cpp
import numpy as np
import psutil

from llmnode.engine.backend import BAD_BATCH, Chunk, ModelLoadError, Room
from llmnode.engine.types import ModelInfo
from llmnode.wire.node import Device

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = "0.3.36"
_MICRO_BATCH = 512
_DEFAULT_CONTEXT = 4096
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_UNSAFE_CPU = "sapphirerapids"
"""The one CPU plug-in with AMX. GCC 12 drops most of its tile configuration (its _tile_loadconfig tells the compiler
that 8 of the 64 bytes are read), so the first batch of two tokens ends the process with SIGILL. The next best plug-in
for those CPUs has all of AVX-512 but AMX. A build that has AMX linked in is kept from it by `Native.uses_amx`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlamaOptions:
    """What to load and how. Zeros choose: n_ctx min(trained, 4096); kv_cells slots * n_ctx; threads physical cores.

    n_gpu_layers: -1 is all of them where there is a GPU and none where there is not.
    devices: GPUs by UUID, PCI address or llama.cpp's name; empty is all.   tensor_split: share of each device.
    flash_attn: auto, on or off.
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


def load(options: LlamaOptions, progress: Callable[[float], None] = lambda done: None) -> LlamaBackend:
    """Load a model and make a context for it. Takes as long as reading the file: do it in a thread.

    progress: called with 0.0 to 1.0 on the calling thread; what it raises ends the load and comes out of here.
    Raises ModelLoadError when the file, a device or a size cannot be used.
    """
    library = native()
    check_file(options.path)
    chosen = _choose_devices(options, library.devices())
    with _Model(library, options, chosen, progress) as model:
        return LlamaBackend(library, model, options, chosen)


def inspect(path: Path) -> ModelInfo:
    """What a GGUF says of itself, without reading its weights. Raises ModelLoadError when it is not a whole GGUF."""
    library = native()
    check_file(path)
    with _Model(library, LlamaOptions(path, n_gpu_layers=0), (), lambda done: None, only_look=True) as model:
        return model.info()


def plan(options: LlamaOptions) -> tuple[ModelInfo, Room]:
    """What `load` would serve of these options, without reading weights. Raises ModelLoadError as `load` does."""
    info = inspect(options.path)
    _choose_devices(options, native().devices())
    return info, _room(options, info)


def devices() -> tuple[Device, ...]:
    """What llama.cpp could compute on here, with the memory in use now."""
    return tuple(found.device for found in native().devices())


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


class LlamaBackend:
    """A model and one context over it. See backend.Backend for what each method promises."""

    def __init__(self, library: Native, model: _Model, options: LlamaOptions, chosen: Sequence[Found]) -> None:
        self.info = model.info()
        room = _room(options, self.info)
        if room.slots > library.api.llama_max_parallel_sequences():
            most = library.api.llama_max_parallel_sequences()
            raise ModelLoadError(f"slots is {room.slots}; llama.cpp holds {most} sequences at most")
        self._api, self._vocab = library.api, model.vocab
        self._context: Any = model.context(room, options)
        self._memory = self._api.llama_get_memory(self._context)
        self.room = Room(room.slots, room.n_ctx, self._api.llama_n_ctx(self._context), room.n_batch)
        self.pieces: Sequence[bytes] = model.pieces()
        self.end_tokens = frozenset(
            token for token in range(self.info.n_vocab) if self._api.llama_vocab_is_eog(self._vocab, token)
        )
        self.devices = tuple(found.device for found in chosen)
        self._get_logits = library.get_logits
        self._batch = _Batch(self.room)
        self._rows = 0
        self._views: dict[int, tuple[int, NDArray[np.float32]]] = {}
        self._warm_up(options.path, library)
        self._model: _Model | None = model.keep()

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        data = text.encode()
        size = len(data) + 2  # a token has at least one byte; some vocabularies put a space in front
        ids = (ctypes.c_int32 * size)()
        count = self._api.llama_tokenize(self._vocab, data, len(data), ids, size, False, special)
        if count < 0:
            raise ValueError(f"{len(data)} bytes of text cannot be tokenized")
        return ids[:count]

    def decode(self, chunks: Sequence[Chunk]) -> int:
        self._rows = self._batch.fill(chunks)
        if self._rows < 0:
            return BAD_BATCH
        code = int(self._api.llama_decode(self._context, self._batch.struct))
        # A GPU may still be at it. Waiting here keeps the measured rates true, and they decide what counts as stuck.
        self._api.llama_synchronize(self._context)
        return code

    def logits(self) -> NDArray[np.float32]:
        # llama.cpp keeps the rows of a decode in one block, in batch order, and seldom moves it.
        address, view = self._views.get(self._rows, (0, None))
        now = self._get_logits(self._context)
        if view is None or address != now:
            block = (ctypes.c_float * (self._rows * self.info.n_vocab)).from_address(now)
            view = np.ctypeslib.as_array(block).reshape(self._rows, self.info.n_vocab)
            self._views[self._rows] = now, view
        return view

    def seq_length(self, seq: int) -> int:
        return int(self._api.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def seq_remove(self, seq: int, start: int = 0) -> bool:
        return bool(self._api.llama_memory_seq_rm(self._memory, seq, start, -1))

    def seq_copy(self, source: int, target: int, length: int) -> None:
        self._api.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def close(self) -> None:
        if self._model is None:
            return
        self._views.clear()
        self._api.llama_free(self._context)
        self._model.free()
        self._model = None

    def _warm_up(self, path: Path, library: Native) -> None:
        """One decode, thrown away: reads the weights in, and finds out here whether this device can compute at all."""
        library.complaints.clear()
        code = self.decode([Chunk(0, 0, [0], True)])
        if code != 0:
            self._api.llama_free(self._context)
            raise ModelLoadError(f"{path}: a first decode ended with code {code}: {library.reason()}")
        self.seq_remove(0)


class _Batch:
    """A llama_batch whose fields are numpy arrays that we own: 512 tokens in 4 us; a loop over ctypes takes 740."""

    def __init__(self, room: Room) -> None:
        size = room.n_batch
        self._token = np.zeros(size, np.int32)
        self._position = np.zeros(size, np.int32)
        self._sequence = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._ones = np.ones(size, np.int32)
        self._pointers = (self._sequence.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        self._ramp = np.arange(room.kv_cells + 1, dtype=np.int32)
        self.struct = llama_cpp.llama_batch(
            token=_pointer(self._token, ctypes.c_int32),
            pos=_pointer(self._position, ctypes.c_int32),
            n_seq_id=_pointer(self._ones, ctypes.c_int32),
            seq_id=_pointer(self._pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def fill(self, chunks: Sequence[Chunk]) -> int:
        """Write the chunks into the batch. Returns how many rows of logits they want, -1 when they do not fit."""
        begin = rows = 0
        for seq, start, tokens, wanted in chunks:
            count = len(tokens)
            end = begin + count
            if end > len(self._token) or start + count >= len(self._ramp):
                return -1
            self._token[begin:end] = tokens
            self._position[begin:end] = self._ramp[start : start + count]
            self._sequence[begin:end] = seq
            self._wanted[begin:end] = 0
            if wanted:
                self._wanted[end - 1] = 1
                rows += 1
            begin = end
        self.struct.n_tokens = begin
        return rows


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


class _Model:
    """A loaded model. As a context manager it is freed on the way out, unless `keep` was called."""

    def __init__(
        self,
        library: Native,
        options: LlamaOptions,
        chosen: Sequence[Found],
        progress: Callable[[float], None],
        *,
        only_look: bool = False,
    ) -> None:
        self._api, self._library, self._path, self._kept = library.api, library, options.path, False
        raised: list[BaseException] = []

        def report(done: float, _: Any) -> bool:
            try:
                progress(done)
            except BaseException as error:  # it cannot pass through C
                raised.append(error)
            return not raised

        parameters = self._api.llama_model_default_params()
        parameters.n_gpu_layers = options.n_gpu_layers
        parameters.vocab_only = only_look
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
        self._pointer: Any = self._api.llama_model_load_from_file(os.fsencode(options.path), parameters)
        if raised:
            self.free()
            raise raised[0]
        if not self._pointer:
            raise ModelLoadError(f"{options.path}: {library.reason()}")
        self.vocab = self._api.llama_model_get_vocab(self._pointer)

    def __enter__(self) -> _Model:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self.free()

    def keep(self) -> _Model:
        self._kept = True
        return self

    def free(self) -> None:
        if self._pointer:
            self._api.llama_model_free(self._pointer)
            self._pointer = None

    def info(self) -> ModelInfo:
        api, model, vocab = self._api, self._pointer, self.vocab
        template = api.llama_model_chat_template(model, None)
        architecture = self._metadata("general.architecture")
        return ModelInfo(
            name=self._metadata("general.name") or self._path.stem,
            architecture=architecture,
            n_vocab=api.llama_vocab_n_tokens(vocab),
            n_ctx_train=int(self._metadata(f"{architecture}.context_length") or 0),
            n_params=api.llama_model_n_params(model),
            size_bytes=self._path.stat().st_size,
            chat_template=template.decode("utf-8", "replace") if template else "",
            bos=self._token_text(api.llama_vocab_bos(vocab)),
            eos=self._token_text(api.llama_vocab_eos(vocab)),
            add_bos=api.llama_vocab_get_add_bos(vocab),
            cell_bytes=self._cell_bytes(architecture),
        )

    def _cell_bytes(self, architecture: str) -> int:
        """Keys and values of one token in all layers, as 16-bit floats; 0 when the metadata do not say it plainly."""
        names = ("block_count", "attention.head_count", "attention.head_count_kv", "embedding_length")
        texts = [self._metadata(f"{architecture}.{name}") for name in names]
        if not all(text.isdigit() and int(text) for text in texts):
            return 0
        layers, heads, kv_heads, width = map(int, texts)
        lengths = (self._metadata(f"{architecture}.attention.{name}_length") for name in ("key", "value"))
        return sum(2 * layers * kv_heads * int(length or width // heads) for length in lengths)

    def context(self, room: Room, options: LlamaOptions) -> Any:
        """Make the context. Raises ModelLoadError when it does not fit the memory or the model cannot generate."""
        if not self._api.llama_model_has_decoder(self._pointer):
            raise ModelLoadError(f"{self._path}: is a model that cannot generate text")
        threads = options.threads or _physical_cores()
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = room.kv_cells
        parameters.n_batch = room.n_batch
        parameters.n_ubatch = min(room.n_batch, _MICRO_BATCH)
        parameters.n_seq_max = room.slots
        # At most one row of logits per sequence: without this, room for n_batch rows is set aside.
        parameters.n_outputs_max = room.slots
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = _FLASH_ATTENTION[options.flash_attn]
        parameters.kv_unified = True
        parameters.no_perf = True
        self._library.complaints.clear()
        context = self._api.llama_init_from_model(self._pointer, parameters)
        if not context:
            wanted = f"a context of {room.kv_cells} cells for {room.slots} sequences"
            raise ModelLoadError(f"{self._path}: {wanted} cannot be made: {self._library.reason()}")
        return context

    def pieces(self) -> list[bytes]:
        """The bytes of every token as text, once: asking at each token would cost 5 us."""
        buffer = ctypes.create_string_buffer(1024)
        pieces = []
        for token in range(self._api.llama_vocab_n_tokens(self.vocab)):
            size = self._api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = self._api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            pieces.append(buffer.raw[:size])
        return pieces

    def _metadata(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        size = self._api.llama_model_meta_val_str(self._pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if size > 0 else ""

    def _token_text(self, token: int) -> str:
        return self._api.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace") if token >= 0 else ""


class Found(NamedTuple):
    """A device and llama.cpp's handle for it. `is_gpu`: a model's layers can be put there."""

    handle: int
    device: Device
    address: str
    is_gpu: bool

    def answers_to(self, name: str) -> bool:
        return name in (self.device.uuid, self.address, self.device.name)


@dataclass
class Native:
    """The shared libraries, ready for use. There is one of each in a process, so there is one of these: `native()`.

    complaints: what llama.cpp said as a warning or error lately.
    """

    api: Any
    ggml: Any
    complaints: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def __post_init__(self) -> None:
        self._listener = self.api.llama_log_callback(self._listen)
        self._severity = 0
        self.api.llama_log_set(self._listener, None)
        self.get_logits = self.api._lib["llama_get_logits"]  # a handle of our own: the address is all we need
        self.get_logits.argtypes, self.get_logits.restype = [ctypes.c_void_p], ctypes.c_void_p
        self.ggml.ggml_backend_load.argtypes, self.ggml.ggml_backend_load.restype = [ctypes.c_char_p], ctypes.c_void_p
        self.ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
        self.ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
        self.ggml.ggml_backend_dev_backend_reg.argtypes = [ctypes.c_void_p]
        self.ggml.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
        self.ggml.ggml_backend_reg_name.restype = ctypes.c_char_p
        self.ggml.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
        self.ggml.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        for function in (
            self.ggml.ggml_backend_dev_get,
            self.ggml.ggml_backend_dev_backend_reg,
            self.ggml.ggml_backend_reg_by_name,
            self.ggml.ggml_backend_reg_get_proc_address,
        ):
            function.restype = ctypes.c_void_p
        self.ggml.ggml_backend_dev_get_props.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Properties)]

    def load_plugins(self, folder: Path) -> None:
        """Load every GPU plug-in and the CPU plug-in that suits this CPU best, by the score that each gives itself."""
        best, best_score = None, 0
        for plugin in sorted(folder.glob("libggml-*.so")):
            if not plugin.name.startswith("libggml-cpu-"):
                self.ggml.ggml_backend_load(os.fsencode(plugin))
            elif not plugin.stem.endswith(_UNSAFE_CPU):
                score = ctypes.CDLL(str(plugin)).ggml_backend_score()
                best, best_score = (plugin, score) if score > best_score else (best, best_score)
        if best is not None:
            log.info("CPU plug-in: %s", best.stem)
            self.ggml.ggml_backend_load(os.fsencode(best))

    def uses_amx(self) -> bool:
        """Whether the CPU backend would put weights where AMX computes with them (see _UNSAFE_CPU)."""
        cpu = self.ggml.ggml_backend_reg_by_name(b"CPU")
        address = self.ggml.ggml_backend_reg_get_proc_address(cpu, b"ggml_backend_get_features") if cpu else None
        if not address:
            return False
        features = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)(cpu)
        index = 0
        while features[index].name not in (None, b"AMX_INT8"):
            index += 1
        return features[index].name is not None

    def devices(self) -> list[Found]:
        found = []
        for index in range(self.ggml.ggml_backend_dev_count()):
            handle = self.ggml.ggml_backend_dev_get(index)
            said = _Properties()
            self.ggml.ggml_backend_dev_get_props(handle, ctypes.byref(said))
            address = (said.device_id or b"").decode()
            device = Device(
                backend=self.ggml.ggml_backend_reg_name(self.ggml.ggml_backend_dev_backend_reg(handle)).decode(),
                name=said.name.decode(),
                uuid=nvidia_uuid(address),
                memory_total_bytes=said.memory_total,
                memory_used_bytes=max(0, said.memory_total - said.memory_free),
            )
            found.append(Found(handle, device, address, said.type in _GPU_TYPES))
        return found

    def reason(self) -> str:
        """Why the last call failed, in llama.cpp's own words."""
        return "; ".join(dict.fromkeys(self.complaints)) or "llama.cpp gave no reason"

    def _listen(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level != _LOG_CONTINUED:
            self._severity = level
        if not line or line == ".":
            return
        if self._severity >= _LOG_WARNING:
            self.complaints.append(line)
        log.log(_LOG_LEVELS.get(self._severity, logging.DEBUG), "%s", line)


@cache
def native() -> Native:
    """Load llama.cpp's plug-ins, take over its log, and check that the binding is the one this file was written for.

    A portable build keeps its backends in plug-ins that nothing loads by itself. They must be loaded through
    libggml.so.0, the copy that libllama itself is linked to: through libggml.so they land in a second registry.
    A plain native build has its backends linked in and none to load.
    """
    if llama_cpp.__version__ != VERSION:
        raise ModelLoadError(f"llama-cpp-python {VERSION} is needed, {llama_cpp.__version__} is installed")
    package = Path(llama_cpp.__file__).parent
    library = package / "lib" / "libggml.so.0"
    if not library.exists():
        raise ModelLoadError(f"{library} is missing: this llama-cpp-python was built without shared libraries")
    found = Native(llama_cpp.llama_cpp, ctypes.CDLL(str(library)))
    found.api.llama_backend_init()
    plugins = package.parent / "bin"
    if found.ggml.ggml_backend_dev_count() == 0:
        found.load_plugins(plugins)
    if found.ggml.ggml_backend_dev_count() == 0:
        raise ModelLoadError(f"llama.cpp finds no device to compute on, not even the CPU; plug-ins sought in {plugins}")
    return found


def nvidia_uuid(address: str, known: Path = _NVIDIA) -> str:
    """The UUID of the GPU at a PCI address, as the driver tells it; empty when it does not. Needs no CUDA call."""
    try:
        lines = (known / address.lower() / "information").read_text().splitlines() if address else []
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("GPU UUID")), "")


def _choose_devices(options: LlamaOptions, known: Sequence[Found]) -> list[Found]:
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


def _room(options: LlamaOptions, info: ModelInfo) -> Room:
    n_ctx = options.n_ctx or min(info.n_ctx_train, _DEFAULT_CONTEXT)
    if n_ctx > info.n_ctx_train:
        raise ModelLoadError(f"n_ctx is {n_ctx}; {options.path} was trained for {info.n_ctx_train} tokens")
    try:
        return Room(options.slots, n_ctx, options.kv_cells or options.slots * n_ctx, options.n_batch)
    except ValueError as error:
        raise ModelLoadError(str(error)) from error


def _physical_cores() -> int:
    """Cores this process may use; hyper-threads do not help matrix products."""
    return max(1, min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0))))


# ggml/include/ggml.h, enum ggml_log_level.
_LOG_WARNING, _LOG_CONTINUED = 3, 5
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}

# ggml/include/ggml-backend.h, enum ggml_backend_dev_type: GPU and integrated GPU.
_GPU_TYPES = (1, 2)


class _Feature(ctypes.Structure):
    """struct ggml_backend_feature of ggml/include/ggml-backend.h."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


class _Capabilities(ctypes.Structure):
    """struct ggml_backend_dev_caps of ggml/include/ggml-backend.h."""

    _fields_ = [
        ("async_", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
    ]


class _Properties(ctypes.Structure):
    """struct ggml_backend_dev_props of ggml/include/ggml-backend.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", _Capabilities),
    ]
