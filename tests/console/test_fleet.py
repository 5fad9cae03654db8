"""The fleet page: every node as it is now, drained and undrained by hand, and what the router would do."""

from __future__ import annotations

import re
import threading

from playwright.sync_api import expect

from tests.console.conftest import LONG, Open, dialog
from tests.system.fleet import Fleet


def test_figures_move_while_requests_run(quiet: Fleet, open_console: Open) -> None:
    console = open_console(quiet, key=quiet.admin)
    page = console.page
    running = page.locator(".tile", has_text="Requests running").locator("b")
    expect(running).to_have_text("0")
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    page.get_by_role("button", name="Drain b", exact=True).focus()
    asking = threading.Thread(target=quiet.chat, args=(LONG,), kwargs={"max_tokens": 150, "temperature": 0})
    asking.start()
    expect(running).to_have_text("1")
    expect(page.locator(".node", has_text="1 of 4")).to_have_count(1)
    asking.join()
    expect(running).to_have_text("0")
    expect(page.get_by_role("button", name="Drain b", exact=True)).to_be_focused()
    assert quiet.admin not in page.content()


def test_a_node_is_drained_with_a_name_and_a_reason_and_comes_back(quiet: Fleet, open_console: Open) -> None:
    console = open_console(quiet, key=quiet.admin)
    page = console.page
    node = page.locator(".node", has=page.get_by_role("heading", name="b", exact=True))
    page.get_by_role("button", name="Drain b", exact=True).click()
    with dialog(console, "Drain b") as box:
        box.get_by_label("Owner").fill("ada")
        box.get_by_label("Reason").fill("new kernel")
        box.get_by_label("For").select_option("1 hour")
        box.get_by_role("button", name="Drain").click()
    expect(node).to_contain_text("Drained by ada — new kernel")
    expect(node).to_contain_text(re.compile("(1 h|59 min.*) left"))
    lease = quiet.view()["b"]["lease"]
    assert (lease["owner"], lease["reason"]) == ("ada", "new kernel") and 3500 < lease["ttl_seconds"] <= 3600
    # The only node that is left: the gate refuses, says why, and lets itself be forced.
    page.get_by_role("button", name="Drain a", exact=True).click()
    console.expected = ["status of 409"]
    with dialog(console, "Drain a") as box:
        expect(box.get_by_label("Owner")).to_have_value("ada")
        box.get_by_role("button", name="Drain").click()
        expect(box.get_by_role("alert")).to_contain_text("would leave the model test with 0 ready slots")
        box.get_by_label("all the same").check()
        box.get_by_role("button", name="Drain").click()
    expect(page.locator(".tile").first).to_contain_text("2 drained")
    for name in ("a", "b"):
        page.get_by_role("button", name=f"Undrain {name}", exact=True).click()
        with dialog(console, f"Undrain {name}") as box:
            box.get_by_role("button", name="Undrain").click()
    expect(page.locator(".tile").first).to_contain_text("all are ready")
    assert all(one["lease"] is None for one in quiet.view().values())


def test_the_router_explains_itself(quiet: Fleet, open_console: Open) -> None:
    console = open_console(quiet, key=quiet.admin)
    page = console.page
    expect(page.locator(".node")).to_have_count(2)
    page.keyboard.press("/")
    page.keyboard.type("Where would this go? " * 40)
    page.get_by_role("button", name="Explain").click()
    panel = page.locator(".explain")
    expect(panel).to_contain_text("would answer: the policy prefix ranks it first")
    expect(panel.locator("tbody").first.locator("tr")).to_have_count(2)
    expect(panel.locator("tbody").nth(1).locator("th")).to_have_text(
        ["prefixin force", "least-loaded", "round-robin", "random", "rendezvous"]
    )
