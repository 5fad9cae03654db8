"""The recipe's tokenizer and llama.cpp's must cut every text the same way, or the model reads what it never learnt."""

import random
from pathlib import Path

import gguf
import pytest

from llmnode.chat.template import ChatTemplate
from llmnode.engine.llama import LlamaOptions, load
from llmnode.handbook import export
from llmnode.handbook.lessons import Teacher
from llmnode.handbook.tokenizer import TEMPLATE, Tokenizer, learn, printable, words

np = pytest.importorskip("numpy")

ODD = [
    "", " ", "  two  spaces ", "\n", "a\n\nb", "tab\tbed", "it's we'LL I'm they'd", "x's'y", "12345 + 67 = 8", "a1b2",
    "POST /v1/chat/completions!!", "`make demo ONCE=1`", "data: [DONE]", "::;;--__", " -x", "end. \n next",
    "a  b   c\n ",    "llmnode@NAME", "~tilde^caret|", "CamelCaseWord",
    "'", "''", "n't", "\r\nwindows\r\n", "(a)(b) [c]{d}", " 7", "7 ",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    teacher = Teacher(seed=9)
    return learn((f"{role}\n{text}" for _ in range(3000) for role, text in teacher.conversation()), 1024, least=2)


@pytest.fixture(scope="module")
def backend(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A model of zeros with that tokenizer: what llama.cpp makes of the file."""
    shape = export.Shape(vocabulary=tokenizer.size, width=32, hidden=32, layers=1, heads=1)
    weights = {name: np.zeros(size, dtype=np.float32) for name, size in shape.tensors().items()}
    path: Path = tmp_path_factory.mktemp("model") / "zeros.gguf"
    export.write(path, weights, shape, tokenizer)
    loaded = load(LlamaOptions(path=path, slots=1, threads=1, n_gpu_layers=0))
    yield loaded
    loaded.close()


def test_llama_cpp_cuts_text_the_same_way(tokenizer: Tokenizer, backend) -> None:  # type: ignore[no-untyped-def]
    teacher = Teacher(seed=10)
    texts = ODD + [text for _ in range(500) for _, text in teacher.conversation()]
    dice = random.Random(1)
    alphabet = [chr(code) for code in range(32, 127)] + list("  \n\n\t'0123")
    texts += ["".join(dice.choices(alphabet, k=dice.randint(1, 40))) for _ in range(2000)]
    for text in texts:
        assert tokenizer.encode(text) == backend.tokenize(text, special=False), repr(text)


def test_a_conversation_is_the_chat_template_rendered(tokenizer: Tokenizer, backend) -> None:  # type: ignore[no-untyped-def]
    turns = [
        ("system", "Be brief."),
        ("user", " hello "),
        ("assistant", "Hi."),
        ("tool", "node-1: ready"),
        ("user", "?"),
    ]
    ids, own = tokenizer.chat(turns)
    template = ChatTemplate(backend.info.chat_template)
    text = template.render([{"role": role, "content": content} for role, content in turns])
    assert text.endswith("<|im_start|>assistant\n")
    whole = backend.tokenize(text, special=True)
    assert whole[: len(ids)] == ids
    assert whole[len(ids) :] == tokenizer.chat([("assistant", "x")])[0][: len(whole) - len(ids)]
    said = b"".join(backend.pieces[one] for one, mine in zip(ids, own, strict=True) if mine)
    assert said == b"Hi."
    assert backend.info.chat_template == TEMPLATE


def test_the_end_of_a_turn_ends_an_answer(tokenizer: Tokenizer, backend) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.control("<|im_end|>") in backend.end_tokens
    assert backend.info.add_bos is False


def test_decoding_what_was_encoded_gives_the_text(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pieces()
    for text in ODD:
        assert b"".join(pieces[one] for one in tokenizer.encode(text)).decode() == text


def test_learning_takes_the_most_frequent_pair_first() -> None:
    tokenizer = learn(["abab abab abab cd"] * 10, 256 + 2 + 3, least=1)
    assert [tokenizer.pieces()[256 + i] for i in range(2)] == [b"ab", b"abab"]


def test_text_that_runs_out_is_refused() -> None:
    with pytest.raises(ValueError, match="good for"):
        learn(["ab"], 2048, least=2)


def test_text_that_is_not_ascii_is_refused() -> None:
    with pytest.raises(ValueError, match="ASCII"):
        words("caf\u00e9")


def test_bytes_are_written_in_gpt2s_alphabet() -> None:
    assert printable(b"a b\n") == "a\u0120b\u010a"
    assert len({printable(bytes([value])) for value in range(256)}) == 256
    assert gguf.TokenType.CONTROL == 3
