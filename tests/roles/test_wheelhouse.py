"""The wheelhouse: what it keeps, what it says when something is missing, and when a release counts as another."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "roles" / "llmrack_artifacts" / "files" / "wheelhouse.py"


def wheelhouse(*arguments: str, cache: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LLMRACK_CACHE": str(cache), **({} if path is None else {"PATH": path})}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=env, timeout=250, check=False
    )


@pytest.fixture
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheelhouse", SCRIPT)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A source tree with all that a release is made of."""
    copy = tmp_path / "project"
    for name in ("llmnode", "llmgate", "requirements"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def test_a_missing_compiler_is_named_with_its_package(tmp_path: Path) -> None:
    done = wheelhouse("llama", cache=tmp_path, path="/nonexistent")
    assert done.returncode == 2
    assert "gcc" in done.stderr and "build-essential" in done.stderr
    assert "Traceback" not in done.stderr


def test_asking_whether_it_is_built_builds_nothing(tmp_path: Path) -> None:
    done = wheelhouse("llama", "--if-built", cache=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert not list(tmp_path.rglob("*.whl"))


def test_the_built_wheel_is_found_again() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "llama"], capture_output=True, text=True, check=True)
    wheel = Path(done.stdout.strip())
    assert wheel.is_file() and wheel.suffix == ".whl"
    assert ROOT not in wheel.parents, "it outlasts this checkout"


def test_a_tampered_source_archive_is_refused(
    module: ModuleType, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMRACK_CACHE", str(tmp_path / "cache"))

    def fetch(command: list[str], what: str) -> None:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llama_cpp_python-0.3.36.tar.gz").write_bytes(b"something else")

    monkeypatch.setattr(module, "_run", fetch)
    with pytest.raises(module.Failed, match="SHA-256"):
        module.sdist(project)
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))


def test_a_release_is_complete_and_named_by_what_is_in_it(module: ModuleType, project: Path, tmp_path: Path) -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    out = tmp_path / "release"
    first = module.release(project, "cpu", python, out)
    assert first["changed"] and (out / "release").read_text().strip() == first["name"]
    names = {path.name.split("-")[0] for path in out.glob("*.whl")}
    assert {"llmrack", "llama_cpp_python", "sanic", "httpx", "psutil"} <= names
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout

    assert module.release(project, "cpu", python, out) == {**first, "changed": False}
    (project / "llmgate" / "cli.py").write_text("# another release\n")
    other = module.release(project, "cpu", python, out)
    assert other["changed"] and other["name"] != first["name"]
    assert (out / "release").read_text().strip() == other["name"]
