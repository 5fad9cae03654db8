"""Writes docs/settings.md from the tables of settings: `make docs`. A test fails when the page and the code differ."""

from __future__ import annotations

from pathlib import Path

from llmgate.settings import PREFIX as GATE_PREFIX
from llmgate.settings import Settings as GateSettings
from llmnode.service.settings import markdown
from llmnode.settings import PREFIX as NODE_PREFIX
from llmnode.settings import Settings as NodeSettings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"


def render() -> str:
    """The page: how settings are given, then one table a program."""
    return f"""# Settings

Each setting can be given as a flag (`n_ctx` is `--n-ctx`), as an environment variable, or as a key of the TOML file
that `--config` or `LLMNODE_CONFIG`/`LLMGATE_CONFIG` names. A flag wins over the environment, the environment over the
file, the file over the default. A name that nobody knows is an error that names the nearest one. `llmnode settings`
and `llmgate settings` print every value in force and where it came from. `make docs` writes this page.

## llmnode

{markdown(NodeSettings, NODE_PREFIX)}

## llmgate

{markdown(GateSettings, GATE_PREFIX)}
"""


if __name__ == "__main__":
    PAGE.write_text(render())
    print(PAGE)
