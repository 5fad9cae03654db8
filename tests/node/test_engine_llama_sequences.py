"""What llama.cpp's sequences can do, for every kind of memory: cut, copied, saved, brought back, or refused.

Whatever a sequence went through, the logits after it must be those of the same tokens computed alone. They may differ a
little (they depend on the shape of a batch); a wrong state is off by several standard deviations of 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from llmnode.engine import llama
from llmnode.engine.backend import BAD_BATCH, NO_ROOM, OK, Chunk, ModelLoadError
from llmnode.engine.llama import LlamaBackend, LlamaOptions
from llmnode.settings import HANDBOOK
from tests import tiny_model as recipe

TOLERANCE = 0.5
STEADY = ("tiny", "parted", "gemma3")
STATEFUL = ("mamba", "lfm2")
WINDOW = 64


def tokens(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, 30000, count).tolist()  # type: ignore[no-any-return]


def load(kind: str, **options: Any) -> LlamaBackend:
    """A backend of this kind; "parted" is the tiny model with a part of the cache for each sequence."""
    sizes = {"slots": 3, "n_ctx": 1024, "kv_cells": 2048, "n_batch": 256, "threads": 1, "kv_unified": "on", **options}
    if kind == "parted":
        kind = "tiny"
        sizes |= {"kv_unified": "off", "kv_cells": 0, "sequences": max(4, sizes.get("sequences", 0))}
    return llama.load(LlamaOptions(recipe.make(kind), **sizes))


Scored = Callable[[str, list[int]], np.ndarray]


@pytest.fixture(scope="module")
def alone() -> Iterator[Scored]:
    """The logits after some tokens of a model, computed in a backend that holds nothing else."""
    scorers: dict[str, LlamaBackend] = {}

    def score(kind: str, ids: list[int]) -> np.ndarray:
        if kind not in scorers:
            scorers[kind] = load(kind, slots=1, kv_cells=1024, sequences=1)
        scorer = scorers[kind]
        row = feed(scorer, 0, ids)
        assert scorer.seq_remove(0)
        return row

    yield score
    for scorer in scorers.values():
        scorer.close()


@pytest.fixture(params=[*STEADY, *STATEFUL])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(kind: str) -> Iterator[LlamaBackend]:
    made = load(kind)
    yield made
    made.close()


def feed(backend: LlamaBackend, seq: int, ids: list[int]) -> np.ndarray:
    """Go on with a sequence, in chunks; the logits after the last token."""
    start, step = backend.seq_length(seq), backend.room.n_batch
    for begin in range(0, len(ids), step):
        part = ids[begin : begin + step]
        assert backend.decode([Chunk(seq, start + begin, part, 1)]) == OK
    return backend.logits()[0].copy()


def close(row: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(row - other).max() < TOLERANCE)


def test_rows_are_the_last_of_each_chunk_in_their_order(kind: str, backend: LlamaBackend, alone: Scored) -> None:
    first, second, third = tokens(20, 1), tokens(33, 2), tokens(7, 3)
    assert backend.decode([Chunk(2, 0, first, 3), Chunk(0, 0, second, 0), Chunk(1, 0, third, 2)]) == OK
    rows = backend.logits()
    assert rows.shape == (5, backend.info.n_vocab)
    expected = [first[:18], first[:19], first, third[:6], third]
    for row, ids in zip(rows, expected, strict=True):
        assert close(row, alone(kind, ids))
    assert not close(rows[0], alone(kind, first)), "neighbouring rows must be told apart"


def test_more_rows_than_there_is_room_for_are_refused_without_harm(backend: LlamaBackend) -> None:
    most = backend.room.rows
    if most < backend.room.n_batch:
        assert backend.decode([Chunk(0, 0, tokens(most + 1), most + 1)]) == BAD_BATCH
    assert backend.decode([Chunk(0, 0, [5, 6], 3)]) == BAD_BATCH
    assert backend.decode([Chunk(0, 0, [5, 6], -1)]) == BAD_BATCH
    assert backend.decode([Chunk(backend.room.sequences, 0, [5], 1)]) == BAD_BATCH
    assert backend.seq_length(0) == 0
    assert backend.decode([Chunk(0, 0, tokens(most), most)]) == OK


def test_every_sequence_of_the_room_can_be_computed(backend: LlamaBackend) -> None:
    last = backend.room.sequences - 1
    assert last >= backend.room.slots
    assert backend.decode([Chunk(0, 0, [5], 1), Chunk(last, 0, [6, 7], 1)]) == OK
    assert (backend.seq_length(0), backend.seq_length(last)) == (1, 2)


def test_a_full_cache_says_so_and_keeps_nothing_of_the_batch() -> None:
    backend = load("tiny", kv_cells=256, n_ctx=256)
    feed(backend, 0, tokens(200))
    assert backend.decode([Chunk(1, 0, tokens(60, 2), 1)]) == NO_ROOM
    assert (backend.seq_length(0), backend.seq_length(1)) == (200, 0)
    assert backend.decode([Chunk(1, 0, tokens(56, 2), 1)]) == OK
    backend.close()


def test_the_probe_tells_what_can_be_cut(kind: str, backend: LlamaBackend) -> None:
    assert backend.can_cut == (kind in STEADY)
    assert backend.seq_length(0) == 0, "the probe leaves nothing behind"


@pytest.mark.parametrize("kind", STEADY, indirect=True)
def test_after_a_cut_a_sequence_goes_on_as_if_the_rest_had_never_been(
    kind: str, backend: LlamaBackend, alone: Scored
) -> None:
    prompt, wrong, right = tokens(150), tokens(8, 2), tokens(3, 3)
    feed(backend, 0, prompt)
    feed(backend, 0, wrong)
    assert backend.seq_remove(0, len(prompt) + 2)
    assert backend.seq_length(0) == len(prompt) + 2
    assert close(feed(backend, 0, right), alone(kind, prompt + wrong[:2] + right))


@pytest.mark.parametrize("kind", STATEFUL, indirect=True)
def test_a_state_that_cannot_be_cut_stays_as_it_is(kind: str, backend: LlamaBackend, alone: Scored) -> None:
    prompt = tokens(40)
    feed(backend, 0, prompt)
    assert not backend.seq_remove(0, 30)
    assert backend.seq_length(0) == 40
    assert close(feed(backend, 0, [77]), alone(kind, [*prompt, 77]))
    assert backend.seq_remove(0)
    assert backend.seq_length(0) == 0


def test_a_copy_goes_on_alone_and_leaves_its_source_as_it_was(kind: str, backend: LlamaBackend, alone: Scored) -> None:
    prompt, mine, yours = tokens(120), tokens(5, 2), tokens(6, 3)
    feed(backend, 0, prompt)
    assert backend.seq_reusable(0, len(prompt))
    backend.seq_copy(0, 3, len(prompt))
    assert backend.seq_length(3) == len(prompt)
    assert close(feed(backend, 0, mine), alone(kind, prompt + mine))
    assert close(feed(backend, 3, yours), alone(kind, prompt + yours))
    assert backend.seq_remove(0)
    assert close(feed(backend, 3, mine), alone(kind, prompt + yours + mine))


def test_reuse_is_promised_only_where_it_is_exact(kind: str, backend: LlamaBackend, alone: Scored) -> None:
    prompt = tokens(100)
    feed(backend, 0, prompt)
    assert backend.seq_reusable(0, 0)
    assert backend.seq_reusable(0, 60) == (kind in STEADY)
    if kind in STEADY:
        backend.seq_copy(0, 1, 60)
        assert close(feed(backend, 1, [9, 8]), alone(kind, [*prompt[:60], 9, 8]))


def test_a_window_that_has_moved_on_ends_reuse_of_what_lies_behind(alone: Scored) -> None:
    narrow, whole = load("gemma3", slots=1, sequences=2), load("gemma3", slots=1, sequences=2, swa_full=True)
    assert narrow.info.window == WINDOW
    ids = tokens(600)
    for backend in (narrow, whole):
        feed(backend, 0, ids)
    assert not narrow.seq_reusable(0, 100)
    assert not narrow.seq_remove(0, 100), "the cells that position 100 would see are gone"
    assert narrow.seq_length(0) == 600
    assert narrow.seq_reusable(0, 600)
    assert narrow.seq_reusable(0, 590)
    assert whole.seq_reusable(0, 100)
    border = next(length for length in range(1, 600) if narrow.seq_reusable(0, length))
    assert all(narrow.seq_reusable(0, length) for length in range(border, 601))
    for backend, length in ((narrow, border), (whole, 100)):
        backend.seq_copy(0, 1, length)
        assert close(feed(backend, 1, [5, 6, 7]), alone("gemma3", [*ids[:length], 5, 6, 7]))
        backend.close()


def test_shared_cells_that_no_window_sees_do_not_fill_the_cache(alone: Scored) -> None:
    """256 window cells for three sequences; a copy shares them all, though each sequence sees 64 only."""
    backend = load("gemma3", slots=2, sequences=3, n_batch=64)
    ids = tokens(600)
    feed(backend, 0, ids)
    saved = backend.seq_save(0)
    backend.seq_copy(0, 1, 600)
    assert close(feed(backend, 1, ids[:300]), alone("gemma3", ids + ids[:300]))
    assert close(feed(backend, 0, ids[300:500]), alone("gemma3", ids + ids[300:500]))
    assert backend.seq_remove(0)
    assert backend.seq_remove(1)
    feed(backend, 0, ids)
    backend.seq_copy(0, 1, 550)
    assert backend.seq_load(2, saved)
    assert close(feed(backend, 2, [4]), alone("gemma3", [*ids, 4]))
    assert close(feed(backend, 1, [5]), alone("gemma3", [*ids[:550], 5]))
    backend.close()


def test_windows_of_many_sequences_do_not_touch_each_other(alone: Scored) -> None:
    backend = load("gemma3", slots=3, sequences=6)
    prompts = [tokens(200 + 30 * seq, seq) for seq in range(6)]
    for seq, prompt in enumerate(prompts):
        feed(backend, seq, prompt)
    for seq, prompt in enumerate(prompts):
        if backend.seq_reusable(seq, len(prompt)):
            assert close(feed(backend, seq, [11]), alone("gemma3", [*prompt, 11]))
    assert all(backend.seq_reusable(seq, len(prompt) + 1) for seq, prompt in enumerate(prompts))
    backend.close()


def test_a_sequence_that_was_away_goes_on_as_if_it_had_stayed(kind: str, backend: LlamaBackend, alone: Scored) -> None:
    prompt, other, more = tokens(180), tokens(90, 2), tokens(4, 3)
    feed(backend, 0, prompt)
    saved = backend.seq_save(0)
    assert saved
    assert backend.seq_length(0) == len(prompt), "saving changes nothing"
    assert backend.seq_remove(0)
    feed(backend, 1, other)
    assert backend.seq_load(2, saved)
    assert backend.seq_length(2) == len(prompt)
    assert close(feed(backend, 2, more), alone(kind, prompt + more))
    assert close(feed(backend, 1, more), alone(kind, other + more))


def test_what_one_process_saved_another_of_the_same_model_and_settings_can_load(kind: str, alone: Scored) -> None:
    first, second, different = load(kind), load(kind, slots=2), load(kind, cache_type_k="f32", slots=2)
    prompt = tokens(50)
    feed(first, 0, prompt)
    saved = first.seq_save(0)
    first.close()
    assert second.seq_load(1, saved)
    assert close(feed(second, 1, [9]), alone(kind, [*prompt, 9]))
    assert not different.seq_load(1, saved)
    assert different.seq_length(1) == 0
    second.close()
    different.close()


def test_nothing_but_a_whole_saved_sequence_is_loaded(kind: str, backend: LlamaBackend) -> None:
    feed(backend, 0, tokens(30))
    saved = backend.seq_save(0)
    flipped = bytearray(saved)
    flipped[len(saved) // 2] ^= 1
    longer = bytearray(saved)
    longer[24] += 1  # the number of tokens
    dice = np.random.default_rng(4)
    noise = bytearray(dice.integers(0, 256, len(saved), dtype=np.uint8).tobytes())
    for broken in (bytearray(), saved[:20], saved[:-1], saved + b"x", flipped, longer, noise):
        assert not backend.seq_load(1, bytearray(broken))
        assert backend.seq_length(1) == 0
    assert not backend.seq_load(backend.room.sequences, saved)
    assert backend.seq_save(1) == b"", "an empty sequence has nothing to save"
    for different in {"tiny", "parted", "gemma3"} - {kind}:
        other = load(different)
        assert not other.seq_load(0, saved)
        other.close()
    assert backend.seq_load(1, saved)


def test_a_saved_sequence_that_does_not_fit_leaves_its_place_empty() -> None:
    backend = load("tiny", kv_cells=256, n_ctx=256)
    feed(backend, 0, tokens(150))
    saved = backend.seq_save(0)
    assert not backend.seq_load(1, saved)
    assert backend.seq_length(1) == 0
    assert backend.decode([Chunk(1, 0, tokens(100, 2), 1)]) == OK, "no cell was lost"
    assert backend.seq_remove(0)
    assert backend.seq_remove(1)
    assert backend.seq_load(1, saved)
    backend.close()


def test_a_copied_prefix_shares_its_cells() -> None:
    backend = load("tiny", kv_cells=256, n_ctx=256)
    feed(backend, 0, tokens(200))
    backend.seq_copy(0, 1, 200)
    assert backend.decode([Chunk(0, 200, tokens(20), 1), Chunk(1, 200, tokens(20), 1)]) == OK
    backend.close()


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_a_cache_of_every_type_computes_nearly_the_same(name: str) -> None:
    """On the handbook model: its heads have 32 values, and quantised types come in blocks of 32."""
    options = {"slots": 1, "n_ctx": 512, "flash_attn": "on"}
    exact = llama.load(LlamaOptions(HANDBOOK, **options))
    backend = llama.load(LlamaOptions(HANDBOOK, **options, cache_type_k=name, cache_type_v=name))
    ids = [id % 2048 for id in tokens(100)]
    difference = np.abs(feed(backend, 0, ids) - feed(exact, 0, ids)).mean()
    assert difference < {"f": 0.02, "b": 0.1, "q8": 0.1}.get(name[:2] if name == "q8_0" else name[0], 2.0)
    bits = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}[name]
    assert backend.info.cell_bytes == 5 * 6 * 32 * 2 * bits / 8
    assert (backend.chosen.cache_type_k, backend.chosen.cache_type_v) == (name, name)
    backend.close()
    exact.close()


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"cache_type_k": "q2_k"}, "cache_type_k is 'q2_k'; the types of a cache are f32, f16, bf16, q8_0"),
        ({"cache_type_v": "int8"}, "cache_type_v is 'int8'"),
        ({"cache_type_v": "q8_0", "flash_attn": "off"}, "quantised values need flash attention"),
        ({"flash_attn": "yes"}, "flash_attn is 'yes'; it can be auto, off, on"),
        ({"kv_unified": "maybe"}, "kv_unified is 'maybe'; it can be auto, on, off"),
        ({"kv_unified": "off"}, "kv_cells is 2048: a part of 1024 tokens for each of 3 slots takes 3072"),
        ({"sequences": 300}, "sequences is 300; llama.cpp holds 256 sequences at most"),
        ({"sequences": 2}, "sequences .* must be at least its slots"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        load("tiny", **options)


@pytest.mark.parametrize(
    ("kind", "options", "unified"),
    [
        ("tiny", {"kv_cells": 0}, False),
        ("tiny", {"kv_cells": 4096}, False),
        ("tiny", {"kv_cells": 3 * 1024 - 1}, True),
        ("tiny", {"kv_cells": 0, "slots": 1}, True),
        ("gemma3", {"kv_cells": 0}, True),
        ("mamba", {"kv_cells": 0}, True),
        ("lfm2", {"kv_cells": 0}, True),
    ],
)
def test_a_cache_is_parted_where_every_slot_has_room_anyway(kind: str, options: dict[str, Any], unified: bool) -> None:
    backend = load(kind, kv_unified="auto", **options)
    room = backend.room
    assert room.unified == backend.chosen.kv_unified == unified
    if not unified:
        assert room.sequences == max(3, options["kv_cells"] // 1024)
        assert room.kv_cells == room.sequences * 1024
    backend.close()


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "gemma3"])
def test_what_is_not_only_attention_is_not_parted(kind: str) -> None:
    with pytest.raises(ModelLoadError, match="keeps more than attention"):
        load(kind, kv_unified="off", kv_cells=0)


def test_a_part_holds_its_n_ctx_and_no_more() -> None:
    backend = load("parted", n_ctx=300)
    assert backend.room.kv_cells == 4 * 512, "llama.cpp rounds each part up to a multiple of 256"
    feed(backend, 1, tokens(512))
    assert backend.decode([Chunk(1, 512, [5], 1)]) == NO_ROOM
    assert backend.decode([Chunk(0, 0, tokens(20), 1)]) == OK, "nobody else is touched"
    backend.close()


def test_flash_attention_is_what_was_chosen() -> None:
    for asked, became in (("off", False), ("on", True), ("auto", True)):
        backend = load("tiny", flash_attn=asked)
        assert backend.chosen.flash_attention is became
        backend.close()
    quantised = llama.load(LlamaOptions(HANDBOOK, cache_type_v="q8_0", n_ctx=512))
    assert quantised.chosen.flash_attention, "what needs it gets it"
    quantised.close()


def test_what_was_chosen_is_told() -> None:
    backend = load("tiny", threads=1, threads_batch=2, kv_cells=1030, sequences=9)
    chosen = backend.chosen
    assert (chosen.threads, chosen.threads_batch, chosen.sequences, chosen.n_ctx) == (1, 2, 9, 1024)
    assert chosen.kv_cells == backend.room.kv_cells == 1280, "llama.cpp rounds up to a multiple of 256"
    assert chosen.rows == backend.room.rows
    assert chosen.devices == ("CPU",)
    backend.close()


def test_sequences_of_random_lives_go_on_as_their_tokens_say(kind: str, alone: Scored) -> None:
    """Decoded, copied, cut, saved, loaded and forgotten at random, in a cache that is too small for all of them."""
    dice = np.random.default_rng(11)
    backend = load(kind, slots=3, sequences=6, kv_cells=512, n_ctx=512, n_batch=128)
    held: dict[int, list[int]] = {seq: [] for seq in range(6)}
    saved: list[tuple[list[int], bytearray]] = []
    done: set[str] = set()

    def forget(seq: int) -> None:
        assert backend.seq_remove(seq)
        held[seq] = []

    for step in range(250):
        seq = int(dice.integers(6))
        ids = held[seq]
        empty = next((other for other in held if not held[other]), None)
        match int(dice.integers(6)):
            case 0 | 1:
                others = [seq, *(other for other in held if other != seq)][: int(dice.integers(1, 4))]
                parts = [tokens(int(dice.integers(1, 40)), 1000 * step + other) for other in others]
                chunks = [Chunk(o, len(held[o]), part, 1) for o, part in zip(others, parts, strict=True)]
                code = backend.decode(chunks)
                assert code in (OK, NO_ROOM)
                if code == OK:
                    for other, part in zip(others, parts, strict=True):
                        held[other] = held[other] + part
                longest = max(held, key=lambda other: len(held[other]))
                if code == NO_ROOM or len(held[longest]) > 400:
                    forget(longest)
                done.add(f"decode {code}")
            case 2 if ids and empty is not None:
                length = len(ids) if dice.integers(2) else int(dice.integers(1, len(ids) + 1))
                if backend.seq_reusable(seq, length):
                    backend.seq_copy(seq, empty, length)
                    held[empty] = ids[:length]
                    done.add("copy")
            case 3 if ids:
                length = int(dice.integers(max(0, len(ids) - 30), len(ids) + 1))
                if backend.seq_remove(seq, length):
                    held[seq] = ids[:length]
                    done.add("cut")
            case 4 if ids:
                saved.append((ids, backend.seq_save(seq)))
                forget(seq)
                done.add("save")
            case 5 if saved and empty is not None:
                ids, state = saved[int(dice.integers(len(saved)))]
                loaded = backend.seq_load(empty, state)
                held[empty] = ids if loaded else []
                done.add(f"load {loaded}")
        for other, expected in held.items():
            assert backend.seq_length(other) == len(expected)
    # Recurrent state takes no cells and cannot be cut.
    usual = {"decode 0", "copy", "save", "load True"} | ({"cut"} if kind in STEADY else set())
    assert done >= usual | ({"decode 1", "load False"} if kind in STEADY and kind != "parted" else set())
    for seq in sorted(held, key=lambda other: len(held[other])):
        if held[seq]:
            code = backend.decode([Chunk(seq, len(held[seq]), [5], 1)])
            if code == OK:
                assert close(backend.logits()[0], alone(kind, [*held[seq], 5]))
            forget(seq)
    backend.close()
