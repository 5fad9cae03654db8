"""A journal for tests: a real datagram socket, which programs that are started with `environ` take for systemd's."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import wait_for


class FakeJournal:
    """What has come. entries: fields by name, and `raw` the bytes of all of them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.socket"
        self.entries: list[dict[str, str]] = []
        self.raw = b""
        self._folder = folder

    def environ(self, log: Path) -> dict[str, str]:
        """For a program whose standard error goes to the file `log`: that file is its journal's stream, and this the
        journal's socket, wherever a process of it starts."""
        (self._folder / "sitecustomize.py").write_text(
            f"from llmnode.service import journal\njournal.SOCKET = {str(self.path)!r}\n"
        )
        log.touch()
        there = log.stat()
        path = os.pathsep.join([str(self._folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        return {"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino}", "PYTHONPATH": path.rstrip(os.pathsep)}

    def entry(self, **fields: str) -> dict[str, str]:
        """The first entry with these fields, once it is there."""

        def found() -> dict[str, str] | None:
            return next((entry for entry in list(self.entries) if fields.items() <= entry.items()), None)

        return wait_for(found, f"an entry with {fields}; there are {self.entries}")


@contextmanager
def fake_journal(folder: Path) -> Iterator[FakeJournal]:
    """Take entries until the block ends."""
    there = FakeJournal(folder)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(there.path))

        def take() -> None:
            while data := sock.recv(1 << 20):
                there.raw += data
                there.entries.append(read(data))

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield there
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(there.path))
        thread.join()


def read(data: bytes) -> dict[str, str]:
    """The fields of an entry (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    fields = {}
    while data:
        name, sign, rest = data.partition(b"\n")
        if b"=" in name:
            name, _, value = name.partition(b"=")
        else:
            (size,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        assert sign and name.decode().isidentifier() and name == name.upper(), name
        fields[name.decode()] = value.decode()
        data = rest
    return fields
