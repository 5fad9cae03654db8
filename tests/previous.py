"""The previous release, taken from this repository's history: its whole source tree, deployable as it was then.

Owns the choice, a commit in the file `previous-release`. Knows nothing of what is done with the tree.
"""

from __future__ import annotations

import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMIT = next(
    line for line in Path(__file__).with_name("previous-release").read_text().splitlines() if not line.startswith("#")
)


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, stdin=subprocess.DEVNULL)


def missing() -> str:
    """Why the previous release is not at hand; empty when it is. A clone may be shallow, an archive has no history."""
    if _git("cat-file", "-e", f"{COMMIT}^{{commit}}").returncode == 0:
        return ""
    return f"this clone does not have commit {COMMIT[:12]}, the previous release (`git fetch --unshallow`)"


def unpack(folder: Path) -> Path:
    """Put its source tree into the folder. Raises RuntimeError where `missing` says why."""
    if missing():
        raise RuntimeError(missing())
    packed = _git("archive", COMMIT)
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder
