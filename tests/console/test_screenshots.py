"""Every page over a fleet at work, as pictures to be looked at: light, dark, and on a phone. They are kept in
out/screenshots. On a phone nothing is wider than the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.console.conftest import DESK, PHONE, Console, Open
from tests.console.scene import QUESTION, Scene, scene

FOLDER = Path(__file__).parents[2] / "out" / "screenshots"
FEW = ("gpu1-a", "gpu2-a", "gpu3", "cpu1")
LOOKS = {"light": (DESK, "light"), "dark": (DESK, "dark"), "phone": (PHONE, "light")}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with scene(tmp_path_factory.mktemp("scene"), askers=8, nodes=FEW) as made:
        made.fleet.drain("gpu2-a", owner="ansible", reason="new kernel", ttl_seconds=1500)
        yield made


def sign_in(console: Console) -> None:
    console.page.get_by_role("button", name="Forget the key").click()
    expect(console.page.get_by_label("API key")).to_be_visible()


def fleet(console: Console) -> None:
    page = console.page
    expect(page.locator(".node")).to_have_count(len(FEW))
    expect(page.get_by_text("Drained by ansible")).to_be_visible()
    page.get_by_label("Message").fill("And then?")
    page.get_by_role("button", name="Explain").click()
    expect(page.locator(".ranking")).to_have_count(5)


def playground(console: Console) -> None:
    page = console.page
    if not page.get_by_label("Model", exact=True).is_visible():
        page.get_by_role("button", name="Settings").click()
    page.get_by_label("Model", exact=True).select_option("handbook")
    page.get_by_label("Temperature", exact=True).fill("0")
    page.get_by_label("Max tokens").fill("80")
    if console.page.get_by_role("button", name="Settings").is_visible():
        page.get_by_role("button", name="Settings").click()
    console.done(console.ask(QUESTION))
    console.done(console.ask("How do I drain a node?"))


def requests(console: Console) -> None:
    rows = console.page.locator(".requests tbody")
    expect(rows.nth(12)).to_be_visible()
    rows.nth(2).get_by_role("button").click()
    expect(console.page.locator(".waterfall")).to_be_visible()


def usage(console: Console) -> None:
    expect(console.page.locator(".chart .bar").first).to_be_visible()


PAGES: dict[str, Callable[[Console], None]] = {
    "fleet": fleet, "playground": playground, "requests": requests, "usage": usage, "sign-in": sign_in,
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_is_worth_looking_at(busy: Scene, open_console: Open, look: str) -> None:
    size, colours = LOOKS[look]
    console = open_console(busy.fleet, key=busy.fleet.admin, size=size, color_scheme=colours)
    for name, prepare in PAGES.items():
        if name != "sign-in":
            console.page.locator("nav a").nth(list(PAGES).index(name)).click()
        prepare(console)
        assert console.width() <= 0, f"{name} is {console.width()} pixels too wide"
        console.page.evaluate("scrollTo(0, 0)")
        console.page.screenshot(path=FOLDER / f"{name}-{look}.png", full_page=name in ("fleet", "usage"))
