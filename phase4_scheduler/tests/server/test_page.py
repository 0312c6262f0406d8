"""The chat page in a headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from phase4_scheduler.tests.server.conftest import KEY, PATIENCE, Server

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PAGE = Path(__file__).parents[2] / "server" / "page.html"


def test_the_page_is_open_strict_and_whole(null_server: Server) -> None:
    response = httpx.get(f"{null_server.url}/", trust_env=False)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert response.text == PAGE.read_text()
    assert "http://" not in response.text and "https://" not in response.text, "it loads nothing from elsewhere"
    assert "innerHTML" not in response.text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=chromium, headless=True, args=ARGUMENTS
        )
        context.set_default_timeout(PATIENCE * 1000)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, null_server: Server) -> Iterator[Any]:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)
    page.goto(null_server.url)
    yield page
    page.close()
    assert problems == []


def holds(locator: Any) -> Any:
    """What is true of a part of the page, soon."""
    from playwright.sync_api import expect

    return expect(locator)


def ask(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def test_without_the_key_the_page_says_so(page: Any) -> None:
    ask(page, "hello")
    page.wait_for_selector(".error")
    assert "API key" in page.inner_text(".error")


def test_a_chat_streams_and_tells_its_speed(page: Any) -> None:
    page.fill("#key", KEY)
    page.fill("#max_tokens", "40")
    ask(page, "hello <b>there</b>")
    holds(page.locator("#status")).to_contain_text("tokens/s", timeout=PATIENCE * 1000)
    assert page.inner_text(".user") == "hello <b>there</b>"
    assert "Hola" in page.inner_text(".assistant")
    assert page.inner_text("#status").startswith("40 tokens")
    ask(page, "again")
    holds(page.locator(".assistant")).to_have_count(2, timeout=PATIENCE * 1000)
    holds(page.locator("#send")).to_be_enabled(timeout=PATIENCE * 1000)
    page.click("#clear")
    assert page.locator("#log > div").count() == 0


def test_the_stop_button_cancels_the_request(page: Any, null: httpx.Client) -> None:
    page.fill("#key", KEY)
    page.fill("#max_tokens", "8000")
    ask(page, "go on")
    holds(page.locator(".assistant")).to_contain_text("Hola", timeout=PATIENCE * 1000)
    assert null.get("/load").json()["in_flight"] == 1
    page.click("#stop")
    holds(page.locator("#status")).to_have_text("stopped", timeout=PATIENCE * 1000)
    for _ in range(1000):
        if null.get("/load").json()["in_flight"] == 0:
            return
        page.wait_for_timeout(10)
    pytest.fail("the request still runs")
