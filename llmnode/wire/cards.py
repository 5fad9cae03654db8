"""How models are listed: OpenAI's shape, and Anthropic's for those whose requests name a version of its API.

Both sides of the wire list models, so that a client cannot tell them apart. Source: Anthropic's API reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

ANTHROPIC_VERSION = "anthropic-version"
"""The request header that every client of Anthropic's API sends."""


def listed(cards: Sequence[Mapping[str, Any]], *, anthropic: bool) -> dict[str, Any]:
    """The list of models. cards: of OpenAI's shape."""
    if not anthropic:
        return {"object": "list", "data": list(cards)}
    data = [card(one, anthropic=True) for one in cards]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"data": data, "has_more": False, **ends}


def card(openai: Mapping[str, Any], *, anthropic: bool) -> dict[str, Any]:
    """One model."""
    if not anthropic:
        return dict(openai)
    created = datetime.fromtimestamp(openai["created"], timezone.utc).isoformat().replace("+00:00", "Z")
    found = {"type": "model", "id": openai["id"], "display_name": openai["id"], "created_at": created}
    return found | ({"max_input_tokens": openai["n_ctx"]} if openai.get("n_ctx") else {})
