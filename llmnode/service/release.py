"""Which release of llmrack this process runs: the playbooks compare it with the one they want."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def release() -> str:
    """The name of the release folder, e.g. "0.1.0-1a2b3c4d", or the bare version outside of one.

    The roles install each release as a virtual environment of its own below `releases/`, so the folder of the running
    interpreter says which one this is, also after `current` has been switched to another.
    """
    prefix = Path(sys.prefix).resolve()
    if prefix.parent.name == "releases":
        return prefix.name
    try:
        return version("llmrack")
    except PackageNotFoundError:
        return "unknown"
