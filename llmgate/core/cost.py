"""What a request would cost on a node, in seconds until its first token.

    cost = wait + (backlog + prompt - cached) / prefill speed

wait      0 with a free slot. Else the node's own `wait_s`, and `STEP_S` for each request of this gate that the report
          does not count and that found no free slot, with the one to be placed if the report still knew of a free one.
backlog   prompt tokens that are to be computed there first: `queued_prompt_tokens` and what this gate sent since, less
          what was computed meanwhile: its answer has begun.
prompt    tokens of the request: bytes of its chain over the node's own `bytes_per_token`, or `BYTES_PER_TOKEN`.
cached    those of them that the node holds, by its last report or by what this gate sent there lately.
speed     `prefill_tps` as the node measured it, or `PREFILL_TPS` until it has.

Affinity needs no threshold: a node that holds the prompt loses as soon as waiting there takes longer than computing the
prompt elsewhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llmgate.core.fleet import Node
from llmnode.wire.chain import BLOCK, Chain

BYTES_PER_TOKEN = 4.0
"""English, until the node has measured its own."""
PREFILL_TPS = 1000.0
"""Tokens a second, until the node has measured its own: a small model on a CPU host, so that caches count for much."""
STEP_S = 1.0
"""Seconds that one more waiting request means, until the node's next report says what it really does."""


class Cost(NamedTuple):
    """The figures behind one node's cost. Tokens, seconds, tokens a second.

    depth: blocks of the request's chain that the node holds, which `cached` is in tokens.
    """

    wait_s: float
    backlog: int
    prompt: int
    cached: int
    prefill_tps: float
    depth: int

    @property
    def before_s(self) -> float:
        """Seconds until the node comes to this request."""
        return self.wait_s + self.backlog / self.prefill_tps

    @property
    def seconds(self) -> float:
        return self.before_s + (self.prompt - self.cached) / self.prefill_tps

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s, {self.cached} of {self.prompt} cached"


def of(node: Node, chain: Chain, now: float) -> Cost:
    """What this request would cost on this node."""
    load = node.load
    per_token = (load.bytes_per_token if load else 0.0) or BYTES_PER_TOKEN
    prompt = math.ceil(chain.size / per_token)
    depth = node.depth(chain, now)
    return Cost(
        wait_s=_wait(node),
        backlog=node.backlog,
        prompt=prompt,
        cached=min(prompt, int(depth * BLOCK / per_token)),
        prefill_tps=(load.prefill_tps if load else 0.0) or PREFILL_TPS,
        depth=depth,
    )


def _wait(node: Node) -> float:
    if node.busy < node.slots:
        return 0.0
    load = node.load
    reported = load.running + load.waiting if load else 0
    # `wait_s` speaks for the next request after those reported; with a slot free then, it says nothing of the queue.
    beyond = node.busy - max(reported, node.slots - 1)
    return (load.wait_s if load else 0.0) + STEP_S * max(0, beyond)
