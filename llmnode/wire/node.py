"""The report a node gives of itself at `GET /node`, version 1, and the usage of one request.

Unknown fields are ignored and missing ones have defaults, so that gates and nodes one release apart read each other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

PROTOCOL = 1

T = TypeVar("T")


class State(str, Enum):
    """Where a node is in its life. Only `ready` takes new work."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class Usage:
    """What one request cost, in tokens. `cached_tokens` of the prompt were reused and not computed again."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def openai(self) -> dict[str, Any]:
        """The `usage` object of OpenAI's API."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def header(self) -> str:
        """The value of `x-llmrack-usage`."""
        return f"{self.prompt_tokens} {self.cached_tokens} {self.completion_tokens}"

    @classmethod
    def parse(cls, text: str) -> Usage | None:
        """Read the header; None for anything else."""
        numbers = text.split(" ")
        if len(numbers) != 3 or not all(number.isascii() and number.isdecimal() for number in numbers):
            return None
        return cls(*map(int, numbers))


@dataclass(frozen=True)
class Model:
    """A model that the node serves. `n_ctx`: tokens that one request may hold, prompt and answer together.

    kinds: what it serves: chat, completion, infill (it was trained to fill in), embedding, rerank.
    n_vocab, n_ctx_train, n_embd, n_params, size_bytes, vocab_type: what its file says of it, 0 for unknown.
    template: what tells one chat template from another.
    modalities: what it reads, of `text`, `image`, `audio`.
    capabilities: of `tools` (it can call them), `reasoning` (told apart from its answers), `json_schema`.
    digest: what tells one model's weights from another's; answers are resumed between equal ones only. Empty: unknown.
    """

    id: str
    aliases: tuple[str, ...] = ()
    state: str = "ready"
    sha256: str = ""
    n_ctx: int = 0
    kinds: tuple[str, ...] = ("chat", "completion")
    modalities: tuple[str, ...] = ("text",)
    template: str = ""
    digest: str = ""
    n_vocab: int = 0
    n_ctx_train: int = 0
    n_embd: int = 0
    n_params: int = 0
    size_bytes: int = 0
    vocab_type: int = 0
    capabilities: tuple[str, ...] = ()

    def card(self, name: str, created: int) -> dict[str, Any]:
        """What /v1/models says of it under one of its names: OpenAI's fields, llama-server's `meta`, and ours."""
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "llmrack",
            "aliases": [other for other in (self.id, *self.aliases) if other != name],
            "kinds": list(self.kinds),
            "modalities": list(self.modalities),
            "capabilities": list(self.capabilities),
            "n_ctx": self.n_ctx,
            "meta": {
                "vocab_type": self.vocab_type,
                "n_vocab": self.n_vocab,
                "n_ctx": self.n_ctx,
                "n_ctx_train": self.n_ctx_train,
                "n_embd": self.n_embd,
                "n_params": self.n_params,
                "size": self.size_bytes,
            },
        }


@dataclass(frozen=True)
class Load:
    """How busy the engine is now. Rates are moving averages, 0.0 until first measured.

    queued_prompt_tokens: of requests inside, not computed yet.    prefill_tps: of long prompts.
    wait_s: seconds until one more request should get a slot.
    bytes_per_token: canonical bytes of a request (chain.py) for each token of its prompt.
    """

    slots: int = 0
    running: int = 0
    waiting: int = 0
    kv_cells: int = 0
    kv_cells_used: int = 0
    queued_prompt_tokens: int = 0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    wait_s: float = 0.0
    bytes_per_token: float = 0.0

    def header(self) -> str:
        """The same for a header's value."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Load:
        """Raises ValueError."""
        try:
            body = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return cls(**_fields(cls, body, "load."))


@dataclass(frozen=True)
class Cache:
    """Prefixes that the node holds: the block hashes of their chains (chain.py), packed, those of use last first."""

    blocks: str = ""


@dataclass(frozen=True)
class Device:
    """One device that the model runs on; sizes in bytes."""

    backend: str
    name: str
    uuid: str = ""
    memory_total_bytes: int = 0
    memory_used_bytes: int = 0


@dataclass(frozen=True)
class Host:
    """The machine around the node, from psutil. `cpu_percent` is of all cores together, 0 to 100."""

    cpu_count: int = 0
    cpu_percent: float = 0.0
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    process_rss_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """The body of `GET /node`. `boot` is random for each process; `config` the digest of its configuration file.

    resume: the version of the resume format that it speaks (resume.py), 0 for none.
    """

    boot: str
    release: str
    config: str
    state: State
    why: str = ""
    progress: float = 0.0
    models: tuple[Model, ...] = ()
    load: Load = Load()
    devices: tuple[Device, ...] = ()
    host: Host = Host()
    cache: Cache = Cache()
    resume: int = 0
    protocol: int = PROTOCOL

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, body: Any) -> Report:
        """Read a report from decoded JSON. Raises ValueError that names the field when it is not one."""
        if not isinstance(body, dict):
            raise ValueError("a node report must be a JSON object")
        protocol = body.get("protocol")
        if not isinstance(protocol, int) or protocol < 1:
            raise ValueError(f"protocol must be a whole number from 1, got {protocol!r}")
        try:
            state = State(body.get("state"))
        except ValueError:
            raise ValueError(f"state must be one of {', '.join(s.value for s in State)}") from None
        top = _fields(cls, body, "")
        top["state"] = state
        top["models"] = tuple(Model(**_fields(Model, m, "models.")) for m in _objects(body, "models"))
        top["devices"] = tuple(Device(**_fields(Device, d, "devices.")) for d in _objects(body, "devices"))
        top["load"] = Load(**_fields(Load, body.get("load", {}), "load."))
        top["host"] = Host(**_fields(Host, body.get("host", {}), "host."))
        top["cache"] = Cache(**_fields(Cache, body.get("cache", {}), "cache."))
        for name in ("boot", "release", "config"):
            top.setdefault(name, "")
        return cls(**top)


def _objects(body: Mapping[str, Any], name: str) -> list[Any]:
    value = body.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list")
    return value


def _fields(table: type[Any], body: Any, where: str) -> dict[str, Any]:
    """The known plain fields of `body`, type-checked against the defaults' types; unknown fields are left out."""
    if not isinstance(body, dict):
        raise ValueError(f"{where.rstrip('.') or 'report'} must be an object")
    out: dict[str, Any] = {}
    for field in dataclasses.fields(table):
        kind = str(field.type)
        if field.name not in body or kind not in _CHECKS:
            continue
        value = body[field.name]
        if not _CHECKS[kind](value):
            raise ValueError(f"{where}{field.name} must be {_WORDS[kind]}, got {value!r}")
        out[field.name] = tuple(value) if isinstance(value, list) else value
    if where.startswith(("models", "devices")):
        for field in dataclasses.fields(table):
            if field.default is dataclasses.MISSING and field.name not in out:
                raise ValueError(f"{where}{field.name} is missing")
    return out


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_CHECKS = {"int": _is_int, "float": _is_number, "str": lambda v: isinstance(v, str), "tuple[str, ...]": _is_texts}
_WORDS = {
    "int": "a whole number from 0",
    "float": "a number from 0",
    "str": "a string",
    "tuple[str, ...]": "a list of strings",
}
