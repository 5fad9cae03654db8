"""What of a node's event stream a client may have now: pure, bytes in, bytes out.

Owns the law that ids and bytes agree: a frame goes on only when the commit marker behind it is here, or `[DONE]`, which
commits what is left. So whatever a cut leaves behind, another node can go on from the committed ids without a gap and
without a repeat. Refuses to know what a frame means beyond its first bytes.

    data: ...           held until its marker
    : t CHOICE ...      commits what is held, and is not handed on
    : u ...             what the answer cost, for the log; not handed on
    : handover          the node stops here; not handed on, like all that follows
    data: {"error"...   the node has failed; kept apart, like all that follows
    data: [DONE]        the end
    : end               the end, at endpoints whose clients know no [DONE]; not handed on
    event: ping         a sign of life in Anthropic's words: goes on at once, like a comment
    : anything          a comment, which has no place in the order: goes on at once

An answer without markers (`committed` None), from a node one release older, goes on frame by frame.

At most `limit` bytes are held, in whole frames and in the one that is still coming.
"""

from __future__ import annotations

from llmnode.wire import sse
from llmnode.wire.node import Usage
from llmnode.wire.resume import HANDOVER, Committed

_COLON = b":"
_MARK = b": t "
_USAGE = b": u "
_ERROR = b'data: {"error":'
_DONE = sse.DONE[:-2]
_END = sse.END[:-2]
_PING = b"event: ping\n"
_HANDOVER = HANDOVER[:-2]


class Reader:
    """Reads one attempt's answer. `committed` goes over all attempts and is added to here.

    content: the last `feed` has handed on data, not comments alone.         done: the answer is whole.
    handover: the node has asked for another one.    error: the JSON of the error with which it ended the stream.
    broken: which rule it broke: a marker whose count does not follow, or too much to hold. Not raised, since what was
    committed before that has to go on all the same.
    over: one of the four; nothing more will be handed on.
    """

    def __init__(self, committed: Committed | None, limit: int) -> None:
        self.content = False
        self.done = False
        self.handover = False
        self.error: bytes | None = None
        self.broken = ""
        self.over = False
        self.usage: Usage | None = None
        self._committed = committed
        self._limit = limit
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._parts: list[bytes] = []
        self._part_bytes = 0

    def feed(self, chunk: bytes) -> bytes:
        """What goes to the client now that `chunk` has come, in whole frames."""
        self.content = False
        if self.over:
            return b""
        ready: list[bytes] = []
        try:
            self._take(self._frames(chunk), ready)
        except ValueError as error:
            self.broken, self.over = str(error), True
        if not ready:
            return b""
        ready.append(b"")
        return b"\n\n".join(ready)

    def _take(self, frames: list[bytes], ready: list[bytes]) -> None:
        held, committed = self._held, self._committed
        for frame in frames:
            if frame.startswith(_COLON):
                if frame.startswith(_MARK):
                    if committed is not None:
                        committed.read(frame)
                        self._release(ready)
                elif frame.startswith(_USAGE):
                    self.usage = sse.read_usage(frame)
                elif frame == _HANDOVER:
                    self.handover = self.over = True
                    return
                elif frame == _END:
                    self._release(ready)
                    self.done = self.over = True
                    return
                else:
                    ready.append(frame)
            elif frame.startswith(_PING):
                ready.append(frame)
            elif frame.startswith(_ERROR):
                self.error, self.over = frame[len(b"data: ") :], True
                return
            else:
                held.append(frame)
                self._held_bytes += len(frame)
                if frame == _DONE:
                    self._release(ready)
                    self.done = self.over = True
                    return
                if committed is None:
                    self._release(ready)
        if self._held_bytes + self._part_bytes > self._limit:
            raise ValueError(f"more than {self._limit} bytes wait for the end of a frame or for its commit marker")

    def _frames(self, chunk: bytes) -> list[bytes]:
        """The frames that `chunk` completes, without their blank lines. Joins parts only when one does: linear time."""
        parts = self._parts
        if b"\n\n" not in chunk and not (parts and parts[-1].endswith(b"\n") and chunk.startswith(b"\n")):
            if chunk:
                parts.append(chunk)
                self._part_bytes += len(chunk)
            frames: list[bytes] = []
        else:
            *frames, rest = (b"".join(parts) + chunk if parts else chunk).split(b"\n\n")
            self._parts = [rest] if rest else []
            self._part_bytes = len(rest)
        return frames

    def _release(self, ready: list[bytes]) -> None:
        if self._held:
            ready += self._held
            self._held.clear()
            self._held_bytes = 0
            self.content = True
