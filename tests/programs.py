"""Programs of the system that tests start: where they are, and the Debian package that each comes in.

`python -m tests.programs` installs what is missing, as root on Debian or Ubuntu; elsewhere it says what is, and tests
that need it are skipped and say so too. Knows nothing of what is done with the programs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGES: Mapping[str, str] = {
    "initdb": "postgresql",
    "postgres": "postgresql",
    "redis-server": "redis-server",
    "chromium": "chromium",
}
"""By program."""
_ELSEWHERE = {"initdb": "/usr/lib/postgresql", "postgres": "/usr/lib/postgresql"}
"""Debian keeps these out of the way, so that several releases can be there: FOLDER/RELEASE/bin."""


def find(program: str) -> Path | None:
    """The newest one that is here."""
    if program in _ELSEWHERE:
        found = Path(_ELSEWHERE[program]).glob(f"*/bin/{program}")
        newest = max(found, key=lambda path: [int(n) for n in path.parts[4].split(".") if n.isdigit()], default=None)
        if newest:
            return newest
    here = shutil.which(program)
    return Path(here) if here else None


def need(program: str) -> Path:
    """The program; without it the test is skipped."""
    found = find(program)
    if found is None:
        pytest.skip(f"there is no {program} here (Debian, Ubuntu: package {PACKAGES[program]})")
    return found


def missing() -> list[str]:
    """Packages of programs that are not here."""
    return sorted({package for program, package in PACKAGES.items() if find(program) is None})


def prepare() -> None:
    """Install them where that is possible; say so where it is not."""
    packages = missing()
    if not packages:
        return
    names = " ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"tests that need these packages will be skipped: {names}", file=sys.stderr)
        return
    print(f"installing for the tests: {names}", file=sys.stderr)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *command], env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"apt-get {command[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}", file=sys.stderr)
            return


if __name__ == "__main__":
    prepare()
