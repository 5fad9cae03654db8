"""llmrack on one machine, without root or systemd: a gate and a few nodes as child processes.

Owns the children and what they leave on disk; knows nothing of how they work: it starts the same programs that systemd
starts on a fleet, with the same settings, and speaks to them over HTTP alone. A child that ends is started again, as
systemd would; when the demo ends, by whatever signal, no child outlives it.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import httpx

from llmnode.wire import headers

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a child gets when its parent dies, however it dies."""
START_LIMIT_S = 600.0
SUGGESTIONS = ("What is a slot?", "How do I drain a node?", "What happens when a node dies?")
"""What else a newcomer may ask the handbook model."""


class DemoError(Exception):
    """The demo cannot go on; the message says which program failed and ends with its log."""


class Stop(Exception):
    """Somebody asked the demo to end."""


@dataclass
class Child:
    """One of the demo's programs. `status` is what the progress line says of it."""

    name: str
    port: int
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    status: str = "starting"
    ready: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as out:
            # A session of its own: Ctrl-C reaches the demo alone, which then ends the children in order.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def look(self, client: httpx.Client) -> None:
        """Ask the child how far it is. Raises DemoError if it has ended."""
        if self.process is not None and self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise DemoError(f"{self.name} ended with code {self.process.returncode}; the end of {self.log}:\n{tail}")
        try:
            answer = client.get(f"{self.url}/ready", timeout=2)
        except httpx.HTTPError:
            return
        self.ready = answer.status_code == 200
        self.status = "ready" if self.ready else _why(answer)


@dataclass
class Demo:
    """A gate and `nodes` nodes below `folder`, all on loopback."""

    model: Path | None
    nodes: int
    folder: Path
    say: Callable[[str], None]
    children: list[Child] = field(default_factory=list)
    key: str = ""

    def start(self) -> None:
        """Start every program and wait until the gate can answer. Raises DemoError."""
        token = self.folder / "fleet-token"
        token.write_text(secrets.token_urlsafe(32) + "\n")
        token.chmod(0o600)
        state = self.folder / "gate"
        state.mkdir()
        for number in range(1, self.nodes + 1):
            port = free_port()
            arguments = ["serve", "--name", f"node-{number}", "--port", str(port)]
            arguments += ["--model", str(self.model)] if self.model else []
            # The nodes share this machine's cores: threads that wait for each other on a core burn it.
            arguments += ["--threads", str(max(1, (os.cpu_count() or 1) // self.nodes))]
            self._add("llmnode", f"node-{number}", port, [*arguments, "--fleet-token-file", str(token)])
        nodes_file = self.folder / "nodes.toml"
        nodes_file.write_text("".join(f'[[nodes]]\nname = "{c.name}"\nurl = "{c.url}"\n\n' for c in self.children))
        port = free_port(8000)
        arguments = ["serve", "--port", str(port), "--nodes-file", str(nodes_file), "--state-dir", str(state)]
        arguments += ["--fleet-token-file", str(token), "--request-log", str(self.folder / "requests.jsonl")]
        self.key = _create_key(state)
        self._add("llmgate", "gate", port, arguments)
        for child in self.children:
            child.start()
        self._wait()

    @property
    def gate(self) -> Child:
        return self.children[-1]

    def ask(self, question: str) -> None:
        """Put a question to the gate and write the answer to standard output as it comes. Raises DemoError."""
        body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 120}
        if self.model is None:
            body["temperature"] = 0  # it recites; at a higher temperature it mixes facts (docs/model-card.md)
        self.say(f"\nQ: {question}")
        sys.stdout.write("A: ")
        started = time.monotonic()
        first: float | None = None
        pieces = 0
        with (
            httpx.Client(timeout=120) as client,
            client.stream("POST", f"{self.gate.url}/v1/chat/completions", json=body, headers=self._auth()) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise DemoError(f"the gate answered {answer.status_code}: {answer.text}")
            for text in _deltas(answer.iter_lines()):
                first = first if first is not None else time.monotonic() - started
                pieces += 1
                sys.stdout.write(text)
                sys.stdout.flush()
        if first is None:
            raise DemoError("the answer was empty")
        node = answer.headers.get(headers.NODE, "a node")
        self.say(f"\n   ({node} answered; the first words came after {first:.2f} s, all after "
                 f"{time.monotonic() - started:.2f} s)")  # fmt: skip

    def explain(self) -> None:
        """Print the addresses, the key and a command to try."""
        body = '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'
        if self.model is None:
            self.say("\nAsk it also: " + " ".join(SUGGESTIONS))
        self.say(
            f"\nConsole  {self.gate.url}/\nAddress  {self.gate.url}/v1\nKey      {self.key}\n"
            f"Try      curl -N {self.gate.url}/v1/chat/completions -H 'Authorization: Bearer {self.key}' "
            f"-H 'Content-Type: application/json' -d {shlex.quote(body)}\n"
            f"Logs     {self.folder}"
        )

    def serve(self) -> None:
        """Keep the children running until a signal raises Stop."""
        while True:
            time.sleep(0.5)
            for child in self.children:
                code = child.process.poll() if child.process else None
                if code is not None:
                    self.say(f"{child.name} ended with code {code}; starting it again")
                    time.sleep(0.5)
                    child.start()

    def stop(self) -> None:
        """End every child: SIGTERM to all, again after a while (which cuts what still streams), then SIGKILL."""
        running = [c.process for c in reversed(self.children) if c.process and c.process.poll() is None]
        for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            running = [process for process in running if process.poll() is None]
            for process in running:
                process.send_signal(number)
            end = time.monotonic() + patience_s
            while time.monotonic() < end and any(process.poll() is None for process in running):
                time.sleep(0.02)

    def _add(self, module: str, name: str, port: int, arguments: list[str]) -> None:
        self.children.append(Child(name, port, [sys.executable, "-m", module, *arguments], self.folder / f"{name}.log"))

    def _auth(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def _wait(self) -> None:
        started = time.monotonic()
        shown = ""
        with httpx.Client() as client:
            while not all(child.ready for child in self.children):
                for child in self.children:
                    if not child.ready:
                        child.look(client)
                parts = "  ".join(f"{child.name}: {child.status}" for child in self.children)
                elapsed = time.monotonic() - started
                if sys.stdout.isatty():
                    line = f"{elapsed:3.0f} s  {parts}"
                    # Cut to the terminal: a line that wraps could not be overwritten.
                    sys.stdout.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
                    sys.stdout.flush()
                elif parts != shown:
                    self.say(parts)
                shown = parts
                if elapsed > START_LIMIT_S:
                    raise DemoError(f"not ready after {START_LIMIT_S:.0f} s ({parts}); the logs are in {self.folder}")
                time.sleep(0.1)
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        self.say(f"{clear}ready after {time.monotonic() - started:.1f} s: {shown}")


def run(model: Path | None, *, nodes: int, once: bool, question: str) -> int:
    """Run the demo, without a `model` on the handbook model, and return its exit code.

    0 after a question with `once`, or Ctrl-C; 1 when something failed.
    """

    def say(text: str) -> None:
        print(text, flush=True)

    with tempfile.TemporaryDirectory(prefix="llmrack-demo-", ignore_cleanup_errors=True) as folder, _signals():
        demo = Demo(model, nodes, Path(folder), say)
        say(f"llmrack demo: {nodes} nodes and a gate on this machine, {model.name if model else 'the handbook model'}")
        try:
            demo.start()
            demo.ask(question)
            demo.explain()
            if not once:
                say("Serving until Ctrl-C.")
                demo.serve()
        except Stop:
            say("\nstopping")
        except (DemoError, httpx.HTTPError, OSError) as error:
            print(f"\nllmgate demo: {error}", file=sys.stderr)
            return 1
        finally:
            demo.stop()
    return 0


def free_port(wanted: int = 0) -> int:
    """`wanted` if it is free on loopback, else any free TCP port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            chosen: int = probe.getsockname()[1]
            return chosen
    raise DemoError("no TCP port is free on 127.0.0.1")


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that end a program into Stop, once: a second one must not break the orderly end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handler(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise Stop

    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _create_key(state: Path) -> str:
    secret = state.parent / "key"
    secret.write_text("sk-llmrack-" + secrets.token_urlsafe(24) + "\n")
    secret.chmod(0o600)
    command = [sys.executable, "-m", "llmgate", "keys", "create", "demo", "--admin", "--state-dir", str(state)]
    done = subprocess.run([*command, "--from-file", str(secret)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(f"could not create a key: {done.stderr.strip()}")
    return secret.read_text().strip()


def _why(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def _deltas(lines: Iterator[str]) -> Iterator[str]:
    """The text of each chunk of a streamed chat completion. Raises DemoError on an error event or a cut stream."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if not line.startswith("data: "):
            continue
        chunk = json.loads(line[len("data: ") :])
        if "error" in chunk:
            raise DemoError(f"the answer broke off: {chunk['error']['message']}")
        for choice in chunk.get("choices", []):
            text = choice.get("delta", {}).get("content")
            if text:
                yield str(text)
    raise DemoError("the answer ended without [DONE]")
