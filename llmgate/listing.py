"""The nodes file: which nodes there are, and how requests for a model are routed to one of them.

    [[nodes]]                                  one entry a node
    name = "gpu1"
    url = "http://10.0.0.1:8100"
    labels = {zone = "a"}                      optional
    weight = 2.0                               optional: its share of what no figure decides, 1.0 by default

    [models."qwen-7b"]                         optional, one table a model, named by its id at the nodes
    policy = "prefix"                          one of POLICIES
    aliases = ["gpt-4o"]                       names of the gate's own; the nodes see the id
    fallback = ["qwen-1b"]                     asked in order when no node of this model has room
    labels = {zone = "a"}                      only nodes with these labels
    canary = {release = "0.2.0", share = 0.05} so much of the traffic goes to nodes of that release

Reads text into frozen values and refuses what makes no sense, naming the entry; knows nothing of what is made of it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard
from urllib.parse import urlsplit

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 only
    import tomli as tomllib

POLICIES = ("prefix", "least-loaded", "round-robin", "random", "rendezvous")
"""Names of the policies (core/policy.py); the first is the default."""
MAX_WEIGHT = 1000.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST = 200

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Address:
    """One `[[nodes]]` entry. `url` has a scheme, a host and perhaps a port, and no path."""

    name: str
    url: str
    labels: Labels = frozenset()
    weight: float = 1.0


@dataclass(frozen=True)
class Canary:
    """`share` (0 to 1) of a model's traffic goes to nodes of `release`, the rest to the others."""

    release: str
    share: float


@dataclass(frozen=True)
class Route:
    """One `[models."NAME"]` table."""

    policy: str = POLICIES[0]
    aliases: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    labels: Labels = frozenset()
    canary: Canary | None = None


@dataclass(frozen=True)
class Listing:
    """The whole file: nodes in their order, routes by model id."""

    addresses: tuple[Address, ...]
    routes: Mapping[str, Route] = field(default_factory=dict)


def parse(text: str) -> Listing:
    """Read a nodes file. Raises ValueError that names the entry and what is wrong with it.

    A file without nodes is refused: one that was cut short must not empty the fleet.
    """
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not valid TOML: {error}") from error
    unknown = sorted(set(body) - {"nodes", "models"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; the file holds [[nodes]] entries and [models.NAME] tables only")
    entries = body.get("nodes", [])
    if not isinstance(entries, list) or not entries:
        raise ValueError("there is no [[nodes]] entry")
    addresses = tuple(_address(entry, number) for number, entry in enumerate(entries, 1))
    for what in ("name", "url"):
        values = [getattr(address, what) for address in addresses]
        twice = sorted({v for v in values if values.count(v) > 1})
        if twice:
            raise ValueError(f"two nodes have the {what} {twice[0]!r}")
    tables = body.get("models", {})
    if not isinstance(tables, dict):
        raise ValueError("models must be tables like [models.NAME]")
    routes = {name: _route(table, name) for name, table in tables.items()}
    _require_clear_names(routes)
    return Listing(addresses, routes)


def _address(entry: Any, number: int) -> Address:
    where = f"[[nodes]] entry {number}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not a table")
    _require_known(entry, ("name", "url", "labels", "weight"), where)
    name, url, weight = entry.get("name"), entry.get("url"), entry.get("weight", 1.0)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: name must be 1-64 characters of letters, digits, '.', '_' or '-', got {name!r}")
    where = f"{where} ({name})"
    if not isinstance(url, str) or not _is_base(url):
        raise ValueError(f"{where}: url must look like http://host:port, without a path, got {url!r}")
    if not _is_number(weight) or not 0 < weight <= MAX_WEIGHT:
        raise ValueError(f"{where}: weight must be above 0 and at most {MAX_WEIGHT:g}, got {weight!r}")
    return Address(name, url.rstrip("/"), _labels(entry, where), float(weight))


def _route(table: Any, name: str) -> Route:
    where = f'[models."{name}"]'
    if not isinstance(table, dict):
        raise ValueError(f"{where} is not a table")
    _require_known(table, ("policy", "aliases", "fallback", "labels", "canary"), where)
    policy = table.get("policy", POLICIES[0])
    if policy not in POLICIES:
        raise ValueError(f"{where}: policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    aliases, fallback = (_names(table, what, where) for what in ("aliases", "fallback"))
    return Route(policy, aliases, fallback, _labels(table, where), _canary(table.get("canary"), where))


def _canary(table: Any, where: str) -> Canary | None:
    if table is None:
        return None
    where += " canary"
    if not isinstance(table, dict):
        raise ValueError(f"{where} is not a table")
    _require_known(table, ("release", "share"), where)
    release, share = table.get("release"), table.get("share")
    if not isinstance(release, str) or not release:
        raise ValueError(f"{where}: release must be a release as nodes say it, got {release!r}")
    if not _is_number(share) or not 0 <= share <= 1:
        raise ValueError(f"{where}: share must be from 0 to 1, got {share!r}")
    return Canary(release, float(share))


def _require_clear_names(routes: Mapping[str, Route]) -> None:
    """Every name means one model, and a fallback leads to another one."""
    meant: dict[str, str] = {name: name for name in routes}
    for name, route in routes.items():
        for alias in route.aliases:
            if alias in meant:
                raise ValueError(f'[models."{name}"]: the alias {alias!r} already stands for {meant[alias]!r}')
            meant[alias] = name
    for name, route in routes.items():
        for other in route.fallback:
            if meant.get(other, other) != other:
                raise ValueError(f'[models."{name}"]: fallback takes ids of models, and {other!r} is an alias')
            if other == name:
                raise ValueError(f'[models."{name}"]: fallback names the model itself')


def _labels(table: Mapping[str, Any], where: str) -> Labels:
    labels = table.get("labels", {})
    if not isinstance(labels, dict) or not all(_is_name(value) for value in labels.values()):
        raise ValueError(f'{where}: labels must be a table of texts like {{zone = "a"}}, got {labels!r}')
    return frozenset(labels.items())


def _names(table: Mapping[str, Any], what: str, where: str) -> tuple[str, ...]:
    names = table.get(what, [])
    if not isinstance(names, list) or not all(_is_name(name) for name in names):
        raise ValueError(f"{where}: {what} must be a list of names of 1 to {_LONGEST} characters, got {names!r}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: {what} has {twice[0]!r} twice")
    return tuple(names)


def _require_known(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(keys))
    if unknown:
        takes = f"{', '.join(keys[:-1])} and {keys[-1]}"
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}; it takes {takes}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        return False
    bare = parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username or parts.password)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port_ok and bare and " " not in url
