"""How the console's files get to a browser, and what the page may do there."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import Start
from tests.processes import free_port, wait_for
from tests.system.fleet import Fleet

WEB = Path(__file__).parents[2] / "llmgate" / "web"
FILES = sorted(path.name for path in WEB.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


@pytest.fixture(scope="module")
def client(quiet: Fleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=quiet.gate.url, timeout=60) as client:
        yield client


def test_every_file_comes_whole_and_under_the_strict_policy(client: httpx.Client) -> None:
    for path, name in [("/", "index.html"), *((f"/console/{name}", name) for name in FILES)]:
        for encoding in ("gzip", "identity"):
            answer = client.get(path, headers={"accept-encoding": encoding})
            assert answer.status_code == 200 and answer.content == (WEB / name).read_bytes()
            assert answer.headers.get("content-encoding", "identity") == encoding
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; ")
            assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "private, no-cache"
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == answer.headers["etag"]
        assert client.head(path).status_code == 200
    packed = client.stream("GET", "/console/main.js", headers={"accept-encoding": "gzip"})
    with packed as answer:
        assert gzip.decompress(b"".join(answer.iter_raw())) == (WEB / "main.js").read_bytes()


@pytest.mark.parametrize("name", ["../app.py", "..%2fapp.py", "%2e%2e/__init__.py", "nothing.js", "index.html%00", ""])
def test_nothing_else_is_served(client: httpx.Client, name: str) -> None:
    assert client.get(f"/console/{name}").status_code == 404


def test_nothing_comes_from_elsewhere_and_nobody_writes_html() -> None:
    for name in FILES:
        text = (WEB / name).read_text()
        addresses = set(re.findall(r"""["'(](https?:)?//[\w.]+""", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses or name in ("dom.js", "mark.svg"), (name, addresses)
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in text, (name, word)
        assert not re.search(r"""\sstyle=|\son\w+=["']""", text) or not name.endswith(".html")


def test_scripts_are_small_modules_that_all_others_can_find() -> None:
    for name in SCRIPTS:
        text = (WEB / name).read_text()
        assert text.startswith("/**"), f"{name} says what it owns"
        assert len(text.splitlines()) < 300, name
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(SCRIPTS), name


def test_the_page_learns_whether_keys_are_wanted_and_the_admin_api_is_here(start: Start, tmp_path: Path) -> None:
    listing = tmp_path / "nodes.toml"
    listing.write_text('[[nodes]]\nname = "a"\nurl = "http://127.0.0.1:9"\n')
    admin = f"127.0.0.1:{free_port()}"
    gate = start(
        "llmgate", "--nodes-file", str(listing), "--state-dir", str(tmp_path), "--require-keys", "false",
        "--admin-listen", admin, port=free_port(),
    )  # fmt: skip
    answer = wait_for(lambda: gate.get("/"), "the page")
    assert '<meta name="llmrack-keys" content="none">' in answer.text
    for url, has_admin in ((gate.url, False), (f"http://{admin}", True)):
        who = httpx.get(url + "/v1/key", timeout=60).json()
        assert who["anonymous"] is True and who["role"] == "user" and who["admin_api"] is has_admin
        assert httpx.get(url + "/console/main.js", timeout=60).status_code == 200
