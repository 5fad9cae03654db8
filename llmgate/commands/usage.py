"""`llmgate usage`: what was used, by key, model, node and day, from the database; the gate need not run."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing

from llmgate.commands.place import BAD, OK, add_place, open_store, say
from llmgate.core.explanation import columns
from llmgate.core.usage import GROUPS, MOST_ROWS, USUAL_DAYS, BadQuestion, Question, as_csv, report, table
from llmnode.service.settings import printed

_TIME = "a day (2026-12-01), a time of ISO 8601, or 7d, 12h, 30m ago"
_ASKED = ("by", "since", "until", "key", "model")


def add(parser: argparse.ArgumentParser) -> None:
    """Give the command its flags."""
    groups = ", ".join(GROUPS)
    parser.add_argument(
        "--by", default="key,model", metavar="A,B", help=f"add up by these of {groups} (default: %(default)s)"
    )
    parser.add_argument("--since", metavar="TIME", help=f"{_TIME} (default: {USUAL_DAYS} days ago)")
    parser.add_argument("--until", metavar="TIME", help="the same; itself not part of it (default: now)")
    parser.add_argument("--key", metavar="NAME", help="of this key alone")
    parser.add_argument("--model", metavar="NAME", help="of this model alone")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV")
    form.add_argument("--json", action="store_true", help="print JSON")
    add_place(parser)


def run(options: argparse.Namespace) -> int:
    """Print the report. Raises SettingError, StoreError."""
    try:
        asked = Question.parse(
            {name: getattr(options, name) for name in ("by", "since", "until", "key", "model")}, time.time()
        )
    except BadQuestion as error:
        return say(BAD, f"--{error}")
    with closing(open_store(options)) as store:
        rows, total = store.usage(asked)
    if options.json:
        printed(json.dumps(report(asked, rows, total), indent=2))
    elif options.csv:
        printed(as_csv(asked.by, rows).rstrip("\n"))
    else:
        head, *cells = table(asked.by, rows)
        sums = table((), [total])[1]
        printed(columns(tuple(head), *map(tuple, cells), ("total", *[""] * (len(asked.by) - 1), *sums)))
    if len(rows) == MOST_ROWS:
        say(OK, f"only the first {MOST_ROWS} rows are shown; the total is of all")
    return OK
