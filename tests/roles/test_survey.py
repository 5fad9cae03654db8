"""Promises of the survey of a host, on recorded ones: two vendors, none, and drivers in every bad state."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.roles import hosts_on_file as recorded
from tests.roles.programs import load

PROGRAM = Path(__file__).resolve().parents[2] / "roles/llmrack_host/files/survey.py"
MIB = 2**20


survey = load("llmrack_host", "survey")


def look(recording: recorded.Recording, folder: Path) -> dict[str, Any]:
    recording.play(folder)
    found = survey.survey(survey.Host(folder, f"{folder}/bin"), ["python3.11"], ["/srv/llmrack"])
    told: dict[str, Any] = json.loads(json.dumps(found))
    return told


def test_two_nvidia_gpus_are_told_apart_by_address_uuid_and_minor(tmp_path: Path) -> None:
    told = look(recorded.TWO_NVIDIA, tmp_path)
    first, second = told["gpus"]
    assert first == {
        "vendor": "nvidia", "pci": "0000:65:00.0", "uuid": "GPU-00000001-aaaa-bbbb-cccc-000000000000",
        "name": "NVIDIA GeForce RTX 4090", "minor": 1, "render_minor": None, "vram_total": 24564 * MIB,
        "vram_free": 4000 * MIB, "vram_ours": 18000 * MIB, "compute": "8.9", "numa": 0, "mig": [],
        "usable": True, "why": "",
    }  # fmt: skip
    assert (second["minor"], second["numa"], second["vram_ours"], second["usable"]) == (0, 1, 0, True)
    assert told["drivers"] == {"nvidia": {"loaded": "550.144.03", "installed": "550.144.03"}}
    assert told["numa"] == {"0": "0-15,32-47", "1": "16-31,48-63"}
    assert told["memory"] == {"total": 528000000 * 1024, "available": 500000000 * 1024}


def test_amd_gpus_need_no_tool(tmp_path: Path) -> None:
    told = look(recorded.TWO_AMD, tmp_path)
    first, second = told["gpus"]
    assert first["uuid"] == "GPU-7c8a1b2c3d4e5f60" and first["compute"] == "gfx90a" and first["render_minor"] == 128
    assert first["vram_total"] == 68702699520 and first["vram_free"] == 68702699520 - 289349632
    assert first["vram_ours"] == 2**30
    assert second["uuid"] is None and second["compute"] == "gfx1100" and second["numa"] is None
    assert first["usable"] and second["usable"]
    assert told["drivers"] == {"amd": {"loaded": recorded.KERNEL, "installed": recorded.KERNEL}}


def test_a_host_without_gpus_is_no_odd_case(tmp_path: Path) -> None:
    told = look(recorded.CPU_ONLY, tmp_path)
    assert told["gpus"] == [] and told["drivers"] == {}


def test_gpus_of_two_vendors_are_all_found(tmp_path: Path) -> None:
    told = look(recorded.BOTH, tmp_path)
    assert [gpu["vendor"] for gpu in told["gpus"]] == ["nvidia", "amd", "amd", "nvidia"]
    assert all(gpu["usable"] for gpu in told["gpus"]) and set(told["drivers"]) == {"nvidia", "amd"}


@pytest.mark.parametrize(
    ("recording", "whys"),
    [
        (recorded.NO_DRIVER, ["no driver is loaded"] * 2),
        (recorded.NOT_LOADED, ["no driver is loaded; 550.144.03 is installed: reboot or load it"] * 2),
        (recorded.MISMATCH, ["driver 550.144.03 is loaded and 570.86.15 is installed: reboot"] * 2),
        (recorded.LOST, ["", "it fell off the bus: power-cycle the host"]),
        (
            recorded.SILENT,
            [
                "",
                "its driver does not answer for it: Unable to determine the device handle for GPU0000:CA:00.0: "
                "Unknown Error",
            ],
        ),
        (recorded.NO_TOOL, ["its driver does not answer for it: nvidia-smi is not installed"] * 2),
        (
            recorded.MIG,
            [
                "MIG is on: bind instances to its slices (MIG-11111111-2222-3333-4444-555555555555, "
                "MIG-66666666-7777-8888-9999-000000000000)",
                "",
            ],
        ),
    ],
    ids=["no driver", "not loaded", "another version installed", "off the bus", "silent", "no nvidia-smi", "MIG"],
)
def test_a_gpu_that_cannot_be_used_is_listed_with_the_reason(
    recording: recorded.Recording, whys: list[str], tmp_path: Path
) -> None:
    told = look(recording, tmp_path)
    assert [gpu["why"] for gpu in told["gpus"]] == whys
    assert [gpu["usable"] for gpu in told["gpus"]] == [not why for why in whys]


def test_slices_of_a_gpu_come_with_their_memory(tmp_path: Path) -> None:
    whole, other = look(recorded.MIG, tmp_path)["gpus"]
    assert [(part["profile"], part["vram_total"]) for part in whole["mig"]] == [
        ("3g.40gb", 40 * 10**9),
        ("1g.10gb+me", 10 * 10**9),
    ]
    assert other["mig"] == []


def test_on_this_machine_it_prints_json_and_knows_who_listens_and_what_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        command = [
            sys.executable,
            str(PROGRAM),
            "--python",
            sys.executable,
            "--python",
            "/no/python",
            "--disk",
            "/opt/a/b",
        ]
        done = subprocess.run(command, text=True, capture_output=True, check=True)
    told = json.loads(done.stdout)
    assert str(port) in told["ports"] and told["ports"][str(port)]
    assert told["pythons"] == {sys.executable: f"{sys.version_info[0]}.{sys.version_info[1]}", "/no/python": None}
    assert told["disks"]["/opt/a/b"]["free"] > 0
    assert told["memory"]["total"] >= told["memory"]["available"] > 0
