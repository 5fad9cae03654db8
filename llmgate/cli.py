"""The command line of the gate.

    llmgate serve | check | settings | nodes | explain | keys create|set|list|show|revoke|apply | usage | backup |
            restore | demo

Exit codes: 0 done; 1 the answer is no (`nodes`: one is not ready; `explain`: none can take the request; `keys`: no such
key, or the name is taken; `restore`: the file cannot be put back); 2 bad configuration or arguments; 4 the port is in
use; 5 the database cannot be used, and trying again may help (a full disk, a lock held too long). Messages go to
standard error, one line, without a traceback; results to standard output.

What the HTTP server and client are needed for is imported where it is: `llmgate serve` is a small process that starts
others, and they would triple its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from llmgate import settings as configuration
from llmgate import supervisor
from llmgate.commands import keys, usage
from llmgate.commands.place import BAD, NO, NO_STORE, OK, PORT_IN_USE, add_place, database, load, open_store, say
from llmgate.core import body as bodies
from llmgate.core.explanation import as_text, columns, explain
from llmgate.core.fleet import Fleet, Listed, Lost, Node, Reported
from llmgate.core.keys import Keyring
from llmgate.core.policy import USES, Ask
from llmgate.core.prompt import Prompt
from llmgate.database import StoreError
from llmgate.line import Line, News, Post
from llmgate.listener import PortInUse, adopted
from llmgate.listing import Address, Listing
from llmgate.settings import PREFIX, Settings
from llmnode.service import logs
from llmnode.service.release import release
from llmnode.service.settings import Loaded, SettingError, add_flags, listing, markdown, printed
from llmnode.wire.node import Report

_LOOK_AFTER = 10_000
"""New objects after which a worker looks for garbage in cycles. After Python's own 700 it looks through the objects of
all requests under way every few requests, which was a twentieth of the processor time that a request takes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except SettingError as error:
        return say(BAD, str(error))
    except StoreError as error:
        return say(NO_STORE, str(error))
    except PortInUse as error:
        return say(PORT_IN_USE, str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmgate", description="The door of an llmrack fleet: one OpenAI-compatible address in front of all nodes."
    )
    parser.add_argument("--version", action="version", version=f"llmgate {release()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int] | None, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        return sub

    add_flags(add("serve", _serve, "Serve until SIGTERM or Ctrl-C."), Settings)
    worker = commands.add_parser("worker")  # without a help text, so that it is not listed: it is the supervisor's
    worker.add_argument("post", help="what the supervisor has for it, as JSON")
    add_flags(worker, Settings)
    worker.set_defaults(command=_worker)
    add_flags(
        add("check", _check, "Say whether the settings, the nodes file and the fleet token can be used."), Settings
    )
    table = add("settings", _settings, "Print every setting, its value and where it came from.")
    table.add_argument("--markdown", action="store_true", help="print the table that docs/settings.md shows")
    add_flags(table, Settings)
    add_flags(
        add(
            "nodes",
            _nodes,
            "Ask each node of the nodes file for its report and print a table. Asks the nodes themselves, so it needs "
            "no running gate and shows no drain leases (GET /admin/nodes does). Exit code 1 unless all are ready.",
        ),
        Settings,
    )
    _add_explain(
        add("explain", _explain, "Show which node each policy would choose for a request, and by which figures.")
    )
    keys.add(add("keys", None, "Create, change, list and revoke API keys."))
    usage.add(add("usage", usage.run, "Show what was used: requests and tokens by key, model, node and day."))
    for name, run, text in (
        ("backup", _backup, "Copy keys, drain leases and usage to a file, also while the gate runs."),
        (
            "restore",
            _restore,
            "Put such a copy back, also while the gate runs; it replaces all keys and leases, and adds missing usage.",
        ),
    ):
        copying = add(name, run, text)
        copying.add_argument("file", type=Path, metavar="FILE")
        add_place(copying)
        if name == "restore":
            copying.add_argument("--check", action="store_true", help="only say whether it would change anything")
    demo_parser = add(
        "demo",
        _demo,
        "Start nodes and a gate on this machine, answer a question, and serve until Ctrl-C.",
    )
    demo_parser.add_argument(
        "--model", type=Path, metavar="GGUF", help="the model that the nodes serve (default: the handbook model)"
    )
    demo_parser.add_argument("--nodes", type=int, default=2, help="how many nodes (default: 2)")
    demo_parser.add_argument("--once", action="store_true", help="stop after the answer")
    demo_parser.add_argument("--question", default="What is llmrack?", help="what to ask (default: %(default)s)")
    return parser


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Asks each node of the nodes file once. It needs no running gate, so it knows neither drain leases nor what a "
        "gate has sent since the nodes' last reports. Exit code 1 when no node can take the request."
    )
    parser.add_argument("body", metavar="BODY.json", help="file with the request's body, - for standard input")
    parser.add_argument(
        "--path", choices=tuple(USES), default=next(iter(USES)), help="where it goes (default: %(default)s)"
    )
    add_flags(parser, Settings)


def _serve(options: argparse.Namespace) -> int:
    return supervisor.serve(supervisor.Invocation.of(sys.argv, sys.executable, vars(options)))


def _worker(options: argparse.Namespace) -> int:
    # A terminal sends these to all processes; the supervisor says what is to be done about them.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    post = Post.parse(options.post)
    line = Line(adopted(post.line_fd))
    try:
        _work(load(options), post, line)
    except (SettingError, StoreError) as error:
        line.say(News.FAILED, why=str(error))
        raise
    return OK


def _work(loaded: Loaded[Settings], post: Post, line: Line) -> None:
    from sanic.server.loop import try_use_uvloop

    from llmgate.app import Gate

    settings = loaded.values
    logs.setup(settings.log_level, settings.log_format, "llmgate")
    if post.place:
        # All workers see the same nodes; one tells.
        logging.getLogger("llmgate.prober").setLevel(logging.ERROR)
    token = configuration.read_fleet_token(settings)
    nodes = configuration.read_nodes(settings)
    _raise_file_limit()
    gc.set_threshold(_LOOK_AFTER)
    try_use_uvloop()

    async def run() -> None:
        await Gate(loaded, token, nodes, post, line).serve(adopted(post.listen_fd))

    asyncio.run(run())


def _raise_file_limit() -> None:
    """Take all the open files that are allowed: each client's connection is one, and so is each node's.

    The lower limit that a process starts with is there for programs that use select(), which cannot count so far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        print(f"llmgate: going on with {soft} open files: {error}", file=sys.stderr)


def _check(options: argparse.Namespace) -> int:
    settings = load(options).values
    token, nodes, folder = configuration.usable(settings)
    _require_writable(folder)
    where = configuration.database(settings)
    if where.shared or (settings.gates > 1 and where.path.exists()):
        with closing(open_store(options)) as store:
            configuration.require_one_truth(settings, limited=Keyring(store.all_keys()).limited)
    count = len(nodes.addresses)
    shared = f", database {where}" if where.shared else ""
    print(f"settings are good: {count} nodes, fleet token {'set' if token else 'not set'}, state in {folder}{shared}")
    return OK


def _settings(options: argparse.Namespace) -> int:
    return OK if printed(markdown(Settings, PREFIX) if options.markdown else listing(load(options), PREFIX)) else NO


def _nodes(options: argparse.Namespace) -> int:
    settings = load(options).values
    logs.setup("warning")
    token = configuration.read_fleet_token(settings)
    fleet = asyncio.run(_ask_all(settings, token, configuration.read_nodes(settings)))
    head = ("NODE", "STATE", "BUSY", "MODELS", "RELEASE", "URL", "")
    print(columns(head, *(_row(node) for node in fleet.nodes.values())))
    ready = all(node.standing(0.0, settings.stale_after_s).usable for node in fleet.nodes.values())
    return OK if ready else NO


def _explain(options: argparse.Namespace) -> int:
    body = _read_body(options.body)
    settings = load(options).values
    logs.setup("warning")
    token = configuration.read_fleet_token(settings)
    fleet = asyncio.run(_ask_all(settings, token, configuration.read_nodes(settings)))
    ask = Ask(_asked(body, fleet), USES[options.path], Prompt(body, options.path), dice=random.getrandbits(64))
    said = explain(fleet, ask, 0.0, settings.stale_after_s)
    return OK if printed(as_text(said)) and said.anybody else NO


def _read_body(path: str) -> dict[str, Any]:
    """A request's body. Raises SettingError."""
    try:
        return bodies.read(sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes())
    except OSError as error:
        raise SettingError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise SettingError(f"{path} {error}") from error


def _asked(body: dict[str, Any], fleet: Fleet) -> str:
    """The model that a body asks for. Raises SettingError."""
    try:
        return bodies.asked(body, sorted(fleet.models()))
    except ValueError as error:
        raise SettingError(str(error)) from error


async def _ask_all(settings: Settings, token: str, nodes: Listing) -> Fleet:
    """One poll of every node at once, as the fleet it shows; time stands still at 0."""
    from llmgate.relay import Relay

    relay = Relay(
        token,
        time.monotonic,
        connect_timeout_s=settings.connect_timeout_s,
        stall_timeout_s=settings.stall_timeout_s,
        request_timeout_s=settings.request_timeout_s,
        context=configuration.node_context(settings),
    )

    async def ask(address: Address) -> Reported | Lost:
        try:
            status, _, body = await relay.fetch(address.url, "/node", timeout_s=settings.stale_after_s)
            if status != 200:
                return Lost(address.name, f"GET /node answered {status}", 0.0)
            return Reported(address.name, Report.parse(json.loads(body)), 0.0)
        except (OSError, ValueError) as error:
            return Lost(address.name, str(error), 0.0)

    try:
        events = await asyncio.gather(*map(ask, nodes.addresses))
    finally:
        await relay.close()
    fleet = Fleet().apply(Listed(nodes.addresses, nodes.routes))
    for event in events:
        fleet = fleet.apply(event)
    return fleet


def _row(node: Node) -> tuple[str, ...]:
    standing = node.standing(0.0, float("inf"))
    report = node.report
    if report is None:
        return (node.name, standing.state, "-", "-", "-", node.url, standing.why)
    models = ",".join(model.id for model in report.models) or "-"
    return (node.name, standing.state, f"{node.busy}/{node.slots}", models, report.release, node.url, standing.why)


def _demo(options: argparse.Namespace) -> int:
    if options.nodes < 1:
        return say(BAD, f"--nodes must be at least 1, got {options.nodes}")
    if options.model and not options.model.is_file():
        return say(BAD, f"there is no model at {options.model}")
    from llmgate import demo

    return demo.run(options.model, nodes=options.nodes, once=options.once, question=options.question)


def _backup(options: argparse.Namespace) -> int:
    from llmgate import archive

    archive.backup(database(options), options.file)
    print("written")
    return OK


def _restore(options: argparse.Namespace) -> int:
    from llmgate import archive

    try:
        changed = archive.restore(options.file, database(options), check=options.check)
    except archive.NotOurs as error:
        return say(NO, str(error))
    print(("would be restored" if options.check else "restored") if changed else "unchanged")
    return OK


def _require_writable(folder: Path) -> None:
    """Raise SettingError unless the folder, or the nearest parent that exists, can be written."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise SettingError(f"state_dir {folder} cannot be written")
