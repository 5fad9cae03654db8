"""The page that shows a document: plain HTML, made on the server, without a script or anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""The page may use its own style and nothing else."""

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 18%, Canvas);
  --soft: color-mix(in srgb, CanvasText 68%, Canvas); --mark: light-dark(#0a6b4f, #5fd3ae); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 } h1 small { font-weight: normal; color: var(--soft) }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid var(--line) }
details { border-bottom: 1px solid var(--line) } summary { padding: .5rem 0; cursor: pointer }
summary:focus-visible { outline: 2px solid var(--mark) }
code { font: .9em ui-monospace, monospace } .method { color: var(--mark); text-transform: uppercase }
.what { color: var(--soft) } dl { margin: 0 0 1rem } dd { margin: 0 0 .6rem 1.2rem; color: var(--soft) }
ul { list-style: none; padding-left: 1.2rem; margin: .2rem 0 } .status { columns: 2; font-size: .9em }
@media (max-width: 40rem) { .status { columns: 1 } }
"""


def page(document: Mapping[str, Any]) -> str:
    """A document of `document.document` as HTML."""
    info = document["info"]
    chapters: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            chapters.setdefault(operation["tags"][0], []).append(_operation(path, method, operation))
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(parts)}" for tag, parts in chapters.items())
    title = escape(info["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: API</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{title} <small>{escape(info['version'])}</small></h1><p>{_words(info['description'])}</p>"
        f'<p><a href="openapi.json">openapi.json</a></p>{body}</body></html>'
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = ["<p>No key is asked for.</p>"] if "security" in operation else []
    if parameters := operation.get("parameters"):
        parts.append(_list((one["name"], one["schema"], one["required"]) for one in parameters))
    if body := operation.get("requestBody"):
        parts.append(_fields(body["content"]["application/json"]["schema"]))
    statuses = "".join(
        f"<li><code>{escape(status)}</code> {_words(answer['description'])}</li>"
        for status, answer in operation["responses"].items()
    )
    parts.append(f'<ul class="status">{statuses}</ul>')
    head = f'<code><span class="method">{escape(method)}</span> {escape(path)}</code>'
    about = f'<span class="what">{escape(operation["summary"])}</span>'
    return (
        f'<details id="{escape(operation["operationId"])}"><summary>{head} {about}</summary>{"".join(parts)}</details>'
    )


def _fields(schema: Mapping[str, Any]) -> str:
    """The fields of an object, with those of objects in it below them."""
    required = schema.get("required", ())
    return _list((name, field, name in required) for name, field in schema.get("properties", {}).items())


def _list(fields: Iterator[tuple[str, Mapping[str, Any], bool]]) -> str:
    said = []
    for name, schema, required in fields:
        note = ", required" if required else ""
        inner = _fields(schema.get("items", schema))
        said.append(
            f"<dt><code>{escape(name)}</code> <span class='what'>{escape(_kind(schema))}{note}</span></dt>"
            f"<dd>{_words(schema.get('description', ''))}{inner}</dd>"
        )
    return f"<dl>{''.join(said)}</dl>" if said else ""


def _kind(schema: Mapping[str, Any]) -> str:
    """What a value may be, in a few words: `integer, 1 to 16`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    above = schema.get("exclusiveMinimum")
    if above is not None:
        kind += f", above {above:g}"
    elif low is not None:
        kind += f", {low:g} to {high:g}" if high is not None else f", from {low:g}"
    if high is not None and low is None:
        kind += f", at most {high:g}"
    return kind


def _words(text: str) -> str:
    """Escaped, with `code` in backticks."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))
