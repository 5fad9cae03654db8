"""JSON to engine types and back: the shapes of OpenAI's API, and which of its fields this node honours.

Every field of a request falls in one of three groups, and none is dropped in silence:
1. it changes the answer and is honoured, within the range that its reader states;
2. it changes the answer and cannot be honoured: refused by name, unless its value is the neutral one (`REFUSED`);
3. it is advice, or nobody has heard of it: accepted and named in `x-llmrack-ignored`; `strict_fields` refuses it.
Source of names and shapes: OpenAI's API reference; top_k, min_p and ignore_eos as other servers of open models spell
them. Knows nothing of Sanic, the engine's thread or templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmnode.engine.types import Finish, Sampling
from llmnode.wire.errors import InvalidRequest, ModelNotFound
from llmnode.wire.node import Usage

MAX_SEED = 2**32 - 2
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles that a message may have, and what the template calls them: `developer` is OpenAI's new word for `system`."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({}, ""),
    "guided_regex": ("",),
    "json_schema": ({},),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "typical_p": (1,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that change the answer in ways this node does not know, with the values that ask for nothing."""


@dataclass(frozen=True)
class Options:
    """What every kind of request can say. `max_tokens`: None for "up to the context". `ignored` names advice fields."""

    model: str
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]


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
    """What this node allows: names of its model, tokens in an answer (0: up to the context), and how strict it is."""

    models: tuple[str, ...]
    n_vocab: int
    max_tokens: int = 0
    strict: bool = False


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
        raise InvalidRequest(f"the body must be a JSON object, got {_kind(value)}", code="invalid_json")
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
        raise InvalidRequest(f"prompt must be a text that is not empty, got {_kind(prompt)}", param="prompt")
    if fields.flag("stream"):
        raise InvalidRequest("stream is not supported here: use /v1/chat/completions", param="stream")
    return CompletionRequest(prompt, _options(fields, rules, seed, chat=False))


class Fields:
    """Reads a JSON object field by field and remembers which were looked at; null counts as absent."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._body = {name: value for name, value in body.items() if value is not None}
        self._seen: set[str] = set()
        self._where = where
        self.advice: list[str] = []

    def get(self, name: str) -> Any:
        """The value as it came, None when it is absent."""
        self._seen.add(name)
        return self._body.get(name)

    def number(self, name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        """A number from `low` (or above it) to `high`."""
        value = self.get(name)
        if value is None:
            return default
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high or (above and value == low):
            limits = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise InvalidRequest(f"{name} must be a number {limits}, got {_show(value)}", param=name)
        return float(value)

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        """A whole number from `low` to `high`, None when it is absent."""
        value = self.get(name)
        if value is None:
            return None
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or value < low or (high is not None and value > high):
            limits = f"from {low} to {high}" if high is not None else f"from {low}"
            raise InvalidRequest(f"{name} must be a whole number {limits}, got {_show(value)}", param=name)
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false, got {_show(value)}", param=name)
        return value

    def refuse(self, table: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise for a field of the table whose value asks for something."""
        for name, neutral in table.items():
            value = self.get(name)
            if value is not None and not any(_same(value, n) for n in neutral):
                raise InvalidRequest(
                    f"{self._where}{name} is not supported by this server, got {_show(value)}",
                    param=self._where + name,
                    code="unsupported_parameter",
                )

    def rest(self) -> list[str]:
        """Names of the fields that nobody has looked at, with the advice found in nested objects."""
        return sorted({self._where + name for name in self._body if name not in self._seen} | set(self.advice))


def _options(fields: Fields, rules: Rules, seed: int, *, chat: bool) -> Options:
    model = fields.get("model")
    if model is None:
        model = rules.models[0]  # this node serves one model, so there is no doubt which is meant
    if not isinstance(model, str) or not model:
        raise InvalidRequest(f"model must be the name of a model, got {_show(model)}", param="model")
    if model not in rules.models:
        raise ModelNotFound(model, list(rules.models))
    given_seed = fields.whole("seed", 0, MAX_SEED)
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0, 0, 2),
        top_p=fields.number("top_p", 1.0, 0, 1, above=True),
        top_k=fields.whole("top_k", 0) or 0,
        min_p=fields.number("min_p", 0.0, 0, 1),
        seed=seed if given_seed is None else given_seed,
    )
    if fields.whole("n", 1) not in (None, 1):
        raise InvalidRequest(f"n must be 1, since this server gives one choice, got {fields.get('n')}", param="n")
    stream = fields.flag("stream")
    include_usage = _stream_options(fields, stream)
    max_tokens = _max_tokens(fields, rules, chat=chat)
    stop = _stop(fields)
    ignore_eos = fields.flag("ignore_eos")
    fields.refuse(REFUSED)
    ignored = tuple(fields.rest())
    if ignored and rules.strict:
        raise InvalidRequest(
            f"{ignored[0]} has no effect here, and strict_fields refuses such fields",
            param=ignored[0],
            code="unknown_parameter",
        )
    return Options(model, sampling, max_tokens, stop, ignore_eos, stream, include_usage, ignored)


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


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    texts = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise InvalidRequest(f"stop must be a text or a list of texts, none empty, got {_show(value)}", param="stop")
    if len(texts) > MAX_STOPS:
        raise InvalidRequest(f"stop may hold {MAX_STOPS} texts at most, got {len(texts)}", param="stop")
    longest = max((len(t) for t in texts), default=0)
    if longest > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            f"a text in stop may have {MAX_STOP_CHARACTERS} characters at most, got {longest}", param="stop"
        )
    return tuple(texts)


def _stream_options(fields: Fields, stream: bool) -> bool:
    value = fields.get("stream_options")
    if value is None:
        return False
    if not isinstance(value, dict):
        raise InvalidRequest(f"stream_options must be an object, got {_kind(value)}", param="stream_options")
    if not stream:
        raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
    inner = Fields(value, "stream_options.")
    wanted = inner.get("include_usage")
    if wanted is not None and not isinstance(wanted, bool):
        raise InvalidRequest(
            f"stream_options.include_usage must be true or false, got {_show(wanted)}",
            param="stream_options.include_usage",
        )
    fields.advice += inner.rest()
    return bool(wanted)


def _prompt(fields: Fields, rules: Rules) -> str | tuple[int, ...]:
    value = fields.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            f"prompt must be a text or a list of token ids, not empty, got {_kind(value)}", param="prompt"
        )
    if isinstance(value[0], (str, list)):
        raise InvalidRequest(
            f"prompt may hold one prompt, got a list of {len(value)}: send one request each", param="prompt"
        )
    for index, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rules.n_vocab:
            raise InvalidRequest(
                f"prompt[{index}] must be a token id from 0 to {rules.n_vocab - 1}, got {_show(token)}", param="prompt"
            )
    return tuple(value)


def _messages(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"messages must be a list with at least one message, got {_kind(value)}", param="messages")
    return tuple(_message(message, f"messages[{index}]", fields.advice) for index, message in enumerate(value))


def _message(value: Any, where: str, advice: list[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be an object with role and content, got {_kind(value)}", param=where)
    fields = Fields(value, where + ".")
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(ROLES)}, got {_show(role)}", param=f"{where}.role"
        )
    fields.refuse({"tool_calls": ([],), "function_call": (), "audio": ()})
    message: dict[str, Any] = {"role": ROLES[role], "content": _content(fields, where, advice)}
    for name in ("name", "reasoning_content"):
        text = fields.get(name)
        if text is not None and not isinstance(text, str):
            raise InvalidRequest(f"{where}.{name} must be a text, got {_kind(text)}", param=f"{where}.{name}")
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
        raise InvalidRequest(f"{param} must be a text or a list of parts, got {_kind(value)}", param=param)
    texts = []
    for index, item in enumerate(value):
        at = f"{param}[{index}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{at} must be an object with a type, got {_kind(item)}", param=at)
        part = Fields(item, at + ".")
        kind, text = part.get("type"), part.get("text")
        if kind != "text":
            raise InvalidRequest(
                f"{at}.type must be text, which is all that this model takes, got {_show(kind)}", param=f"{at}.type"
            )
        if not isinstance(text, str):
            raise InvalidRequest(f"{at}.text must be a text, got {_kind(text)}", param=f"{at}.text")
        texts.append(text)
        advice += part.rest()
    return "".join(texts)


@dataclass(frozen=True)
class Shape:
    """How one answer is written down: as a chat or a completion, whole or in chunks."""

    id: str
    created: int
    model: str
    chat: bool

    def whole(self, text: str, finish: Finish, usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish.value}
        body = self._frame("chat.completion" if self.chat else "text_completion", [choice])
        return {**body, "usage": usage.openai()}

    def first(self) -> dict[str, Any] | None:
        """The chunk that says who speaks; completions have none."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.chat else None

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text} if self.chat else text, None)

    def last(self, finish: Finish) -> dict[str, Any]:
        return self._chunk({} if self.chat else "", finish.value)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk without choices that ends a stream when stream_options.include_usage asks for it."""
        return {**self._frame("chat.completion.chunk" if self.chat else "text_completion", []), "usage": usage.openai()}

    def _chunk(self, delta: Any, finish: str | None) -> dict[str, Any]:
        content = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return self._frame("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _frame(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }


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


def _same(value: Any, neutral: Any) -> bool:
    """Equal, without true being 1 or false being 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    if value in ("", [], {}):
        return names[type(value)] + " that is empty"
    return names[type(value)]


def _show(value: Any) -> str:
    """A value for a message, cut so that a hostile one does not fill the log."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
