#!/usr/bin/env python3
"""What is in a backup, with a checksum for each file, so that a torn one is not put back.

    contents.py seal FOLDER                        writes FOLDER/contents.json
    contents.py verify FOLDER [GATE...]            exit code 2 and a reason: it is torn, or has nothing of a gate
    contents.py secrets FOLDER TARGET [--overwrite] [--check]
                                                   puts the secrets back; prints what changes, one name a line

Runs on the controller. Files of a backup: gates/HOST.db, and secrets/ as the folder of the inventory was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

SEAL = "contents.json"


class Refusal(Exception):
    """It is not done, and nothing has changed; the message says why."""


def seal(folder: Path) -> None:
    _write(folder / SEAL, json.dumps(_sums(folder), indent=2).encode() + b"\n")


def verify(folder: Path, gates: list[str]) -> None:
    """Raises Refusal unless all is as it was sealed, and there is something of each gate."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        there = sorted(path.parent.name for path in folder.parent.glob(f"*/{SEAL}"))
        raise Refusal(f"{folder} is no whole backup; there are: {', '.join(there) or 'none'}") from None
    except ValueError as error:
        raise Refusal(f"{folder / SEAL} cannot be read: {error}") from error
    found = _sums(folder)
    for name in sorted(sealed.keys() | found.keys()):
        if name not in found:
            raise Refusal(f"{folder / name} is missing")
        if sealed.get(name) != found[name]:
            raise Refusal(f"{folder / name} is not as it was when the backup was made")
    for gate in gates:
        if f"gates/{gate}.db" not in sealed:
            known = sorted(Path(name).stem for name in sealed if name.startswith("gates/"))
            raise Refusal(f"{folder.name} has nothing of {gate}; it has {', '.join(known) or 'no gate'}")


def put_back(folder: Path, target: Path, *, overwrite: bool, check: bool) -> list[str]:
    """The names that were, or with `check` would be, written. Raises Refusal before the first."""
    source = folder / "secrets"
    wanted = {path.relative_to(source): path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}
    changed = [name for name, data in wanted.items() if not _same(target / name, data)]
    others = [str(name) for name in changed if (target / name).exists()]
    if others and not overwrite:
        raise Refusal(
            f"{target} has other secrets than the backup ({', '.join(others)}); nothing was changed. To replace them: "
            "-e llmrack_backup_overwrite=true"
        )
    for name in () if check else changed:
        for folder in reversed((target / name).relative_to(target).parents):
            (target / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(target / name, wanted[name])
    return [str(name) for name in changed]


def _same(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def _sums(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and its owner's alone from the first byte."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("seal", "verify", "secrets"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.choices["verify"].add_argument("gates", nargs="*")
    commands.choices["secrets"].add_argument("target", type=Path)
    for flag in ("--overwrite", "--check"):
        commands.choices["secrets"].add_argument(flag, action="store_true")
    asked = parser.parse_args()
    try:
        if asked.command == "seal":
            seal(asked.folder)
        elif asked.command == "verify":
            verify(asked.folder, asked.gates)
        else:
            for name in put_back(asked.folder, asked.target, overwrite=asked.overwrite, check=asked.check):
                print(name)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
