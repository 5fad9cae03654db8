"""All of it by keyboard, in either colours, and what the small modules promise."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import Console, Open, dialog
from tests.system.fleet import Fleet


def tab_to(console: Console, name: str) -> None:
    """Press Tab until an element of that name has the focus."""
    page = console.page
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("(document.activeElement.ariaLabel ?? document.activeElement.innerText)?.trim()") == name:
            return
    raise AssertionError(f"{name} is not reached by Tab")


def test_nothing_needs_a_mouse(quiet: Fleet, open_console: Open) -> None:
    console = open_console(quiet)
    page = console.page
    keys = page.keyboard
    expect(page.get_by_label("API key")).to_be_focused()
    keys.type(quiet.admin)
    keys.press("Enter")
    expect(page.locator(".node")).to_have_count(2)
    tab_to(console, "Drain b")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Enter")
    with dialog(console, "Drain b"):
        keys.press("Escape")
    expect(page.get_by_role("button", name="Drain b", exact=True)).to_be_focused()
    keys.press("?")
    with dialog(console, "Shortcuts") as box:
        for line in ("Playground", "Requests", "Usage and keys"):
            expect(box).to_contain_text(line)
        keys.press("Escape")
    keys.press("2")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    keys.type("Hello 1")
    keys.press("Enter")
    console.done(console.turn(1))
    assert console.turn(0).locator(".words").inner_text() == "Hello 1", "digits typed into a field are text"
    tab_to(console, "Playground")
    keys.press("3")
    expect(page.locator(".requests tbody").first).to_be_visible()
    tab_to(console, page.locator(".requests button").first.get_attribute("aria-label") or "")
    keys.press("Space")
    expect(page.locator(".waterfall")).to_be_visible()
    keys.press("4")
    expect(page.get_by_role("heading", name="Usage and keys")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    tab_to(console, "Skip to the page")
    keys.press("Enter")
    expect(page.locator("main")).to_be_focused()


def test_colours_follow_the_system_or_the_switch(quiet: Fleet, open_console: Open) -> None:
    page = open_console(quiet, key=quiet.key, color_scheme="dark").page
    expect(page.get_by_role("heading", name="Playground")).to_be_visible()

    def ground() -> Any:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = ground()
    switch = page.get_by_role("button", name="Colours")
    switch.click()
    light = ground()
    assert light != dark
    page.reload()
    expect(page.get_by_role("heading", name="Playground")).to_be_visible()
    assert ground() == light, "what was chosen is kept"
    switch.click()
    assert ground() == dark
    switch.click()
    page.emulate_media(color_scheme="light")
    assert ground() == light


def test_it_holds_still_for_who_wants_that(quiet: Fleet, open_console: Open) -> None:
    page = open_console(quiet, key=quiet.admin, reduced_motion="reduce").page
    expect(page.locator(".node")).to_have_count(2)
    assert page.evaluate("document.getAnimations().length") == 0


@pytest.fixture
def blank(quiet: Fleet, open_console: Open) -> Page:
    return open_console(quiet).page


def written(page: Page, text: str) -> Any:
    """What markdown.js makes of a text, as the browser would write it down."""
    return page.evaluate(
        """async (text) => {
          const { markdown } = await import("/console/markdown.js");
          return markdown(text).map((one) => one.outerHTML).join("");
        }""",
        text,
    )


MARKDOWN = [
    ("Plain", "<p>Plain</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# Big\n### Small", "<h3>Big</h3><h5>Small</h5>"),
    ("**bold** and *soft* and `a*b*`", "<p><strong>bold</strong> and <em>soft</em> and <code>a*b*</code></p>"),
    ("a * b * c, snake_case_name", "<p>a * b * c, snake_case_name</p>"),
    ("- one\n- two\n  - three\n- four", "<ul><li>one</li><li>two<ul><li>three</li></ul></li><li>four</li></ul>"),
    ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
    ("> said\n> twice", "<blockquote><p>said<br>twice</p></blockquote>"),
    ("```py\nx = *1*\n```", '<pre tabindex="0" data-language="py"><code>x = *1*</code></pre>'),
    ("```\nnot closed yet", '<pre tabindex="0"><code>not closed yet</code></pre>'),
    ("---", "<hr>"),
    ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    ("[bad](javascript:alert(1))", "<p>[bad](javascript:alert(1))</p>"),
]


@pytest.mark.parametrize(("text", "wanted"), MARKDOWN)
def test_answers_are_written_as_they_are_meant_and_never_as_html(blank: Page, text: str, wanted: str) -> None:
    assert written(blank, text) == wanted


def test_links_and_tables_are_made_and_no_text_hangs_it(blank: Page) -> None:
    assert 'rel="noopener noreferrer nofollow"' in written(blank, "[here](https://example.org/a)")
    assert "<th" in written(blank, "| a | b |\n|---|:-:|\n| 1 | 2 |")
    for hostile in ("*" * 20000, "> " * 5000, "- " * 5000, "`" * 20000, "[" * 20000, "_a" * 10000, "|" * 20000):
        assert written(blank, hostile) is not None


def test_events_are_read_however_they_are_cut(blank: Page) -> None:
    text = ': hello\n\nevent: fleet\ndata: {"a":\ndata: 1}\n\n: node b\r\n\r\ndata: [DONE]\r\n\r\ndata: lost'
    wanted = [
        {"comment": "hello"}, {"event": "fleet", "data": '{"a":\n1}'}, {"comment": "node b"},
        {"event": "message", "data": "[DONE]"},
    ]  # fmt: skip
    for size in (1, 2, 7, 1000):
        found = blank.evaluate(
            """async ([text, size]) => {
              const { Parser } = await import("/console/sse.js");
              const parser = new Parser();
              const found = [];
              for (let at = 0; at < text.length; at += size) found.push(...parser.feed(text.slice(at, at + size)));
              return found;
            }""",
            [text, size],
        )
        assert found == wanted


NOTHING = "\u2013"


def test_figures_read_well(blank: Page) -> None:
    cases = {
        "duration": [(0.0042, "4 ms"), (0.9996, "1.00 s"), (12.34, "12.3 s"), (125, "2 min 5 s"), (None, NOTHING)],
        "span": [(59.6, "1 min"), (3600, "1 h"), (90000, "1 d 1 h")],
        "brief": [(9999, "9,999"), (12345, "12.3K"), (3400000, "3.4M")],
        "percent": [(0.424, "42%"), (None, NOTHING)],
    }
    for name, pairs in cases.items():
        for value, wanted in pairs:
            script = f"import('/console/format.js').then((made) => made.{name}({json.dumps(value)}))"
            assert blank.evaluate(script) == wanted, (name, value)


def test_code_is_code_whatever_was_typed(blank: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRACK_KEY", "x")
    body = {"model": "m", "messages": [{"role": "user", "content": 'it\'s "x" \\ \n é'}], "top_k": 3, "stop": []}
    made = blank.evaluate(
        """(body) => import("/console/code.js").then(({ curl, python }) =>
          [curl("http://gate", body), python("http://gate", body)])""",
        body,
    )
    words = shlex.split(made[0].replace("\\\n", " "))
    assert json.loads(words[words.index("-d") + 1]) == {**body, "stream": True}
    sent: dict[str, Any] = {}
    source = made[1].replace("from openai import OpenAI", "").replace("for chunk in stream", "for chunk in ()")
    exec(compile(source, "copied", "exec"), {"OpenAI": lambda **_: Recorder(sent), "__builtins__": __builtins__})
    assert sent == {"model": "m", "messages": body["messages"], "stop": [], "stream": True, "extra_body": {"top_k": 3}}


class Recorder:
    """OpenAI's client, as far as a copied program uses it."""

    def __init__(self, sent: dict[str, Any]) -> None:
        self.chat = self.completions = self
        self.create = sent.update
