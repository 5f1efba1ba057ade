"""Made-up runs, the page about them, and one browser for all that is tried in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lolcats.report import gather, write_report

from .made import make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a report reads. Not to be changed."""
    return make_run(tmp_path_factory.mktemp("runs"), "made <script>")


@pytest.fixture(scope="session")
def page_file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about it."""
    return write_report(gather([run]), tmp_path_factory.mktemp("page") / "report.html")[0]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real browser without a window; one start for all tests.

    Where there is none, tests are skipped, but not in continuous integration, which would test nothing then.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        words = f"no browser on PATH; expected one of {', '.join(BROWSERS)}"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@dataclass
class Opened:
    """A page in the browser, and all that it should not do."""

    page: Page
    wrong: list[str] = field(default_factory=list)
    """Errors, warnings and dialogs, and requests for anything but the file itself."""


@pytest.fixture(scope="session")
def open_page(browser: Browser) -> Callable[..., Opened]:
    """Open a file with all of its charts drawn."""

    def open_file(file: Path, width: int = 1280, scheme: str = "light") -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        opened = Opened(context.new_page())
        page, wrong = opened.page, opened.wrong
        page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda asked: wrong.append(asked.url) if not _is_own(asked.url, file) else None)
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
        return opened

    return open_file


def _is_own(url: str, file: Path) -> bool:
    return url.startswith("data:") or url == file.as_uri()
