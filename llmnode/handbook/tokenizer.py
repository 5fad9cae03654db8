"""Byte-level BPE: learning merges from text, text to ids, and the chat form around it. Knows no network.

It must cut text exactly as llama.cpp does with `tokenizer.ggml.model = gpt2` and `tokenizer.ggml.pre = qwen2`: first
into words by qwen2's rule (one digit is a word), then each word's bytes are merged, the earliest learnt pair first. The
rule here is spelled for ASCII, which is all that the corpus has; other text is refused rather than cut differently.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmnode.handbook.chatter import Turn

PRE = "qwen2"
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROLS = (END_OF_TEXT, START, END)
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') | trim + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORD = re.compile(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
    r"|[^\r\nA-Za-z0-9]?[A-Za-z]+"
    r"|[0-9]"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

Pair = tuple[int, int]


def words(text: str) -> list[str]:
    """The pieces that merges never cross. Raises ValueError on text that is not ASCII."""
    if not text.isascii():
        raise ValueError(f"the corpus is ASCII, this is not: {text!r}")
    return _WORD.findall(text)


@dataclass
class Tokenizer:
    """merges: pairs of ids in the order in which they were learnt; merge i makes id 256 + i. The controls come last."""

    merges: Sequence[Pair]
    _ranks: dict[Pair, int] = field(init=False)
    _known: dict[str, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}

    @property
    def size(self) -> int:
        return 256 + len(self.merges) + len(CONTROLS)

    def control(self, text: str) -> int:
        """The id of a control token."""
        return 256 + len(self.merges) + CONTROLS.index(text)

    def pieces(self) -> list[bytes]:
        """What each id that is no control stands for."""
        table = [bytes([value]) for value in range(256)]
        for left, right in self.merges:
            table.append(table[left] + table[right])
        return table

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: control tokens written out in it are text like any other."""
        ids: list[int] = []
        for word in words(text):
            known = self._known.get(word)
            if known is None:
                known = self._known[word] = self._merge(list(word.encode()))
            ids += known
        return ids

    def chat(self, turns: Iterable[Turn]) -> tuple[list[int], list[bool]]:
        """Ids of a conversation in the form of TEMPLATE, and for each whether it is the assistant's own."""
        ids: list[int] = []
        own: list[bool] = []
        for role, text in turns:
            head = [self.control(START), *self.encode(f"{role}\n")]
            said = [*self.encode(text.strip()), self.control(END)]
            tail = self.encode("\n")
            ids += head + said + tail
            own += [False] * len(head) + [role == "assistant"] * len(said) + [False] * len(tail)
        return ids, own

    def _merge(self, ids: list[int]) -> list[int]:
        while len(ids) > 1:
            best = min(range(len(ids) - 1), key=lambda i: self._ranks.get((ids[i], ids[i + 1]), len(self._ranks)))
            rank = self._ranks.get((ids[best], ids[best + 1]))
            if rank is None:
                break
            ids[best : best + 2] = [256 + rank]
        return ids


def learn(texts: Iterable[str], size: int, least: int = 20) -> Tokenizer:
    """Learn merges until there are `size` tokens: always the most frequent pair, the smaller ids when two are equal.

    Pairs seen fewer than `least` times are not worth a token; raises ValueError when they run out first.
    """
    counts = Counter(word for text in texts for word in words(text))
    spelled = [(list(word.encode()), count) for word, count in sorted(counts.items())]
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, (ids, count) in enumerate(spelled):
        for pair in itertools.pairwise(ids):
            pairs[pair] += count
            where[pair].add(number)
    merges: list[Pair] = []
    while 256 + len(merges) + len(CONTROLS) < size:
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        if pairs[best] < least:
            raise ValueError(f"the text is good for {256 + len(merges) + len(CONTROLS)} tokens, not {size}")
        new = 256 + len(merges)
        merges.append(best)
        for number in sorted(where.pop(best)):
            ids, count = spelled[number]
            for pair in itertools.pairwise(ids):
                pairs[pair] -= count
                where[pair].discard(number)
            ids[:] = _join(ids, best, new)
            for pair in itertools.pairwise(ids):
                pairs[pair] += count
                where[pair].add(number)
        del pairs[best]
    return Tokenizer(merges)


def _join(ids: list[int], pair: Pair, new: int) -> list[int]:
    joined: list[int] = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            joined.append(new)
            i += 2
        else:
            joined.append(ids[i])
            i += 1
    return joined


def printable(piece: bytes) -> str:
    """The bytes in GPT-2's alphabet, in which GGUF files write tokens: each byte is one printable character."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [value for value in range(256) if value not in plain]
    return "".join(chr(value) if value in plain else chr(256 + others.index(value)) for value in piece)
