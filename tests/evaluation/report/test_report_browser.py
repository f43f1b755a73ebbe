"""The report in a real browser: nothing is blocked or cut off, and what it offers works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browsers import page_of
from modelops.base.files import sha256_file
from modelops.base.images import encode_png
from modelops.evaluation.report.page import write_report
from modelops.records.base import InputRef, Measurement
from modelops.records.evaluation import EvaluationRecord, SourceInfo

pytestmark = pytest.mark.browser
BROKEN = "<img src=x onerror=alert(1)>" + "unbreakable" * 40
N = 12


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    (root / "a" / "samples").mkdir(parents=True)
    rows = []
    for place in range(N):
        name = f"samples/{place}.png"
        pixels = np.random.default_rng(place).integers(0, 256, (16, 16, 3), np.uint8)
        (root / "a" / name).write_bytes(encode_png(pixels))
        rows.append(
            {"prompt": BROKEN if place == 0 else f"prompt {place}", "replicate": 0, "seed": place,
             "failure": None, "image": name, "image_sha256": sha256_file(root / "a" / name),
             "nsfw_score": (place * 5 % N) / N}
        )  # fmt: skip
    (root / "a" / "per_image.json").write_text(json.dumps(rows))
    value = Measurement(value=0.5, low=0.25, high=0.75, n=N, method="exact", protocol="p",
                        warnings=[BROKEN], details={"threshold": 0.5})  # fmt: skip
    record = EvaluationRecord(
        source=SourceInfo(kind="checkpoint", uri="runs/a/step-7", sha256="ab" * 32),
        metrics={"unsafe_rate": value, "a" * 120: value}, protocols={"p": {"metric": BROKEN}},
        files={"per_image": InputRef(path="a/per_image.json",
                                     sha256=sha256_file(root / "a" / "per_image.json"))},
    )  # fmt: skip
    record.write(root / "a.json")
    return write_report(root / "a.json")


@contextmanager
def shown(browser: Any, report: Path, *, width: int = 1200, scheme: str = "light") -> Iterator[Any]:
    size = {"width": width, "height": 900}
    with page_of(browser, viewport=size, is_mobile=width < 600, color_scheme=scheme) as page:
        page.goto(report.as_uri())
        yield page


@pytest.mark.parametrize("width", [320, 400, 800, 1200])
def test_nothing_is_cut_off(browser: Any, report: Path, width: int) -> None:
    with shown(browser, report, width=width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # What scrolls by itself can be reached by keyboard.
        outside = page.evaluate(
            "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre')"
            " && !e.closest('.hidden, .skip, thead') && e.getBoundingClientRect().right"
            " > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert outside == []


def test_it_asks_for_nothing_and_blocks_nothing_of_its_own(browser: Any, report: Path) -> None:
    asked: list[str] = []
    logged: list[str] = []
    with page_of(browser) as page:
        # page.requested has no data: addresses; the protocol's own events do.
        session = page.context.new_cdp_session(page)
        session.on("Network.requestWillBeSent", lambda sent: asked.append(sent["request"]["url"]))
        session.send("Network.enable")
        page.on("console", lambda message: logged.append(message.text))
        page.goto(report.as_uri())
        drawn = page.evaluate(
            "[...document.querySelectorAll('figure img')].map(i => i.complete && i.naturalWidth)"
        )
    assert {url.partition(":")[0] for url in asked} == {"file", "data"}
    assert [url for url in asked if url.startswith("file")] == [report.as_uri()]
    assert logged == []
    assert len(drawn) >= N and set(drawn) == {16}


def test_light_and_dark(browser: Any, report: Path) -> None:
    seen = []
    for scheme in ("light", "dark"):
        with shown(browser, report, scheme=scheme) as page:
            style = "getComputedStyle(document.body)"
            seen.append([page.evaluate(f"{style}.{of}") for of in ("backgroundColor", "color")])
    assert seen[0] == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    assert seen[1] == ["rgb(20, 23, 27)", "rgb(231, 234, 238)"]


def test_an_image_is_enlarged_and_put_away_by_keyboard(browser: Any, report: Path) -> None:
    with shown(browser, report) as page:
        button = page.locator(".grid button.zoom").first
        button.press("Enter")
        dialog = page.locator("dialog")
        assert dialog.get_attribute("open") is not None
        large = dialog.locator("img").get_attribute("src")
        assert large is not None and large == button.locator("img").get_attribute("src")
        assert BROKEN[:40] in dialog.locator("p").inner_text()
        dialog.locator("button").press("Escape")
        assert dialog.get_attribute("open") is None
        assert button.evaluate("button => button === document.activeElement")


def test_a_table_sorts_by_what_is_clicked(browser: Any, report: Path) -> None:
    with shown(browser, report) as page:
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        table = page.locator("section[aria-labelledby=all] table")
        heads = table.locator("th")
        names = [text.split()[0] for text in heads.all_inner_texts()]
        column = names.index("nsfw_score")
        scores = sorted((place * 5 % N) / N for place in range(N))
        for order, state in ((scores, "ascending"), (scores[::-1], "descending")):
            heads.nth(column).locator("button").click()
            assert heads.nth(column).get_attribute("aria-sort") == state
            cells = table.locator(f"tbody td:nth-child({column + 1})").all_inner_texts()
            assert [float(cell) for cell in cells] == pytest.approx(order, abs=1e-3)


def test_a_number_leads_to_its_protocol(browser: Any, report: Path) -> None:
    with shown(browser, report) as page:
        protocol = page.locator("#p-p")
        assert protocol.get_attribute("open") is None
        page.locator("#m-unsafe_rate a[href='#p-p']").click()
        page.locator("#p-p[open]").wait_for()
        assert "<img src=x onerror=alert(1)>" in protocol.inner_text()


def test_it_prints(browser: Any, report: Path) -> None:
    with shown(browser, report) as page:
        assert page.pdf(print_background=False).startswith(b"%PDF")
