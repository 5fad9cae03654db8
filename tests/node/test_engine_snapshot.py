"""What is kept of prompts on disk: for its owner's eyes, within its bounds, for the same model, or not at all."""

from __future__ import annotations

import stat
from array import array
from pathlib import Path

import pytest

from llmnode.engine.host import Entry, HostCache
from llmnode.engine.snapshot import Snapshot


def entry(first: int, size: int = 100) -> Entry:
    return Entry(array("i", [first, 2, 3, 4]), 3, bytearray([first]) * size)


def loaded(path: Path, fingerprint: str = "m", budget: int = 10_000) -> list[int]:
    host = HostCache(budget)
    Snapshot(path, budget, fingerprint).load(host)
    return [held.tokens[0] for held in host]


def test_prefixes_come_back_in_their_order_of_use(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    assert Snapshot(path, 10_000, "m").save([entry(1), entry(2), entry(3)]) == 3
    assert loaded(path) == [1, 2, 3]
    host = HostCache(10_000)
    Snapshot(path, 10_000, "m").load(host)
    assert {(held.length, bytes(held.saved)) for held in host} == {(3, bytes([n]) * 100) for n in (1, 2, 3)}
    assert [p.name for p in tmp_path.iterdir()] == ["prefixes"]


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    path.write_text("old")
    path.chmod(0o644)
    Snapshot(path, 10_000, "m").save([entry(1)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_budget_bounds_the_file_and_the_hottest_stay(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    assert Snapshot(path, 2500, "m").save([entry(1, 800), entry(2, 5000), entry(3, 100), entry(4, 800)]) == 2
    assert path.stat().st_size < 2500
    assert loaded(path) == [1, 3]


@pytest.mark.parametrize("fingerprint", ["", "another"])
def test_another_model_or_other_options_erase_it(tmp_path: Path, fingerprint: str) -> None:
    path = tmp_path / "prefixes"
    Snapshot(path, 10_000, "m").save([entry(1)])
    assert loaded(path, fingerprint) == []
    assert not path.exists()


def test_a_damaged_file_is_erased_and_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    Snapshot(path, 10_000, "m").save([entry(1), entry(2)])
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", b"{}\n", whole[:-5] + b"\xff" + whole[-4:], b"\n" * 5):
        path.write_bytes(damaged)
        assert loaded(path) == []
        assert not path.exists()
    assert loaded(path) == []


def test_a_disk_that_takes_nothing_costs_the_prefixes_only(tmp_path: Path) -> None:
    assert Snapshot(tmp_path / "missing" / "prefixes", 10_000, "m").save([entry(1)]) == 0


def test_host_ram_keeps_to_its_budget_and_lets_the_oldest_go() -> None:
    host = HostCache(3 * entry(0).size)
    for first in (1, 2, 3, 4):
        assert host.put(entry(first).tokens, 3, entry(first).saved)
    assert [held.tokens[0] for held in host] == [4, 3, 2]
    host.touch(list(host)[-1])
    assert not host.put(array("i", [9] * 10), 10, bytearray(5000)), "one that is over the budget alone"
    assert not host.put(array("i", [9] * 10), 10, bytearray()), "one that could not be saved"
    host.put(entry(5).tokens, 3, entry(5).saved)
    assert [held.tokens[0] for held in host] == [5, 2, 4]
    assert host.check_integrity() == ""


def test_what_a_longer_entry_holds_is_not_kept_twice() -> None:
    host = HostCache(10_000)
    tokens = array("i", range(10))
    host.put(tokens, 5, bytearray(10))
    host.put(tokens, 9, bytearray(20))
    assert [held.length for held in host] == [9]
    assert host.has(tokens, 5) and not host.has(tokens, 10)
    host.put(tokens, 4, bytearray(10), extends=False)
    assert sorted(held.length for held in host) == [4, 9]
    assert host.check_integrity() == ""
