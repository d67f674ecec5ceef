"""The playground in a browser without a window."""

import pathlib
import re
import shutil

import pytest

from qlora_jax.serve.http.page import policy
from tests.serve.http.live import serving

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PAGE = pathlib.Path(__file__).parents[3] / "qlora_jax/serve/http/page.html"


def test_the_page_runs_its_own_script_and_nothing_else():
    html = PAGE.read_text()
    assert not re.search(r"(src|href)=[\"']?https?:|\sstyle=|\son\w+=|innerHTML|insertAdjacentHTML|eval\(", html)
    rules = dict(rule.split(" ", 1) for rule in policy(html).split("; "))
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules.pop("script-src"))
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules.pop("style-src"))
    assert rules == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page, opened; the browser complained about nothing."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_default_timeout(10_000)
    page.goto(url)
    page.locator("#model-1 option").first.wait_for(state="attached")
    yield page
    assert complaints == []
    page.close()


def test_asks_an_adapter_and_then_another(page):
    assert page.locator("#model-1 option").all_inner_texts() == ["demo-base (base)", "cook", "poet"]
    page.get_by_label("Prompt").fill("Hi")
    page.get_by_label("Model", exact=True).select_option("cook")
    page.get_by_role("button", name="Run").click()
    note = page.locator("#pane-1 .note")
    note.filter(has_text="ended by stop").wait_for()
    assert page.locator("#pane-1 .answer").inner_text() == "Hi stir – and 🍳 fry"
    page.get_by_label("Model", exact=True).select_option("poet")
    page.get_by_label("Prompt").press("Control+Enter")
    page.locator("#pane-1 .answer").filter(has_text="is a rose").wait_for()
    assert page.locator("#pane-1 .answer").inner_text() == "Hi rose\nis a rose"


def test_chats_with_two_models_side_by_side(page, engine):
    page.get_by_label("a chat message").check()
    page.get_by_label("compare two models").check()
    page.get_by_label("System message").fill("Be kind")
    page.get_by_label("Prompt").fill("<b>Hi</b>")
    page.get_by_label("Second model").select_option("poet")
    page.get_by_role("button", name="Run").click()
    for pane, text in ((1, "the base says café"), (2, "rose\nis a rose")):
        page.locator(f"#pane-{pane} .note").filter(has_text="ended by stop").wait_for()
        assert page.locator(f"#pane-{pane} .answer").inner_text().strip() == text
    assert {request.adapter for request in engine.requests} == {None, "poet"}


def test_the_stop_button_frees_the_slot(page, engine):
    engine.scripts["cook"] = list(engine.scripts["cook"]) * 10
    engine.gate.clear()
    page.get_by_label("Model", exact=True).select_option("cook")
    page.get_by_label("Prompt").fill("<i>Hi</i>")
    page.get_by_role("button", name="Run").click()
    page.locator("#pane-1 .note").filter(has_text="waiting").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#pane-1 .note").filter(has_text="stopped").wait_for()
    engine.gate.set()
    assert engine.is_idle()
    assert page.locator("#pane-1 .answer").inner_text() == "<i>Hi</i>"  # text, no markup
    assert page.get_by_role("button", name="Run").is_enabled()


def test_shows_slots_and_adapters(page, engine):
    engine.scripts["cook"] = list(engine.scripts["cook"]) * 10
    page.locator("#slots li").first.wait_for()
    assert page.locator("#slots li").count() == 4
    assert page.locator("#adapters tr").count() == 2
    assert page.locator("#adapters tr").first.inner_text().split() == ["cook", "device", "8", "0", "636f6f6b"]
    page.get_by_text("demo-base: 0 of 4 slots busy, 0 waiting").wait_for()


def test_asks_for_the_key(browser, service):
    with serving(service, api_key="sesame") as url:
        page = browser.new_page()
        page.goto(url)
        page.get_by_text("the API key is missing or wrong").wait_for()
        page.get_by_label("API key").fill("sesame")
        page.get_by_label("API key").press("Tab")
        page.get_by_text("demo-base: 0 of 4 slots busy").wait_for()
        assert page.evaluate("[localStorage.length, sessionStorage.getItem('key')]") == [0, "sesame"]
        page.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.get_by_label("compare two models").check()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    assert page.evaluate(unnamed) == 0
