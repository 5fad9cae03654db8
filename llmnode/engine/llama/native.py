"""llama.cpp's shared libraries. The only file that imports llama_cpp.

Owns: loading the libraries and their plug-ins, the version they must have, their log, their devices, and what happens
when they abort the process. Refuses to know: models, contexts, options.

The binding is used below its high-level classes: its structs and functions only. Struct layouts and signatures change
between releases, so `native` asserts the exact version that this package was written against.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp

from llmnode.engine.backend import ModelLoadError
from llmnode.wire.node import Device

VERSION = "0.3.36"
CANNOT_GO_ON = 5
"""The exit code of a process whose engine cannot go on (docs/architecture.md)."""
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_UNSAFE_CPU = "sapphirerapids"
"""The one CPU plug-in with AMX. GCC 12 drops most of its tile configuration (its _tile_loadconfig tells the compiler
that 8 of the 64 bytes are read), so the first batch of two tokens ends the process with SIGILL. The next best plug-in
for those CPUs has all of AVX-512 but AMX. A build that has AMX linked in is kept from it by `Native.uses_amx`."""

log = logging.getLogger(__name__)


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
    on_abort: called with llama.cpp's reason, on whichever thread it happened, before the library ends the process by
        SIGABRT (a failed assertion, a CUDA error). It should not return.
    """

    api: Any
    ggml: Any
    complaints: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    on_abort: Callable[[str], None] = field(default=lambda reason: leave(reason))

    def __post_init__(self) -> None:
        self._listener = self.api.llama_log_callback(self._listen)
        self._severity = 0
        self._ears: list[list[str]] = []
        self.api.llama_log_set(self._listener, None)
        self._last_words = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._abort)
        self.ggml.ggml_set_abort_callback.restype = ctypes.c_void_p
        self.ggml.ggml_set_abort_callback(self._last_words)
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

    @contextmanager
    def listening(self) -> Iterator[list[str]]:
        """Collects every line that llama.cpp logs inside the block, whatever its level."""
        lines: list[str] = []
        self._ears.append(lines)
        try:
            yield lines
        finally:
            self._ears = [ear for ear in self._ears if ear is not lines]

    def _listen(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level != _LOG_CONTINUED:
            self._severity = level
        if not line or line == ".":
            return
        for ear in self._ears:
            ear.append(line)
        if self._severity >= _LOG_WARNING:
            self.complaints.append(line)
        log.log(_LOG_LEVELS.get(self._severity, logging.DEBUG), "%s", line)

    def _abort(self, text: bytes) -> None:
        self.on_abort(" ".join(text.decode("utf-8", "replace").split()))


def leave(reason: str) -> None:
    """End the process at once, with the reason in its log. Nothing after a failed assertion can be trusted."""
    log.critical("llama.cpp cannot go on: %s", reason)
    logging.shutdown()
    os._exit(CANNOT_GO_ON)


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
