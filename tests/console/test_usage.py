"""The usage page: what was used, and keys that are made, changed and revoked by hand."""

from __future__ import annotations

import httpx
from playwright.sync_api import expect

from tests.console.conftest import Open, dialog
from tests.processes import wait_for
from tests.system.fleet import Fleet


def status(fleet: Fleet, key: str) -> int:
    return httpx.get(fleet.gate.url + "/v1/models", headers={"x-api-key": key}, timeout=60).status_code


def test_what_was_used_is_drawn_and_added_up(quiet: Fleet, open_console: Open) -> None:
    quiet.chat("Hello", max_tokens=4)
    console = open_console(quiet, key=quiet.admin, page="usage")
    page = console.page
    chart = page.get_by_role("img", name="Tokens a day, by key")
    page.get_by_role("button", name="7 days").click()
    expect(chart.locator("g")).to_have_count(7)
    expect(page.locator(".usage + .scroll tbody th").filter(has_text="client")).to_have_count(1)
    page.get_by_role("button", name="By model").click()
    page.get_by_role("button", name="Requests").click()
    page.get_by_role("button", name="30 days").click()
    expect(page.get_by_role("img", name="Requests a day, by model").locator("g")).to_have_count(30)
    expect(page.locator(".usage + .scroll tbody th").first).to_have_text("test")


def test_a_key_is_made_shown_once_limited_and_revoked(quiet: Fleet, open_console: Open) -> None:
    console = open_console(quiet, key=quiet.admin, page="usage")
    page = console.page
    expect(page.locator(".keytable")).to_be_visible()
    page.keyboard.press("n")
    with dialog(console, "New key") as box:
        box.get_by_label("Name").fill("lab")
        box.get_by_label("Owner").fill("The lab")
        box.get_by_label("Models").fill("test, other")
        box.get_by_label("Requests a minute").fill("60")
        box.get_by_role("button", name="Create").click()
    with dialog(console, "The key of lab") as box:
        secret = box.locator("code").inner_text()
        box.get_by_role("button", name="I have it").click()
    assert secret.startswith("sk-llmrack-") and secret not in page.content()
    wait_for(lambda: status(quiet, secret) == 200, "the new key to be known")
    row = page.locator(".keytable tr", has=page.get_by_role("rowheader", name="lab"))
    expect(row).to_contain_text("The lab")
    expect(row).to_contain_text("other, test")
    expect(row.locator(".limit")).to_have_count(1)
    expect(row.locator(".limit")).to_contain_text("/ 60")
    # The same name again: the gate refuses, and the dialog stays with what was typed.
    console.expected = ["status of 409", "status of 401"]
    page.get_by_role("button", name="New key").click()
    with dialog(console, "New key") as box:
        box.get_by_label("Name").fill("lab")
        box.get_by_role("button", name="Create").click()
        expect(box.get_by_role("alert")).to_contain_text("of that name")
        box.get_by_role("button", name="Cancel").click()
    row.get_by_role("button", name="Edit lab").click()
    with dialog(console, "Edit lab") as box:
        expect(box.get_by_label("Requests a minute")).to_have_value("60")
        box.get_by_label("Requests a minute").fill("")
        box.get_by_label("Tokens a day").fill("5000")
        box.get_by_role("button", name="Save").click()
    expect(row.locator(".limit")).to_contain_text("/ 5,000")
    row.get_by_role("button", name="Revoke lab").click()
    with dialog(console, "Revoke lab") as box:
        box.get_by_role("button", name="Revoke").click()
    expect(row).to_have_count(0)
    wait_for(lambda: status(quiet, secret) == 401, "the key to be refused")
    page.get_by_label("Revoked ones too").check()
    expect(row).to_contain_text("revoked")
