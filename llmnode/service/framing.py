"""Which bytes are a request: HTTP/1.1's grammar, word for word, where Sanic's parser is lenient.

A proxy in front that reads one byte differently from the program behind it sees other requests than that program does:
what it took for one client's body is then the beginning of the next client's request (request smuggling). So nothing
is guessed here: a head or a chunk that is not what the grammar says is refused, and the connection is closed.

Source: RFC 9112, sections 2.2 (no bare CR or LF), 3 (the request line; `*` is for OPTIONS), 5 (field lines: no space
before the colon, no folded lines), 6.1 (framing), 7.1 (chunks), and RFC 9110, 5.5 (values) and 5.6.2 (tokens). Pure:
bytes in, a verdict out.
"""

from __future__ import annotations

import re

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEAD = re.compile(
    rb"(?:OPTIONS \*|%b (?!\* )[\x21-\x7e]+) HTTP/1\.[01](?:\r\n%b:[\t\x20-\x7e\x80-\xff]*)*" % (_TOKEN, _TOKEN),
)
_CHUNK = re.compile(rb"\r\n[0-9A-Fa-f]{1,15}(?:[\t ]*;[\t\x20-\x7e\x80-\xff]*)?")
_DECIMAL, _HEX = re.compile(r"[0-9]{1,15}[\t ]*"), re.compile(r"[0-9A-Fa-f]{1,15}[\t ]*")

LONGEST_CHUNK_LINE = 64
"""Bytes of a chunk's size with its extensions, which nobody uses."""
_FREE_CHUNKS = 1000
_LEAST_CHUNK = 16


def is_head(head: bytes) -> bool:
    """Whether this is a request line and field lines, without the empty line that ends them."""
    return _HEAD.fullmatch(head) is not None


def is_chunk_line(line: bytes) -> bool:
    """Whether this is the end of what came before (CR LF) and the size line of a chunk, without its own CR LF."""
    return _CHUNK.fullmatch(line) is not None


def number(value: str, base: int = 10) -> int:
    """A length or a chunk's size. `int` would also take "0x1f", "1_000" and the digits of other scripts. Raises
    ValueError."""
    if not (_HEX if base == 16 else _DECIMAL).fullmatch(value):
        raise ValueError(f"not a length: {value!r}")
    return int(value, base)


def too_fine(chunks: int, size: int) -> bool:
    """Whether a body of `size` bytes until now is cut so fine that taking it apart is all it is for: each chunk costs
    microseconds, so that a buffer full of single bytes would keep everybody waiting for a tenth of a second."""
    return chunks > _FREE_CHUNKS and size < _LEAST_CHUNK * chunks
