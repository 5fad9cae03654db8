"""`llmgate keys`: create, set, list, show, revoke, and apply a file of keys. The gate need not run; one that does takes
what is changed within a second or two.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgate.commands import keyfile
from llmgate.commands.place import BAD, NO, OK, add_place, load, open_store, say
from llmgate.core import keys
from llmgate.core.explanation import columns
from llmgate.core.grants import ROLES, BadGrant, changes, describe, expiry, iso, parse
from llmgate.core.keys import Key
from llmgate.core.limits import NAMES, NO_LIMITS
from llmgate.core.queue import Priority
from llmgate.database import KeyTaken
from llmgate.settings import require_one_truth
from llmnode.service.settings import printed

if TYPE_CHECKING:
    from llmgate.store import Store

Command = Callable[[argparse.Namespace], int]
_HEAD = ("NAME", "STATE", "ROLE", "PRIORITY", "EXPIRES", "OWNER", "MODELS", "LIMITS")


def add(parser: argparse.ArgumentParser) -> None:
    """Give the command its subcommands and their flags."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, more: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {more}".strip())
        sub.set_defaults(command=run)
        return sub

    create = command(
        "create",
        _create,
        "make a key",
        "Its secret is printed on standard output, once, unless it comes from a file; only its hash is kept.",
    )
    create.add_argument("name", help="who uses it; live keys have different names")
    create.add_argument("--admin", action="store_true", help="may use the admin API")
    create.add_argument(
        "--from-file",
        type=Path,
        metavar="PATH",
        help=f"take the secret from a file, - for standard input ({keys.MIN_SECRET} characters or more)",
    )
    create.add_argument(
        "--if-absent",
        action="store_true",
        help="with a live key of that name (and secret) already there, make it what the other flags say, print "
        '"unchanged" or "updated" and exit 0',
    )
    _add_rights(create)
    change = command("set", _set, "change what a key may do; what is not named stays")
    change.add_argument("name")
    change.add_argument("--role", choices=ROLES, help="admin: may use the admin API")
    _add_rights(change)
    show = command("list", _list, "list keys, without their secrets")
    show.add_argument("--json", action="store_true", help="print JSON")
    one = command("show", _show, "show one key as JSON, without its secret")
    one.add_argument("name")
    revoke = command("revoke", _revoke, "end a key")
    revoke.add_argument("name")
    apply = command(
        "apply",
        _apply,
        "make keys what a TOML file says",
        'Prints what it changes, one line a key, or "unchanged". Keys that are not in the file are left alone, but for '
        "--prune.",
    )
    apply.add_argument("file", metavar="FILE", help="- for standard input")
    apply.add_argument("--check", action="store_true", help="only print what would be changed")
    apply.add_argument("--prune", action="store_true", help="revoke keys that came from a file and are not in this one")
    apply.add_argument("--rotate", action="store_true", help="let a key have another secret than it has now")
    for sub in (create, change, show, one, revoke, apply):
        add_place(sub)


def _add_rights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--owner", metavar="TEXT", help="who answers for it")
    parser.add_argument("--models", metavar="A,B", help='models it may use, "" for all (default: all)')
    parser.add_argument(
        "--priority",
        choices=[priority.word for priority in Priority],
        help="who goes first when requests wait; a request may ask for less (default: normal)",
    )
    parser.add_argument("--expires", metavar="TIME", help='30d, 12h, a time in ISO 8601, or "never" (default: never)')
    for name in NAMES:
        what = name.replace("_", " ")
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="N", help=f'{what}, "none" for no limit (default: none)'
        )


def _create(options: argparse.Namespace) -> int:
    now = time.time()
    try:
        name = keys.check_name(options.name)
        rights = {"admin": options.admin, **_rights(options, now)}
        secret = (
            keyfile.secret_in(options.from_file)
            if options.from_file
            else keys.make_secret(secrets.token_bytes(keys.SECRET_BYTES))
        )
    except ValueError as error:
        return say(BAD, str(error))
    key = Key(name, keys.digest(secret), created=now, **rights)
    require_one_truth(load(options).values, limited=key.limits != NO_LIMITS)
    with closing(open_store(options)) as store:
        if options.if_absent:
            held = _live(store, name)
            if held and (options.from_file is None or held.digest == key.digest):
                wanted = replace(key, digest=held.digest, created=held.created, source=held.source)
                store.change_key(name, lambda held, others: wanted)
                print("unchanged" if wanted == held else "updated")
                return OK
        try:
            store.add_key(key)
        except KeyTaken as error:
            return say(NO, f"cannot create the key {name}: {error}; revoke it first, or choose another")
    print("created" if options.from_file else secret)
    return OK


def _set(options: argparse.Namespace) -> int:
    now = time.time()
    settings = load(options).values

    def decide(held: Key, others: tuple[Key, ...]) -> Key:
        rights = _rights(options, now, held)
        if options.role:
            rights["admin"] = options.role == "admin"
        wanted = replace(held, **rights)
        require_one_truth(settings, limited=wanted.limits != NO_LIMITS)
        told.extend(changes(held, wanted))
        return wanted

    told: list[str] = []
    with closing(open_store(options)) as store:
        try:
            found = store.change_key(options.name, decide)
        except ValueError as error:
            return say(BAD, str(error))
    if found is None:
        return _unknown(options.name)
    print(f"updated: {', '.join(told)}" if told else "unchanged")
    return OK


def _list(options: argparse.Namespace) -> int:
    with closing(open_store(options)) as store:
        held = store.all_keys()
    if options.json:
        shown = [{name: value for name, value in describe(key).items() if name != "use"} for key in held]
        return OK if printed(json.dumps(shown, indent=2)) else NO
    return OK if printed(columns(_HEAD, *(_row(key, time.time()) for key in held))) else NO


def _show(options: argparse.Namespace) -> int:
    with closing(open_store(options)) as store:
        found = _live(store, options.name)
    if found is None:
        return _unknown(options.name)
    shown = {name: value for name, value in describe(found).items() if name != "use"}
    return OK if printed(json.dumps(shown, indent=2)) else NO


def _revoke(options: argparse.Namespace) -> int:
    with closing(open_store(options)) as store:
        done = store.revoke_key(options.name, time.time())
    if not done:
        return _unknown(options.name)
    print("revoked")
    return OK


def _apply(options: argparse.Namespace) -> int:
    now = time.time()
    try:
        wanted = keyfile.read(options.file, now)
    except ValueError as error:
        return say(BAD, str(error))
    require_one_truth(load(options).values, limited=any(key.limits != NO_LIMITS for key in wanted))
    with closing(open_store(options)) as store:
        steps = keyfile.steps(store.all_keys(), wanted, now, prune=options.prune, rotate=options.rotate)
        refused = [step.why for step in steps if step.why]
        if refused:
            return say(NO, "; ".join(refused))
        for step in steps:
            if not options.check:
                try:
                    step.take(store, now)
                except KeyTaken as error:
                    return say(NO, f"cannot create the key {step.name}: {error}")
            print(step.told)
    if not steps:
        print("unchanged")
    return OK


def _rights(options: argparse.Namespace, now: float, held: Key | None = None) -> dict[str, Any]:
    """Fields of a `Key` that the flags name. Raises ValueError, which names the flag."""
    asked: dict[str, Any] = {}
    for name in ("owner", "priority"):
        if getattr(options, name) is not None:
            asked[name] = getattr(options, name)
    if options.models is not None:
        asked["models"] = [model.strip() for model in options.models.split(",") if model.strip()]
    limits = {name: _limit(name, text) for name in NAMES if (text := getattr(options, name)) is not None}
    if limits:
        asked["limits"] = limits
    fields = parse(asked, now, held.limits if held else NO_LIMITS)
    if options.expires is not None:
        try:
            fields["expires"] = expiry(options.expires, now)
        except ValueError as error:
            raise BadGrant("expires", f"--expires {error}") from None
    return fields


def _limit(name: str, text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise BadGrant(name, f'--{name.replace("_", "-")} must be a whole number or "none", got {text!r}') from None


def _live(store: Store, name: str) -> Key | None:
    return next((key for key in store.all_keys() if key.name == name and key.revoked is None), None)


def _unknown(name: str) -> int:
    return say(NO, f"there is no live key named {name!r}")


def _row(key: Key, now: float) -> tuple[str, ...]:
    state = "revoked" if key.revoked is not None else "live" if key.live(now) else "expired"
    limits = ", ".join(f"{name} {limit}" for name, limit in _named(key).items())
    expires = iso(key.expires) if key.expires is not None else "never"
    models = ",".join(key.models) or "all"
    return (key.name, state, ROLES[key.admin], key.priority.word, expires, key.owner or "-", models, limits or "none")


def _named(key: Key) -> Mapping[str, int]:
    return {name: limit for name in NAMES if (limit := getattr(key.limits, name)) is not None}
