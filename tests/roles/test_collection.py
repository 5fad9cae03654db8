"""Promises of the Ansible collection: what is in it, and that every playbook runs where nothing but it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.roles.programs import load

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOKS = sorted(path.stem for path in (ROOT / "playbooks").glob("*.yml"))
MOST_BYTES = 5_000_000  # the handbook model is 2.8 MB of it
PARTS = {
    "CHANGELOG.md", "CONTRIBUTING.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md", "docs", "llmgate",
    "llmnode", "meta", "playbooks", "pyproject.toml", "requirements", "roles",
}  # fmt: skip
# What lies about in a checkout that somebody works in, and is nobody else's business.
LITTER = (
    ".venv/bin/python", ".venv-train/pyvenv.cfg", ".hypothesis/x", ".ansible/x", ".secrets/fleet-token", "out/b.json",
    "build/x", "dist/llmrack.whl", "shared/x", "llmrack.egg-info/x", "llmnode/__pycache__/x.pyc", "m.gguf.part",
    "inventory/production/hosts.yml", "inventory/production/.secrets/fleet-token", "roles/llmnode/.cache/x",
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """The collection as built from a checkout with litter in it, and installed where nothing else is."""

    archive: Path
    home: Path

    @property
    def root(self) -> Path:
        return self.home / "ansible_collections/llmrack/llmrack"

    def play(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """ansible-playbook, in a folder without an ansible.cfg, finding this collection alone."""
        return _run("ansible-playbook", self.home, *arguments)


def _run(program: str, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"ANSIBLE_HOME": str(home), "ANSIBLE_COLLECTIONS_PATH": str(home)}
    command = [str(Path(sys.executable).with_name(program)), *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, cwd=home, env=environment, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=250
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home, checkout = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("work") / "checkout"
    leave = shutil.ignore_patterns(".git", ".venv*", "out", "shared", "__pycache__", ".*_cache", ".ansible", ".secrets")
    shutil.copytree(ROOT, checkout, ignore=leave)
    for name in LITTER:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("litter")
    built = _run("ansible-galaxy", home, "collection", "build", checkout, "--output-path", home)
    assert built.returncode == 0, built.stderr
    (archive,) = home.glob("llmrack-llmrack-*.tar.gz")
    done = _run("ansible-galaxy", home, "collection", "install", "--offline", "-p", home, archive)
    assert done.returncode == 0, done.stdout + done.stderr
    return Installed(archive, home)


def test_the_collection_is_small_and_has_nothing_in_it_but_what_a_deployment_needs(installed: Installed) -> None:
    with tarfile.open(installed.archive) as archive:
        names = archive.getnames()
    assert {name.split("/")[0] for name in names} == PARTS
    assert not set(LITTER) & set(names)
    assert installed.archive.stat().st_size < MOST_BYTES


def test_a_release_is_the_same_from_the_collection_and_from_a_checkout(installed: Installed) -> None:
    wheelhouse = load("llmrack_artifacts", "wheelhouse")

    def sources(project: Path) -> dict[str, bytes]:
        return {str(path.relative_to(project)): path.read_bytes() for path in wheelhouse._sources(project)}

    assert sources(installed.root) == sources(ROOT)


def test_every_playbook_can_be_named_through_the_collection(installed: Installed) -> None:
    inventory = ROOT / "inventory/example"
    checked = installed.play("-i", inventory, "--syntax-check", *(f"llmrack.llmrack.{name}" for name in PLAYBOOKS))
    assert checked.returncode == 0, checked.stderr
    seen = [line.removeprefix("playbook: ") for line in checked.stdout.splitlines() if line.startswith("playbook: ")]
    assert seen == [str(installed.root / f"playbooks/{name}.yml") for name in PLAYBOOKS]


def test_a_deployment_from_the_collection_checks_this_machine_and_stops_at_what_is_wrong(
    installed: Installed, tmp_path: Path
) -> None:
    here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "ansible_become": False}
    models = {"ghost": {"src": str(tmp_path / "ghost.gguf")}}
    instances = [{"name": "a", "model": "ghost", "port": 18100}]
    variables = {**here, "llmrack_models": models, "llmnode_instances": instances}
    groups = {"llmgate": {"hosts": {"localhost": None}}, "llmnode": {"hosts": {"localhost": None}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"vars": variables, "children": groups}}))
    said = installed.play("-i", tmp_path / "hosts.yml", "--check", "llmrack.llmrack.deploy")
    assert said.returncode != 0
    assert "llmrack.llmrack.llmrack_preflight : Refuse what cannot work" in said.stdout
    assert f"{tmp_path}/ghost.gguf does not exist" in " ".join(said.stdout.split())
    assert {path.name for path in tmp_path.iterdir()} == {"hosts.yml"}
