"""JSON to typed requests: the fields of OpenAI's API and those that open servers share, and which this node honours.

Every field of a request falls in one of three groups, and none is dropped in silence:
1. it changes the answer and is honoured, within the range that its reader states;
2. it changes the answer and cannot be honoured: refused by name, unless its value is the neutral one (`REFUSED`);
3. it is advice, or nobody has heard of it: accepted and named in `x-llmrack-ignored`; `strict_fields` refuses it.
Source of names and shapes: OpenAI's API reference; for the extended samplers the README of llama.cpp's server, and
vLLM's sampling parameters where those have a name of their own. What the fields do is sampler.py's to tell.
Knows nothing of Sanic, the engine's thread, templates, or how a grammar is compiled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmnode.api.fields import Fields, kind, show
from llmnode.engine.types import Sampling
from llmnode.wire.errors import InvalidRequest, ModelNotFound

MAX_SEED = 2**32 - 2
MAX_CHOICES = 16
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_BREAKERS, MAX_BREAKER_CHARACTERS = 64, 64
MAX_BIASES, MAX_BIAS = 1024, 100
MAX_TOP_LOGPROBS = 20
MAX_WINDOW = 2**31 - 1

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles that a message may have, and what the template calls them: `developer` is OpenAI's new word for `system`."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "adaptive_target": (-1,),
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "dynatemp_range": (0,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({}, ""),
    "guided_regex": ("",),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora": ([],),
    "min_keep": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n_indent": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "prompt_logprobs": (0,),
    "reasoning_effort": (),
    "samplers": (),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "suffix": ("",),
    "t_max_predict_ms": (-1, 0),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that change the answer in ways this node does not know, with the values that ask for nothing."""


@dataclass(frozen=True)
class Constraint:
    """What an answer must match, as the client wrote it. Compiling it may take long, so that is done elsewhere.

    field: where in the request it stood, for errors.       source: a GBNF text or a schema; None for any object.
    """

    kind: Literal["gbnf", "json_schema", "json_object"]
    field: str
    source: Any = None


@dataclass(frozen=True)
class Options:
    """What every kind of request can say.

    max_tokens: None for "up to the context".       choices: answers wanted, each drawn with a seed of its own.
    logprobs: how many of the most probable tokens to report beside each token; None for no report.
    ignored: names of the fields that had no effect.
    body: the request as it was decoded, which is what gates know it by.
    """

    model: str
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]
    choices: int = 1
    logprobs: int | None = None
    constraint: Constraint | None = None
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class ChatRequest:
    """`messages`: objects with `role` and `content` as text, ready for the template."""

    messages: tuple[Mapping[str, Any], ...]
    options: Options


@dataclass(frozen=True)
class CompletionRequest:
    """`prompt`: a text, or token ids that are used as they are."""

    prompt: str | tuple[int, ...]
    options: Options


@dataclass(frozen=True)
class Rules:
    """What this node allows: names of its model, tokens in an answer (0: up to the context), answers to one request,
    and how strict it is."""

    models: tuple[str, ...]
    n_vocab: int
    max_tokens: int = 0
    strict: bool = False
    max_choices: int = MAX_CHOICES


def decode(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. Raises InvalidRequest that says where it is malformed."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the body is not UTF-8 text: byte {error.start} is invalid", code="invalid_json"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", code="invalid_json"
        ) from None
    except RecursionError:
        raise InvalidRequest("the body is JSON that is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if b"\\u" in body:
        _refuse_lone_surrogates(value)
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {kind(value)}", code="invalid_json")
    return value


def chat(body: Mapping[str, Any], rules: Rules, *, seed: int) -> ChatRequest:
    """Read a body of /v1/chat/completions; `seed` is for one that brings none. Raises InvalidRequest, ModelNotFound."""
    fields = Fields(body)
    messages = _messages(fields)
    return ChatRequest(messages, _options(fields, rules, seed, chat=True))


def completion(body: Mapping[str, Any], rules: Rules, *, seed: int) -> CompletionRequest:
    """Read a body of /v1/completions. Raises InvalidRequest, ModelNotFound."""
    fields = Fields(body)
    prompt = _prompt(fields, rules)
    return CompletionRequest(prompt, _options(fields, rules, seed, chat=False))


def inference(body: Mapping[str, Any], rules: Rules, *, seed: int) -> CompletionRequest:
    """Read a body of /inference: as a completion, but there is no stream."""
    fields = Fields(body)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise InvalidRequest(f"prompt must be a text that is not empty, got {kind(prompt)}", param="prompt")
    fields.refuse({"stream": (False,), "n": (1,), "logprobs": (False,)}, "is not supported at /inference")
    return CompletionRequest(prompt, _options(fields, rules, seed, chat=False))


def _options(fields: Fields, rules: Rules, seed: int, *, chat: bool) -> Options:
    model = fields.get("model")
    if model is None:
        model = rules.models[0]  # this node serves one model, so there is no doubt which is meant
    if not isinstance(model, str) or not model:
        raise InvalidRequest(f"model must be the name of a model, got {show(model)}", param="model")
    if model not in rules.models:
        raise ModelNotFound(model, list(rules.models))
    sampling = _sampling(fields, rules, seed)
    choices = fields.whole("n", 1, rules.max_choices) or 1
    logprobs = _chat_logprobs(fields) if chat else _completion_logprobs(fields)
    stream = fields.flag("stream")
    include_usage = _stream_options(fields, stream)
    max_tokens = _max_tokens(fields, rules, chat=chat)
    stop = fields.texts("stop", MAX_STOPS, MAX_STOP_CHARACTERS, or_one=True) or ()
    constraint = _constraint(fields)
    ignore_eos = fields.flag("ignore_eos")
    if ignore_eos and constraint:
        raise InvalidRequest(
            f"ignore_eos and {constraint.field} contradict each other: what must match has an end", param="ignore_eos"
        )
    fields.refuse({**REFUSED, "best_of": (choices,)})
    ignored = tuple(fields.rest())
    if ignored and rules.strict:
        raise InvalidRequest(
            f"{ignored[0]} has no effect here, and strict_fields refuses such fields",
            param=ignored[0],
            code="unknown_parameter",
        )
    return Options(
        model,
        sampling,
        max_tokens,
        stop,
        ignore_eos,
        stream,
        include_usage,
        ignored,
        choices,
        logprobs,
        constraint,
        fields.body,
    )


def _sampling(fields: Fields, rules: Rules, seed: int) -> Sampling:
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
    if len(value) > MAX_BIASES:
        raise InvalidRequest(f"logit_bias may hold {MAX_BIASES} tokens at most, got {len(value)}", param="logit_bias")
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


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise InvalidRequest(f"top_logprobs ({top}) is only allowed with logprobs: true", param="top_logprobs")
    return (top or 0) if wanted else None


def _completion_logprobs(fields: Fields) -> int | None:
    """In completions `logprobs` is itself the number; 0 reports the drawn tokens alone."""
    fields.refuse({"top_logprobs": (0,)})
    return None if fields.get("logprobs") is False else fields.whole("logprobs", 0, MAX_TOP_LOGPROBS)


def _constraint(fields: Fields) -> Constraint | None:
    found = [one for one in (_response_format(fields), _json_schema(fields), _grammar(fields)) if one]
    if len(found) > 1:
        raise InvalidRequest(
            f"{found[1].field} and {found[0].field} contradict each other: send one", param=found[1].field
        )
    return found[0] if found else None


def _grammar(fields: Fields) -> Constraint | None:
    text = fields.get("grammar")
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        raise InvalidRequest(f"grammar must be a text, got {kind(text)}", param="grammar")
    return Constraint("gbnf", "grammar", text)


def _json_schema(fields: Fields) -> Constraint | None:
    """llama.cpp's field: a schema as it is; an empty one stands for any object."""
    schema = fields.object("json_schema")
    if schema is None:
        return None
    return Constraint("json_schema", "json_schema", schema) if schema else Constraint("json_object", "json_schema")


def _response_format(fields: Fields) -> Constraint | None:
    """OpenAI's field, with llama.cpp's `schema` in a json_object. `strict: false` is held to the schema as well."""
    value = fields.object("response_format")
    if value is None:
        return None
    format = Fields(value, "response_format.")
    type = format.get("type")
    constraint = None
    if type == "json_object":
        schema = format.object("schema")
        constraint = Constraint("json_object", "response_format")
        if schema:
            constraint = Constraint("json_schema", "response_format.schema", schema)
    elif type == "json_schema":
        inner = Fields(format.object("json_schema") or {}, "response_format.json_schema.")
        schema = inner.object("schema")
        if schema is None:
            raise inner.wrong("schema", "must be an object", schema)
        inner.flag("strict")
        inner.get("name")  # OpenAI wants one; it names the schema and says nothing of the answer
        constraint = Constraint("json_schema", "response_format.json_schema.schema", schema)
        fields.advice += inner.rest()
    elif type != "text":
        raise format.wrong("type", "must be text, json_object or json_schema", type)
    fields.advice += format.rest()
    return constraint


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _max_tokens(fields: Fields, rules: Rules, *, chat: bool) -> int | None:
    limit = rules.max_tokens or None
    old = fields.whole("max_tokens", 1, limit)
    new = fields.whole("max_completion_tokens", 1, limit) if chat else None
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_completion_tokens ({new}) and max_tokens ({old}) contradict each other: send one",
            param="max_completion_tokens",
        )
    return new or old or limit


def _stream_options(fields: Fields, stream: bool) -> bool:
    value = fields.object("stream_options")
    if value is None:
        return False
    if not stream:
        raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
    inner = Fields(value, "stream_options.")
    wanted = inner.flag("include_usage")
    fields.advice += inner.rest()
    return wanted


def _prompt(fields: Fields, rules: Rules) -> str | tuple[int, ...]:
    value = fields.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            f"prompt must be a text or a list of token ids, not empty, got {kind(value)}", param="prompt"
        )
    if isinstance(value[0], (str, list)):
        raise InvalidRequest(
            f"prompt may hold one prompt, got a list of {len(value)}: send one request each", param="prompt"
        )
    for index, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rules.n_vocab:
            raise InvalidRequest(
                f"prompt[{index}] must be a token id from 0 to {rules.n_vocab - 1}, got {show(token)}", param="prompt"
            )
    return tuple(value)


def _messages(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"messages must be a list with at least one message, got {kind(value)}", param="messages")
    return tuple(_message(message, f"messages[{index}]", fields.advice) for index, message in enumerate(value))


def _message(value: Any, where: str, advice: list[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be an object with role and content, got {kind(value)}", param=where)
    fields = Fields(value, where + ".")
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise fields.wrong("role", f"must be one of {', '.join(ROLES)}", role)
    fields.refuse({"tool_calls": ([],), "function_call": (), "audio": ()})
    message: dict[str, Any] = {"role": ROLES[role], "content": _content(fields, where, advice)}
    for name in ("name", "reasoning_content"):
        text = fields.get(name)
        if text is not None and not isinstance(text, str):
            raise InvalidRequest(f"{where}.{name} must be a text, got {kind(text)}", param=f"{where}.{name}")
        if text:
            message[name] = text
    advice += fields.rest()
    return message


def _content(fields: Fields, where: str, advice: list[str]) -> str:
    """The text of a message; parts of type text are put together without anything between them."""
    value = fields.get("content")
    if isinstance(value, str):
        return value
    param = f"{where}.content"
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{param} must be a text or a list of parts, got {kind(value)}", param=param)
    texts = []
    for index, item in enumerate(value):
        at = f"{param}[{index}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{at} must be an object with a type, got {kind(item)}", param=at)
        part = Fields(item, at + ".")
        text = part.get("text")
        if part.get("type") != "text":
            raise part.wrong("type", "must be text, which is all that this model takes", part.get("type"))
        if not isinstance(text, str):
            raise InvalidRequest(f"{at}.text must be a text, got {kind(text)}", param=f"{at}.text")
        texts.append(text)
        advice += part.rest()
    return "".join(texts)


def models(names: tuple[str, ...], created: int) -> dict[str, Any]:
    """The body of /v1/models: each name that works, aliases too."""
    data = [{"id": name, "object": "model", "created": created, "owned_by": "llmrack"} for name in names]
    return {"object": "list", "data": data}


def _no_constant(name: str) -> Any:
    raise InvalidRequest(f"the body is not valid JSON: {name} is no JSON number", code="invalid_json")


def _refuse_lone_surrogates(value: Any) -> None:
    """JSON can spell half of a UTF-16 pair, which is no text: a tokenizer and a reply could not encode it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the body holds an unpaired surrogate, {error.object[error.start]!a}, which is no character",
            code="invalid_json",
        ) from None
