#!/usr/bin/env python3
"""What a gate has and runs with, as files: read before a deployment, and kept once the gate has taken it.

Owns FOLDER, copies of the units and settings that the running gate was last seen to have taken. What lies in their
places may be newer: a deployment that was interrupted has written it, and no gate has read it yet. Opens no connection:
which of the two runs, the gate says by the digest of its settings.

    kept.py read < {"files": [PATH], "settings": PATH, "links": [PATH], "folder": FOLDER}
    kept.py keep < {"files": [PATH], "folder": FOLDER}      copies them; {"changed"}

`read` prints {"sets": [SET, SET], "links": {NAME: what it points at}}: first what was kept, then what is in place. A
SET has `files`, their texts by path, "" for one that is not there; `config`, the digest by which the gate calls the
settings; and `here`, the URL at which it answers with them. A file that was not kept is the one in place. Standard
library only.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    print(json.dumps({"read": read, "keep": keep}[sys.argv[1]](**json.load(sys.stdin))))
    return 0


def read(files: list[str], settings: str, links: list[str], folder: str) -> dict[str, Any]:
    in_place = {path: _text(Path(path)) for path in files}
    kept = {path: _text(_copy(path, folder)) or text for path, text in in_place.items()}
    return {
        "sets": [{"files": texts, **_told(texts[settings])} for texts in (kept, in_place)],
        "links": {Path(path).name: _target(Path(path)) for path in links},
    }


def keep(files: list[str], folder: str) -> dict[str, bool]:
    changed = False
    for path in files:
        text, copy = _text(Path(path)), _copy(path, folder)
        if text == _text(copy):
            continue
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = copy.with_name(f".{copy.name}.part")
        part.write_bytes(text.encode())
        part.replace(copy)
        changed = True
    return {"changed": changed}


def _told(settings: str) -> dict[str, str]:
    """What a gate with these settings says of them, and where."""
    port = re.search(r"(?m)^port = (\d+)", settings)
    scheme = "https" if re.search(r"(?m)^tls_cert_file = ", settings) else "http"
    return {
        "config": hashlib.sha256(settings.encode()).hexdigest()[:16] if settings else "",
        "here": f"{scheme}://127.0.0.1:{port[1]}" if port else "",
    }


def _copy(path: str, folder: str) -> Path:
    return Path(folder, Path(path).name)


def _text(path: Path) -> str:
    return path.read_bytes().decode() if path.exists() else ""


def _target(link: Path) -> str:
    return link.readlink().name if link.is_symlink() else ""


if __name__ == "__main__":
    sys.exit(main())
