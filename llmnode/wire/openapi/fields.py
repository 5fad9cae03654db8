"""Bodies of requests as JSON schemas: what each field may hold and what it is for, in a line.

Owns: names, ranges and words. Refuses to know: paths, and how a field is read. Ranges that settings move are those of
the defaults.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
Fields = dict[str, Schema]


def text(words: str, **more: Any) -> Schema:
    return {"type": "string", "description": words, **more}


def whole(words: str, least: int | None = None, most: int | None = None) -> Schema:
    return _ranged("integer", words, least, most)


def number(words: str, least: float | None = None, most: float | None = None, *, above: bool = False) -> Schema:
    """above: `least` itself is not allowed."""
    schema = _ranged("number", words, None if above else least, most)
    return {**schema, "exclusiveMinimum": least} if above else schema


def flag(words: str) -> Schema:
    return {"type": "boolean", "description": words}


def some(words: str, items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """A list."""
    schema: Schema = {"type": "array", "items": items, "description": words}
    if least:
        schema["minItems"] = least
    if most is not None:
        schema["maxItems"] = most
    return schema


def either(words: str, *schemas: Schema) -> Schema:
    return {"anyOf": list(schemas), "description": words}


def thing(words: str = "", fields: Fields | None = None, *, required: tuple[str, ...] = ()) -> Schema:
    """An object. What it does not name is taken as advice, unless the setting `strict_fields` says otherwise."""
    schema: Schema = {"type": "object"}
    if words:
        schema["description"] = words
    if fields:
        schema["properties"] = fields
    if required:
        schema["required"] = list(required)
    return schema


def _ranged(kind: str, words: str, least: float | None, most: float | None) -> Schema:
    schema: Schema = {"type": kind, "description": words}
    if least is not None:
        schema["minimum"] = least
    if most is not None:
        schema["maximum"] = most
    return schema


TOKEN = {"type": "integer", "minimum": 0}
TEXT = {"type": "string", "minLength": 1}

MODEL = {"model": text("Which model; may be left out where only one is served", minLength=1)}

SAMPLING: Fields = {
    "temperature": number("0 is always the most probable token", 0, 2),
    "seed": whole("The same seed says the same; -1 for a random one", -1, 2**32 - 2),
    "top_k": whole("Keep the k most probable tokens; 0 or -1 is off", -1, 2**31 - 1),
    "top_p": number("Keep the most probable tokens that make up this share", 0, 1, above=True),
    "min_p": number("Drop tokens less probable than this share of the best one", 0, 1),
    "typical_p": number("Locally typical sampling; 1 is off", 0, 1, above=True),
    "top_n_sigma": number("Keep logits within so many standard deviations of the best; 0 or -1 is off", -1, 100),
    "xtc_probability": number("With this chance, drop all above the threshold but the least of them", 0, 1),
    "xtc_threshold": number("See xtc_probability", 0, 1),
    "frequency_penalty": number("Taken from logits of tokens in the answer, each time", -2, 2),
    "presence_penalty": number("Taken from logits of tokens in the answer, once", -2, 2),
    "repeat_penalty": number("Divides logits of tokens among the last repeat_last_n; 1 is off", 0, 10, above=True),
    "repeat_last_n": whole("Of prompt and answer; 0 is off, -1 all", -1, 2**31 - 1),
    "dry_multiplier": number("The DRY penalty on going on with a repetition; 0 is off", 0, 100),
    "dry_base": number("How it grows", 1, 100),
    "dry_allowed_length": whole("From which length on", 0, 1024),
    "dry_penalty_last_n": whole("Tokens looked back upon; -1 is all", -1, 2**31 - 1),
    "dry_sequence_breakers": some("What ends a repetition", {"type": "string", "maxLength": 64}, 0, 64),
    "logit_bias": either(
        "Added to logits, by token id; as a list of pairs, false forbids a token",
        thing(fields=None) | {"additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        {"type": "array", "maxItems": 1024},
    ),
    "mirostat": whole("1 or 2 takes the place of all that keeps or drops tokens", 0, 2),
    "mirostat_tau": number("Wanted surprise in bits", 0, 100, above=True),
    "mirostat_eta": number("Rate of learning", 0, 1),
}
"""How tokens are drawn."""

LENGTH: Fields = {
    "max_tokens": whole("Tokens in the answer; up to the context where nothing is said", 1),
    "stop": either(
        "What ends the answer, and is no part of it", text("", maxLength=256), some("", text("", maxLength=256), 0, 16)
    ),
    "ignore_eos": flag("Go on past the model's own end"),
}

FORM: Fields = {
    "response_format": thing(
        "What the answer must match; the schema is in json_schema.schema",
        {"type": text("", enum=["text", "json_object", "json_schema"]), "json_schema": thing("Holds the schema")},
        required=("type",),
    ),
    "json_schema": thing("A JSON schema that the answer must match, as llama-server takes it"),
    "grammar": text("A GBNF grammar that the answer must match"),
}

STREAM: Fields = {
    "stream": flag("Answer as server-sent events"),
    "stream_options": thing("Only with stream", {"include_usage": flag("Send a chunk with the usage, last")}),
}

_ROLE = text("Who says it", enum=["system", "developer", "user", "assistant", "tool"])
_PART = thing("", {"type": text("", enum=["text"]), "text": text("")}, required=("type", "text"))
_CALL = thing(
    "A call of a tool that the model has made",
    {
        "id": text("Its id"),
        "type": text("", enum=["function"]),
        "function": thing("", {"name": text(""), "arguments": text("JSON")}, required=("name", "arguments")),
    },
    required=("function",),
)
MESSAGE = thing(
    "One message",
    {
        "role": _ROLE,
        "content": either("What it says", {"type": "string"}, some("", _PART, 1), {"type": "null"}),
        "name": text("Of whom says it"),
        "reasoning_content": text("What the model thought before it said this"),
        "tool_calls": some("Of the assistant", _CALL),
        "tool_call_id": text("Of a tool's message: which call it answers"),
    },
    required=("role",),
)
MESSAGES = some("The conversation, oldest first", MESSAGE, 1, 4096)

_FUNCTION = thing(
    "",
    {
        "name": text("", pattern="^[a-zA-Z0-9_.:-]{1,128}$"),
        "description": text("What it does, for the model"),
        "parameters": thing("A JSON schema of its arguments"),
        "strict": flag("Hold the arguments to the schema also where the model chooses"),
    },
    required=("name",),
)
TOOLS: Fields = {
    "tools": some(
        "What the model may call",
        thing("", {"type": text("", enum=["function"]), "function": _FUNCTION}, required=("type", "function")),
        0,
        256,
    ),
    "tool_choice": either(
        "Whether the model calls a tool: as it likes, never, always, or this one",
        text("", enum=["none", "auto", "required"]),
        thing("", {"type": text("", enum=["function", "allowed_tools"])}, required=("type",)),
    ),
    "parallel_tool_calls": flag("Whether an answer may hold several calls"),
}

PROMPTING: Fields = {
    "reasoning_effort": text("How much to think", enum=["none", "minimal", "low", "medium", "high", "xhigh"]),
    "enable_thinking": flag("Whether to think at all"),
    "thinking_budget_tokens": whole("Tokens of thinking, after which it is ended; -1 for no limit", -1),
    "chat_template_kwargs": thing("Keywords for the model's chat template"),
    "continue_final_message": flag("Go on with the last message, which is the assistant's"),
    "add_generation_prompt": flag("Open a turn of the assistant"),
}

CHAT = thing(
    "",
    {
        "messages": MESSAGES,
        **MODEL,
        **TOOLS,
        **PROMPTING,
        **FORM,
        **LENGTH,
        "max_completion_tokens": whole("The same as max_tokens", 1),
        "n": whole("Answers wanted, each drawn with a seed of its own", 1, 16),
        "logprobs": flag("Report the log probability of each token"),
        "top_logprobs": whole("Of so many alternatives, too; only with logprobs", 0, 20),
        **SAMPLING,
        **STREAM,
    },
    required=("messages",),
)

PROMPT = either(
    "What to go on with: a text or token ids; or several of these, each of which is answered",
    TEXT,
    some("", TOKEN, 1),
    some("", TEXT, 1, 16),
)
COMPLETION = thing(
    "",
    {
        "prompt": PROMPT,
        **MODEL,
        "suffix": text("What comes behind the gap that is to be filled, for models that have tokens for it"),
        "echo": flag("Begin the answer with the prompt"),
        **FORM,
        **LENGTH,
        "n": whole("Answers to each prompt", 1, 16),
        "logprobs": whole("Report the log probability of each token, and of so many alternatives", 0, 20),
        **SAMPLING,
        **STREAM,
    },
    required=("prompt",),
)
INFERENCE = thing("", {"prompt": TEXT, **MODEL, **FORM, **LENGTH, **SAMPLING}, required=("prompt",))

_INPUT = either(
    "One text or list of token ids, or several",
    TEXT,
    some("", TOKEN, 1),
    some("", TEXT, 1),
    some("", some("", TOKEN, 1), 1),
)
EMBEDDINGS = thing(
    "",
    {
        "input": _INPUT,
        **MODEL,
        "encoding_format": text("How the vectors are written", enum=["float", "base64"]),
        "dimensions": whole("Length of the vectors, where they may be cut", 1),
        "embd_normalize": whole("llama-server's norm: -1 none, 2 euclidean", -1),
    },
    required=("input",),
)
NATIVE_EMBEDDING = thing(
    "As llama-server takes it",
    {"content": _INPUT, **MODEL, "embd_normalize": EMBEDDINGS["properties"]["embd_normalize"]},
    required=("content",),
)
_DOCUMENT = either("", {"type": "string"}, thing("", {"text": text("")}, required=("text",)))
RERANK = thing(
    "",
    {
        "query": TEXT | {"description": "What is asked"},
        "documents": some("What may answer it", _DOCUMENT, 1),
        "texts": some("The same, in the words of Text Embeddings Inference", {"type": "string"}, 1),
        **MODEL,
        "top_n": whole("Results wanted", 1),
        "return_documents": flag("Each result with its document"),
    },
    required=("query",),
)

_TOKENS_OR_TEXT = {"anyOf": [{"type": "string"}, TOKEN]}
TOKENIZE = thing(
    "",
    {
        "content": either("A text, or texts and token ids", {"type": "string"}, some("", _TOKENS_OR_TEXT)),
        **MODEL,
        "add_special": flag("With the tokens that the model wants around a text"),
        "parse_special": flag("Control tokens written out in the text are such"),
        "with_pieces": flag("With the text of each token"),
    },
    required=("content",),
)
DETOKENIZE = thing("", {"tokens": some("Token ids", TOKEN), **MODEL}, required=("tokens",))
APPLY_TEMPLATE = thing("", {"messages": MESSAGES, **MODEL, **TOOLS, **PROMPTING}, required=("messages",))

_NATIVE: Fields = {
    **MODEL,
    "n_predict": whole("Tokens in the answer; -1 up to the context, 0 only computes the prompt", -1),
    "n_probs": whole("Report the log probability of each token, and of so many alternatives", 0, 20),
    "return_tokens": flag("With the tokens of the answer"),
    "stream": STREAM["stream"],
    "stop": LENGTH["stop"],
    "ignore_eos": LENGTH["ignore_eos"],
    "grammar": FORM["grammar"],
    "json_schema": FORM["json_schema"],
    **SAMPLING,
}
NATIVE_COMPLETION = thing(
    "As llama-server takes it",
    {"prompt": either("A text, or token ids and texts; or several", TEXT, some("", _TOKENS_OR_TEXT, 1)), **_NATIVE},
    required=("prompt",),
)
INFILL = thing(
    "As llama-server takes it",
    {
        "input_prefix": text("What is before the gap"),
        "input_suffix": text("What is behind it"),
        "input_extra": some(
            "Other files that help", thing("", {"text": text(""), "filename": text("")}, required=("text",)), 0, 1024
        ),
        "prompt": text("What the filling begins with"),
        **_NATIVE,
    },
)

_CONTENT = either("A text, or parts of it", {"type": "string"}, {"type": "array", "items": thing()})
RESPONSES = thing(
    "In the words of OpenAI's Responses API",
    {
        "input": either("What is asked: a text, or items", TEXT, some("", thing(), 1)),
        **MODEL,
        "instructions": text("The system message"),
        "max_output_tokens": whole("Tokens in the answer", 1),
        "metadata": thing("Comes back with the answer") | {"additionalProperties": {"type": "string"}},
        "tools": some(
            "Functions that the model may call",
            thing("", {"type": text("", enum=["function"]), **_FUNCTION["properties"]}, required=("type", "name")),
        ),
        "tool_choice": TOOLS["tool_choice"],
        "parallel_tool_calls": TOOLS["parallel_tool_calls"],
        "text": thing("The form of the text", {"format": thing()}),
        "reasoning": thing("How to think", {"effort": PROMPTING["reasoning_effort"]}),
        "include": some("What else to tell", text("")),
        "top_logprobs": whole("Alternatives with their log probabilities", 0, 20),
        "temperature": SAMPLING["temperature"],
        "top_p": SAMPLING["top_p"],
        "stream": STREAM["stream"],
    },
    required=("input",),
)
ANTHROPIC_MESSAGES = thing(
    "In the words of Anthropic's Messages API",
    {
        "messages": some(
            "The conversation",
            thing(
                "", {"role": text("", enum=["user", "assistant"]), "content": _CONTENT}, required=("role", "content")
            ),
            1,
        ),
        **MODEL,
        "system": _CONTENT,
        "max_tokens": whole("Tokens in the answer", 1),
        "stop_sequences": some("What ends the answer", text("", maxLength=256), 0, 16),
        "tools": some(
            "What the model may call",
            thing(
                "",
                {"name": text(""), "description": text(""), "input_schema": thing()},
                required=("name", "input_schema"),
            ),
        ),
        "tool_choice": thing("", {"type": text("", enum=["auto", "any", "tool", "none"])}, required=("type",)),
        "thinking": thing("", {"type": text("", enum=["enabled", "adaptive", "disabled"])}, required=("type",)),
        "temperature": number("", 0, 1),
        "top_k": SAMPLING["top_k"],
        "top_p": SAMPLING["top_p"],
        "stream": STREAM["stream"],
    },
    required=("messages",),
)
DRAIN = thing(
    "A lease that keeps new work away",
    {
        "owner": text("Who takes it", minLength=1),
        "ttl_seconds": number("When it ends by itself; without it, it stays", 0, above=True),
        "reason": text("Why, for people"),
        "force": flag("Take it even where the gate would refuse"),
        "min_ready": whole("Other nodes of the model that must be ready", 0),
    },
    required=("owner",),
)
