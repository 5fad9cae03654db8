"""Jinja chat templates, with the environment that they are written for.

A template comes with the model file, so it is foreign code: it runs in Jinja's sandbox, and whoever renders one does so
where time and memory are limited (renderer.py). Owns: the environment. Refuses to know: what is rendered, tokens,
processes.

The environment is the one of Hugging Face's transformers, which most templates were written against, and what else
templates in the wild rely on: trimmed blocks, `tojson` without HTML escapes and with the arguments of `json.dumps`,
`raise_exception`, `strftime_now`, loop controls, `{% generation %}`, `from_json`. Lists may be changed (transformers
forbids it, other engines do not, and so there are templates that append).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used for a model that brings no template: the layout that most chat models without one were trained on."""

_BROKEN = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class TemplateError(ValueError):
    """The template itself cannot be used: it does not compile."""


class RenderError(ValueError):
    """It cannot make sense of what it was given."""


class Refused(RenderError):
    """It says that it does not take what it was given: what `raise_exception` raises."""


def fingerprint(source: str) -> str:
    """What tells a template from another, as hex. An empty one stands for the default."""
    return blake2b((source or CHATML).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class ChatTemplate:
    """A compiled template. Rendering may take any time and memory.

    clock: local time for `strftime_now`.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", clock: Callable[[], datetime] = datetime.now):
        self.source = source or CHATML
        environment = SandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters.update(tojson=_tojson, from_json=json.loads, fromjson=json.loads)
        environment.globals.update(
            raise_exception=_refuse,
            strftime_now=lambda form: clock().strftime(form),
            bos_token=bos,
            eos_token=eos,
        )
        try:
            self._template = environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        now: datetime | None = None,
        **keywords: Any,
    ) -> str:
        """The prompt for these messages. now: what `strftime_now` tells in place of the clock's time, so that another
        node renders the same prompt. Raises RenderError."""
        if now is not None:
            keywords["strftime_now"] = lambda form: now.strftime(form)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **keywords,
            )
        except Refused:
            raise
        except _BROKEN as error:
            raise RenderError(str(error) or type(error).__name__) from error


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt it is what it holds."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's name and type

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: object) -> NoReturn:
    raise Refused(str(message))


def _tojson(
    value: Any,
    indent: int | str | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    **more: Any,
) -> str:
    """JSON as models have seen it in training: characters as they are, none escaped for HTML.

    Jinja's own filter takes `indent` first, and so do templates that give it by place."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
