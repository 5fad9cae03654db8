"""The command line: what it shows, and that each mistake is one clear line with the right exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmnode.service.settings import rows
from llmnode.settings import Settings
from tests import tiny_model as recipe
from tests.conftest import Start


def llmnode(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLMNODE_")}
    command = [sys.executable, "-m", "llmnode", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**clean, **(env or {})}, timeout=120, check=False
    )


def complaint(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a failed command leaves on standard error."""
    assert result.returncode == code, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("llmnode: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--modle", "x"], "--modle; did you mean --model?"),
        (["--port", "70000"], "port"),
        (["--port", "many"], "many"),
        (["--backend", "magic"], "llama, fake"),
        (["--host", "0.0.0.0"], "fleet_token_file must be set"),
        (["--n-ctx", "100", "--kv-cells", "50"], "kv_cells (50) must not be below n_ctx (100)"),
        (["--n-batch", "2", "--slots", "4"], "n_batch (2) must not be below slots (4)"),
        (["--fleet-token-file", "/does/not/exist"], "/does/not/exist"),
        (["--chat-template-file", "/does/not/exist"], "/does/not/exist"),
        (["--config", "/does/not/exist"], "/does/not/exist"),
        (["--kind", "chat"], "auto, generate, embed, rerank"),
        (["--kind", "rerank", "--pooling", "mean"], "pooling (mean) is for models that embed, and kind is rerank"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_bad_setting_is_one_line_and_exit_code_2(command: str, arguments: list[str], says: str) -> None:
    backend = [] if "--backend" in arguments else ["--backend", "fake"]
    assert says in complaint(llmnode(command, *backend, *arguments), 2)


def test_a_typing_error_in_the_file_or_the_environment_is_named(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('backend = "fake"\nslotz = 3\n')
    line = complaint(llmnode("serve", "--config", str(config)), 2)
    assert "slotz" in line and "'slots'" in line and str(config) in line
    line = complaint(llmnode("serve", "--backend", "fake", env={"LLMNODE_SLOTZ": "3"}), 2)
    assert "LLMNODE_SLOTZ" in line and "LLMNODE_SLOTS" in line


def test_a_bad_template_or_token_file_is_named(tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{% if %}")
    assert str(template) in complaint(llmnode("serve", "--backend", "fake", "--chat-template-file", str(template)), 2)
    token = tmp_path / "token"
    for content in ("", "short\n", "a-token-long-enough\n" * 3):
        token.write_text(content)
        line = complaint(llmnode("serve", "--backend", "fake", "--fleet-token-file", str(token)), 2)
        assert str(token) in line and "long-enough" not in line


def test_check_says_what_would_be_served(tiny_model: Path) -> None:
    result = llmnode("check", "--model", str(tiny_model), "--n-ctx", "256", "--slots", "2")
    assert result.returncode == 0, result.stderr
    for part in (tiny_model.stem, "llama", "127.0.0.1 port 8100", "2, each with 256 tokens", "MiB", "512 cells"):
        assert part in result.stdout


def test_a_file_that_is_no_gguf_is_refused_by_check_and_serve(tmp_path: Path, start: Start) -> None:
    model = tmp_path / "wrong.gguf"
    model.write_text("this is no model")
    line = complaint(llmnode("check", "--model", str(model)), 3)
    assert str(model) in line and "not a GGUF" in line
    node = start("llmnode", "--model", str(model))
    assert node.wait() == 3
    assert "is not a GGUF file" in node.output()
    assert "Traceback" not in node.output()


def test_a_model_that_is_not_there_or_cut_short_is_refused(tmp_path: Path, tiny_model: Path, start: Start) -> None:
    assert "missing.gguf" in complaint(llmnode("check", "--model", str(tmp_path / "missing.gguf")), 3)
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_model.read_bytes()[:-100_000])
    node = start("llmnode", "--model", str(short))
    assert node.wait() == 3
    assert "short.gguf" in node.output()


def test_a_port_in_use_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # The model is not there: if it were looked at first, the code would be 3.
        line = complaint(llmnode("serve", "--model", str(tmp_path / "none.gguf"), "--port", str(port)), 4)
    assert str(port) in line and "127.0.0.1" in line and "in use" in line


def test_a_second_node_on_a_used_port_leaves_the_first_alone(start: Start) -> None:
    first = start("llmnode", "--backend", "fake").ready()
    second = start("llmnode", "--backend", "fake", port=first.port)
    assert second.wait() == 4
    assert str(first.port) in second.output()
    answer = first.get("/ready")
    assert answer is not None and answer.status_code == 200


def test_settings_shows_each_value_and_where_it_came_from(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('backend = "fake"\nslots = 3\nname = "file"\n')
    shown = llmnode("settings", "--config", str(config), "--n-ctx", "77", env={"LLMNODE_NAME": "environment"}).stdout
    by_name = {line.split()[0]: line for line in shown.splitlines() if line and not line.startswith(" ")}
    assert by_name["slots"].split()[1:] == ["3", "file", str(config)]
    assert by_name["n_ctx"].split()[1:] == ["77", "flag"]
    assert by_name["name"].split()[1:] == ["environment", "environment", "LLMNODE_NAME"]
    assert by_name["port"].split()[1:] == ["8100", "default"]
    assert set(by_name) == {row.name for row in rows(Settings)}


def test_markdown_lists_every_setting() -> None:
    shown = llmnode("settings", "--markdown").stdout
    for row in rows(Settings):
        assert f"| `{row.name}` |" in shown and f"`LLMNODE_{row.name.upper()}`" in shown


def test_version_and_help_are_there() -> None:
    assert llmnode("--version").stdout.startswith("llmnode ")
    shown = llmnode("serve", "--help").stdout
    assert all(row.flag in shown for row in rows(Settings))


def test_settings_are_shown_also_where_none_can_be_served_with() -> None:
    done = llmnode("settings")
    assert done.returncode == 0, done.stderr
    assert "n_batch" in done.stdout


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    command = f"{sys.executable} -m llmnode settings | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("name ")
    assert done.stderr == ""


def test_without_a_model_the_handbook_model_is_served_and_said_so(start: Start) -> None:
    assert "model:          handbook" in llmnode("check").stdout
    node = start("llmnode").ready()
    assert "no model is set: serving the handbook model" in node.output()
    models = node.get("/v1/models")
    assert models is not None and [model["id"] for model in models.json()["data"]] == ["handbook"]


@pytest.mark.parametrize(
    ("kind", "makes"), [("bert", "texts to vectors (pooling mean)"), ("reranker", "documents to scores")]
)
def test_check_says_what_a_model_is_for(kind: str, makes: str) -> None:
    result = llmnode("check", "--model", str(recipe.make(kind)))
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines() if ":" in line)
    assert lines["makes"].strip() == makes
    assert lines["texts"].strip() == "4 at once, each of 512 tokens at most (trained for 512)"
    assert "chat template" not in lines


def test_a_model_is_not_made_to_do_what_it_cannot() -> None:
    line = complaint(llmnode("check", "--model", str(recipe.make("bert")), "--kind", "rerank"), 3)
    assert "cannot rank: it has no classifier" in line
    line = complaint(llmnode("check", "--model", str(recipe.make("bert")), "--kind", "generate"), 3)
    assert "cannot generate text" in line
