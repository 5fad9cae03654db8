"""The requests page: the ledger as it grows, narrowed down, and one request's way."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from tests.console.conftest import Open
from tests.system.fleet import Fleet


def test_requests_appear_as_they_end_and_one_shows_its_way(quiet: Fleet, open_console: Open) -> None:
    quiet.chat("Hello", max_tokens=4)
    console = open_console(quiet, key=quiet.admin, page="requests")
    page = console.page
    rows = page.locator(".requests tbody")
    expect(rows.first).to_be_visible()
    before = rows.count()
    quiet.post("/v1/chat/completions", {"model": "nobody", "messages": []})
    quiet.stream("What is a slot?", max_tokens=12)
    expect(rows).to_have_count(before + 2)
    expect(rows.first).to_contain_text("200")
    expect(rows.first).to_contain_text("client")
    expect(rows.nth(1)).to_contain_text("404model_not_found")
    rows.first.get_by_role("button").click()
    way = rows.first.locator(".waterfall")
    expect(way.locator(".step")).to_have_count(4)
    expect(way).to_contain_text(re.compile("Wait for a node.*Asks [ab].*First token.*End", re.DOTALL))
    expect(rows.first.locator(".pairs")).to_contain_text("/v1/chat/completions")
    # What is open stays open while others come in.
    quiet.chat("Once more", max_tokens=4)
    expect(rows).to_have_count(before + 3)
    expect(rows.nth(1).locator(".waterfall")).to_be_visible()
    rows.nth(1).get_by_role("button").click()
    expect(page.locator(".waterfall")).to_have_count(0)


def test_filters_narrow_the_list_and_say_when_nothing_is_left(quiet: Fleet, open_console: Open) -> None:
    quiet.chat("Hello", max_tokens=4)
    quiet.post("/v1/chat/completions", {"model": "nobody", "messages": []})
    page = open_console(quiet, key=quiet.admin, page="requests").page
    rows = page.locator(".requests tbody")
    expect(rows.first).to_be_visible()
    page.keyboard.press("/")
    expect(page.get_by_label("Only this key")).to_be_focused()
    page.get_by_label("How it ended").select_option("Failed")
    expect(rows.first).to_contain_text("404")
    expect(rows.filter(has_text="200 ")).to_have_count(0)
    page.get_by_label("Only this node").fill("a")
    expect(page.get_by_text("No request is like that")).to_be_visible()
    page.get_by_role("button", name="Clear the filters").click()
    expect(rows.filter(has_text="200").first).to_be_visible()
