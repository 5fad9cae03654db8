"""`make demo`, as a newcomer meets it: the same program, asked once, interrupted, killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import PATIENCE_S, wait_for


def command(model: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "llmgate", "demo", "--model", str(model), *flags]


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_once_answers_a_question_and_leaves_nothing_behind(tiny_model: Path) -> None:
    done = subprocess.run(
        command(tiny_model, "--once"), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"^Q: .+\nA: (.+)", done.stdout, re.MULTILINE)
    assert said and said[1].strip(), done.stdout
    assert "curl " in done.stdout
    folder = re.search(r"^Logs +(\S+)", done.stdout, re.MULTILINE)
    assert folder and not Path(folder[1]).exists()


def test_a_newcomers_first_question_gets_a_true_answer() -> None:
    demo = [sys.executable, "-m", "llmgate", "demo"]
    slot = ["--question", "What is a slot?"]
    for extra, words in (([], "service that a team runs on its own machines"), (slot, "place for one running request")):
        done = subprocess.run(
            [*demo, "--once", *extra], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert words in done.stdout
        assert "Ask it also: " in done.stdout


def test_the_printed_curl_works_and_ctrl_c_ends_every_process(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("w") as file:
        demo = subprocess.Popen(command(tiny_model), stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "Serving until Ctrl-C" in out.read_text() or demo.poll() is not None, "a serving demo")
        assert demo.poll() is None, out.read_text()
        line = re.search(r"^Try +(curl .+)$", out.read_text(), re.MULTILINE)
        assert line
        answer = subprocess.run(line[1], shell=True, capture_output=True, text=True, timeout=60, check=False)
        assert answer.stdout.rstrip().endswith("data: [DONE]"), answer.stdout + answer.stderr
        children = descendants(demo.pid)
        assert len(children) >= 3
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0, out.read_text()
        wait_for(lambda: not any(child.is_running() for child in children), "the end of every child")
    finally:
        demo.kill()


def test_a_killed_node_is_started_again(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("w") as file:
        demo = subprocess.Popen(command(tiny_model), stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "Serving until Ctrl-C" in out.read_text() or demo.poll() is not None, "a serving demo")
        victim = next(c for c in descendants(demo.pid) if "llmnode" in c.cmdline())
        os.kill(victim.pid, signal.SIGKILL)
        wait_for(lambda: "starting it again" in out.read_text(), "the demo's notice")
        wait_for(lambda: sum("llmnode" in c.cmdline() for c in descendants(demo.pid)) == 2, "two nodes again")
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 0
    finally:
        demo.kill()


def test_children_do_not_outlive_a_killed_demo(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("w") as file:
        # What it cannot clean up any more goes with this test's own folder.
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        demo = subprocess.Popen(command(tiny_model), stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(lambda: "Serving until Ctrl-C" in out.read_text() or demo.poll() is not None, "a serving demo")
        children = descendants(demo.pid)
        assert children
    finally:
        demo.kill()
        demo.wait()
    wait_for(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children), "no child left")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>not found</html>" * 100])
def test_a_model_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    model = tmp_path / "broken.gguf"
    model.write_bytes(content)
    done = subprocess.run(
        command(model, "--once"), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert "broken.gguf" in done.stderr
    assert "Traceback" not in done.stderr
