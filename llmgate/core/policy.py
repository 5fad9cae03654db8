"""Which node answers a request, who comes next, and why: pure functions of a fleet snapshot, a clock reading and dice.

`choose` decides in this order:

1. The name. An alias of the nodes file stands for a model's id, which then goes to the node in its place.
2. The model. The one asked for, while a node of it has a free slot; else the first of its fallbacks of which one has;
   else, with everybody full, the first of them all that has a node, or that will have one when it is ready again.
3. The candidates: nodes that take work, serve it for this use and have its labels (core/candidate.py).
4. Their order, by the policy that the nodes file names for the model:
   prefix        the cheapest first (core/cost.py); the tree is below
   least-loaded  by the share of slots busy, then by who rested longest, then by name
   round-robin   by who rested longest, then by name
   random        by dice and weights
   rendezvous    by the hash of the conversation's root and weights, those with too much load last
5. The canary. The draw of the conversation's root (or of the request id where there is none) says on which side of the
   release it belongs; nodes of that side come first, in their order, the others stay as a reserve.

`prefix`, once every candidate has a cost:

1. Those are good that cost no more than `NEAR` times the lowest, or `NEAR_S` more: the figures are no finer than that.
2. When nobody holds a block of it (the prompt is cold), those are good that cost no more than `COLD` times the lowest,
   or `COLD_S` more: speeds are measured and waver, and where others will look for it counts for more. What stands
   before it there does not waver: no more of that than in (1).
3. Of the good those come first that compute little: no more than `NEAR` times the least, or `NEAR_TOKENS` more. What
   another one would compute again is lost for whoever comes next.
4. Among equals the rendezvous hash of the root decides, those whose load is above `CROWDED` times the mean last. For a
   cold prompt nothing speaks for a busy one: they come by their load, then by what stands before it there, then those
   first that got work longest ago. Idle ones come by the hash of its first block, so that gates which know nothing of
   each other send what begins alike the same way.
5. The others follow, the cheapest first.

A prompt of which no figure is known is cold everywhere and costs the same everywhere, so the hash alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from llmgate.core import candidate, rendezvous
from llmgate.core.candidate import Candidate, Found
from llmgate.core.fleet import Fleet
from llmgate.core.keys import ANONYMOUS, Key
from llmgate.core.prediction import Sent
from llmgate.core.prompt import NOTHING, Prompt
from llmgate.listing import Canary, Route
from llmnode.wire.errors import ApiError, ModelNotFound, Overloaded, WrongKind

NO_NODE_RETRY_S = 1.0
"""`Retry-After` when no node is ready, in seconds: nodes are polled about that often."""
NEAR, NEAR_S, NEAR_TOKENS = 1.25, 0.01, 64
COLD, COLD_S = 2.0, 0.1
CROWDED = 1.25
_SHOWN = 4
"""Candidates named in a log line."""

CHAT = frozenset({"chat"})
COMPLETION = frozenset({"completion"})
INFILL = frozenset({"infill"})
EMBEDDING = frozenset({"embedding"})
RERANK = frozenset({"rerank"})
EITHER = CHAT | COMPLETION
ANY = EITHER | EMBEDDING | RERANK
ANSWERS: Mapping[str, frozenset[str]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/completion": COMPLETION,
    "/completions": COMPLETION,
    "/infill": INFILL,
    "/inference": EITHER,
    "/v1/messages": CHAT,
    "/v1/responses": CHAT,
}
"""By path of a request for an answer: a node must offer the model for one of these uses. Such answers may be streams,
and another node may go on with them."""
WHOLE: Mapping[str, frozenset[str]] = {
    "/v1/embeddings": EMBEDDING,
    "/embeddings": EMBEDDING,
    "/embedding": EMBEDDING,
    "/v1/rerank": RERANK,
    "/v1/reranking": RERANK,
    "/rerank": RERANK,
    "/reranking": RERANK,
    "/tokenize": ANY,
    "/detokenize": ANY,
    "/apply-template": CHAT,
    "/v1/messages/count_tokens": CHAT,
    "/v1/responses/input_tokens": CHAT,
}
"""The same of requests whose answer is one JSON body, which a node begins anew or not at all."""
USES: Mapping[str, frozenset[str]] = {**ANSWERS, **WHOLE}


@dataclass(frozen=True)
class Ask:
    """What routing needs to know of a request. `kinds`: a node must offer the model for one of these uses.

    request: its id.    dice: 64 random bits.    key: whose it is; fallbacks that it may not use are left out.
    begun: this model has begun the answer, and no other can go on with it.
    """

    model: str
    kinds: frozenset[str]
    prompt: Prompt = field(default_factory=lambda: Prompt({}, ""))
    request: str = ""
    dice: int = 0
    key: Key = ANONYMOUS
    begun: bool = False


@dataclass(frozen=True)
class Choice:
    """Candidates, best first, and the nodes passed over with the reason for each.

    model: id of the model that answers, or would if a node were there; None when nobody serves it.
    name: what the request must call it for these nodes to know it.
    reason: what decided, in a word: a policy's own, "only" for one candidate, "nobody" for none.
    notes: what else is to be said: a fallback, a canary.
    awaited: nobody is there, and somebody will be once a node that was passed over takes work.
    """

    ranked: tuple[Candidate, ...]
    passed_over: tuple[tuple[str, str], ...]
    policy: str
    reason: str
    model: str | None
    name: str
    notes: tuple[str, ...] = ()
    awaited: bool = False

    @cached_property
    def why(self) -> str:
        """One line for the request log, e.g. "least-loaded (load): a 1/4, b 3/4; not c (draining)"."""
        text = f"{self.policy} ({', '.join((self.reason, *self.notes))}): "
        text += ", ".join(map(str, self.ranked[:_SHOWN])) or "nobody"
        if len(self.ranked) > _SHOWN:
            text += f" and {len(self.ranked) - _SHOWN} more"
        if self.passed_over:
            text += "; not " + ", ".join(f"{name} ({why})" for name, why in self.passed_over)
        return text

    def sent(self, to: Candidate, request: str, now: float) -> Sent | None:
        """What a dispatch to this candidate brings there; None when nothing was counted."""
        if to.cost is None or to.chain is None:
            return None
        cost = to.cost
        return Sent(request, to.chain.blocks, cost.depth, cost.cached, cost.prompt - cost.cached, now)


@dataclass(frozen=True)
class Draw:
    """What stands in for chance. root: of the conversation, always the same.    first: of all that begin alike.
    dice: new for each request."""

    root: int
    first: int
    dice: int


@dataclass(frozen=True)
class Ranking:
    """All candidates, best first, and what decided in a word."""

    order: tuple[Candidate, ...]
    reason: str


Policy = Callable[[Sequence[Candidate], Draw], Ranking]


def prefix(candidates: Sequence[Candidate], draw: Draw) -> Ranking:
    """The cheapest first; near ties and cold prompts by rendezvous hash. The tree is at the top of this file.

    Reasons: "cold"; "held", the first holds as much as anybody; "moved", somebody holds more and would take longer.
    """
    lowest = min(c.seconds for c in candidates)
    most = max(c.cached for c in candidates)
    ratio, slack = (NEAR, NEAR_S) if most else (COLD, COLD_S)
    good = [c for c in candidates if c.seconds <= max(ratio * lowest, lowest + slack)]  # (1), (2)
    if not most:
        before = min(c.before_s for c in good) + max((NEAR - 1) * lowest, NEAR_S)
        good = [c for c in good if c.before_s <= before]
    least = min(c.uncached for c in good)
    little = [c for c in good if c.uncached <= max(NEAR * least, least + NEAR_TOKENS)]  # (3)
    first = _hashed(little, draw.root, candidates) if most else _freest(little, draw.first)  # (4)
    others = sorted((c for c in candidates if c not in little), key=lambda c: (c.seconds, c.name))  # (5)
    return Ranking((*first, *others), "cold" if not most else "held" if first[0].cached == most else "moved")


def least_loaded(candidates: Sequence[Candidate], draw: Draw) -> Ranking:
    """By the share of slots busy, then by who rested longest, then by name."""
    return Ranking(tuple(sorted(candidates, key=lambda c: (c.load, c.turn, c.name))), "load")


def round_robin(candidates: Sequence[Candidate], draw: Draw) -> Ranking:
    """By who rested longest, then by name."""
    return Ranking(tuple(sorted(candidates, key=lambda c: (c.turn, c.name))), "turn")


def at_random(candidates: Sequence[Candidate], draw: Draw) -> Ranking:
    """By weighted dice: the hash of a key that nobody will see again."""
    return Ranking(_by_score(candidates, draw.dice), "dice")


def by_rendezvous(candidates: Sequence[Candidate], draw: Draw) -> Ranking:
    """By weighted hash of the root, those with too much load last."""
    return Ranking(_hashed(candidates, draw.root, candidates), "hash")


POLICIES: Mapping[str, Policy] = {
    "prefix": prefix,
    "least-loaded": least_loaded,
    "round-robin": round_robin,
    "random": at_random,
    "rendezvous": by_rendezvous,
}
_READ_PROMPT = frozenset({"prefix", "rendezvous"})


def choose(fleet: Fleet, ask: Ask, now: float, stale_after: float, policy: str | None = None) -> Choice:
    """Rank the nodes for a request; never an error: whoever asks turns an empty choice into an answer with `refusal`.

    now: monotonic seconds.    policy: in place of the one that the nodes file names, for `llmgate explain`.
    """
    name, route, found = _model(fleet, ask, now, stale_after)  # (1), (2), (3)
    policy = policy or route.policy
    model = fleet.resolve(name)
    notes = (f"fallback from {ask.model}",) if name != fleet.meant(ask.model) else ()
    candidates = found.candidates
    root, first = NOTHING.root, NOTHING.root
    if candidates and (policy in _READ_PROMPT or route.canary):
        candidates = candidate.with_chains(candidates, fleet, name, ask.prompt, now)
        chain = candidates[0].chain or NOTHING
        root, first = chain.root, chain.blocks[0] if chain.blocks else chain.root
    root = root or rendezvous.key(ask.request)
    if not candidates:
        return Choice((), found.passed_over, policy, "nobody", model, name, notes, found.awaited)
    order, reason = candidates, "only"
    if len(candidates) > 1:
        ranking = POLICIES[policy](candidates, Draw(root, first or root, ask.dice))  # (4)
        order, reason = ranking.order, ranking.reason
    if route.canary:
        order, side = _sided(order, route.canary, root)  # (5)
        notes = (*notes, side)
    return Choice(order, found.passed_over, policy, reason, model, name, notes)


def refusal(fleet: Fleet, ask: Ask, choice: Choice, visible: list[str], waited: float = 0.0) -> ApiError:
    """What to answer when a choice is empty. visible: the models that the asking key may use.    waited: seconds.

    400 for a model that is for something else. 404 is said only when every listed node has reported: until then the
    model may be on a node not yet heard of, and a client should come again rather than give up.
    """
    if choice.model is None:
        silent = fleet.silent()
        if not silent and fleet.nodes:
            return ModelNotFound(ask.model, visible)
        who = ", ".join(silent) or "no nodes are listed"
        return Overloaded(
            f"no ready node serves the model {ask.model!r}; not heard of yet: {who}",
            retry_after=NO_NODE_RETRY_S,
            code="no_ready_node",
        )
    kinds = _kinds(fleet, choice.name)
    if kinds and not kinds & ask.kinds:
        return WrongKind(ask.model, ask.prompt.path, sorted(kinds))
    why = "; ".join(f"{name}: {why}" for name, why in choice.passed_over)
    since = f", and none came within {waited:.1f} s" if waited else ""
    return Overloaded(
        f"no ready node serves the model {ask.model!r} now ({why}){since}",
        retry_after=NO_NODE_RETRY_S,
        code="no_ready_node",
    )


def _kinds(fleet: Fleet, model: str) -> frozenset[str]:
    """What the nodes that have loaded the model offer it for; one that still loads it may not know."""
    served = (node.model(model) for node in fleet.nodes.values())
    return frozenset(kind for one in served if one and one.state == "ready" for kind in one.kinds)


def _model(fleet: Fleet, ask: Ask, now: float, stale_after: float) -> tuple[str, Route, Found]:
    """The name of the model that answers, its route, and who may do it."""
    first = fleet.meant(ask.model)
    others = [name for name in fleet.route_of(first).fallback if ask.key.may_use(name) and not ask.begun]
    every: list[tuple[str, Route, Found]] = []
    for name in (first, *others):
        route = fleet.route_of(name)
        found = candidate.find(fleet, name, ask.kinds, route.labels, now, stale_after)
        if any(not c.full for c in found.candidates):
            return name, route, found
        every.append((name, route, found))
    with_nodes = (one for one in every if one[2].candidates)
    awaited = (one for one in every if one[2].awaited)
    served = (one for one in every if fleet.resolve(one[0]) is not None)
    return next(with_nodes, None) or next(awaited, None) or next(served, None) or every[0]


def _hashed(some: Sequence[Candidate], key: int, everybody: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """By rendezvous hash, those above `CROWDED` times everybody's mean load last."""
    limit = CROWDED * sum(c.load for c in everybody) / len(everybody)
    order = _by_score(some, key)
    return (*(c for c in order if c.load <= limit), *(c for c in order if c.load > limit))


def _freest(candidates: Sequence[Candidate], key: int) -> tuple[Candidate, ...]:
    """By load, what stands before a request there, and who got work longest ago; idle ones by rendezvous hash."""
    order = _by_score(candidates, key)
    return tuple(sorted(order, key=lambda c: (c.load, c.before_s, c.turn if c.busy else 0)))


def _by_score(candidates: Sequence[Candidate], key: int) -> tuple[Candidate, ...]:
    # A node that starts slowly wins few; as its share grows, keys move to it and between no others.
    return tuple(sorted(candidates, key=lambda c: (-rendezvous.score(key, c.name, c.weight * c.share), c.name)))


def _sided(order: Sequence[Candidate], canary: Canary, root: int) -> tuple[tuple[Candidate, ...], str]:
    """Those of the side that the draw falls on first, and the side's name."""
    chosen = rendezvous.draw(root, canary.release) < canary.share
    side = [c for c in order if (c.release == canary.release) == chosen]
    rest = [c for c in order if (c.release == canary.release) != chosen]
    return (*side, *rest), "canary" if chosen else "not canary"
