"""What tests with clients of other people share: one fleet of fake models, asked at a node and through the gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmnode.wire.openapi.document import Side
from tests.conftest import _starter
from tests.processes import Program, free_port
from tests.system.fleet import Fleet, build, create_key

TEMPLATE = Path(__file__).parents[1] / "data" / "agent.jinja"
LONG = {"ignore_eos": True}
COMPACT = {"logit_bias": {str(byte): -100 for byte in b" \t\r\n<"}}
CALLING = {"logit_bias": {str(byte): -100 for byte in b" \t\r\nh"}}
"""The fake model's tokens are bytes, and it draws what it may: this keeps it from ending at once, from filling
JSON with space, and from thinking (`<think>`) before an answer or a call (`<tool_call>`)."""


@dataclass(frozen=True)
class Door:
    """Where a client knocks, and with which key. `fleet`: what is behind it."""

    url: str
    key: str
    fleet: Fleet


@pytest.fixture(scope="session")
def fake_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gate and two nodes whose model draws letters, can call tools and can think."""
    programs = _starter(tmp_path_factory.mktemp("programs"))
    arguments = ["--backend", "fake", "--slots", "8", "--n-ctx", "16384", "--chat-template-file", str(TEMPLATE)]
    yield build(tmp_path_factory.mktemp("fleet"), next(programs), arguments, ("a", "b"))
    next(programs, None)


@pytest.fixture(scope="session", params=["node", "gate"])
def door(request: pytest.FixtureRequest, fake_fleet: Fleet) -> Door:
    if request.param == "gate":
        return Door(fake_fleet.gate.url, fake_fleet.key, fake_fleet)
    token = (Path(fake_fleet.request_log).parent / "token").read_text().strip()
    return Door(fake_fleet.nodes["a"].url, token, fake_fleet)


THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
"""A template that thinks, so that what is said of thinking means something."""
FAKE = ("--backend", "fake", "--slots", "4", "--max-tokens", "64")
TOKEN = "fleet-token-of-the-tests-0123456789"


class House:
    """A gate in front of a node for each use: two generate, one embeds, one ranks."""

    def __init__(self, nodes: Mapping[str, Program], gate: Program, key: str, admin: str) -> None:
        self.nodes, self.gate, self.key, self.admin = nodes, gate, key, admin

    def url(self, side: Side) -> str:
        return self.gate.url if side == "gate" else self.nodes["handbook"].url

    def headers(self, side: Side) -> dict[str, str]:
        return {"authorization": f"Bearer {self.admin if side == 'gate' else TOKEN}"}


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    programs = _starter(tmp_path_factory.mktemp("programs"))
    start, folder = next(programs), tmp_path_factory.mktemp("house")
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "template").write_text(THINKS)
    kinds = {"handbook": "generate", "coder": "generate", "embedder": "embed", "reranker": "rerank"}
    nodes = {
        name: start(
            "llmnode", "--name", name, "--kind", kind, "--model-id", name, *FAKE,
            "--fleet-token-file", str(folder / "token"), "--chat-template-file", str(folder / "template"),
        )
        for name, kind in kinds.items()
    }  # fmt: skip
    listing = folder / "nodes.toml"
    listing.write_text("".join(f'[[nodes]]\nname = "{n}"\nurl = "{p.url}"\n' for n, p in nodes.items()))
    (folder / "state").mkdir()
    key, admin = create_key(folder / "state", "client"), create_key(folder / "state", "operator", "--admin")
    gate = start(
        "llmgate", "--nodes-file", str(listing), "--state-dir", str(folder / "state"),
        "--fleet-token-file", str(folder / "token"), "--request-log", str(folder / "log"), "--ready-wait-s", "1",
        "--poll-interval-s", "0.2", port=free_port(),
    )  # fmt: skip
    for node in nodes.values():
        node.ready()
    yield House(nodes, gate.ready(), key, admin)
    next(programs, None)
