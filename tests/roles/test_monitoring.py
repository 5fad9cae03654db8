"""Promises of the role llmrack_monitoring that need no host: what is scraped, what alerts and the dashboard ask for."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles import promtool
from tests.roles.test_roles import ansible

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/llmrack_monitoring"
METRIC = re.compile(r"^\| `(ll\w+)` \| (\w+) \|", re.MULTILINE)
# Of Prometheus and its exporter; docs/operations.md names them.
OTHERS = {"up", "ALERTS", "node_filesystem_avail_bytes", "node_filesystem_size_bytes"}
WORDS = {"and", "or", "unless", "bool", "offset", "Inf", "NaN"}


def documented() -> set[str]:
    """Names of series, as docs/metrics.md has them."""
    names = set()
    for name, kind in METRIC.findall((ROOT / "docs/metrics.md").read_text()):
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names


def asked_for(expression: str) -> set[str]:
    """Names of the series in a PromQL expression: what is left of it without strings, labels, ranges and functions."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"\b([a-zA-Z_]\w*)\b(?!\s*\()", bare)) - WORDS


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((ROLE / "files/alerts.yml").read_text())["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    """All that show something, without the rows that they stand in."""
    return [panel for panel in dashboard() if panel["type"] != "row"]


def dashboard() -> list[dict[str, Any]]:
    return list(json.loads((ROLE / "files/dashboard.json").read_text())["panels"])


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])


@pytest.fixture(scope="module")
def tool() -> Path:
    program, why = promtool.find()
    if program is None:
        pytest.skip(why)
    return program


def check(tool: Path, *arguments: str | Path) -> str:
    done = subprocess.run([tool, *arguments], text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_names_are_read_out_of_an_expression() -> None:
    expression = 'max by (a) (rate(x_total{b="c"}[5m])) > 0.1 * sum(y) unless on (node) label_replace(up, "d", "e")'
    assert asked_for(expression) == {"x_total", "y", "up"}


def test_alerts_and_dashboard_ask_only_for_metrics_that_are_documented() -> None:
    known = documented() | OTHERS
    asked = {expression: asked_for(expression) for expression in expressions()}
    assert all(asked.values())
    assert {expression: names - known for expression, names in asked.items() if names - known} == {}


def test_an_alert_says_how_bad_it_is_and_what_happened() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
    page = (ROOT / "docs/operations.md").read_text()
    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in page] == []


def test_every_alert_is_shown_to_fire_and_to_stay_silent() -> None:
    fires, silent = set(), set()
    for case in yaml.safe_load((ROOT / "tests/roles/alerts.yml").read_text())["tests"]:
        for moment in case["alert_rule_test"]:
            (fires if moment.get("exp_alerts") else silent).add(moment["alertname"])
    assert fires == silent == {rule["alert"] for rule in rules()}


def test_alerts_fire_when_they_should(tool: Path) -> None:
    check(tool, "test", "rules", ROOT / "tests/roles/alerts.yml")


def test_the_dashboard_answers_what_an_operator_asks() -> None:
    rows = [panel["title"] for panel in dashboard() if panel["type"] == "row"]
    assert rows == ["Is it up?", "Is it fast?", "Is it full?", "Who uses it?", "What is about to break?"]
    page = (ROOT / "docs/operations.md").read_text()
    assert [row for row in rows if f"*{row}*" not in page] == []
    assert [panel["title"] for panel in panels() if not panel["description"].endswith((".", "?"))] == []


def test_the_dashboard_is_whole(tool: Path, tmp_path: Path) -> None:
    seen = panels()
    assert len({panel["id"] for panel in seen}) == len(seen)
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in seen)
    taken = [(x, y) for panel in dashboard() for x, y in squares(panel["gridPos"])]
    assert len(set(taken)) == len(taken), "no panel lies on another"
    assert {x for x, _ in taken} == set(range(24)), "Grafana has 24 columns"
    asked = [target["expr"].replace("$__rate_interval", "5m") for panel in seen for target in panel["targets"]]
    recorded = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    check(tool, "check", "rules", tmp_path / "rules.yml")


def squares(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prometheus.yml of a fleet that has a bit of everything."""
    folder = tmp_path_factory.mktemp("monitoring")
    big = [
        {"name": "a", "model": "qwen", "port": 8100},
        {"name": "b", "model": "qwen", "port": 8101, "settings": {"n_gpu_layers": 0}},
    ]
    small = [{"name": "c", "model": "tiny", "port": 8100}]
    tls = {"llmrack_tls_nodes": True}
    hosts = {
        "gpu1": {"ansible_host": "192.0.2.1", "llmnode_gpu": "nvidia", "llmnode_instances": big, **tls},
        "cpu1": {"llmnode_address": "198.51.100.7", "llmnode_instances": small},
    }
    inventory = {
        "llmnode": {"hosts": hosts, "vars": {"llmrack_models": {"qwen": {}, "tiny": {"settings": {"slots": 2}}}}},
        "llmgate": {"hosts": {"gate1": {"llmgate_port": 8443, "llmgate_tls": "given"}, "gate2": None}},
        "llmrack_monitoring": {"hosts": {"watch": None}},
    }
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    settings = {
        "llmrack_monitoring_listen": "0.0.0.0:9090",
        "llmrack_monitoring_alertmanagers": ["192.0.2.9:9093"],
        "llmrack_monitoring_jobs": [{"job_name": "mine"}],
    }
    play = {
        "hosts": "watch",
        "connection": "local",
        "gather_facts": False,
        "vars_files": [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")],
        "tasks": [{
            "ansible.builtin.template": {
                "src": str(ROLE / "templates/prometheus.yml.j2"), "dest": str(folder / "prometheus.yml"),
            },
            "vars": settings,
        }],
    }  # fmt: skip
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    rendered = ansible("ansible-playbook", "-i", folder / "hosts.yml", folder / "play.yml")
    assert rendered.returncode == 0, rendered.stdout + rendered.stderr
    return folder / "prometheus.yml"


def test_everything_in_the_inventory_is_scraped_under_the_name_that_the_gates_use(configuration: Path) -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load(configuration.read_text())["scrape_configs"]}

    def watched(job: str) -> dict[str, dict[str, str]]:
        return {entry["targets"][0]: entry["labels"] for entry in jobs[job]["static_configs"]}

    assert set(jobs) == {"llmnode", "llmgate", "host", "prometheus", "mine"}
    secure = {"__scheme__": "https"}
    assert watched("llmnode") == {
        "192.0.2.1:8100": {"host": "gpu1", "instance": "gpu1-a", "model": "qwen", "device": "gpu", **secure},
        "192.0.2.1:8101": {"host": "gpu1", "instance": "gpu1-b", "model": "qwen", "device": "cpu", **secure},
        "198.51.100.7:8100": {"host": "cpu1", "instance": "cpu1-c", "model": "tiny", "device": "cpu"},
    }
    assert watched("llmgate") == {
        "gate1:8443": {"host": "gate1", "instance": "gate1", **secure},
        "gate2:8000": {"host": "gate2", "instance": "gate2"},
    }
    hosts = {"192.0.2.1": "gpu1", "cpu1": "cpu1", "gate1": "gate1", "gate2": "gate2", "watch": "watch"}
    assert watched("host") == {f"{at}:9100": {"host": name, "instance": name} for at, name in hosts.items()}
    assert jobs["prometheus"]["static_configs"][0]["targets"] == ["127.0.0.1:9090"]


def test_prometheus_accepts_its_configuration(tool: Path, configuration: Path, tmp_path: Path) -> None:
    text = configuration.read_text()
    assert "192.0.2.9:9093" in text
    # Only the paths are not there yet.
    text = text.replace("/etc/prometheus/llmrack-alerts.yml", str(ROLE / "files/alerts.yml"))
    for name in ("ca.crt", "host.crt", "host.key"):
        text = text.replace(f"/etc/llmrack/tls/{name}", str(configuration))
    (tmp_path / "prometheus.yml").write_text(text)
    assert f"{len(rules())} rules" in check(tool, "check", "config", tmp_path / "prometheus.yml")
