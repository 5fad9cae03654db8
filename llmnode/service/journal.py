"""Talks to systemd's journal in its own protocol: an entry is one datagram of fields, to be found by each of them.

Source: "Native Journal Protocol" (systemd.io/JOURNAL_NATIVE_PROTOCOL). A field is `NAME=value` and a newline; a value
with a newline in it is written as `NAME`, a newline, its length in 8 bytes, the value and a newline.

Refuses to know what is said, and what to do when nobody listens: OSError is the caller's.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

SOCKET = "/run/systemd/journal/socket"
OURS = "LLMRACK_"
"""Begins the names of fields that are not systemd's own."""
_LONGEST = 48 * 1024
"""Bytes of a value. A datagram must fit into a socket's buffer (some 200 KiB); what is longer is cut."""
_PATIENCE_S = 1.0
"""A journal that takes nothing for so long is taken for gone."""


class Journal:
    """A way to the journal. Thread-safe: each entry is one call of the system."""

    def __init__(self, identifier: str) -> None:
        """identifier: SYSLOG_IDENTIFIER of all entries."""
        self._head = _field("SYSLOG_IDENTIFIER", identifier)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_PATIENCE_S)

    def send(self, message: str, priority: int, fields: Mapping[str, Any]) -> None:
        """Write an entry. priority: syslog's, 0 to 7. fields: by any names; None is left out, and names become upper
        case behind LLMRACK_. Raises OSError."""
        parts = [self._head, _field("MESSAGE", message), _field("PRIORITY", str(priority))]
        parts += [_field(_name(name), _text(value)) for name, value in fields.items() if value is not None]
        self._socket.sendto(b"".join(parts), SOCKET)  # by its name, under which another may listen by now

    def close(self) -> None:
        self._socket.close()


def is_stream(fd: int, environ: Mapping[str, str]) -> bool:
    """Whether what is written to `fd` goes to the journal: systemd says which file that is (systemd.exec(5),
    $JOURNAL_STREAM)."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


def _name(name: str) -> str:
    return OURS + "".join(c if c.isascii() and c.isalnum() else "_" for c in name).upper()


def _text(value: Any) -> str:
    return ("false", "true")[value] if isinstance(value, bool) else str(value)


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "replace")[:_LONGEST]
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
