"""A backup is put back whole or not at all, and never over other secrets unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.roles.programs import load

contents = load("llmrack_backup", "contents")


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    folder = tmp_path / "backups/one"
    for name, text in (("gates/gate1.db", "keys"), ("secrets/fleet-token", "t"), ("secrets/ca/ca.key", "k")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    contents.seal(folder)
    return folder


def test_a_whole_backup_is_good(backup: Path) -> None:
    contents.verify(backup, ["gate1"])


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("gates/gate1.db", "kezs", "is not as it was when the backup was made"),
        ("secrets/ca/ca.key", None, "is missing"),
        ("secrets/more", "x", "is not as it was when the backup was made"),
        ("contents.json", "{", "cannot be read"),
    ],
)
def test_a_torn_backup_is_refused_by_the_name_of_the_file(
    backup: Path, name: str, text: str | None, complaint: str
) -> None:
    (backup / name).unlink() if text is None else (backup / name).write_text(text)
    with pytest.raises(contents.Refusal, match=complaint) as refused:
        contents.verify(backup, ["gate1"])
    assert name in str(refused.value)


def test_a_backup_that_is_not_there_is_told_with_those_that_are(backup: Path) -> None:
    with pytest.raises(contents.Refusal, match="two is no whole backup; there are: one"):
        contents.verify(backup.parent / "two", [])


def test_a_gate_that_has_no_copy_is_named(backup: Path) -> None:
    with pytest.raises(contents.Refusal, match="has nothing of gate2; it has gate1"):
        contents.verify(backup, ["gate1", "gate2"])


def test_secrets_come_back_as_their_owners_alone(backup: Path, tmp_path: Path) -> None:
    target = tmp_path / "secrets"
    assert contents.put_back(backup, target, overwrite=False, check=True) == ["ca/ca.key", "fleet-token"]
    assert not target.exists()
    assert contents.put_back(backup, target, overwrite=False, check=False) == ["ca/ca.key", "fleet-token"]
    assert (target / "ca/ca.key").read_text() == "k"
    assert (target / "ca/ca.key").stat().st_mode & 0o777 == 0o600
    assert {path.stat().st_mode & 0o777 for path in (target, target / "ca")} == {0o700}
    assert contents.put_back(backup, target, overwrite=False, check=False) == []


def test_other_secrets_are_replaced_only_when_asked(backup: Path, tmp_path: Path) -> None:
    target = tmp_path / "secrets"
    target.mkdir()
    (target / "fleet-token").write_text("of another fleet")
    with pytest.raises(contents.Refusal, match=r"other secrets than the backup \(fleet-token\)"):
        contents.put_back(backup, target, overwrite=False, check=False)
    assert sorted(path.name for path in target.iterdir()) == ["fleet-token"]
    assert contents.put_back(backup, target, overwrite=True, check=False) == ["ca/ca.key", "fleet-token"]
    assert (target / "fleet-token").read_text() == "t"
