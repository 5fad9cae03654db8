"""JSON to typed requests: the fields of OpenAI's API and those that open servers share, and which this node honours.

Every field of a request falls in one of three groups, and none is dropped in silence:
1. it changes the answer and is honoured, within the range that its reader states;
2. it changes the answer and cannot be honoured: refused by name, unless its value is the neutral one (`REFUSED`);
3. it is advice, or nobody has heard of it: accepted and named in `x-llmrack-ignored`; `strict_fields` refuses it.
Owns: the kinds of requests, and which fields are theirs. The fields themselves are read by messages.py, tools.py,
prompting.py, sampling.py and constraints.py. Source of names and shapes: OpenAI's API reference.
Knows nothing of Sanic, the engine's thread, templates, or how a grammar is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmnode.api import constraints, messages, prompting, prompts, sampling, tools
from llmnode.api.constraints import Constraint
from llmnode.api.fields import Fields, kind, show
from llmnode.api.names import Names
from llmnode.api.prompting import Prompting
from llmnode.api.prompts import Gap, Prompt
from llmnode.api.rules import Rules
from llmnode.api.tools import NO_TOOLS, ToolUse
from llmnode.engine.types import Sampling
from llmnode.wire.errors import InvalidRequest, ModelNotFound

MAX_TOP_LOGPROBS = 20

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "adaptive_target": (-1,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "dynatemp_range": (0,),
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
    "samplers": (),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "t_max_predict_ms": (-1, 0),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that change the answer in ways this node does not know, with the values that ask for nothing."""

CHAT_ONLY: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "enable_thinking": (False,),
    "parallel_tool_calls": (True, False),
    "reasoning_budget": (-1,),
    "reasoning_effort": (),
    "thinking_budget": (-1,),
    "thinking_budget_tokens": (-1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that only chats have."""


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
    """messages: as messages.py reads them.

    names: what its fields are called in the body that the client sent, where that is not chat's own.
    """

    messages: tuple[Mapping[str, Any], ...]
    options: Options
    tools: ToolUse = NO_TOOLS
    prompting: Prompting = field(default_factory=Prompting)
    names: Names | None = None


@dataclass(frozen=True)
class CompletionRequest:
    """`prompt`: what the answer goes on from, or fills in.

    more: further prompts, each of which gets as many answers.      echo: an answer begins with its prompt.
    extras: what the reader of an endpoint that is a translation has kept for its narrator.
    """

    prompt: Prompt
    options: Options
    more: tuple[Prompt, ...] = ()
    echo: bool = False
    extras: Any = None


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
    fields.refuse({"echo": (False,), "suffix": ("",)})
    told = messages.read(fields, rules.max_messages)
    use = tools.read(fields, rules.max_tools, rules.schema)
    prompt = prompting.read(fields, told, rules)
    options = _options(fields, rules, seed, chat=True)
    if use.mode == "required" and options.constraint is not None:
        raise InvalidRequest(
            f"{options.constraint.field} and tool_choice contradict each other: the answer must be a call",
            param="tool_choice",
        )
    if options.ignore_eos and use.callable:
        raise InvalidRequest("ignore_eos and tools contradict each other: a call has an end", param="ignore_eos")
    return ChatRequest(told, options, use, prompt)


def completion(body: Mapping[str, Any], rules: Rules, *, seed: int) -> CompletionRequest:
    """Read a body of /v1/completions. Raises InvalidRequest, ModelNotFound."""
    fields = Fields(body)
    first, *more = prompts.read(fields, rules.n_vocab, rules.max_answers)
    after, echo = fields.get("suffix"), fields.flag("echo")
    if after is not None and not isinstance(after, str):
        raise InvalidRequest(f"suffix must be a text, got {kind(after)}", param="suffix")
    if after:
        if not isinstance(first, str) or more:
            raise InvalidRequest("suffix is only allowed with one prompt that is a text", param="suffix")
        first = Gap(first, after, "suffix")
    options = _options(fields, rules, seed, chat=False)
    if echo and options.logprobs is not None:
        raise InvalidRequest("echo with logprobs is not supported: those of the prompt are not known", param="echo")
    check_answers(1 + len(more), options.choices, rules)
    return CompletionRequest(first, options, tuple(more), echo)


def check_answers(asked: int, choices: int, rules: Rules) -> None:
    """Raise InvalidRequest for more answers than could even wait here."""
    if asked * choices > rules.max_answers:
        raise InvalidRequest(
            f"prompt holds {asked} prompts of {choices} answers each; the limit is {rules.max_answers} answers in all",
            param="prompt",
        )


def inference(body: Mapping[str, Any], rules: Rules, *, seed: int) -> CompletionRequest:
    """Read a body of /inference: as a completion, but there is no stream."""
    fields = Fields(body)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise InvalidRequest(f"prompt must be a text that is not empty, got {kind(prompt)}", param="prompt")
    fields.refuse(
        {"stream": (False,), "n": (1,), "logprobs": (False,), "echo": (False,), "suffix": ("",)},
        "is not supported at /inference",
    )
    return CompletionRequest(prompt, _options(fields, rules, seed, chat=False))


def _options(fields: Fields, rules: Rules, seed: int, *, chat: bool) -> Options:
    model = fields.get("model")
    if model is None:
        model = rules.models[0]  # this node serves one model, so there is no doubt which is meant
    if not isinstance(model, str) or not model:
        raise InvalidRequest(f"model must be the name of a model, got {show(model)}", param="model")
    if model not in rules.models:
        raise ModelNotFound(model, list(rules.models))
    drawn = sampling.read(fields, rules, seed)
    choices = fields.whole("n", 1, rules.max_choices) or 1
    logprobs = _chat_logprobs(fields) if chat else _completion_logprobs(fields)
    stream = fields.flag("stream")
    include_usage = _stream_options(fields, stream)
    max_tokens = _max_tokens(fields, rules, chat=chat)
    stop = fields.texts("stop", rules.max_stops, rules.max_stop_characters, or_one=True) or ()
    constraint = constraints.read(fields, rules)
    ignore_eos = fields.flag("ignore_eos")
    if ignore_eos and constraint:
        raise InvalidRequest(
            f"ignore_eos and {constraint.field} contradict each other: what must match has an end", param="ignore_eos"
        )
    fields.refuse({**REFUSED, **({} if chat else CHAT_ONLY), "best_of": (choices,)})
    ignored = tuple(fields.rest())
    if ignored and rules.strict:
        raise InvalidRequest(
            f"{ignored[0]} has no effect here, and strict_fields refuses such fields",
            param=ignored[0],
            code="unknown_parameter",
        )
    return Options(
        model,
        drawn,
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


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise InvalidRequest(f"top_logprobs ({top}) is only allowed with logprobs: true", param="top_logprobs")
    return (top or 0) if wanted else None


def _completion_logprobs(fields: Fields) -> int | None:
    """In completions `logprobs` is itself the number; 0 reports the drawn tokens alone."""
    fields.refuse({"top_logprobs": (0,)})
    return None if fields.get("logprobs") is False else fields.whole("logprobs", 0, MAX_TOP_LOGPROBS)


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
