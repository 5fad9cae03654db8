"""One table of settings feeds flags, environment, TOML file, help text and docs.

A service declares a frozen dataclass whose fields are made by `setting(...)`. From that one table come the
command-line flags, the environment variables, the keys of the TOML file, `... settings` and the table in the docs.
Precedence, highest first: flag, environment, file, default. Nothing here knows what any setting means.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 only
    import tomli as tomllib

T = TypeVar("T")
_KEY = "llmrack"


class SettingError(ValueError):
    """A setting that cannot be used. The message names the setting, where it came from, the limit and the value."""


@dataclass(frozen=True)
class Meta:
    """What a row of the table says beside its name, type and default."""

    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Declare one row of a settings table; use as the default of a frozen dataclass field."""
    meta = Meta(help, unit, minimum, maximum, tuple(choices))
    return dataclasses.field(default=default, metadata={_KEY: meta})


@dataclass(frozen=True)
class Row:
    """One setting as the table knows it, before any value has been given."""

    name: str
    kind: Any
    optional: bool
    default: Any
    meta: Meta

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def env(self, prefix: str) -> str:
        return prefix + self.name.upper()

    @property
    def type_name(self) -> str:
        item = _item_kind(self.kind)
        name = f"list of {item.__name__}" if item else str(self.kind.__name__)
        return name.replace("Path", "path").replace("str", "string")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """Settings with the provenance of each value.

    `sources` maps a setting's name to "flag", "environment VAR", "file PATH" or "default".
    `digest`: first 16 hex digits of the SHA-256 of the file's bytes ("" without a file): the playbooks compare it.
    """

    values: T
    sources: Mapping[str, str]
    path: Path | None
    digest: str


def rows(table: type[Any]) -> Iterator[Row]:
    """Yield the rows of a settings dataclass in the order they were declared."""
    hints = typing.get_type_hints(table)
    for field in dataclasses.fields(table):
        kind, optional = _strip_optional(hints[field.name])
        yield Row(field.name, kind, optional, field.default, field.metadata[_KEY])


def add_flags(parser: argparse.ArgumentParser, table: type[Any]) -> None:
    """Add `--config` and one flag a setting. Values stay text until `load`, so that one parser serves every source."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings")
    for row in rows(table):
        if row.kind is bool:
            parser.add_argument(
                row.flag, dest=row.name, nargs="?", const="true", default=None, metavar="BOOL", help=_help(row)
            )
        else:
            parser.add_argument(row.flag, dest=row.name, default=None, metavar=row.name.upper(), help=_help(row))


def load(
    table: type[T], *, flags: Mapping[str, str | None], environ: Mapping[str, str] | None = None, prefix: str
) -> Loaded[T]:
    """Merge flags, environment and file over the defaults.

    `prefix` is that of the environment variables, e.g. "LLMNODE_"; the file is named by the flag `config` or by
    `<prefix>CONFIG`. Raises SettingError for a key nobody knows (with the nearest name), a value of the wrong type,
    or one out of its range.
    """
    env = os.environ if environ is None else environ
    known = {row.name: row for row in rows(table)}
    path_text = flags.get("config") or env.get(prefix + "CONFIG")
    path = Path(path_text) if path_text else None
    from_file, digest = _read_file(path) if path else ({}, "")
    for name in from_file:
        if name not in known:
            raise SettingError(f"{path}: unknown setting {name!r}{_nearest(name, known)}")
    _refuse_unknown_environment(env, known, prefix)

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, row in known.items():
        raw: Any
        flag, variable = flags.get(name), row.env(prefix)
        if flag is not None:
            raw, source = flag, "flag"
        elif variable in env:
            raw, source = env[variable], f"environment {variable}"
        elif name in from_file:
            raw, source = from_file[name], f"file {path}"
        else:
            values[name], sources[name] = row.default, "default"
            continue
        values[name], sources[name] = _convert(row, raw, source), source
    return Loaded(table(**values), sources, path, digest)


def listing(loaded: Loaded[Any], prefix: str, chosen: Mapping[str, str] | None = None) -> str:
    """The table an operator reads: name, value, where it came from, what it means.

    chosen: by name, what values that leave the choice to the program come to on this machine.
    """
    lines = []
    for row in rows(type(loaded.values)):
        value = show(getattr(loaded.values, row.name))
        lines.append(f"{row.name:<26} {value:<28} {loaded.sources[row.name]}")
        if chosen and row.name in chosen:
            lines.append(f"{'':<26} here: {chosen[row.name]}")
        lines.append(f"{'':<26} {row.meta.help}{_range(row)}  [{row.flag}, {row.env(prefix)}]")
    return "\n".join(lines)


def markdown(table: type[Any], prefix: str) -> str:
    """The same table for the docs; a test keeps the docs equal to it."""
    lines = ["| setting | type | default | environment | meaning |", "|---|---|---|---|---|"]
    for row in rows(table):
        default = f"`{show(row.default)}`" if row.default not in (None, "", ()) else ""
        lines.append(
            f"| `{row.name}` | {row.type_name} | {default} | `{row.env(prefix)}` | {row.meta.help}{_range(row)} |"
        )
    return "\n".join(lines)


def printed(page: str) -> bool:
    """Print a page to standard output; False when its reader has left early, as `| head` does."""
    try:
        print(page, flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more at its end and would complain; so nothing is left to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def show(value: Any) -> str:
    """A value as the TOML file or a flag would spell it."""
    if value is None:
        return "(not set)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def _help(row: Row) -> str:
    default = "" if row.default in (None, "", ()) else f" (default: {show(row.default)})"
    return (row.meta.help + _range(row) + default).replace("%", "%%")


def _range(row: Row) -> str:
    meta = row.meta
    parts = []
    if meta.choices:
        parts.append("one of " + ", ".join(meta.choices))
    if meta.minimum is not None and meta.maximum is not None:
        parts.append(f"{meta.minimum:g} to {meta.maximum:g}")
    elif meta.minimum is not None:
        parts.append(f"at least {meta.minimum:g}")
    if meta.unit:
        parts.append(meta.unit)
    return f" ({'; '.join(parts)})" if parts else ""


def _strip_optional(kind: Any) -> tuple[Any, bool]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return inner[0], True
    return kind, False


def _item_kind(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _read_file(path: Path) -> tuple[dict[str, Any], str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(f"cannot read the configuration file {path}: {error.strerror}") from error
    try:
        return tomllib.loads(data.decode("utf-8")), hashlib.sha256(data).hexdigest()[:16]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not valid TOML: {error}") from error


def _refuse_unknown_environment(env: Mapping[str, str], known: Mapping[str, Row], prefix: str) -> None:
    names = {row.env(prefix) for row in known.values()} | {prefix + "CONFIG"}
    for variable in sorted(env):
        if variable.startswith(prefix) and variable not in names:
            raise SettingError(f"unknown environment variable {variable}{_nearest(variable, names)}")


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert(row: Row, raw: Any, source: str) -> Any:
    item = _item_kind(row.kind)
    if row.optional and raw == "":
        return None
    if item is not None:
        parts = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(parts, list):
            raise SettingError(f"{row.name} ({source}) must be a {row.type_name}, got {raw!r}")
        value: Any = tuple(_scalar(row, item, part, source) for part in parts if part != "")
    else:
        value = _scalar(row, row.kind, raw, source)
    return value


_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _scalar(row: Row, kind: Any, raw: Any, source: str) -> Any:
    value: Any = None
    if isinstance(raw, str):
        text = raw.strip()
        try:
            if kind is bool:
                value = _BOOLEANS[text.lower()]
            elif kind in (int, float):
                value = kind(text)
            else:
                value = kind(text)
        except (ValueError, KeyError):
            value = None
    elif kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        value = float(raw)
    elif type(raw) is kind:
        value = raw
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise SettingError(f"{row.name} ({source}) must be a {row.type_name}, got {raw!r}")
    meta = row.meta
    if meta.choices and value not in meta.choices:
        raise SettingError(f"{row.name} ({source}) must be one of {', '.join(meta.choices)}, got {value!r}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = meta.minimum, meta.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            raise SettingError(f"{row.name} ({source}) must be{_range(row).strip(' ()').join((' ', ''))}, got {value}")
    return value
