"""The playground: a chat as it comes, stopped, asked again, edited; tools and schemas; what is said of each answer."""

from __future__ import annotations

import json
import re

from playwright.sync_api import expect

from tests.console.conftest import LONG, Open, dialog, playground, words
from tests.processes import wait_for
from tests.system.fleet import Fleet


def test_an_answer_comes_word_by_word_with_what_there_is_to_know(quiet: Fleet, open_console: Open) -> None:
    console = playground(open_console, quiet, **{"Max tokens": "120"})
    answer = console.ask(LONG)
    expect(answer).to_have_attribute("data-state", "answering")
    first = wait_for(lambda: answer.locator(".words").inner_text().strip(), "the first words")
    console.done(answer)
    whole = words(console)
    assert whole.startswith(first[:3]) and len(whole) > len(first)
    facts = answer.locator(".figures")
    for said in (r"node [ab]", r"first token \d", r"[\d.]+ tokens/s", r"prompt \d+, \d+ cached", r"answer 120"):
        expect(facts).to_contain_text(re.compile(said))
    expect(facts).to_contain_text("cut at max tokens")
    line = wait_for(lambda: next((one for one in quiet.lines() if one["completion_tokens"] == 120), None), "its line")
    assert answer.locator(".id").get_attribute("title") == f"Copy the request id {line['id']}"


def test_an_answer_is_stopped_and_asked_for_again(quiet: Fleet, open_console: Open) -> None:
    console = playground(open_console, quiet, **{"Max tokens": "2000"})
    answer = console.ask(LONG)
    wait_for(lambda: len(answer.locator(".words").inner_text()) > 5, "some words")
    console.page.get_by_role("button", name="Stop").click()
    console.done(answer, "stopped")
    assert 5 < len(words(console)) < 2000
    wait_for(lambda: all(one["load"]["running"] == 0 for one in quiet.view().values()), "nobody computes it any more")
    console.page.get_by_label("Max tokens").fill("12")
    answer.get_by_role("button", name="Answer again").click()
    console.done(console.turn())
    assert console.page.locator(".turn").count() == 2 and len(words(console)) == 12


def test_a_turn_is_edited_and_what_follows_is_asked_again(quiet: Fleet, open_console: Open) -> None:
    console = playground(open_console, quiet)
    console.done(console.ask("One"))
    console.done(console.ask("Two"))
    assert console.page.locator(".turn").count() == 4
    console.turn(0).get_by_role("button", name="Edit").click()
    console.page.get_by_label("Text of You").fill("Three")
    console.turn(0).get_by_role("button", name="Send").click()
    console.done(console.turn(1))
    assert console.page.locator(".turn").count() == 2 and words(console, 0) == "Three"
    console.turn(1).get_by_role("button", name="Edit").click()
    console.page.get_by_label("Text of test").fill("I said **this**.")
    console.turn(1).get_by_role("button", name="Keep").click()
    expect(console.turn(1).locator("strong")).to_have_text("this")
    console.page.get_by_role("button", name="Copy as curl").click()
    with dialog(console, "The request as curl") as box:
        expect(box).to_contain_text("Three")
        box.get_by_role("button", name="Close").click()
    console.page.get_by_role("button", name="New chat").click()
    expect(console.page.locator(".turn")).to_have_count(0)
    expect(console.page.get_by_text("Ask the fleet something")).to_be_visible()


def test_settings_go_into_the_request_and_into_its_code(quiet: Fleet, open_console: Open) -> None:
    console = playground(open_console, quiet, **{"System prompt": "Be brief.", "Seed": "7", "Top p": "0.9"})
    page = console.page
    page.get_by_text("More sampling").click()
    page.get_by_label("Min p").fill("0.05")
    page.get_by_label("Stop").fill("END")
    with page.expect_request("**/v1/chat/completions") as sent:
        console.done(console.ask("Hello"))
    body = json.loads(sent.value.post_data or "")
    assert body == {
        "model": "test", "temperature": 0, "max_tokens": 12, "top_p": 0.9, "seed": 7, "min_p": 0.05, "stop": ["END"],
        "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    }  # fmt: skip
    page.get_by_role("button", name="Copy as Python").click()
    with dialog(console, "The request as Python") as box:
        code = box.locator("pre").inner_text()
        box.get_by_role("button", name="Close").click()
    compile(code, "copied", "exec")
    assert 'extra_body={\n        "min_p": 0.05,\n    }' in code and quiet.key not in code
    page.get_by_label("Temperature", exact=True).fill("9")
    page.get_by_label("Message", exact=True).fill("Too hot")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Temperature", exact=True)).to_be_focused()
    assert page.locator(".turn").count() == 2


def test_tools_are_called_and_answered_by_hand_and_schemas_hold(quiet: Fleet, open_console: Open) -> None:
    console = playground(open_console, quiet, **{"Max tokens": "400", "Temperature": "1", "Seed": "3"})
    page = console.page
    page.get_by_text("More sampling").click()
    page.get_by_label("Thinking budget").fill("0")
    page.locator("summary", has_text="Tools").click()
    page.get_by_role("button", name="Put an example there").click()
    tools = json.loads(page.get_by_label("Tools", exact=True).input_value())
    tools[0]["function"]["parameters"] = {
        "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
    }  # fmt: skip
    page.get_by_label("Tools", exact=True).fill(json.dumps(tools))
    page.get_by_label("Tool choice").select_option("required")
    console.done(console.ask("How warm is it?"))
    expect(console.turn().locator(".call").first).to_contain_text("get_weather")
    page.get_by_label("Tool choice").select_option("none")
    for field in page.get_by_label("What get_weather returns").all():
        field.fill('{"celsius": 4}')
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Return it").click()
    said = json.loads(sent.value.post_data or "")["messages"]
    assert said[2]["role"] == "tool" and said[2]["tool_call_id"] == said[1]["tool_calls"][0]["id"]
    console.done(console.turn())
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Tools", exact=True).fill("[not JSON")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Tools", exact=True)).to_be_focused()
    page.get_by_label("Tools", exact=True).fill("")
    page.locator("summary", has_text="Form of the answer").click()
    page.get_by_label("Form of the answer").select_option("json_schema")
    page.get_by_label("JSON schema").fill('{"enum": [["yes", 1]]}')
    console.done(console.ask("Hello"))
    assert json.loads(words(console)) == ["yes", 1]
