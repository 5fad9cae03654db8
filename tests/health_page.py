"""Writes docs/health.md from the gate's table of transitions: `make docs`. A test fails when page and table differ."""

from __future__ import annotations

from pathlib import Path

from llmgate.core.health import EVERYWHERE, LEVELS, SHARE_FLOOR, TRANSITIONS, WINDOW_S, Condition, Signal

PAGE = Path(__file__).resolve().parents[1] / "docs" / "health.md"


def render() -> str:
    """The page: the diagram, what states and signals mean, and the numbers behind the graver signals."""
    return f"""# Health of nodes

The gate keeps one state for each node. Polls move it (what the node says of itself), and so does what becomes of the
requests that it is sent. All transitions are in one table, in `llmgate/core/health.py`; `make docs` draws this page
from it. `GET /admin/nodes` shows each node's state with the numbers behind it, and
[operations.md](operations.md#health-of-nodes) says what to do about it.

```mermaid
{diagram()}
```

A signal that has no arrow from a state changes nothing there.

| state | meaning |
|---|---|
{chr(10).join(f"| `{state.word}` | {state.meaning} |" for state in Condition)}

| signal | when |
|---|---|
{chr(10).join(f"| `{signal.word}` | {signal.meaning} |" for signal in Signal)}

- `failed` becomes `tripped` after `eject_after` failures in a row, or when half of the last 2 x `eject_after` requests
  within {WINDOW_S:g} s have failed.
- `tripped` becomes `spared` when the node is the last one of a model in full service (`slow-start` or `up`, neither
  drained nor stale), or when more than half of a model's nodes would be out.
- An ejection lasts `eject_s` the first time and twice as long each time after, up to {2 ** (LEVELS - 1)} times as long.
  Answering for as long as the last ejection lasted takes one doubling back.
- The share of a slow start grows from {SHARE_FLOOR:.0%} of the node's slots (one at least) to all of them.
- After `renewed` nothing counts that is known of the process before; and the ends of requests that were sent before a
  node was last ejected or renewed count for nothing.
"""


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{state.word}" as {_id(state)}' for state in Condition]
    lines += ['    state "every state" as EVERY']
    lines += [f"    [*] --> {_id(Condition.UNKNOWN)}: listed when the gate starts"]
    lines += [f"    [*] --> {_id(Condition.JOINING)}: listed later"]
    for state, row in TRANSITIONS.items():
        for to in Condition:
            signals = [signal.word for signal in Signal if row.get(signal) is to]
            if signals:
                lines.append(f"    {_id(state)} --> {_id(to)}: {', '.join(signals)}")
    lines += [f"    EVERY --> {_id(to)}: {signal.word}" for signal, to in EVERYWHERE.items()]
    return "\n".join(lines)


def _id(state: Condition) -> str:
    # Mermaid takes no hyphen in a name.
    return state.name


if __name__ == "__main__":
    PAGE.write_text(render())
    print(PAGE)
