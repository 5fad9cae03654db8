"""Systems as they call themselves: the files in /etc by which they are told apart, and what Ansible makes of them.

Owns the recordings, after the distributions' own files. Refuses to know which of them are supported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from ansible.module_utils import distro
from ansible.module_utils.common import sys_info
from ansible.module_utils.facts import utils
from ansible.module_utils.facts.system import distribution


def system(id: str, name: str, version: str, title: str = "", **files: str) -> dict[str, str]:
    """Name of a file in /etc -> text. title: VERSION in os-release, where it says more than the number."""
    release = f'NAME="{name}"\nVERSION="{title or version}"\nID="{id}"\nVERSION_ID="{version}"\n'
    return {"os-release": release, **{name.replace("_", "-"): text + "\n" for name, text in files.items()}}


def debian(number: str, point: str, codename: str) -> dict[str, str]:
    files = system("debian", "Debian GNU/Linux", number, f"{number} ({codename})")
    return {**files, "debian_version": f"{number}.{point}\n"}


def ubuntu(number: str, title: str, sid: str) -> dict[str, str]:
    return {**system("ubuntu", "Ubuntu", number, title), "debian_version": f"{sid}/sid\n"}


RHEL9, RHEL10 = "Red Hat Enterprise Linux release 9.4 (Plow)", "Red Hat Enterprise Linux release 10.0 (Coughlan)"
FILES = {
    "Debian 12": debian("12", "11", "bookworm"),
    "Debian 13": debian("13", "1", "trixie"),
    "Ubuntu 22.04": ubuntu("22.04", "22.04.5 LTS (Jammy Jellyfish)", "bookworm"),
    "Ubuntu 24.04": ubuntu("24.04", "24.04.1 LTS (Noble Numbat)", "trixie"),
    "RHEL 9": system("rhel", "Red Hat Enterprise Linux", "9.4", "9.4 (Plow)", redhat_release=RHEL9),
    "RHEL 10": system("rhel", "Red Hat Enterprise Linux", "10.0", "10.0 (Coughlan)", redhat_release=RHEL10),
    "Rocky Linux 9": system(
        "rocky", "Rocky Linux", "9.4", "9.4 (Blue Onyx)", redhat_release="Rocky Linux release 9.4 (Blue Onyx)"
    ),
    "Rocky Linux 10": system(
        "rocky", "Rocky Linux", "10.0", "10.0 (Red Quartz)", redhat_release="Rocky Linux release 10.0 (Red Quartz)"
    ),
    "AlmaLinux 9": system(
        "almalinux", "AlmaLinux", "9.4", "9.4 (Seafoam Ocelot)", redhat_release="AlmaLinux release 9.4 (Seafoam Ocelot)"
    ),
    "AlmaLinux 10": system(
        "almalinux", "AlmaLinux", "10.0", "10.0 (Purple Lion)", redhat_release="AlmaLinux release 10.0 (Purple Lion)"
    ),
    "CentOS Stream 9": system("centos", "CentOS Stream", "9", redhat_release="CentOS Stream release 9"),
    "CentOS Stream 10": system("centos", "CentOS Stream", "10", redhat_release="CentOS Stream release 10 (Coughlan)"),
    "Oracle Linux 9": system(
        "ol", "Oracle Linux Server", "9.4", oracle_release="Oracle Linux Server release 9.4", redhat_release=RHEL9
    ),
    "Oracle Linux 10": system(
        "ol", "Oracle Linux Server", "10.0", oracle_release="Oracle Linux Server release 10.0", redhat_release=RHEL10
    ),
    "Debian 11": debian("11", "11", "bullseye"),
    "Ubuntu 20.04": ubuntu("20.04", "20.04.6 LTS (Focal Fossa)", "bullseye"),
    "Ubuntu 24.10": ubuntu("24.10", "24.10 (Oracular Oriole)", "trixie"),
    "RHEL 8": system(
        "rhel", "Red Hat Enterprise Linux", "8.10", "8.10 (Ootpa)",
        redhat_release="Red Hat Enterprise Linux release 8.10 (Ootpa)",
    ),
    "Fedora 42": system(
        "fedora", "Fedora Linux", "42", "42 (Server Edition)", redhat_release="Fedora release 42 (Adams)"
    ),
    "openSUSE Leap 15.6": system("opensuse-leap", "openSUSE Leap", "15.6"),
}  # fmt: skip


def facts(files: dict[str, str], folder: Path) -> dict[str, Any]:
    """What Ansible's own code finds out about a host with these files in its /etc."""
    for name, text in files.items():
        (folder / "etc" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "etc" / name).write_text(text)

    def content(path: str, *arguments: Any, **options: Any) -> Any:
        return utils.get_file_content(f"{folder}{path}", *arguments, **options)

    def exists(path: str, allow_empty: bool = False) -> bool:
        there = Path(f"{folder}{path}")
        return there.is_file() and (allow_empty or there.stat().st_size > 0)

    here = distro.LinuxDistribution(include_lsb=False, include_uname=False, root_dir=str(folder))
    with (
        patch.object(sys_info.distro, "id", here.id),
        patch.object(sys_info.distro, "version", here.version),
        patch.object(sys_info.distro, "codename", here.codename),
        patch.object(sys_info.distro, "os_release_info", here.os_release_info),
        patch.object(sys_info.distro, "lsb_release_info", dict),
        patch.object(distribution, "get_file_content", content),
        patch.object(distribution, "_file_exists", exists),
    ):
        found: dict[str, Any] = distribution.Distribution(module=None).get_distribution_facts()
    return found
