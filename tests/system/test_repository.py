"""Promises of the repository itself: locked packages, true docs, laws of the house."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from tests import health_page, settings_page

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_is_pinned_and_hashed(lock: Path) -> None:
    text = lock.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", line), line
        assert "--hash=sha256:" in line, line
    assert "://" not in text, "a lock file names no address"


def test_every_dependency_is_locked_and_the_engine_is_pinned_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, needs in project["optional-dependencies"].items():
        lock = ROOT / "requirements" / f"{extra}.txt"
        if not lock.exists():
            continue
        locked = {m.lower() for m in re.findall(r"^([A-Za-z0-9._-]+)==", lock.read_text(), re.MULTILINE)}
        for need in needs:
            name = re.split(r"[\[<>=!~; ]", need)[0].lower()
            assert name in locked or name == "llama-cpp-python", f"{need} of the extra {extra} is not in {lock.name}"
    pin = next(n for n in project["optional-dependencies"]["node"] if n.startswith("llama-cpp-python"))
    assert pin in (ROOT / "requirements" / "llama.txt").read_text()


def test_both_packages_stay_empty_at_their_root() -> None:
    for package in ("llmnode", "llmgate"):
        assert (ROOT / package / "__init__.py").read_text() == ""


def test_settings_in_the_docs_are_those_of_the_code() -> None:
    assert settings_page.PAGE.read_text() == settings_page.render(), "run `make docs`"


def test_the_diagram_of_health_is_the_table_that_the_gate_runs() -> None:
    assert health_page.PAGE.read_text() == health_page.render(), "run `make docs`"


def test_every_make_target_is_listed_and_documented_ones_exist() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([a-z-]+)", listed, re.MULTILINE))
    assert {"demo", "test", "lint", "lab-up", "lab-deploy", "lab-down", "bench-node"} <= targets
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for line in re.findall(r"(?:^|`)make ([a-z][a-z0-9 -]*)", page.read_text(), re.MULTILINE):
            for word in line.split():
                if "=" in word or word.endswith("-"):  # a variable, or a family such as bench-*
                    continue
                assert word in targets, f"{page.name} speaks of `make {word}`, which does not exist"


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_version_is_printed_by_both_programs() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for module in ("llmnode", "llmgate"):
        said = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert version in said.stdout
