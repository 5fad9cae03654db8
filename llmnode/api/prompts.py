"""Prompts that are no conversations: texts, token ids, both in turn, and texts with a gap to be filled in.

Owns: reading them from a body, and their token ids. Refuses to know: what is done with them.

A prompt with a gap is laid out as models of that kind were trained on, with their own control tokens (`InfillTokens`):
`[REPO]NAME, [FILE]NAME TEXT of each other file, [FILE]NAME, [PREFIX]before[SUFFIX]after[MIDDLE]begun`, where what has
no token of its own falls away. Source: Bavarian et al. (2022) for the last three, Qwen2.5-Coder's report (Hui et al.,
2024) for files, the README of llama.cpp's server for the names that stand in where a client gives none.

What of it is too long for the context is left out: first the beginning of the other files, which are the farthest away,
then the beginning of what is before and the end of what is after, three to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmnode.api.fields import Fields, kind, show
from llmnode.engine.backend import Tokenizer
from llmnode.engine.types import InfillTokens
from llmnode.wire.errors import InvalidRequest

MAX_FILES = 1024
_REPOSITORY, _FILE, _OTHER_FILE = "myproject", "filename", "tmp"
_SEPARATOR = "\n\n--- snippet ---\n\n"
"""Before each other file, for a model that has no token for that."""
_SHARE_BEFORE = 3 / 4


@dataclass(frozen=True)
class Gap:
    """Text to be filled in between `before` and `after`. begun: what the filling begins with.

    files: (name, text) of others that help.        field: where the request asks for it, for errors.
    """

    before: str
    after: str
    field: str
    begun: str = ""
    files: tuple[tuple[str, str], ...] = ()


Parts = tuple[str | int, ...]
Prompt = str | Parts | Gap


@dataclass(frozen=True)
class Laid:
    """Token ids of a prompt. whole: none of it was left out."""

    ids: tuple[int, ...]
    whole: bool = True


def read(fields: Fields, n_vocab: int, most: int, *, mixed: bool = False) -> tuple[Prompt, ...]:
    """The prompts of a body: one, or a list of them. most: how many at most. mixed: whether one may hold texts and ids
    in turn. Raises InvalidRequest."""
    value = fields.get("prompt")
    if isinstance(value, list) and value and _is_list_of_prompts(value, mixed=mixed):
        if len(value) > most:
            raise InvalidRequest(f"prompt may hold {most} prompts at most, got {len(value)}", param="prompt")
        return tuple(_one(prompt, f"prompt[{index}]", n_vocab, mixed=mixed) for index, prompt in enumerate(value))
    return (_one(value, "prompt", n_vocab, mixed=mixed),)


def gap(fields: Fields) -> Gap:
    """The prompt of /infill. Raises InvalidRequest."""
    texts = {}
    for name in ("input_prefix", "input_suffix", "prompt"):
        text = fields.get(name)
        if not isinstance(text, str) and not (name == "prompt" and text is None):
            raise InvalidRequest(f"{name} must be a text, got {kind(text)}", param=name)
        texts[name] = text or ""
    files = fields.get("input_extra")
    if files is not None and not isinstance(files, list):
        raise InvalidRequest(f"input_extra must be a list of objects, got {kind(files)}", param="input_extra")
    if files and len(files) > MAX_FILES:
        raise InvalidRequest(f"input_extra may hold {MAX_FILES} texts at most, got {len(files)}", param="input_extra")
    others = tuple(_file(file, f"input_extra[{index}]") for index, file in enumerate(files or ()))
    return Gap(texts["input_prefix"], texts["input_suffix"], "model", texts["prompt"], others)


def lay_out(gap: Gap, tokenizer: Tokenizer, bos: Sequence[int], room: int) -> Laid:
    """Ids of a prompt with a gap, of which at most `room` are wanted. Raises InvalidRequest when the model was not
    trained for it."""
    marks = tokenizer.info.infill
    if marks is None:
        raise InvalidRequest(
            f"{gap.field} cannot be used: the model has no tokens to fill in with (prefix, suffix, middle)",
            param=gap.field,
            code="unsupported_parameter",
        )
    before, after, begun = (tokenizer.tokenize(text, special=False) for text in (gap.before, gap.after, gap.begun))
    others = _others(gap, tokenizer, marks)
    left = max(0, room - len(bos) - 3 - len(begun))
    some_before, some_after = _share(len(before), len(after), left)
    some_others = min(len(others), left - some_before - some_after)
    ids = (
        *bos,
        *others[len(others) - some_others :],
        marks.prefix,
        *before[len(before) - some_before :],
        marks.suffix,
        *after[:some_after],
        marks.middle,
        *begun,
    )
    return Laid(ids, whole=(some_before, some_after, some_others) == (len(before), len(after), len(others)))


def _others(gap: Gap, tokenizer: Tokenizer, marks: InfillTokens) -> list[int]:
    """What comes before the gap's own file."""
    ids: list[int] = []
    if marks.repository is not None:
        ids += [marks.repository, *tokenizer.tokenize(_REPOSITORY + "\n", special=False)]
    for name, text in gap.files:
        if marks.file is None:
            ids += tokenizer.tokenize(_SEPARATOR, special=False)
        else:
            ids += [marks.file, *tokenizer.tokenize(name + "\n", special=False)]
        ids += tokenizer.tokenize(text, special=False)
    if marks.file is not None:
        ids += [marks.file, *tokenizer.tokenize(_FILE + "\n", special=False)]
    return ids


def _share(before: int, after: int, left: int) -> tuple[int, int]:
    """How many tokens of each fit: what one side does not need of its share is the other's."""
    if before + after <= left:
        return before, after
    share = int(left * _SHARE_BEFORE)
    some_before = min(before, max(share, left - after))
    return some_before, min(after, left - some_before)


def _is_list_of_prompts(value: Sequence[Any], *, mixed: bool) -> bool:
    """Texts alone are several prompts; texts and ids in turn are one, where that is allowed at all."""
    if mixed:
        return all(isinstance(one, str) for one in value) or any(isinstance(one, list) for one in value)
    return isinstance(value[0], (str, list))


def _one(value: Any, at: str, n_vocab: int, *, mixed: bool) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        what = "a text or a list of token ids" + (" and texts" if mixed else "")
        raise InvalidRequest(f"{at} must be {what}, not empty, got {kind(value)}", param="prompt")
    for index, token in enumerate(value):
        if mixed and isinstance(token, str):
            continue
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < n_vocab:
            raise InvalidRequest(
                f"{at}[{index}] must be a token id from 0 to {n_vocab - 1}, got {show(token)}", param="prompt"
            )
    return tuple(value)


def _file(value: Any, at: str) -> tuple[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InvalidRequest(f"{at} must be an object with a text, got {kind(value)}", param=at)
    name = value.get("filename")
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"{at}.filename must be a text, got {kind(name)}", param=f"{at}.filename")
    return name or _OTHER_FILE, value["text"]
