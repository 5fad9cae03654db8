"""Promises of README.md and docs/operations.md: what they tell their reader to type exists, word for word."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.roles import manual

PAGES = ("README.md", "docs/operations.md")


def text(page: str) -> str:
    return (manual.ROOT / page).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_would_be_accepted(page: str) -> None:
    found = manual.commands(text(page))
    assert len(found) >= (6 if page == "README.md" else 25)
    assert {command: wrong for command in found if (wrong := manual.faults(command))} == {}
    assert manual.unmarked(text(page)) == [], "commands stand in blocks marked as sh"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_playbook_path_and_variable_in_its_sentences_exists(page: str) -> None:
    found = manual.inline(text(page))
    assert len(found) >= (5 if page == "README.md" else 300)
    assert {code: wrong for code in found if (wrong := manual.inline_faults(code))} == {}


def test_every_setting_in_a_table_exists() -> None:
    found = manual.settings(text("docs/operations.md"))
    assert len(found) >= 30
    assert {name: wrong for name in found if (wrong := manual.setting_faults(name))} == {}


def test_ansible_knows_the_flags_that_the_pages_use() -> None:
    program = Path(sys.executable).with_name("ansible-playbook")
    told = subprocess.run([program, "--help"], text=True, capture_output=True, check=True).stdout
    flags = [flag for action in manual.ansible_parser()._actions for flag in action.option_strings]
    assert len(flags) >= 7
    assert set(flags) <= set(re.findall(r"-[-\w]+", told))


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("ansible-playbok -i inventory/example playbooks/deploy.yml", "ansible-playbok is no program"),
        ("ansible-playbook -i inventory/exmaple playbooks/deploy.yml", "inventory/exmaple is no inventory"),
        ("ansible-playbook -i inventory/example playbooks/deplyo.yml", "playbooks/deplyo.yml is no playbook"),
        ("ansible-playbook -i inventory/example llmrack.llmrack.deplyo", "llmrack.llmrack.deplyo is no playbook"),
        ("ansible-playbook -i inventory/example playbooks/model.yml --tags prun", "model.yml has no tag prun"),
        ("ansible-playbook -i inventory/example playbooks/deploy.yml --chek", "unrecognized arguments: --chek"),
        ("ansible-playbook playbooks/remove.yml -e llmrack_remove_confimed=1", "llmrack_remove_confimed is no default"),
        ("ansible-galaxy collection built", "is nothing that a test does"),
        ("ansible-galaxy collection install llmrack-1.tar.gz", "is nothing that a test does"),
        ("llmgate key create alice", "invalid choice: 'key'"),
        ("llmgate keys create alice --priority urgent", "invalid choice: 'urgent'"),
        ("llmgate keys create alice --priority high|lowest", "invalid choice: 'lowest'"),
        ("sudo -u llmrack /opt/llmrack/current/bin/llmgate keys create alice --conf=x.toml --nope", "--nope"),
        ("llmgate restore", "required: FILE"),
        ("llmnode check --confg x.toml", "--confg"),
        ("llmnode bench", "invalid choice: 'bench'"),
        ("make lab-upp", "make has no target lab-upp"),
        ("make demo MODLE=x.gguf", "the Makefile has no MODLE"),
        ("python tests/lab/lab.py stat", "invalid choice: 'stat'"),
        ("python tests/lab/lab.py off lab9", "invalid choice: 'lab9'"),
        ("python tests/lab/lab.py exec -- ansible-playbook playbooks/stats.yml", "stats.yml is no playbook"),
        ("python tests/lab/lap.py status", "nothing that is known here"),
    ],
)  # fmt: skip
def test_a_wrong_word_in_a_command_is_found(command: str, complaint: str) -> None:
    (page,) = manual.commands(f"Do this:\n\n```sh\n{command}   # as ever\n```\n")
    assert complaint in " ".join(manual.faults(page))


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("llmgate explan", "invalid choice: 'explan'"),
        ("llmgate explain --pth /v1/completions", "--pth"),
        ("playbooks/undrian.yml", "playbooks/undrian.yml is no playbook"),
        ("undrain.yml -e llmrack_orchestrate_ower=ansible", "llmrack_orchestrate_ower is no default"),
        ("-e llmrack_remove_modles=true", "llmrack_remove_modles is no default"),
        ("llmrack_tls_node: true", "llmrack_tls_node is no variable"),
        ("llmgate_queue_lenght", "llmgate_queue_lenght is no variable"),
        ("roles/llmrack_monitor/files/alerts.yml", "is not there"),
    ],
)
def test_a_wrong_word_in_a_sentence_is_found(code: str, complaint: str) -> None:
    (found,) = manual.inline(f"Here is `{code}`, as a sentence has it.")
    assert complaint in " ".join(manual.inline_faults(found))


def test_a_wrong_setting_in_a_table_is_found() -> None:
    page = (
        "| setting | what |\n|---|---|\n| `stall_ms`, `stal_ms` | |\n| `min_redy`, of a model in `llmrack_models` | |\n"
    )
    assert [manual.setting_faults(name) for name in manual.settings(page)] == [
        [], ["stal_ms is no setting"], ["min_redy is no setting"],
    ]  # fmt: skip


def test_a_command_that_is_not_marked_as_one_is_found() -> None:
    assert manual.unmarked("```\nmake demo\n```\n\n```\nas it looks\n```\n") == ["make demo"]
