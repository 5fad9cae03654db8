"""Hosts as they look from inside, written from the documented formats: files of sysfs and /proc, and what tools print.

Owns: the recordings. Refuses to know: what is read out of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

KERNEL = "6.1.0-30-amd64"
MEMORY = "MemTotal:       528000000 kB\nMemFree:         1000000 kB\nMemAvailable:   500000000 kB\n"
QUERY = "--query-gpu=pci.bus_id,uuid,name,memory.total,memory.free,compute_cap,mig.mode.current"
APPS = "--query-compute-apps=gpu_uuid,pid,used_memory"


@dataclass
class Recording:
    """files: path -> text. said: a program with its arguments (their beginning) -> exit code and output."""

    files: dict[str, str] = field(default_factory=dict)
    said: dict[str, tuple[int, str]] = field(default_factory=dict)

    def play(self, folder: Path) -> None:
        """Lay the files out under `folder`, with programs in folder/bin that say what was recorded."""
        for path, text in {"proc/sys/kernel/osrelease": KERNEL, "proc/meminfo": MEMORY, **self.files}.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text.encode("latin-1"))
        (folder / "bin").mkdir(exist_ok=True)
        for name in {command.split()[0] for command in self.said}:
            script = ["#!/bin/sh", 'case "$*" in']
            for number, (command, (code, output)) in enumerate(self.said.items()):
                program, _, arguments = command.partition(" ")
                if program == name:
                    answer = folder / f"bin/{name}-{number}.txt"
                    answer.write_text(output)
                    script.append(f'"{arguments}"*) cat "{answer}"; exit {code};;')
            (folder / "bin" / name).write_text("\n".join([*script, "*) exit 1;;", "esac", ""]))
            (folder / "bin" / name).chmod(0o755)

    def both(self, other: Recording) -> Recording:
        return Recording({**self.files, **other.files}, {**self.said, **other.said})


def pci(address: str, vendor: str, kind: str = "0x030200", numa: int = 0, **files: str) -> dict[str, str]:
    folder = f"sys/bus/pci/devices/{address}"
    head = "\xff\xff\xff\xff" if files.pop("lost", "") else "\xde\x10\x84\x26"
    seen = {"vendor": f"{vendor}\n", "class": f"{kind}\n", "numa_node": f"{numa}\n", "config": head}
    return {f"{folder}/{name}": text for name, text in {**seen, **files}.items()}


def nvidia(minor: int, address: str) -> dict[str, str]:
    return {
        f"proc/driver/nvidia/gpus/{address}/information": "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 151\n"
        f"GPU UUID: \t GPU-{minor:08d}-aaaa-bbbb-cccc-000000000000\nVideo BIOS: \t 95.02.18.c0.5f\n"
        f"Bus Type: \t PCIe\nBus Location: \t {address}\nDevice Minor: \t {minor}\nGPU Firmware: \t 550.144.03\n"
    }


def row(minor: int, address: str, size: int = 24564, free: int = 24000, cap: str = "8.9", mig: str = "[N/A]") -> str:
    name = "NVIDIA GeForce RTX 4090"
    return f"0000{address.upper()}, GPU-{minor:08d}-aaaa-bbbb-cccc-000000000000, {name}, {size}, {free}, {cap}, {mig}\n"


def driver(loaded: str, installed: str | None = None) -> Recording:
    return Recording(
        {"sys/module/nvidia/version": f"{loaded}\n"}, {"modinfo -F version nvidia": (0, f"{installed or loaded}\n")}
    )


NUMA = {
    "sys/devices/system/node/node0/cpulist": "0-15,32-47\n",
    "sys/devices/system/node/node1/cpulist": "16-31,48-63\n",
}
ONE, TWO = "0000:65:00.0", "0000:ca:00.0"
CARDS = {**pci(ONE, "0x10de"), **pci(TWO, "0x10de", kind="0x030000", numa=1)}
# A card's sound is no GPU, and neither is the chip behind the console.
OTHERS = {**pci("0000:65:00.1", "0x10de", kind="0x040300"), **pci("0000:03:00.0", "0x1a03", kind="0x030000")}

TWO_NVIDIA = Recording(
    # The driver numbers GPUs as it pleases: here against the order of addresses.
    {**CARDS, **OTHERS, **NUMA, **nvidia(1, ONE), **nvidia(0, TWO),
     "proc/4242/cgroup": "0::/llmrack.slice/llmnode@qwen.0.service\n", "proc/4343/cgroup": "0::/user.slice/x.scope\n"},
    {
        f"nvidia-smi {QUERY}": (0, row(1, ONE, free=4000) + row(0, TWO)),
        f"nvidia-smi {APPS}": (
            0,
            "GPU-00000001-aaaa-bbbb-cccc-000000000000, 4242, 18000\n"
            "GPU-00000001-aaaa-bbbb-cccc-000000000000, 4343, 500\n"
            "GPU-00000000-aaaa-bbbb-cccc-000000000000, 4343, [N/A]\n",
        ),
    },
).both(driver("550.144.03"))  # fmt: skip

NO_DRIVER = Recording(dict(CARDS))
NOT_LOADED = Recording(dict(CARDS), {"modinfo -F version nvidia": (0, "550.144.03\n")})
MISMATCH = Recording(
    {**CARDS, **nvidia(0, ONE), **nvidia(1, TWO)},
    {
        "nvidia-smi --query-gpu": (
            18,
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.86\n",
        )
    },
).both(driver("550.144.03", "570.86.15"))
LOST = Recording(
    {**pci(ONE, "0x10de"), **pci(TWO, "0x10de", lost="yes"), **nvidia(0, ONE), **nvidia(1, TWO)},
    {
        "nvidia-smi --query-gpu": (
            15,
            row(0, ONE) + "Unable to determine the device handle for GPU0000:CA:00.0: GPU is lost.  Reboot the system"
            " to recover this GPU\n",
        )
    },
).both(driver("550.144.03"))
SILENT = Recording(
    {**CARDS, **nvidia(0, ONE)},
    {
        "nvidia-smi --query-gpu": (
            15,
            row(0, ONE) + "Unable to determine the device handle for GPU0000:CA:00.0: Unknown Error\n",
        )
    },
).both(driver("550.144.03"))
NO_TOOL = Recording(dict(CARDS)).both(driver("550.144.03"))
MIG = Recording(
    {**CARDS, **nvidia(0, ONE), **nvidia(1, TWO)},
    {
        "nvidia-smi --query-gpu": (
            0,
            row(0, ONE, 81559, 81000, "9.0", "Enabled") + row(1, TWO, 81559, 81000, "9.0", "Disabled"),
        ),
        "nvidia-smi -L": (
            0,
            "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-aaaa-bbbb-cccc-000000000000)\n"
            "  MIG 3g.40gb     Device  0: (UUID: MIG-11111111-2222-3333-4444-555555555555)\n"
            "  MIG 1g.10gb+me  Device  1: (UUID: MIG-66666666-7777-8888-9999-000000000000)\n"
            "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-00000001-aaaa-bbbb-cccc-000000000000)\n",
        ),
    },
).both(driver("550.144.03"))


def amd(address: str, node: int, render: int, unique: str, version: int, numa: int = 0) -> dict[str, str]:
    folder = f"sys/bus/pci/devices/{address}"
    topology = f"sys/class/kfd/kfd/topology/nodes/{node}"
    return {
        **pci(address, "0x1002", kind="0x038000", numa=numa),
        f"{folder}/mem_info_vram_total": "68702699520\n",
        f"{folder}/mem_info_vram_used": "289349632\n",
        f"{folder}/unique_id": f"{unique}\n",
        f"{folder}/product_name": "AMD Instinct MI210\n",
        f"{folder}/drm/renderD{render}/dev": f"226:{render}\n",
        f"{topology}/gpu_id": f"{51000 + node}\n",
        f"{topology}/properties": f"cpu_cores_count 0\nsimd_count 416\ndrm_render_minor {render}\n"
        f"gfx_target_version {version}\nunique_id {int(unique, 16)}\n",
    }


TWO_AMD = Recording(
    {
        **NUMA,
        **amd("0000:c1:00.0", 1, 128, "7c8a1b2c3d4e5f60", 90010),
        **amd("0000:c6:00.0", 2, 129, "0", 110000, numa=-1),
        # Without DKMS the module has no version of its own.
        "sys/module/amdgpu/refcnt": "2\n",
        "sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 64\nsimd_count 0\ngfx_target_version 0\n",
        "sys/class/kfd/kfd/proc/77/vram_51001": "1073741824\n",
        "sys/class/kfd/kfd/proc/78/vram_51001": "2048\n",
        "proc/77/cgroup": "0::/llmrack.slice/llmnode@m.0.service\n",
        "proc/78/cgroup": "0::/user.slice\n",
    },
    {"modinfo -F version amdgpu": (0, "\n")},
)
CPU_ONLY = Recording(dict(NUMA))
BOTH = TWO_NVIDIA.both(TWO_AMD)
