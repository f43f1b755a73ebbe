"""Debian's Chromium, driven by playwright; the `browser` fixture is conftest.py's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium; where it or playwright is missing, the test is skipped."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium here: apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright here: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_of(browser: Any, **options: Any) -> Iterator[Any]:
    """A page whose errors and dialogs fail the test, with `requested`: every address it asked for.

    `options` are those of `Browser.new_context`. Addresses of data: are not among `requested`.
    """
    context = browser.new_context(**options)
    errors: list[str] = []

    def refuse(dialog: Any) -> None:
        errors.append(f"{dialog.type}: {dialog.message}")
        dialog.dismiss()

    try:
        page = context.new_page()
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", refuse)
        yield page
    finally:
        context.close()
    assert errors == []
