"""What a node has done in confined processes, and the errors that come of it: templates rendered, grammars tried.

Each kind of work has processes of its own (chat/rendering.py, engine/trial.py): those for templates are there before
the node is ready, those for grammars from the first one on, since most nodes never see any. A grammar is compiled in
the node too, where answers are drawn, but only after a trial, which is not made again while it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmnode.service.confined import Broken, Confined, ConfinedError, Limits, Overrun
from llmnode.wire.errors import ApiError, InvalidRequest

TOO_COMPLEX = "too_complex"
"""The code of a 400 for what took too much."""
_RENDERING, _TRIAL = "llmnode.chat.rendering:work", "llmnode.engine.trial:work"


class Foreign:
    """The node's side. Thread-safe; everything blocks."""

    def __init__(self, setup: Mapping[str, Any], limits: Limits) -> None:
        """setup: `source`, `bos`, `eos` of the template, `controls` (spellings of control tokens), `grammar_bytes`."""
        self._templates = Confined(_RENDERING, setup, limits)
        self._grammars = Confined(_TRIAL, {"grammar_bytes": setup["grammar_bytes"]}, limits)

    def start(self) -> None:
        """Raises StartError."""
        self._templates.start()

    def close(self) -> None:
        self._templates.close()
        self._grammars.close()

    def template(self, task: Mapping[str, Any]) -> Any:
        """A task of rendering.py. Raises InvalidRequest."""
        overridden = task.get("template") is not None
        what = "the chat template of the request" if overridden else "rendering these messages"
        return _done(self._templates, task, what, "chat_template" if overridden else "messages")

    def try_grammar(self, kind: str, source: str, field: str) -> None:
        """Raises InvalidRequest for a grammar or schema that is none, or that takes too much to compile."""
        task = {"kind": kind, "source": source, "param": field}
        told = _done(self._grammars, task, f"compiling {field}", field)
        if "refused" in told:
            raise InvalidRequest(told["refused"], param=told["param"])


def _done(where: Confined, task: Mapping[str, Any], what: str, field: str) -> Any:
    try:
        return where.do(task)
    except (Overrun, Broken) as error:
        raise InvalidRequest(f"{what} {error}", param=field, code=TOO_COMPLEX) from error
    except ConfinedError as error:
        raise ApiError(f"no process for {what}: it {error}") from error
