"""What a node allows a request: the limits that its readers check. All of them are settings, or come from the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmnode.api.tools import SchemaLimits

MAX_CHOICES = 16
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_BIASES = 1024
MAX_MESSAGES, MAX_TOOLS = 4096, 256
MAX_GRAMMAR_BYTES = 65_536


@dataclass(frozen=True)
class Rules:
    """models: names of the model.      max_tokens: in an answer, 0 for up to the context.
    strict: refuse fields that have no effect.      max_*: how many of something, or how long.
    max_choices, max_answers: answers to one prompt, and to all of one request.
    switches: keywords of its template that turn thinking up and down.      thinks: whether it does at all.
    request_templates: whether a request may bring its own template.
    """

    models: tuple[str, ...]
    n_vocab: int
    max_tokens: int = 0
    strict: bool = False
    max_choices: int = MAX_CHOICES
    max_answers: int = MAX_CHOICES
    max_stops: int = MAX_STOPS
    max_stop_characters: int = MAX_STOP_CHARACTERS
    max_logit_bias: int = MAX_BIASES
    max_messages: int = MAX_MESSAGES
    max_tools: int = MAX_TOOLS
    max_grammar_bytes: int = MAX_GRAMMAR_BYTES
    schema: SchemaLimits = field(default_factory=SchemaLimits)
    switches: tuple[str, ...] = ()
    thinks: bool = False
    request_templates: bool = False
