"""What a model takes of each device's memory, before a byte of its weights is read, and whether that is free.

Owns: the arithmetic and its table. Refuses to know: how to make anything fit.

The sizes are llama.cpp's own: it is asked for the model and the context without allocating either (`no_alloc`), and
names the size of every buffer in its log. Only three things are not in there: how the weights are spread, which comes
from the GGUF's table of tensors and the layers' devices; rows of logits beyond one a sequence; and what the process
itself needs, for which there is the margin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from llmnode.engine.backend import ModelLoadError, Room
from llmnode.engine.llama.model import Model
from llmnode.engine.llama.native import Found
from llmnode.engine.llama.options import LlamaOptions
from llmnode.engine.llama.parameters import Opened, open_context
from llmnode.engine.llama.tensors import tensor_sizes

HOST = "host"
MARGIN_BYTES = 128 * 2**20
MARGIN = 0.05
"""Beside what is counted: the interpreter, threads' stacks, what a device's library takes for itself."""
_CELL_INDEX = 164
"""What llama.cpp notes of a cell that is in use (llama-kv-cells.h): 52 bytes in arrays, the rest as nodes of trees."""
_MIB = 2**20


class Part(NamedTuple):
    """Something that takes memory. device: HOST or a GPU's name. how: the arithmetic, for people."""

    what: str
    device: str
    size: int
    how: str = ""


class Free(NamedTuple):
    """What a device has free, and who says so."""

    size: int
    says: str


@dataclass(frozen=True)
class Fit:
    """The parts, and what is free on each device."""

    parts: tuple[Part, ...]
    free: Mapping[str, Free]

    def need(self, device: str) -> int:
        """Bytes that the parts take there, with the margin."""
        return sum(part.size for part in self.parts if part.device == device) + self._margin(device)

    @property
    def fits(self) -> bool:
        return all(self.need(device) <= free.size for device, free in self.free.items())

    def lines(self) -> list[str]:
        """The sum, one line a part, one a device."""
        rows = []
        for device in self.free:
            for part in (*(part for part in self.parts if part.device == device), self._margin_part(device)):
                rows.append(f"{part.what:<15} {part.device:<8} {_mib(part.size)}  {part.how}".rstrip())
            free, need = self.free[device], self.need(device)
            verdict = "fits in" if need <= free.size else "DOES NOT FIT in"
            rows.append(
                f"{'together':<15} {device:<8} {_mib(need)}  {verdict} {_mib(free.size).strip()} free: {free.says}"
            )
        return rows

    def _margin(self, device: str) -> int:
        counted = sum(part.size for part in self.parts if part.device == device)
        return MARGIN_BYTES + int(MARGIN * counted) if counted else 0

    def _margin_part(self, device: str) -> Part:
        return Part("margin", device, self._margin(device), f"{MARGIN_BYTES // _MIB} MiB and {MARGIN:.0%}")


def estimate(options: LlamaOptions, model: Model, devices: Sequence[Found], lines: Sequence[str]) -> tuple[Fit, Opened]:
    """The fit of a model that was loaded with `only_look`, and the context that told it, which is freed already.

    lines: what llama.cpp logged while it looked at the model. Raises ModelLoadError as making the context does.
    """
    opened = open_context(model, options, devices)
    model.library.api.llama_free(opened.pointer)
    gpus = tuple(found.device.name for found in devices)
    room, n_vocab = opened.room, model.info().n_vocab
    rows = max(room.rows, room.sequences)
    parts = [
        *_weights(model, options, lines, gpus),
        *_cache(opened.lines, gpus),
        *_logged(opened.lines, gpus, "RS", "state", f"{room.sequences} sequences"),
        Part("cell index", HOST, room.kv_cells * _CELL_INDEX, f"{room.kv_cells} cells x {_CELL_INDEX} bytes"),
        *_compute(opened, gpus, n_vocab),
        Part("logits", HOST, rows * n_vocab * 4, f"{rows} rows x {n_vocab} x 4 bytes"),
    ]
    return sum_up(parts, devices), opened


def pooling_parts(
    model: Model,
    options: LlamaOptions,
    devices: Sequence[Found],
    lines: Sequence[str],
    context: Sequence[str],
    room: Room,
) -> list[Part]:
    """The parts of a pooling context, of whose making `context` is the log. lines: of the model's, or nothing where the
    weights are in memory already."""
    gpus = tuple(found.device.name for found in devices)
    wide = model.info().n_vocab + model.library.api.llama_model_n_embd_out(model.pointer)
    at_once = f"{room.n_batch} tokens at once"
    return [
        *(_weights(model, options, lines, gpus) if lines else ()),
        *_cache(context, gpus),
        *_logged(context, gpus, "RS", "state", f"{room.sequences} sequences"),
        *_logged(context, gpus, "compute", "compute buffer", at_once),
        # llama.cpp keeps logits beside the vectors, of every token.
        Part("rows", HOST, room.n_batch * wide * 4, f"{room.n_batch} rows x {wide} x 4 bytes"),
    ]


def sum_up(parts: Sequence[Part], devices: Sequence[Found]) -> Fit:
    """The parts against what is free now."""
    free = {HOST: host_memory()}
    for found in devices:
        said = found.device
        free[said.name] = Free(said.memory_total_bytes - said.memory_used_bytes, f"{said.backend} {said.name}")
    return Fit(tuple(part for part in parts if part.size), free)


def refuse(path: Path, fit: Fit) -> None:
    """Raise ModelLoadError, with the sum, when it does not fit."""
    if not fit.fits:
        raise ModelLoadError(
            "\n  ".join([f"{path}: does not fit the memory (fit_check = false loads it anyway)", *fit.lines()])
        )


def host_memory(proc: Path = Path("/proc/self/cgroup"), tree: Path = Path("/sys/fs/cgroup")) -> Free:
    """What this process may still take: what the machine has available, or less where a control group limits it.

    A group's page cache is given back under pressure, so it counts as free. Source: Linux' cgroup-v2 documentation;
    version 1 (memory.limit_in_bytes) is honoured where it is mounted.
    """
    least = Free(int(psutil.virtual_memory().available), "available on this machine")
    for group in _groups(proc, tree):
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is None:
            limit, used = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
        if limit is None or used is None:
            continue
        left = max(0, limit - used + _reclaimable(group / "memory.stat"))
        if left < least.size:
            least = Free(left, f"{_mib(limit).strip()} allowed by {group}")
    return least


def _groups(proc: Path, tree: Path) -> list[Path]:
    """This process's control groups, each with all that contain it."""
    try:
        entries = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return []
    groups = []
    for _, controllers, path in entries:
        root = tree if not controllers else tree / "memory" if "memory" in controllers.split(",") else None
        if root is not None:
            inner = root / path.strip("/")
            groups += [inner, *(above for above in inner.parents if above == root or root in above.parents)]
    return groups


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit in it ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(stat: Path) -> int:
    try:
        figures = dict(line.split() for line in stat.read_text().splitlines())
        return int(figures.get("active_file", 0)) + int(figures.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0


_LAYER = re.compile(r"layer +(\d+) assigned to device (\S+?),")
_BLOCK = re.compile(r"blk\.(\d+)\.")


def _weights(model: Model, options: LlamaOptions, lines: Sequence[str], gpus: Sequence[str]) -> list[Part]:
    """Where each tensor goes: blocks to their layer's device, the output to the one after the last, the rest stays."""
    places = {int(match[1]): match[2] if match[2] in gpus else HOST for match in map(_LAYER.search, lines) if match}
    output = places[max(places)] if places else HOST
    sums: dict[str, int] = {}
    counts: dict[str, int] = {}
    try:
        sizes = tensor_sizes(model.path)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{model.path}: the sizes of its tensors cannot be read: {error}") from error
    for name, size in sizes.items():
        block = _BLOCK.match(name)
        device = places.get(int(block[1]), HOST) if block else output if name.startswith("output") else HOST
        sums[device], counts[device] = sums.get(device, 0) + size, counts.get(device, 0) + 1
    if output != HOST and "output.weight" not in sizes:
        sums[output] = sums.get(output, 0) + sizes.get("token_embd.weight", 0)  # the same matrix, a second time
    kept = {HOST: "mapped from the file" if options.mmap else "read from the file"}
    return [
        Part("weights", device, size, f"{counts.get(device, 0)} tensors {kept.get(device, '')}".strip())
        for device, size in sums.items()
    ]


_CACHE_LAYER = re.compile(r"layer +\d+: dev = (\S+)")
_CACHE = re.compile(
    r"size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers, *\d+/(\d+) seqs\), K \((\w+)\): .*, V \((\w+)\): "
)


def _cache(lines: Sequence[str], gpus: Sequence[str]) -> list[Part]:
    """One part for each cache and device. A cache's layers are named one by one before its size is."""
    parts: list[Part] = []
    layers: list[str] = []
    for line in lines:
        if not line.startswith("llama_kv_cache:"):
            continue
        if layer := _CACHE_LAYER.search(line):
            layers.append(layer[1] if layer[1] in gpus else HOST)
        elif found := _CACHE.search(line):
            size, cells, count, parts_of_it, keys, values = found.groups()
            for device in dict.fromkeys(layers):
                share = layers.count(device)
                how = f"{int(cells) * int(parts_of_it)} cells x {share} layers, keys {keys}, values {values}"
                parts.append(Part("cache", device, int(float(size) * _MIB * share / int(count)), how))
            layers.clear()
    return parts


def _logged(lines: Sequence[str], gpus: Sequence[str], kind: str, what: str, how: str = "") -> list[Part]:
    """Buffers that llama.cpp names with their size, like `CPU compute buffer size = 10.76 MiB`."""
    pattern = re.compile(rf": +(\S+) +{kind} buffer size = +([\d.]+) MiB")
    found = [match.groups() for match in map(pattern.search, lines) if match]
    return [Part(what, name if name in gpus else HOST, int(float(size) * _MIB), how) for name, size in found]


def _compute(opened: Opened, gpus: Sequence[str], n_vocab: int) -> list[Part]:
    """llama.cpp names what a prefill takes; a step of one token of every sequence may want more rows of logits."""
    at_once, sequences = opened.chosen.micro_batch, opened.room.sequences
    parts = _logged(opened.lines, gpus, "compute", "compute buffer", f"{at_once} tokens at once")
    more = 4 * n_vocab * max(0, sequences - at_once)
    if not more or not parts:
        return parts
    # They are computed where the output layer is: the last GPU, or the host.
    last = max(
        range(len(parts)), key=lambda index: gpus.index(parts[index].device) if parts[index].device in gpus else -1
    )
    parts[last] = parts[last]._replace(size=parts[last].size + more, how=f"a token of {sequences} sequences at once")
    return parts


def _mib(size: int) -> str:
    return f"{size / _MIB:10,.1f} MiB"
