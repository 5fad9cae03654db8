#!/usr/bin/env python3
"""One host's instances as files and units: what runs, what was kept to go back to, and whether a start succeeds.

Owns ROOT/opt/llmrack/instances/NAME, the link to the release that an instance starts from, and the kept sets below
ROOT/opt/llmrack/kept/NAME: `undo`, all that it had before the roll in progress, and `before`, what it had when it last
ran another release. A set holds the name of the release, and copies of the unit, the drop-in and the settings; what was
not there is not in it. Opens no connection to node or gate, and starts and stops no unit.

    instance.py look    < {"names"}            what there is of each, and what an operator did to it
    instance.py save    < {"name", "target"}   keep what there is as `undo`; what an interrupted roll has kept stays
    instance.py restore < {"name", "kept"}     put a kept set back in its place, whole: files and link
    instance.py commit  < {"name"}             the roll is over: `undo` becomes `before` if it has another release
    instance.py drop    < {"name"}             forget `undo`
    instance.py await   < {"name", "pid", "seconds"}   wait until systemd says that another process is ready

Each prints one JSON object. Standard library only, and any Python from 3.9 on. Exit codes: 0 done; 1 refused, with
`error` in the object.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOOPS = 2
"""Crashes in one start after which the next one is not awaited."""
_STEP_S = 0.25
_TAIL = 6
_SHOWN = (
    "ActiveState", "ExecMainStatus", "Job", "LoadState", "MainPID", "NRestarts", "Result", "SubState", "UnitFileState",
)  # fmt: skip


class Refused(Exception):
    """It cannot be done; the message says why."""


def main() -> int:
    verbs = {"look": look, "save": save, "restore": restore, "commit": commit, "drop": drop, "await": wait}
    try:
        print(json.dumps(verbs[sys.argv[1]](**json.load(sys.stdin))))
    except (Refused, OSError) as error:
        print(json.dumps({"error": str(error)}))
        return 1
    return 0


def look(names: list[str], root: str = "/") -> dict[str, Any]:
    """What there is of each instance, by name.

    release, config, scheme: what its next start takes and listens with, "" for none.    before: the same of what a
    rollback goes to.
    by_hand: "masked", "disabled" or "stopped" where an operator has done that to it, else "".
    unfinished: a roll was interrupted here.    pid: its main process, 0 for none.
    """
    return {name: _look(name, Path(root)) for name in names}


def _look(name: str, root: Path) -> dict[str, Any]:
    shown, undo, before = show(name), _kept(root, name, "undo"), _kept(root, name, "before")
    if _is_half(root, name) and _text(undo / "release") not in ("", _release(root, name)):
        before = undo
    installed = _places(root, name)["settings"].exists()
    by_hand = ""
    if shown["LoadState"] == "masked":
        by_hand = "masked"
    elif installed and not undo.exists():
        # Restart=always: one that is not even tried again was stopped. One that has failed was not, it cannot start.
        stopped = shown["ActiveState"] == "inactive"
        by_hand = "disabled" if shown["UnitFileState"] == "disabled" else "stopped" if stopped else ""
    return {
        "installed": installed,
        "release": _release(root, name),
        **_settings(_places(root, name)["settings"]),
        "before": {"release": _text(before / "release"), **_settings(before / "settings")},
        "by_hand": by_hand,
        "unfinished": undo.exists(),
        "active": shown["ActiveState"],
        "pid": int(shown["MainPID"] or 0),
    }


def save(name: str, target: str = "", root: str = "/") -> dict[str, Any]:
    """Keep what the instance has now. A set that an interrupted roll has kept is the better one, and stays.

    target: where the roll goes. To `before`, and not begun by an earlier one that went there: then what an interrupted
    roll has kept is what to go back to.
    """
    place, undo = Path(root), _kept(Path(root), name, "undo")
    if target == "before" and _is_half(place, name):
        commit(name, root)
    if undo.exists():
        return {"changed": False}
    part = undo.with_name("undo.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700, parents=True)
    for what, path in _places(place, name).items():
        if path.exists():
            _copy(path, part / what)
    release = _release(place, name)
    if release:
        (part / "release").write_text(release)
    (part / "target").write_text(target)
    part.rename(undo)
    return {"changed": True}


def restore(name: str, kept: str, root: str = "/") -> dict[str, Any]:
    """Put a kept set in its place. `existed`: whether it holds an instance, or that there was none. Raises Refused."""
    place, folder = Path(root), _kept(Path(root), name, kept)
    if not folder.is_dir():
        raise Refused(f"nothing was kept of {name}: there is no {folder}")
    release = _text(folder / "release")
    existed = (folder / "settings").exists()
    if existed and not (place / "opt/llmrack/releases" / release / ".complete").exists():
        raise Refused(f"{name} had release {release or 'without a name'}, which is not on this host any more")
    for what, path in _places(place, name).items():
        if (folder / what).exists():
            _copy(folder / what, path)
        elif what != "unit":  # Other instances share it.
            path.unlink(missing_ok=True)
    if release:
        _point(place, name, release)
    else:
        _link(place, name).unlink(missing_ok=True)
    return {"existed": existed, "release": release, **_settings(_places(place, name)["settings"])}


def commit(name: str, root: str = "/") -> dict[str, Any]:
    """End a roll: what was kept is what a rollback goes to, unless it has the same release as now."""
    place = Path(root)
    undo, before = _kept(place, name, "undo"), _kept(place, name, "before")
    kept = _text(undo / "release")
    if kept and kept != _release(place, name):
        shutil.rmtree(before, ignore_errors=True)
        undo.rename(before)
        return {"changed": True}
    return drop(name, root)


def drop(name: str, root: str = "/") -> dict[str, Any]:
    """Forget what was kept for this roll."""
    undo = _kept(Path(root), name, "undo")
    if not undo.exists():
        return {"changed": False}
    # First the name: half a set must never be taken for one.
    gone = undo.with_name("undo.part")
    shutil.rmtree(gone, ignore_errors=True)
    undo.rename(gone)
    shutil.rmtree(gone)
    return {"changed": True}


def wait(name: str, pid: int, seconds: float) -> dict[str, Any]:
    """Wait until systemd calls the instance active, with another main process than `pid`; 0 for any.

    Returns {"ready", "why"}: not ready when `seconds` have passed, when it stays down, or after LOOPS crashes. The unit
    is of type `notify`: active means that llmnode itself has said that it is ready.
    """
    end = time.monotonic() + seconds
    crashes, last, ended = 0, None, ""
    while True:
        shown = show(name)
        count = int(shown["NRestarts"] or 0)
        # A start by hand sets the count back to 0, at some moment of its own.
        crashes += max(0, count - last) if last is not None else 0
        last = count
        if shown["ActiveState"] == "active" and int(shown["MainPID"] or 0) not in (0, pid):
            return {"ready": True, "why": ""}
        # Systemd forgets it as soon as it starts the next one.
        if shown["Result"] not in ("", "success"):
            ended = f"the last time with {shown['Result']}, status {shown['ExecMainStatus']}"
        why = ""
        # With a job queued it is about to be started: the failure is that of an earlier life.
        if shown["ActiveState"] == "failed" and not int(shown["Job"] or 0):
            why = f"it stays down, having ended {ended}"
        elif crashes >= LOOPS:
            why = f"it crashes again and again, {ended}"
        elif time.monotonic() > end:
            why = f"it is {shown['ActiveState']} ({shown['SubState']}) after {seconds:g} s"
        if why:
            return {"ready": False, "why": f"{why}; {_last_words(name)}"}
        time.sleep(_STEP_S)


def show(name: str) -> dict[str, str]:
    """Properties of the unit, "" for those that systemd does not tell."""
    asked = ["systemctl", "show", f"--property={','.join(_SHOWN)}", f"llmnode@{name}.service"]
    told = subprocess.run(asked, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=False).stdout
    lines = (line.partition("=") for line in told.splitlines())
    return {**dict.fromkeys(_SHOWN, ""), **{key: value for key, _, value in lines}}


def _last_words(name: str) -> str:
    asked = ["journalctl", f"--unit=llmnode@{name}.service", f"--lines={_TAIL}", "--output=cat", "--no-pager"]
    told = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
                          check=False).stdout  # fmt: skip
    return "its journal ends: " + " | ".join(line.strip() for line in told.splitlines()[-_TAIL:])


def _places(root: Path, name: str) -> dict[str, Path]:
    units = root / "etc/systemd/system"
    return {
        "unit": units / "llmnode@.service",
        "devices": units / f"llmnode@{name}.service.d/10-llmrack.conf",
        "settings": root / f"etc/llmrack/llmnode/{name}.toml",
    }


def _kept(root: Path, name: str, which: str) -> Path:
    return root / "opt/llmrack/kept" / name / which


def _is_half(root: Path, name: str) -> bool:
    """Whether a roll was interrupted that was no rollback."""
    undo = _kept(root, name, "undo")
    return undo.exists() and _text(undo / "target") != "before"


def _link(root: Path, name: str) -> Path:
    return root / "opt/llmrack/instances" / name


def _release(root: Path, name: str) -> str:
    """Name of the release that the next start takes. Instances that have no link of their own yet take `current`."""
    link = _link(root, name)
    if not link.is_symlink() and _places(root, name)["settings"].exists():
        link = root / "opt/llmrack/current"
    return link.readlink().name if link.is_symlink() else ""


def _point(root: Path, name: str, release: str) -> None:
    part = _link(root, name).with_name(f".{name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    part.symlink_to(f"/opt/llmrack/releases/{release}")
    part.replace(_link(root, name))


def _copy(source: Path, target: Path) -> None:
    """Owner, group and mode too; the target is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copy2(source, part)
    there = source.stat()
    os.chown(part, there.st_uid, there.st_gid)
    part.replace(target)


def _settings(path: Path) -> dict[str, str]:
    """`config` as llmnode tells it at /node, the first 16 hex digits of the file's SHA-256; and its URL's `scheme`."""
    if not path.exists():
        return {"config": "", "scheme": ""}
    content = path.read_bytes()
    scheme = "https" if re.search(rb"^tls_cert_file\s*=", content, re.MULTILINE) else "http"
    return {"config": hashlib.sha256(content).hexdigest()[:16], "scheme": scheme}


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
