"""Which tensors a GGUF holds and how many bytes each has, without llama.cpp, which keeps that to itself.

Owns: reading a GGUF's header. Refuses to know: what the tensors are for.

Source: ggml's docs/gguf.md. After the header come key-value pairs, then for each tensor its name, dimensions, type and
offset. A tensor's size is taken as the distance to the next one, which includes up to 31 bytes of padding.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type, for all types but strings and arrays."""
_DEFAULT_ALIGNMENT = 32


def tensor_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor by name, over all files of a split model. Raises ValueError when a header makes no sense."""
    sizes: dict[str, int] = {}
    for part in _parts(path):
        with part.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                sizes |= _sizes(data)
            except (struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
                raise ValueError(f"{part}: its header cannot be read: {error!r}") from error
    return sizes


def _parts(path: Path) -> list[Path]:
    """NAME-00001-of-00003.gguf is the first of three files; llama.cpp opens the others by itself."""
    head, of, count = path.stem.rpartition("-of-")
    if not of or not count.isdigit() or not head.endswith("-00001"):
        return [path]
    stem = head.removesuffix("-00001")
    return [path.with_name(f"{stem}-{index:05}-of-{count}{path.suffix}") for index in range(1, int(count) + 1)]


def _sizes(data: mmap.mmap) -> dict[str, int]:
    _, _, tensors, pairs = struct.unpack_from("<4sIQQ", data, 0)
    at, alignment = 24, _DEFAULT_ALIGNMENT
    for _ in range(pairs):
        key, at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        if key == "general.alignment":
            (alignment,) = struct.unpack_from("<I", data, at)
        at = _skip(data, at, kind)
    places = []
    for _ in range(tensors):
        name, at = _text(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        at += 4 + 8 * dimensions + 4
        (offset,) = struct.unpack_from("<Q", data, at)
        at += 8
        places.append((offset, name))
    places.sort()
    begin = -(-at // alignment) * alignment
    ends = [offset for offset, _ in places[1:]] + [len(data) - begin]
    return {name: end - offset for (offset, name), end in zip(places, ends, strict=True)}


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    return data[at + 8 : end].decode(), end


def _skip(data: mmap.mmap, at: int, kind: int) -> int:
    """Where the value ends that begins at `at`."""
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        return int(at + 8 + length)
    if kind != _ARRAY:
        return at + _WIDTHS[kind]
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner in _WIDTHS:
        return int(at + _WIDTHS[inner] * count)
    for _ in range(count):
        at = _skip(data, at, inner)
    return at
