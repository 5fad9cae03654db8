"""Bodies of llama-server's own /completion and /infill: a translation to that of /v1/completions, with what only they
know kept aside for their narrator (native_answer.py).

Owns: what their fields are called elsewhere, and llama-server's defaults, which scripts written for it rely on. Refuses
to know: samplers, and how an answer is told. Source of names, defaults and shapes: the README of llama.cpp's server.

`samplers` is both a list of what is applied and its order. The first is honoured: what is not named is switched off. An
order other than the sampler's own (engine/sampler.py) is refused, but for the place of `temperature`, which is always
the sampler's. `n_predict: 0` computes the prompt and says nothing, to have it in the cache (editors do so while their
user thinks): one token is drawn for that, and not told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmnode.api import prompts, schema
from llmnode.api.fields import Fields, show
from llmnode.api.prompts import Prompt
from llmnode.api.rules import Rules
from llmnode.api.schema import CompletionRequest
from llmnode.wire.errors import InvalidRequest

DEFAULTS: Mapping[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""Where they differ from those of OpenAI's endpoints."""

_NEUTRAL: Mapping[str, Mapping[str, Any]] = {
    "penalties": {"repeat_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0},
    "dry": {"dry_multiplier": 0},
    "top_n_sigma": {"top_n_sigma": 0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1},
    "top_p": {"top_p": 1},
    "min_p": {"min_p": 0},
    "xtc": {"xtc_probability": 0},
}
"""Samplers in the order in which they are applied, and what switches each off."""

ALL = ("penalties", "dry", "top_n_sigma", "top_k", "temperature", "typ_p", "top_p", "min_p", "xtc")
"""All that are applied where a body names none, in their order."""
_ANYWHERE = ("temperature", "infill")
"""Samplers whose place in the list says nothing: `infill` comes last, `temperature` where `ALL` has it."""
_OTHER_NAMES = {"typical_p": "typ_p", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "typ-p": "typ_p"}
_LIMITS_OF_TIME = ("t_max_predict_ms", "t_max_prompt_ms")
_MAX_FIELDS, _MAX_PATH = 64, 128


@dataclass(frozen=True)
class Native:
    """What only these endpoints know of a request.

    silent: only the prompt is wanted.      tokens: ids are wanted in an answer that is not streamed.
    fields: paths in the answer that are wanted, empty for all of it.
    settings: of `generation_settings`, those that no sampler knows.
    """

    silent: bool
    tokens: bool
    fields: tuple[str, ...]
    settings: Mapping[str, Any]


def completion(body: Mapping[str, Any], rules: Rules, *, seed: int) -> CompletionRequest:
    """Read a body of /completion. Raises InvalidRequest, ModelNotFound."""

    def read(fields: Fields) -> tuple[Prompt, ...]:
        return prompts.read(fields, rules.n_vocab, rules.max_answers, mixed=True)

    return _read(body, rules, seed, read, ("prompt",))


def infill(body: Mapping[str, Any], rules: Rules, *, seed: int) -> CompletionRequest:
    """Read a body of /infill. Raises InvalidRequest, ModelNotFound."""

    def read(fields: Fields) -> tuple[Prompt, ...]:
        return (prompts.gap(fields),)

    return _read(body, rules, seed, read, ("prompt", "input_prefix", "input_suffix", "input_extra"))


def _read(
    body: Mapping[str, Any],
    rules: Rules,
    seed: int,
    read: Callable[[Fields], tuple[Prompt, ...]],
    places: tuple[str, ...],
) -> CompletionRequest:
    """places: of the prompt's parts, which `read` takes."""
    fields = Fields(body)
    first, *more = read(fields)
    silent, limit = _limit(fields, rules)
    top = fields.whole("n_probs", 0, schema.MAX_TOP_LOGPROBS) or None
    choices = fields.whole("n_cmpl", 1)
    tokens, paths = fields.flag("return_tokens"), _paths(fields)
    off, names = _samplers(fields)
    ignored = [name for name in _LIMITS_OF_TIME if (fields.whole(name, -1) or 0) > 0]
    ignored += ["n_indent"] if fields.whole("n_indent", 0) else []
    fields.refuse({"echo": (False,), "suffix": ("",), "logprobs": (0, False), "response_format": ()})
    kept = {
        name: value
        for name, value in fields.body.items()
        if name not in _TRANSLATED and name not in _LIMITS_OF_TIME and name not in places
    }
    said: dict[str, Any] = {**DEFAULTS, **kept, **off, "prompt": [0]}
    if isinstance(said["temperature"], (int, float)) and said["temperature"] < 0:
        said["temperature"] = 0  # llama-server's way to be greedy
    for name, value in (("max_tokens", limit), ("logprobs", top), ("n", choices)):
        if value is not None:
            said[name] = value
    asked = schema.completion(said, rules, seed=seed)
    schema.check_answers(1 + len(more), asked.options.choices, rules)
    if ignored and rules.strict:
        raise InvalidRequest(
            f"{ignored[0]} has no effect here, and strict_fields refuses such fields",
            param=ignored[0],
            code="unknown_parameter",
        )
    options = replace(
        asked.options,
        sampling=replace(asked.options.sampling, infill="infill" in names),
        ignored=tuple(sorted({*asked.options.ignored, *ignored})),
        body={**fields.body, "prompt": fields.body.get("prompt", "")},
    )
    extras = Native(silent, tokens, paths, {"max_tokens": limit, "n_probs": top or 0, "samplers": names})
    return CompletionRequest(first, options, tuple(more), extras=extras)


_TRANSLATED = frozenset(
    {"n_predict", "max_tokens", "n_probs", "n_cmpl", "return_tokens", "response_fields", "samplers", "n_indent"}
)


def _limit(fields: Fields, rules: Rules) -> tuple[bool, int | None]:
    """Whether only the prompt is wanted, and how many tokens at most. -1 and -2 are llama-server's "no limit"."""
    found = {name: fields.whole(name, -2, rules.max_tokens or None) for name in ("n_predict", "max_tokens")}
    given = [value for value in found.values() if value is not None]
    if len(set(given)) > 1:
        raise InvalidRequest(
            f"n_predict ({given[0]}) and max_tokens ({given[1]}) contradict each other: send one", param="n_predict"
        )
    if not given or given[0] < 0:
        return False, None
    return given[0] == 0, max(1, given[0])


def _paths(fields: Fields) -> tuple[str, ...]:
    value = fields.get("response_fields")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
        raise fields.wrong("response_fields", "must be a list of texts", value)
    if len(value) > _MAX_FIELDS or max(map(len, value), default=0) > _MAX_PATH:
        raise InvalidRequest(
            f"response_fields may hold {_MAX_FIELDS} texts of {_MAX_PATH} characters at most", param="response_fields"
        )
    return tuple(value)


def _samplers(fields: Fields) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields that switch off what is not named, and the names of those that are on."""
    value = fields.get("samplers")
    if value is None:
        return {}, ALL
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fields.wrong("samplers", "must be a list of names", value)
    names = [str(_OTHER_NAMES.get(name, name)) for name in value]
    known = list(_NEUTRAL)
    unknown = [name for name in names if name not in _NEUTRAL and name not in _ANYWHERE]
    if unknown:
        raise InvalidRequest(
            f"samplers may name {', '.join((*known, *_ANYWHERE))}, got {show(unknown[0])}", param="samplers"
        )
    places = [known.index(name) for name in names if name in _NEUTRAL]
    if places != sorted(set(places)):
        raise InvalidRequest(
            f"samplers must be in the order {', '.join(known)}, each once, got {show(value)}",
            param="samplers",
            code="unsupported_parameter",
        )
    off = {field: neutral for name in known if name not in names for field, neutral in _NEUTRAL[name].items()}
    if "temperature" not in names:
        off["temperature"] = 1
    return off, tuple(names)
