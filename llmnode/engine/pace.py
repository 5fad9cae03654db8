"""What a step costs, learnt from the steps so far, and what follows: how much to prefill, how far to guess ahead, when
a step counts as stuck. Pure: seconds come in as arguments.

Owns: the model of a step's time, seconds = base * passes + each * (tokens of running answers) + (flat + deep * depth) *
(prompt tokens), where depth is how many tokens a prompt token has before it, on average. Base and each are a straight
line through steps without prompts, older ones fading; the next two another one, through what is left over in steps with
prompts, which fades sooner: other prompts come. Passes over the weights: one, and one more for a prompt beside running
answers in a parted cache. Were that taken for a cost of its tokens, few tokens would look dear, so that fewer yet would
be computed next time: 32 prompts beside each other took twice as long in the end (500M model).
Refuses to know: sequences, the backend, the clock.
"""

from __future__ import annotations

import math

_FADE = 0.98
"""Weight of a step against the next one: about the last 50 count."""
_SLOPE = 0.2
"""What one token more is taken to cost before it was measured, as a share of a step of one token: between the 0.12 to
0.37 of small models on two cores and the few hundredths of a GPU."""
TILE = 64
"""Tokens of a prompt that llama.cpp's attention on CPUs takes at once."""
_WHOLE = TILE + 1
"""Tokens of a prompt from which llama.cpp's attention on CPUs takes tiles and not rows: with 2,048 tokens of context,
63 of them took 506 ms and 64 took 34 (15M model, heads of 48 values); one more, since a parted cache computes the first
one beside the running answers. So this many are computed although they stall running answers up to _STRETCH times too
long: by the time that fewer took, they often do not."""
_STRETCH = 8
_WORTH_A_PASS = 3
"""A prompt's tokens beside running answers take so many times as long as the pass over the weights that they need, also
where that is over the stall: the slower a model, the more of each step would be passes, and prompts would never end."""
_PREFILL_FADE = 0.85
_SPREAD = 0.01
"""Share of the depths' mean square that must be variance before a line is put through them."""
_MARGIN = 1.1
"""A guess must gain this much more than it costs: the estimates are rough."""


class Pace:
    """stall_s: seconds that a prompt may add to a step of running answers. parted: whether it takes a pass over the
    weights of its own there. tolerance, grace_s, slowest_tps: see `due`."""

    def __init__(
        self, stall_s: float, *, grace_s: float, tolerance: float, slowest_tps: float, parted: bool = False
    ) -> None:
        self._stall_s, self._parted = stall_s, parted
        self._grace_s, self._tolerance, self._slowest_tps = grace_s, tolerance, slowest_tps
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        # Sums over steps with prompts, each weighed by its tokens: 1, depth, depth^2, seconds a token.
        self._w = self._wd = self._wdd = self._ws = self._wds = 0.0

    def record(self, decode: int, prefill: int, seconds: float, depth: float = 0.0) -> None:
        """A step of `decode` tokens of running answers and `prefill` tokens of prompts took so long; the latter had
        `depth` tokens before them on average."""
        if prefill == 0:
            self._n = self._n * _FADE + 1
            self._x = self._x * _FADE + decode
            self._y = self._y * _FADE + seconds
            self._xx = self._xx * _FADE + decode * decode
            self._xy = self._xy * _FADE + decode * seconds
            return
        each = max(seconds - self._without_prompts(decode, prefill), 0.1 * seconds) / prefill
        # A few tokens say little about the speed of many: their step is mostly base.
        weight = prefill * min(1.0, prefill / 16)
        self._w = self._w * _PREFILL_FADE + weight
        self._wd = self._wd * _PREFILL_FADE + weight * depth
        self._wdd = self._wdd * _PREFILL_FADE + weight * depth * depth
        self._ws = self._ws * _PREFILL_FADE + weight * each
        self._wds = self._wds * _PREFILL_FADE + weight * depth * each

    def seconds(self, decode: int, prefill: int = 0, depth: float = 0.0) -> float:
        """About how long a step takes; 0.0 where nothing like it was measured."""
        flat, deep = self._prefill_line()
        return self._without_prompts(decode, prefill) + (flat + deep * depth) * prefill

    def prefill_limit(self, decode: int, most: int, start: int = 0) -> int:
        """Prompt tokens to compute in a step beside `decode` tokens of running answers, of a prompt that has `start`
        tokens computed: all that fits in the stall, and no fewer than are worth a pass over the weights."""
        if decode == 0:
            return most
        if not self._w:
            return min(most, _WHOLE)
        # n tokens take n * (flat + deep * (start + n / 2)) seconds.
        flat, deep = self._prefill_line()
        first = flat + deep * start
        one_pass = self._line()[0] if self._parted else 0.0
        left = max(self._stall_s - one_pass, _WORTH_A_PASS * one_pass)
        fits = int(2 * left / (first + math.sqrt(first * first + 2 * deep * left)))
        if fits >= _WHOLE:
            fits = (fits - 1) // TILE * TILE + 1  # part of a tile takes as long as a whole one
        elif one_pass + _WHOLE * (first + deep * _WHOLE / 2) < _STRETCH * self._stall_s:
            fits = _WHOLE
        return max(1, min(most, fits))

    def worth(self, decode: int) -> float:
        """The chance of being right from which a guessed token pays, beside `decode` tokens of running answers.

        One token more takes `each` seconds of a step that gives `decode` tokens in base + each * decode. It pays if it
        brings more tokens a second than the step does without it."""
        base, each = self._line()
        whole = base + each * decode
        return _MARGIN * each * decode / whole if whole > 0 else _MARGIN * _SLOPE

    def due(self, decode: int, prefill: int, depth: float = 0.0) -> float:
        """Seconds after which a step counts as stuck: the grace plus so many times what it should take."""
        decode_s = self._without_prompts(decode, prefill) if self._n else decode / self._slowest_tps
        flat, deep = self._prefill_line()
        prefill_s = prefill * (flat + deep * depth or 1 / self._slowest_tps)
        return self._grace_s + self._tolerance * (decode_s + prefill_s)

    def _without_prompts(self, decode: int, prefill: int) -> float:
        """Seconds of a step but for what the prompts' tokens take."""
        base, each = self._line()
        passes = bool(decode or prefill) + bool(self._parted and decode and prefill)
        return base * passes + each * decode

    def _prefill_line(self) -> tuple[float, float]:
        """(flat, deep) seconds of a prompt token; zeros before any."""
        if not self._w:
            return 0.0, 0.0
        depth, each = self._wd / self._w, self._ws / self._w
        square = self._wdd / self._w
        spread = square - depth * depth
        deep = (self._wds / self._w - depth * each) / spread if spread > _SPREAD * square else 0.0
        deep = min(max(0.0, deep), 0.9 * each / depth if depth else 0.0)
        return each - deep * depth, deep

    def _line(self) -> tuple[float, float]:
        """(base, each) of steps without prompts; zeros before any."""
        if not self._n:
            return 0.0, 0.0
        x, y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - x * x
        each = (self._xy / self._n - x * y) / spread if spread > 0.05 * x * x else 0.0
        if each <= 0:  # all steps alike: share their time out as it usually is
            each = y * _SLOPE / (1 - _SLOPE + _SLOPE * x)
        each = min(each, y / x)
        return max(0.0, y - each * x), each
