"""The proxies of `make bench-gate`, each a process in front of the same upstream, and the cores that they run on.

Owns: command lines and configurations, and with them what is fair: every proxy stands in front of the same nodes, is
pinned to the same core with one worker, and keeps its connections to them; everything else is its own default, but for
what is said where it is set. Refuses to know: what is asked of a proxy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmgate.settings import Settings
from tests.bench import rival, upstream
from tests.bench.servers import Server
from tests.processes import free_port

OURS, ONE_WORKER, NGINX, LITELLM = "llmgate", "llmgate, one worker", "nginx", "LiteLLM"
NO_ACCOUNTS = "llmgate, no limits or ledger"
LIMITED = "key-limits"
"""Beside our flags: any value gives the key all five limits, far above what is asked."""
NODES = 4
"""Addresses of the upstream, so that there is something to choose from."""
_LIMITS = ("requests-per-minute", "tokens-per-minute", "concurrent-requests", "tokens-per-day", "tokens-per-month")
_KEY = "sk-bench-0123456789abcdef0123456789"


@dataclass(frozen=True)
class Cores:
    """Which cores the proxy may use, and which the upstream and the load. With one core all share it."""

    proxy: frozenset[int]
    rest: frozenset[int]

    @classmethod
    def of(cls, all: Sequence[int]) -> Cores:
        """Half of the cores for each."""
        middle = len(all) // 2
        return cls(frozenset(all[:middle] or all), frozenset(all[middle:]))


@dataclass(frozen=True)
class Door:
    """A proxy and the key that it asks for, empty where it asks for none."""

    server: Server
    key: str = ""


def start_upstream(folder: Path, cores: frozenset[int]) -> tuple[Server, list[int]]:
    """The mock nodes, not running yet, and their ports."""
    ports = [free_port() for _ in range(NODES)]
    command = [sys.executable, "-m", upstream.__name__, *map(str, ports)]
    return Server("upstream", command, ports[0], folder, "/ready", cores=cores), ports


def llmgate(folder: Path, nodes: Sequence[int], cores: frozenset[int], flags: Mapping[str, str]) -> Door:
    """Ours: keys, routing and the request log are on, as they are by default. Raises RuntimeError for a setting that
    this llmgate does not know."""
    flags = dict(flags)
    limits = [f"--{name}=1000000000" for name in _LIMITS] if flags.pop(LIMITED, "") else []
    unknown = [name for name in flags if name.replace("-", "_") not in Settings.__dataclass_fields__]
    if unknown:
        raise RuntimeError(f"this llmgate has no setting {unknown[0]!r}")
    own = folder / f"llmgate-{'-'.join(flags.values()) or 'default'}"
    own.mkdir()
    listing = "".join(f'[[nodes]]\nname = "node-{port}"\nurl = "http://127.0.0.1:{port}"\n' for port in nodes)
    (own / "nodes.toml").write_text(listing)
    create = [sys.executable, "-m", "llmgate", "keys", "create", "bench", "--from-file", "-", *limits]
    made = subprocess.run(
        [*create, "--state-dir", str(own)],
        input=_KEY, text=True, capture_output=True,
    )  # fmt: skip
    if made.returncode:
        raise RuntimeError(f"no key could be made: {made.stderr}")
    port = free_port()
    command = [
        sys.executable, "-m", "llmgate", "serve", "--port", str(port), "--state-dir", str(own),
        "--nodes-file", str(own / "nodes.toml"), "--request-log", str(own / "requests.jsonl"),
        *(word for name, value in flags.items() for word in (f"--{name}", value)),
    ]  # fmt: skip
    return Door(Server("llmgate", command, port, own, "/ready", cores=cores), _KEY)


def without_accounts(folder: Path, nodes: Sequence[int], cores: frozenset[int], _: Mapping[str, str]) -> Door:
    """Ours, that neither counts nor writes down what its one key uses."""
    return llmgate(folder, nodes, cores, {"usage": "false"})


def nginx(folder: Path, nodes: Sequence[int], cores: frozenset[int], _: Mapping[str, str]) -> Door:
    """A plain proxy: no key check, no log, nothing kept back of a stream."""
    program, port = rival.nginx(), free_port()
    own = folder / "nginx"
    own.mkdir()
    servers = " ".join(f"server 127.0.0.1:{node};" for node in nodes)
    temporary = " ".join(f"{kind}_temp_path {own};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.geteuid() == 0 else ""
    (own / "nginx.conf").write_text(f"""
        daemon off; {user} worker_processes 1; pid {own}/pid; error_log stderr;
        events {{ worker_connections 8192; }}
        http {{
            access_log off; tcp_nodelay on; client_max_body_size 16m; keepalive_requests 1000000; {temporary}
            upstream nodes {{ {servers} keepalive 512; keepalive_requests 1000000; }}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                location / {{
                    proxy_pass http://nodes; proxy_http_version 1.1; proxy_set_header Connection "";
                    proxy_buffering off; proxy_read_timeout 600s;
                }}
            }}
        }}""")
    command = [str(program), "-p", str(own), "-c", str(own / "nginx.conf")]
    return Door(Server("nginx", command, port, own, "/ready", cores=cores))


def litellm(folder: Path, nodes: Sequence[int], cores: frozenset[int], _: Mapping[str, str]) -> Door:
    """LiteLLM's proxy: a master key and no database; its log says errors only. Its price list comes with the package:
    otherwise it would wait for a download at every start."""
    program, port = rival.litellm(), free_port()
    own = folder / "litellm"
    own.mkdir()
    models = "".join(
        f"- model_name: {upstream.MODEL}\n  litellm_params:\n    model: openai/{upstream.MODEL}\n"
        f"    api_base: http://127.0.0.1:{node}/v1\n    api_key: none\n"
        for node in nodes
    )
    (own / "config.yaml").write_text(
        f"model_list:\n{models}general_settings:\n  master_key: {_KEY}\nlitellm_settings:\n  telemetry: false\n"
    )
    command = [
        str(program), "--config", str(own / "config.yaml"), "--host", "127.0.0.1", "--port", str(port),
        "--num_workers", "1",
    ]  # fmt: skip
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONPATH": ""}
    return Door(Server("litellm", command, port, own, "/health/liveliness", cores=cores, env=env), _KEY)


DOORS: Mapping[str, Callable[[Path, Sequence[int], frozenset[int], Mapping[str, str]], Door]] = {
    OURS: llmgate, ONE_WORKER: llmgate, NO_ACCOUNTS: without_accounts, NGINX: nginx, LITELLM: litellm,
}  # fmt: skip
