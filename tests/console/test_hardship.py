"""What goes wrong while somebody looks: a node is killed in the middle of an answer, the gate goes and comes back."""

from __future__ import annotations

import os
import signal

import httpx
from playwright.sync_api import expect

from tests.conftest import Start
from tests.console.conftest import LONG, Open, again, playground, words
from tests.processes import wait_for
from tests.system.fleet import Fleet

GONE = "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE"


def bring_back(fleet: Fleet, start: Start, name: str) -> None:
    fleet.nodes[name] = again(start, fleet.nodes[name]).ready()
    fleet.usable(2)


def test_an_answer_goes_on_where_its_node_is_killed_and_the_page_says_so(
    frail: Fleet, start_module: Start, open_console: Open
) -> None:
    console = playground(open_console, frail, **{"Max tokens": "150"})
    whole = frail.chat(LONG, max_tokens=150, temperature=0).json()["choices"][0]["message"]["content"]
    assert len(whole) == 150, "LONG must be answered at length"
    answer = console.ask(LONG)
    wait_for(lambda: len(answer.locator(".words").inner_text()) > 10, "some words")
    first = next(name for name, node in frail.view().items() if node["load"]["running"])
    frail.nodes[first].signal(signal.SIGKILL)
    (other,) = {"a", "b"} - {first}
    console.done(answer)
    assert words(console) == whole
    expect(answer.locator(".figures")).to_contain_text(f"node {first} → {other}")
    expect(answer).to_contain_text(f"The answer went on at {other} where {first} could not.")
    fleet_page = open_console(frail, key=frail.admin).page
    node = fleet_page.locator(".node", has=fleet_page.get_by_role("heading", name=first, exact=True))
    expect(node.locator(".pill")).to_have_text("unreachable")
    bring_back(frail, start_module, first)
    expect(node.locator(".pill")).to_contain_text("ready")


def test_only_who_asks_for_it_is_told_of_the_nodes(frail: Fleet, start_module: Start) -> None:
    """Other clients get every byte as they always did."""
    body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 60, "temperature": 0, "stream": True}
    for tell in (True, False):
        headers = {"authorization": f"Bearer {frail.key}"} | ({"x-llmrack-tell": "node"} if tell else {})
        url, lines = frail.gate.url + "/v1/chat/completions", []
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as answer:
            first = answer.headers["x-llmrack-node"]
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 20:
                    frail.nodes[first].signal(signal.SIGKILL)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        (other,) = {"a", "b"} - {first}
        assert [line for line in lines if line.startswith(":")] == ([f": node {other}"] if tell else [])
        bring_back(frail, start_module, first)


def test_a_gate_that_goes_away_is_missed_and_found_again(frail: Fleet, start_module: Start, open_console: Open) -> None:
    console = open_console(frail, key=frail.admin)
    console.expected = list(GONE)
    page = console.page
    expect(page.locator(".node")).to_have_count(2)
    page.get_by_role("link", name="Playground").click()
    page.get_by_label("Temperature", exact=True).fill("0")
    answer = console.ask(LONG)
    wait_for(lambda: len(answer.locator(".words").inner_text()) > 5, "some words")
    worker = httpx.get(frail.gate.url + "/health", timeout=60).json()["pid"]
    frail.gate.signal(signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    console.done(answer, "failed")
    expect(answer.get_by_role("alert")).to_contain_text("broke")
    assert len(words(console)) > 5, "what had come stays"
    page.get_by_role("link", name="Fleet").click()
    expect(page.locator("#banner")).to_contain_text("The gate cannot be reached")
    expect(page.locator(".node")).to_have_count(2)
    frail.gate = again(start_module, frail.gate).ready()
    expect(page.locator("#banner")).to_be_empty()
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    console.go("fleet")
    frail.usable(2)
