"""One llama.cpp context as a `Backend`: sequences of tokens in, rows of logits out.

Owns: the context, the translation of chunks into llama.cpp's batches, and what of a sequence can be cut,
reused, saved. Refuses to know: requests, scheduling, sampling, how a model got into memory.

What the kinds of memory allow (`seq_reusable`, `can_cut`), with the places in llama.cpp that say so:
  attention          any prefix, any cut                             llama-kv-cache.cpp
  sliding window     a prefix whose window is still held             llama-kv-cache.cpp, find_slot takes cells over that
                     no window sees any more; seq_pos_min tells. A cell that sequences share is never taken over,
                     so copies can fill a window cache with cells that nobody sees: `_unshare_windows`
  recurrent, hybrid  the whole sequence as it is, no cut             llama-memory-recurrent.cpp, one state a sequence

llama.cpp checks a batch with assertions that end the process (more tokens than n_batch, more rows than n_outputs_max),
so `Batch.fill` checks first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from llmnode.engine.backend import BAD_BATCH, NO_ROOM, Chunk, FatalEngineError, ModelLoadError, Saved
from llmnode.engine.llama import saved as sealing
from llmnode.engine.llama.batch import Batch
from llmnode.engine.llama.model import Model, fingerprint
from llmnode.engine.llama.native import Found
from llmnode.engine.llama.options import LlamaOptions
from llmnode.engine.llama.parameters import open_context

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WINDOWS_ONLY = 1
"""LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY of llama.h: leave out what full attention sees."""
_CELL_META = 12
"""Bytes of a saved cell beside keys and values: position, number of sequences, sequence (llama-kv-cache.cpp)."""


class LlamaBackend:
    """A model and one context over it. See backend.Backend for what each method promises.

    chosen: what it runs with.      found: its devices, for another context over the same model.
    """

    def __init__(self, model: Model, options: LlamaOptions, devices: Sequence[Found]) -> None:
        api = model.library.api
        info = model.info()
        opened = open_context(model, options, devices)
        self._api, self._context, self.room, self.chosen = api, opened.pointer, opened.room, opened.chosen
        try:
            self._memory = api.llama_get_memory(self._context)
            self.pieces: Sequence[bytes] = model.pieces()
            self.specials: Mapping[str, int] = model.specials()
            self.end_tokens = model.end_tokens()
            self.found = tuple(devices)
            self.devices = tuple(found.device for found in devices)
            self._get_logits = model.library.get_logits
            self._n_vocab, self._window, self._recurrent = info.n_vocab, info.window, model.is_recurrent()
            self._batch = Batch(api, self.room)
            self._rows = 0
            self._views: dict[int, tuple[int, NDArray[np.float32]]] = {}
            self._shares_windows = False
            kept_as = (options.cache_type_k, options.cache_type_v, self.chosen.flash_attention)
            # A saved sequence says of how many parts its cache had.
            parts = 1 if self.room.unified else self.room.sequences
            self._seal = sealing.Seal(fingerprint(model.path), *kept_as, parts)
            self.can_cut, cell_bytes = self._probe(model)
        except BaseException:
            api.llama_free(self._context)
            raise
        self.info = replace(info, cell_bytes=cell_bytes)
        self._tokenize, self._spell = model.tokenize, model.spell
        self._model: Model | None = model.hold()

    def tokenize(self, text: str, *, special: bool, ends: bool = False) -> list[int]:
        return self._tokenize(text, special=special, ends=ends)

    def spell(self, token: int) -> bytes:
        return self._spell(token)

    def decode(self, chunks: Sequence[Chunk]) -> int:
        self._rows = self._batch.fill(chunks)
        if self._rows < 0:
            return BAD_BATCH
        code = int(self._api.llama_decode(self._context, self._batch.struct))
        if code == NO_ROOM and self._shares_windows:
            self._unshare_windows()
            code = int(self._api.llama_decode(self._context, self._batch.struct))
        # A GPU may still be at it. Waiting here keeps the measured rates true, and they decide what counts as stuck.
        self._api.llama_synchronize(self._context)
        return code

    def logits(self) -> NDArray[np.float32]:
        # llama.cpp keeps the rows of a decode in one block, in batch order, and seldom moves it.
        address, view = self._views.get(self._rows, (0, None))
        now = self._get_logits(self._context)
        if view is None or address != now:
            block = (ctypes.c_float * (self._rows * self._n_vocab)).from_address(now)
            view = np.ctypeslib.as_array(block).reshape(self._rows, self._n_vocab)
            self._views[self._rows] = now, view
        return view

    def seq_length(self, seq: int) -> int:
        return int(self._api.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def seq_remove(self, seq: int, start: int = 0) -> bool:
        if start > 0 and self._window and not self.seq_reusable(seq, start):
            return False
        return bool(self._api.llama_memory_seq_rm(self._memory, seq, start, -1))

    def seq_reusable(self, seq: int, length: int) -> bool:
        if length <= 0:
            return True
        if self._recurrent:
            return length == self.seq_length(seq)
        if not self._window:
            return True
        # The next token sees the last `window` positions, itself among them. All that are held lie together.
        first = int(self._api.llama_memory_seq_pos_min(self._memory, seq))
        return 0 <= first <= max(0, length - self._window + 1)

    def seq_copy(self, source: int, target: int, length: int) -> None:
        if self.room.unified:
            self._api.llama_memory_seq_cp(self._memory, source, target, 0, length)
            self._shares_windows = self._window > 0
            return
        # llama.cpp copies parts of a parted cache as a whole only, and not before the next decode.
        if not self.seq_load(target, self.seq_save(source)) or not self.seq_remove(target, length):
            raise FatalEngineError(f"sequence {source} could not be copied")

    def seq_save(self, seq: int) -> Saved:
        length = self.seq_length(seq)
        size = self._api.llama_state_seq_get_size(self._context, seq) if length else 0
        if not size:
            return Saved()
        saved = Saved(sealing.SIZE + size)
        body = (ctypes.c_uint8 * size).from_buffer(saved, sealing.SIZE)
        written = self._api.llama_state_seq_get_data(self._context, body, size, seq)
        del body  # while it lives, the bytearray cannot change its size
        if written != size:
            return Saved()
        self._seal.close(saved, length)
        return saved

    def seq_load(self, seq: int, saved: Saved) -> bool:
        length = self._seal.length(saved)
        if not 0 < length <= self.room.kv_cells or not 0 <= seq < self.room.sequences:
            return False
        size = len(saved) - sealing.SIZE
        body = (ctypes.c_uint8 * size).from_buffer(saved, sealing.SIZE)
        for last in (not self._shares_windows, True):
            read = self._api.llama_state_seq_set_data(self._context, body, size, seq)
            if read == size and self.seq_length(seq) == length:
                return True
            self.seq_remove(seq)
            if last:
                break
            self._unshare_windows()
        return False

    def borrow(self) -> Model:
        """The model, for another context over it."""
        if self._model is None:
            raise ValueError("the backend is closed")
        return self._model

    def close(self) -> None:
        if self._model is None:
            return
        self._views.clear()
        self._api.llama_free(self._context)
        self._model.release()
        self._model = None

    def _unshare_windows(self) -> None:
        """Give each sequence window cells of its own, and only those that its window sees, by saving and loading that
        part of its state. There are as many cells as all windows together need, or as many as the whole cache has."""
        self._shares_windows = False
        failed = []
        for seq in range(self.room.sequences):
            if self.seq_length(seq):
                size = self._api.llama_state_seq_get_size_ext(self._context, seq, _WINDOWS_ONLY)
                state = (ctypes.c_uint8 * size)()
                self._api.llama_state_seq_get_data_ext(self._context, state, size, seq, _WINDOWS_ONLY)
                if not self._set_window(seq, state):
                    failed.append((seq, state))
        # What found no cells among those of others finds them when these are done.
        lost = [seq for seq, state in failed if not self._set_window(seq, state)]
        if lost:
            raise FatalEngineError(f"the sliding windows of sequences {lost} could not be kept apart")

    def _set_window(self, seq: int, state: ctypes.Array[ctypes.c_uint8]) -> bool:
        read = self._api.llama_state_seq_set_data_ext(self._context, state, len(state), seq, _WINDOWS_ONLY)
        return bool(read == len(state))

    def _probe(self, model: Model) -> tuple[bool, int]:
        """Decode two tokens, remove one. Reads the weights in, and finds out here whether this device can compute at
        all. Returns whether a sequence can be cut, and the bytes that one more token takes in the cache."""
        library = model.library
        library.complaints.clear()
        sizes = []
        for start in (0, 1):
            code = self.decode([Chunk(0, start, [0], 1)])
            if code != 0:
                raise ModelLoadError(f"{model.path}: a first decode ended with code {code}: {library.reason()}")
            sizes.append(self._api.llama_state_seq_get_size(self._context, 0))
        can_cut = self.seq_remove(0, 1) and self.seq_length(0) == 1
        self.seq_remove(0)
        caches = 2 if self._window else 1
        return can_cut, max(0, sizes[1] - sizes[0] - caches * _CELL_META)
