#!/usr/bin/env python3
"""Builds what llmrack installs from: the llama-cpp-python wheel, once per machine, and whole offline releases.

llama-cpp-python is published as source only and compiles for minutes. So its wheel lives in a cache of its own, which
outlasts any virtual environment and any checkout:

    ${LLMRACK_CACHE:-~/.cache/llmrack}/
        sdist/llama_cpp_python-VERSION.tar.gz              the source archive, checked against its locked hash
        wheels/DISTRIBUTION-ARCHITECTURE-BACKEND-DIGEST/   one wheel; DIGEST covers the version and the build flags

The wheel is tagged `py3-none-linux`, so nothing but this key keeps one that was built against a newer C library from
being installed on an older system. One for CUDA has the toolkit's libraries that it calls beside it, so that hosts need
NVIDIA's driver and nothing else of it. A release adds every other wheel, the lock files and checksums:

    wheelhouse.py sdist                                      print the path of the source archive
    wheelhouse.py llama [--backend cpu]                      print the path of the wheel, building it if need be
    wheelhouse.py release --out DIR [--python 3.11]          fill DIR; print {"name", "path", "changed"} as JSON

Where another machine builds, it gets the sources and gives the release back:

    wheelhouse.py sources --out FILE                         pack what a release is made of into an archive
    wheelhouse.py take ARCHIVE --out DIR                     fill DIR with a release from an archive; print the same

Uses the standard library alone: it runs before anything is installed. Progress goes to standard error, results to
standard output. Exit codes: 0 done; 1 a build or download failed; 2 something is missing, named with its package.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

# The portable build: one plug-in per generation of x86-64, the best one chosen at run time. A wheel built for this
# machine's processor alone dies with SIGILL on an older one.
PORTABLE = ["-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON", "-DGGML_NATIVE=OFF", "-DGGML_RPC=ON"]
BACKENDS = {
    "cpu": PORTABLE,
    "cpu-native": ["-DGGML_NATIVE=ON"],
    "cuda": [*PORTABLE, "-DGGML_CUDA=ON"],
    "rocm": [*PORTABLE, "-DGGML_HIP=ON"],
    "vulkan": [*PORTABLE, "-DGGML_VULKAN=ON"],
}
TOOLS = {"cuda": ["nvcc"], "rocm": ["hipcc"], "vulkan": ["glslc"]}
PACKAGES = {
    "cc": "gcc (Debian, Ubuntu: build-essential; RHEL: gcc)",
    "c++": "g++ (Debian, Ubuntu: build-essential; RHEL: gcc-c++)",
    "nvcc": "the CUDA toolkit (Debian, Ubuntu: nvidia-cuda-toolkit)",
    "hipcc": "the ROCm compiler (hipcc)",
    "glslc": "the Vulkan shader compiler (Debian, Ubuntu: glslc and libvulkan-dev)",
}
CARRIED = {"cuda": re.compile(r"lib(cudart|cublas|cublasLt|nccl)\.so(\.\d+)*")}
"""Libraries of a backend's toolkit that go into the wheel. libcuda is the driver's; ROCm's find files of their own
beside them, and Vulkan's loader is a package of every distribution."""
STEP = re.compile(r"\[(\d+)/(\d+)\]")


class Missing(Exception):
    """Something that must be on this machine is not."""


class Failed(Exception):
    """A download or a build went wrong."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    project = Path(__file__).resolve().parents[3]
    for name, text in (
        ("sdist", "print the path of llama-cpp-python's source archive"),
        ("llama", "print the path of llama-cpp-python's wheel, building it once"),
        ("release", "fill a directory with all that an offline installation needs"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--project", type=Path, default=project, help="the llmrack source tree")
        if name != "sdist":
            command.add_argument("--backend", choices=sorted(BACKENDS), default="cpu")
            command.add_argument(
                "--cuda-architectures",
                default="",
                metavar="8.0,9.0",
                help="compute capabilities that the cuda backend is compiled for (default: all that the toolkit knows)",
            )
        if name == "llama":
            command.add_argument(
                "--if-built", action="store_true", help="print nothing and exit 1 if it is not built yet"
            )
        if name == "release":
            command.add_argument("--out", type=Path, required=True, help="directory to fill; replaced as a whole")
            command.add_argument(
                "--python",
                default=f"{sys.version_info.major}.{sys.version_info.minor}",
                help="Python version of the hosts, e.g. 3.11 (default: this one's)",
            )
    command = commands.add_parser("sources", help="pack what a release is made of, for a machine that builds it")
    command.add_argument("--project", type=Path, default=project, help="the llmrack source tree")
    command.add_argument("--out", type=Path, required=True, help="archive to write")
    command = commands.add_parser("take", help="fill a directory with a release that another machine has made")
    command.add_argument("archive", type=Path, help="its release.tar")
    command.add_argument("--out", type=Path, required=True, help="directory to fill; replaced as a whole")
    options = parser.parse_args(argv)
    try:
        if options.command == "sdist":
            print(sdist(options.project))
        elif options.command == "sources":
            pack(options.project, options.out)
        elif options.command == "take":
            print(json.dumps(take(options.archive, options.out.resolve())))
        elif options.command == "llama":
            flags = build_flags(options.backend, options.cuda_architectures)
            wheel = _only_wheel(_wheel_folder(options.project, options.backend, flags))
            if wheel is None and options.if_built:
                return 1
            print(wheel or llama(options.project, options.backend, flags))
        else:
            flags = build_flags(options.backend, options.cuda_architectures)
            print(json.dumps(release(options.project, options.backend, options.python, options.out.resolve(), flags)))
    except Missing as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2
    except (Failed, OSError) as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nwheelhouse: stopped; nothing half-made was kept", file=sys.stderr)
        return 130
    return 0


def cache() -> Path:
    """The cache directory: $LLMRACK_CACHE, else ~/.cache/llmrack."""
    return Path(os.environ.get("LLMRACK_CACHE") or Path.home() / ".cache" / "llmrack")


def platform_key() -> str:
    """DISTRIBUTION-ARCHITECTURE of this machine, e.g. "debian12-x86_64"."""
    try:
        facts = platform.freedesktop_os_release()
    except OSError:
        facts = {}
    return f"{facts.get('ID', 'linux')}{facts.get('VERSION_ID', '')}-{platform.machine()}"


def sdist(project: Path) -> Path:
    """Path of the pinned source archive, downloaded once and checked against requirements/llama.txt."""
    requirement, sha256 = _pin(project)
    folder = cache() / "sdist"
    path = folder / (requirement.replace("-", "_").replace("==", "-") + ".tar.gz")
    if path.exists():
        return path
    with _locked(folder), tempfile.TemporaryDirectory(dir=folder) as temporary:
        if path.exists():
            return path
        _say(f"fetching the source of {requirement} (75 MB)")
        _run(
            [
                *_pip(),
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary=llama-cpp-python",
                "--dest",
                temporary,
                requirement,
            ],
            "the download of llama-cpp-python's source",
        )
        fetched = next(Path(temporary).glob("*.tar.gz"))
        found = _sha256(fetched)
        if found != sha256:
            raise Failed(f"{fetched.name} has SHA-256 {found}, but requirements/llama.txt pins {sha256}")
        fetched.replace(path)
    return path


def build_flags(backend: str, cuda_architectures: str = "") -> list[str]:
    """CMake's flags for a backend. `cuda_architectures`: compute capabilities, "8.0,9.0"; empty: the toolkit's."""
    flags = list(BACKENDS[backend])
    capabilities = [one.strip() for one in cuda_architectures.split(",") if one.strip()]
    for one in capabilities:
        if not re.fullmatch(r"\d{1,2}\.\d", one):
            raise Failed(
                f"a compute capability is MAJOR.MINOR, e.g. 9.0 (nvidia-smi --query-gpu=compute_cap); not {one!r}"
            )
    if backend == "cuda" and capabilities:
        wanted = sorted({int(one.replace(".", "")) for one in capabilities})
        flags.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{number}-real' for number in wanted)}")
    return flags


def llama(project: Path, backend: str, flags: list[str]) -> Path:
    """Path of the llama-cpp-python wheel for this machine, backend and flags, compiled on the first call."""
    requirement, _ = _pin(project)
    folder = _wheel_folder(project, backend, flags)
    if wheel := _only_wheel(folder):
        return wheel
    missing = [PACKAGES[tool] for tool in ["cc", "c++", *TOOLS.get(backend, [])] if not shutil.which(tool)]
    if missing:
        raise Missing(f"cannot compile llama.cpp for {backend}; missing: {'; '.join(missing)}")
    source = sdist(project)
    with _locked(folder.parent), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        if wheel := _only_wheel(folder):
            return wheel
        cores = os.cpu_count() or 1
        _say(
            f"compiling {requirement} for {backend} on {cores} cores, once for this machine: "
            f"about {max(2, 15 // cores)} minutes"
        )
        built = Path(temporary) / "built"
        command = [*_pip(), "wheel", "--verbose", "--no-deps", "--wheel-dir", str(built), str(source)]
        _compile(command, {**os.environ, "CMAKE_ARGS": " ".join(flags)}, folder.parent / f"{folder.name}.log")
        wheel = _only_wheel(built)
        if wheel is None:
            raise Failed("the build ended well but left no wheel")
        if backend in CARRIED:
            carry(wheel, backend)
        built.replace(folder)
    return folder / wheel.name


def carry(wheel: Path, backend: str) -> list[str]:
    """Put what the backend's plug-in calls of its toolkit beside the plug-in, in the wheel. Returns the names.

    Raises Failed where a library is not found, or would not be found on a host: the plug-in looks in its own folder,
    and its libraries must do the same.
    """
    with tempfile.TemporaryDirectory(dir=wheel.parent) as temporary:
        unpacked = Path(temporary).resolve() / "wheel"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        plugin = unpacked / "bin" / f"libggml-{backend}.so"
        carried = {name: path for name, path in _called(plugin).items() if CARRIED[backend].fullmatch(name)}
        for name, path in carried.items():
            if path is None:
                raise Failed(f"{plugin.name} calls {name}, and this machine's loader does not find it")
            shutil.copy(path, plugin.parent / name)
        found = _called(plugin, {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"})
        for name in carried:
            if found.get(name) != plugin.parent / name:
                raise Failed(f"{plugin.name} would not find {name} beside it, but at {found.get(name)}")
        _rewrite(wheel, {f"bin/{name}": plugin.parent / name for name in carried})
    return sorted(carried)


def _called(library: Path, env: dict[str, str] | None = None) -> dict[str, Path | None]:
    """What the loader would load with a library, by name; None where it finds nothing."""
    done = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise Failed(f"ldd {library.name}: {done.stderr.strip() or done.stdout.strip()}")
    found = re.findall(r"^\s*(\S+) => (not found|/\S+)", done.stdout, re.MULTILINE)
    return {name: None if path == "not found" else Path(path) for name, path in found}


def _rewrite(wheel: Path, more: dict[str, Path]) -> None:
    """Add files to a wheel, and to its list of files."""
    new = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in old.infolist():
            if not entry.filename.endswith(".dist-info/RECORD"):
                archive.writestr(entry, old.read(entry), zipfile.ZIP_DEFLATED)
                continue
            record, lines = entry, old.read(entry).decode()
        for name, path in more.items():
            archive.write(path, name)
            digest = base64.urlsafe_b64encode(bytes.fromhex(_sha256(path))).rstrip(b"=").decode()
            lines += f"{name},sha256={digest},{path.stat().st_size}\n"
        archive.writestr(record, lines, zipfile.ZIP_DEFLATED)
    new.replace(wheel)


def release(project: Path, backend: str, python: str, out: Path, flags: list[str]) -> dict[str, object]:
    """Fill `out` with a release: wheels, lock files, SHA256SUMS, release.json and `release`, which holds its name.

    The name is VERSION-DIGEST; the digest covers llmrack's own source, the locks, the hosts' Python and the
    llama-cpp-python wheel, so that equal input gives an equal name, and a directory that has it already is left alone.
    """
    engine = llama(project, backend, flags)
    version = _version(project)
    digest = hashlib.sha256(f"{python} {backend} {platform_key()} {_sha256(engine)}\n".encode())
    for path in sorted(_sources(project)):
        digest.update(f"{path.relative_to(project)} {_sha256(path)}\n".encode())
    name = f"{version}-{digest.hexdigest()[:8]}"
    marker = out / "release"
    if marker.exists() and marker.read_text().strip() == name:
        return {"name": name, "path": str(out), "changed": False}

    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.parent), tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        stage = Path(temporary) / "release"
        stage.mkdir()
        _say(f"collecting release {name} for Python {python}")
        pip = _pip()
        locks = [project / "requirements" / f"{extra}.txt" for extra in ("node", "gate")]
        for lock in locks:
            shutil.copy(lock, stage / lock.name)
            wanted = Path(temporary) / lock.name
            wanted.write_text(needed(lock.read_text(), python))
            _run(
                [
                    *pip, "download", "--quiet", "--require-hashes", "--no-deps", "--only-binary=:all:",
                    "--python-version", python, "--implementation", "cp", *_platforms(),
                    "--dest", str(stage), "--requirement", str(wanted),
                ],
                f"the download of {lock.name}'s wheels",
            )  # fmt: skip
        _run(
            [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(stage), str(project)],
            "the build of llmrack's own wheel",
        )
        shutil.copy(engine, stage)
        facts = {
            "name": name,
            "version": version,
            "platform": platform_key(),
            "python": python,
            "backend": backend,
            "libc": "-".join(platform.libc_ver()),
        }
        (stage / "release.json").write_text(json.dumps(facts, indent=2) + "\n")
        sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(stage.iterdir())]
        (stage / "SHA256SUMS").write_text("".join(sums))
        (stage / "release").write_text(name + "\n")
        _put(stage, out, Path(temporary))
    return {"name": name, "path": str(out), "changed": True}


def pack(project: Path, out: Path) -> None:
    """Write an archive of the files that a release is made of, and of this program; the same files, the same bytes."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    out.parent.mkdir(parents=True, exist_ok=True)
    paths = {*_sources(project), *(project / name for name in ("README.md", "LICENSE"))}
    paths.add(project / "roles" / "llmrack_artifacts" / "files" / "wheelhouse.py")
    part = out.with_name(out.name + ".part")
    with tarfile.open(part, "w") as archive:
        for path in sorted(paths):
            archive.add(path, path.relative_to(project), filter=plain)
    part.replace(out)


def take(archive: Path, out: Path) -> dict[str, object]:
    """Fill `out` with the release that an archive holds, when every file is what its checksums say. Raises Failed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.parent), tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        stage = Path(temporary) / "release"
        stage.mkdir()
        with tarfile.open(archive) as packed:
            for member in packed:
                name = Path(member.name).name
                if member.isfile() and (source := packed.extractfile(member)):
                    with (stage / name).open("wb") as file:
                        shutil.copyfileobj(source, file)
        due = dict(line.split("  ")[::-1] for line in (stage / "SHA256SUMS").read_text().splitlines())
        for path in stage.iterdir():
            if path.name not in ("SHA256SUMS", "release") and due.pop(path.name, "") != _sha256(path):
                raise Failed(f"{path.name} of {archive} is not what its checksums say")
        if due:
            raise Failed(f"{archive} lacks {', '.join(sorted(due))}")
        name = (stage / "release").read_text().strip()
        _put(stage, out, Path(temporary))
    return {"name": name, "path": str(out), "changed": True}


def _put(stage: Path, out: Path, temporary: Path) -> None:
    """Put a whole directory in the place of another, whose remains go with `temporary`."""
    if out.exists():
        out.replace(temporary / "old")
    stage.replace(out)
    out.chmod(0o755)


def _wheel_folder(project: Path, backend: str, flags: list[str]) -> Path:
    requirement, sha256 = _pin(project)
    carried = CARRIED[backend].pattern if backend in CARRIED else ""
    digest = hashlib.sha256(f"{requirement} {sha256} {' '.join([*flags, carried]).strip()}".encode()).hexdigest()[:12]
    return cache() / "wheels" / f"{platform_key()}-{backend}-{digest}"


def _pin(project: Path) -> tuple[str, str]:
    """(`llama-cpp-python==X`, SHA-256 of its source archive) from requirements/llama.txt."""
    path = project / "requirements" / "llama.txt"
    found = re.search(r"^(llama-cpp-python==\S+) --hash=sha256:([0-9a-f]{64})$", path.read_text(), re.MULTILINE)
    if not found:
        raise Failed(f"{path} has no line 'llama-cpp-python==X --hash=sha256:...'")
    return found[1], found[2]


def _version(project: Path) -> str:
    found = re.search(r'^version = "([^"]+)"$', (project / "pyproject.toml").read_text(), re.MULTILINE)
    if not found:
        raise Failed(f"{project / 'pyproject.toml'} has no version")
    return found[1]


def _sources(project: Path) -> Iterator[Path]:
    for package in ("llmnode", "llmgate"):
        for path in (project / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path
    yield project / "pyproject.toml"
    yield from (project / "requirements").glob("*.txt")


def _platforms() -> list[str]:
    """Tags of the binary wheels that this machine's C library can load, newest first."""
    machine = platform.machine()
    _, libc = platform.libc_ver()
    minor = int(libc.split(".")[1]) if libc.startswith("2.") else 17
    tags = [f"manylinux_2_{n}_{machine}" for n in range(minor, 4, -1)]
    tags += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}", f"linux_{machine}"]
    return [word for tag in tags for word in ("--platform", tag)]


def needed(lock: str, python: str) -> str:
    """The entries of a lock file that hosts with this Python ("3.11") need, without their markers.

    pip judges markers by the Python that it runs on, which is the controller's, also where it is told to download for
    another. What only some patch releases of a Python need is taken for all of them.
    """
    entries = [entry.groups("") for entry in _ENTRY.finditer(lock)]
    patches = [f"{python}.0", f"{python}.99"]
    done = subprocess.run(
        [_pip()[0], "-c", _JUDGE],
        input=json.dumps([[marker for _, marker, _ in entries], python, patches]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"the lock files' markers cannot be read: {done.stderr.strip()}")
    holds = json.loads(done.stdout)
    return "".join(f"{what}{rest}\n" for (what, _, rest), held in zip(entries, holds, strict=True) if held)


_ENTRY = re.compile(r"^([^\s#].*?)(?: ; (.*?))?((?: \\)?$(?:\n[ \t]+.*)*)", re.MULTILINE)
"""What of which version, its marker, and the lines of its hashes."""
_JUDGE = """
import json, sys
from pip._vendor.packaging.markers import Marker
markers, python, patches = json.load(sys.stdin)
def holds(marker):
    hosts = [{"python_version": python, "python_full_version": patch} for patch in patches]
    return not marker or any(Marker(marker).evaluate(host) for host in hosts)
print(json.dumps([holds(marker) for marker in markers]))
"""
"""Run by the Python that has pip, which has a reader of markers."""


def _pip() -> list[str]:
    """A pip that works: this Python's, else one in a virtual environment of our own in the cache."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    home = cache() / f"pip-{sys.version_info.major}.{sys.version_info.minor}"
    if not (home / "bin" / "pip").exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
        except subprocess.CalledProcessError:
            raise Missing("Python's venv module is missing (Debian, Ubuntu: python3-venv)") from None
    return [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]


def _compile(command: list[str], env: dict[str, str], log: Path) -> None:
    """Run the build, showing how far it is; the whole output goes to `log`, its end to the error."""
    started = shown = time.monotonic()
    lines: list[str] = []
    with log.open("w") as out:
        build = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert build.stdout is not None
        try:
            for line in build.stdout:
                out.write(line)
                lines = [*lines[-30:], line]
                step = STEP.search(line)
                every = 0.5 if sys.stderr.isatty() else 20
                if step and time.monotonic() - shown >= every:
                    shown = time.monotonic()
                    done, total = int(step[1]), int(step[2])
                    _progress(done, total, shown - started)
        except BaseException:
            build.terminate()
            build.wait()
            raise
        if build.wait() != 0:
            raise Failed(f"llama.cpp did not compile; the whole log is {log}; its end:\n{''.join(lines)}")
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _say(f"compiled in {(time.monotonic() - started) / 60:.1f} minutes")


def _progress(done: int, total: int, elapsed_s: float) -> None:
    left_min = elapsed_s / max(done, 1) * (total - done) / 60
    text = f"compiling llama.cpp: {done} of {total} files, about {left_min:.0f} min left"
    if sys.stderr.isatty():
        print(f"\r{text:<70}", end="", file=sys.stderr, flush=True)
    else:
        _say(text)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"{what} failed:\n{done.stderr.strip()[-3000:]}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder`, so that two builds on one machine become one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another build that holds {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _only_wheel(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.whl"))), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _say(text: str) -> None:
    print(f"wheelhouse: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
