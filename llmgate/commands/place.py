"""What commands on the gate's database share: its flags, how it is opened, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmgate import settings as configuration
from llmgate.database import Database
from llmgate.settings import Settings
from llmnode.service.settings import Loaded

if TYPE_CHECKING:
    from llmgate.store import Store

OK, NO, BAD, PORT_IN_USE, NO_STORE = 0, 1, 2, 4, 5


def add_place(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the database is."""
    parser.add_argument("--config", metavar="FILE", help="the gate's TOML file")
    parser.add_argument("--state-dir", metavar="DIR", help="folder with llmgate.db")
    parser.add_argument("--database-url-file", metavar="FILE", help="file with the URL of PostgreSQL, if it is there")


def load(options: argparse.Namespace) -> Loaded[Settings]:
    """The settings, with the command's flags. Raises SettingError."""
    return configuration.read({k: v for k, v in vars(options).items() if v is None or isinstance(v, str)})


def database(options: argparse.Namespace) -> Database:
    """Where the database is; from here on this process acts as the owner of the state folder. Raises SettingError."""
    where = configuration.database(load(options).values)
    become_owner(where.folder)
    return where


def open_store(options: argparse.Namespace) -> Store:
    """Raises SettingError, StoreError."""
    from llmgate.store import Store  # SQLAlchemy takes longer to import than most commands take

    return Store(database(options))


def become_owner(folder: Path) -> None:
    """As root, act as the folder's owner, or the gate could not write to files that were made here."""
    if os.geteuid() == 0 and folder.exists() and folder.stat().st_uid != 0:
        owner = folder.stat()
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)


def say(code: int, message: str) -> int:
    """Print one line on standard error; the exit code."""
    print(f"llmgate: {message}", file=sys.stderr)
    return code
