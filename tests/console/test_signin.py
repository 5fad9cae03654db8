"""Who may see what: a key is tried at once, stays in the tab, and opens what its role may see."""

from __future__ import annotations

import subprocess
import sys

from playwright.sync_api import expect

from tests.console.conftest import Open
from tests.system.fleet import Fleet, create_key

REFUSED = "status of 401"


def test_a_wrong_key_is_refused_in_words_and_a_right_one_opens_every_page(quiet: Fleet, open_console: Open) -> None:
    console = open_console(quiet)
    console.expected = [REFUSED]
    page = console.page
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    console.sign_in("sk-llmrack-wrong")
    expect(page.get_by_text("The gate does not know this key.")).to_be_visible()
    console.sign_in("Schlüssel")
    expect(page.get_by_text("one word of plain letters")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    console.sign_in(quiet.admin)
    expect(page.locator("nav a")).to_have_text(["Fleet", "Playground", "Requests", "Usage"])
    expect(page.locator(".node")).to_have_count(2)
    assert page.evaluate("Object.values(sessionStorage)") == [quiet.admin]
    assert quiet.admin not in str(page.evaluate("[Object.values(localStorage), document.cookie, location.href]"))
    page.reload()
    expect(page.locator(".node")).to_have_count(2)
    page.get_by_role("button", name="Forget the key").click()
    expect(field).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_users_key_opens_the_playground_and_nothing_else(quiet: Fleet, open_console: Open) -> None:
    console = open_console(quiet, key=quiet.key, page="fleet")
    expect(console.page.locator("nav a")).to_have_text(["Playground"])
    expect(console.page.get_by_role("heading", name="Playground")).to_be_visible()
    console.done(console.ask("Hello"))


def test_a_key_that_is_revoked_leads_back_to_the_question(quiet: Fleet, open_console: Open) -> None:
    state = quiet.request_log.parent / "state"
    key = create_key(state, "guest", "--admin")
    console = open_console(quiet)
    console.expected = [REFUSED]
    console.sign_in(key)
    expect(console.page.locator(".node")).to_have_count(2)
    subprocess.run(
        [sys.executable, "-m", "llmgate", "keys", "revoke", "guest", "--state-dir", str(state)], check=True, timeout=60
    )
    expect(console.page.get_by_text("no longer takes this key")).to_be_visible()
    assert console.page.evaluate("sessionStorage.length") == 0
