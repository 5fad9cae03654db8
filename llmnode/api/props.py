"""What scripts and editors written for llama-server ask of a server before they use it: /props and /slots.

Owns: their shapes. Refuses to know: how the engine keeps its sequences. A slot here is a place for an answer, not a
part of the cache: which prompts are held is told by `tokens_cached` of the answers, and to gates by /node. So they
differ in whether they are busy and in nothing else. Source of names and shapes: the README of llama.cpp's server.
"""

from __future__ import annotations

from typing import Any

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, json

from llmnode.api.native import DEFAULTS
from llmnode.api.native_answer import settings
from llmnode.api.serving import Serving
from llmnode.engine.types import Ask, Sampling
from llmnode.wire.errors import Overloaded


def blueprint(serving: Serving) -> Blueprint:
    """The routes, bound to one node."""
    routes = Blueprint("props")

    @routes.get("/props")
    async def get_props(request: Request) -> HTTPResponse:
        with serving.admitted_to_tokenizer():
            return json(props(serving))

    @routes.get("/slots")
    async def get_slots(request: Request) -> HTTPResponse:
        with serving.admitted_to_tokenizer():
            found = slots(serving)
        if request.args.get("fail_on_no_slot") == "1" and all(slot["is_processing"] for slot in found):
            raise Overloaded(f"all {len(found)} slots are busy", code="no_slot_available")
        return json(found)

    return routes


def props(serving: Serving) -> dict[str, Any]:
    """The body of /props: what the server is, and what it does where a request says nothing else."""
    tokenizer, served, model = serving.tokenizer(), serving.served, serving.model()
    info = tokenizer.info
    slot = _slot(serving, 0, busy=False)
    return {
        "default_generation_settings": {**slot, "id_task": -1, "prompt": "", "next_token": _NEXT_TOKEN},
        "total_slots": len(slots(serving)),
        "model_alias": model.id,
        "model_path": str(serving.settings.model or model.id),
        "modalities": {"vision": False, "audio": False, "video": False},
        "endpoint_slots": True,
        "endpoint_props": False,
        "endpoint_metrics": True,
        "chat_template": served.renderer.source if served else "",
        "chat_template_caps": {},
        "bos_token": info.bos,
        "eos_token": info.eos,
        "build_info": f"llmrack-{serving.release}",
        "is_sleeping": False,
    }


def slots(serving: Serving) -> list[dict[str, Any]]:
    """The body of /slots."""
    stats = serving.stats()
    count, running = (stats.load.slots, stats.load.running) if stats else (serving.settings.slots, 0)
    return [_slot(serving, number, busy=number < running) for number in range(count)]


def _slot(serving: Serving, number: int, *, busy: bool) -> dict[str, Any]:
    return {
        "id": number,
        "id_task": number if busy else -1,
        "n_ctx": serving.model().n_ctx,
        "speculative": serving.settings.prompt_lookup,
        "is_processing": busy,
        "params": settings(Ask((), Sampling(**DEFAULTS)), stream=True),
        "next_token": [_NEXT_TOKEN],
    }


_NEXT_TOKEN = {"has_next_token": True, "has_new_line": False, "n_remain": -1, "n_decoded": 0, "stopping_word": ""}
