"""Builds the rival: llama.cpp's own llama-server, from the source inside the pinned llama-cpp-python archive.

Compiled once per machine for its own processor (GGML_NATIVE), which is the fastest build there is of it, and kept in
the cache. Needs cmake and a compiler.

But for AMX: GCC 12 drops most of the tile configuration that llama.cpp writes, and every batch then ends the process
(llmnode leaves its AMX plug-in out for the same reason, see engine/llama.py), so both sides run without.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.tiny_model import WHEELHOUSE, cache

NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() == "x86_64" else ""
FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_APP=OFF",
    f"-DCMAKE_C_FLAGS={NO_AMX}", f"-DCMAKE_CXX_FLAGS={NO_AMX}",
]  # fmt: skip


def llama_server() -> Path:
    """Path of the llama-server program, compiled on the first call."""
    sdist = Path(
        subprocess.run(
            [sys.executable, str(WHEELHOUSE), "sdist"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
    )
    digest = hashlib.sha256(" ".join(FLAGS).encode()).hexdigest()[:8]
    program = cache() / "rivals" / f"{sdist.name.removesuffix('.tar.gz')}-{digest}" / "llama-server"
    if program.exists():
        return program
    if not shutil.which("cmake"):
        raise SystemExit("bench: cmake is missing (Debian, Ubuntu: apt-get install cmake build-essential)")
    program.parent.mkdir(parents=True, exist_ok=True)
    print("bench: compiling llama-server, once for this machine: several minutes", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as temporary:
        with tarfile.open(sdist) as archive:
            archive.extractall(temporary, filter="data")
        source = next(Path(temporary).glob("*/vendor/llama.cpp"))
        build = Path(temporary) / "build"
        subprocess.run(
            ["cmake", "-S", str(source), "-B", str(build), *FLAGS], check=True, stdout=subprocess.DEVNULL
        )  # fmt: skip
        subprocess.run(
            ["cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(os.cpu_count() or 1)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (build / "bin" / "llama-server").replace(program)
    return program


if __name__ == "__main__":
    print(llama_server())
