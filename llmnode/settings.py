"""What an operator can set of a node: one table for flags, environment (LLMNODE_...) and the TOML file.

Says which combinations make no sense; does not know how any of it is carried out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llmnode.service import tls
from llmnode.service.settings import Loaded, SettingError, load, setting
from llmnode.service.traces import Receiver

PREFIX = "LLMNODE_"
CACHE_TYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
KINDS = ("auto", "generate", "embed", "rerank")
POOLINGS = ("model", "none", "mean", "cls", "last")
HANDBOOK = Path(__file__).resolve().parent / "handbook" / "handbook.gguf"
"""The model that comes with llmrack: it knows llmrack and nothing else (docs/model-card.md)."""


@dataclass(frozen=True)
class Settings:
    """The settings of one instance of llmnode, which serves one model."""

    name: str = setting("llmnode", "name of this instance in logs and status lines")
    host: str = setting("127.0.0.1", "address to listen on; one beyond loopback needs fleet_token_file")
    port: int = setting(8100, "TCP port to listen on", minimum=1, maximum=65535)
    fleet_token_file: Path | None = setting(
        None, "file with the secret that gates and nodes share: one or two lines, each a valid token; re-read on change"
    )
    tls_cert_file: Path | None = setting(
        None,
        "PEM file with this node's certificate and its chain: it listens with TLS; read again when it changes",
    )
    tls_key_file: Path | None = setting(None, "PEM file with the private key of that certificate")
    tls_client_ca_file: Path | None = setting(
        None, "PEM file with the authority whose certificate every client must show; none: no client must show one"
    )
    backend: str = setting("llama", "what computes the tokens; fake needs no model", choices=("llama", "fake"))
    model: Path | None = setting(None, "the GGUF file to serve; none: the handbook model that comes with llmrack")
    model_id: str = setting("", "name that clients use for the model; empty: the file's name without .gguf")
    aliases: tuple[str, ...] = setting((), "other names that clients may use for it")
    kind: str = setting(
        "auto",
        "what the model is to do: generate text, embed texts, or rerank documents; auto: what it was made for",
        choices=KINDS,
    )
    pooling: str = setting(
        "model", "how an embedding model makes one vector of a text; model: as its file says", choices=POOLINGS
    )
    matryoshka: bool = setting(
        False, "its vectors may be cut (it was trained so): clients may ask for fewer `dimensions`"
    )
    max_texts: int = setting(
        2048, "texts to embed, or documents to rerank, in one request", minimum=1, maximum=1_000_000
    )
    chat_template_file: Path | None = setting(None, "Jinja chat template to use in place of the model's own")
    n_ctx: int = setting(
        0, "tokens that one request may hold; 0: what the model was trained for, 4096 at most", unit="tokens", minimum=0
    )
    slots: int = setting(4, "requests that are answered at the same time", minimum=1, maximum=256)
    kv_cells: int = setting(0, "tokens in the cache for all slots together; 0: slots x n_ctx", unit="tokens", minimum=0)
    kv_unified: str = setting(
        "auto",
        "one cache that all slots share (on) or a part for each, which is faster (off); "
        "auto: parted where kv_cells gives every slot its n_ctx",
        choices=("auto", "on", "off"),
    )
    n_batch: int = setting(512, "tokens computed in one step at most", unit="tokens", minimum=1)
    stall_ms: float = setting(
        100.0, "how long prompts may hold up running answers in each step", unit="milliseconds", minimum=1
    )
    prompt_lookup: bool = setting(
        True, "guess ahead from earlier text of the same request, where that is measured to pay; changes no answer"
    )
    prompt_cache_bytes: int = setting(
        -1,
        "host RAM for prompts that the cache has no room for; -1: an eighth of this machine's, 8 GiB at most; 0: none",
        unit="bytes",
        minimum=-1,
    )
    prompt_cache_file: Path | None = setting(
        None, "file that keeps hot prompts from one start to the next (they are users' texts); none: they are not kept"
    )
    prompt_cache_file_bytes: int = setting(1 << 30, "largest size of that file", unit="bytes", minimum=0)
    threads: int = setting(0, "CPU threads; 0: one for each physical core", minimum=0, maximum=1024)
    threads_batch: int = setting(
        0, "CPU threads while only prompts are computed; 0: as threads", minimum=0, maximum=1024
    )
    n_gpu_layers: int = setting(
        -1, "layers to keep on GPUs; -1: all when there is a GPU backend, none on a CPU host", minimum=-1
    )
    tensor_split: tuple[float, ...] = setting((), "share of the model for each device, in the order of devices")
    devices: tuple[str, ...] = setting((), "UUIDs of the GPUs to use; empty: all there are")
    flash_attn: str = setting("auto", "flash attention", choices=("auto", "on", "off"))
    cache_type_k: str = setting("f16", "how keys are kept in the cache", choices=CACHE_TYPES)
    cache_type_v: str = setting("f16", "how values are kept in the cache; q types need flash_attn", choices=CACHE_TYPES)
    swa_full: bool = setting(
        False, "keep all tokens of sliding-window layers: takes memory, and any common prefix can be reused"
    )
    mmap: bool = setting(True, "map the weights from the file; without it they are read into memory")
    mlock: bool = setting(False, "keep the weights from being swapped out")
    fit_check: bool = setting(True, "refuse a model that will not fit the memory before loading it")
    fake_step_delay_s: float = setting(
        0.0, "how long the fake backend takes for each step, to rehearse a slow model", unit="seconds", minimum=0
    )
    queue_limit: int = setting(64, "requests that may wait for a slot; over it clients get 503", minimum=0)
    max_tokens: int = setting(0, "tokens that one answer may have; 0: up to the context", unit="tokens", minimum=0)
    request_timeout_s: float = setting(600.0, "time for one request", unit="seconds", minimum=1)
    drain_seconds: float = setting(60.0, "time that running answers get after SIGTERM", unit="seconds", minimum=0)
    max_choices: int = setting(16, "answers to one request (n)", minimum=1, maximum=128)
    max_stops: int = setting(16, "stop strings of one request", minimum=1, maximum=1024)
    max_stop_characters: int = setting(256, "characters of one stop string", minimum=1)
    max_logit_bias: int = setting(1024, "tokens that logit_bias may name", minimum=1)
    max_messages: int = setting(4096, "messages of one chat", minimum=1)
    max_tools: int = setting(256, "tools of one chat", minimum=1)
    max_schema_bytes: int = setting(
        64 * 1024, "a JSON schema of a request, or of one of its tools", unit="bytes", minimum=1
    )
    max_schema_depth: int = setting(64, "how deep such a schema may be nested", minimum=1, maximum=500)
    max_grammar_bytes: int = setting(64 * 1024, "a grammar of a request", unit="bytes", minimum=1)
    request_templates: bool = setting(
        False, "take chat_template from requests: code of clients, which runs in a process with the limits below"
    )
    template_timeout_s: float = setting(
        5.0, "time for rendering a chat template, or for trying a grammar", unit="seconds", minimum=0.1, maximum=600
    )
    template_memory_bytes: int = setting(
        512 << 20, "address space of the process that does this", unit="bytes", minimum=256 << 20
    )
    body_limit_bytes: int = setting(16 * 1024 * 1024, "largest request body", unit="bytes", minimum=1024)
    strict_fields: bool = setting(
        False, "refuse request fields that have no effect, where they are otherwise named only"
    )
    otlp_endpoint: str = setting(
        "", "base URL of who collects traces (OTLP over HTTP, http://HOST:4318); none: there are no traces"
    )
    otlp_headers_file: Path | None = setting(
        None, "file with headers for it, NAME=VALUE lines: a token, where it asks for one"
    )
    traces_sample_ratio: float = setting(
        1.0,
        "of the traces that begin here, how many are recorded; of those that a gate begins, it decides",
        minimum=0,
        maximum=1,
    )
    log_level: str = setting(
        "info", "least severe message that is logged", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting("text", "log lines for people or for machines", choices=("text", "json"))

    @property
    def tls(self) -> tls.Files:
        return tls.Files(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)

    @property
    def receiver(self) -> Receiver:
        """Who collects traces."""
        return Receiver(self.otlp_endpoint, self.otlp_headers_file, self.traces_sample_ratio)

    @property
    def served_id(self) -> str:
        """The name under which clients find the model."""
        if self.model_id:
            return self.model_id
        return self.model.stem if self.model else self.backend

    @property
    def names(self) -> tuple[str, ...]:
        return (self.served_id, *self.aliases)


def read(flags: Mapping[str, str | None], environ: Mapping[str, str] | None = None) -> Loaded[Settings]:
    """Load the table and check it as a whole. Raises SettingError."""
    loaded = load(Settings, flags=flags, environ=environ, prefix=PREFIX)
    if loaded.values.backend == "llama" and loaded.values.model is None:
        loaded = replace(loaded, values=replace(loaded.values, model=HANDBOOK))
    _check(loaded.values)
    return loaded


def _check(settings: Settings) -> None:
    if settings.fleet_token_file is None and not _is_loopback(settings.host):
        raise SettingError(f"fleet_token_file must be set, since other machines can reach host {settings.host}")
    if settings.otlp_endpoint:
        settings.receiver.check()
    if settings.kv_cells and settings.n_ctx and settings.kv_cells < settings.n_ctx:
        raise SettingError(f"kv_cells ({settings.kv_cells}) must not be below n_ctx ({settings.n_ctx})")
    if settings.n_batch < settings.slots:
        raise SettingError(
            f"n_batch ({settings.n_batch}) must not be below slots ({settings.slots}): a token each in every step"
        )
    if settings.cache_type_v.startswith("q") and settings.flash_attn == "off":
        raise SettingError(f"cache_type_v ({settings.cache_type_v}) needs flash attention, and flash_attn is off")
    if settings.kind in ("generate", "rerank") and settings.pooling != "model":
        raise SettingError(f"pooling ({settings.pooling}) is for models that embed, and kind is {settings.kind}")
    if settings.tensor_split and settings.devices and len(settings.tensor_split) != len(settings.devices):
        raise SettingError(
            f"tensor_split has {len(settings.tensor_split)} shares and devices has {len(settings.devices)} entries"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
