#!/usr/bin/env python3
"""What the catalogue's models come to: files, where each comes from, its SHA-256, and who hands it to whom.

Owns the lock file, which holds the SHA-256 of every file whose entry in the catalogue has none. Runs on the controller
and opens no connection: what lies on hosts or behind URLs is looked at by placement.py, on the hosts.

    catalogue.py resolve < {"models", "folder", "lock", "endpoint", "write"}   the files of each model
    catalogue.py record  < {"lock", "found": [{"origin", "sha256", "size"}]}   write down what a host has found
    catalogue.py plan    < {"hosts": {host: {"present", "missing"}}, "fan_out"}  who fetches what from whom, in rounds

Each prints one JSON object. Standard library only. Exit codes: 0 done; 1 refused, with `error` in the object.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

KINDS = ("src", "path", "url", "repo")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")
REVISION = re.compile(r"[0-9a-f]{40}\Z")
# llama.cpp opens the first file of a split model and finds the others by this ending (llama_split_path).
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")
UNRESOLVED = "unresolved"


class Refused(Exception):
    """The catalogue cannot be used; the message names model, field and value."""


def main() -> int:
    verbs = {"resolve": resolve, "record": record, "plan": plan}
    try:
        print(json.dumps(verbs[sys.argv[1]](**json.load(sys.stdin))))
    except (Refused, OSError) as error:
        print(json.dumps({"error": str(error)}))
        return 1
    return 0


# ------------------------------------------------------------------------------------------------- the files


def resolve(
    models: dict[str, dict[str, Any]], folder: str, lock: str, endpoint: str, write: bool = True
) -> dict[str, Any]:
    """Each model's files, and the origins whose SHA-256 nobody knows yet.

    Returns {"models": {name: {"path", "sha256", "size", "files": [...]}}, "unresolved": [file, ...], "changed"}.
    A file is {"model", "origin", "kind", "source", "sha256", "size", "path", "part", "stamp"}; size is None while it
    is unknown. Hashes what lies on the controller, once for each size and time of change. Raises Refused.
    """
    known = _read(Path(lock))
    before = json.dumps(known, sort_keys=True)
    resolved = {name: _model(name, entry, folder, endpoint, known) for name, entry in models.items()}
    changed = json.dumps(known, sort_keys=True) != before
    if changed and write:
        _write(Path(lock), known)
    files = [file for model in resolved.values() for file in model["files"]]
    return {
        "models": resolved,
        "unresolved": [file for file in files if file["sha256"] == UNRESOLVED],
        "changed": changed,
    }


def _model(name: str, entry: dict[str, Any], folder: str, endpoint: str, known: dict[str, Any]) -> dict[str, Any]:
    if not NAME.match(name):
        raise Refused(f"llmrack_models: {name!r} is no name for a model: letters, digits, '.', '_' and '-' only")
    kinds = [kind for kind in KINDS if entry.get(kind)]
    if len(kinds) != 1:
        given = " and ".join(kinds) or "none of them"
        raise Refused(f"llmrack_models.{name} must have one of src, path, url or repo; it has {given}")
    kind = kinds[0]
    sources = _parts(name, _source(name, entry, kind, endpoint))
    sums = _sums(name, entry, len(sources))
    files = []
    for source, given in zip(sources, sums, strict=True):
        origin = f"{kind}:{source}"
        found = _on_controller(name, source, origin, known, given) if kind == "src" else known.get(origin, {})
        sha256 = given or found.get("sha256", UNRESOLVED)
        files.append({"model": name, "origin": origin, "kind": kind, "source": source, "sha256": sha256,
                      "size": found.get("size")})  # fmt: skip
    digest = _digest([file["sha256"] for file in files])
    for number, file in enumerate(files, 1):
        ending = f"-{number:05}-of-{len(files):05}.gguf" if len(files) > 1 else ".gguf"
        placed = f"{folder}/{name}-{digest[:12]}{ending}"
        file["path"] = file["source"] if kind == "path" else placed
        key = hashlib.sha256(file["origin"].encode()).hexdigest()[:12]
        file["part"] = f"{folder}/.{name}-{key}.part"
        # Beside the file; one that was on the host before us may lie where nobody can write.
        file["stamp"] = f"{folder}/.{name}-{key}.stamp" if kind == "path" else f"{placed}.stamp"
    sizes = [file["size"] for file in files]
    total = None if None in sizes else sum(sizes)
    return {"path": files[0]["path"], "sha256": digest, "size": total, "files": files}


def _source(name: str, entry: dict[str, Any], kind: str, endpoint: str) -> str:
    value = str(entry[kind])
    if kind in ("src", "path") and not value.startswith("/"):
        raise Refused(f"llmrack_models.{name}.{kind} must be an absolute path; it is {value!r}")
    if kind == "url" and not value.startswith(("http://", "https://")):
        raise Refused(f"llmrack_models.{name}.url must begin with http:// or https://; it is {value!r}")
    if kind != "repo":
        return value
    for field in ("revision", "file"):
        if not entry.get(field):
            raise Refused(f"llmrack_models.{name} comes from repo {value}, and must name its {field}")
    if not REVISION.match(str(entry["revision"])):
        raise Refused(
            f"llmrack_models.{name}.revision must be a commit (40 hex digits), as branches and tags move; "
            f"it is {entry['revision']!r}"
        )
    return f"{endpoint.rstrip('/')}/{value}/resolve/{entry['revision']}/{entry['file']}"


def _parts(name: str, source: str) -> list[str]:
    """Every file of a split model, given the first."""
    split = SPLIT.search(source)
    if not split:
        return [source]
    if int(split[1]) != 1:
        raise Refused(f"llmrack_models.{name}: of a split model name the first file, not {source}")
    count = int(split[2])
    return [f"{source[: split.start()]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _sums(name: str, entry: dict[str, Any], count: int) -> list[str | None]:
    given = entry.get("sha256")
    if given is None:
        return [None] * count
    sums = [str(one).lower() for one in (given if isinstance(given, list) else [given])]
    if len(sums) != count:
        raise Refused(f"llmrack_models.{name}.sha256 must hold {count}, one a file; it holds {len(sums)}")
    for one in sums:
        if not SHA256.match(one):
            raise Refused(f"llmrack_models.{name}.sha256 must be 64 hex digits; it is {one!r}")
    return list(sums)


def _on_controller(name: str, source: str, origin: str, known: dict[str, Any], given: str | None) -> dict[str, Any]:
    """What is known of a file on the controller, hashed when it is not what it was; with `given` only its size."""
    try:
        there = Path(source).stat()
    except OSError:
        raise Refused(f"The model {name} is not on the controller: {source} does not exist.") from None
    if given:
        return {"size": there.st_size}
    entry = known.get(origin, {})
    if (entry.get("size"), entry.get("mtime_ns")) != (there.st_size, there.st_mtime_ns):
        entry = {"sha256": _hash(source), "size": there.st_size, "mtime_ns": there.st_mtime_ns}
        known[origin] = entry
    return dict(entry)


def _digest(sums: list[str]) -> str:
    """A model's SHA-256: its file's, or that of its files' sums, one a line."""
    if UNRESOLVED in sums:
        return UNRESOLVED
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- the lock file


def record(lock: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Add what hosts have found. An origin that is there already stays as it is: the first answer holds."""
    known = _read(Path(lock))
    new = {one["origin"]: {"sha256": one["sha256"], "size": one["size"]} for one in found}
    changed = not set(new) <= set(known)
    if changed:
        _write(Path(lock), {**new, **known})
    return {"changed": changed}


def _read(lock: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(lock.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Refused(f"{lock} is no JSON: {error}; remove it to have the models hashed anew") from None
    return known


def _write(lock: Path, known: dict[str, Any]) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    part = lock.with_name(f"{lock.name}.part")
    part.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    part.replace(lock)


# --------------------------------------------------------------------------------------------------- the tree


def plan(hosts: dict[str, dict[str, Any]], fan_out: bool = True) -> dict[str, Any]:
    """Who fetches which file from whom, so that each file leaves its source once and N hosts take log2 N rounds.

    `hosts`: name -> {"present": [origin, ...], "missing": [origin, ...]}. Returns {"rounds": [{host:
    {"fetches": {origin: host or None for the source}, "serves": [origin, ...]}, ...}, ...]}. In a round a host that
    has a file hands it to one other; those that got it do the same in the next. Without `fan_out` all fetch from the
    source.
    """
    origins = sorted({origin for host in hosts.values() for origin in host["missing"]})
    rounds: list[dict[str, Any]] = []
    for origin in origins:
        having = [name for name in sorted(hosts) if origin in hosts[name]["present"]]
        lacking = [name for name in sorted(hosts) if origin in hosts[name]["missing"]]
        number = 0
        while lacking:
            if number == len(rounds):
                rounds.append({})
            givers: list[str | None] = [*having] or [None]
            if not fan_out:
                givers = [None] * len(lacking)
            for giver, taker in zip(givers, lacking):  # noqa: B905  (the shorter one ends the round)
                _task(rounds[number], taker)["fetches"][origin] = giver
                if giver is not None:
                    _task(rounds[number], giver)["serves"].append(origin)
            count = min(len(givers), len(lacking))
            having, lacking = having + lacking[:count], lacking[count:]
            number += 1
    return {"rounds": rounds}


def _task(tasks: dict[str, Any], host: str) -> dict[str, Any]:
    task: dict[str, Any] = tasks.setdefault(host, {"fetches": {}, "serves": []})
    return task


if __name__ == "__main__":
    sys.exit(main())
