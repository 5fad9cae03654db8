#!/usr/bin/env python3
"""The lab: three real systemd hosts in containers, reached over SSH, with no way out.

Owns the image (built once into the cache), the network namespaces and the hosts' processes. Knows nothing of llmrack
but how to fetch what its deployment needs while there still is a way out, in `deploy`. Touches no network of the
machine itself: every address, link and bridge lives in namespaces that `down` removes.

    namespace llmrack-lab    bridge 198.18.0.1, where the controller runs (`lab.py exec -- COMMAND`)
      |-- veth -- namespace llmrack-lab1   198.18.0.11   systemd-nspawn, on a disk of its own
      |-- veth -- namespace llmrack-lab2   198.18.0.12
      `-- veth -- namespace llmrack-lab3   198.18.0.13

A host's disk is an overlay over the shared image that keeps in memory what the host writes. It outlives a reboot
(`systemctl reboot` on the host) and a loss of power (`off`, then `on`), and ends with `off --wipe` and with `down`.
Rules and addresses that a host has set up in its namespace stay over a reboot, and end with its power.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

SUITE = "bookworm"  # systemd 252, the oldest that is supported; newer releases have dropped cgroup v1
GLIBC = (2, 36)  # bookworm's: what is compiled on a machine with a newer one does not load there
PACKAGES = (
    "systemd,systemd-sysv,dbus,openssh-server,python3,python3-venv,iproute2,"
    # llama.cpp's CPU backends are linked against OpenMP's runtime; the hosts cannot fetch it later.
    "libgomp1,ca-certificates,curl,procps,"
    # What is optional in a deployment. Roles start these themselves, so they are off in the image.
    "nftables,keepalived,prometheus,prometheus-node-exporter"
)
# One line a change made after debootstrap; part of the image's key, so that editing it makes a new image.
SETUP = (
    "systemctl mask systemd-networkd-wait-online.service",
    "systemctl disable apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer",
    "systemctl disable keepalived nftables prometheus prometheus-node-exporter",
    "rm -rf /var/cache/apt/archives/*.deb /var/lib/apt/lists/*",
    # Each host makes an identity of its own; debootstrap has copied this machine's.
    "rm -f /etc/hostname /var/lib/dbus/machine-id && truncate -s 0 /etc/machine-id",
    "install -d -m 0700 /root/.ssh",
)

CONTROLLER = "llmrack-lab"
CONTROLLER_ADDRESS = "198.18.0.1/24"  # a range set aside for tests, RFC 2544
ADDRESSES = {"lab1": "198.18.0.11", "lab2": "198.18.0.12", "lab3": "198.18.0.13"}

ASK_PYTHON_VERSION = "python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'"

TOOLS = {  # what must be on the machine: a command, or a file when it has a slash, and the Debian package it comes in
    "systemd-nspawn": "systemd-container",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "curl": "curl",
    "nsenter": "util-linux",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}


class LabError(Exception):
    """The lab cannot do what was asked. The message is for the person at the terminal, in one line."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the lab keeps things: `cache` outlives it, `run` does not."""

    cache: Path
    run: Path

    @classmethod
    def of(cls, environ: dict[str, str]) -> Places:
        home = Path(environ.get("LLMRACK_CACHE") or Path(environ.get("HOME", "/root")) / ".cache" / "llmrack")
        return cls(home / "lab", Path("/run/llmrack-lab"))

    @property
    def ssh_key(self) -> Path:
        return self.cache / "ssh" / "id_ed25519"

    @property
    def ssh_config(self) -> Path:
        return self.run / "ssh_config"

    @property
    def image(self) -> Path:
        """Holds the name of the image that the hosts run."""
        return self.run / "image"

    @property
    def disks(self) -> Path:
        """File system in memory with what each host has written."""
        return self.run / "disks"

    def root(self, host: str) -> Path:
        """Where a host's disk is mounted."""
        return self.run / "roots" / host


def say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def sh(*command: str | Path, check: bool = True, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run to the end; on failure say the command and what it wrote."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        wrote = "" if quiet else f": {(done.stderr or done.stdout).strip()[-2000:]}"
        raise LabError(f"`{' '.join(str(part) for part in command)}` ended with {done.returncode}{wrote}")
    return done


def wait_for(what: str, seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"gave up waiting for {what} after {seconds:.0f} s")
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------- the machine


def missing_packages() -> list[str]:
    absent = (package for tool, package in TOOLS.items() if not (Path(tool).exists() if "/" in tool else _which(tool)))
    return sorted(set(absent))


def too_new(libc: str) -> str:
    """Why what this machine compiles cannot run on the lab's hosts; empty when it can. `libc`: its version, "2.36"."""
    version = tuple(int(part) for part in libc.split(".")[:2] if part.isdigit())
    if version <= GLIBC:
        return ""
    hosts = ".".join(map(str, GLIBC))
    return f"this machine's C library ({libc}) is newer than that of the lab's hosts ({hosts}): use Debian 12"


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def prepare() -> None:
    """Install what the lab needs on Debian and Ubuntu; elsewhere say what is missing."""
    packages = missing_packages()
    if not packages:
        return
    names = " ".join(packages)
    if not shutil.which("apt-get"):
        raise LabError(f"missing on this machine (names of the Debian packages): {names}")
    require_root()
    say(f"installing with apt: {names}")
    sh("apt-get", "update")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    sh("apt-get", "install", "-y", "--no-install-recommends", *packages)


def require_root() -> None:
    if os.geteuid() != 0:
        raise LabError("the lab boots containers and makes network namespaces: run it as root")


@contextlib.contextmanager
def only_one(places: Places) -> Iterator[None]:
    """Two people who type `up` at once get one lab."""
    places.cache.mkdir(parents=True, exist_ok=True)
    with (places.cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------------- the image


def image(places: Places) -> Path:
    """The hosts' shared root file system, built when there is none for this recipe: complete or absent."""
    make_ssh_key(places)
    recipe = json.dumps([SUITE, PACKAGES, SETUP, places.ssh_key.with_suffix(".pub").read_text()])
    tree = places.cache / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    if tree.exists():
        return tree
    for left in places.cache.glob("building-*"):
        discard(left)
    say(f"building the hosts' image once, about 2 minutes and 250 MB: {tree}")
    building = Path(tempfile.mkdtemp(prefix="building-", dir=places.cache))
    try:
        building.chmod(0o755)
        bootstrap(building)
        furnish(building, places)
        building.rename(tree)
    finally:
        discard(building)
    return tree


def discard(tree: Path) -> None:
    """Remove a folder with all that is mounted in it: hosts' disks, or /proc and /sys of an interrupted debootstrap."""
    for place in sorted(mounted_in(tree), reverse=True):
        sh("umount", place)
    shutil.rmtree(tree, ignore_errors=True)


def mounted_in(tree: Path) -> list[Path]:
    mounted = (Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines())
    return [place for place in mounted if place.is_relative_to(tree)]


def make_ssh_key(places: Places) -> None:
    if places.ssh_key.exists():
        return
    places.ssh_key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "llmrack-lab", "-f", places.ssh_key)


def bootstrap(tree: Path) -> None:
    log = tree.with_suffix(".log")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
    command += [f"--keyring={next(tool for tool in TOOLS if '/' in tool)}", SUITE, str(tree), *mirror()]
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        with log.open("w") as output:
            running = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        try:
            code = running.wait()
        except BaseException:
            end_group(running)
            raise
        if code:
            ended = " | ".join(log.read_text().splitlines()[-3:])
            raise LabError(f"debootstrap ended with {code}: {ended}")
    finally:
        log.unlink()


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """End a program with all that it has started in its session, which would go on writing otherwise."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            leader.wait(5)


def furnish(tree: Path, places: Places) -> None:
    for line in SETUP:
        sh("systemd-nspawn", "-q", "-D", tree, "--register=no", "--keep-unit", "--resolv-conf=off", "--pipe",
           "sh", "-c", line)  # fmt: skip
    key = tree / "root/.ssh/authorized_keys"
    key.write_text(places.ssh_key.with_suffix(".pub").read_text())
    key.chmod(0o600)


def mirror() -> list[str]:
    """The Debian mirror this machine is set up with, as debootstrap's argument; none leaves it to debootstrap."""
    if os.environ.get("LLMRACK_DEBIAN_MIRROR"):
        return [os.environ["LLMRACK_DEBIAN_MIRROR"]]
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    text = "\n".join(path.read_text(errors="replace") for path in files if path.is_file())
    words = (word for word in text.split() if word.startswith(("http://", "https://")))
    return [word for word in words if word.rstrip("/").endswith("/debian")][:1]


# ----------------------------------------------------------------------------------------------- the network


def namespaces() -> set[str]:
    return {line.split()[0] for line in sh("ip", "netns", "list").stdout.splitlines() if line.strip()}


def namespace_of(host: str) -> str:
    return f"llmrack-{host}"


def build_network(controller: str = CONTROLLER, hosts: Mapping[str, str] = ADDRESSES) -> None:
    """The controller's namespace with its bridge, and one namespace a host, joined by veth pairs."""
    if controller not in namespaces():
        sh("ip", "netns", "add", controller)
        sh("ip", "-n", controller, "link", "set", "lo", "up")
        sh("ip", "-n", controller, "link", "add", "bridge", "type", "bridge")
        sh("ip", "-n", controller, "addr", "add", CONTROLLER_ADDRESS, "dev", "bridge")
        sh("ip", "-n", controller, "link", "set", "bridge", "up")
    for host, address in hosts.items():
        own = namespace_of(host)
        if own in namespaces():
            continue
        sh("ip", "netns", "add", own)
        sh("ip", "-n", controller, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", own)
        sh("ip", "-n", controller, "link", "set", host, "master", "bridge", "up")
        sh("ip", "-n", own, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            sh("ip", "-n", own, "link", "set", link, "up")


def remove_network(controller: str = CONTROLLER, hosts: Mapping[str, str] = ADDRESSES) -> None:
    remove_namespaces(*map(namespace_of, hosts), controller)


def remove_namespaces(*names: str) -> None:
    for name in namespaces().intersection(names):
        sh("ip", "netns", "delete", name)


# ------------------------------------------------------------------------------------------------- the hosts


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that stays the same one: its id and its start time (in clock ticks since boot)."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, _start_time(pid) or 0)

    @property
    def alive(self) -> bool:
        return _start_time(self.pid) == self.started

    def descendants(self) -> list[Process]:
        try:
            pids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            return []
        children = [Process.of(int(pid)) for pid in pids]
        return [*children, *(process for child in children for process in child.descendants())]

    def signal(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _start_time(pid: int) -> int | None:
    """None for a process that is gone or waits to be reaped. Source: proc(5), fields 3 and 22."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def cgroup_roots() -> list[Path]:
    """Where control groups that systemd tracks services with are mounted: version 2, and its own v1 hierarchy."""
    roots = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options = line.split()[:4]
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            roots.append(Path(where))
    return roots


def cgroups_of(host: str) -> list[Path]:
    return [root / "llmrack-lab" / host for root in cgroup_roots()]


def insert_disk(host: str, tree: Path, places: Places) -> None:
    """Mount the host's disk, over the image: the one that it had, or an empty one."""
    root, upper, work = places.root(host), places.disks / host / "upper", places.disks / host / "work"
    if not mounted_in(places.disks):
        places.disks.mkdir(parents=True, exist_ok=True)
        sh("mount", "-t", "tmpfs", "-o", "mode=0700,size=75%", "llmrack-lab", places.disks)
    if not mounted_in(root):
        for folder in (root, upper, work):
            folder.mkdir(parents=True, exist_ok=True)
        sh("mount", "-t", "overlay", "-o", f"lowerdir={tree},upperdir={upper},workdir={work}", "llmrack-lab", root)


def wipe_disk(host: str, places: Places) -> None:
    discard(places.root(host))
    discard(places.disks / host)


# With --keep-unit, systemd-nspawn asks for another start of a container that reboots by this status.
AGAIN = 'while "$@"; [ $? -eq 133 ]; do :; done'


def boot(host: str, tree: Path, places: Places) -> None:
    """Start a host and write down which process it is. Without a group each, the hosts' systemds would share one."""
    insert_disk(host, tree, places)
    groups = cgroups_of(host)
    for group in groups:
        group.mkdir(parents=True, exist_ok=True)

    def join_groups() -> None:
        for group in groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = ["sh", "-c", AGAIN, "lab"]
    command += ["systemd-nspawn", "-q", "-D", str(places.root(host)), "--register=no", "--keep-unit"]
    command += ["-M", host, f"--hostname={host}", f"--network-namespace-path=/run/netns/{namespace_of(host)}"]
    # The namespace is the host's own, so it may set up rules and addresses there as a real one does.
    command += ["--capability=CAP_NET_ADMIN"]
    command += ["--resolv-conf=off", "--timezone=off", "--link-journal=no", "-b"]
    # Nobody else knows of the directory, and nspawn's lock would lie elsewhere on this machine.
    environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_LOCK": "0"}
    with (places.run / f"{host}.console").open("w") as console:
        started = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment,
            start_new_session=True, preexec_fn=join_groups,
        )  # fmt: skip
    record = places.run / f"{host}.json"
    record.write_text(json.dumps(dataclasses.asdict(Process.of(started.pid))))


def process_of(host: str, places: Places) -> Process | None:
    """What keeps the host's container running, when it does."""
    try:
        process = Process(**json.loads((places.run / f"{host}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return process if process.alive else None


def end(host: str, places: Places) -> None:
    """Take a host's power away: it ends at once, by its own process ids, and its network with it. Its disk stays."""
    process = process_of(host, places)
    if process:
        process.signal(signal.SIGSTOP)  # or it might just be starting the container again
        everything = (process, *process.descendants())
        for one in everything:
            one.signal(signal.SIGKILL)
        wait_for(f"{host} to end", 10, lambda: not any(one.alive for one in everything))
        remove_namespaces(namespace_of(host))
    for group in cgroups_of(host):
        remove_cgroup(group)
    (places.run / f"{host}.json").unlink(missing_ok=True)


def remove_cgroup(group: Path) -> None:
    """Remove a control group and those below it; the kernel may take a moment to let go of the last process."""
    if not group.exists():
        return
    below = sorted((path for path in group.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
    for path in (*below, group):
        wait_for(f"{path} to be empty", 10, functools.partial(_rmdir, path))
    _rmdir(group.parent)


def _rmdir(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


def state_of(host: str, places: Places) -> str:
    """What the host's own systemd says of it: running, degraded, starting...; "off" or "unreachable" when it cannot."""
    if not process_of(host, places):
        return "off"
    asked = sh(*inside_network(), *ssh_command(places), host, "systemctl is-system-running", check=False)
    return asked.stdout.strip() or "unreachable"


# ------------------------------------------------------------------------------------------------- commands


def write_ssh_config(tree: Path, places: Places) -> None:
    """One file says how to reach the hosts, for people, the tests and Ansible; their host key is known beforehand."""
    host_key = " ".join((tree / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2])
    known = places.run / "known_hosts"
    known.write_text("".join(f"{host},{address} {host_key}\n" for host, address in ADDRESSES.items()))
    lines = [f"Host {host} {address}\n  HostName {address}\n" for host, address in ADDRESSES.items()]
    lines.append(
        f"Host *\n  User root\n  IdentityFile {places.ssh_key}\n  IdentitiesOnly yes\n  UserKnownHostsFile {known}\n"
        "  HostKeyAlgorithms ssh-ed25519\n  StrictHostKeyChecking yes\n  BatchMode yes\n  ConnectTimeout 10\n"
        "  LogLevel ERROR\n"
    )
    places.ssh_config.write_text("".join(lines))


def inside_network() -> list[str]:
    return ["nsenter", f"--net=/run/netns/{CONTROLLER}"]


def ssh_command(places: Places) -> list[str]:
    return ["ssh", "-F", str(places.ssh_config)]


def up(places: Places) -> None:
    """Boot what is not running; a failure or Ctrl-C leaves nothing behind."""
    prepare()
    with only_one(places):
        began = time.monotonic()
        tree = image(places)
        if places.image.exists() and places.image.read_text() != tree.name:
            say("the hosts run an older image: starting them anew")
            remove(places)
        places.run.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            places.image.write_text(tree.name)
            write_ssh_config(tree, places)
            build_network()
            for host in ADDRESSES:
                if not process_of(host, places):
                    boot(host, tree, places)
            for host in ADDRESSES:
                wait_for(f"{host} to boot", 120, functools.partial(booted, host, places))
        except BaseException:
            say("could not bring it up: removing it again")
            remove(places)
            raise
        say(f"{len(ADDRESSES)} hosts up after {time.monotonic() - began:.1f} s")


def booted(host: str, places: Places) -> bool:
    state = state_of(host, places)
    if state == "off":
        tail = (places.run / f"{host}.console").read_text(errors="replace").strip()[-500:]
        raise LabError(f"{host} ended while booting: {tail}")
    return state in ("running", "degraded")


def down(places: Places) -> None:
    with only_one(places):
        remove(places)


def remove(places: Places) -> None:
    for host in ADDRESSES:
        end(host, places)
    remove_network()
    discard(places.run)


def status(places: Places) -> None:
    for host, address in ADDRESSES.items():
        process = process_of(host, places)
        print(f"{host:<6} {address:<14} {state_of(host, places):<12} {process.pid if process else '-'}")


def require_up(places: Places) -> None:
    dark = [host for host in ADDRESSES if not process_of(host, places)]
    if dark:
        raise LabError(f"not up: {', '.join(dark)}; start it with `make lab-up`")


def enter(places: Places, command: Sequence[str]) -> None:
    """Become `command` inside the controller's namespace, also while some of the hosts are off."""
    if not any(process_of(host, places) for host in ADDRESSES):
        raise LabError("not up; start it with `make lab-up`")
    os.execvp("nsenter", [*inside_network(), "--", *command])


def fetch_release(places: Places) -> None:
    """Fetch what a deployment needs from outside, where the role llmrack_artifacts looks: inside nothing can be."""
    require_up(places)
    python = sh(*inside_network(), *ssh_command(places), next(iter(ADDRESSES)), ASK_PYTHON_VERSION).stdout.strip()
    release = places.cache.parent / "releases" / f"cpu-{python}"
    os.chdir(ROOT)
    fetch("roles/llmrack_artifacts/files/wheelhouse.py", "release", "--python", python, "--out", str(release))


def deploy(places: Places, arguments: Sequence[str]) -> None:
    """Run playbooks/deploy.yml on the lab."""
    fetch_release(places)
    beside = Path(sys.executable).parent / "ansible-playbook"
    playbook = str(beside) if beside.exists() else "ansible-playbook"
    enter(places, [playbook, "-i", "inventory/lab", "playbooks/deploy.yml", *arguments])


def fetch(*arguments: str) -> str:
    """Run a Python program of this checkout, its progress in sight, and return what it printed."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LabError(f"`python {' '.join(arguments)}` ended with {done.returncode}")
    return done.stdout.strip()


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab.py", description="Three real systemd hosts, without a way out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("prepare", help="install the system packages that the lab needs (Debian, Ubuntu)")
    commands.add_parser("up", help="build the image if there is none, boot the hosts")
    commands.add_parser("down", help="end the hosts and remove their network")
    commands.add_parser("status", help="one line a host: name, address, state, process id")
    ssh = commands.add_parser("ssh", help="a shell, or a command, on one host")
    ssh.add_argument("host", choices=ADDRESSES)
    ssh.add_argument("rest", nargs=argparse.REMAINDER, metavar="COMMAND")
    execute = commands.add_parser("exec", help="run a command in the controller's network namespace: exec -- COMMAND")
    execute.add_argument("rest", nargs=argparse.REMAINDER, metavar="COMMAND")
    commands.add_parser("deploy", help="deploy llmrack on the hosts; further arguments go to ansible-playbook")
    commands.add_parser("fetch", help="fetch what a deployment needs from outside")
    off = commands.add_parser("off", help="take the power from one host")
    off.add_argument("host", choices=ADDRESSES)
    off.add_argument("--wipe", action="store_true", help="and its disk: the next `on` starts an empty host")
    on = commands.add_parser("on", help="give it power again: it boots from its disk")
    on.add_argument("host", choices=ADDRESSES)
    return parser


def main(arguments: Sequence[str]) -> int:
    parser = command_line()
    given, further = parser.parse_known_args(arguments)
    if further and given.command != "deploy":
        parser.error(f"unknown arguments: {' '.join(further)}")
    places = Places.of(dict(os.environ))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that an ended `up` cleans up after itself, too
    try:
        if given.command == "prepare":
            prepare()
            return 0
        require_root()
        if given.command == "up":
            up(places)
        elif given.command == "down":
            down(places)
        elif given.command == "status":
            status(places)
        elif given.command == "ssh":
            enter(places, [*ssh_command(places), given.host, *given.rest])
        elif given.command == "exec":
            enter(places, given.rest[1:] if given.rest[:1] == ["--"] else given.rest)
        elif given.command == "deploy":
            deploy(places, further)
        elif given.command == "fetch":
            fetch_release(places)
        elif given.command == "off":
            with only_one(places):
                end(given.host, places)
                if given.wipe:
                    wipe_disk(given.host, places)
        elif given.command == "on":
            up(places)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
