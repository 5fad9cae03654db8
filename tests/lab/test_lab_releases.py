"""Gates and nodes one release apart, in either direction, on three real systemd hosts: see lab.py. The previous release
is deployed by its own playbooks, today's by today's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import previous
from tests.lab import lab
from tests.lab.test_lab_fleet import LAB, accepted, on, run
from tests.lab.test_lab_fleet import pytestmark as needs_the_lab
from tests.lab.test_lab_roll import GATES, Fleet, load, unnoticed
from tests.processes import wait_for

pytestmark = [
    *needs_the_lab,
    pytest.mark.full,
    pytest.mark.skipif(bool(previous.missing()), reason=previous.missing()),
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet of the previous release, from hosts that had nothing on them; both releases are at hand."""
    tree = previous.unpack(tmp_path_factory.mktemp("previous"))
    accepted(run(*LAB, "down"))
    accepted(run(*LAB, "up"))
    try:
        fleet = Fleet(tmp_path_factory.mktemp("inventory"))
        kind = f"cpu-{on('lab1', lab.ASK_PYTHON_VERSION)}"
        for source, cache in ((tree, fleet.folder / ".previous"), (previous.ROOT, fleet.folder / ".releases")):
            program = str(source / "roles/llmrack_artifacts/files/wheelhouse.py")
            collect = ["release", "--python", kind.removeprefix("cpu-"), "--out", str(cache / kind)]
            accepted(run(sys.executable, program, *collect))
        fleet.write(llmrack_artifacts_cache=str(fleet.folder / ".previous"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        deployed = subprocess.run(
            fleet.command("deploy"), cwd=tree, env=environment, text=True, capture_output=True,
            stdin=subprocess.DEVNULL, timeout=900,
        )  # fmt: skip
        accepted(deployed)
        wait_for(fleet.settled, "all nodes to be usable")
        fleet.write()
        yield fleet
    finally:
        accepted(run(*LAB, "down"))


def kill_a_node(fleet: Fleet) -> None:
    """Kill one in the middle of answers, until the gates have had some of them go on elsewhere."""
    before = resumed(fleet)
    on("lab3", "systemctl kill --signal=KILL llmnode@a")
    wait_for(lambda: resumed(fleet) > before, "answers to go on at another node")
    wait_for(fleet.settled, "the node to be back")


def resumed(fleet: Fleet) -> int:
    """Answers that went on at another node, at all gates together."""
    pages = [accepted(run(*LAB, "exec", "--", "curl", "-sS", f"{url}/metrics")) for url in GATES.values()]
    counts = re.findall(r'^llmgate_resumes_total\{.*outcome="answered".*\} (\S+)', "\n".join(pages), re.MULTILINE)
    return sum(int(float(count)) for count in counts)


def gates(fleet: Fleet) -> set[str]:
    return {fleet.ask(gate, "/health")["release"] for gate in GATES}


@pytest.mark.timeout(3000)  # three deployments and a rollback on a machine that has better things to do
def test_gates_and_nodes_one_release_apart_work_together_in_either_direction(fleet: Fleet) -> None:
    (old,) = fleet.releases()
    with load(fleet) as result:
        fleet.play("deploy", "--skip-tags", "roll")
        (new,) = gates(fleet)
        assert fleet.releases() == {old} != {new}
        kill_a_node(fleet)

        fleet.play("rollback")
        assert gates(fleet) == fleet.releases() == {old}

        fleet.play("deploy", "--skip-tags", "llmgate")
        assert gates(fleet) == {old} and fleet.releases() == {new}
        kill_a_node(fleet)

        fleet.play("deploy")
        assert gates(fleet) == fleet.releases() == {new}
    unnoticed(result)
    assert fleet.settled()
