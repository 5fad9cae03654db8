"""A promtool to test alert rules with: the machine's own, or Debian's, unpacked into the cache and not installed.

Installing the package would start a Prometheus on the machine of whoever runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def find() -> tuple[Path | None, str]:
    """(promtool, "") or (None, why there is none)."""
    found = shutil.which("promtool")
    if found:
        return Path(found), ""
    home = Path(os.environ.get("LLMRACK_CACHE") or Path.home() / ".cache" / "llmrack") / "promtool"
    if home.exists():
        return home, ""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        return None, f"there is no promtool here, nor {missing[0]} to fetch Debian's"
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as folder:
        fetched = _run("apt-get", "download", "prometheus", cwd=folder)
        archives = list(Path(folder).glob("prometheus_*.deb"))
        if fetched.returncode or not archives:
            return None, f"there is no promtool here, and Debian's cannot be fetched: {fetched.stderr.strip()[-200:]}"
        unpacked = _run("dpkg-deb", "--extract", str(archives[0]), "tree", cwd=folder)
        program = Path(folder) / "tree/usr/bin/promtool"
        if unpacked.returncode or _run(str(program), "--version", cwd=folder).returncode:
            return None, "Debian's promtool does not run on this machine"
        program.replace(home)
    return home, ""


def _run(*command: str, cwd: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=cwd, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer within 120 s")
