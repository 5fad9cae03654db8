"""No secret, and nothing that users say or hear, in anything that a gate and its nodes write, show or tell.

One run with all of it: keys good and bad, a fleet token, TLS on both sides, a token for the collector of traces, logs
at debug level, as lines and in the journal, a reload, a node that is killed in the middle of an answer. Then everything
is searched that it left: logs, metrics, traces, answers, files, command lines.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.certificates import Authority
from tests.journal import FakeJournal, fake_journal
from tests.processes import Program, free_port, wait_for
from tests.system.collector import Collector, collector

LETTERS = {str(byte): -100 for byte in range(256) if not chr(byte).isalpha() or byte > 127}
"""Has the fake model draw letters alone, so that an answer can be searched for."""
MODEL = "test"


def made(name: str) -> str:
    """A secret that occurs nowhere else."""
    return f"{name}-{secrets.token_hex(20)}"


@dataclass
class Run:
    """One run, and what it left.

    trust, inner: what clients connect with to the gate, and to nodes.    hidden: what must be nowhere, by name.
    said: what users say and hear, which only they themselves may hear again.
    left: what was written, shown and told, by where; "(own)" for what somebody hears of what he has said himself.
    ids: of requests.
    """

    folder: Path
    gate: Program
    nodes: dict[str, Program]
    journal: FakeJournal
    there: Collector
    trust: ssl.SSLContext
    inner: ssl.SSLContext
    hidden: dict[str, str]
    said: dict[str, str]
    left: dict[str, bytes] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        """Ask the gate, and keep what it answers."""
        headers = {"authorization": f"Bearer {self.hidden[key]}"} if key else {}
        headers |= options.pop("headers", {})
        answer = httpx.request(method, self.gate.url + path, headers=headers, verify=self.trust, timeout=120, **options)
        self.keep(f"{method} {path} as {key or 'nobody'}", answer)
        return answer

    def keep(self, where: str, answer: httpx.Response) -> None:
        head = "".join(f"{name}: {value}\n" for name, value in answer.headers.multi_items())
        # What users hear of what they themselves have said is theirs.
        own = answer.request.method == "POST" and not answer.request.url.path.startswith("/admin")
        self.left[f"{where} {len(self.left)}{' (own)' if own else ''}"] = head.encode() + answer.content


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("secrets")
    with ExitStack() as stack:
        journal, there = stack.enter_context(fake_journal(folder)), stack.enter_context(collector())
        whole = started(folder, journal, there, lambda program: stack.callback(program.stop) and None)
        live(whole)
        searched(whole)
        yield whole


def started(folder: Path, journal: FakeJournal, there: Collector, own: Callable[[Program], None]) -> Run:
    public, internal = Authority(folder, "public"), Authority(folder, "internal")
    pairs = {name: internal.issue(name) for name in ("gate", "a", "b")} | {"door": public.issue("door")}
    hidden = {name: made(name) for name in ("client", "operator", "stranger", "token", "wrong-token", "collector")}
    hidden |= {f"private key of {name}": pair.key.read_text().splitlines()[1] for name, pair in pairs.items()}
    said = {name: made(name) for name in ("prompt", "system", "tool", "user", "broken", "document", "schema")}
    (folder / "token").write_text(hidden["token"] + "\n")
    (folder / "headers").write_text(f"authorization=Bearer {hidden['collector']}\n")
    told = ("--log-level", "debug", "--otlp-endpoint", there.url, "--otlp-headers-file", str(folder / "headers"))
    told += ("--fleet-token-file", str(folder / "token"))

    def program(name: str, module: str, *arguments: str, journaled: bool) -> Program:
        port, log = free_port(), folder / f"{name}.log"
        pair = pairs["door" if name == "gate" else name]
        tls = ("--tls-cert-file", str(pair.certificate), "--tls-key-file", str(pair.key))
        env = journal.environ(log) if journaled else {}
        started = Program(module, ["serve", "--port", str(port), *tls, *told, *arguments], port, log, env)
        started.url = started.url.replace("http:", "https:")
        own(started)
        return started

    fake = ("--backend", "fake", "--model-id", MODEL, "--fake-step-delay-s", "0.02", "--slots", "4")
    inner = ("--tls-client-ca-file", str(internal.file))
    nodes = {
        "a": program("a", "llmnode", "--name", "a", *fake, *inner, journaled=True),
        "b": program("b", "llmnode", "--name", "b", *fake, *inner, "--log-format", "json", journaled=False),
    }
    (folder / "nodes.toml").write_text("".join(f'[[nodes]]\nname = "{n}"\nurl = "{p.url}"\n' for n, p in nodes.items()))
    (folder / "state").mkdir()
    for name in ("client", "operator"):
        flags = ["--admin"] if name == "operator" else []
        command = [sys.executable, "-m", "llmgate", "keys", "create", name, *flags, "--from-file", "-"]
        command += ["--state-dir", str(folder / "state")]
        subprocess.run(command, input=hidden[name] + "\n", text=True, check=True, capture_output=True, timeout=60)
    gate = program(
        "gate", "llmgate", "--workers", "2", "--nodes-file", str(folder / "nodes.toml"),
        "--state-dir", str(folder / "state"), "--request-log", str(folder / "requests"), "--poll-interval-s", "0.2",
        "--node-ca-file", str(internal.file), "--node-cert-file", str(pairs["gate"].certificate),
        "--node-key-file", str(pairs["gate"].key), "--slow-start-s", "0", journaled=True,
    )  # fmt: skip
    whole = Run(folder, gate, nodes, journal, there, public.client(), internal.client(pairs["gate"]), hidden, said)

    def usable() -> bool:
        assert gate.process.poll() is None, gate.output()
        answer = gate.get("/ready", verify=whole.trust)
        return answer is not None and answer.status_code == 200 and answer.json()["usable"] == 2

    wait_for(usable, "two nodes behind the gate")
    return whole


def chat(run: Run, key: str | None = "client", **fields: Any) -> httpx.Response:
    said = run.said
    tool = {"type": "function", "function": {"name": "look", "description": said["tool"], "parameters": {}}}
    messages = [{"role": "system", "content": said["system"]}, {"role": "user", "content": said["prompt"]}]
    body = {
        "model": MODEL, "messages": messages, "tools": [tool], "tool_choice": "none", "max_tokens": 40,
        "ignore_eos": True, "logit_bias": LETTERS, "user": said["user"], "metadata": {"of": said["user"]}, **fields,
    }  # fmt: skip
    answer = run.ask("POST", "/v1/chat/completions", key, json=body)
    run.ids.append(answer.headers["x-request-id"])
    return answer


def live(run: Run) -> None:
    """Everything that could let something slip."""
    answer = chat(run)
    assert answer.status_code == 200, answer.text
    run.said["answer"] = answer.json()["choices"][0]["message"]["content"][:24]
    assert len(run.said["answer"]) == 24
    assert chat(run, stream=True).text.endswith("data: [DONE]\n\n")
    assert chat(run, key="stranger").status_code == 401
    assert chat(run, key=None).status_code == 401
    assert run.ask("GET", "/admin/nodes", "client").status_code == 403
    by_name = {"x-api-key": run.hidden["stranger"]}
    assert run.ask("POST", "/v1/messages", json={"model": MODEL}, headers=by_name).status_code == 401
    basic = base64.b64encode(f"me:{run.hidden['stranger']}".encode()).decode()
    assert run.ask("GET", "/v1/models", headers={"authorization": f"Basic {basic}"}).status_code == 401
    run.ask("GET", f"/v1/models?api_key={run.hidden['stranger']}")
    run.ask("POST", "/v1/chat/completions", "client", content=('{"messages": "' + run.said["broken"]).encode())
    run.ask("POST", "/v1/chat/completions", "client", json={"model": MODEL, "messages": run.said["broken"]})
    run.ask("POST", "/v1/completions", "client", json={"model": MODEL, "prompt": run.said["prompt"], "max_tokens": 2})
    run.ask(
        "POST", "/v1/responses", "client", json={"model": MODEL, "input": run.said["prompt"], "max_output_tokens": 1}
    )
    run.ask("POST", "/v1/embeddings", "client", json={"model": MODEL, "input": run.said["document"]})
    run.ask("POST", "/tokenize", "client", json={"model": MODEL, "content": run.said["document"]})
    schema = {"type": "object", "properties": {run.said["schema"]: {"type": "nothing"}}}
    chat(run, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    for node in run.nodes.values():
        for key in ("wrong-token", None):
            headers = {"authorization": f"Bearer {run.hidden[key]}"} if key else {}
            found = httpx.get(node.url + "/node", headers=headers, verify=run.inner, timeout=30)
            assert found.status_code == 401
            run.keep("GET /node", found)
    reload(run)
    killed(run)


def reload(run: Run) -> None:
    """The gate's workers are replaced, and its first process by itself."""
    run.gate.signal(signal.SIGHUP)
    wait_for(lambda: run.ask("GET", "/health").json()["generation"] == 2, "the second generation")


def killed(run: Run) -> None:
    """A node dies in the middle of an answer, which goes on at the other one."""
    got: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: got.append(chat(run, max_tokens=100, stream=True)))

    def busy() -> str:
        nodes = run.ask("GET", "/admin/nodes", "operator").json()["nodes"]
        return next((node["name"] for node in nodes if node["load"] and node["load"]["running"]), "")

    asking.start()
    name = wait_for(busy, "an answer at a node")
    run.nodes[name].signal(signal.SIGKILL)
    asking.join()
    assert got[0].text.endswith("data: [DONE]\n\n"), got[0].text


def searched(run: Run) -> None:
    """Gather what is left. What is written later than requests end is waited for."""
    left, gate = run.left, run.gate
    ended = [id for id in run.ids if id]
    wait_for(lambda: all(id in (run.folder / "requests").read_text() for id in ended), "the request log")
    wait_for(lambda: any(s.name == "POST /resume" for s in run.there.spans), "the spans of an answer that moved")
    alive = [node for node in run.nodes.values() if node.process.poll() is None]
    for path in ("/admin/nodes", "/admin/keys", "/admin/usage", "/admin/requests", f"/admin/requests/{ended[0]}",
                 "/admin/fleet", "/v1/models", "/props", "/slots", "/metrics", "/health", "/ready", "/openapi.json",
                 "/docs", "/", "/nowhere"):  # fmt: skip
        for key in ("operator", "client", "stranger", None):
            run.ask("GET", path, key)
    run.ask("POST", "/admin/nodes/a/drain", "operator", json={"owner": "test", "ttl_seconds": 60, "force": True})
    run.ask("DELETE", "/admin/nodes/a/drain?owner=test", "operator")
    run.ask("DELETE", "/admin/keys/nobody", "operator")
    for path in ("/admin/requests/events", "/admin/fleet/events"):
        listen(run, path)
    token = {"authorization": f"Bearer {run.hidden['token']}"}
    for node in alive:
        for path in ("/metrics", "/node", "/health", "/docs", "/nowhere"):
            run.keep(f"GET {path} of a node", httpx.get(node.url + path, headers=token, verify=run.inner, timeout=30))
    place = ["--state-dir", str(run.folder / "state")]
    for command in (["keys", "list", *place], ["usage", *place]):
        done = subprocess.run(
            [sys.executable, "-m", "llmgate", *command], capture_output=True, timeout=60, stdin=subprocess.DEVNULL
        )
        left["llmgate " + " ".join(command[:2])] = done.stdout + done.stderr
    family = {gate.pid, *children(gate.pid)}
    assert len(family) >= 3, "the first process and two workers"
    for pid in family | {node.pid for node in alive}:
        for what in ("cmdline", "environ"):
            left[f"/proc/{pid}/{what}"] = Path(f"/proc/{pid}/{what}").read_bytes()
    shared = {line.partition(b"=")[2].decode() for name, data in left.items() if name.endswith("/environ")
              for line in data.split(b"\0") if line.startswith(b"PROMETHEUS_MULTIPROC_DIR=")}  # fmt: skip
    assert shared, "workers share a folder"
    for folder in [*map(Path, shared), run.folder / "state"]:
        for path in folder.rglob("*"):
            if path.is_file():
                left[f"file {path.name}"] = path.read_bytes()
    for log in [*run.folder.glob("*.log"), run.folder / "requests"]:
        left[f"log {log.name}"] = log.read_bytes()
    left["journal"] = run.journal.raw
    left["traces"] = b"".join(run.there.bodies)


def listen(run: Run, path: str) -> None:
    """Hear events of the admin API, while something happens."""
    headers = {"authorization": f"Bearer {run.hidden['operator']}"}
    with (
        httpx.Client(verify=run.trust, timeout=30) as client,
        client.stream("GET", run.gate.url + path, headers=headers) as answer,
    ):
        if answer.status_code == 200:
            chat(run)
            run.left[f"GET {path}"] = next(answer.iter_bytes())


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def traces_of(secret: str) -> list[bytes]:
    """What would give a secret away: a good part of it, as it is or as base64."""
    parts = [secret, secret[-16:], secret[-32:-16]]
    return [part.encode() for part in parts] + [base64.b64encode(secret.encode())[:24]]


def test_the_search_sees_what_there_is(run: Run) -> None:
    """Each place has the id of a request that went well, where requests are told of at all: so it was looked into."""
    id = run.ids[0].encode()
    places = {where for where, data in run.left.items() if id in data}
    assert {"log requests", "traces"} <= places
    assert {"journal", "log b.log"} & places, "one of them is where the node that answered tells of it"
    told = (b"SYSLOG_IDENTIFIER=llmgate\n", b"SYSLOG_IDENTIFIER=llmnode\n", b"LLMRACK_REQUEST_ID=")
    assert [part for part in told if part not in run.left["journal"]] == []
    assert any(where.startswith("GET /admin/requests as operator") for where in places)
    assert any(where.startswith("file llmgate.db") for where in places)
    assert b"llmnode_build_info" in b"".join(run.left.values())
    assert b"debug" in run.left["log b.log"].lower()
    assert b"PRIORITY=7" in run.left["journal"]


def test_no_secret_is_written_shown_or_told(run: Run) -> None:
    found = {
        (name, where)
        for where, data in run.left.items()
        for name, secret in run.hidden.items()
        if any(part in data for part in traces_of(secret))
    }
    assert found == set()


def test_what_users_say_and_hear_is_nowhere_but_in_their_own_answers(run: Run) -> None:
    found = {
        (name, where)
        for where, data in run.left.items()
        if not where.endswith("(own)")
        for name, text in run.said.items()
        if text.encode() in data
    }
    assert found == set()


def test_every_metric_that_a_running_fleet_shows_is_documented(run: Run) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
    shown = b"".join(data for where, data in run.left.items() if "/metrics" in where).decode()
    names = {line.split()[2] for line in shown.splitlines() if line.startswith("# TYPE ll")}
    names -= {name for name in names if name.endswith("_created")}
    assert len(names) > 60
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_nobody_but_its_owner_reads_what_the_gate_keeps(run: Run) -> None:
    state = run.folder / "state"
    assert {path.name for path in state.iterdir() if path.stat().st_mode & 0o077} == set()
    assert json.loads((run.folder / "requests").read_text().splitlines()[0])["key"]
    assert os.access(state, os.R_OK)
