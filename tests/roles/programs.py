"""The roles' programs as modules: they lie under files/, outside of any package. And Ansible's own, to be run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "roles"


def load(role: str, name: str) -> ModuleType:
    """A new module of roles/ROLE/files/NAME.py. It is called by both: two roles have a placement.py."""
    called = f"{role}_{name}"
    spec = importlib.util.spec_from_file_location(called, ROLES / role / "files" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def ansible(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name(program)), *(str(argument) for argument in arguments)]
    # Modules run with this Python, whatever the machine has for one.
    environment = {**os.environ, "ANSIBLE_PYTHON_INTERPRETER": sys.executable}
    return subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=250
    )
