"""The page at /: what it may do, and what it does in a real Chromium against a real node."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browsers import chromium, page_of
from live_node import http
from modelops.base.errors import UsageError
from modelops.serving.http.page import build_page
from modelops.serving.settings import NodeSettings
from stage import Stage, cleared, staged
from waiting import wait_until


class Parsed(html.parser.HTMLParser):
    """Ids, labels, attributes and the texts of style and script of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.inside: dict[str, str] = {}
        self.fields: set[str] = set()
        self.labelled: set[str] = set()
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.attributes += given.items()
        self._tag = tag if tag in ("style", "script") else ""
        if tag in ("input", "textarea", "select") and "id" in given:
            self.fields.add(given["id"])
        if tag == "label" and "for" in given:
            self.labelled.add(given["for"])

    def handle_data(self, data: str) -> None:
        if self._tag:
            self.inside[self._tag] = self.inside.get(self._tag, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def test_its_policy_allows_its_own_style_and_script_and_nothing_else() -> None:
    page = build_page()
    policy = dict(
        part.split(" ", 1) for part in page.headers["Content-Security-Policy"].split("; ")
    )
    parsed = Parsed(page.body.decode())
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(parsed.inside[tag].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "style"]
    outside = [value for name, value in parsed.attributes if name in ("src", "href", "action")]
    assert all(value.startswith(("#", "data:image/svg+xml,")) for value in outside)
    code = parsed.inside["style"] + parsed.inside["script"]
    assert "//" not in re.sub(r"^ *//.*| // .*|https?://www\.w3\.org", "", code, flags=re.M)
    assert "{{" not in page.body.decode() and parsed.fields == parsed.labelled


def test_the_setting(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    with urllib.request.urlopen(stage.live.url + "/", timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/html")
        assert answer.read() == build_page().body
    monkeypatch.setenv("MODELOPS_PAGE", "0")
    with http(stage.node) as live, pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(live.url + "/", timeout=30)
    with pytest.raises(UsageError, match="MODELOPS_PAGE"):
        NodeSettings.from_environment({"MODELOPS_PAGE": "perhaps"})


@pytest.fixture(scope="module")
def stage_of_module(tiny_release: Path) -> Iterator[Stage]:
    with staged(tiny_release, NodeSettings()) as stage:
        yield stage


@pytest.fixture
def stage(stage_of_module: Stage) -> Iterator[Stage]:
    with cleared(stage_of_module) as stage:
        yield stage


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, stage: Stage) -> Iterator[Any]:
    with page_of(browser, viewport={"width": 1200, "height": 900}) as page:
        open_page(page, stage.live.url)
        yield page
        for address in page.requested:
            assert address.removeprefix("blob:").startswith(stage.live.url + "/"), address


def open_page(page: Any, url: str) -> None:
    page.goto(url + "/")
    page.locator("#ready[data-state=yes]").wait_for()
    page.locator("#facts dt", has_text="Runtime").wait_for()


def ask(page: Any, **fields: Any) -> None:
    for name, value in {"prompt": "a red heart", "seed": 7, "steps": 6, **fields}.items():
        page.fill(f"#{name}", str(value))
    page.click("#make")


def finished(page: Any, count: int = 1) -> Any:
    cards = page.locator(".card:has(.receipt:not([hidden]))")
    cards.nth(count - 1).wait_for()
    assert cards.count() == count
    return cards.first


@pytest.mark.browser
def test_a_picture_is_seen_to_come(page: Any, stage: Stage) -> None:
    assert "tiny 0.1" in page.inner_text("#facts") and "development key" in page.inner_text(
        "#facts"
    )
    assert page.get_attribute("#steps", "placeholder") == "4"
    stage.gate.close()
    stage.gate.allow(2)
    ask(page)
    image = page.locator(".card img")
    page.get_by_alt_text("Unfinished image 1 of 2").wait_for()
    assert page.is_disabled("#make") and not page.is_disabled("#stop")
    assert page.inner_text("#status") == "Unfinished image 1 of 2"
    stage.gate.allow(2)
    page.get_by_alt_text("Unfinished image 2 of 2").wait_for()
    stage.gate.open()
    card = finished(page)
    assert image.get_attribute("alt") == "AI-generated image: a red heart"
    page.locator("img.small").wait_for()
    shown = image.evaluate("i => [i.naturalWidth, getComputedStyle(i).imageRendering]")
    assert shown == [32, "pixelated"]
    assert card.locator(".how").inner_text().startswith("seed 7 · 6\u00a0steps · guidance\u00a03 ·")
    card.locator("summary").click()
    assert '"pixels_sha256"' in card.locator("pre").inner_text()
    assert "made in" in page.inner_text("#status") and not page.is_disabled("#make")


@pytest.mark.browser
def test_again_download_and_curl(page: Any, stage: Stage, tmp_path: Path) -> None:
    page.fill("#negative", "blue's")
    ask(page, prompt='it\'s a "sun"')
    card = finished(page)
    with page.expect_download() as download:
        card.locator(".save").click()
    assert download.value.suggested_filename == "picture-7.png"
    download.value.save_as(tmp_path / "saved.png")
    with page.expect_download() as download:
        card.locator("summary").click()
        card.locator(".save-receipt").click()
    assert download.value.suggested_filename == "receipt-7.json"
    page.fill("#seed", "")
    page.fill("#prompt", "something else")
    card.locator(".again").click()
    card = finished(page, 2)
    assert card.locator(".same").is_visible() and page.input_value("#seed") == "7"
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    card.locator(".curl").click()
    card.locator(".by-hand").wait_for()
    line = card.locator(".by-hand textarea").input_value()
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    subprocess.run(line, shell=True, cwd=tmp_path, check=True, timeout=120)
    saved, curled = (
        np.asarray(Image.open(tmp_path / name)) for name in ("saved.png", "picture-7.png")
    )
    assert np.array_equal(saved, curled)


@pytest.mark.browser
def test_several_pictures_have_a_card_and_a_seed_each(page: Any) -> None:
    page.fill("#n", "3")
    assert page.is_disabled("#partials")
    ask(page, n=3)
    finished(page, 3)
    seeds = [text.split(" · ")[0] for text in page.locator(".how").all_inner_texts()]
    assert sorted(seeds) == ["seed 7", "seed 8", "seed 9"]


@pytest.mark.browser
def test_errors_are_said_in_words(page: Any, stage: Stage) -> None:
    ask(page, prompt="hardcore porn")
    problem = page.locator("#problem")
    problem.wait_for()
    assert "against the content policy" in problem.inner_text()
    assert page.locator(".card").count() == 0
    stage.gate.close()
    stage.gate.allow(2)
    ask(page)
    page.get_by_alt_text("Unfinished image 1 of 2").wait_for()
    stage.filter.blocks = True
    stage.gate.open()
    problem.wait_for()
    assert "withheld by the image filter" in problem.inner_text()
    assert page.locator(".card").count() == 0  # nor is the unfinished one left there
    stage.filter.blocks = False
    page.route("**/v1/images/generations", lambda route: route.abort())
    ask(page)
    page.get_by_text("Is it still running?").wait_for()
    assert problem.get_attribute("role") == "alert"


@pytest.mark.browser
def test_stop_stops_the_node_too(page: Any, stage: Stage) -> None:
    before = stage.streams("client_left")
    stage.gate.close()
    stage.gate.allow(70)
    ask(page, steps=200)
    page.locator(".card img[src]").wait_for()
    page.click("#stop")
    page.get_by_text("Stopped.").wait_for()
    wait_until(lambda: stage.streams("client_left") == before + 1)
    assert page.locator(".card").count() == 0 and not page.is_disabled("#make")


@pytest.mark.browser
def test_a_wrong_key_and_a_right_one(
    browser: Any, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_API_KEYS", hashlib.sha256(b"right").hexdigest())
    with http(stage.node) as live, page_of(browser) as page:
        page.goto(live.url + "/")
        page.locator("#key-box[open]").wait_for()  # it was told 401 for v1/models already
        page.fill("#key", "wrong")
        ask(page)
        page.get_by_text("This node needs an API key.").wait_for()
        page.fill("#key", "right")
        ask(page)
        card = finished(page)
        page.locator("#facts dt", has_text="Runtime").wait_for()
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
        card.locator(".curl").click()
        line = card.locator(".by-hand textarea").input_value()
        assert "$OPENAI_API_KEY" in line and "right" not in line
        kept = page.evaluate("() => [Object.values(sessionStorage), localStorage.length]")
        assert kept == [["right"], 0] and page.context.cookies() == []
        page.reload()
        assert page.input_value("#key") == "right" and "right" not in page.url


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 900])
def test_nothing_is_cut_off_and_the_keyboard_will_do(
    browser: Any, stage: Stage, width: int
) -> None:
    size = {"width": width, "height": 800}
    with page_of(browser, viewport=size, color_scheme="dark") as page:
        open_page(page, stage.live.url)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the link to the prompt
        assert page.evaluate("() => document.activeElement.id") == "prompt"
        page.keyboard.type("unbreakable" * 20)
        page.keyboard.press("Control+Enter")
        card = finished(page)
        card.locator("summary").focus()
        page.keyboard.press("Enter")
        card.locator("pre").wait_for()
        wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
        assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != (
            "rgb(243, 243, 241)"
        )


@pytest.mark.browser
def test_a_node_that_is_not_ready_says_why(page: Any, stage: Stage) -> None:
    stage.node._closing = True
    try:
        page.reload()
        page.locator("#ready[data-state=no]").wait_for()
        assert page.inner_text("#ready") == "not ready: shutting down"
    finally:
        stage.node._closing = False
