"""Answers in llama-server's own shape, of /completion and /infill: whole, and as chunks without a `[DONE]` behind them.

Owns: what such an answer looks like, field for field. Refuses to know: bodies (native.py), when a piece is sent.
Source of names and shapes: the README of llama.cpp's server.

What is said is a function of the ids, as a stream that moves to another node needs; only `timings` and `tokens_cached`
tell of the node that came to the end. `id_slot` is -1: which slot an answer has may change on its way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmnode.api.narrator import Answer, Ending, Occasion, Teller
from llmnode.api.native import ALL, Native
from llmnode.api.schema import CompletionRequest
from llmnode.chat.pieces import Content, Message, Piece
from llmnode.engine.text import TextStream
from llmnode.engine.types import Ask, Done, Finish, Logprob, Sampling, Text
from llmnode.wire import sse
from llmnode.wire.node import Usage

_LOWEST = -3.4028234663852886e38
"""The lowest 32-bit float, which llama-server writes for the logarithm of nothing."""


@dataclass
class _Choice:
    """How far one answer has been told. new_line: whether there is one in its text."""

    tokens: int = 0
    new_line: bool = False


class NativeNarrator:
    """Tells one request's answers. Their text is all content, and each chunk shows its ids, so it is its own teller."""

    singly = False
    terminator = sse.END

    def __init__(self, occasion: Occasion) -> None:
        request = occasion.request
        assert isinstance(request, CompletionRequest), "a chat is told otherwise"
        assert isinstance(request.extras, Native), "its reader has left them"
        assert occasion.backend is not None, "an answer has a model"
        self._native, self._options = request.extras, request.options
        self._asks, self._backend, self._model = occasion.asks, occasion.backend, occasion.model
        self._choices = [_Choice() for _ in self._asks]

    @classmethod
    def of(cls, occasion: Occasion) -> NativeNarrator:
        return cls(occasion)

    def plain(self, out: Sequence[int]) -> Teller:
        for choice, ask, known in zip(self._choices, self._asks, out, strict=True):
            if known:
                stream = TextStream(self._backend.pieces, ask.stop)
                text = "".join(map(stream.push, ask.replayed))
                choice.tokens, choice.new_line = known, "\n" in text
        return self

    # As a teller of streams

    def piece(self, index: int, text: Text) -> bytes:
        choice = self._choices[index]
        choice.tokens += len(text.ids)
        choice.new_line = choice.new_line or "\n" in text.text
        if self._native.silent or not text.ids:
            return b""
        chunk = {
            "index": index,
            "content": text.text,
            "tokens": list(text.ids),
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": choice.tokens,
            "tokens_evaluated": len(self._asks[index].prompt),
        }
        if text.logprobs:
            chunk["completion_probabilities"] = self._probabilities(text.logprobs)
        return sse.event(chunk)

    def last(self, index: int, end: Done) -> bytes:
        """Ids that have no text to tell have a chunk all the same: which of them came with text is a matter of when."""
        rest = self.piece(index, Text("", end.ids))
        return rest + sse.event(self._final(index, "", (), end, new_line=self._choices[index].new_line))

    def end(self, usage: Usage) -> bytes:
        return b""

    # As a narrator of bodies

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Any:
        bodies = [self._whole(index, answer) for index, answer in enumerate(answers)]
        return bodies[0] if len(bodies) == 1 else bodies

    def say(self, index: int, pieces: Sequence[Piece], logprobs: Sequence[Logprob]) -> bytes:
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        return self.piece(index, Text(text, (), tuple(logprobs)))

    def finish(self, index: int, ending: Ending) -> bytes:
        return b""

    def reply(self, index: int, message: Message) -> Mapping[str, Any]:
        return {"role": "assistant", "content": message.content}

    def _whole(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.end is not None, "an answer has an end"
        text = "" if self._native.silent else answer.message.content
        ids = answer.ids if self._native.tokens and not self._native.silent else ()
        body = self._final(index, text, ids, answer.end, new_line="\n" in text, filtered=False)
        if answer.logprobs and not self._native.silent:
            body["completion_probabilities"] = self._probabilities(answer.logprobs)
        return self._filtered(body)

    def _final(
        self, index: int, text: str, ids: Sequence[int], end: Done, *, new_line: bool, filtered: bool = True
    ) -> dict[str, Any]:
        ask, usage = self._asks[index], end.usage
        body = {
            "index": index,
            "content": text,
            "tokens": list(ids),
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": 0 if self._native.silent else usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "generation_settings": settings(ask, self._native, stream=self._options.stream),
            "prompt": b"".join(map(self._backend.spell, ask.prompt)).decode("utf-8", "replace"),
            "has_new_line": new_line,
            "truncated": False,
            "stop_type": "limit" if end.finish is not Finish.STOP else "word" if end.stop else "eos",
            "stopping_word": end.stop,
            "tokens_cached": usage.cached_tokens,
            "timings": _timings(end, silent=self._native.silent),
        }
        return self._filtered(body) if filtered else body

    def _filtered(self, body: dict[str, Any]) -> dict[str, Any]:
        """Only the fields that were asked for, by the last name of their paths; what is not there falls away."""
        if not self._native.fields:
            return body
        found = {}
        for path in self._native.fields:
            value: Any = body
            for name in path.split("/"):
                value = value.get(name, _ABSENT) if isinstance(value, dict) else _ABSENT
            if value is not _ABSENT:
                found[path.rpartition("/")[2]] = value
        return found

    def _probabilities(self, logprobs: Sequence[Logprob]) -> list[dict[str, Any]]:
        return [
            {**self._named(one.token, one.logprob), "top_logprobs": [self._named(*other) for other in one.top]}
            for one in logprobs
        ]

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._backend.spell(token)
        text = piece.decode("utf-8", "ignore")
        finite = logprob if math.isfinite(logprob) else _LOWEST
        return {"id": token, "token": text, "bytes": list(piece), "logprob": finite}


_ABSENT = object()


def settings(ask: Ask, native: Native | None = None, *, stream: bool = False) -> dict[str, Any]:
    """`generation_settings`: what an answer was drawn with, under llama-server's names."""
    sampling = ask.sampling
    limit = -1 if native is None or native.settings["max_tokens"] is None else native.settings["max_tokens"]
    limit = 0 if native is not None and native.silent else limit
    return {
        "seed": sampling.seed,
        **_drawn_with(sampling),
        "stop": list(ask.stop),
        "max_tokens": limit,
        "n_predict": limit,
        "n_keep": 0,
        "n_discard": 0,
        "ignore_eos": ask.ignore_eos,
        "stream": stream,
        "logit_bias": [{"token": token, "bias": max(bias, _LOWEST)} for token, bias in sampling.logit_bias],
        "n_probs": 0 if native is None else native.settings["n_probs"],
        "min_keep": 0,
        "grammar": "",
        "samplers": list(ALL if native is None else native.settings["samplers"]),
        "timings_per_token": False,
        "post_sampling_probs": False,
        "lora": [],
    }


def _drawn_with(sampling: Sampling) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "dynatemp_range": 0.0,
        "dynatemp_exponent": 1.0,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "top_n_sigma": sampling.top_n_sigma,
        "xtc_probability": sampling.xtc_probability,
        "xtc_threshold": sampling.xtc_threshold,
        "typical_p": sampling.typical_p,
        "repeat_last_n": sampling.repeat_last_n,
        "repeat_penalty": sampling.repeat_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "dry_multiplier": sampling.dry_multiplier,
        "dry_base": sampling.dry_base,
        "dry_allowed_length": sampling.dry_allowed_length,
        "dry_penalty_last_n": sampling.dry_last_n,
        "dry_sequence_breakers": list(sampling.dry_breakers),
        "mirostat": sampling.mirostat,
        "mirostat_tau": sampling.mirostat_tau,
        "mirostat_eta": sampling.mirostat_eta,
    }


def _timings(end: Done, *, silent: bool) -> dict[str, Any]:
    """Of the node that came to the end: prefill and decoding, in tokens and milliseconds."""
    usage = end.usage
    prompt, predicted = usage.prompt_tokens - usage.cached_tokens, 0 if silent else usage.completion_tokens
    return {
        "cache_n": usage.cached_tokens,
        **_speed("prompt", prompt, end.prefill_s),
        **_speed("predicted", predicted, 0.0 if silent else end.decode_s),
    }


def _speed(what: str, tokens: int, seconds: float) -> dict[str, float]:
    return {
        f"{what}_n": tokens,
        f"{what}_ms": round(1000 * seconds, 3),
        f"{what}_per_token_ms": round(1000 * seconds / tokens, 3) if tokens else 0.0,
        f"{what}_per_second": round(tokens / seconds, 3) if seconds > 0 else 0.0,
    }
