"""A gate is told where its database and its counters are, and no URL is in a unit or in the settings."""

from __future__ import annotations

from pathlib import Path

from tests.roles.rendering import File, render

DATABASE, REDIS = "postgresql://me:hunter2@db/x", "redis://:hunter3@db:6379/0"
UNIT, TOML = "llmgate.service", "llmgate.toml"


def test_urls_of_servers_come_to_the_gate_as_credentials(tmp_path: Path) -> None:
    both = {"llmgate_database_url": DATABASE, "llmgate_redis_url": REDIS}
    files = [
        *(File("llmgate", UNIT, name, given) for name, given in (("none", {}), ("both", both))),
        File("llmgate", TOML, "two.toml", {"llmgate_gates": 2, **both}),
        File("llmgate", TOML, "one.toml", {"llmgate_gates": 1}),
    ]
    render(tmp_path, files, roles=["llmgate"])
    none, given = (tmp_path / "none").read_text(), (tmp_path / "both").read_text()
    added = [line for line in given.splitlines() if line not in none.splitlines()]
    start = next(line for line in none.splitlines() if line.startswith("ExecStart="))
    assert added == [
        f"{start} --database-url-file ${{CREDENTIALS_DIRECTORY}}/database-url"
        " --redis-url-file ${CREDENTIALS_DIRECTORY}/redis-url",
        "LoadCredential=database-url:/etc/llmrack/database-url",
        "LoadCredential=redis-url:/etc/llmrack/redis-url",
    ]
    assert len(given.splitlines()) == len(none.splitlines()) + 2
    two, one = (tmp_path / "two.toml").read_text(), (tmp_path / "one.toml").read_text()
    assert "gates = 2\n" in two and "gates" not in one
    assert "hunter" not in given + two
