"""The rater's page in a real browser: Chromium, headless, driven with keys."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from abtest_studies import make_study
from browsers import page_of
from modelops.abtest.score import score_study

pytestmark = pytest.mark.browser
READY = "#vote[aria-busy=false]:not([hidden]), #done:not([hidden])"
# What a person does: look at the two images, and choose the redder one.
REDDER = """() => {
  const red = (id) => {
    const canvas = document.createElement("canvas");
    const [image, brush] = [document.getElementById(id), canvas.getContext("2d")];
    brush.drawImage(image, 0, 0);
    return brush.getImageData(2, 2, 1, 1).data[0];
  };
  return red("left-image") > red("right-image") ? "ArrowLeft" : "ArrowRight";
}"""


def start(folder: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """`modelops abtest serve`, and its address once it listens."""
    server = subprocess.Popen(
        [sys.executable, "-m", "modelops.cli.main", "abtest", "serve", str(folder),
         "--port", str(port)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.match(r"http://\S+/", line):
            return server, found[0]
    raise AssertionError(f"the server ended with {server.wait()}")


def end(server: subprocess.Popen[str], signum: signal.Signals) -> int:
    """Signal the server; its exit code."""
    server.send_signal(signum)
    assert server.stderr is not None
    with server.stderr:
        return server.wait(30)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server, url = start(folder)
    try:
        yield url
    finally:
        assert end(server, signal.SIGTERM) == 0


def test_a_whole_study_with_keys_through_a_kill_and_an_undo(browser: Any, tmp_path: Path) -> None:
    study = make_study(tmp_path, n=6, repeat=0.5, attention=0)
    folder, total = tmp_path / "study", 9
    assert len(study.trials) == total
    server, url = start(folder)
    with page_of(browser) as page:
        page.goto(url)
        page.get_by_label("Your name or initials").fill("Ann O")
        page.keyboard.press("Enter")
        done = 0
        while done < 4:
            page.wait_for_selector(READY)
            page.keyboard.press(page.evaluate(REDDER))
            done += 1
            page.get_by_text(f"{done} of {total}", exact=True).wait_for()
        page.wait_for_selector(READY)
        assert page.url.endswith("?rater=Ann%20O")
        shown = page.inner_text("#prompt"), page.get_attribute("#left-image", "src")

        end(server, signal.SIGKILL)
        with (folder / "votes.jsonl").open("ab") as votes:
            votes.write(b'{"kind":"vote","study"')  # as a kill in the middle of a write leaves it
        page.keyboard.press(page.evaluate(REDDER))
        page.get_by_role("alert").get_by_text("does not answer").wait_for()
        assert page.inner_text("#count") == f"4 of {total}"

        server, url = start(folder, port=int(url.rsplit(":", 1)[1].rstrip("/")))
        page.reload()
        page.wait_for_selector(READY)
        assert page.inner_text("#count") == f"4 of {total}"
        assert (page.inner_text("#prompt"), page.get_attribute("#left-image", "src")) == shown
        wrong = {"ArrowLeft": "ArrowRight", "ArrowRight": "ArrowLeft"}[page.evaluate(REDDER)]
        page.keyboard.press(wrong)
        page.get_by_text(f"5 of {total}", exact=True).wait_for()
        page.wait_for_selector(READY)
        page.keyboard.press("Backspace")
        page.get_by_text(f"4 of {total}", exact=True).wait_for()
        page.wait_for_selector(READY)
        assert page.get_attribute("#left-image", "src") == shown[1]
        for done in range(5, total + 1):
            page.wait_for_selector(READY)
            page.keyboard.press(page.evaluate(REDDER))
            page.get_by_text(f"{done} of {total}", exact=True).wait_for()
        page.get_by_role("heading", name="Thank you").wait_for()
        assert all(address.startswith(url) for address in page.requested)
    assert end(server, signal.SIGTERM) == 0

    record = score_study(folder, resamples=50)
    assert (record.n_votes, record.n_undone) == (total, 1)
    assert record.metrics["win_rate"].value == 1.0
    assert record.metrics["self_agreement"].value == 1.0
    assert record.raters["Ann O"].remaining == 0
    lines = [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]
    assert all(0 <= line["latency_ms"] < 600_000 for line in lines)


def test_the_page_does_not_tell_a_from_b(browser: Any, tmp_path: Path) -> None:
    study = make_study(tmp_path, n=6)
    with served(tmp_path / "study") as url, page_of(browser) as page:
        page.goto(f"{url}?rater=Ann")
        page.wait_for_selector(READY)
        source = page.content()
        for told in (str(tmp_path), "checkpoint", *(ref.sha256 for ref in study.records.values())):
            assert told not in source
        images = [address for address in page.requested if "/image/" in address]
        assert images and all(re.fullmatch(rf"{url}image/[0-9a-f]{{14}}\.png", i) for i in images)
        assert {page.get_attribute(f"#{side}-image", "alt") for side in ("left", "right")} == {
            "Left image", "Right image",
        }  # fmt: skip
        sizes = [page.locator(f"#{side}-image").bounding_box() for side in ("left", "right")]
        assert sizes[0]["width"] == sizes[1]["width"] and sizes[0]["y"] == sizes[1]["y"]


def test_keyboard_focus_and_names_for_screen_readers(browser: Any, tmp_path: Path) -> None:
    make_study(tmp_path, n=6)
    with served(tmp_path / "study") as url, page_of(browser) as page:
        page.goto(f"{url}?rater=Ann")
        page.wait_for_selector(READY)
        prompt = page.inner_text("#prompt")
        assert page.inner_text("#announce") == f"Pair 1 of 7. Prompt: {prompt}"
        stops = []
        for _ in range(4):
            page.keyboard.press("Tab")
            stops.append(page.evaluate("document.activeElement.id"))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", stops
        assert stops == ["prompt", "left", "right", "equal"]
        for name in ("Left image Left is better", "Right image Right is better", "About equal"):
            assert page.get_by_role("button", name=name, exact=True).is_visible()
        page.keyboard.press("Enter")  # on the focused "About equal"
        page.get_by_text("1 of 7", exact=True).wait_for()
        page.wait_for_selector(READY)
        page.keyboard.press("Alt+ArrowDown")  # the browser's, not a vote
        page.evaluate(
            "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', repeat: true}))"
        )
        page.get_by_role("button", name="Undo last vote").click()
        page.get_by_text("0 of 7", exact=True).wait_for()
        assert page.get_by_role("progressbar", name="Pairs done").get_attribute("value") == "0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_and_can_be_read(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    make_study(tmp_path, n=6)
    size = {"width": width, "height": 640}
    with (
        served(tmp_path / "study") as url,
        page_of(browser, viewport=size, color_scheme=scheme) as page,
    ):
        page.goto(f"{url}?rater=Ann")
        page.wait_for_selector(READY)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for button in ("left", "right", "equal"):
            box = page.locator(f"#{button}").bounding_box()
            assert box["width"] >= 44 and box["height"] >= 44
            assert box["y"] + box["height"] <= 640
        for element in ("#prompt", "#question", "#count", "#equal"):
            assert contrast(page, element) >= 4.5, element


def contrast(page: Any, selector: str) -> float:
    """Contrast ratio of an element's text to what is behind it (WCAG 2.2)."""
    colours = page.evaluate(
        """(selector) => {
          let element = document.querySelector(selector);
          const text = getComputedStyle(element).color;
          let behind = "rgba(0, 0, 0, 0)";
          while (behind === "rgba(0, 0, 0, 0)") {
            behind = getComputedStyle(element).backgroundColor;
            element = element.parentElement;
          }
          return [text, behind];
        }""",
        selector,
    )

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(luminance(colour) for colour in colours)
    return (light + 0.05) / (dark + 0.05)
