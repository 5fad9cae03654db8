#!/usr/bin/env python3
"""Removes releases that a host needs no more. Owns what lies in ROOT/releases; installs and switches nothing.

    retention.py < {"root", "wanted", "keep", "check"}     prints {"removed": [name, ...], "changed"}

Kept are the newest `keep` complete releases, the wanted one, those that the links `current`, `previous` and
`instances/*` point at, those that `kept/*/*/release` names (a rollback goes to them) and those that a process runs
from. What has no mark of being complete was interrupted while it was installed, and goes. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    print(json.dumps(retain(**json.load(sys.stdin))))
    return 0


def retain(root: str, wanted: str, keep: int, check: bool = False, processes: str = "/proc") -> dict[str, Any]:
    """Remove what is not to be kept, or with `check` say what would be."""
    folder = Path(root) / "releases"
    releases = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    complete = [path for path in releases if (path / ".complete").exists()]
    newest = sorted(complete, key=lambda path: (path / ".complete").stat().st_mtime_ns, reverse=True)[:keep]
    links = [Path(root) / name for name in ("current", "previous")] + list((Path(root) / "instances").glob("*"))
    needed = {wanted, *(path.name for path in newest), *(link.resolve().name for link in links if link.is_symlink())}
    needed |= {path.read_text().strip() for path in Path(root).glob("kept/*/*/release")}
    needed |= running(folder.resolve(), Path(processes))
    doomed = sorted((path for path in releases if path.name not in needed), key=lambda path: path.name)
    if not check:
        for path in doomed:
            # First the mark: what is interrupted from here on counts as never installed.
            (path / ".complete").unlink(missing_ok=True)
            shutil.rmtree(path)
    return {"removed": [path.name for path in doomed], "changed": bool(doomed)}


def running(folder: Path, processes: Path) -> set[str]:
    """Names of the releases that a process has mapped, open, as its program, its directory or in its command line."""
    inside = re.compile(re.escape(str(folder)) + r"/([^/\s\0]+)")
    found: set[str] = set()
    for process in processes.glob("[0-9]*"):
        texts = []
        for name in ("maps", "cmdline"):
            with contextlib.suppress(OSError):
                texts.append((process / name).read_text(errors="replace"))
        with contextlib.suppress(OSError):
            for link in (process / "exe", process / "cwd", *(process / "fd").iterdir()):
                with contextlib.suppress(OSError):
                    texts.append(str(link.readlink()))
        for text in texts:
            found |= set(inside.findall(text))
    return found


if __name__ == "__main__":
    sys.exit(main())
