"""The settings table: where a value comes from, and how a bad one is named."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmgate.settings import PREFIX, Settings
from llmnode.service.settings import (
    Loaded,
    SettingError,
    add_flags,
    listing,
    load,
    markdown,
    rows,
    setting,
)


@dataclass(frozen=True)
class Table:
    name: str = setting("box", "what it is called")
    port: int = setting(8000, "where", minimum=1, maximum=65535)
    ratio: float = setting(0.5, "how much", minimum=0.0)
    wide: bool = setting(False, "whether")
    mode: str = setting("auto", "which", choices=("auto", "on", "off"))
    folder: Path | None = setting(None, "a folder")
    tags: tuple[str, ...] = setting((), "some words")


def read(
    flags: dict[str, str | None] | None = None, environ: dict[str, str] | None = None, file: Path | None = None
) -> Loaded[Table]:
    given: dict[str, str | None] = dict(flags or {})
    if file:
        given["config"] = str(file)
    return load(Table, flags=given, environ=environ or {}, prefix="BOX_")


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "box.toml"
    file.write_text('name = "file"\nport = 1\nratio = 1\ntags = ["a", "b"]\n')
    loaded = read({"name": "flag"}, {"BOX_NAME": "env", "BOX_PORT": "2"}, file)
    assert (loaded.values.name, loaded.values.port, loaded.values.ratio) == ("flag", 2, 1.0)
    assert loaded.values.tags == ("a", "b")
    assert loaded.sources["name"] == "flag"
    assert loaded.sources["port"] == "environment BOX_PORT"
    assert loaded.sources["ratio"] == f"file {file}"
    assert loaded.sources["mode"] == "default"
    assert len(loaded.digest) == 16


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "box.toml"
    file.write_text("port = 7\n")
    assert read(environ={"BOX_CONFIG": str(file)}).values.port == 7


def test_the_digest_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    file = tmp_path / "box.toml"
    file.write_text("port = 7\n")
    first = read(file=file).digest
    file.write_text("port = 7 # the same, said otherwise\n")
    assert read(file=file).digest != first
    assert read().digest == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": "x"}, "port (flag)"),
        ({"port": "0"}, "port (flag)"),
        ({"port": "65536"}, "65535"),
        ({"port": "1.5"}, "port (flag)"),
        ({"ratio": "nan"}, "ratio (flag)"),
        ({"ratio": "inf"}, "ratio (flag)"),
        ({"ratio": "-1"}, "at least 0"),
        ({"wide": "perhaps"}, "wide (flag)"),
        ({"mode": "maybe"}, "must be one of auto, on, off"),
    ],
)
def test_a_bad_value_is_named_with_its_source_and_limit(flags: dict[str, str | None], says: str) -> None:
    with pytest.raises(SettingError) as error:
        read(flags)
    assert says in str(error.value)
    assert repr(next(iter(flags.values()))).strip("'") in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 5", "unknown setting 'prot'; did you mean 'port'?"),
        ("port = [", "is not valid TOML"),
        ("port = true", "port"),
        ("wide = 1", "wide"),
        ("name = 5", "name"),
        ("tags = 5", "must be a list of"),
        ("tags = [5]", "tags"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "box.toml"
    file.write_text(text)
    with pytest.raises(SettingError) as error:
        read(file=file)
    assert says in str(error.value)
    assert str(file) in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"missing\.toml"):
        read(file=tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(SettingError, match="not valid TOML"):
        read(file=tmp_path / "latin.toml")


def test_a_mistyped_variable_is_refused() -> None:
    with pytest.raises(SettingError, match=r"BOX_PROT.*BOX_PORT"):
        read(environ={"BOX_PROT": "5"})
    assert read(environ={"BOXES": "5", "PORT": "9"}).values.port == 8000


@pytest.mark.parametrize(("text", "value"), [("true", True), ("no", False), ("1", True), ("0", False)])
def test_booleans_are_read_as_people_write_them(text: str, value: bool) -> None:
    assert read({"wide": text}).values.wide is value


@pytest.mark.parametrize("table", [Table, Settings])
def test_one_table_feeds_flags_help_listing_and_docs(table: type) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, table)
    text = parser.format_help()
    loaded = load(table, flags={}, environ={}, prefix=PREFIX)
    for row in rows(table):
        assert row.flag in text
        assert row.env(PREFIX) in listing(loaded, PREFIX)
        assert f"| `{row.name}` |" in markdown(table, PREFIX)


def test_a_flag_given_bare_is_true_and_values_stay_text_until_loaded() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Table)
    flags = vars(parser.parse_args(["--wide", "--port", "9", "--tags", "a,b"]))
    values = load(Table, flags=flags, environ={}, prefix="BOX_").values
    assert (values.wide, values.port, values.tags) == (True, 9, ("a", "b"))
