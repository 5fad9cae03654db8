"""The command line: serve, check, settings. Errors are one line on standard error and an exit code of `app.Exit`."""

from __future__ import annotations

import argparse
import difflib
import errno
import logging
import os
import ssl
import sys
from collections.abc import Sequence
from typing import NoReturn

from llmnode import app
from llmnode.api.fleet_token import FleetToken, FleetTokenError
from llmnode.chat.format import Format
from llmnode.chat.renderer import Renderer
from llmnode.chat.template import ChatTemplate, TemplateError
from llmnode.engine.backend import ModelLoadError
from llmnode.service import logs, tls
from llmnode.service.confined import StartError
from llmnode.service.release import release
from llmnode.service.settings import Loaded, SettingError, add_flags, listing, load, markdown, printed, rows
from llmnode.settings import PREFIX, Settings, read
from llmnode.wire.errors import ApiError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    asked, unknown = _parser().parse_known_args(arguments)
    if unknown:
        return _complain(f"unknown argument {unknown[0]}{_nearest(unknown[0])}", app.Exit.CONFIGURATION)
    try:
        if asked.command == "settings":
            return _settings(asked)
        loaded = read(vars(asked))
        token = _token(loaded.values)
        template = _template(loaded.values)
        context = tls.server(loaded.values.tls)
    except SettingError as error:
        return _complain(error, app.Exit.CONFIGURATION)
    if asked.command == "check":
        return _check(loaded.values, template)
    return _serve(loaded, token, context, template)


def _settings(asked: argparse.Namespace) -> int:
    """Print the table: also of settings that cannot be served with, since that is when people look at it."""
    page = markdown(Settings, PREFIX)
    if not asked.markdown:
        loaded = load(Settings, flags=vars(asked), prefix=PREFIX)
        page = listing(loaded, PREFIX, app.chosen(loaded.values))
    return app.Exit.OK if printed(page) else app.Exit.CONFIGURATION


def _check(settings: Settings, template: str | None) -> int:
    """Say what would be served, and what memory it takes, without reading weights."""
    try:
        planned = app.plan(settings)
        info, room = planned.info, planned.room
        chat = None
        if not planned.pooling:
            source = info.chat_template if template is None else template
            elsewhere = app.foreign(settings, info, source)
            chat = Renderer(source, elsewhere.template)
            elsewhere.close()
    except ModelLoadError as error:
        return _complain(error, app.Exit.MODEL)
    except (StartError, ApiError) as error:
        return _complain(f"the process that renders chat templates: {error}", app.Exit.MODEL)
    lines = {
        "model": f"{settings.served_id} ({info.name}, {info.architecture})",
        "listens on": f"{settings.host} port {settings.port}",
        "TLS": _tls(settings),
        "fleet token": str(settings.fleet_token_file or "not needed on loopback"),
    }
    if chat is None:
        what = "documents to scores" if planned.pooling == "rank" else f"texts to vectors (pooling {planned.pooling})"
        lines |= {
            "makes": what,
            "texts": f"{room.sequences} at once, each of {room.n_ctx} tokens at most (trained for {info.n_ctx_train})",
            "runs on": planned.chosen,
        }
    else:
        origin = "none in the file, so ChatML" if chat.is_default else "the model's own"
        held_by = f"{'shared by' if room.unified else 'in parts for'} {room.sequences} sequences"
        host_cache = app.limits(settings).host_bytes / 2**20
        lines |= {
            "chat template": str(settings.chat_template_file or origin),
            "tools": _calls(chat.format),
            "reasoning": "told apart from the answer" if chat.format.thinking else "none that its template shows",
            "slots": f"{room.slots}, each with {room.n_ctx} tokens at most (trained for {info.n_ctx_train})",
            "cache": f"{room.kv_cells} cells, {held_by}",
            "runs on": planned.chosen,
            "prompt cache": f"{host_cache:,.1f} MiB of host RAM at most, beside what follows",
        }
    for name, value in lines.items():
        print(f"{name + ':':<15} {value}")
    for line in planned.memory:
        print(line)
    if not planned.fits and settings.fit_check:
        return _complain("the model does not fit the memory; fit_check = false loads it all the same", app.Exit.MODEL)
    return app.Exit.OK


def _serve(
    loaded: Loaded[Settings], token: FleetToken | None, context: ssl.SSLContext | None, template: str | None
) -> int:
    settings = loaded.values
    try:
        sock = app.bind(settings.host, settings.port)
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        return _complain(f"cannot listen on port {settings.port} of {settings.host}: {reason}", app.Exit.PORT)
    logs.setup(settings.log_level, settings.log_format, "llmnode")
    try:
        code = app.run(loaded, sock, token, context, template)
    except KeyboardInterrupt:
        code = app.Exit.OK
    return _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process without waiting for threads: one inside llama.cpp or a template cannot be told to stop."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _calls(format: Format) -> str:
    if format.generic:
        return f"by a format of ours, since {format.why}"
    return f"none: {format.why}" if format.calls is None else "by the model's own format, derived from its template"


def _tls(settings: Settings) -> str:
    if settings.tls_cert_file is None:
        return "no"
    asked = f", asks clients for a certificate of {settings.tls_client_ca_file}" if settings.tls_client_ca_file else ""
    return f"with {settings.tls_cert_file}{asked}"


def _token(settings: Settings) -> FleetToken | None:
    if settings.fleet_token_file is None:
        return None
    try:
        return FleetToken(settings.fleet_token_file)
    except FleetTokenError as error:
        raise SettingError(str(error)) from error


def _template(settings: Settings) -> str | None:
    path = settings.chat_template_file
    try:
        source = app.read_template(path)
        if source is not None:
            ChatTemplate(source)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingError(f"cannot read chat_template_file {path}: {reason}") from error
    except TemplateError as error:
        raise SettingError(f"chat_template_file {path}: {error}") from error
    return source


def _complain(problem: object, code: app.Exit) -> app.Exit:
    print(f"llmnode: {problem}", file=sys.stderr)
    return code


def _nearest(argument: str) -> str:
    flag = argument.partition("=")[0]
    close = difflib.get_close_matches(flag, [row.flag for row in rows(Settings)], n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    """Complains in one line; argparse would put the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_complain(f"{message}; llmnode --help shows more", app.Exit.CONFIGURATION))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="llmnode", description="Serve one model over HTTP.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"llmnode {release()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in (
        ("serve", "serve the model until a signal"),
        ("check", "say whether the configuration and the model can be served, without serving"),
        ("settings", "show every setting, its value and where it came from"),
    ):
        command = commands.add_parser(name, help=help, description=help.capitalize() + ".", allow_abbrev=False)
        add_flags(command, Settings)
        if name == "settings":
            command.add_argument("--markdown", action="store_true", help="the table for the docs, with defaults only")
    return parser
