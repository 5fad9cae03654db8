"""Writes the lock files: `make lock`. Needs uv and an index; names no index in what it writes.

All extras are resolved together first, so that they can share one environment; each extra's file is then the part of
that answer which it needs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXTRAS = ("node", "gate", "deploy", "test", "dev")
OPTIONS = [
    "--universal", "--python-version=3.10", "--generate-hashes", "--no-emit-package=llama-cpp-python",
    "--no-emit-index-url", "--no-emit-find-links", "--no-header", "--no-annotate", "--quiet",
]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        together = Path(temporary) / "all.txt"
        resolve(together, [f"--extra={extra}" for extra in EXTRAS], [])
        # Constraints without hashes: each file gets its own.
        plain = Path(temporary) / "constraints.txt"
        plain.write_text("\n".join(re.findall(r"^([A-Za-z0-9][^\\\n]*?)\s*\\?$", together.read_text(), re.MULTILINE)))
        for extra in EXTRAS:
            resolve(HERE / f"{extra}.txt", [f"--extra={extra}"], [f"--constraint={plain}"])


def resolve(out: Path, extras: list[str], more: list[str]) -> None:
    command = ["uv", "pip", "compile", str(HERE.parent / "pyproject.toml"), f"--output-file={out}"]
    out.unlink(missing_ok=True)
    subprocess.run([*command, *extras, *more, *OPTIONS], check=True, stdout=subprocess.DEVNULL)
    print(f"{out.name}: {len(re.findall('==', out.read_text()))} packages", file=sys.stderr)


if __name__ == "__main__":
    main()
