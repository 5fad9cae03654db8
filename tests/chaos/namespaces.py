"""Network namespaces for chaos: each node in one of its own, behind a link that can be cut.

Owns: which namespace is whose, and that they are there only as long as they are needed. They are joined as the lab's
are (tests/lab/lab.py), under names of their own, so that a lab may be up meanwhile. Nothing of the machine's own
network is touched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.lab import lab
from tests.tiny_model import cache

CONTROLLER = "llmrack-chaos"
HOSTS = {f"chaos{number}": f"198.18.0.{20 + number}" for number in range(1, 4)}


class Namespaces:
    """What a program that runs in the controller's namespace sees: gates beside it, nodes behind links."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self._hosts = dict(zip(nodes, HOSTS, strict=True))

    def address(self, name: str) -> str:
        host = self._hosts.get(name)
        return HOSTS[host] if host else lab.CONTROLLER_ADDRESS.partition("/")[0]

    def inside(self, name: str, command: list[str]) -> list[str]:
        return [*_entered(lab.namespace_of(self._hosts[name])), *command]

    def cut(self, name: str) -> None:
        self._link(name, "down")

    def mend(self, name: str) -> None:
        self._link(name, "up")

    def _link(self, name: str, state: str) -> None:
        lab.sh("ip", "-n", CONTROLLER, "link", "set", self._hosts[name], state)


def run_inside(command: Sequence[str]) -> int:
    """Build the network, run a command in the controller's namespace to its end, remove the network. Returns its exit
    code. Raises LabError where that cannot be."""
    with _network():
        running = subprocess.Popen([*_entered(CONTROLLER), *command])
        try:
            return running.wait()
        finally:
            if running.poll() is None:
                running.terminate()
                running.wait()


def _entered(namespace: str) -> list[str]:
    """What runs the words behind it in a namespace, as the same process."""
    return ["nsenter", f"--net=/run/netns/{namespace}", "--"]


@contextmanager
def _network() -> Iterator[None]:
    if os.geteuid() != 0:
        raise lab.LabError("cutting links takes network namespaces: run it as root")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    absent = [tool for tool in ("ip", "nsenter") if not shutil.which(tool)]
    if absent:
        raise lab.LabError(f"cutting links needs {absent[0]} (Debian: {lab.TOOLS[absent[0]]})")
    path = cache() / "chaos.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lab.remove_network(CONTROLLER, HOSTS)  # what a run that was killed has left
        try:
            lab.build_network(CONTROLLER, HOSTS)
            yield
        finally:
            lab.remove_network(CONTROLLER, HOSTS)
