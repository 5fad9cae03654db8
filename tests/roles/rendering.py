"""Templates of roles as Ansible renders them: any number in one task, since each task costs a process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.roles.programs import ROLES, ansible

_ALL = (
    "{%- set texts = {} -%}{%- for file in rendered_files -%}{%- set _ = texts.update({file.to:"
    " lookup('ansible.builtin.template', file.source, template_vars=file.variables)}) -%}{%- endfor -%}"
    "{{ texts | to_json }}"
)


@dataclass(frozen=True)
class File:
    """A template of a role, what it is to become below the folder, and the variables that only this one gets."""

    role: str
    template: str
    to: str
    variables: dict[str, Any] = field(default_factory=dict)


def render(
    folder: Path,
    files: Iterable[File],
    *,
    inventory: dict[str, Any] | None = None,
    host: str = "localhost",
    roles: Sequence[str] = (),
) -> None:
    """Write the files, as they are on the inventory's host, with defaults and variables of these roles."""
    asked = [
        {
            "to": file.to,
            "source": str(ROLES / file.role / "templates" / f"{file.template}.j2"),
            "variables": file.variables,
        }
        for file in files
    ]
    known = [
        path for role in roles for part in ("defaults", "vars") if (path := ROLES / role / part / "main.yml").exists()
    ]
    write = {"content": _ALL, "dest": f"{folder}/rendered.json", "mode": "0600"}
    play = {
        "hosts": host, "connection": "local", "gather_facts": False, "vars_files": list(map(str, known)),
        "tasks": [{"ansible.builtin.copy": write, "vars": {"rendered_files": asked}}],
    }  # fmt: skip
    (folder / "render.yml").write_text(yaml.safe_dump([play]))
    (folder / "render-hosts.yml").write_text(yaml.safe_dump(inventory or {"all": {"hosts": {host: None}}}))
    done = ansible("ansible-playbook", "-i", folder / "render-hosts.yml", folder / "render.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    for to, text in json.loads((folder / "rendered.json").read_text()).items():
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        (folder / to).write_text(f"{text.rstrip()}\n")
