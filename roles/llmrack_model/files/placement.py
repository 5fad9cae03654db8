#!/usr/bin/env python3
"""A host's model files: looks at them, fetches what is missing, hands it on to other hosts, removes what nobody needs.

Owns the model directory. Knows nothing of the catalogue: every file comes with its path, SHA-256 and source. A file is
absent or whole: it arrives as a .part, which an interrupted transfer leaves to be gone on with, and gets its name once
its SHA-256 is right. Beside it lies a stamp (size, time of change, inode): what has not changed is not hashed again.

    placement.py look    < {"files", "folder", "rehash", "check"}         which files are there, and is there room
    placement.py resolve < {"file", "token"}                              the SHA-256 and size of what lies at a source
    placement.py fetch   < {"file", "url", "token", "check"}              bring one file here
    placement.py adopt   < {"file", "check"}                              give a .part that was put here its name
    placement.py serve   < {"files", "address", "port", "token", "idle_s"}  hand files on, until told to stop
    placement.py prune   < {"folder", "keep", "settings", "check"}        remove what nobody needs

Each prints one JSON object, whose `changed` says whether anything did or, with `check`, would. Standard library only,
Python 3.9 or newer. Exit codes: 0 done; 1 refused or failed, with `error` in the object.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import http.server
import json
import os
import re
import shutil
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

UNRESOLVED = "unresolved"
CHUNK = 1 << 20
PATIENCE_S = 60  # without a byte, a connection is taken for dead
TRIES = 5  # in a row that brought nothing new
# What is kept free beside the models, so that logs and settings can still be written.
RESERVE = 256 << 20
PLACED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{12}(-\d{5}-of-\d{5})?\.gguf\Z")
LINKED_SHA256 = re.compile(r'"?([0-9a-f]{64})"?\Z')


class Failed(Exception):
    """It did not work; the message is for the operator, in one sentence, and holds no token."""


def main() -> int:
    verbs = {"look": look, "resolve": resolve, "fetch": fetch, "adopt": adopt, "serve": serve, "prune": prune}
    try:
        print(json.dumps(verbs[sys.argv[1]](**json.load(sys.stdin))))
    except (Failed, OSError) as error:
        print(json.dumps({"error": str(error), "changed": False}))
        return 1
    return 0


# --------------------------------------------------------------------------------------------------- looking


def look(files: list[dict[str, Any]], folder: str, rehash: bool = False, check: bool = False) -> dict[str, Any]:
    """Which of `files` are as they should be, by origin: {"present": [...], "missing": [...], "changed"}.

    Raises Failed when a file that must be on the host already is not, or when what is missing does not fit.
    """
    present, missing = [], []
    for file in files:
        if file["sha256"] == UNRESOLVED:  # with `check`, when nobody has looked at the source yet
            missing += [file] if file["kind"] != "path" else []
        elif verified(file, rehash, stamp=not check):
            present.append(file["origin"])
        elif file["kind"] == "path":
            there = f"is not {file['sha256']}" if Path(file["path"]).exists() else "is not there"
            raise Failed(f"the model {file['model']} must be on the host already, and {file['path']} {there}")
        else:
            missing.append(file)
    require_room(missing, folder)
    return {"present": present, "missing": [file["origin"] for file in missing], "changed": False}


def verified(file: dict[str, Any], rehash: bool = False, stamp: bool = True) -> bool:
    """Whether the file is there and has its SHA-256; hashes it unless its stamp is as it was."""
    try:
        there = _identity(file["path"])
    except FileNotFoundError:
        return False
    if not rehash and _stamped(file["stamp"]) == {**there, "sha256": file["sha256"]}:
        return True
    if file.get("size") is not None and file["size"] != there["size"]:
        return False
    if _hash(file["path"]).hexdigest() != file["sha256"]:
        return False
    if stamp:
        _write_stamp(file)
    return True


def require_room(missing: list[dict[str, Any]], folder: str) -> None:
    """Raise Failed unless what is still to come fits on the disk, with RESERVE to spare. Unknown sizes count as 0."""
    needed = sum(max(0, (file.get("size") or 0) - _size(file["part"])) for file in missing)
    above = Path(folder)
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if needed and free < needed + RESERVE:
        names = ", ".join(sorted({file["model"] for file in missing}))
        raise Failed(
            f"{folder} has {_gb(free)} free, but {names} needs {_gb(needed)} more and {_gb(RESERVE)} must stay free"
        )


def _identity(path: str) -> dict[str, int]:
    found = Path(path).stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}


def _stamped(stamp: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(Path(stamp).read_text())
    except (OSError, ValueError):
        return None
    return found


def _write_stamp(file: dict[str, Any]) -> None:
    Path(file["stamp"]).write_text(json.dumps({**_identity(file["path"]), "sha256": file["sha256"]}) + "\n")


def _hash(path: str) -> Any:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest


def _size(path: str) -> int:
    return Path(path).stat().st_size if Path(path).exists() else 0


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB ({count} bytes)"


# --------------------------------------------------------------------------------------------------- fetching


def resolve(file: dict[str, Any], token: str = "") -> dict[str, Any]:
    """{"origin", "sha256", "size"} of what lies at a source.

    A hub that says the SHA-256 itself is believed (`X-Linked-Etag`, what arrives is checked against it); anything else
    is fetched, as the .part that `fetch` then finds whole.
    """
    if file["kind"] == "path":
        return {"origin": file["origin"], "sha256": _hash(file["path"]).hexdigest(), "size": _size(file["path"])}
    told = _told(file["source"], token) if file["kind"] == "repo" else None
    if told is None:
        Path(file["part"]).parent.mkdir(parents=True, exist_ok=True)
        digest = download(file["source"], token, file)
        told = {"sha256": digest.hexdigest(), "size": _size(file["part"])}
    return {"origin": file["origin"], **told, "changed": True}


def fetch(file: dict[str, Any], url: str, token: str = "", check: bool = False) -> dict[str, Any]:
    """Bring a file here from `url`. What is there stays as it is until the new one is whole. Raises Failed."""
    if not check:
        try:
            digest = download(url, token, file)
        finally:
            with contextlib.suppress(OSError, Failed):
                _say_done(url, token, file["origin"])
        _name(file, digest.hexdigest(), url)
    return {"changed": True, "path": file["path"]}


def adopt(file: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """Give the .part its name, if its SHA-256 is right. Raises Failed."""
    if not check:
        _name(file, _hash(file["part"]).hexdigest(), file["source"])
    return {"changed": True, "path": file["path"]}


def _name(file: dict[str, Any], sha256: str, source: str) -> None:
    part, path = Path(file["part"]), Path(file["path"])
    if sha256 != file["sha256"]:
        part.unlink()  # going on with it would never come right
        raise Failed(f"what came from {source} has SHA-256 {sha256}, but {file['model']} must have {file['sha256']}")
    part.chmod(0o644)
    part.replace(path)
    _sync(path.parent)
    _write_stamp(file)


def download(url: str, token: str, file: dict[str, Any]) -> Any:
    """Fetch `url` into file["part"], going on from what is there; its SHA-256 as a hash object. Raises Failed."""
    part = file["part"]
    digest = _hash(part) if Path(part).exists() else hashlib.sha256()
    failures = 0
    while True:
        before = _size(part)
        try:
            return _go_on(url, token, file, digest)
        except _Anew:
            Path(part).unlink()
            digest = hashlib.sha256()
            failures += 1
            why = "it does not go on from where it was"
        except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError, urllib.error.URLError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429):
                raise Failed(f"{url} answered {error.code} {error.reason}") from None
            failures = 0 if _size(part) > before else failures + 1
            why = str(error) or type(error).__name__
        if failures >= TRIES:
            raise Failed(f"{url} could not be fetched: {why}; {_size(part)} bytes are kept, to go on from them")
        time.sleep(min(0.2 * 2**failures, 5))


class _Anew(Exception):
    """The source does not continue what is there."""


def _go_on(url: str, token: str, file: dict[str, Any], digest: Any) -> Any:
    """One connection's worth of bytes. Raises what urllib does, IncompleteRead when it broke off, and _Anew."""
    have = _size(file["part"])
    wanted = file.get("size")
    if wanted is not None and have > wanted:
        raise _Anew
    if wanted is not None and have == wanted:
        return digest
    try:
        answer = _open(url, token, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if (error.headers.get("Content-Range") or "").rpartition("/")[2] == str(have):
            return digest
        raise _Anew from None
    with answer:
        if have and answer.status != 206:
            raise _Anew
        began = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range") or "")
        if have and not (began and int(began[1]) == have):
            raise _Anew
        length = answer.headers.get("Content-Length")
        if length is None:
            raise Failed(
                f"{url} does not say how long it is, so that a broken transfer could not be told from a whole one"
            )
        total = have + int(length)
        if wanted is not None and total != wanted:
            raise Failed(f"{url} has {total} bytes, but {file['model']} must have {wanted}")
        require_room([{**file, "size": total}], str(Path(file["part"]).parent))
        with Path(file["part"]).open("ab") as out:
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                digest.update(chunk)
            out.flush()
            os.fsync(out.fileno())
    if _size(file["part"]) < total:
        raise http.client.HTTPException(f"it broke off after {_size(file['part'])} of {total} bytes")
    return digest


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token goes no further than the host that it is for."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise Failed(f"{old.netloc} redirects from https to {new.scheme}://{new.netloc}")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            request.remove_header("Authorization")
        return request


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):  # type: ignore[no-untyped-def]
        return None


def _open(url: str, token: str, headers: dict[str, str], method: str = "GET", follow: bool = True) -> Any:
    headers = {"User-Agent": "llmrack", "Accept-Encoding": "identity", **headers}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    opener = urllib.request.build_opener(_Redirects() if follow else _NoRedirects())
    return opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=PATIENCE_S)


def _told(url: str, token: str) -> dict[str, Any] | None:
    """What a hub says of a file in its large-file store: on the first answer, before it redirects to that store."""
    try:
        with _open(url, token, {}, "HEAD", follow=False) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        if not 300 <= error.code < 400:
            raise Failed(f"{url} answered {error.code} {error.reason}") from None
        headers = error.headers
    except urllib.error.URLError as error:
        raise Failed(f"{url} could not be reached: {error.reason}") from None
    sha256 = LINKED_SHA256.match(headers.get("X-Linked-Etag") or "")
    size = headers.get("X-Linked-Size") or ""
    return {"sha256": sha256[1], "size": int(size)} if sha256 and size.isdigit() else None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------- serving

DONE = "/done"


def _say_done(url: str, token: str, origin: str) -> None:
    """Tell another host that nothing more is wanted from it. Sources of other kinds are not spoken to."""
    if url == origin.partition(":")[2]:
        return
    parts = urllib.parse.urlsplit(url)
    _open(f"{parts.scheme}://{parts.netloc}{DONE}", token, {}).close()


def serve(files: list[dict[str, Any]], address: str, port: int, token: str, idle_s: float) -> dict[str, Any]:
    """Hand `files` (each at /SHA256) to whoever has the token, once each, or until nobody asked for `idle_s` seconds.

    The files are opened first, and then root's rights are given up: this process can read nothing else.
    """
    opened = {f"/{file['sha256']}": Path(file["path"]).open("rb") for file in files}  # noqa: SIM115
    server = _Server((address, port), opened, token, len(files))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    while server.left > 0 and server.idle() < idle_s:
        time.sleep(0.1)
    server.shutdown()
    server.server_close()
    return {"changed": False}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], opened: dict[str, Any], token: str, left: int) -> None:
        if ":" in address[0]:
            self.address_family = 10  # AF_INET6
        self.opened, self.token, self.left = opened, token, left
        self.lock = threading.Lock()
        self.busy, self.last = 0, time.monotonic()
        super().__init__(address, _Handler)

    def idle(self) -> float:
        """Seconds since the last request ended; 0 while one runs."""
        return 0.0 if self.busy else time.monotonic() - self.last


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        if not hmac.compare_digest(self.headers.get("Authorization", ""), f"Bearer {self.server.token}"):
            self.send_error(401)
            return
        with self.server.lock:
            self.server.busy += 1
        try:
            self._answer()
        finally:
            with self.server.lock:
                self.server.busy -= 1
                self.server.last = time.monotonic()

    def _answer(self) -> None:
        if self.path == DONE:
            self.send_response(204)
            self.end_headers()
            with self.server.lock:
                self.server.left -= 1
            return
        file = self.server.opened.get(self.path)
        if file is None:
            self.send_error(404)
            return
        size = os.fstat(file.fileno()).st_size
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked and start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        self.connection.sendfile(file, start)

    def log_message(self, *_: Any) -> None:
        """Says nothing: what there is to say, the host that fetches says."""


# ---------------------------------------------------------------------------------------------------- pruning


def prune(folder: str, keep: list[str], settings: list[str], check: bool = False) -> dict[str, Any]:
    """Remove model files that nobody needs, with their stamps, and broken-off transfers: {"removed", "changed"}.

    Kept are the paths in `keep`, those that a file matching one of the patterns `settings` names (an instance may be
    restarted with it, or rolled back to it), and those that a process has open or mapped.
    """
    named = "".join(path.read_text() for pattern in settings for path in sorted(Path("/").glob(pattern.lstrip("/"))))
    used = _in_use()
    doomed = []
    for path in sorted(Path(folder).iterdir()):
        if PLACED.match(path.name):
            needed = str(path) in keep or _stem(path) in named or _key(path) in used
            if not needed:
                doomed += [path, *([stamp] if (stamp := Path(f"{path}.stamp")).exists() else [])]
        elif path.name.startswith(".") and path.name.endswith(".part") and _key(path) not in used:
            doomed.append(path)
    if not check:
        for path in doomed:
            path.unlink()
    return {"removed": [str(path) for path in doomed], "changed": bool(doomed)}


def _stem(path: Path) -> str:
    """A file's path up to which part of a split model it is: settings name the first part alone."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf\Z", "", str(path))


def _key(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _in_use() -> set[tuple[int, int]]:
    """(device, inode) of every file that a process has open or mapped. One without a name is no matter."""
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for handle in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.add(_key(handle))
        with contextlib.suppress(OSError):
            for line in (process / "maps").read_text(errors="replace").splitlines():
                fields = line.split(None, 5)
                if len(fields) == 6 and fields[5].endswith(".gguf"):
                    with contextlib.suppress(OSError):
                        used.add(_key(Path(fields[5])))
    return used


if __name__ == "__main__":
    sys.exit(main())
