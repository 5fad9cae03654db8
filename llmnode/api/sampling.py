"""Reads how answers are drawn: the fields of OpenAI's API and of the extended samplers, with their ranges.

Source of names: OpenAI's API reference; for the extended samplers the README of llama.cpp's server, and vLLM's sampling
parameters where those have a name of their own. What the fields do is sampler.py's to tell.
"""

from __future__ import annotations

import math
from typing import Any

from llmnode.api.fields import Fields
from llmnode.api.rules import Rules
from llmnode.engine.types import Sampling
from llmnode.wire.errors import InvalidRequest

MAX_SEED = 2**32 - 2
MAX_BREAKERS, MAX_BREAKER_CHARACTERS = 64, 64
MAX_BIAS = 100
MAX_WINDOW = 2**31 - 1


def read(fields: Fields, rules: Rules, seed: int) -> Sampling:
    """-1 is llama.cpp's way to switch a truncation off (and vLLM's for top_k), or to leave the seed to the server."""
    given_seed = fields.whole("seed", -1, MAX_SEED)
    repeat_penalty, repeat_last_n = _repetition(fields)
    breakers = fields.texts("dry_sequence_breakers", MAX_BREAKERS, MAX_BREAKER_CHARACTERS)
    plain = Sampling()
    return Sampling(
        temperature=fields.number("temperature", 1.0, 0, 2),
        top_p=fields.number("top_p", 1.0, 0, 1, above=True),
        top_k=max(0, fields.whole("top_k", -1, MAX_WINDOW) or 0),
        min_p=fields.number("min_p", 0.0, 0, 1),
        seed=seed if given_seed is None or given_seed < 0 else given_seed,
        typical_p=fields.number("typical_p", 1.0, 0, 1, above=True),
        top_n_sigma=max(0.0, fields.number("top_n_sigma", 0.0, -1, 100)),
        xtc_probability=fields.number("xtc_probability", 0.0, 0, 1),
        xtc_threshold=fields.number("xtc_threshold", plain.xtc_threshold, 0, 1),
        dry_multiplier=fields.number("dry_multiplier", 0.0, 0, 100),
        dry_base=fields.number("dry_base", plain.dry_base, 1, 100),
        dry_allowed_length=_or(fields.whole("dry_allowed_length", 0, 1024), plain.dry_allowed_length),
        dry_last_n=_or(fields.whole("dry_penalty_last_n", -1, MAX_WINDOW), plain.dry_last_n),
        dry_breakers=plain.dry_breakers if breakers is None else breakers,
        repeat_penalty=repeat_penalty,
        repeat_last_n=repeat_last_n,
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        logit_bias=_logit_bias(fields, rules),
        mirostat=fields.whole("mirostat", 0, 2) or 0,
        mirostat_tau=fields.number("mirostat_tau", plain.mirostat_tau, 0, 100, above=True),
        mirostat_eta=fields.number("mirostat_eta", plain.mirostat_eta, 0, 1),
    )


def _repetition(fields: Fields) -> tuple[float, int]:
    """The penalty on repetition and its window. vLLM's name means all tokens of prompt and answer, llama.cpp's the
    last 64, where repeat_last_n does not say otherwise."""
    ours = fields.number("repeat_penalty", 0.0, 0, 10, above=True)
    theirs = fields.number("repetition_penalty", 0.0, 0, 10, above=True)
    if ours and theirs and ours != theirs:
        raise InvalidRequest(
            f"repetition_penalty ({theirs:g}) and repeat_penalty ({ours:g}) contradict each other: send one",
            param="repetition_penalty",
        )
    last_n = -1 if theirs and not ours else Sampling().repeat_last_n
    return ours or theirs or 1.0, _or(fields.whole("repeat_last_n", -1, MAX_WINDOW), last_n)


def _logit_bias(fields: Fields, rules: Rules) -> tuple[tuple[int, float], ...]:
    """OpenAI's object of {"ID": BIAS}, or llama.cpp's list of [ID, BIAS], where false as a bias forbids the token."""
    value = fields.get("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, (dict, list)):
        raise fields.wrong("logit_bias", "must be an object of token ids and biases", value)
    if len(value) > rules.max_logit_bias:
        raise InvalidRequest(
            f"logit_bias may hold {rules.max_logit_bias} tokens at most, got {len(value)}", param="logit_bias"
        )
    pairs = [(_id_of(key), bias) for key, bias in value.items()] if isinstance(value, dict) else value
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise fields.wrong("logit_bias", "as a list must hold pairs of a token id and a bias", pair)
        token, bias = pair
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rules.n_vocab:
            raise fields.wrong("logit_bias", f"must name token ids from 0 to {rules.n_vocab - 1}", token)
        if token in biases:
            raise fields.wrong("logit_bias", "names a token twice", token)
        if bias is False and isinstance(value, list):
            biases[token] = -math.inf
        elif isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise fields.wrong("logit_bias", f"must have a bias from -{MAX_BIAS} to {MAX_BIAS} for token {token}", bias)
        else:
            biases[token] = float(bias)
    return tuple((token, bias) for token, bias in biases.items() if bias)


def _id_of(key: str) -> Any:
    """The token id in a key of OpenAI's object; what is none stays as it is, for the error."""
    return int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else key


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
