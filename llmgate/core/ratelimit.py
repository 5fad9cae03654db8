"""What a client hears of its key's limits: the headers of every answer, and the refusal with 429."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmgate.core.limits import NAMES, Limits, Refusal, State, resets, use
from llmnode.wire import headers as names
from llmnode.wire.errors import ApiError, Overloaded

LONGEST_RETRY_S = 60.0
"""SDKs wait no longer than that, and then ask again too early; beyond it they are told not to."""


class OverLimit(ApiError):
    """429: the key has used what it may, or the request asks for more than the key may ever use."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, refusal: Refusal, shown: Mapping[str, str]) -> None:
        """shown: the headers of every answer, below."""
        budget = refusal.limit in ("tokens_per_day", "tokens_per_month")
        wait_s = None if refusal.wait_ms is None else refusal.wait_ms / 1000
        super().__init__(_sentence(refusal), code="insufficient_quota" if budget else None, retry_after=wait_s)
        self.refusal, self._shown = refusal, shown

    def body(self) -> dict[str, Any]:
        """`error.limit` says which limit, what it is, what is used of it and what was asked for."""
        limit, most, used, asked, _ = self.refusal
        said = super().body()
        said["error"]["limit"] = {"name": limit, "limit": most, "used": used, "asked": asked}
        return said

    def headers(self) -> dict[str, str]:
        patient = self.retry_after is not None and self.retry_after <= LONGEST_RETRY_S
        return {**super().headers(), **self._shown} | ({} if patient else {names.SHOULD_RETRY: "false"})


class LimitsUnavailable(Overloaded):
    """503: what the key has used cannot be counted now, so nothing of it is given out."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            "what this key has used cannot be counted at the moment", retry_after=retry_after, code="limits_unavailable"
        )


def _sentence(refusal: Refusal) -> str:
    limit, most, used, asked, wait_ms = refusal
    if wait_ms is None:
        return f"this request may use {asked} tokens, and the key's {limit} is {most}: it can never be let in"
    if limit == "concurrent_requests":
        return f"the key's concurrent_requests is {most}, and {used} of its requests are under way"
    what = "the request is one more" if limit == "requests_per_minute" else f"the request may use {asked}"
    return f"the key's {limit} is {most}, of which {used} are used, and {what}: come back in {span(wait_ms)}"


def headers(limits: Limits, state: State) -> dict[str, str]:
    """`x-ratelimit-...` of an answer, as OpenAI's API has them; `reset` is when all of it is there again.

    Tokens are those of a minute; of a key that has no such limit, those of the budget that has least left.
    """
    used, empty = use(state, limits), resets(state, limits)
    most = {
        name: (limit, used[i], empty[i]) for i, name in enumerate(NAMES) if (limit := getattr(limits, name)) is not None
    }
    budgets = [most[name] for name in ("tokens_per_day", "tokens_per_month") if name in most]
    least = min(budgets, key=lambda budget: budget[0] - budget[1], default=None)
    said = {}
    for what, one in (("requests", most.get("requests_per_minute")), ("tokens", most.get("tokens_per_minute", least))):
        if one:
            said[f"x-ratelimit-limit-{what}"] = str(one[0])
            said[f"x-ratelimit-remaining-{what}"] = str(max(0, one[0] - one[1]))
            said[f"x-ratelimit-reset-{what}"] = span(one[2])
    return said


def span(ms: int) -> str:
    """A duration as OpenAI's API writes it, down to a second: "350ms", "1s", "6m0s", "23h0m1s"."""
    if ms < 1000:
        return f"{max(0, ms)}ms"
    seconds = -(-ms // 1000)
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours}h{minutes % 60}m{seconds % 60}s"
    return f"{minutes}m{seconds % 60}s" if minutes else f"{seconds}s"
