"""A gate that nobody has used; and what goes wrong: a node is killed in the middle of answers, a gate goes away."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
from playwright.sync_api import expect

from tests.conftest import Start
from tests.console.conftest import LONG, Open, again, playground, words
from tests.processes import wait_for
from tests.system.fleet import Fleet

GONE = "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE"


def test_a_gate_that_was_never_used_has_pages_that_say_so(frail: Fleet, open_console: Open) -> None:
    console = open_console(frail, key=frail.admin, page="requests")
    expect(console.page.get_by_text("No requests yet")).to_be_visible()
    console.page.get_by_role("link", name="Usage").click()
    expect(console.page.get_by_text("Nothing was used yet")).to_be_visible()


def heard(fleet: Fleet, begun: threading.Event, **headers: str) -> list[str]:
    """The lines of a streamed answer to LONG; `begun` is set once some are there."""
    body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 150, "temperature": 0, "stream": True}
    headers |= {"authorization": f"Bearer {fleet.key}"}
    lines = []
    with httpx.stream(
        "POST", fleet.gate.url + "/v1/chat/completions", json=body, headers=headers, timeout=120
    ) as answer:
        for line in answer.iter_lines():
            lines += [line] if line else []
            if len(lines) > 10:
                begun.set()
    return lines


def test_answers_go_on_where_their_node_is_killed_and_the_page_says_so(
    frail: Fleet, start_module: Start, open_console: Open
) -> None:
    """Clients that did not ask for it are told nothing: they get every byte as they always did."""
    whole = frail.chat(LONG, max_tokens=150, temperature=0).json()["choices"][0]["message"]["content"]
    assert len(whole) == 150, "LONG must be answered at length"
    console = playground(open_console, frail, **{"Max tokens": "150"})
    assert frail.drain("b").status_code == 200
    begun = [threading.Event(), threading.Event()]
    with ThreadPoolExecutor() as others:
        told = others.submit(heard, frail, begun[0], **{"x-llmrack-tell": "node"})
        untold = others.submit(heard, frail, begun[1])
        answer = console.ask(LONG)
        wait_for(lambda: len(answer.locator(".words").inner_text()) > 10, "some words")
        assert all(one.wait(60) for one in begun)
        assert frail.undrain("b").status_code == 200
        frail.nodes["a"].signal(signal.SIGKILL)
        assert [line for line in told.result() if line.startswith(":")] == [": node b"]
        assert [line for line in untold.result() if line.startswith(":")] == []
        assert told.result()[-1] == untold.result()[-1] == "data: [DONE]"
    console.done(answer)
    assert words(console) == whole
    expect(answer.locator(".figures")).to_contain_text("node a → b")
    expect(answer).to_contain_text("The answer went on at b where a could not.")
    page = open_console(frail, key=frail.admin).page
    node = page.locator(".node", has=page.get_by_role("heading", name="a", exact=True))
    expect(node.locator(".pill")).to_have_text("unreachable")
    frail.nodes["a"] = again(start_module, frail.nodes["a"])
    expect(node.locator(".pill")).to_contain_text("ready")


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
