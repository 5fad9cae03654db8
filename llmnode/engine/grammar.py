"""What an answer must match: grammars, compiled once for a model, and an answer's place in one.

Owns: what may be asked for (GBNF, JSON Schema, any JSON object), its limits, and the words in which it is refused.
Refuses to know: logits, draws, sequences. The work is done by llguidance, which needs no llama.cpp: any backend has
grammars. What it does not support it refuses, and so do we, by name; nothing in a schema that constrains is skipped.

An answer may end exactly where the grammar may: there each of the model's end tokens is allowed, and nowhere else.
Control tokens have no text, so no grammar allows them but one that names them by their ids. Where nothing can follow
any more, only the end is allowed. The place that a text leads to depends on its tokens alone.

A mask holds every token whose text the grammar can go on with. llguidance would rather allow only the usual tokens of a
text that is certain to come ("forcing"); we switch that off, since then a token drawn and checked alone and one drawn
under the mask would follow different rules. (So no tokenizer is needed either.)

Measured with JSON over 32,000 / 151,936 tokens: checking a token 0.6 us, accepting one 1 us, a mask 20 (at most 110) /
50 (at most 480) us, compiling 1 ms (GBNF 10 ms), a matcher for an answer 5 us; once for a model, 0.1 / 0.4 s for the
tree of tokens. Compiling and masks are done without the GIL. What a grammar may cost is limited below; an answer that
reaches a limit comes to a DeadEnd.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llmnode.engine.gbnf import GbnfError
from llmnode.engine.lark import lark_of
from llmnode.wire.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WHITESPACE = r"[ \n\r\t]{1,40}"
"""Between the parts of a JSON text: a new line and an indentation, but not for ever, where weak models like to end."""

_ROW_ITEMS = {"gbnf": 1000, "json_schema": 10_000, "lark": 10_000}
"""Places in the grammar that a text may be at, all at once. The time for one more token grows with their square, and a
grammar can be written that has as many as its text is long. A schema has a few for each property that may come next."""
_STEP_ITEMS = 500_000
"""The same for all tokens of a mask together, at about 20,000 a millisecond. A grammar of single characters needs
100,000 for 151,936 tokens, twice the library's own limit."""
_LEXER_STATES = 20_000
"""One or two kB each, in every matcher; the library's own limit of 250,000 would let one answer take half a GB."""


_WRITTEN_OUT = 16
"""How much longer a grammar that was written for a request may be than one that came with it: agents bring dozens of
tools, each with a schema."""


class DeadEnd(InvalidRequest):
    """400: the answer can go no further. Its grammar allows no token that is left, or has grown past the limits."""

    code = "dead_end"

    def __init__(self, message: str, *, param: str = "grammar") -> None:
        super().__init__(message, param=param)


class Matcher:
    """One answer's place in its grammar. Belongs to one thread at a time."""

    def __init__(self, inner: LLMatcher, end_tokens: frozenset[int], n_vocab: int) -> None:
        self._inner, self._ends, self._size = inner, end_tokens, n_vocab
        self._ended = False
        self._mask: NDArray[np.bool_] | None = None

    @property
    def may_end(self) -> bool:
        """Whether the text so far is one that the grammar stands for."""
        return self._ended or self._inner.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._ended or (self._inner.is_stopped() and self._inner.is_accepting())

    def allows(self, token: int) -> bool:
        """Whether the token may come next. Changes nothing. Raises DeadEnd past the limits."""
        if token in self._ends or self._ended:
            return not self._ended and self.may_end
        allowed = self._inner.validate_tokens([token]) == 1
        self._check()
        return allowed

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next: shape (n_vocab,), to be read only. Raises DeadEnd past the limits."""
        if self._mask is None:
            if self._ended:
                self._mask = np.zeros(self._size, np.bool_)
            else:
                bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
                self._check()
                self._mask = np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
        return self._mask

    def accept(self, token: int) -> None:
        """The token is part of the text now. Raises DeadEnd when it may not be."""
        self._mask = None
        if not self.allows(token):
            raise DeadEnd(f"token {token} is not one that the grammar allows here")
        if token in self._ends:
            self._ended = True
        else:
            self._inner.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            raise DeadEnd(f"the grammar cannot be followed any further: {_reason(self._inner.get_error())}")


class Grammar:
    """A compiled grammar, for any number of answers and threads."""

    def __init__(self, name: str, prototype: LLMatcher, end_tokens: frozenset[int], n_vocab: int) -> None:
        self._name, self._prototype = name, prototype
        self._ends, self._size = end_tokens, n_vocab

    def __repr__(self) -> str:
        return f"<Grammar {self._name}>"

    def matcher(self) -> Matcher:
        """The beginning of an answer."""
        return Matcher(self._prototype.deep_copy(), self._ends, self._size)


class Grammars:
    """Compiles grammars for one model and keeps the latest. Thread-safe; compiling may take long.

    pieces: bytes of each token as text; control tokens are empty.      end_tokens: ids that end an answer.
    max_bytes: length of a grammar or schema.       kept: how many compiled ones are kept, since clients repeat them.
    trial: called with kind, text and field of one that is not known, before it is compiled. Raises InvalidRequest.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        end_tokens: frozenset[int],
        *,
        max_bytes: int = 65_536,
        kept: int = 32,
        trial: Callable[[str, str, str], None] | None = None,
    ) -> None:
        self._pieces, self._ends = pieces, end_tokens
        self._max_bytes, self._kept, self._trial = max_bytes, kept, trial
        self._lock = threading.Lock()  # guards the two below
        self._known: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._limits = {
            kind: LLParserLimits(
                max_items_in_row=items,
                step_max_items=_STEP_ITEMS,
                max_lexer_states=_LEXER_STATES,
                verbose_errors=False,
            )
            for kind, items in _ROW_ITEMS.items()
        }

    def prepare(self) -> None:
        """Build the tree of tokens, which the first grammar needs. It holds the GIL: a matter for loading time."""
        with self._lock:
            self._tree()

    def gbnf(self, text: str) -> Grammar:
        """A grammar in llama.cpp's notation. Raises InvalidRequest naming `grammar`."""
        return self._grammar("gbnf", text, "grammar", lark_of)

    def json_schema(self, schema: Mapping[str, Any] | bool | str, *, param: str = "response_format") -> Grammar:
        """JSON texts that the schema describes, properties in its order; `schema` may be JSON already.

        Raises InvalidRequest naming `param`: the schema is none, or holds what cannot be guaranteed.
        """
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(value, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"{param} must hold a JSON schema: {error}", param=param) from None
        if not isinstance(value, (Mapping, bool)):
            raise InvalidRequest(f"{param} must hold a JSON schema, which is an object", param=param)
        if isinstance(value, Mapping) and "x-guidance" in value:
            raise InvalidRequest(f"x-guidance in the schema of {param} is not supported", param=param)
        return self._grammar("json_schema", text, param, _lark_of_schema)

    def lark(self, text: str, *, param: str = "tools") -> Grammar:
        """A grammar in llguidance's own notation, which chat/enforce.py writes: schemas within fixed texts, control
        tokens as `<[id]>`. Raises InvalidRequest naming `param`, for which it was written."""
        return self._grammar("lark", text, param, _lark_of_lark)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def _grammar(self, kind: str, text: str, param: str, translate: Callable[[str], str]) -> Grammar:
        size = len(text.encode(errors="surrogatepass"))
        most = self._max_bytes * (_WRITTEN_OUT if kind == "lark" else 1)
        if size > most:
            raise InvalidRequest(f"{param} may hold {most} bytes at most, got {size}", param=param)
        with self._lock:
            known = self._known.get((kind, text))
            if known is not None:
                self._known.move_to_end((kind, text))
                return known
            tree = self._tree()
        if self._trial is not None:
            self._trial(kind, text, param)
        try:
            prototype = LLMatcher(tree, translate(text), log_level=0, limits=self._limits[kind])
        except GbnfError as error:
            raise InvalidRequest(f"{param} cannot be used: {error}", param=param) from None
        prototype.compute_bitmask()  # the first step may find what compiling has not
        if prototype.is_error():
            raise InvalidRequest(f"{param} cannot be used: {_reason(prototype.get_error())}", param=param)
        grammar = Grammar(f"{kind} of {size} bytes", prototype, self._ends, len(self._pieces))
        with self._lock:
            self._known[kind, text] = grammar
            while len(self._known) > self._kept:
                self._known.popitem(last=False)
        return grammar

    def _tree(self) -> LLTokenizer:
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                _Tokens(self._pieces, self._ends),  # type: ignore[arg-type]
                eos_token=sorted(self._ends) or None,
            )
        return self._tokenizer


class _Tokens:
    """The vocabulary in the shape that llguidance reads.

    Each token without text gets a name of its own, which no text has: those of one name would be allowed together."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, pieces: Sequence[bytes], end_tokens: frozenset[int]) -> None:
        silent = end_tokens | {id for id, piece in enumerate(pieces) if not piece}
        self.tokens = [b"<%d>" % id if id in silent else piece for id, piece in enumerate(pieces)]
        self.eos_token_id = min(end_tokens, default=None)
        self.special_token_ids = sorted(silent)


def _lark_of_lark(text: str) -> str:
    return f'%llguidance {{"no_forcing": true}}\n{text}'


def _lark_of_schema(text: str) -> str:
    options = json.dumps({"whitespace_pattern": _WHITESPACE})
    if text.startswith("{"):
        text = f'{{"x-guidance": {options}{", " if text != "{}" else ""}{text[1:]}'
    return f'%llguidance {{"no_forcing": true}}\nstart: %json {text}\n'


def _reason(error: str) -> str:
    """Why, in an error of llguidance, without the place in a text that its user has not written."""
    reason = error.split("failed to compile JSON schema: ")[-1].split("\n   1 |")[0].split("\n<")[0]
    if reason == "NoExtensionBias":
        return "nothing that the model can say matches it"
    return " ".join(reason.split())[:300]
