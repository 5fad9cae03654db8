"""Hot prefixes on disk, from one process of a node to its next: a file of saved sequences.

Owns: the file. Refuses to know: which prefixes are hot, and what is in their cells. They are users' prompts, so the
file is readable by its owner only, and one that does not match this model and these options is erased, not kept for
later.

Layout: a line of JSON {"format", "fingerprint", "entries": [{"length", "bytes", "crc32"}, ...]}, then for each entry
its token ids (32-bit, this machine's order) and its cells. Written beside its place, flushed to disk and renamed, so
that there is always a whole file or none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from llmnode.engine.host import Entry, HostCache

FORMAT = 1
_LONGEST_HEAD = 1 << 20

log = logging.getLogger(__name__)


class Snapshot:
    """`path` of the file, the `budget` in bytes for it, and the `fingerprint` of what its cells are good for."""

    def __init__(self, path: Path, budget: int, fingerprint: str) -> None:
        self._path, self._budget, self._fingerprint = path, budget, fingerprint

    def save(self, entries: Iterable[Entry]) -> int:
        """Write as many of the entries as the budget holds, the first ones first; returns how many. Never raises."""
        kept: list[Entry] = []
        size = 0
        for entry in entries:
            if entry.saved and size + entry.size <= self._budget:
                kept.append(entry)
                size += entry.size
        try:
            self._write(kept)
        except OSError as error:
            log.error("%s: prefixes could not be saved: %s", self._path, error.strerror)
            return 0
        log.info("%d prefixes saved for the next start, %.1f MB", len(kept), size / 1e6)
        return len(kept)

    def load(self, host: HostCache) -> int:
        """Put what the file holds into host RAM; returns how many entries. A file that does not match, or is not
        whole, is erased. Never raises."""
        try:
            with self._path.open("rb") as file:
                entries = list(self._read(file))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            log.warning("%s is erased: %s", self._path, error)
            self.erase()
            return 0
        for entry in reversed(entries):
            host.put(entry.tokens, entry.length, entry.saved, extends=False)
        log.info("%d prefixes of the last run are at hand", len(host))
        return len(host)

    def erase(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _write(self, entries: list[Entry]) -> None:
        part = self._path.with_name(self._path.name + ".part")
        head = {"format": FORMAT, "fingerprint": self._fingerprint, "entries": [_describe(entry) for entry in entries]}
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for entry in entries:
                file.write(entry.tokens[: entry.length].tobytes())
                file.write(entry.saved)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)

    def _read(self, file: BinaryIO) -> Iterable[Entry]:
        try:
            head = json.loads(file.readline(_LONGEST_HEAD))
            about = [(int(e["length"]), int(e["bytes"]), int(e["crc32"])) for e in head["entries"]]
            matches = head["format"] == FORMAT and head["fingerprint"] == self._fingerprint
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError("it is not a file of saved prefixes") from error
        if not matches:
            raise ValueError("it was written for another model or other options")
        for length, size, check in about:
            if size < 0 or length < 1 or size > self._budget:
                raise ValueError("an entry is larger than the budget")
            tokens = array("i")
            tokens.frombytes(file.read(length * tokens.itemsize))
            saved = bytearray(size)
            if len(tokens) != length or file.readinto(saved) != size:  # type: ignore[attr-defined]
                raise ValueError("it is cut off")
            if _checksum(tokens, length, saved) != check:
                raise ValueError("an entry does not match its checksum")
            yield Entry(tokens, length, saved)


def _describe(entry: Entry) -> dict[str, Any]:
    check = _checksum(entry.tokens, entry.length, entry.saved)
    return {"length": entry.length, "bytes": len(entry.saved), "crc32": check}


def _checksum(tokens: array[int], length: int, saved: bytearray) -> int:
    return zlib.crc32(saved, zlib.crc32(tokens[:length].tobytes()))
