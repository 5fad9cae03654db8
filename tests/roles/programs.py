"""The roles' programs as modules: they lie under files/, outside of any package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROLES = Path(__file__).resolve().parents[2] / "roles"


def load(role: str, name: str) -> ModuleType:
    """A new module of roles/ROLE/files/NAME.py. It is called by both: two roles have a placement.py."""
    called = f"{role}_{name}"
    spec = importlib.util.spec_from_file_location(called, ROLES / role / "files" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module
