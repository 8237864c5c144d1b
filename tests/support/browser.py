"""A page in Chromium: its console, its requests, and what axe-core says of it.

Skipped with a reason where there is no Chromium, or no playwright (the extra `browser`).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


def chromium() -> str | None:
    """The path of an installed Chromium: CHROMIUM, or the first of the usual names."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next((found for name in names if (found := shutil.which(name))), None)


def axe() -> str | None:
    """The source of axe-core, if AXE names its file: npm's package axe-core has it as axe.min.js."""
    file = os.environ.get("AXE")
    return None if not file else Path(file).read_text()


@dataclass(slots=True)
class Opened:
    """A page that is ready, and everything that it said or asked for."""

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        """The text of the first element."""
        return self.page.locator(selector).first.inner_text()

    def count(self, selector: str) -> int:
        """How many elements there are."""
        return self.page.locator(selector).count()

    def key(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            self.page.keyboard.press(key)

    def hover(self, locator: Any) -> None:
        """Point at an element that has a card, and wait for the card. A scroll would close it, so it comes first."""
        locator.scroll_into_view_if_needed()
        self.page.wait_for_timeout(200)
        locator.hover()
        self.until("!document.querySelector('#card').hidden")

    def evaluate(self, expression: str) -> Any:
        """A value of the page."""
        return self.page.evaluate(expression)

    def until(self, expression: str, seconds: float = 20.0) -> None:
        """Wait until the expression holds. Playwright's own wait evaluates text, which the page's policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            time.sleep(0.05)


class Browser:
    """One Chromium for a test session."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    @contextmanager
    def open(
        self,
        file: Path | str,
        hash_: str = "",
        *,
        width: int = 1280,
        scheme: str = "light",
        script: bool = True,
    ) -> Iterator[Opened]:
        """The file in a new window, ready to be read."""
        context = self.browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        page = context.new_page()
        opened = Opened(page)
        page.on("console", lambda message: opened.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: opened.console.append(f"error: {error}"))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(f"file://{file}{hash_}" if isinstance(file, Path) else file + hash_)
        if script:
            page.wait_for_selector('html[data-ready="1"]', state="attached")
        try:
            yield opened
        finally:
            context.close()


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser, or a skip with the reason."""
    path = chromium()
    if path is None:
        pytest.skip("no Chromium: install one, or name it in CHROMIUM")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("no playwright: pip install 'opd[browser]'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield Browser(browser)
        finally:
            browser.close()
