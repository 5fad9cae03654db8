"""The planted fault: a proxy in front of a node that drops one token of every resumed stream.

Owns nothing but that. It shows that chaos notices: markers and all else are passed on, so that the gate cannot know.
"""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

from llmnode.wire import resume, sse

_TEXT = (b'"content":"', b'"text":"')


class Shim:
    """Listens at `url` and passes on to the node at `node_url`, one request a connection. Needs a running loop."""

    def __init__(self, node_url: str) -> None:
        self._node = urlsplit(node_url)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.dropped = 0
        self._starting = asyncio.ensure_future(asyncio.start_server(self._serve, sock=self._socket))

    async def stop(self) -> None:
        (await self._starting).close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0].strip()
            body = await reader.readexactly(int(length or 0))
            answer, upstream = await asyncio.open_connection(self._node.hostname, self._node.port)
            upstream.write(head[:-2] + b"connection: close\r\n\r\n" + body)
            resumed = head.startswith(b"POST " + resume.PATH.encode() + b" ")
            # That the gate hangs up must reach the node as it would without us.
            passing = asyncio.ensure_future(self._resumed(answer, writer) if resumed else _pump(answer, writer))
            leaving = asyncio.ensure_future(reader.read(1))
            await asyncio.wait([passing, leaving], return_when=asyncio.FIRST_COMPLETED)
            for task in (passing, leaving):
                task.cancel()
            await asyncio.gather(passing, leaving, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for side in (writer, upstream):
                if side is not None:
                    side.close()

    async def _resumed(self, answer: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass a resumed stream on, in chunks of our own, without the first frame that has text."""
        writer.write(await answer.readuntil(b"\r\n\r\n"))
        frames, dropped = sse.Frames(), False
        while size := int(await answer.readline(), 16):
            for frame in frames.feed(await answer.readexactly(size)):
                if not dropped and _is_text(frame):
                    dropped = True
                    self.dropped += 1
                    continue
                writer.write(b"%x\r\n%s\r\n" % (len(frame), frame))
            await answer.readexactly(2)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _is_text(frame: bytes) -> bool:
    """A piece of a stream that has text; not the one event that holds all of an answer that is not streamed."""
    return b'"usage":{' not in frame and any(name in frame and name + b'"' not in frame for name in _TEXT)


async def _pump(answer: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await answer.read(65536):
        writer.write(data)
        await writer.drain()
