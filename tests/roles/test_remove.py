"""What goes when llmrack is taken off a host is what its roles have put there, and nothing else."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest

from tests.roles.programs import load
from tests.roles.test_roles import ROOT, _flat, ansible

remnants = load("llmrack_remove", "remnants")

OURS = (
    "/etc/systemd/system/llmgate.service",
    "/etc/systemd/system/llmgate.socket",
    "/etc/systemd/system/llmnode@.service",
    "/etc/systemd/system/llmnode@a.service.d/10-llmrack.conf",
    "/etc/systemd/system/llmnode@b.service.d/10-llmrack.conf",
    "/etc/systemd/system/llmrack-nvidia.service",
    "/etc/systemd/system/llmrack.slice",
    "/etc/sysctl.d/60-llmrack.conf",
    "/etc/apt/sources.list.d/llmrack.sources",
    "/etc/prometheus/llmrack-alerts.yml",
    "/etc/llmrack/tls/host.key",
    "/opt/llmrack/releases/1/bin/llmnode",
    "/var/lib/llmrack/llmgate/llmgate.db",
    "/srv/llmrack/models/m.gguf",
)
SIGNED = ("/etc/prometheus/prometheus.yml", "/etc/default/prometheus", "/etc/default/llmrack-exporter")
THEIRS = (
    "/etc/prometheus/other-rules.yml",
    "/etc/default/prometheus-node-exporter",
    "/var/lib/prometheus/wal",
    "/etc/systemd/system/llmnode@b.service.d/override.conf",
    "/etc/systemd/system/nginx.service",
    "/etc/sysctl.d/60-other.conf",
    "/etc/apt/sources.list.d/debian.sources",
    "/opt/other/file",
    "/var/lib/other/file",
    "/srv/other/file",
)


def no_units(_pattern: str) -> list[str]:
    return []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*OURS, *SIGNED, *THEIRS):
        path = tmp_path / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {remnants.SIGNATURE}.\n" if name in SIGNED else "")
    return tmp_path


def stays(root: Path, *, data: bool, models: bool) -> set[str]:
    """The files that are left when all that is named has gone."""
    gone = remnants.remnants(root, no_units, True, data=data, models=models)["paths"]
    files = {f"/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file()}
    return {file for file in files if not any(file == path or file.startswith(f"{path}/") for path in gone)}


def test_what_is_ours_goes_and_nothing_else(root: Path) -> None:
    assert stays(root, data=True, models=True) == set(THEIRS)


def test_state_and_models_stay_unless_told(root: Path) -> None:
    state, models = "/var/lib/llmrack/llmgate/llmgate.db", "/srv/llmrack/models/m.gguf"
    assert stays(root, data=False, models=False) == {*THEIRS, state, models}
    assert stays(root, data=True, models=False) == {*THEIRS, models}


def test_a_folder_of_drop_ins_goes_when_it_has_none_of_the_operators(root: Path) -> None:
    found = remnants.remnants(root, no_units, True, data=True, models=True)
    assert "/etc/systemd/system/llmnode@a.service.d" in found["paths"]
    assert "/etc/systemd/system/llmnode@b.service.d" not in found["paths"]
    assert found["kept"] == ["/etc/systemd/system/llmnode@b.service.d/override.conf"]


def test_the_user_stays_as_long_as_files_of_its_own_do(root: Path) -> None:
    assert not remnants.remnants(root, no_units, True, data=False, models=True)["account"]
    assert remnants.remnants(root, no_units, True, data=True, models=False)["account"]
    assert not remnants.remnants(root, no_units, False, data=True, models=True)["account"]


def test_the_gate_goes_before_the_nodes_and_both_before_their_slice(root: Path) -> None:
    running = ["llmrack.slice", "llmnode@a.service", "llmgate.service", "llmgate.socket", "llmrack-nvidia.service"]
    found = remnants.remnants(root, lambda pattern: fnmatch.filter(running, pattern), True, data=False, models=False)
    assert found["units"] == [
        "llmgate.socket", "llmgate.service", "llmnode@a.service", "llmrack-nvidia.service", "llmrack.slice",
    ]  # fmt: skip


def test_what_watched_it_is_stopped_where_the_role_has_set_it_up_and_left_to_its_owner_where_not(root: Path) -> None:
    watching = ["prometheus.service", "prometheus-node-exporter.service"]

    def found() -> dict[str, Any]:
        listed = remnants.remnants(
            root, lambda pattern: fnmatch.filter(watching, pattern), True, data=False, models=False
        )
        return dict(listed)

    assert found()["units"] == watching
    (root / "etc/default/llmrack-exporter").unlink()
    for name in SIGNED[:2]:
        (root / name[1:]).write_text("# The operator's own.\n")
    assert found()["units"] == []
    assert not {*SIGNED} & {*found()["paths"]}


def test_the_role_signs_what_makes_its_watchers_known() -> None:
    role = ROOT / "roles/llmrack_monitoring"
    texts = [path.read_text() for path in (*role.glob("tasks/*.yml"), *role.glob("templates/*"))]
    assert sum(text.count(remnants.SIGNATURE) for text in texts) == len(remnants.WATCHERS)


def test_nothing_is_named_on_a_host_that_has_nothing(tmp_path: Path) -> None:
    found = remnants.remnants(tmp_path, no_units, False, data=True, models=True)
    assert found == {"units": [], "paths": [], "account": False, "kept": []}


def test_every_path_that_a_role_writes_is_known_here() -> None:
    """A role that learns to write somewhere else must teach this one."""
    known = [*remnants.PATHS, *remnants.WATCHERS, *remnants.DROPINS, remnants.STATE, remnants.MODELS]
    written = {f"/etc/systemd/system/{unit.stem}" for unit in ROOT.glob("roles/*/templates/*.*.j2") if is_unit(unit)}
    for file in ROOT.glob("roles/*/tasks/*.yml"):
        text = re.sub(r"{{.*?}}", "x", file.read_text())
        written |= set(re.findall(r"(?:dest|path): [\"']?(/(?!usr/)[a-z][^\s\"',}]*)", text))
    assert len(written) > 15
    for path in written - {"/etc/systemd/system/x"}:
        assert any(fnmatch.fnmatch(path, f"{one}*") for one in known), f"{path} is written and never removed"


def is_unit(template: Path) -> bool:
    return Path(template.stem).suffix in {".service", ".socket", ".slice", ".timer"}


def test_nothing_happens_until_it_is_confirmed(tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    instances = "{llmnode_instances: [{name: a, model: m, port: 8100}], ansible_connection: local}"
    inventory.write_text(f"llmgate: {{hosts: {{one: {instances}}}}}\nllmnode: {{hosts: {{one: }}}}\n")
    refused = ansible("ansible-playbook", "-i", inventory, "playbooks/remove.yml")
    assert refused.returncode != 0
    assert "This takes llmrack off one. If that is meant: -e llmrack_remove_confirmed=true" in _flat(refused.stdout)
    assert "changed=0" in refused.stdout
