"""Makes the rivals: built or unpacked into the cache once, and never installed on the machine.

Those of llmnode come from the pinned llama-cpp-python: same llama.cpp on every side, so that only the servers differ.

llama-server is llama.cpp's own C++ server, from the source inside the archive. Compiled once per machine for its own
processor (GGML_NATIVE), which is the fastest build there is of it, and kept in the cache. Needs cmake and a compiler.
But for AMX: GCC 12 drops most of the tile configuration that llama.cpp writes, and every batch then ends the process
(llmnode leaves its AMX plug-in out for the same reason, see engine/llama.py), so both sides run without.

llama_cpp.server is the package's own Python server: the wheel that llmnode runs on, in a virtual environment of its own
with what the server needs beside it (python_server.txt, exact versions).

Those of llmgate: nginx is Debian's package, downloaded by apt and unpacked, unless the machine has it. LiteLLM's proxy
comes from PyPI into a virtual environment of its own (litellm.txt, exact versions).

    python -m tests.bench.rival     makes all of them and prints their paths
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
PYTHON_SERVER = Path(__file__).with_name("python_server.txt")
LITELLM = Path(__file__).with_name("litellm.txt")


def llama_server() -> Path:
    """Path of the llama-server program, compiled on the first call. Raises SystemExit when that fails."""
    sdist = _wheelhouse("sdist")
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
        log = program.with_name("build.log")
        _run(["cmake", "-S", str(source), "-B", str(build), *FLAGS], log)
        _run(["cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(os.cpu_count() or 1)], log)
        (build / "bin" / "llama-server").replace(program)
    return program


def python_server() -> Path:
    """Path of a Python with `llama_cpp.server` in it, set up on the first call. Raises SystemExit when that fails."""
    wheel = _wheelhouse("llama")
    return _environment("llama_cpp_server", PYTHON_SERVER, wheel.parent.name, str(wheel))


def litellm() -> Path:
    """Path of the `litellm` program, set up on the first call. Raises SystemExit when that fails."""
    return _environment("litellm", LITELLM).with_name("litellm")


def nginx() -> Path:
    """Path of the nginx program, fetched on the first call. Raises SystemExit when that fails."""
    installed = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if installed:
        return Path(installed)
    folder = cache() / "rivals" / "nginx"
    program = folder / "usr" / "sbin" / "nginx"
    if not program.exists():
        if not shutil.which("apt-get"):
            raise SystemExit("bench: nginx is missing, and this is no Debian or Ubuntu that it could be fetched for")
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            # Where the lists of packages are old, `apt-get update` (as root) makes them new.
            _run(["apt-get", "download", "nginx"], log, Path(temporary))
            package = next(Path(temporary).glob("nginx_*.deb"))
            _run(["dpkg-deb", "--extract", str(package), str(Path(temporary) / "root")], log)
            (Path(temporary) / "root").replace(folder)
    return program


def versions() -> dict[str, str]:
    """Which nginx and which LiteLLM: what apt has changes, so figures must name it."""
    said = subprocess.run([str(nginx()), "-v"], capture_output=True, text=True).stderr.strip()
    return {
        "nginx": said.rpartition("/")[2],
        "LiteLLM": next(
            line.partition("==")[2] for line in LITELLM.read_text().splitlines() if line.startswith("litellm==")
        ),
    }


def _environment(name: str, requirements: Path, salt: str = "", *wheels: str) -> Path:
    """The Python of a virtual environment that holds exactly what is listed, and the wheels. Raises SystemExit."""
    digest = hashlib.sha256(f"{salt} {requirements.read_text()}".encode()).hexdigest()[:8]
    folder = cache() / "rivals" / f"{name}-{platform.python_version()}-{digest}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"bench: setting up {name} in a virtual environment of its own", file=sys.stderr, flush=True)
        log = folder.with_suffix(".log")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], log)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        _run([*pip, "--requirement", str(requirements)], log)
        for wheel in wheels:
            _run([*pip, wheel], log)
        ready.touch()
    return python


def _wheelhouse(what: str) -> Path:
    found = subprocess.run([sys.executable, str(WHEELHOUSE), what], check=True, stdout=subprocess.PIPE, text=True)
    return Path(found.stdout.strip())


def _run(command: list[str], log: Path, folder: Path | None = None) -> None:
    """Run a command, its thousands of lines of warnings in a file. Raises SystemExit with the end of it."""
    with log.open("ab") as out:
        code = subprocess.run(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=folder).returncode
    if code != 0:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"bench: {command[0]} ended with code {code}; all of it in {log}:\n{tail}")


if __name__ == "__main__":
    for rival in (llama_server, python_server, nginx, litellm):
        print(rival())
