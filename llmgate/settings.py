"""The gate's settings: one table for flags, environment (LLMGATE_*), TOML file, help and docs; and the files they name.

Reads the fleet token and the nodes file (listing.py), since both are configuration; knows nothing of what they are used
for.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmgate import listing
from llmgate.database import Database, check_url
from llmgate.listing import Listing
from llmnode.service import tls
from llmnode.service.settings import Loaded, SettingError, load, setting
from llmnode.service.traces import Receiver

PREFIX = "LLMGATE_"
_MIN_TOKEN = 24
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
"""A scheme, a host and a port, in lower case, as browsers send them (RFC 6454, 6.2); no path."""


@dataclass(frozen=True)
class Settings:
    """How one gate runs. Read when it starts and on SIGHUP; the nodes file also when it changes."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on", minimum=1, maximum=65535)
    admin_listen: str = setting(
        "",
        "a second address, HOST:PORT: everything is answered there, and /admin only there; none: on the first one",
    )
    tls_cert_file: Path | None = setting(
        None,
        "PEM file with the gate's certificate and its chain: it listens with TLS; read again when it changes",
    )
    tls_key_file: Path | None = setting(None, "PEM file with the private key of that certificate")
    node_ca_file: Path | None = setting(
        None, "PEM file with the authority of the nodes' certificates, for https:// nodes; none: those of the system"
    )
    node_cert_file: Path | None = setting(None, "PEM file with the certificate that the gate shows to nodes")
    node_key_file: Path | None = setting(None, "PEM file with the private key of that certificate")
    workers: int = setting(1, "processes that serve, to use as many cores", minimum=1, maximum=64)
    nodes_file: Path | None = setting(
        None, "TOML file with the [[nodes]] and the rules of [models]; re-read when it changes"
    )
    state_dir: Path | None = setting(None, "folder for llmgate.db (keys, drain leases, usage); made when it is missing")
    database_url_file: Path | None = setting(
        None, "file whose first line is postgresql://USER:PASSWORD@HOST/NAME, to keep those there instead"
    )
    fleet_token_file: Path | None = setting(
        None, "file whose first line is the secret shown to nodes; without it, none is shown"
    )
    poll_interval_s: float = setting(1.0, "how often each node is asked for its report", unit="seconds", minimum=0.05)
    stale_after_s: float = setting(
        3.0, "a node whose last report is older takes no new work", unit="seconds", minimum=0.1
    )
    eject_after: int = setting(
        5, "requests that fail in a row before a node gets none for a while", minimum=1, maximum=1000
    )
    eject_s: float = setting(
        5.0, "how long that is the first time; it doubles, up to 32 times as long", unit="seconds", minimum=0.05
    )
    slow_start_s: float = setting(
        10.0, "how long a node that joins or comes back takes to its full share of work", unit="seconds", minimum=0
    )
    connect_timeout_s: float = setting(3.0, "time to connect to a node", unit="seconds", minimum=0.05)
    stall_timeout_s: float = setting(
        30.0,
        "a stream with no byte from its node for so long is given up; nodes send a keepalive every 10 s",
        unit="seconds",
        minimum=0.1,
    )
    receive_timeout_s: float = setting(
        60.0, "time for a request to arrive, head and body together", unit="seconds", minimum=0.1
    )
    send_timeout_s: float = setting(
        60.0, "a client that takes nothing of its answer for so long is hung up on", unit="seconds", minimum=0.1
    )
    idle_timeout_s: float = setting(
        120.0, "a client's connection with no request on it is closed after so long", unit="seconds", minimum=1
    )
    request_timeout_s: float = setting(
        600.0, "time for one request, all its attempts together", unit="seconds", minimum=0.1
    )
    tries: int = setting(
        5,
        "nodes that may fail at the same place of one answer, its beginning included, before it is given up",
        minimum=1,
        maximum=100,
    )
    queue_limit: int = setting(
        256,
        "requests that may wait here for a node with room, for each model, an equal part of them in each worker; over "
        "it clients get 503",
        minimum=0,
    )
    ready_wait_s: float = setting(
        10.0,
        "how long a request waits while no node that serves its model is ready, before it gets 503",
        unit="seconds",
        minimum=0,
    )
    drain_seconds: float = setting(60.0, "on SIGTERM, how long running requests may go on", unit="seconds", minimum=0)
    body_limit_bytes: int = setting(16 * 1024 * 1024, "largest request body", unit="bytes", minimum=1024)
    head_limit_bytes: int = setting(
        8192, "largest head of a request: its line and its headers", unit="bytes", minimum=1024, maximum=16384
    )
    connections_limit: int = setting(
        0,
        "clients' connections that a worker has at the same time; over it those without a request give way; 0: half of "
        "the open files that it may have",
        minimum=0,
    )
    connections_per_address: int = setting(
        0, "of these, from one address (of IPv6 one /64); new ones over it are reset; 0: any number", minimum=0
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        "origins whose pages may use the API in a browser, such as https://chat.example.org; * for any, but for /admin",
    )
    require_keys: bool = setting(True, "refuse requests without an API key; the admin API always wants an admin key")
    usage: bool = setting(True, "keep what each request used in the database, for reports and budgets")
    usage_retention_days: int = setting(
        90, "days after which that is dropped; 0 keeps it for ever", unit="days", minimum=0, maximum=36_500
    )
    gates: int = setting(
        1, "gates that share keys and their limits; more than one need one database", minimum=1, maximum=1000
    )
    default_max_tokens: int = setting(
        1024,
        "tokens of an answer that count against its key's limits until it has ended, where the client names no maximum",
        minimum=1,
    )
    budget_hour: int = setting(
        0, "hour of the day, UTC, at which days and months of token budgets begin", minimum=0, maximum=23
    )
    redis_url_file: Path | None = setting(
        None,
        "file whose first line is redis://:PASSWORD@HOST:6379/0, to count there what keys use; several gates need it",
    )
    limits_when_down: str = setting(
        "closed",
        "while it cannot be counted what keys use, those with limits are refused (closed) or go uncounted (open)",
        choices=("closed", "open"),
    )
    request_log: str = setting(
        "-", "where one line a request goes: a file, - for standard output, journal for systemd's, with fields"
    )
    request_log_format: str = setting("json", "how a line of it is written", choices=("json", "logfmt"))
    otlp_endpoint: str = setting(
        "", "base URL of who collects traces (OTLP over HTTP, http://HOST:4318); none: there are no traces"
    )
    otlp_headers_file: Path | None = setting(
        None, "file with headers for it, NAME=VALUE lines: a token, where it asks for one"
    )
    traces_sample_ratio: float = setting(
        1.0,
        "of the traces that begin here, how many are recorded; clients decide of those that they begin",
        minimum=0,
        maximum=1,
    )
    log_level: str = setting("info", "least level that is logged", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "log lines for people or machines", choices=("text", "json"))


def read(flags: Mapping[str, str | None], environ: Mapping[str, str] | None = None) -> Loaded[Settings]:
    """Settings from flags, environment and file. Raises SettingError."""
    return load(Settings, flags=flags, environ=environ, prefix=PREFIX)


def usable(settings: Settings) -> tuple[str, Listing, Path]:
    """What a start reads from the files that the settings name: the fleet token, the nodes, the state folder; and the
    certificates and what traces take, which are only tried. Raises SettingError."""
    found = read_fleet_token(settings), read_nodes(settings), state_dir(settings)
    database(settings)
    redis_url(settings)
    door_context(settings)
    node_context(settings)
    if settings.otlp_endpoint:
        receiver(settings).check()
    admin_address(settings)
    check_origins(settings)
    return found


def receiver(settings: Settings) -> Receiver:
    """Who collects traces."""
    return Receiver(settings.otlp_endpoint, settings.otlp_headers_file, settings.traces_sample_ratio)


def admin_address(settings: Settings) -> tuple[str, int] | None:
    """The host and port of the admin API's own address; None without one. Raises SettingError."""
    text = settings.admin_listen
    if not text:
        return None
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not host or (":" in host and not bracketed) or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise SettingError(f"admin_listen must be HOST:PORT or [IPV6]:PORT, got {text!r}")
    return host, int(port)


def check_origins(settings: Settings) -> None:
    """Raise SettingError for what no browser sends as an origin."""
    for origin in settings.cors_origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise SettingError(
                f"cors_origins must be * or origins such as https://chat.example.org:8443, got {origin!r}"
            )


def door_files(settings: Settings) -> tls.Files:
    return tls.Files(settings.tls_cert_file, settings.tls_key_file)


def node_files(settings: Settings) -> tls.Files:
    return tls.Files(settings.node_cert_file, settings.node_key_file, settings.node_ca_file)


def door_context(settings: Settings) -> ssl.SSLContext | None:
    """What the gate listens with; None for plain HTTP. Raises SettingError."""
    return tls.server(door_files(settings))


def certificate_ends(settings: Settings, door: ssl.SSLContext | None) -> dict[str, float | None]:
    """When the certificates end that the gate shows to clients, with the context `door`, and to nodes: Unix times, None
    where it shows none. Raises SettingError."""
    own = tls.Files(settings.node_cert_file, settings.node_key_file)
    return {"clients": tls.end(door), "nodes": tls.end(tls.server(own))}


def node_context(settings: Settings) -> ssl.SSLContext | None:
    """What the gate connects to https:// nodes with; None for the system's authorities. Raises SettingError."""
    return tls.client(node_files(settings))


def state_dir(settings: Settings) -> Path:
    """The state folder, or SettingError when none is set."""
    if settings.state_dir is None:
        raise SettingError("state_dir is not set: name the folder that keeps llmgate.db (--state-dir)")
    return settings.state_dir


def database(settings: Settings) -> Database:
    """Where keys, drain leases and usage are kept. Raises SettingError, which never repeats the URL."""
    folder, path = state_dir(settings), settings.database_url_file
    if path is None:
        return Database(folder)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return Database(folder, check_url(lines[0].strip() if lines else ""))
    except OSError as error:
        raise SettingError(f"cannot read the database URL file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise SettingError(f"cannot read the database URL file {path}: it is not text") from None
    except ValueError as error:
        raise SettingError(f"database URL file {path}: its first line cannot be used: {error}") from None


def require_one_truth(settings: Settings, *, limited: bool) -> None:
    """Raise SettingError where each of several gates would give out the whole of what keys with limits may use.

    limited: whether there is such a key.
    """
    needed = ("database_url_file", "redis_url_file")
    missing = [name for name in needed if getattr(settings, name) is None]
    if limited and settings.gates > 1 and missing:
        raise SettingError(
            f"keys have limits and gates is {settings.gates}: set {' and '.join(missing)}, or each gate would let them "
            "use all of it"
        )


def redis_url(settings: Settings) -> str:
    """Where keys' counters are kept, "" for a file of this host. Raises SettingError, which never repeats the URL."""
    path = settings.redis_url_file
    if path is None:
        return ""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingError(f"cannot read the Redis URL file {path}: {reason}") from None
    url = lines[0].strip() if lines else ""
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise SettingError(f"Redis URL file {path}: its first line must begin with redis://, rediss:// or unix://")
    return url


def read_nodes(settings: Settings) -> Listing:
    """The nodes file. Raises SettingError that names the file and the entry."""
    path = settings.nodes_file
    if path is None:
        raise SettingError("nodes_file is not set: name the TOML file with the [[nodes]] (--nodes-file)")
    try:
        return listing.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"cannot read the nodes file {path}: {error.strerror}") from error
    except ValueError as error:
        raise SettingError(f"nodes file {path}: {error}") from error


def read_fleet_token(settings: Settings) -> str:
    """The secret that nodes ask for: the first line of the token file, "" without a file.

    Nodes take either line of theirs, so a token is rotated by adding the new one to the nodes before it comes first
    here. Raises SettingError, which never repeats the token.
    """
    path = settings.fleet_token_file
    if path is None:
        return ""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingError(f"cannot read the fleet token file {path}: {reason}") from error
    token = lines[0].strip() if lines else ""
    if len(token) < _MIN_TOKEN or not all(33 <= ord(c) <= 126 for c in token):
        raise SettingError(
            f"fleet token file {path}: its first line must be one word of at least {_MIN_TOKEN} printable characters"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
