"""llama.cpp ends the process on a failed assertion. What it says last must not be lost, and the exit code is ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import logging, os, sys
from pathlib import Path
logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s", stream=sys.stdout)
from llmnode.engine import llama
options = llama.LlamaOptions(Path(sys.argv[1]), slots=1, n_ctx=256, threads=1)
"""
ABORT = "backend.seq_copy(300, 0, 1)\nprint('still here')\n"
"""llama.cpp asserts that a sequence's number is below 256."""


def run(tiny_model: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + program, str(tiny_model)], capture_output=True, text=True, timeout=120
    )


def test_an_abort_leaves_its_reason_in_the_log_and_an_exit_code_of_its_own(tiny_model: Path) -> None:
    ended = run(tiny_model, "backend = llama.load(options)\n" + ABORT)
    assert ended.returncode == 5
    (line,) = ended.stdout.splitlines()
    assert line.startswith("CRITICAL llama.cpp cannot go on: ")
    assert "GGML_ASSERT(" in line
    assert "llama-kv-cache.cpp" in line


def test_who_loads_a_model_may_say_what_happens_at_an_abort(tiny_model: Path) -> None:
    program = """
def leave(reason):
    print("our own:", reason, flush=True)
    os._exit(23)

backend = llama.load(options, on_abort=leave)
"""
    ended = run(tiny_model, program + ABORT)
    assert ended.returncode == 23
    assert "our own: " in ended.stdout
    assert "GGML_ASSERT(" in ended.stdout
    assert "still here" not in ended.stdout


@pytest.mark.parametrize("raises", ["raise RuntimeError('no')", "return"])
def test_whatever_is_done_at_an_abort_the_process_does_not_go_on(tiny_model: Path, raises: str) -> None:
    program = f"def leave(reason):\n    {raises}\n\nbackend = llama.load(options, on_abort=leave)\n"
    ended = run(tiny_model, program + ABORT)
    assert ended.returncode == -6
    assert "still here" not in ended.stdout
