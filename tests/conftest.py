"""Fixtures that every suite shares: real programs and the tiny model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests import tiny_model as recipe
from tests.databases import database, postgres, redis_server  # noqa: F401  (fixtures)
from tests.processes import Program, free_port

Start = Callable[..., Program]


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A GGUF of random weights with a real vocabulary, a few megabytes, made once and cached."""
    return recipe.make("tiny")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `python -m MODULE serve ARGUMENTS --port FREE`; every program is ended with the test.

    start("llmnode", "--backend", "fake") -> Program (call .ready() to wait for it).
    """
    yield from _starter(tmp_path)


@pytest.fixture(scope="module")
def start_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The same as `start`, for programs that a whole module shares."""
    yield from _starter(tmp_path_factory.mktemp("programs"))


def _starter(folder: Path) -> Iterator[Start]:
    running: list[Program] = []
    number = itertools.count()

    def start(module: str, *arguments: str, env: Mapping[str, str] | None = None, port: int | None = None) -> Program:
        chosen = port or free_port()
        log = folder / f"{module}-{next(number)}.log"
        program = Program(module, ["serve", "--port", str(chosen), *arguments], chosen, log, env)
        running.append(program)
        return program

    yield start
    for program in running:
        program.stop()
