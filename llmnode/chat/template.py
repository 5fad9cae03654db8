"""Messages to prompt, by the model's own Jinja template.

A template comes with the model file, so it is foreign code: it runs in Jinja's immutable sandbox and sees the messages
and a few functions that templates in the wild rely on. The environment is the one that templates are written for:
trimmed blocks, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls.
Knows nothing of tokens: the caller turns the prompt into ids and adds BOS where the model wants it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmnode.wire.errors import InvalidRequest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used for a model that brings no template: the layout that most chat models without one were trained on."""


class TemplateError(ValueError):
    """The template itself cannot be used: it does not compile."""


class _Refused(Exception):
    """What `raise_exception` in a template raises: the conversation is not one the model can take."""


class ChatTemplate:
    """A compiled template. Thread-safe; rendering may take long.

    clock: local time for `strftime_now`.       fingerprint: what tells it from another template, as hex.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", clock: Callable[[], datetime] = datetime.now):
        self.source = source or CHATML
        self.is_default = not source
        self.fingerprint = blake2b(self.source.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_refuse,
            strftime_now=lambda form: clock().strftime(form),
            bos_token=bos,
            eos_token=eos,
        )
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], now: datetime | None = None) -> str:
        """The prompt for these messages, ready for the assistant's answer.

        now: what `strftime_now` tells in place of the clock's time, so that another node renders the same prompt.
        Raises InvalidRequest naming `messages` when the template refuses them or cannot make sense of them.
        """
        given: dict[str, Any] = {} if now is None else {"strftime_now": lambda form: now.strftime(form)}
        try:
            return self._template.render(messages=[dict(m) for m in messages], add_generation_prompt=True, **given)
        except _Refused as refusal:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {refusal}", param="messages"
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(
                f"the model's chat template cannot render these messages: {error}", param="messages"
            ) from error


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models have seen it in training: characters as they are, none escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
