"""The pages in a real browser: by keyboard alone, on a phone's width, in both themes, and with nothing from outside."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pipeline.serving import ShownRuns
from stages.inference.generate import Student
from stages.inference.server.app import create_app
from stages.inference.server.models import ServedModel
from stages.inference.server.settings import ServerSettings

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
LEAST_CONTRAST = 4.5
"""Of text against what is behind it (WCAG 2, AA)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        if program is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(served: ServedModel, serve: Any, standing_run: Path) -> Iterator[str]:
    with serve(create_app([served], ServerSettings(max_new_tokens=64), ShownRuns(standing_run.parent))) as address:
        yield address


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A page that fails the test where it asks anyone else for anything, or complains."""
    context = browser.new_context(viewport=DESK)
    page = watched(context.new_page(), address)
    yield page
    context.close()
    assert page.complaints == []  # type: ignore[attr-defined]


def watched(page: Page, address: str) -> Page:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(address) or complaints.append(request.url))
    page.complaints = complaints  # type: ignore[attr-defined]
    page.set_default_timeout(30_000)
    return page


def ask(page: Page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant").last).not_to_have_attribute("aria-busy", "true")


def tell_of_the_run(page: Page, address: str, **facts: Any) -> None:
    """From now on the page is told these facts in place of the run's own."""
    told = {**httpx.get(f"{address}/api/runs/tiny").json(), **facts}
    page.route("**/api/runs/*", lambda route: route.fulfill(json=told))


def two_looks_pass(page: Page) -> None:
    """At the run; the second is asked for once the page shows what the first has brought."""
    for _ in range(2):
        page.wait_for_event("requestfinished", lambda request: "/api/runs/" in request.url)


def greedy(page: Page) -> None:
    page.locator("#temperature").fill("0")


def test_an_answer_is_streamed_and_each_token_shows_its_alternatives_by_keyboard_alone(
    page: Page, address: str, student: Student
) -> None:
    page.goto(address)
    expect(page.locator("#prompt")).to_be_focused()
    greedy(page)
    page.locator("#prompt").focus()
    page.keyboard.type("讲")
    page.keyboard.press("Enter")
    answer = page.locator(".turn.assistant .text")
    expect(answer).to_have_text("从前有座山。")
    expect(page.locator(".figures")).to_contain_text("tokens/s")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    words = page.locator(".word")
    expect(words.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(words.nth(1)).to_be_focused()
    (expected,) = student.generate("讲", logprobs=8)
    assert expected.logprobs is not None
    character = "从前"[1]
    count = len(character.encode())
    expect(page.locator("#alternatives")).to_contain_text(f"is {count} tokens")
    rows = page.locator("#alternatives li")
    assert rows.count() == 8 * count
    best = expected.logprobs[len("从".encode())].top
    shares = [f"{100 * math.exp(token.logprob):.1f}%" for token in best]
    shown = [row.split("\n")[-1] for row in rows.all_inner_texts()[:8]]
    assert [text for text in shown if text != "<0.1%"] == [
        s for s, t in zip(shares, best, strict=True) if t.logprob > math.log(1e-3)
    ]


def test_a_conversation_goes_on_and_begins_anew(page: Page, address: str) -> None:
    page.goto(address)
    greedy(page)
    ask(page, "count")
    expect(page.locator(".turn.assistant .text")).to_have_text("one two three four")
    ask(page, "count")
    assert page.locator(".turn").count() == 4
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.locator("#system").fill("Be short.")
    page.locator("#seed").fill("7")
    page.locator("#stop-at").fill("four")
    ask(page, "again")
    assert [turn["role"] for turn in sent[0]["messages"]] == ["system", *(["user", "assistant"] * 2), "user"]
    assert (sent[0]["seed"], sent[0]["stop"], sent[0]["temperature"]) == (7, "four", 0)
    page.locator("#reset").click()
    assert page.locator(".turn").count() == 0
    expect(page.locator("#welcome")).to_be_visible()


def test_the_newest_answer_is_in_view_until_the_reader_looks_elsewhere(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 320, "height": 480})
    page.goto(address)
    for _ in range(3):
        ask(page, "count")
    left = "(log) => log.scrollHeight - log.scrollTop - log.clientHeight"
    assert page.locator("#log").evaluate("(log) => log.scrollHeight > log.clientHeight")
    assert page.locator("#log").evaluate(left) < 2
    tops = "(all) => new Set(all.map((button) => Math.round(button.getBoundingClientRect().top))).size"
    assert page.locator(".bar > button").evaluate_all(tops) == 1, "both stand in the first line of the bar"


def test_what_is_written_is_text_and_never_markup(page: Page, address: str) -> None:
    page.goto(address)
    trap = "<img src=x onerror=document.title='sprung'><b>bold</b>"
    ask(page, trap)
    expect(page.locator(".turn.user .text")).to_have_text(trap)
    assert page.locator(".turn img, .turn b").count() == 0
    assert page.title() == "MiniCodformer · chat"


@pytest.fixture
def talking(browser: Browser, served: ServedModel, serve: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """The chat, while an answer that never ends is being written."""
    monkeypatch.setattr(served.student.model.config, "eos_token_id", -1)
    with serve(create_app([served], ServerSettings(max_new_tokens=10**7))) as address:
        page = watched(browser.new_page(), address)
        page.goto(address)
        page.locator("#max-tokens").fill("10000000")
        page.locator("#prompt").fill("count")
        page.keyboard.press("Enter")
        expect(page.locator("#stop")).to_be_visible()
        page.locator(".word").nth(3).wait_for()
        yield page
        page.close()


def test_escape_stops_an_answer_and_keeps_what_was_said(talking: Page) -> None:
    talking.keyboard.press("Escape")
    expect(talking.locator("#send")).to_be_visible()
    expect(talking.locator(".figures")).to_contain_text("stopped")
    talking.wait_for_function("async () => (await (await fetch('/api/status')).text()).includes('\"running\":0')")


def test_what_was_being_said_stays_out_of_a_conversation_begun_meanwhile(talking: Page) -> None:
    sent: list[Any] = []
    talking.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    talking.locator("#reset").click()
    expect(talking.locator("#send")).to_be_visible()
    talking.locator("#prompt").fill("anew")
    talking.keyboard.press("Enter")
    talking.locator(".word").first.wait_for()
    talking.keyboard.press("Escape")
    expect(talking.locator("#send")).to_be_visible()
    assert [request["messages"] for request in sent] == [[{"role": "user", "content": "anew"}]]


def test_a_server_that_asks_for_a_key_is_told_it_on_the_page(browser: Browser, served: ServedModel, serve: Any) -> None:
    with serve(create_app([served], ServerSettings(api_key="a key"))) as address:
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("a key")
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden()
        greedy(page)
        ask(page, "count")
        expect(page.locator(".turn.assistant .text")).to_have_text("one two three four")
        page.close()


def test_the_runs_are_those_of_the_monitor(page: Page, address: str, standing_run: Path) -> None:
    page.goto(f"{address}/runs")
    expect(page.locator(".list a")).to_have_count(1)
    expect(page.locator("h1")).to_have_text("tiny finished")
    expect(page.locator(".sample")).to_contain_text("1 + 1?")
    expect(page.locator(".view")).to_contain_text("This machine")
    stage = {"stage": "distill", "done": 96, "total": 1500, "unit": "steps", "rate": None, "left": None, "bytes": 0}
    tell_of_the_run(page, address, stages=[stage])
    expect(page.locator(".meter").first).to_contain_text("96 of 1,500 steps")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#view")).to_be_focused()
    page.goto(f"{address}/runs#../..")
    expect(page.locator("h1")).to_have_text("tiny finished")


def test_what_has_not_changed_since_the_last_look_at_a_run_stays_as_the_reader_left_it(
    page: Page, address: str
) -> None:
    sample = {"step": 3, "prompt": "1 + 1?", "answer": "two\n" * 60, "label": "2"}
    endless, full = "the loss is not finite", "the disk is full"
    tell_of_the_run(page, address, samples=[sample], warnings=[endless])
    page.goto(f"{address}/runs")
    answer, alerts = page.locator(".sample dd").nth(1), page.locator("[role=alert] li")
    answer.evaluate("(dd) => { dd.seen = true; dd.scrollTop = 70; getSelection().selectAllChildren(dd); }")
    alerts.evaluate("(li) => { li.seen = li.parentElement.seen = true; }")
    left = "(dd) => dd.seen && dd.scrollTop === 70 && getSelection().containsNode(dd.firstChild)"
    seen = "(all) => all.map((li) => [li.textContent, Boolean(li.seen), Boolean(li.parentElement.seen)])"
    two_looks_pass(page)
    assert answer.evaluate(left)
    assert alerts.evaluate_all(seen) == [[endless, True, True]]

    tell_of_the_run(page, address, samples=[sample], warnings=[endless, full], coverage=0.125)
    expect(page.locator(".facts")).to_contain_text("12.50%")
    assert answer.evaluate(left)
    assert alerts.evaluate_all(seen) == [[endless, True, True], [full, False, True]]

    tell_of_the_run(page, address, samples=[{**sample, "answer": "three"}], warnings=[])
    expect(answer).to_have_text("three")
    expect(alerts).to_have_count(0)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_fits_and_can_be_read(browser: Browser, address: str, theme: Any, size: Any) -> None:
    context = browser.new_context(viewport=size, color_scheme=theme)
    page = watched(context.new_page(), address)
    told = {"time": 0.0, "stage": "distill", "text": "steps are slow", "level": "warning"}
    tell_of_the_run(page, address, notes=[told, {**told, "level": "info"}], warnings=["the disk is full"])
    page.goto(address)
    greedy(page) if size is DESK else None
    ask(page, "how much is six times seven, please?")
    page.locator(".word").nth(2).click()
    expect(page.locator(".candidates").first).to_be_visible()
    for path in ("", "runs"):
        if path:
            page.goto(f"{address}/{path}")
            expect(page.locator(".sample").first).to_be_visible()
            expect(page.locator(".notes li span")).to_have_text(["warning: steps are slow", "steps are slow"])
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, "nothing reaches beyond the screen"
        faint = [text for text, contrast in page.evaluate(CONTRASTS) if contrast < LEAST_CONTRAST]
        assert faint == [], "text that is hard to read"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) > 3 * 128) == (theme == "light")
    assert page.complaints == []  # type: ignore[attr-defined]
    context.close()


CONTRASTS = """() => {
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colours) => {  // painted one over the other, as the browser does
    pixel.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1); }
    return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), holder = walker.currentNode.parentElement;
    if (!text || !holder.checkVisibility() || holder.closest(".hidden, .skip, option")) continue;
    const behind = [];
    for (let at = holder; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const [ground, ink] = [over(behind), over([...behind, getComputedStyle(holder).color])].map(luminance);
    found.push([text.slice(0, 40), (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05)]);
  }
  return found;
}"""


def test_the_contrast_check_itself_sees_faint_text(page: Page, address: str) -> None:
    page.goto(address)
    page.evaluate("document.querySelector('.keys').style.color = 'color-mix(in srgb, currentColor 45%, transparent)'")
    assert min(contrast for _, contrast in page.evaluate(CONTRASTS)) < LEAST_CONTRAST
