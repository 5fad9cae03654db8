"""Promises of roles and playbooks that need no host: what they accept, what they refuse, what their units may do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmgate import listing
from llmgate.core.crew import GRACE_S
from llmgate.listing import Address, Canary, Listing, Route
from tests.roles import hosts_on_file
from tests.roles.programs import ansible
from tests.roles.rendering import File, render
from tests.roles.test_survey import look

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())
PLAYBOOKS = sorted(path.name for path in (ROOT / "playbooks").glob("*.yml"))
INVENTORIES = sorted(path.name for path in (ROOT / "inventory").iterdir() if path.is_dir())
MOST_EXPOSED = 1.6


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("role", ROLES)
def test_a_roles_argument_specs_say_what_its_defaults_are(role: str) -> None:
    options = read(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    defaults = read(ROOT / "roles" / role / "defaults/main.yml")
    assert {name: option.get("default") for name, option in options.items()} == defaults
    assert all(option["description"] for option in options.values())


def test_playbooks_are_well_formed() -> None:
    paths = [f"playbooks/{playbook}" for playbook in PLAYBOOKS]
    checked = ansible("ansible-playbook", "-i", "inventory/example", *paths, "--syntax-check")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_an_inventory_has_a_gate_and_instances_of_models_in_its_catalogue(inventory: str) -> None:
    told = ansible("ansible-inventory", "-i", f"inventory/{inventory}", "--list")
    seen = json.loads(told.stdout)
    assert seen["llmgate"]["hosts"]
    hosts = seen["_meta"]["hostvars"]
    served = 0
    for variables in hosts.values():
        models = {instance["model"] for instance in variables.get("llmnode_instances", [])}
        models |= set(variables.get("llmnode_placement", {}))
        assert models <= set(variables["llmrack_models"])
        served += len(models)
    assert served


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_a_playbook_begins_by_checking_the_inventory(playbook: str) -> None:
    """What that refuses, the two tests below show for one of them."""
    first = read(ROOT / "playbooks" / playbook)[0]
    if playbook == "inventory.yml":
        roles = [task["ansible.builtin.import_role"] for task in first["tasks"]]
        assert {"name": "llmrack_orchestrate", "tasks_from": "inventory"} in roles
    else:
        assert first["ansible.builtin.import_playbook"] == (
            "preflight.yml" if playbook == "deploy.yml" else "inventory.yml"
        )


def test_an_inventory_without_a_gate_is_refused(tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("llmnode: {hosts: {nowhere.invalid: }}\n")
    refused = ansible("ansible-playbook", "-i", inventory, "playbooks/deploy.yml")
    assert refused.returncode != 0
    assert "The inventory has no gate: put at least one host into the group llmgate" in _flat(refused.stdout)
    assert not (tmp_path / ".secrets").exists()


def test_an_inventory_without_an_instance_is_refused(tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("llmgate: {hosts: {nowhere.invalid: }}\n")
    refused = ansible("ansible-playbook", "-i", inventory, "playbooks/deploy.yml")
    assert refused.returncode != 0
    assert "The inventory has no llmnode instance: set llmnode_instances" in _flat(refused.stdout)


def test_a_model_that_is_not_in_the_catalogue_is_named(tmp_path: Path) -> None:
    said = _role(tmp_path, "llmrack_model", {"llmrack_models": {}, "llmrack_model_wanted": ["ghost"]})
    assert said.returncode != 0
    assert "llmrack_models has no model ghost" in _flat(said.stdout)


def test_a_model_that_is_not_on_the_controller_is_named(tmp_path: Path) -> None:
    models = {"ghost": {"src": str(tmp_path / "ghost.gguf")}}
    said = _role(tmp_path, "llmrack_model", {"llmrack_models": models, "llmrack_model_wanted": ["ghost"]})
    assert said.returncode != 0
    assert f"{tmp_path}/ghost.gguf does not exist" in _flat(said.stdout)


def test_a_model_that_arrives_broken_is_not_put_in_place(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF, or so it says")
    models = {"m": {"src": str(tmp_path / "m.gguf"), "sha256": "0" * 64}}
    given = {"llmrack_models": models, "llmrack_model_wanted": ["m"], "llmrack_model_dir": str(tmp_path / "models")}
    said = _role(tmp_path, "llmrack_model", given)
    if "chown failed" in said.stdout:
        pytest.skip("making files that root owns takes root")
    assert said.returncode != 0
    assert f"but m must have {'0' * 64}" in _flat(said.stdout)
    assert not list((tmp_path / "models").iterdir())


BARE: dict[str, Any] = {"llmgate_started_with": {}}
FLEET = {
    # Nothing is bound: an instance may open all of its vendor's devices, or none.
    "none": ("none", None, {}),
    "nvidia": ("nvidia", None, {}),
    "amd": ("amd", None, {}),
    # Bound to one GPU of those that the survey found.
    "one-nvidia": ("none", hosts_on_file.TWO_NVIDIA, {"devices": ["GPU-00000001-aaaa-bbbb-cccc-000000000000"]}),
    "by-address": ("none", hosts_on_file.TWO_NVIDIA, {"devices": ["0000:65:00.0"]}),
    "one-amd": ("none", hosts_on_file.TWO_AMD, {"devices": ["0000:c1:00.0"]}),
    "both-amd": ("none", hosts_on_file.TWO_AMD, {"devices": ["0000:c1:00.0", "0000:c6:00.0"]}),
    "mig": ("none", hosts_on_file.MIG, {"devices": ["MIG-11111111-2222-3333-4444-555555555555"]}),
    "mixed": ("none", hosts_on_file.BOTH, {"devices": ["0000:c1:00.0"]}),
    "cpu-beside-gpus": ("nvidia", hosts_on_file.TWO_NVIDIA, {"n_gpu_layers": 0}),
}


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every unit as Ansible renders it: gate/, and one for each kind of instance. There the unit has its
    drop-in behind it, which is how systemd reads the two."""
    folder = tmp_path_factory.mktemp("units")
    files = [File("llmgate", f"llmgate.{kind}", f"gate/llmgate.{kind}", BARE) for kind in ("service", "socket")]
    for kind, (gpu, recording, settings) in FLEET.items():
        variables: dict[str, Any] = {
            "llmnode_gpu": gpu,
            "llmrack_models": {"m": {}},
            "item": {"name": "a", "model": "m", "port": 8100, "settings": settings},
        }
        if recording:
            variables["llmrack_host_survey"] = look(recording, folder / kind / "host")
        for name in ("llmnode@.service", "instance.conf", "llmrack-nvidia.service"):
            files.append(File("llmnode", name, f"{kind}/{name}", variables))
    render(folder, files, roles=["llmnode", "llmgate"])
    for kind in FLEET:
        with (folder / kind / "llmnode@.service").open("a") as unit:
            unit.write((folder / kind / "instance.conf").read_text())
        (folder / kind / "instance.conf").unlink()
    return folder


needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not on this machine")


@needs_systemd
@pytest.mark.parametrize("unit", ["gate/llmgate.service", *(f"{kind}/llmnode@.service" for kind in FLEET)])
def test_a_unit_is_hardly_exposed(units: Path, unit: str) -> None:
    told = _systemd("security", "--offline=true", "--no-pager", units / unit)
    score = re.search(r"exposure level for \S+: ([\d.]+)", told)
    assert score, told
    assert float(score[1]) <= MOST_EXPOSED, told


@needs_systemd
@pytest.mark.parametrize("kind", ["gate", *FLEET])
def test_systemd_has_nothing_to_say_about_a_unit(units: Path, kind: str, tmp_path: Path) -> None:
    """Every line is known to systemd and says something it understands; only the programs are not there yet."""
    for unit in (units / kind).glob("llm*"):
        text = re.sub(
            r"(/opt/llmrack/(?:current|instances/%i)/bin/llm\w+|/usr/bin/nvidia-\w+)", "/bin/true", unit.read_text()
        )
        (tmp_path / unit.name.replace("@", "@a")).write_text(text)
    told = _systemd("verify", *tmp_path.iterdir())
    assert not [line for line in told.splitlines() if "llm" in line], told


def _says(units: Path, kind: str, name: str) -> list[str]:
    """Values of a line that may stand several times, in order."""
    return re.findall(rf"^{name}=(.*)$", (units / kind / "llmnode@.service").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        ("none", []),
        ("cpu-beside-gpus", []),
        ("nvidia", ["/dev/nvidiactl", "/dev/nvidia-uvm", "char-nvidia", "char-nvidia-frontend", "char-nvidia-caps"]),
        ("amd", ["/dev/kfd", "char-drm"]),
        ("one-nvidia", ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia1"]),
        ("by-address", ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia1"]),
        ("mig", ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0", "char-nvidia-caps"]),
        ("one-amd", ["/dev/kfd", "/dev/dri/renderD128"]),
        ("both-amd", ["/dev/kfd", "/dev/dri/renderD128", "/dev/dri/renderD129"]),
        ("mixed", ["/dev/kfd", "/dev/dri/renderD128"]),
    ],
)
def test_an_instance_may_open_the_devices_of_its_gpus_and_no_others(units: Path, kind: str, devices: list[str]) -> None:
    assert _says(units, kind, "DeviceAllow") == [f"{device} rw" for device in devices]
    assert _says(units, kind, "PrivateDevices")[-1] == ("no" if devices else "yes")
    assert _says(units, kind, "MemoryDenyWriteExecute")[-1] == ("no" if devices else "yes")
    assert _says(units, kind, "DevicePolicy") == (["closed"] if devices else [])
    assert ("Requires=llmrack-nvidia.service" in (units / kind / "llmnode@.service").read_text()) == (
        "/dev/nvidiactl" in devices
    )


def test_an_instance_runs_next_to_its_gpu(units: Path) -> None:
    for kind, node in (("one-nvidia", "0"), ("one-amd", "0")):
        assert _says(units, kind, "NUMAMask") == [node] and _says(units, kind, "CPUAffinity") == ["numa"]
    # GPUs of several nodes, a node that the firmware does not tell, no GPU at all, a host with one node: no pinning.
    for kind in ("both-amd", "none", "cpu-beside-gpus", "mig"):
        assert _says(units, kind, "NUMAMask") == []


def test_cuda_sees_no_gpu_that_the_unit_may_not_open(units: Path) -> None:
    for kind in ("one-nvidia", "by-address"):
        visible = [line for line in _says(units, kind, "Environment") if "CUDA_VISIBLE" in line]
        assert visible == ["CUDA_VISIBLE_DEVICES=GPU-00000001-aaaa-bbbb-cccc-000000000000"]


def test_systemd_waits_longer_than_a_drain(units: Path) -> None:
    for role, unit, grace in (("llmnode", "none/llmnode@.service", 0), ("llmgate", "gate/llmgate.service", GRACE_S)):
        drains = read(ROOT / "roles" / role / "defaults/main.yml")[f"{role}_drain_seconds"]
        waits = re.search(r"^TimeoutStopSec=(\d+)$", (units / unit).read_text(), re.MULTILINE)
        assert waits and int(waits[1]) > drains + grace


def test_the_gates_socket_listens_where_the_inventory_says(tmp_path: Path) -> None:
    addresses = {"0.0.0.0": "0.0.0.0:8000", "::": "[::]:8000"}
    files = [File("llmgate", "llmgate.socket", address, {"llmgate_listen": address}) for address in addresses]
    render(tmp_path, files, roles=["llmgate"])
    for address, listens in addresses.items():
        assert re.findall(r"^ListenStream=(.*)$", (tmp_path / address).read_text(), re.MULTILINE) == [listens]


def test_the_admin_api_gets_its_address_in_the_socket_and_in_the_settings(tmp_path: Path) -> None:
    admin = {"llmgate_admin_listen": "127.0.0.1:8001"}
    names = ("llmgate.socket", "llmgate.toml")
    files = [File("llmgate", name, f"{name}.{bool(given)}", given) for name in names for given in ({}, admin)]
    render(tmp_path, files, roles=["llmgate"])
    listens = re.findall(r"^ListenStream=(.*)$", (tmp_path / "llmgate.socket.True").read_text(), re.MULTILINE)
    assert listens == ["0.0.0.0:8000", "127.0.0.1:8001"], "the gate tells them apart by their order"
    assert 'admin_listen = "127.0.0.1:8001"' in (tmp_path / "llmgate.toml.True").read_text()
    assert "admin_listen" not in (tmp_path / "llmgate.toml.False").read_text()


def test_labels_weights_and_routes_reach_the_gates_nodes_file(tmp_path: Path) -> None:
    routes = {
        "qwen-7b": {"aliases": ["gpt-4o", 'q"uote'], "fallback": ["small"], "labels": {"zone": "ä"}},
        "small": {"policy": "least-loaded", "canary": {"release": "0.2.0-abc", "share": 0.05}},
    }
    instances = [
        {"name": "gpu0", "model": "qwen-7b", "port": 8100, "labels": {"zone": "ä", "gpu": "h100"}, "weight": 2.5},
        {"name": "gpu1", "model": "small", "port": 8101},
    ]
    hosts = {"host1": {"ansible_host": "192.0.2.1", "llmnode_instances": instances}}
    inventory = {"llmnode": {"hosts": hosts}, "llmgate": {"hosts": {"gate": None}}}
    files = [File("llmgate", "nodes.toml", "nodes.toml", {"llmgate_models": routes})]
    render(tmp_path, files, inventory=inventory, host="gate", roles=["llmgate"])
    read_back = listing.parse((tmp_path / "nodes.toml").read_text())
    assert read_back == Listing(
        (
            Address("host1-gpu0", "http://192.0.2.1:8100", frozenset({("zone", "ä"), ("gpu", "h100")}), 2.5),
            Address("host1-gpu1", "http://192.0.2.1:8101"),
        ),
        {
            "qwen-7b": Route("prefix", ("gpt-4o", 'q"uote'), ("small",), frozenset({("zone", "ä")})),
            "small": Route("least-loaded", canary=Canary("0.2.0-abc", 0.05)),
        },
    )


def _flat(text: str) -> str:
    """Text as a person reads it: Ansible wraps messages."""
    return " ".join(text.split())


def _role(folder: Path, role: str, variables: dict[str, Any], gather: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one role on this machine. It must stop before it changes anything outside of `folder`."""
    play = {"hosts": "localhost", "gather_facts": gather, "vars": variables, "roles": [role]}
    if gather:
        play["gather_subset"] = ["!all", "min"]
    path = folder / "play.yml"
    path.write_text(yaml.safe_dump([play]))
    return ansible("ansible-playbook", "-i", "localhost,", "-c", "local", path)


def _systemd(verb: str, *arguments: str | Path) -> str:
    command = ["systemd-analyze", verb, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr
