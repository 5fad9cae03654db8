"""Templates, schemas and grammars that cost anything: each ends with a clear refusal, and nobody else notices."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from llmnode.api.foreign import Foreign
from llmnode.chat.conversation import Conversation
from llmnode.chat.renderer import Renderer
from llmnode.service.confined import Broken, Confined, Limits, Overrun, StartError
from llmnode.wire.errors import InvalidRequest
from tests.conftest import Start
from tests.processes import Program, wait_for

WORK = "tests.node.test_foreign_code:work"
HELLO = [{"role": "user", "content": "Hello"}]
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
BOMB = "{% set n = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
SLOW_SCHEMA = {"type": "integer", "multipleOf": 999983}
"""20 s and 400 MB to compile."""


def work(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    if setup.get("fails"):
        raise ValueError("no such thing")

    def do(task: dict[str, Any]) -> Any:
        match task["op"]:
            case "pid":
                return os.getpid()
            case "loop":
                while True:
                    pass
            case "memory":
                return len(bytearray(1 << 40))
            case "exit":
                os._exit(3)
            case "open":
                return open(task["path"]).read()  # noqa: PTH123
            case "mutter":
                return os.write(2, b"x" * task["size"])
            case "environment":
                return dict(os.environ)
            case "long":
                return "a" * task["size"]
            case _:
                return task["text"]

    return do


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    made = Confined(WORK, {}, Limits(seconds=1.0, memory_bytes=256 << 20, reply_bytes=1 << 20))
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("task", "error", "says"),
    [
        ({"op": "loop"}, Overrun, "took longer than 1 s"),
        ({"op": "memory"}, Overrun, "took more than 256 MiB"),
        ({"op": "long", "size": 2 << 20}, Overrun, "came to more than 1048576 bytes"),
        ({"op": "exit"}, Broken, "exit status 3"),
        ({"op": "open", "path": "/proc/self/environ"}, Broken, "Too many open files"),
    ],
)
def test_work_that_takes_too_much_ends_and_the_next_is_done(
    confined: Confined, task: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        confined.do(task)
    assert confined.do({"op": "echo", "text": "é" * 100_000}) == "é" * 100_000


def test_a_child_that_mutters_is_never_held_up(confined: Confined) -> None:
    for _ in range(4):  # more than a pipe takes, together
        assert confined.do({"op": "mutter", "size": 40_000}) == 40_000


def test_a_child_has_nothing_of_its_parent(confined: Confined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMNODE_SECRET", "x")
    fresh = Confined(WORK, {}, Limits())
    fresh.start()
    assert "LLMNODE_SECRET" not in fresh.do({"op": "environment"})
    files = psutil.Process(fresh.do({"op": "pid"})).open_files()
    fresh.close()
    assert files == []


def test_a_child_goes_when_its_parent_lets_go_of_it() -> None:
    made = Confined(WORK, {}, Limits())
    made.start()
    pid = made.do({"op": "pid"})
    made.close()
    assert not psutil.pid_exists(pid)


def test_work_that_cannot_begin_says_why() -> None:
    with pytest.raises(StartError, match="no such thing"):
        Confined(WORK, {"fails": True}, Limits()).start()


@pytest.fixture(scope="module")
def foreign() -> Iterator[Foreign]:
    setup = {"source": "", "bos": "", "eos": "", "controls": ["<|im_end|>"], "grammar_bytes": 65536}
    made = Foreign(setup, Limits(seconds=1.5, memory_bytes=256 << 20))
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize("template", [LOOP, BOMB, "{{ 'a' * 10000000000 }}", "{{ 9 ** (9 ** (9 ** 2)) }}"])
def test_a_hostile_template_is_refused_by_name(foreign: Foreign, template: str) -> None:
    renderer = Renderer("", foreign.template)
    with pytest.raises(InvalidRequest) as caught:
        renderer.render(Conversation(HELLO, template=template), 0)
    assert caught.value.param == "chat_template"
    assert renderer.render(Conversation(HELLO), 0).text.endswith("Hello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", '{"type": "integer", "multipleOf": 999983}'),
        ("lark", 'start: <[1000]> %json {"type": "integer", "multipleOf": 999983}'),
    ],
)
def test_a_schema_that_takes_too_much_is_refused_by_name(foreign: Foreign, kind: str, source: str) -> None:
    with pytest.raises(InvalidRequest, match="took") as caught:
        foreign.try_grammar(kind, source, "response_format.json_schema.schema")
    assert caught.value.param == "response_format.json_schema.schema"
    foreign.try_grammar("json_schema", '{"type": "integer"}', "x")
    foreign.try_grammar("lark", 'start: <[1000]> "a"', "x")
    foreign.try_grammar("gbnf", 'root ::= "a"', "x")


def test_native_code_that_gets_no_memory_is_refused_for_it() -> None:
    setup = {"source": "", "bos": "", "eos": "", "controls": [], "grammar_bytes": 65536}
    patient = Foreign(setup, Limits(seconds=60, memory_bytes=256 << 20))
    try:
        with pytest.raises(InvalidRequest, match="compiling schema took more than 256 MiB of memory"):
            patient.try_grammar("json_schema", '{"type": "integer", "multipleOf": 999983}', "schema")
        patient.try_grammar("json_schema", '{"type": "integer"}', "schema")
    finally:
        patient.close()


FILTERS = (
    "{{ [3, 1] | sort | list | tojson }}{{ 'a b' | title }}{{ {'b': 1} | dictsort }}{{ '<' | e }}{{ 'x' | pprint }}"
    "{{ '%s' | format('x') }}{{ [1, 2] | batch(1) | list }}{{ 'a' | urlize }}{{ 'x' | wordwrap(3) }}{{ 1.5 | round }}"
    "{{ strftime_now('%d %B %Y') }}{{ '[1]' | from_json }}{{ 'ß'.upper() }}{{ 'é'.encode('utf-8') }}{{ [1] | random }}"
)


def test_filters_need_no_file_that_cannot_be_opened_any_more(foreign: Foreign) -> None:
    text = Renderer("", foreign.template).render(Conversation(HELLO, template=FILTERS), 0).text
    assert "01 January 1970" in text


@pytest.fixture(scope="module")
def node(start_module: Start) -> Program:
    arguments = ("--backend", "fake", "--slots", "4", "--fake-step-delay-s", "0.01")
    allowed = ("--request-templates", "true", "--template-timeout-s", "2")
    return start_module("llmnode", *arguments, *allowed).ready()


def test_streams_go_on_while_the_node_is_attacked(node: Program) -> None:
    """A stream runs from before the first attack to after the last, and ordinary requests are answered meanwhile."""
    ask = {"messages": HELLO, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    came: list[float] = []
    over = threading.Event()

    def read() -> None:
        with httpx.stream("POST", node.url + "/v1/chat/completions", json=ask, timeout=120) as response:
            for _ in response.iter_raw():
                came.append(time.monotonic())
                if over.is_set():
                    return

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: came, "the first token")
    began = time.monotonic()
    attacks = [
        {"chat_template": LOOP},
        {"chat_template": BOMB},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SLOW_SCHEMA}}},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            "type": "object", "properties": {"n": SLOW_SCHEMA}}}}], "tool_choice": "required"},
    ]  # fmt: skip
    params = []

    def attack(fields: dict[str, Any]) -> None:
        body = {"messages": HELLO, "max_tokens": 1, **fields}
        response = httpx.post(node.url + "/v1/chat/completions", json=body, timeout=60)
        params.append((response.status_code, response.json()["error"]["param"]))

    attackers = [threading.Thread(target=attack, args=(fields,)) for fields in attacks]
    for attacker in attackers[:3]:
        attacker.start()
    plain = httpx.post(node.url + "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}, timeout=60)
    assert plain.status_code == 200
    attackers[3].start()
    for attacker in attackers:
        attacker.join()
    ended = time.monotonic()
    over.set()
    reader.join()
    assert sorted(params) == [
        (400, "chat_template"),
        (400, "chat_template"),
        (400, "response_format.json_schema.schema"),
        (400, "tools"),
    ]
    assert len([moment for moment in came if began < moment < ended]) > 20, "the stream stood still"


def test_no_process_outlives_the_node(start: Start) -> None:
    node = start("llmnode", "--backend", "fake").ready()
    children = psutil.Process(node.pid).children()
    assert children
    node.process.kill()
    node.wait()
    wait_for(lambda: not any(child.is_running() for child in children), "the children to end")


def test_a_template_that_cannot_be_used_ends_the_node_at_load(start: Start, tmp_path: Any) -> None:
    path = tmp_path / "loop.jinja"
    path.write_text("{% for i in range(9) %}" + LOOP + "{% endfor %}")
    node = start("llmnode", "--backend", "fake", "--chat-template-file", str(path), "--template-timeout-s", "0.5")
    assert node.wait() == 3
    assert "renders chat templates" in node.output()
