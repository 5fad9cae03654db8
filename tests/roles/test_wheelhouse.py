"""The wheelhouse: what it keeps, what it says when something is missing, and when a release counts as another."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.roles.programs import load

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "roles" / "llmrack_artifacts" / "files" / "wheelhouse.py"


def wheelhouse(*arguments: str, cache: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LLMRACK_CACHE": str(cache), **({} if path is None else {"PATH": path})}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=env, timeout=250, check=False
    )


@pytest.fixture
def module() -> ModuleType:
    return load("llmrack_artifacts", "wheelhouse")


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
    first = module.release(project, "cpu", python, out, module.build_flags("cpu"))
    assert first["changed"] and (out / "release").read_text().strip() == first["name"]
    names = {path.name.split("-")[0] for path in out.glob("*.whl")}
    assert {"llmrack", "llama_cpp_python", "sanic", "httpx", "psutil"} <= names
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout

    assert module.release(project, "cpu", python, out, module.build_flags("cpu")) == {**first, "changed": False}
    (project / "llmgate" / "cli.py").write_text("# another release\n")
    other = module.release(project, "cpu", python, out, module.build_flags("cpu"))
    assert other["changed"] and other["name"] != first["name"]
    assert (out / "release").read_text().strip() == other["name"]


def test_an_extra_is_in_releases_that_ask_for_it_alone(
    module: ModuleType, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks: list[str] = []
    monkeypatch.setattr(module, "llama", lambda *_: SCRIPT)
    monkeypatch.setattr(module, "_run", lambda command, what: locks.append(Path(command[-1]).name))
    names = set()
    for extras in ("", "telemetry"):
        made = module.release(project, "cpu", "3.11", tmp_path / "out", [], module._extras(extras))
        names.add(made["name"])
    assert locks == ["node.txt", "gate.txt", "project", "node.txt", "gate.txt", "telemetry.txt", "project"]
    assert len(names) == 2
    with pytest.raises(module.Failed, match="there is no extra 'other'; there are telemetry"):
        module._extras("other")


def test_a_release_has_what_the_hosts_python_needs_whatever_the_controllers_is(module: ModuleType) -> None:
    lock = (
        "# a remark\n"
        "always==1 \\\n    --hash=sha256:aa \\\n    --hash=sha256:ab\n"
        "old==1 ; python_full_version < '3.11' \\\n    --hash=sha256:bb\n"
        "early==1 ; python_full_version < '3.11.3' \\\n    --hash=sha256:cc\n"
        "split==1 ; python_full_version == '3.11.*' \\\n    --hash=sha256:dd\n"
        "split==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:ee\n"
        "windows==1 ; sys_platform == 'win32' \\\n    --hash=sha256:ff\n"
        "version==1 ; python_version < '3.11'\n"
    )

    def names(python: str) -> list[str]:
        return re.findall(r"^(\w+==\d)", module.needed(lock, python), re.MULTILINE)

    assert names("3.10") == ["always==1", "old==1", "early==1", "version==1"]
    assert names("3.11") == ["always==1", "early==1", "split==1"]
    assert names("3.13") == ["always==1", "split==2"]
    assert module.needed(lock, "3.12").splitlines() == [
        "always==1 \\", "    --hash=sha256:aa \\", "    --hash=sha256:ab", "split==2 \\", "    --hash=sha256:ee",
    ]  # fmt: skip


def test_cuda_is_compiled_for_the_capabilities_that_are_named_and_keyed_by_them(
    module: ModuleType, project: Path
) -> None:
    flags = module.build_flags("cuda", "9.0, 8.0,9.0")
    assert flags[-1] == "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real"
    assert module.build_flags("cpu", "9.0") == module.BACKENDS["cpu"]
    folders = {module._wheel_folder(project, "cuda", module.build_flags("cuda", one)) for one in ("", "8.0", "9.0")}
    assert len(folders) == 3
    with pytest.raises(module.Failed, match=r"MAJOR\.MINOR, e\.g\. 9\.0 .*not 'sm_90'"):
        module.build_flags("cuda", "sm_90")


def test_a_release_that_another_machine_built_arrives_whole_or_not_at_all(module: ModuleType, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "a.whl").write_text("a wheel")
    (made / "release").write_text("1-abc\n")
    (made / "SHA256SUMS").write_text(f"{module._sha256(made / 'a.whl')}  a.whl\n")

    def taken() -> dict[str, object]:
        with tarfile.open(tmp_path / "release.tar", "w") as archive:
            archive.add(made, ".")
        return dict(module.take(tmp_path / "release.tar", tmp_path / "out"))

    assert taken() == {"name": "1-abc", "path": str(tmp_path / "out"), "changed": True}
    (made / "a.whl").write_text("half of")
    with pytest.raises(module.Failed, match=r"a\.whl of .* is not what its checksums say"):
        taken()
    (made / "a.whl").unlink()
    with pytest.raises(module.Failed, match=r"release\.tar lacks a\.whl"):
        taken()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["SHA256SUMS", "a.whl", "release"]
    assert (tmp_path / "out" / "a.whl").read_text() == "a wheel"


@pytest.mark.full
def test_a_build_host_collects_the_release_for_the_others(module: ModuleType, project: Path, tmp_path: Path) -> None:
    """The build host is this machine with another home; it has llama.cpp built already, and fetches no wheels."""
    for extra in ("node", "gate"):
        (project / "requirements" / f"{extra}.txt").write_text("")
    shutil.copytree(SCRIPT.parent, project / SCRIPT.parent.relative_to(ROOT))
    common = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "ansible_become": False}
    given = {"llmrack_artifacts_project": str(project), "llmrack_artifacts_cache": str(tmp_path / "controller"),
             "llmrack_artifacts_python": sys.executable, "llmrack_artifacts_build_host": "builder"}  # fmt: skip
    hosts = {"all": {"vars": {**common, **given}, "hosts": dict.fromkeys(["h1", "h2", "builder"])}}
    (tmp_path / "hosts.yml").write_text(json.dumps(hosts))
    roles = [{"import_role": {"name": "llmrack_artifacts", "tasks_from": name}} for name in ("preflight", "collect")]
    told = {"debug": {"msg": "{{ llmrack_artifacts_release }} in {{ llmrack_artifacts_wheels }}"}}
    (tmp_path / "play.yml").write_text(json.dumps([{"hosts": "h1:h2", "gather_facts": False, "tasks": [*roles, told]}]))
    env = {**os.environ, "HOME": str(tmp_path), "LLMRACK_CACHE": str(module.cache())}
    ansible = str(Path(sys.executable).with_name("ansible-playbook"))

    def collected() -> tuple[str, int]:
        """The release's name, and how many tasks changed something on both hosts."""
        command = [ansible, "-i", str(tmp_path / "hosts.yml"), str(tmp_path / "play.yml")]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        names = re.findall(r'msg"?: "?(\S+) in ([^"\s]+)', done.stdout)
        assert len(names) == 2 and len(set(names)) == 1, done.stdout
        folder = Path(names[0][1])
        assert folder.parent == tmp_path / "controller" and (folder / "release").read_text().strip() == names[0][0]
        assert len(list(folder.glob("*.whl"))) == 2
        return names[0][0], sum(int(count) for count in re.findall(r"changed=(\d+)", done.stdout))

    first, changed = collected()
    assert changed == 4  # collected there, packed, fetched and kept here, each by the first host alone
    assert collected() == (first, 0)
    (project / "llmgate" / "cli.py").write_text("# another release\n")
    other, _ = collected()
    assert other != first


def test_a_release_is_packed_once_and_whole(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").write_text("a wheel")
    (wheels / "release.tar.part").write_text("what an interrupted play has left")
    given = {"llmrack_artifacts_packer": "localhost", "llmrack_artifacts_folder": str(wheels),
             "ansible_python_interpreter": sys.executable}  # fmt: skip
    tasks = [{"import_role": {"name": "llmrack_artifacts", "tasks_from": "pack"}, "vars": given}]
    (tmp_path / "play.yml").write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local"]
    for changed in (1, 0):
        done = subprocess.run([*command, tmp_path / "play.yml"], cwd=ROOT, capture_output=True, text=True, timeout=250)
        assert f"changed={changed} " in done.stdout and done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(wheels / "release.tar") as archive:
        assert sorted(archive.getnames()) == [".", "./a.whl"]
    assert not (wheels / "release.tar.part").exists()


def compiled(source: str, path: Path, *flags: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{path.name}", *flags]
    subprocess.run([*command, "-o", str(path)], input=source, text=True, check=True)


@pytest.fixture
def cuda(tmp_path: Path) -> tuple[Path, Path]:
    """(wheel, toolkit): a plug-in that calls two libraries, one of which calls a third; nothing else knows of them."""
    toolkit, unpacked = tmp_path / "toolkit", tmp_path / "wheel"
    compiled("int lt(void) { return 40; }", toolkit / "libcublasLt.so.12")
    compiled("int lt(void); int blas(void) { return lt(); }", toolkit / "libcublas.so.12", f"-L{toolkit}",
             "-l:libcublasLt.so.12", "-Wl,-rpath,$ORIGIN")  # fmt: skip
    compiled("int rt(void) { return 2; }", toolkit / "libcudart.so.12")
    compiled("int blas(void); int rt(void); int answer(void) { return blas() + rt(); }",
             unpacked / "bin" / "libggml-cuda.so", f"-L{toolkit}", f"-Wl,-rpath-link,{toolkit}", "-l:libcublas.so.12",
             "-l:libcudart.so.12", "-Wl,-rpath,$ORIGIN")  # fmt: skip
    wheel = tmp_path / "cuda_plugin-1-py3-none-any.whl"
    facts = unpacked / "cuda_plugin-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda-plugin\nVersion: 1\n")
    (facts / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (facts / "RECORD").write_text("".join(f"{p.relative_to(unpacked)},,\n" for p in unpacked.rglob("*") if p.is_file()))
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in unpacked.rglob("*"):
            archive.write(path, path.relative_to(unpacked))
    return wheel, toolkit


def test_a_cuda_wheel_brings_the_libraries_that_it_calls(
    module: ModuleType, cuda: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, toolkit = cuda
    monkeypatch.setenv("LD_LIBRARY_PATH", str(toolkit))
    libraries = ["libcublas.so.12", "libcublasLt.so.12", "libcudart.so.12"]
    assert module.carry(wheel, "cuda") == libraries
    monkeypatch.delenv("LD_LIBRARY_PATH")
    shutil.rmtree(toolkit)
    host = tmp_path / "host"
    subprocess.run(
        [*module._pip(), "install", "--quiet", "--no-index", "--no-deps", "--target", str(host), str(wheel)], check=True
    )
    assert sorted(path.name for path in (host / "bin").iterdir()) == sorted([*libraries, "libggml-cuda.so"])
    asked = f"import ctypes; print(ctypes.CDLL('{host}/bin/libggml-cuda.so').answer())"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "42\n"


def test_a_cuda_library_that_is_missing_is_named(
    module: ModuleType, cuda: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, toolkit = cuda
    before = wheel.read_bytes()
    (toolkit / "libcudart.so.12").unlink()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(toolkit))
    with pytest.raises(module.Failed, match=r"libggml-cuda\.so calls libcudart\.so\.12, and this machine"):
        module.carry(wheel, "cuda")
    assert wheel.read_bytes() == before


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's /opt/llmrack with releases r1 (the oldest) to r8: r2 is previous, r3 current; r0 is unfinished. An
    instance starts from r7, and would go back to r8."""
    for age, name in enumerate(["r1", "r7", "r8", "r2", "r3", "r4", "r5", "r6"]):
        (tmp_path / "releases" / name).mkdir(parents=True)
        mark = tmp_path / "releases" / name / ".complete"
        mark.touch()
        os.utime(mark, (1000 + age, 1000 + age))
    (tmp_path / "releases" / "r0").mkdir()
    (tmp_path / "previous").symlink_to(tmp_path / "releases" / "r2")
    (tmp_path / "current").symlink_to(tmp_path / "releases" / "r3")
    (tmp_path / "instances").mkdir()
    (tmp_path / "instances" / "a").symlink_to(tmp_path / "releases" / "r7")
    (tmp_path / "kept" / "a" / "before").mkdir(parents=True)
    (tmp_path / "kept" / "a" / "before" / "release").write_text("r8")
    return tmp_path


def retain(host: Path, keep: int, check: bool = False) -> list[str]:
    order = {"root": str(host), "wanted": "r6", "keep": keep, "check": check}
    script = SCRIPT.with_name("retention.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(order), capture_output=True, text=True, check=True
    )
    told: dict[str, list[str]] = json.loads(done.stdout)
    return told["removed"]


def test_pruning_keeps_what_runs_what_a_rollback_needs_and_the_newest(host: Path) -> None:
    library = host / "releases" / "r1" / "library.so"
    library.write_bytes(b"x" * 4096)
    # Mapped and closed again, as a loaded library is.
    program = (
        "import mmap, sys\nwith open(sys.stdin.readline().strip(), 'rb') as f: m = mmap.mmap(f.fileno(), 0, prot=1)\n"
    )
    program += "print('mapped', flush=True)\nsys.stdin.read()"
    user = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdin and user.stdout
    try:
        user.stdin.write(f"{library}\n")
        user.stdin.flush()
        assert user.stdout.readline() == "mapped\n"
        assert retain(host, keep=1, check=True) == ["r0", "r4", "r5"]
        assert (host / "releases" / "r4").exists()
        assert retain(host, keep=1) == ["r0", "r4", "r5"]
    finally:
        user.stdin.close()
        user.wait()
    assert {path.name for path in (host / "releases").iterdir()} == {"r1", "r2", "r3", "r6", "r7", "r8"}
    assert retain(host, keep=1) == ["r1"]
    assert retain(host, keep=1) == []
