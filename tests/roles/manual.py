"""The commands and names that a page of docs gives to its reader, and what is wrong with them.

Owns: which words of a page are for typing. A fenced block `sh` holds commands, one a line, and nothing else; inline
code is one when it begins with a program or playbook of ours. Nothing is run: programs judge words by their own
parsers; playbooks are files, and `ansible-playbook --list-tags` knows their tags.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import yaml

from llmgate import cli as llmgate
from llmnode import cli as llmnode
from tests.lab import lab

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOKS = {path.name for path in (ROOT / "playbooks").glob("*.yml")}
TO_BE_MADE = {"inventory/production", "inventory/mine"}
"""Inventories that the reader makes."""
OTHERS = {"curl", "."}
"""Programs that commands may begin with and that are not ours."""
INSTALLED = "/opt/llmrack/current/bin/"
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_OURS = re.compile(r"(llmrack|llmgate|llmnode)_[a-z0-9_]+")


# ------------------------------------------------------------------------------------------------ what a page says


def commands(page: str) -> list[str]:
    """The lines of its `sh` blocks, each whole."""
    blocks = (body for _, language, body in _FENCE.findall(page) if language == "sh")
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [part for line in lines for part in line.split("&&") if shlex.split(part, comments=True)]


def unmarked(page: str) -> list[str]:
    """Lines of blocks in no language that are commands all the same, so that `commands` misses them."""
    blocks = (body for _, language, body in _FENCE.findall(page) if not language)
    return [line for block in blocks for line in block.splitlines() if line.split(" ")[0] in {*JUDGES, "sudo"}]


def inline(page: str) -> list[str]:
    """Inline code, on one line each."""
    return [" ".join(code.split()) for code in _CODE.findall(_FENCE.sub("", page))]


def settings(page: str) -> list[str]:
    """What the first column of its tables of settings names."""
    named: list[str] = []
    inside = False
    for line in page.splitlines():
        cell = line.split("|")[1].strip() if line.startswith("|") else ""
        inside = bool(cell) and (inside or cell in ("setting", "variable", "option"))
        if inside:
            named += (name.partition(":")[0] for name in _CODE.findall(cell.partition(", of ")[0]))
    return named


# ------------------------------------------------------------------------------------------- what is wrong with it


def faults(command: str, *, whole: bool = True) -> list[str]:
    """What is wrong with a command. Of one that is not `whole`, operands may be missing."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["sudo"]:
        words = words[3:] if words[1:2] == ["-u"] else words[1:]
    name = words[0].removeprefix(INSTALLED)
    if name in OTHERS:
        return []
    if name not in JUDGES:
        return [f"{name} is no program that is known here"]
    # One word may stand for several: high|normal|low.
    variants = itertools.product(*(word.split("|") for word in words[1:]))
    return [fault for variant in variants for fault in JUDGES[name](list(variant), whole)]


def inline_faults(code: str) -> list[str]:
    """What is wrong with inline code: a command, a playbook, a path of this repository, a variable or metric."""
    first, _, rest = code.partition(" ")
    if first in JUDGES and rest:
        return faults(code, whole=False)
    if first.removeprefix("playbooks/") in PLAYBOOKS or re.fullmatch(r"playbooks/\S+", first):
        return faults(f"ansible-playbook -i inventory/example playbooks/{code.removeprefix('playbooks/')}")
    if first == "-e":
        return faults(f"ansible-playbook -i inventory/example playbooks/deploy.yml {code}")
    if re.match(r"(roles|tests|docs|inventory)/", first):
        return [] if (ROOT / first).exists() or first in TO_BE_MADE else [f"{first} is not there"]
    found = _OURS.match(code)
    if found and found[0] not in names():
        return [f"{found[0]} is no variable of a role and no metric"]
    return []


def setting_faults(name: str) -> list[str]:
    """What is wrong with a name in a table of settings."""
    known = {*_CODE.findall((ROOT / "docs/settings.md").read_text()), *names(), *re.findall(r"\w+", _text("roles"))}
    return [] if name in known else [f"{name} is no setting"]


# --------------------------------------------------------------------------------------------------- by program


class _Refused(Exception):
    """A parser's complaint."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(message)


def ansible_parser() -> argparse.ArgumentParser:
    """The flags of ansible-playbook that the pages use."""
    parser = _Parser("ansible-playbook", add_help=False, allow_abbrev=False)
    parser.add_argument("playbook")
    parser.add_argument("-i")
    for flag in ("-e", "--tags", "--skip-tags", "--limit"):
        parser.add_argument(flag, action="append", default=[])
    for flag in ("--check", "--diff", "--ask-become-pass"):
        parser.add_argument(flag, action="store_true")
    return parser


def _ansible_playbook(words: list[str], _whole: bool) -> Iterator[str]:
    try:
        asked = ansible_parser().parse_args(words)
    except _Refused as refused:
        yield f"ansible-playbook: {refused}"
        return
    if asked.i is not None and asked.i not in TO_BE_MADE and not (ROOT / asked.i).is_dir():
        yield f"{asked.i} is no inventory"
    name = re.sub(r"^llmrack\.llmrack\.(\w+)$", r"playbooks/\1.yml", asked.playbook).removeprefix("playbooks/")
    if name not in PLAYBOOKS:
        yield f"{asked.playbook} is no playbook"
        return
    named = [*asked.tags, *asked.skip_tags]
    for tag in ",".join(named).split(",") if named else []:
        if tag not in tags()[name]:
            yield f"{name} has no tag {tag}"
    for variable in (given.partition("=")[0] for given in asked.e):
        if variable not in defaults() and not re.search(rf"\b{variable}\b", _text("playbooks")):
            yield f"{variable} is no default of a role, and no playbook has it"


def _ansible_galaxy(words: list[str], _whole: bool) -> Iterator[str]:
    meta = yaml.safe_load((ROOT / "galaxy.yml").read_text())
    archive = f"{meta['namespace']}-{meta['name']}-VERSION.tar.gz"
    if words not in (["collection", "build"], ["collection", "install", archive]):
        yield f"ansible-galaxy {' '.join(words)} is nothing that a test does"


def _make(words: list[str], _whole: bool) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        variable = word.partition("=")[0] if "=" in word else ""
        if variable and f"$({variable})" not in makefile:
            yield f"the Makefile has no {variable}"
        if not variable and not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            yield f"make has no target {word}"


def _python(words: list[str], whole: bool) -> Iterator[str]:
    if words[:1] != ["tests/lab/lab.py"]:
        yield f"python {' '.join(words)} is nothing that is known here"
        return
    yield from _by_parser("lab.py", lab.command_line)(words[1:], whole)
    if words[1:3] == ["exec", "--"]:
        yield from faults(shlex.join(words[3:]))


def _by_parser(name: str, parser: Callable[[], argparse.ArgumentParser]) -> Callable[[list[str], bool], Iterator[str]]:
    def judge(words: list[str], whole: bool) -> Iterator[str]:
        tries = [words] if whole else [words, [*words, "OPERAND"]]
        refusals = []
        for one in tries:
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
                parser().parse_args(one)
                return
            refusals.append(said.getvalue().strip().splitlines()[-1])
        yield f"{name} {' '.join(words)}: {refusals[-1]}"

    return judge


JUDGES: dict[str, Callable[[list[str], bool], Iterator[str]]] = {
    "ansible-galaxy": _ansible_galaxy,
    "ansible-playbook": _ansible_playbook,
    "llmgate": _by_parser("llmgate", llmgate._parser),
    "llmnode": _by_parser("llmnode", llmnode._parser),
    "make": _make,
    "python": _python,
}


# ------------------------------------------------------------------------------------------------- what there is


@functools.cache
def tags() -> dict[str, set[str]]:
    """The tags of each playbook."""
    program = Path(sys.executable).with_name("ansible-playbook")
    files = [f"playbooks/{name}" for name in sorted(PLAYBOOKS)]
    told = subprocess.run(
        [program, "-i", "inventory/example", "--list-tags", *files],
        cwd=ROOT, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=250, check=True,
    ).stdout  # fmt: skip
    sections = re.split(r"^playbook: playbooks/", told, flags=re.MULTILINE)[1:]
    return {
        section.split("\n")[0].strip(): {
            tag.strip() for listed in re.findall(r"TASK TAGS: \[(.*)\]", section) for tag in listed.split(",")
        }
        for section in sections
    }


@functools.cache
def defaults() -> set[str]:
    """Variables with a default in some role."""
    files = (ROOT / "roles").glob("*/defaults/main.yml")
    return {name for path in files for name in yaml.safe_load(path.read_text()) or {}}


@functools.cache
def names() -> set[str]:
    """Variables that a role or playbook uses, and metrics that are documented."""
    metrics = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    return {found[0] for found in _OURS.finditer(_text("roles") + _text("playbooks"))} | {*metrics}


@functools.cache
def _text(folder: str) -> str:
    files = (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".yml", ".j2", ".py"))
    return "\n".join(path.read_text() for path in files)
