"""Several workers behind one socket: they share the work, die alone, and are replaced without anybody noticing."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gate.conftest import FAST, GateUnderTest
from tests.gate.mock_node import MockNode
from tests.processes import Program, free_port, wait_for

Mock = Callable[..., MockNode]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def children(program: Program) -> set[int]:
    """The workers, by process id."""
    return {int(pid) for pid in Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()}


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie: a killed supervisor's children are nobody's to reap here."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processors until now."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def health(gate: GateUnderTest) -> dict[str, Any]:
    """On a connection of its own, so that any worker may answer."""
    answer: dict[str, Any] = httpx.get(gate.url + "/health", timeout=60).json()
    return answer


def program(gate: GateUnderTest) -> Program:
    assert gate.program is not None
    return gate.program


def figure(gate: GateUnderTest, name: str, **labels: str) -> float:
    """One figure of /metrics, of whichever worker answers."""
    text = httpx.get(gate.url + "/metrics", timeout=60).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def patient_client(gate: GateUnderTest) -> httpx.Client:
    """One whose connection stays with its worker: httpx would drop it after five idle seconds."""
    headers = {"authorization": f"Bearer {gate.secret}"}
    return httpx.Client(base_url=gate.url, headers=headers, timeout=120, limits=httpx.Limits(keepalive_expiry=None))


@contextmanager
def one_client_each(gate: GateUnderTest, count: int) -> Iterator[list[httpx.Client]]:
    """A kept-alive connection to each worker."""
    with ExitStack() as stack:
        found: dict[int, httpx.Client] = {}

        def another() -> bool:
            client = stack.enter_context(patient_client(gate))
            pid = client.get("/health").json()["pid"]
            if pid not in found:
                found[pid] = client
            else:
                client.close()
            return len(found) == count

        wait_for(another, f"connections to {count} workers")
        yield list(found.values())


class Load:
    """Asks without end, each time on a new connection, from a few threads."""

    def __init__(self, gate: GateUnderTest, threads: int = 3) -> None:
        self._gate = gate
        self.answered = 0
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Until so many more have been answered."""
        aim = self.answered + more
        wait_for(lambda: self.answered >= aim or self.failed, f"{more} more answers")

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._gate.chat(stream=True)
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
                continue
            if answer.status_code == 200 and answer.content.endswith(b"data: [DONE]\n\n"):
                self.answered += 1
            else:
                self.failed.append(f"{answer.status_code} {answer.text}")


class Stream:
    """One streamed answer, read in a thread of its own."""

    def __init__(self, gate: GateUnderTest) -> None:
        self._gate = gate
        self.text = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            self.text = self._gate.chat(stream=True).text
        except httpx.HTTPError as error:
            self.text = repr(error)

    def end(self) -> str:
        self._thread.join()
        return self.text


@pytest.fixture
def node(mock: Mock) -> MockNode:
    return mock("a")


@pytest.fixture
def crew(gate: GateUnderTest, node: MockNode) -> Callable[..., GateUnderTest]:
    """Start a gate with so many workers in front of the node a."""

    def run(workers: int, *options: str) -> GateUnderTest:
        gate.list_nodes(node)
        gate.run("--workers", str(workers), *options)
        wait_for(lambda: len(children(program(gate))) == workers, "all workers")
        gate.wait_node("a", lambda seen: seen["usable"])
        return gate

    return run


Crew = Callable[..., GateUnderTest]


def test_all_workers_answer_and_count_together_also_what_a_killed_one_has_counted(crew: Crew, node: MockNode) -> None:
    gate = crew(2)
    workers = children(program(gate))
    with one_client_each(gate, 2) as clients:
        assert {client.get("/health").json()["pid"] for client in clients} == workers
        for client in clients:
            for _ in range(3):
                assert client.post("/v1/chat/completions", json=BODY).status_code == 200
        node.hold = "post"
        running = [threading.Thread(target=client.post, args=("/v1/chat/completions",), kwargs={"json": BODY})
                   for client in clients]  # fmt: skip
        for thread in running:
            thread.start()
        wait_for(lambda: figure(gate, "llmgate_in_flight", node="a") == 2, "both requests in the sum")
        gate.wait_node("a", lambda seen: seen["in_flight"] == 2)
        assert figure(gate, "llmgate_nodes", state="ready") == 1
        node.hold = ""
        for thread in running:
            thread.join()
    assert figure(gate, "llmgate_requests_total", model="tiny", status="200") == 8
    wait_for(lambda: figure(gate, "llmgate_in_flight", node="a") == 0, "nothing to run any more")

    victim = min(workers)
    os.kill(victim, signal.SIGKILL)
    assert gate.chat().status_code == 200, "the other one goes on"
    wait_for(lambda: len(children(program(gate)) - {victim}) == 2, "another worker")
    (new,) = children(program(gate)) - workers
    wait_for(lambda: health(gate)["pid"] == new, "the new worker to answer")
    assert f"worker {victim} is gone: killed by SIGKILL" in program(gate).output()
    assert figure(gate, "llmgate_requests_total", model="tiny", status="200") == 9
    assert figure(gate, "llmgate_request_duration_seconds_count", model="tiny") == 9
    assert figure(gate, "llmgate_tokens_total", kind="prompt") == 99
    program(gate).signal(signal.SIGTERM)
    assert program(gate).wait() == 0
    assert not any(alive(pid) for pid in {*workers, new})


def test_a_lease_taken_through_one_worker_is_seen_by_all(crew: Crew) -> None:
    gate = crew(3, "--ready-wait-s", "0")
    with one_client_each(gate, 3) as clients:
        taken = clients[0].post("/admin/nodes/a/drain", json={"owner": "me", "force": True})
        assert taken.status_code == 200, taken.text
        for client in clients:
            wait_for(lambda client=client: client.get("/admin/nodes/a").json()["lease"], "the lease")  # type: ignore[misc]
        for client in clients:
            assert client.post("/v1/chat/completions", json=BODY).status_code == 503
            assert client.post("/admin/nodes/a/drain", json={"owner": "you"}).status_code == 409
        assert clients[1].delete("/admin/nodes/a/drain", params={"owner": "me"}).json()["released"]
        for client in clients:
            wait_for(lambda client=client: client.get("/admin/nodes/a").json()["usable"], "the end of it")  # type: ignore[misc]


def test_workers_divide_the_queue_limit_between_them(crew: Crew, node: MockNode) -> None:
    node.say(load={"slots": 1, "running": 1, "waiting": 1})
    gate = crew(2, "--queue-limit", "3")
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        clients: dict[int, list[httpx.Client]] = {}

        def another() -> list[httpx.Client] | None:
            client = stack.enter_context(patient_client(gate))
            found = clients.setdefault(client.get("/health").json()["pid"], [])
            found.append(client)
            return found if len(found) == 3 else None

        three = wait_for(another, "three connections to one worker")
        wait_for(lambda: three[0].get("/admin/nodes/a").json()["load"]["waiting"] == 1, "the node to be full")
        answers = [pool.submit(client.post, "/v1/chat/completions", json=BODY) for client in three]
        wait_for(lambda: any(answer.done() for answer in answers), "one too many")
        refused = next(answer for answer in answers if answer.done()).result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert "2 requests wait for this model" in refused.json()["error"]["message"]
        assert sum(answer.done() for answer in answers) == 1
        node.say(load={"running": 0, "waiting": 0})
        assert sorted(answer.result().status_code for answer in answers) == [200, 200, 503]


def test_workers_do_not_outlive_their_supervisor_but_their_streams_end_whole(crew: Crew, node: MockNode) -> None:
    gate = crew(2)
    workers = children(program(gate))
    folder = re.findall(r'"folder": "([^"]+)"', Path(f"/proc/{min(workers)}/cmdline").read_text())[0]
    assert Path(folder).is_dir()
    node.fault, node.hold = "wait", "stream"
    stream = Stream(gate)
    wait_for(lambda: node.open == 1, "the stream to run")
    program(gate).signal(signal.SIGKILL)
    wait_for(lambda: sum(alive(pid) for pid in workers) == 1, "the idle worker to end")
    with pytest.raises(ConnectionRefusedError):
        wait_for(lambda: socket.create_connection(("127.0.0.1", program(gate).port)).close(), "nobody to listen")
    node.hold = ""
    assert stream.end().endswith("data: [DONE]\n\n")
    wait_for(lambda: not any(alive(pid) for pid in workers), "the other one to end")
    assert not Path(folder).exists()


def test_a_worker_that_drains_waits_quietly_when_its_supervisor_is_killed(crew: Crew, node: MockNode) -> None:
    """One was seen at 100% CPU for the rest of its drain: the end of the line can be read without end."""
    gate = crew(1)
    (worker,) = children(program(gate))
    node.fault, node.hold = "wait", "stream"
    stream = Stream(gate)
    wait_for(lambda: node.open == 1, "the stream to run")
    program(gate).signal(signal.SIGTERM)
    wait_for(lambda: "draining: 1 requests running" in program(gate).output(), "the drain")
    program(gate).signal(signal.SIGKILL)
    program(gate).wait()
    before = cpu_seconds(worker)
    time.sleep(2)
    assert cpu_seconds(worker) - before < 0.5
    node.hold = ""
    assert stream.end().endswith("data: [DONE]\n\n")
    wait_for(lambda: not alive(worker), "it to end")


def test_a_reload_loses_no_connection_and_cuts_no_stream(crew: Crew, node: MockNode) -> None:
    gate = crew(2)
    supervisor = program(gate)
    node.fault, node.hold = "wait", "stream"
    long = Stream(gate)
    wait_for(lambda: node.open == 1, "the long stream to run")
    node.fault = ""
    with patient_client(gate) as kept, Load(gate) as load:
        old = kept.get("/health").json()
        assert old["generation"] == 1
        load.wait_for(10)
        for generation in (2, 3):
            before = children(supervisor)
            supervisor.signal(signal.SIGHUP)
            wait_for(lambda: health(gate)["generation"] == generation, f"generation {generation}")  # noqa: B023
            wait_for(lambda: supervisor.output().count("goes on with") == generation - 1, "the exec")  # noqa: B023
            assert len(children(supervisor) - before) == 2, "new workers, of the same parent"
            load.wait_for(10)
        # A connection that was kept open is served where it is, and then goes to the new workers.
        answer = kept.post("/v1/chat/completions", json=BODY)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert kept.get("/health").json()["generation"] == 3
    assert load.failed == []
    node.hold = ""
    assert long.end().endswith("data: [DONE]\n\n")
    wait_for(lambda: len(children(supervisor)) == 2, "the old workers to end")
    counted = figure(gate, "llmgate_requests_total", model="tiny", status="200")
    assert counted == load.answered + 2, "what the old workers have counted is kept"
    assert supervisor.process.poll() is None
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait() == 0


def test_new_settings_come_with_a_reload_and_bad_ones_change_nothing(gate: GateUnderTest, mock: Mock) -> None:
    gate.list_nodes(mock("a"))
    config = gate.folder / "llmgate.toml"
    port, other = free_port(), free_port()
    broken = gate.folder / "broken"
    broken.mkdir()
    (broken / "llmgate.db").write_text("this is no database, and long enough to be looked at" * 20)

    def configure(**settings: object) -> str:
        lines = {"nodes_file": str(gate.nodes_file), "state_dir": str(gate.state), **settings}
        config.write_text("".join(f"{key} = {value!r}\n" for key, value in lines.items()))
        return hashlib.sha256(config.read_bytes()).hexdigest()[:16]

    gate.secret = gate.create_key("tester", "--admin")
    address = gate.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(120)
        first = configure(port=port)
        arguments = ["serve", "--config", str(config), *FAST]
        gate.program = Program("llmgate", arguments, port, gate.folder / "log", {"NOTIFY_SOCKET": str(address)})
        try:
            gate.program.ready()
            heard = ""

            def hear(what: str) -> None:
                nonlocal heard
                while what not in heard:
                    heard += manager.recv(4096).decode() + "\n"
                heard = heard[heard.index(what) + len(what) :]

            hear("READY=1")
            for reason, settings in (("tries", {"tries": 0}), ("llmgate.db", {"state_dir": str(broken)})):
                configure(port=port, **settings)
                gate.program.signal(signal.SIGHUP)
                hear("RELOADING=1")
                hear("READY=1")
                hear("generation 2 was refused: ")
                hear(reason)
                now = health(gate)
                assert (now["generation"], now["config"]) == (1, first)
                assert gate.chat().status_code == 200

            second = configure(port=other, workers=2, drain_seconds=30.0)
            gate.program.signal(signal.SIGHUP)
            hear("RELOADING=1")
            hear("READY=1")
            hear("2 of 2 workers")
            gate.program.url = f"http://127.0.0.1:{other}"
            now = health(gate)
            assert (now["generation"], now["config"]) == (2, second)
            assert gate.chat().status_code == 200
            wait_for(lambda: httpx_refused(port), "the old port to be closed")
        finally:
            gate.program.stop()


def httpx_refused(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}/health")
    except httpx.ConnectError:
        return True
    return False


def test_a_reload_goes_to_the_release_that_is_installed_by_then_and_a_killed_worker_does_not(
    gate: GateUnderTest, node: MockNode
) -> None:
    gate.list_nodes(node)
    for name in ("1", "2"):
        script = gate.folder / "releases" / name / "bin" / "llmgate"
        script.parent.mkdir(parents=True)
        script.write_text(f"#!{sys.executable}\nfrom llmgate.cli import main\nraise SystemExit(main())\n")
        script.chmod(0o755)
    current = gate.folder / "current"
    current.symlink_to("releases/1")
    port = free_port()
    arguments = ["serve", "--port", str(port), "--nodes-file", str(gate.nodes_file), "--state-dir", str(gate.state)]
    command = [str(current / "bin" / "llmgate")]
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    gate.program = Program("llmgate", [*arguments, *FAST], port, gate.folder / "log", env, command)

    def released() -> tuple[int, str]:
        pid = health(gate)["pid"]
        return pid, re.findall(r"releases/(\d)/bin/llmgate", Path(f"/proc/{pid}/cmdline").read_text())[0]

    try:
        gate.program.ready()
        first, release = released()
        assert release == "1"
        current.unlink()
        current.symlink_to("releases/2")
        os.kill(first, signal.SIGKILL)
        second, release = released()
        assert second != first
        assert release == "1", "all workers of a generation are the same"
        gate.program.signal(signal.SIGHUP)
        wait_for(lambda: health(gate)["generation"] == 2, "the new generation")
        assert released()[1] == "2"
    finally:
        gate.program.stop()


PASS_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "llmgate", *sys.argv[2:]])
"""


def test_a_passed_socket_outlives_the_gate_and_connections_wait_in_it(gate: GateUnderTest, node: MockNode) -> None:
    """As systemd does it: the socket is opened first, and stays while the gate is restarted."""
    gate.list_nodes(node)
    gate.secret = gate.create_key("tester", "--admin")
    arguments = ["--nodes-file", str(gate.nodes_file), "--state-dir", str(gate.state), *FAST]
    running: list[subprocess.Popen[bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def start() -> subprocess.Popen[bytes]:
            # A group of its own, to be told of Ctrl-C as a terminal does: all at once.
            command = [sys.executable, "-c", PASS_SOCKET, str(listening.fileno()), "serve", *arguments]
            running.append(subprocess.Popen(command, pass_fds=(listening.fileno(),), start_new_session=True))
            return running[-1]

        def ask(answers: list[httpx.Response]) -> None:
            headers = {"authorization": f"Bearer {gate.secret}"}
            answers.append(httpx.post(url + "/v1/chat/completions", json=BODY, headers=headers, timeout=120))

        try:
            first = start()
            answers: list[httpx.Response] = []
            ask(answers)
            node.hold = "post"
            threads = [threading.Thread(target=ask, args=(answers,)) for _ in range(3)]
            threads[0].start()
            wait_for(lambda: len(node.requests) == 2, "a request to run")
            os.killpg(first.pid, signal.SIGINT)
            # Nobody takes these: they wait for the gate that comes.
            for thread in threads[1:]:
                thread.start()
            node.hold = ""
            assert first.wait(120) == 0
            second = start()
            for thread in threads:
                thread.join()
            assert [answer.status_code for answer in answers] == [200] * 4
            os.killpg(second.pid, signal.SIGINT)
            assert second.wait(120) == 0
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
