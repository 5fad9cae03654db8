"""What holds for every answer: where the admin API is, whose pages may ask, and the headers that all have."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest

from llmgate.doorman import household
from llmgate.listener import passed_sockets
from llmgate.settings import Settings, admin_address, check_origins
from llmnode.service.settings import SettingError
from tests.certificates import Authority
from tests.conftest import Start
from tests.gate.conftest import FAST, GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import free_port, wait_for

Mock = Callable[..., MockNode]
Apart = tuple[GateUnderTest, str, MockNode]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
PAGE = "https://chat.example.org"


@pytest.fixture(scope="module")
def apart(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """A gate of two workers whose admin API has an address of its own, which comes second; "*" may use the first."""
    gate = GateUnderTest(start_module, tmp_path_factory.mktemp("gate"))
    where = f"127.0.0.1:{free_port()}"
    with MockNode("a") as node:
        gate.list_nodes(node)
        gate.run("--admin-listen", where, "--workers", "2", "--cors-origins", f"*,{PAGE}")
        yield gate, f"http://{where}", node


def key(gate: GateUnderTest) -> dict[str, str]:
    return {"authorization": f"Bearer {gate.secret}"}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
@pytest.mark.parametrize(
    "path", ["/admin", "/admin/nodes", "/admin/nodes/a", "/admin/nodes/a/drain", "/admin%2fnodes", "/%61dmin/nodes"]
)
def test_the_admin_api_is_not_there_at_the_public_address(apart: Apart, path: str, method: str) -> None:
    gate, *_ = apart
    here = httpx.request(method, gate.url + path, headers=key(gate), json={"owner": "x"})
    nothing = httpx.request(method, gate.url + "/nothing", headers=key(gate), json={"owner": "x"})
    assert here.status_code == 404
    if method != "HEAD":
        assert here.json()["error"] | {"message": ""} == nothing.json()["error"] | {"message": ""}


def test_everything_is_there_at_the_admin_address(apart: Apart) -> None:
    gate, admin, _ = apart
    with httpx.Client(base_url=admin, headers=key(gate)) as client:
        assert client.get("/admin/nodes").json()["nodes"][0]["name"] == "a"
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert client.get(path).status_code == 200
    assert httpx.get(admin + "/admin/nodes").status_code == 401
    assert gate.chat().status_code == 200


def test_a_reload_moves_the_admin_api_and_takes_it_away_and_no_request_is_lost(gate: GateUnderTest, mock: Mock) -> None:
    node = mock("a")
    gate.list_nodes(node)
    config = gate.folder / "gate.toml"
    first, second = free_port(), free_port()
    config.write_text("")
    gate.run("--config", str(config))
    assert gate.program is not None

    def generation(number: int, admin: int | None) -> None:
        config.write_text(f'admin_listen = "127.0.0.1:{admin}"\n' if admin else "")
        gate.program.signal(signal.SIGHUP)  # type: ignore[union-attr]
        wait_for(lambda: httpx.get(gate.url + "/health").json()["generation"] == number, f"generation {number}")
        assert gate.program is not None
        wait_for(lambda: gate.program and gate.program.output().count("goes on with") == number - 1, "the exec")

    def status(port: int) -> int:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/admin/nodes", headers=key(gate), timeout=60).status_code
        except httpx.ConnectError:
            return 0

    public = gate.program.port
    assert (status(public), status(first)) == (200, 0)
    generation(2, first)
    assert (status(public), status(first)) == (404, 200)
    generation(3, first)
    assert (status(public), status(first)) == (404, 200)
    node.fault, node.hold = "wait", "stream"
    body = CHAT | {"stream": True}
    with httpx.stream("POST", f"http://127.0.0.1:{first}/v1/chat/completions", json=body, headers=key(gate)) as stream:
        wait_for(lambda: node.open == 1, "the stream to run")
        generation(4, second)
        wait_for(lambda: status(first) == 0, "the old address to be closed")
        assert (status(public), status(second)) == (404, 200)
        node.hold = ""
        stream.read()
        assert stream.text.endswith("data: [DONE]\n\n")
    generation(5, None)
    wait_for(lambda: status(second) == 0, "the second address to be closed")
    assert status(public) == 200
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config.write_text(f'admin_listen = "127.0.0.1:{taken.getsockname()[1]}"\n')
        gate.program.signal(signal.SIGHUP)
        wait_for(lambda: gate.program and "generation 6 is refused" in gate.program.output(), "the refusal")
    assert status(public) == 200


PASS_SOCKETS = """
import fcntl, os, sys
# Out of the way first, as each may be where the other has to go.
for place, kept in enumerate([fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]], 3):
    os.dup2(kept, place)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=sys.argv[3])
os.execv(sys.executable, [sys.executable, "-m", "llmgate", *sys.argv[4:]])
"""


@pytest.mark.parametrize("order", ["llmgate.socket:llmgate.socket", "admin:llmgate.socket", ""])
def test_systemd_passes_both_sockets_and_they_outlive_the_gate(gate: GateUnderTest, mock: Mock, order: str) -> None:
    gate.list_nodes(mock("a"))
    gate.secret = gate.create_key("tester", "--admin")
    arguments = ["--nodes-file", str(gate.nodes_file), "--state-dir", str(gate.state), *FAST]
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_server(("127.0.0.1", 0)) as admin:
        fds = [door.fileno(), admin.fileno()] if "admin" not in order else [admin.fileno(), door.fileno()]
        command = [sys.executable, "-c", PASS_SOCKETS, *map(str, fds), order, "serve", *arguments]
        named = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, timeout=60)
        assert named.returncode == 2
        assert "admin_listen is not set, and systemd has opened a socket for it" in named.stderr
        command += ["--admin-listen", "127.0.0.1:1"]
        for _ in range(2):
            process = subprocess.Popen(command, pass_fds=fds)
            try:
                # Connections wait in the sockets until there is somebody.
                for sock, expected in ((admin, 200), (door, 404)):
                    url = f"http://127.0.0.1:{sock.getsockname()[1]}/admin/nodes"
                    assert httpx.get(url, headers=key(gate), timeout=60).status_code == expected
            finally:
                process.terminate()
                assert process.wait(60) == 0


def test_sockets_that_are_none_or_too_many_are_refused() -> None:
    pid = {"LISTEN_PID": str(os.getpid())}
    for wrong in ({"LISTEN_FDS": "3"}, {"LISTEN_FDS": "0"}, {"LISTEN_FDS": "x"}, {}):
        with pytest.raises(SettingError, match="were passed to it"):
            passed_sockets(pid | wrong)
    assert passed_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "2"}).door is None


def test_an_address_that_is_none_is_named() -> None:
    assert admin_address(Settings()) is None
    assert admin_address(Settings(admin_listen="127.0.0.1:9000")) == ("127.0.0.1", 9000)
    assert admin_address(Settings(admin_listen="[::1]:9000")) == ("::1", 9000)
    for wrong in ("9000", ":9000", "a:", "a:0", "a:65536", "a:9x", "::1:9000", "a:٣"):
        with pytest.raises(SettingError, match="admin_listen must be HOST:PORT"):
            admin_address(Settings(admin_listen=wrong))


def test_an_origin_that_is_none_is_named() -> None:
    check_origins(
        Settings(cors_origins=("*", PAGE, "http://localhost:3000", "http://[::1]:80", "chrome-extension://abc"))
    )
    for wrong in (
        PAGE + "/",
        "chat.example.org",
        "https://",
        "null",
        "https://Chat.example.org",
        "https://*.example.org",
    ):
        with pytest.raises(SettingError, match="cors_origins must be"):
            check_origins(Settings(cors_origins=(wrong,)))


def preflight(url: str, origin: str, method: str = "POST", **more: str) -> httpx.Response:
    return httpx.options(url, headers={"origin": origin, "access-control-request-method": method, **more})


def test_a_page_of_any_origin_may_use_the_public_api_and_learns_what_it_needs(apart: Apart) -> None:
    gate, *_ = apart
    url = gate.url + "/v1/chat/completions"
    wanted = "authorization,content-type,x-stainless-os, X-API-Key,bad name,<b>"
    asked = preflight(url, "https://any.example", **{"access-control-request-headers": wanted})
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["access-control-allow-origin"] == "*"
    assert asked.headers["access-control-allow-headers"] == "authorization, content-type, x-stainless-os, x-api-key"
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in asked.headers
    for body in (CHAT, CHAT | {"stream": True}, {"model": "nobody"}):
        answer = httpx.post(url, json=body, headers=key(gate) | {"origin": "https://any.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "x-llmrack-node", "x-ratelimit-remaining-tokens", "retry-after"} <= set(exposed)
    wrong = httpx.post(url, json=CHAT, headers={"origin": "https://any.example", "authorization": "Bearer x"})
    assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (401, "*"), "a page may read why"
    plain = httpx.post(url, json=CHAT, headers=key(gate))
    assert "access-control-allow-origin" not in plain.headers


def test_the_admin_api_takes_origins_by_name_only(apart: Apart) -> None:
    gate, admin, _ = apart
    url = admin + "/admin/nodes"
    named = httpx.get(url, headers=key(gate) | {"origin": PAGE})
    assert (named.status_code, named.headers["access-control-allow-origin"]) == (200, PAGE)
    assert named.headers["vary"] == "origin"
    assert preflight(url + "/a/drain", PAGE).headers["access-control-allow-origin"] == PAGE
    other = httpx.get(url, headers=key(gate) | {"origin": "https://any.example"})
    assert "access-control-allow-origin" not in other.headers
    refused = preflight(url + "/a/drain", "https://any.example")
    assert refused.status_code == 405 and "access-control-allow-origin" not in refused.headers


def test_without_the_setting_no_page_may(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    gate.run()
    asked = preflight(gate.url + "/v1/chat/completions", PAGE)
    answer = httpx.get(gate.url + "/v1/models", headers=key(gate) | {"origin": PAGE})
    for one in (asked, answer):
        assert not [name for name in one.headers if name.startswith("access-control")]
    assert asked.status_code == 405


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/nothing", "/openapi.json", "/docs", "/metrics", "bad", "sse"]
)
def test_every_answer_has_strict_headers_and_tells_no_program(apart: Apart, path: str) -> None:
    gate, *_ = apart
    if path == "sse":
        answer = gate.chat(stream=True)
        assert answer.headers["content-type"].startswith("text/event-stream")
        headers = dict(answer.headers)
    elif path == "bad":
        assert gate.program is not None
        with socket.create_connection(("127.0.0.1", gate.program.port), timeout=60) as raw:
            raw.sendall(b"nonsense\r\n\r\n")
            lines = raw.makefile("r").read().split("\n\n")[0].splitlines()[1:]
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    else:
        headers = dict(httpx.get(gate.url + path, headers=key(gate)).headers)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert not {"server", "x-powered-by", "alt-svc", "set-cookie"} & set(headers)
    assert not re.search(r"sanic|python|uvloop", str(headers), re.IGNORECASE)


def test_both_addresses_speak_tls(gate: GateUnderTest, mock: Mock) -> None:
    authority = Authority(gate.folder)
    pair, context = authority.issue("door"), authority.client()
    gate.list_nodes(mock("a"))
    port = free_port()
    tls = ("--tls-cert-file", str(pair.certificate), "--tls-key-file", str(pair.key))
    gate.secret = gate.create_key("tester", "--admin")
    gate.program = gate._start(
        "llmgate", "--nodes-file", str(gate.nodes_file), "--state-dir", str(gate.state), *FAST, *tls,
        "--admin-listen", f"127.0.0.1:{port}",
    )  # fmt: skip
    public = f"https://127.0.0.1:{gate.program.port}"
    wait_for(lambda: gate.program and gate.program.output().count("listening on"), "the gate to listen")
    assert httpx.get(public + "/admin/nodes", headers=key(gate), verify=context).status_code == 404
    answer = httpx.get(f"https://127.0.0.1:{port}/admin/nodes", headers=key(gate), verify=context)
    assert answer.status_code == 200


def test_of_ipv6_a_network_is_one_address() -> None:
    assert household("192.0.2.7") == household("::ffff:192.0.2.7") == "192.0.2.7"
    assert household("2001:db8:1:2:3::4") == household("2001:db8:1:2::9") != household("2001:db8:1:3::9")
    assert household("fe80::1%eth0") == household("fe80::2%eth0")
    assert household("") == ""
