"""Fixtures of the console's tests: Debian's Chromium without a window, a real gate, and nodes without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from tests.conftest import Start, _starter
from tests.processes import PATIENCE_S, Program
from tests.programs import need
from tests.system.fleet import Fleet, build

TEMPLATE = Path(__file__).parents[1] / "data" / "agent.jinja"
STEP_S = "0.02"
"""How long a node takes for a token: slow enough to be watched, stopped and killed on the way."""
FAKE = (
    "--backend", "fake", "--slots", "4", "--n-ctx", "8192", "--chat-template-file", str(TEMPLATE),
    "--fake-step-delay-s", STEP_S,
)  # fmt: skip
DESK, PHONE = (1280, 860), (360, 740)
LONG = "Tell me all about racks."
"""What the nodes answer at length, where they draw the most probable letters (a test keeps it so)."""

Open = Callable[..., "Console"]


class Console:
    """One tab of a browser on a gate's console. Whatever the page complains of is in `complaints`."""

    def __init__(self, page: Page, fleet: Fleet) -> None:
        self.page, self.fleet = page, fleet
        self.complaints: list[str] = []
        self.expected: list[str] = []
        page.set_default_timeout(PATIENCE_S * 1000)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def unexpected(self) -> list[str]:
        return [one for one in self.complaints if not any(known in one for known in self.expected)]

    def go(self, page: str = "") -> Console:
        self.page.goto(f"{self.fleet.gate.url}/{f'#/{page}' if page else ''}")
        return self

    def sign_in(self, key: str) -> Console:
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Open").click()
        return self

    def turn(self, at: int = -1) -> Locator:
        return self.page.locator(".turn").nth(at)

    def ask(self, text: str) -> Locator:
        """Send a message -> the turn of its answer."""
        before = self.page.locator(".turn").count()
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        return self.page.locator(".turn").nth(before + 1)

    def done(self, turn: Locator, state: str = "done") -> Locator:
        expect(turn).to_have_attribute("data-state", state)
        return turn

    def width(self) -> int:
        """Pixels that the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = need("chromium")
    expect.set_options(timeout=PATIENCE_S * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(path), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gate and two nodes that no test breaks."""
    programs = _starter(tmp_path_factory.mktemp("programs"))
    yield build(tmp_path_factory.mktemp("fleet"), next(programs), list(FAKE), ("a", "b"))
    next(programs, None)


@pytest.fixture(scope="module")
def frail(start_module: Start, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """One that a test may break, and puts together again (`again`)."""
    return build(tmp_path_factory.mktemp("fleet"), start_module, list(FAKE), ("a", "b"))


def again(start: Start, old: Program) -> Program:
    """A program that has ended, started anew in its place."""
    old.wait()
    at = old.command.index("--port")
    return start(old.command[2], *old.command[at + 2 :], port=old.port)


@pytest.fixture
def open_console(chromium: Browser) -> Iterator[Open]:
    """open_console(fleet, key=..., page="fleet") -> Console. Each has a browser profile of its own; at the end none may
    have complained, of its own scripts or of what its security policy forbids."""
    opened: list[Console] = []

    def open_it(
        fleet: Fleet, *, key: str = "", page: str = "", size: tuple[int, int] = DESK, **options: Any
    ) -> Console:
        context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, locale="en-GB", **options)
        if key:
            context.add_init_script(f"sessionStorage.setItem('llmrack.key', {key!r})")
        console = Console(context.new_page(), fleet)
        opened.append(console)
        return console.go(page)

    yield open_it
    for console in opened:
        console.page.context.close()
    for console in opened:
        assert console.unexpected() == []


@contextmanager
def dialog(console: Console, title: str) -> Iterator[Locator]:
    """The open dialog of that title; it must be gone at the end."""
    box = console.page.get_by_role("dialog", name=title)
    expect(box).to_be_visible()
    yield box
    expect(console.page.locator("dialog", has_text=title)).to_have_count(0)


def playground(open_console: Open, fleet: Fleet, **fields: str) -> Console:
    """Opened with the most probable answers, and other settings by their labels."""
    console = open_console(fleet, key=fleet.key, page="playground")
    for label, value in {"Temperature": "0", "Max tokens": "12", **fields}.items():
        console.page.get_by_label(label, exact=True).fill(value)
    return console


def words(console: Console, at: int = -1) -> str:
    return console.turn(at).locator(".words").inner_text()
