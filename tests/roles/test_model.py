"""Models: what the catalogue comes to, and how files get to a host whole or not at all, over real HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.roles.programs import load

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "roles/llmrack_model/files"
BODY = bytes(range(256)) * 4096 + b"end"
SHA256 = hashlib.sha256(BODY).hexdigest()
REVISION = "a" * 40
TOKEN = "hub-token-of-the-test"


catalogue, placement = load("llmrack_model", "catalogue"), load("llmrack_model", "placement")


class Source(http.server.ThreadingHTTPServer):
    """A web server that can break off, ignore ranges, redirect, and want a token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.bodies: dict[str, bytes] = {"/m.gguf": BODY}
        self.breaks_after: list[int] = []  # bytes of each of the next answers
        self.ranges = True
        self.redirects: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.token = ""
        self.seen: list[tuple[str, str, str, str]] = []  # method, path, range, authorization
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Source

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        server.seen.append((self.command, self.path, asked, self.headers.get("Authorization", "")))
        if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
            self.send_error(401)
            return
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = server.bodies.get(self.path)
        if content is None:
            self.send_error(404)
            return
        found = re.fullmatch(r"bytes=(\d+)-", asked) if server.ranges else None
        start = int(found[1]) if found else 0
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if body:
            rest = rest[: server.breaks_after.pop(0)] if server.breaks_after else rest
            self.wfile.write(rest)
            server.sent += len(rest)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def running() -> Iterator[Source]:
    source = Source()
    thread = threading.Thread(target=source.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield source
    finally:
        source.shutdown()
        thread.join()
        source.server_close()


@pytest.fixture
def source() -> Iterator[Source]:
    with running() as server:
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))


def file_at(source: Source, folder: Path, sha256: str = SHA256, size: int | None = None) -> dict[str, Any]:
    models = {"m": {"url": f"{source.url}/m.gguf", "sha256": sha256}}
    (file,) = resolve(models, folder)["models"]["m"]["files"]
    return {**file, "size": size}


def resolve(models: dict[str, Any], folder: Path, endpoint: str = "http://hub.invalid") -> dict[str, Any]:
    told: dict[str, Any] = catalogue.resolve(models, str(folder), str(folder / "lock.json"), endpoint)
    return told


def fetch(file: dict[str, Any], url: str = "", token: str = "") -> dict[str, Any]:
    told: dict[str, Any] = placement.fetch(file, url or file["source"], token)
    return told


# ------------------------------------------------------------------------------------------------- transfers


def test_a_fetched_file_is_whole_and_not_fetched_again(source: Source, tmp_path: Path) -> None:
    file = file_at(source, tmp_path)
    assert placement.look([file], str(tmp_path))["missing"] == [file["origin"]]
    assert fetch(file)["changed"]
    assert Path(file["path"]).read_bytes() == BODY
    assert not Path(file["part"]).exists()
    assert placement.look([file], str(tmp_path)) == {"present": [file["origin"]], "missing": [], "changed": False}
    assert source.sent == len(BODY)


def test_a_transfer_that_breaks_off_goes_on_from_where_it_was(source: Source, tmp_path: Path) -> None:
    source.breaks_after = [300_000, 400_000]
    fetch(file_at(source, tmp_path))
    assert source.sent == len(BODY)
    assert [asked for _, _, asked, _ in source.seen] == ["", "bytes=300000-", "bytes=700000-"]


def test_a_transfer_that_brings_nothing_ends_and_a_later_one_goes_on(source: Source, tmp_path: Path) -> None:
    file = file_at(source, tmp_path)
    source.breaks_after = [5000, *[0] * placement.TRIES]
    with pytest.raises(placement.Failed, match="5000 bytes are kept"):
        fetch(file)
    assert not Path(file["path"]).exists()
    fetch(file)
    assert Path(file["path"]).read_bytes() == BODY
    assert source.sent == len(BODY)


def test_a_source_without_ranges_is_fetched_anew(source: Source, tmp_path: Path) -> None:
    source.ranges, source.breaks_after = False, [1000]
    file = file_at(source, tmp_path)
    fetch(file)
    assert Path(file["path"]).read_bytes() == BODY


def test_a_wrong_checksum_leaves_what_was_there(source: Source, tmp_path: Path) -> None:
    file = file_at(source, tmp_path, sha256="0" * 64)
    Path(file["path"]).write_bytes(b"as it was")
    with pytest.raises(placement.Failed, match=f"has SHA-256 {SHA256}, but m must have {'0' * 64}"):
        fetch(file)
    assert Path(file["path"]).read_bytes() == b"as it was"
    assert not Path(file["part"]).exists()


def test_a_part_that_is_of_something_else_is_found_out(source: Source, tmp_path: Path) -> None:
    file = file_at(source, tmp_path)
    Path(file["part"]).write_bytes(b"of an older version")
    with pytest.raises(placement.Failed, match="SHA-256"):
        fetch(file)
    fetch(file)
    assert Path(file["path"]).read_bytes() == BODY


def test_a_missing_file_is_named_with_its_status(source: Source, tmp_path: Path) -> None:
    file = {**file_at(source, tmp_path), "source": f"{source.url}/other.gguf"}
    with pytest.raises(placement.Failed, match=r"/other\.gguf answered 404"):
        fetch(file)


def test_a_size_that_is_not_the_locked_one_is_refused_before_the_transfer(source: Source, tmp_path: Path) -> None:
    with pytest.raises(placement.Failed, match=f"has {len(BODY)} bytes, but m must have 7"):
        fetch(file_at(source, tmp_path, size=7))
    assert not list(tmp_path.glob(".*.part"))


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(source: Source, tmp_path: Path) -> None:
    file = file_at(source, tmp_path, size=10**18)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(placement.Failed, match=r"has .* free, but m needs 1000000000\.0 GB") as refused:
        placement.look([file], str(tmp_path / "not" / "there"))
    told = re.search(r"has [\d.]+ GB \((\d+) bytes\)", str(refused.value))
    assert told and abs(int(told[1]) - free) < 10**10


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_disk_that_is_full_is_refused_before_anything_is_written(source: Source, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        file = file_at(source, small)  # of unknown size, until the source says it
        with pytest.raises(placement.Failed, match=r"0\.0 GB \(524288 bytes\) free, but m needs .*1048579 bytes"):
            fetch(file)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_unchanged_file_is_not_hashed_again(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_at(source, tmp_path)
    fetch(file)
    hashed: list[str] = []
    really = placement._hash
    monkeypatch.setattr(placement, "_hash", lambda path: hashed.append(path) or really(path))
    assert placement.verified(file) and not hashed
    os.utime(file["path"])
    assert placement.verified(file) and hashed == [file["path"]]
    Path(file["path"]).write_bytes(BODY[:-1] + b"!")
    assert not placement.verified(file)


# ---------------------------------------------------------------------------------------------------- the hub


def test_a_token_stays_with_its_hub(source: Source, tmp_path: Path) -> None:
    with running() as store:
        store.bodies = {"/blob": BODY}
        path = f"/org/name/resolve/{REVISION}/m.gguf"
        source.token, source.redirects = TOKEN, {path: f"{store.url}/blob"}
        source.headers = {"X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": str(len(BODY))}
        models = {"m": {"repo": "org/name", "revision": REVISION, "file": "m.gguf"}}
        (file,) = resolve(models, tmp_path, source.url)["unresolved"]
        found = placement.resolve(file, TOKEN)
        assert (found["sha256"], found["size"], store.sent) == (SHA256, len(BODY), 0)
        catalogue.record(str(tmp_path / "lock.json"), [found])
        (file,) = resolve(models, tmp_path, source.url)["models"]["m"]["files"]
        fetch(file, token=TOKEN)
        assert Path(file["path"]).read_bytes() == BODY
        assert [authorization for *_, authorization in store.seen] == [""]
        assert all(authorization == f"Bearer {TOKEN}" for *_, authorization in source.seen)


def test_a_refused_token_is_said_without_the_token(source: Source, tmp_path: Path) -> None:
    source.token = "another"
    models = {"m": {"repo": "org/name", "revision": REVISION, "file": "m.gguf"}}
    (file,) = resolve(models, tmp_path, source.url)["unresolved"]
    with pytest.raises(placement.Failed, match="answered 401") as refused:
        placement.resolve(file, TOKEN)
    assert TOKEN not in str(refused.value)


def test_a_url_without_a_checksum_is_fetched_once_and_locked(source: Source, tmp_path: Path) -> None:
    models = {"m": {"url": f"{source.url}/m.gguf"}}
    (file,) = resolve(models, tmp_path)["unresolved"]
    catalogue.record(str(tmp_path / "lock.json"), [placement.resolve(file)])
    told = resolve(models, tmp_path)
    assert told["unresolved"] == [] and told["models"]["m"]["sha256"] == SHA256
    fetch(told["models"]["m"]["files"][0])
    assert source.sent == len(BODY)


# --------------------------------------------------------------------------------------------- host to host


def serving(file: dict[str, Any], port: int, idle_s: float = 20) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, str(FILES / "placement.py"), "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    order = {"files": [file], "address": "127.0.0.1", "port": port, "token": "once", "idle_s": idle_s}
    assert server.stdin
    server.stdin.write(json.dumps(order))
    server.stdin.close()
    return server


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str, token: str) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    for _ in range(1500):
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            time.sleep(0.02)
    raise AssertionError(f"{url} does not answer")


def test_a_host_hands_its_file_to_whoever_has_the_token_and_then_stops(source: Source, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (file_at(source, tmp_path / name) for name in ("a", "b"))
    fetch(first)
    port = free_port()
    server = serving(first, port)
    try:
        url = f"http://127.0.0.1:{port}/{SHA256}"
        assert answers(url, "wrong") == 401
        assert answers(f"http://127.0.0.1:{port}/etc/passwd", "once") == 404
        Path(second["part"]).write_bytes(BODY[:70_000])
        fetch(second, url, "once")
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
    assert Path(second["path"]).read_bytes() == BODY
    assert source.sent == len(BODY)


def test_a_host_that_nobody_asks_stops(source: Source, tmp_path: Path) -> None:
    file = file_at(source, tmp_path)
    fetch(file)
    server = serving(file, free_port(), idle_s=0.2)
    try:
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(("hosts", "rounds"), [(1, 1), (2, 2), (3, 3), (4, 3), (16, 5), (17, 6)])
def test_a_file_leaves_its_source_once_and_reaches_all_in_log2_rounds(hosts: int, rounds: int) -> None:
    names = [f"h{number:02}" for number in range(hosts)]
    planned = catalogue.plan({name: {"present": [], "missing": ["/m"]} for name in names})["rounds"]
    assert len(planned) == rounds
    having: set[str] = set()
    from_source = 0
    for tasks in planned:
        givers = [task["fetches"]["/m"] for task in tasks.values() if "/m" in task["fetches"]]
        from_source += givers.count(None)
        given = [giver for giver in givers if giver]
        assert set(given) <= having and len(set(given)) == len(given)
        assert {name for name, task in tasks.items() if task["serves"]} == set(given)
        having |= {name for name, task in tasks.items() if "/m" in task["fetches"]}
    assert having == set(names) and from_source == 1


def test_nothing_leaves_the_source_when_a_host_has_it_and_nothing_is_planned_when_all_have() -> None:
    hosts: dict[str, Any] = {"a": {"present": ["/m"], "missing": []}, "b": {"present": [], "missing": ["/m"]}}
    assert catalogue.plan(hosts)["rounds"] == [
        {"b": {"fetches": {"/m": "a"}, "serves": []}, "a": {"fetches": {}, "serves": ["/m"]}}
    ]
    assert catalogue.plan({"a": hosts["a"]})["rounds"] == []


# -------------------------------------------------------------------------------------------------- catalogue


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "llmrack_models.m must have one of src, path, url or repo; it has none of them"),
        ({"src": "/a", "url": "http://b"}, "it has src and url"),
        ({"path": "a.gguf"}, "llmrack_models.m.path must be an absolute path; it is 'a.gguf'"),
        ({"url": "ftp://a"}, "must begin with http:// or https://"),
        ({"repo": "a/b", "file": "c"}, "must name its revision"),
        ({"repo": "a/b", "file": "c", "revision": "main"}, r"must be a commit \(40 hex digits\)"),
        ({"url": "http://a", "sha256": "12"}, "sha256 must be 64 hex digits; it is '12'"),
        ({"url": "http://a/m-00001-of-00002.gguf", "sha256": "0" * 64}, "must hold 2, one a file; it holds 1"),
        ({"url": "http://a/m-00002-of-00002.gguf"}, "name the first file"),
    ],
)
def test_an_entry_that_cannot_be_used_is_refused_by_name(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(catalogue.Refused, match=said):
        resolve({"m": entry}, tmp_path)


def test_a_split_model_keeps_the_names_that_llama_looks_for(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"big-{number:05}-of-00002.gguf").write_bytes(b"%d" % number)
    model = resolve({"m": {"src": str(tmp_path / "big-00001-of-00002.gguf")}}, tmp_path)["models"]["m"]
    names = [Path(file["path"]).name for file in model["files"]]
    stem = f"m-{model['sha256'][:12]}"
    assert names == [f"{stem}-00001-of-00002.gguf", f"{stem}-00002-of-00002.gguf"]
    assert Path(model["path"]).name == names[0] and model["size"] == 2


def test_a_file_on_the_controller_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(BODY)
    models = {"m": {"src": str(tmp_path / "m.gguf")}}
    assert resolve(models, tmp_path)["changed"]
    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "_hash", lambda path: pytest.fail("hashed again"))
        again = resolve(models, tmp_path)
    assert not again["changed"] and again["models"]["m"]["sha256"] == SHA256
    (tmp_path / "m.gguf").write_bytes(BODY + b"more")
    assert resolve(models, tmp_path)["models"]["m"]["sha256"] != SHA256


def test_a_model_on_the_host_is_checked_and_never_copied(tmp_path: Path) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(BODY)
    models = {"m": {"path": str(own), "sha256": SHA256}}
    model = resolve(models, tmp_path / "models")["models"]["m"]
    (tmp_path / "models").mkdir(exist_ok=True)
    assert model["path"] == str(own)
    assert placement.look(model["files"], str(tmp_path / "models"))["missing"] == []
    own.write_bytes(b"another")
    with pytest.raises(placement.Failed, match="must be on the host already"):
        placement.look(model["files"], str(tmp_path / "models"))


# ---------------------------------------------------------------------------------------------------- pruning


def test_pruning_takes_only_what_nobody_needs(tmp_path: Path) -> None:
    folder, settings, kept = tmp_path / "models", tmp_path / "settings", tmp_path / "kept/gpu0/before"
    for made in (folder, settings, kept):
        made.mkdir(parents=True)
    named = [f"{settings}/*.toml", f"{tmp_path}/kept/*/*/settings"]
    wanted, configured, former, opened, old = (folder / f"m-{letter * 12}.gguf" for letter in "abcdf")
    split = [folder / f"s-{'e' * 12}-0000{number}-of-00002.gguf" for number in (1, 2)]
    foreign = folder / "notes.gguf"
    for path in (wanted, configured, former, opened, old, foreign, *split, Path(f"{old}.stamp"), folder / ".m-1.part"):
        path.write_bytes(b"x")
    (settings / "gpu0.toml").write_text(f'model = "{configured}"\nother = "{split[0]}"\n')
    (kept / "settings").write_text(f'model = "{former}"\n')  # what a rollback goes to
    with opened.open():
        planned = placement.prune(str(folder), [str(wanted)], named, check=True)
        assert old.exists() and planned["changed"]
        done = placement.prune(str(folder), [str(wanted)], named)
    assert done == planned
    assert set(done["removed"]) == {str(old), f"{old}.stamp", str(folder / ".m-1.part")}
    assert all(path.exists() for path in (wanted, configured, former, opened, foreign, *split)) and not old.exists()
    assert not placement.prune(str(folder), [str(wanted), str(opened)], named)["changed"]


def test_pruning_reads_the_settings_of_instances_and_those_of_their_rollbacks() -> None:
    patterns = re.findall(r"'(/[^']+)'", (ROOT / "roles/llmrack_model/tasks/prune.yml").read_text())
    instance = load("llmrack_orchestrate", "instance")
    kept = [instance._kept(Path("/"), "gpu0", which) / "settings" for which in ("before", "undo")]
    for path in (instance._places(Path("/"), "gpu0")["settings"], *kept):
        assert any(path.match(pattern) for pattern in patterns), path


# ------------------------------------------------------------------------------------------------ the playbook


class Hosts:
    """Three hosts that are folders and ports of this machine, and an inventory of them."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder = folder
        self.models: dict[str, Any] = {"m": {"url": f"{source.url}/m.gguf"}}
        folder.chmod(0o755)

    def play(self, *arguments: str) -> tuple[int, str, dict[str, int]]:
        """Exit code, what was said (in one line), and the number of changed tasks of each host."""
        hosts = {
            name: {
                "llmrack_model_dir": str(self.folder / name),
                "llmrack_model_port": free_port(),
                "llmrack_model_python": sys.executable,
                "llmrack_model_wanted": ["m"],
                "llmnode_instances": [{"name": "a", "model": "m", "port": 8100}],
            }
            for name in ("h1", "h2", "h3")
        }
        common = {"ansible_connection": "local", "ansible_host": "127.0.0.1", "llmrack_models": self.models,
                  "llmrack_model_listen": "127.0.0.1", "ansible_python_interpreter": sys.executable,
                  "ansible_become": False}  # fmt: skip
        groups = {"llmnode": {"hosts": hosts, "vars": common}, "llmgate": {"hosts": {"h1": None}}}
        (self.folder / "hosts.yml").write_text(json.dumps(groups))
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self.folder / "hosts.yml")]
        done = subprocess.run(
            [*command, "playbooks/model.yml", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=250
        )
        changed = re.findall(r"^(\S+)\s+:.*?changed=(\d+)", done.stdout, re.MULTILINE)
        return done.returncode, " ".join(done.stdout.split()), {host: int(count) for host, count in changed}

    def models_of(self, host: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self.folder / host).glob("*.gguf"))]


@pytest.mark.skipif(os.geteuid() != 0, reason="the role makes directories that root owns")
def test_a_play_takes_a_model_from_its_source_once_and_a_second_changes_nothing(source: Source, tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, source)
    code, said, changed = hosts.play("--check", "--diff")
    assert code == 0, said
    assert all(changed.values()) and source.sent == 0 and not list(tmp_path.glob("h*/*"))

    code, said, _ = hosts.play()
    assert code == 0, said
    assert [hosts.models_of(host) for host in ("h1", "h2", "h3")] == [[BODY]] * 3
    assert source.sent == len(BODY)
    assert json.loads((tmp_path / "models.lock.json").read_text())[f"url:{source.url}/m.gguf"]["sha256"] == SHA256

    code, said, changed = hosts.play()
    assert (code, changed) == (0, {"h1": 0, "h2": 0, "h3": 0}), said

    (broken,) = (tmp_path / "h2").glob("*.gguf")
    kept = broken.stat()
    broken.write_bytes(BODY[:-1] + b"?")
    os.utime(broken, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # so that only hashing tells
    code, said, _ = hosts.play("--tags", "verify")
    assert code != 0 and f"h2: absent or broken: {broken}" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="the role makes directories that root owns")
def test_a_play_with_a_wrong_checksum_places_nothing_anywhere(source: Source, tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, source)
    hosts.models["m"]["sha256"] = "0" * 64
    code, said, _ = hosts.play()
    assert code != 0 and f"has SHA-256 {SHA256}, but m must have {'0' * 64}" in said
    assert [hosts.models_of(host) for host in ("h1", "h2", "h3")] == [[]] * 3
    assert source.sent == len(BODY)


@pytest.mark.skipif(os.geteuid() != 0, reason="the role makes directories that root owns")
@pytest.mark.parametrize("known", [False, True])
def test_a_play_that_the_hub_refuses_does_not_show_the_token(source: Source, tmp_path: Path, known: bool) -> None:
    source.token = "another"
    hosts = Hosts(tmp_path, source)
    hosts.models["m"] = {"repo": "org/name", "revision": REVISION, "file": "m.gguf"}
    if known:  # then the transfer is what is refused, not the look at it
        hosts.models["m"]["sha256"] = SHA256
    given = {"llmrack_model_token": TOKEN, "llmrack_model_endpoint": source.url}
    code, said, _ = hosts.play("-vvv", "--diff", "-e", json.dumps(given))
    assert code != 0 and "m.gguf answered 401" in said
    assert all(authorization == f"Bearer {TOKEN}" for *_, authorization in source.seen)
    # -e itself is no secret place; Ansible shows neither it nor what the roles make of it.
    assert TOKEN not in said
