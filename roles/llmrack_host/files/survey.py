#!/usr/bin/env python3
"""What a host has: GPUs with their drivers, NUMA nodes, memory, disks, ports in use, Python.

Owns: reading that from the kernel's own files and from nvidia-smi, and saying of each GPU whether a process could use
it and if not, why. Refuses to know: the inventory, and what anybody wants of the host.

Runs on the host itself, with whatever Python Ansible found there (3.9 on RHEL 9) and nothing but its standard library:
`python3 survey.py [--python PATH]... [--disk PATH]...` prints one JSON object. It changes nothing.

Sources. PCI devices and NUMA nodes: Linux' sysfs (Documentation/ABI/testing/sysfs-bus-pci). AMD: amdgpu's sysfs files
mem_info_vram_* and unique_id, and the topology of KFD, which is what rocminfo and amd-smi read themselves; so a host
needs none of those tools. NVIDIA: /proc/driver/nvidia, and `nvidia-smi --query-gpu` for what only the driver knows.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}
DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
"""VGA, 3D and other display controllers, and processing accelerators (AMD's Instinct), of PCI's class codes."""
QUERY = ("pci.bus_id", "uuid", "name", "memory.total", "memory.free", "compute_cap", "mig.mode.current")
MIB, GB = 2**20, 10**9
PATIENCE_S = 60
"""nvidia-smi takes many seconds where the persistence daemon does not run and eight GPUs wake up."""


class Host:
    """Where to look. root: the file system's root, another one in tests. path: where programs are."""

    def __init__(self, root: Path = Path("/"), path: str | None = None) -> None:
        self.root = root
        self.path = path

    def text(self, path: str | Path) -> str:
        """The content of a file, called by its name on the host or as `glob` found it; empty where none can be read."""
        try:
            file = path if isinstance(path, Path) else self.root / path.lstrip("/")
            return file.read_text(errors="replace").strip()
        except OSError:
            return ""

    def glob(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern.lstrip("/")))

    def run(self, *command: str) -> tuple[int, str]:
        """A program's exit code and all that it said; 127 when it is not there."""
        program = shutil.which(command[0], path=self.path)
        if program is None:
            return 127, ""
        try:
            done = subprocess.run(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return 124, str(error)
        return done.returncode, done.stdout


def survey(host: Host, pythons: list[str], disks: list[str]) -> dict[str, Any]:
    """All of it, ready for JSON. Sizes in bytes."""
    drivers = {vendor: driver(host, vendor) for vendor in VENDORS.values()}
    cards = gpus(host, drivers)
    return {
        "gpus": cards,
        "drivers": {vendor: drivers[vendor] for vendor in sorted({card["vendor"] for card in cards})},
        "numa": {int(path.name[4:]): host.text(path / "cpulist") for path in numa_nodes(host)},
        "memory": memory(host),
        "disks": {disk: disk_free(host, disk) for disk in disks},
        "ports": ports(host),
        "pythons": {python: python_version(host, python) for python in pythons},
        "deployed": (host.root / "etc/llmrack/fleet-token").exists(),
    }


def driver(host: Host, vendor: str) -> dict[str, str | None]:
    """loaded: the version in the kernel; installed: the one on the disk, for the next boot; None: there is none.

    A module that comes with the kernel (amdgpu as a rule) has no version of its own and is called by the kernel's.
    """
    module = {"nvidia": "nvidia", "amd": "amdgpu"}[vendor]
    kernel = host.text("/proc/sys/kernel/osrelease")
    loaded = None
    if (host.root / "sys/module" / module).is_dir():
        loaded = host.text(f"/sys/module/{module}/version") or kernel
    code, said = host.run("modinfo", "-F", "version", module)
    installed = (said.strip() or kernel) if code == 0 else None
    return {"loaded": loaded, "installed": installed}


def gpus(host: Host, drivers: dict[str, dict[str, str | None]]) -> list[dict[str, Any]]:
    """Every GPU on the PCI bus, in the order of addresses, with what its driver says of it."""
    found = []
    told: dict[str, dict[str, str]] = {}
    ours: dict[str, int] = {}
    refusal = ""
    for path in host.glob("/sys/bus/pci/devices/*"):
        vendor = VENDORS.get(host.text(path / "vendor"))
        if vendor is None or not host.text(path / "class").startswith(DISPLAY_CLASSES):
            continue
        gpu: dict[str, Any] = {
            "vendor": vendor, "pci": path.name.lower(), "uuid": None, "name": None, "minor": None, "render_minor": None,
            "vram_total": None, "vram_free": None, "compute": None, "numa": _node(host.text(path / "numa_node")),
            "vram_ours": 0, "mig": [], "usable": False, "why": "",
        }  # fmt: skip
        gpu["render_minor"] = _render_minor(path)
        if vendor == "nvidia":
            if not told and not refusal:
                told, refusal = nvidia_smi(host)
                ours = nvidia_ours(host) if told else {}
            gpu.update(_nvidia(host, gpu["pci"], told.get(gpu["pci"])))
            gpu["vram_ours"] = ours.get(gpu["uuid"], 0)
        else:
            gpu.update(_amd(host, path, gpu["render_minor"]))
        gpu["why"] = _why(host, path, gpu, drivers[vendor], refusal)
        gpu["usable"] = not gpu["why"]
        found.append(gpu)
    return found


def nvidia_smi(host: Host) -> tuple[dict[str, dict[str, str]], str]:
    """What it says of each GPU by PCI address, and what it said where it failed.

    It goes on past a GPU that is lost, with a sentence in that one's place, and then exits with an error.
    """
    code, said = host.run("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
    rows = {}
    rest = []
    for row in csv.reader(io.StringIO(said), skipinitialspace=True):
        if len(row) == len(QUERY) and re.match(r"[0-9A-Fa-f]{8}:", row[0]):
            told = dict(zip(QUERY, row))  # noqa: B905 - Python 3.9 has no strict
            rows[_address(row[0])] = told
        elif row:
            rest.append(", ".join(row))
    if code == 127:
        return rows, "nvidia-smi is not installed"
    return rows, " ".join(rest) or ("" if code == 0 else f"nvidia-smi ended with {code}")


def _nvidia(host: Host, pci: str, told: dict[str, str] | None) -> dict[str, Any]:
    information = host.text(f"/proc/driver/nvidia/gpus/{pci}/information")
    minor = re.search(r"Device Minor:\s*(\d+)", information)
    known: dict[str, Any] = {"minor": int(minor[1]) if minor else None}
    if told is None:
        return known
    known.update(
        uuid=told["uuid"],
        name=told["name"],
        vram_total=_mib(told["memory.total"]),
        vram_free=_mib(told["memory.free"]),
        compute=told["compute_cap"] if re.fullmatch(r"\d+\.\d+", told["compute_cap"]) else None,
    )
    if told["mig.mode.current"] == "Enabled":
        known["mig"] = mig_devices(host, told["uuid"])
    return known


def nvidia_ours(host: Host) -> dict[str, int]:
    """A GPU's UUID -> bytes that llmnode's units use there."""
    ours: dict[str, int] = {}
    _, said = host.run("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits")
    for row in csv.reader(io.StringIO(said), skipinitialspace=True):
        if len(row) == 3 and _is_ours(host, row[1]):
            ours[row[0]] = ours.get(row[0], 0) + (_mib(row[2]) or 0)
    return ours


def _is_ours(host: Host, process: str) -> bool:
    return _unit(host, host.root / "proc" / process).startswith("llmnode@")


def mig_devices(host: Host, uuid: str) -> list[dict[str, Any]]:
    """The slices of one GPU, from `nvidia-smi -L`. A slice's memory is what its profile is called by (1g.10gb)."""
    _, said = host.run("nvidia-smi", "-L")
    slices: list[dict[str, Any]] = []
    ours = False
    for line in said.splitlines():
        if line.startswith("GPU "):
            ours = f"UUID: {uuid})" in line
        found = re.search(r"MIG (\S+?\.(\d+)gb\S*)\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)", line)
        if found and ours:
            slices.append({"profile": found[1], "uuid": found[3], "vram_total": int(found[2]) * GB})
    return slices


def _amd(host: Host, path: Path, render_minor: int | None) -> dict[str, Any]:
    total, used = (_int(host.text(path / f"mem_info_vram_{what}")) for what in ("total", "used"))
    unique = host.text(path / "unique_id")
    compute, number = _kfd(host, render_minor)
    processes = host.glob(f"/sys/class/kfd/kfd/proc/*/vram_{number}") if number else []
    return {
        # ROCm names a GPU by its unique id; consumer cards have none, or one of zeros.
        "uuid": f"GPU-{int(unique, 16):016x}" if unique and int(unique, 16) else None,
        "name": host.text(path / "product_name") or None,
        "minor": render_minor,
        "vram_total": total,
        "vram_free": None if total is None or used is None else total - used,
        "vram_ours": sum(_int(host.text(file)) or 0 for file in processes if _is_ours(host, file.parent.name)),
        "compute": compute,
    }


def _kfd(host: Host, render_minor: int | None) -> tuple[str | None, str]:
    """How KFD calls a GPU: its instruction set, and the number in the names of its files.

    It writes gfx942 as 90402: two decimal digits each for minor and stepping, which the name has in hexadecimal.
    """
    for path in host.glob("/sys/class/kfd/kfd/topology/nodes/*"):
        said = dict(line.split(None, 1) for line in host.text(path / "properties").splitlines() if " " in line)
        version = _int(said.get("gfx_target_version", ""))
        if version and _int(said.get("drm_render_minor", "")) == render_minor:
            return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}", host.text(path / "gpu_id")
    return None, ""


def _why(host: Host, path: Path, gpu: dict[str, Any], driver: dict[str, str | None], refusal: str) -> str:
    """Why no process can use it; empty when one can. The first of these that holds is the cause of the others.

    (1) A device that is off the bus reads as ones. (2) No driver in the kernel. (3) Another one on the disk: the
    libraries are of that one and refuse the one that is loaded. (4) The driver does not answer. (5) MIG: the whole GPU
    cannot be opened, its slices can.
    """
    if _config(path).startswith(b"\xff\xff"):
        return "it fell off the bus: power-cycle the host"  # (1)
    if driver["loaded"] is None:
        rest = f"; {driver['installed']} is installed: reboot or load it" if driver["installed"] else ""
        return f"no driver is loaded{rest}"  # (2)
    if driver["installed"] not in (None, driver["loaded"]):
        return f"driver {driver['loaded']} is loaded and {driver['installed']} is installed: reboot"  # (3)
    if gpu["vram_total"] is None:
        said = f": {refusal}" if refusal and gpu["vendor"] == "nvidia" else ""
        return f"its driver does not answer for it{said}"  # (4)
    if gpu["vendor"] == "amd" and not (host.root / "sys/class/kfd/kfd").exists():
        return "the kernel has no KFD, which ROCm needs"  # (4)
    if gpu["mig"]:
        return f"MIG is on: bind instances to its slices ({', '.join(part['uuid'] for part in gpu['mig'])})"  # (5)
    return ""


def _config(path: Path) -> bytes:
    try:
        with (path / "config").open("rb") as file:
            return file.read(4)
    except OSError:
        return b""


def numa_nodes(host: Host) -> list[Path]:
    return [path for path in host.glob("/sys/devices/system/node/node*") if path.name[4:].isdigit()]


def memory(host: Host) -> dict[str, int]:
    said = {
        name: int(kib) * 1024
        for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", host.text("/proc/meminfo"), re.MULTILINE)
    }
    return {"total": said.get("MemTotal", 0), "available": said.get("MemAvailable", 0)}


def disk_free(host: Host, disk: str) -> dict[str, Any]:
    """Free bytes where `disk` is or would be made, and which file system that is, so that needs can be added up."""
    path = host.root / disk.lstrip("/")
    while not path.exists():
        path = path.parent
    figures = os.statvfs(path)
    return {"free": figures.f_bavail * figures.f_frsize, "filesystem": path.stat().st_dev}


def ports(host: Host) -> dict[int, list[str]]:
    """TCP port that somebody listens on -> the units (or processes, outside of one) that hold it.

    As root: others cannot look into the processes of other users, and see no names.
    """
    inodes: dict[str, int] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in host.text(table).splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                inodes[words[9]] = int(words[1].rsplit(":", 1)[1], 16)
    holders: dict[int, set[str]] = {port: set() for port in inodes.values()}
    for process in host.glob("/proc/[0-9]*"):
        try:
            links = {str(link.readlink()) for link in (process / "fd").iterdir()} if inodes else set()
        except OSError:
            continue  # it has ended, or is another user's
        for inode, port in inodes.items():
            if f"socket:[{inode}]" in links:
                holders[port].add(_unit(host, process))
    return {port: sorted(names) for port, names in holders.items()}


def _unit(host: Host, process: Path) -> str:
    for line in host.text(process / "cgroup").splitlines():
        for part in reversed(line.split("/")):
            if part.endswith((".service", ".scope")):
                return part
    return host.text(process / "comm") or process.name


def python_version(host: Host, python: str) -> str | None:
    """Like 3.11; None where there is none."""
    code, said = host.run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    return said.strip() if code == 0 else None


def _address(bus_id: str) -> str:
    """NVML writes 00000000:65:00.0 for what sysfs calls 0000:65:00.0."""
    return bus_id.lower()[-12:]


def _render_minor(path: Path) -> int | None:
    for node in sorted(path.glob("drm/renderD*")):
        return _int(node.name[len("renderD") :])
    return None


def _node(text: str) -> int | None:
    """The kernel says -1 where the firmware does not tell."""
    node = _int(text)
    return node if node is not None and node >= 0 else None


def _mib(text: str) -> int | None:
    size = _int(text)
    return None if size is None else size * MIB


def _int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="print what this host has, as JSON")
    parser.add_argument("--python", action="append", default=[], help="an interpreter to ask for its version")
    parser.add_argument("--disk", action="append", default=[], help="a path to tell the free space of")
    asked = parser.parse_args()
    print(json.dumps(survey(Host(), asked.python, asked.disk)))


if __name__ == "__main__":
    main()
