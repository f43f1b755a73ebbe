"""Blocked images are kept for review when asked, for nobody else to see, and never in the way."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from PIL import Image
from prometheus_client import CollectorRegistry

import live_node
from browsers import chromium, page_of
from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.files import temporary_name
from modelops.base.pixels import pixels_sha256
from modelops.cli.main import main
from modelops.models.request import ImageRequest
from modelops.models.sources import load_checkpoint
from modelops.safety.image import ImageVerdict, OpenNsfwFilter
from modelops.serving.moderation.encryption import read_private_key, read_public_key
from modelops.serving.moderation.quarantine import Quarantine
from modelops.serving.moderation.review import decide, list_entries, read_decisions, weigh
from modelops.serving.moderation.store import list_files, read_entry, tidy_folder
from modelops.serving.node.node import InferenceNode
from modelops.serving.node.replay import _make
from modelops.serving.provenance.receipts import text_digest
from modelops.serving.settings import NodeSettings

PROMPT = "a purple walrus <img src=x onerror=alert(1)>"


class BlocksAll(OpenNsfwFilter):
    """The real scores; everything after the golden image is blocked."""

    calls = 0

    def check(self, images: Any, **options: Any) -> list[ImageVerdict]:
        verdicts = super().check(images, **options)
        self.calls += 1
        return [ImageVerdict(one.score, self.calls > 1) for one in verdicts]


def blocking_node(release: Path, **settings: Any) -> InferenceNode:
    node = InferenceNode(
        release, settings=NodeSettings(profile_s=0, **settings), image_filter=BlocksAll
    )
    node.start()
    assert node.readiness() == []
    return node


@pytest.fixture(scope="module")
def node(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceNode]:
    folder = tmp_path_factory.mktemp("node") / "quarantine"
    node = blocking_node(tiny_release, quarantine=str(folder), quarantine_stages="all")
    with live_node.http(node) as live, live.client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(
                prompt=PROMPT, n=2, extra_body={"seed": 7, "steps": 2, "guidance": 2.0},
                extra_headers={"X-Request-Id": "order-66"},
            )  # fmt: skip
        assert refused.value.code == "content_policy_violation"
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="explicit hardcore porn")
    yield node
    node.close(drain=False)


def folder_of(node: InferenceNode) -> Path:
    assert node.quarantine is not None
    return node.quarantine.folder


def counted(registry: CollectorRegistry, result: str) -> float | None:
    return registry.get_sample_value("modelops_quarantine_total", {"result": result})


def own_quarantine(node: InferenceNode, folder: Path, **options: Any) -> Quarantine:
    options = {"max_bytes": 10_000_000, "max_age_s": 1e6, "registry": CollectorRegistry()} | options
    return Quarantine(folder, node.sealer.origin, **options)


def keep(quarantine: Quarantine, seed: int = 1, *, size: int = 32) -> bool:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    request = ImageRequest(prompt=PROMPT, seed=seed, steps=2, guidance=1.0, height=size, width=size)
    info = {"filter": "open_nsfw", "threshold": 0.5}
    return quarantine.keep_pictures(
        "r", [(pixels, request, (2,))], [0.5 + seed / 100], [True], "open_nsfw", info
    )


def test_what_is_blocked_can_be_looked_at_and_made_again(
    node: InferenceNode, tiny_release: Path
) -> None:
    folder = folder_of(node)
    assert folder.stat().st_mode & 0o777 == 0o700
    files = list_files(folder)
    assert [file.path.stat().st_mode & 0o777 for file in files] == [0o600] * 2
    entry = read_entry(files[0])
    assert (entry.stage, entry.request_id) == ("image", "order-66")
    assert entry.release.sha256 == node.release_sha256
    assert entry.filter.name == "custom" and entry.filter.threshold == 0.5
    assert entry.filter.info["weights_sha256"]
    assert [picture.seed for picture in entry.pictures] == [7, 8]
    assert all(0 <= picture.score <= 1 and picture.blocked for picture in entry.pictures)
    pipeline = load_checkpoint(tiny_release / node.release.model)
    pipeline.set_progress_bar_config(disable=True)
    again = _make(
        pipeline,
        ImageRequest(
            prompt=PROMPT, seed=8, steps=entry.request.steps, guidance=entry.request.guidance,
            height=32, width=32, negative_prompt="",
        ),
    )  # fmt: skip
    picture = entry.pictures[1]
    assert pixels_sha256(again) == picture.pixels_sha256
    assert picture.png is not None
    kept = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.png))))
    assert np.array_equal(kept, again)
    assert counted(node.metrics.registry, "written") == 2


def test_no_prompt_is_kept_unless_asked_for(
    node: InferenceNode, tiny_release: Path, tmp_path: Path
) -> None:
    image, prompt = (read_entry(file) for file in list_files(folder_of(node)))
    assert image.request.prompt is None and image.request.prompt_sha256 == text_digest(PROMPT)
    assert prompt.stage == "prompt" and prompt.reasons == [] and prompt.pictures == []
    everything = b"".join(path.read_bytes() for path in folder_of(node).iterdir())
    assert b"walrus" not in everything and b"porn" not in everything.replace(b"nsfw", b"")
    asked = InferenceNode(
        tiny_release,
        settings=NodeSettings(
            profile_s=0, quarantine=str(tmp_path / "q"), quarantine_stages="all",
            quarantine_prompts="text",
        ),
    )  # fmt: skip
    try:
        asked.start()
        with (
            live_node.http(asked) as live,
            live.client() as client,
            pytest.raises(openai.BadRequestError),
        ):
            client.images.generate(prompt="explicit hardcore porn")
        (entry,) = (read_entry(file) for file in list_files(tmp_path / "q"))
        assert entry.request.prompt == "explicit hardcore porn"
        assert any("porn" in reason for reason in entry.reasons)
    finally:
        asked.close(drain=False)


def test_without_a_folder_nothing_is_kept(tiny_release: Path) -> None:
    node = InferenceNode(tiny_release, settings=NodeSettings(profile_s=0))
    try:
        assert node.quarantine is None
        assert b"modelops_quarantine" not in node.metrics.text()
    finally:
        node.close(drain=False)


def test_a_folder_that_cannot_be_written_changes_no_answer(
    tiny_release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "q"
    node = blocking_node(tiny_release, quarantine=str(folder))
    answers = []
    try:
        with live_node.http(node) as live, live.client() as client:
            for broken in (False, True, True, False):
                if broken and folder.is_dir():
                    folder.rename(tmp_path / "elsewhere")
                    folder.write_text("a file in its place")
                elif not broken and folder.is_file():
                    folder.unlink()
                    (tmp_path / "elsewhere").rename(folder)
                with pytest.raises(openai.BadRequestError) as refused:
                    client.images.generate(prompt=PROMPT, extra_body={"steps": 1})
                answers.append((refused.value.code, refused.value.body))
    finally:
        node.close(drain=False)
    assert len({json.dumps(answer) for answer in answers}) == 1
    assert counted(node.metrics.registry, "failed") == 2
    assert counted(node.metrics.registry, "written") == 2
    assert len(list_files(folder)) == 2


def test_the_oldest_go_when_the_bytes_run_out(node: InferenceNode, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    quarantine = own_quarantine(node, tmp_path / "q", max_bytes=30_000, registry=registry)
    (tmp_path / "q" / "review.html").write_text("holds images")
    for seed in range(12):
        assert keep(quarantine, seed)
        assert sum(file.size for file in list_files(tmp_path / "q")) <= 30_000
    seeds = [read_entry(file).pictures[0].seed for file in list_files(tmp_path / "q")]
    assert seeds == list(range(12 - len(seeds), 12)) and 2 <= len(seeds) <= 8
    assert counted(registry, "displaced") == 12 - len(seeds)
    assert not (tmp_path / "q" / "review.html").exists()
    assert not keep(quarantine, 99, size=200)  # larger than the whole folder may be
    assert len(list_files(tmp_path / "q")) == len(seeds)  # and no reason to delete the others
    assert counted(registry, "failed") == 1
    quarantine.close()


def test_a_folder_that_was_away_for_a_while_is_tidied_again(
    node: InferenceNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a volume that is mounted anew: the thread that deletes what is too old goes on."""
    folder = tmp_path / "q"
    quarantine = own_quarantine(node, folder, max_age_s=2.0)
    assert keep(quarantine, 1)
    folder.rename(tmp_path / "away")
    deadline = time.monotonic() + 20
    while "cannot be deleted now" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "away").rename(folder)
    while list_files(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list_files(folder) == []
    quarantine.close()


def test_a_page_that_was_finished_after_its_last_entry_went_goes_too(reviewed: Path) -> None:
    assert tidy_folder(reviewed, max_age_s=0)[0] == 5
    (reviewed / "review.html").write_text("holds images")
    assert tidy_folder(reviewed, max_age_s=1e6) == (0, 0)
    assert not (reviewed / "review.html").exists()


def test_what_is_too_old_goes_without_any_request(node: InferenceNode, tmp_path: Path) -> None:
    first = own_quarantine(node, tmp_path / "q")
    assert keep(first, 1) and keep(first, 2)
    first.close()
    old = list_files(tmp_path / "q")[0].path
    day_before = time.strftime("%Y%m%dT%H%M%S", time.gmtime(time.time() - 86400))
    parts = old.name.split("-")
    old.rename(old.with_name("-".join([parts[0], day_before, *parts[2:]])))
    prefix, suffix = temporary_name("entry-x.json")
    ended = str(2**22 + 1)  # above every process number
    leftover = tmp_path / "q" / f"{prefix.replace(str(os.getpid()), ended)}abc{suffix}"
    leftover.write_bytes(b"half an entry")
    registry = CollectorRegistry()
    own_quarantine(node, tmp_path / "q", max_age_s=80_000, registry=registry).close()
    assert [read_entry(file).pictures[0].seed for file in list_files(tmp_path / "q")] == [2]
    assert counted(registry, "expired") == 1 and not leftover.exists()
    second = own_quarantine(node, tmp_path / "q", max_age_s=1.0, registry=CollectorRegistry())
    deadline = time.monotonic() + 20
    while list_files(tmp_path / "q") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list_files(tmp_path / "q") == []
    second.close()


def reviewer_keys(folder: Path) -> tuple[Path, Path]:
    private = X25519PrivateKey.generate()
    folder.mkdir(exist_ok=True)
    (folder / "reviewer.pem").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip
    (folder / "reviewer.pub").write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return folder / "reviewer.pem", folder / "reviewer.pub"


def test_entries_are_encrypted_to_a_reviewer(
    node: InferenceNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = reviewer_keys(tmp_path / "keys")
    quarantine = own_quarantine(node, tmp_path / "q", reader=read_public_key(public), texts=True)
    assert keep(quarantine, 1) and keep(quarantine, 2)
    quarantine.close()
    first, second = list_files(tmp_path / "q")
    assert first.sealed and b"walrus" not in first.path.read_bytes()
    assert read_entry(first, read_private_key(private)).request.prompt == PROMPT
    with pytest.raises(UsageError, match="encrypted"):
        read_entry(first)
    stranger, _ = reviewer_keys(tmp_path / "stranger")
    with pytest.raises(IntegrityError, match="not to the one given"):
        read_entry(first, read_private_key(stranger))
    assert main(["serve", "review", str(tmp_path / "q")]) == 0
    assert "is encrypted to key" in capsys.readouterr().out
    assert main(["serve", "review", str(tmp_path / "q"), first.id, "--key", str(private)]) == 0
    assert "purple walrus" in capsys.readouterr().out
    data = bytearray(second.path.read_bytes())
    second.path.write_bytes(first.path.read_bytes())  # one entry passed off as another
    with pytest.raises(IntegrityError, match="does not decrypt"):
        read_entry(second, read_private_key(private))
    data[-1] ^= 1
    second.path.write_bytes(data)
    with pytest.raises(IntegrityError, match="does not decrypt"):
        read_entry(second, read_private_key(private))


def test_settings_that_cannot_be_used_are_said_at_the_start(
    node: InferenceNode, tiny_release: Path, tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").write_text("")
    for settings, error, match in (
        ({"quarantine": str(tmp_path / "open")}, UsageError, "others can enter"),
        ({"quarantine": str(tmp_path / "file")}, ModelopsError, "no quarantine can be kept"),
        ({"quarantine_stages": "some"}, UsageError, "MODELOPS_QUARANTINE_STAGES"),
        ({"quarantine_prompts": "yes"}, UsageError, "MODELOPS_QUARANTINE_PROMPTS"),
        (
            {"quarantine": str(tmp_path / "q"), "quarantine_key": str(tmp_path / "file")},
            UsageError, "no public key",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            InferenceNode(tiny_release, settings=NodeSettings(profile_s=0, **settings))


@pytest.fixture
def reviewed(node: InferenceNode, tmp_path: Path) -> Path:
    quarantine = own_quarantine(node, tmp_path / "q", texts=True)
    for seed in range(1, 6):
        assert keep(quarantine, seed)
    quarantine.close()
    return tmp_path / "q"


def review(folder: Path, *arguments: str) -> int:
    return main(["serve", "review", str(folder), *arguments])


def test_decisions_say_how_many_blocks_were_wrong(
    reviewed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ids = [file.id for file in list_files(reviewed)]
    assert review(reviewed, "--overturn", ids[0], "--reviewer", "ann", "--reason", "a sun") == 0
    more = [word for name in ids[1:4] for word in ("--uphold", name[:12])]
    assert review(reviewed, *more, "--reviewer", "ann", "--reason", "indeed") == 0
    assert review(reviewed, "--uphold", ids[0], "--reviewer", "bob", "--reason", "no sun") == 0
    assert review(reviewed, "--overturn", ids[0], "--reviewer", "ann", "--reason", "yes, one") == 0
    capsys.readouterr()
    assert review(reviewed, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    (summary,) = result["summary"]
    assert (summary["decided"], summary["false_alarms"]) == (4, 1)  # the last word counts
    # Clopper and Pearson's interval of 1 in 4.
    assert (round(summary["low"], 4), round(summary["high"], 4)) == (0.0063, 0.8059)
    decisions = [entry["decision"] for entry in result["entries"]]
    assert decisions == ["overturned", "upheld", "upheld", "upheld", None]
    assert len((reviewed / "decisions.jsonl").read_text().splitlines()) == 6
    assert (reviewed / "decisions.jsonl").stat().st_mode & 0o777 == 0o600
    # Scores are 0.51 to 0.54: nothing that was decided would be blocked at 0.6.
    assert summary["at_thresholds"][0] == {
        "threshold": 0.6, "upheld_still_blocked": 0, "overturned_still_blocked": 0,
    }  # fmt: skip
    assert review(reviewed, ids[0], "--pictures", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "overturned by ann" in text and "seed 1, 2 steps" in text
    (written,) = (tmp_path / "out").iterdir()
    assert Image.open(written).size == (32, 32) and written.stat().st_mode & 0o777 == 0o600
    assert review(reviewed, "--purge-older", "0") == 0
    assert list_files(reviewed) == [] and weigh(read_decisions(reviewed))[0].decided == 4


def test_reviewing_needs_a_name_a_reason_and_one_entry(
    reviewed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = list_files(reviewed)[0].id
    for arguments in (
        ("--uphold", one),
        ("--uphold", one, "--reason", " "),
        ("--uphold", one, "--overturn", one, "--reason", "x"),
        ("--uphold", one, "--uphold", one[:9], "--reason", "x", "--overturn", one[:10]),
        ("--uphold", "zz", "--reason", "x"),
        ("--uphold", "", "--reason", "x"),
        ("--reason", "x"),
        ("--pictures", "out"),
        (one, "--page"),
        ("--purge-older", "-1"),
    ):
        assert review(reviewed, *arguments) == 2, arguments
        assert capsys.readouterr().err.startswith("error: ")
    assert not (reviewed / "decisions.jsonl").exists() or read_decisions(reviewed) == []


def test_a_decision_that_was_changed_or_taken_out_shows(
    reviewed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in list_files(reviewed)[:3]:
        decide(reviewed, {file.id: "upheld"}, reviewer="ann", reason="indeed")
    path = reviewed / "decisions.jsonl"
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    for bad in (
        good.replace(b"indeed", b"no", 1), lines[0] + lines[2], lines[1] + lines[2],
        lines[1] + lines[0] + lines[2], b"{}\n" + good,
    ):  # fmt: skip
        path.write_bytes(bad)
        assert review(reviewed) == 1
        assert "decisions.jsonl" in capsys.readouterr().err
        with pytest.raises(IntegrityError):
            decide(reviewed, {list_files(reviewed)[0].id: "upheld"}, reviewer="a", reason="b")
        assert path.read_bytes() == bad
    path.write_bytes(good + b'{"kind":"deci')  # a power cut within a line
    decide(reviewed, {list_files(reviewed)[3].id: "overturned"}, reviewer="a", reason="b")
    assert [one.decision for one in read_decisions(reviewed)] == ["upheld"] * 3 + ["overturned"]


def test_reviewers_at_the_same_time_lose_nothing(reviewed: Path) -> None:
    ids = [file.id for file in list_files(reviewed)]

    def work(name: str) -> None:
        for one in ids:
            decide(reviewed, {one: "upheld"}, reviewer=name, reason="x")

    threads = [threading.Thread(target=work, args=(f"r{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_decisions(reviewed)) == 6 * len(ids)


def test_a_file_that_is_no_entry_is_listed_as_such(
    reviewed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list_files(reviewed)[0].path.write_bytes(b'{"kind": "quarantine"}')
    listed = list_entries(reviewed)
    assert listed[0].problem is not None and "not a quarantine entry" in listed[0].problem
    assert review(reviewed, "--page") == 0
    assert review(reviewed, list_files(reviewed)[0].id) == 1
    assert tidy_folder(reviewed, max_age_s=0)[0] == 5


def test_the_page_hides_pictures_until_asked(
    reviewed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [file.id for file in list_files(reviewed)]
    decide(reviewed, {ids[0]: "overturned"}, reviewer="ann", reason="a <b>sun</b>")
    assert review(reviewed, "--page") == 0
    page_file = reviewed / "review.html"
    assert page_file.stat().st_mode & 0o777 == 0o600
    with chromium() as browser, page_of(browser, viewport={"width": 1100, "height": 900}) as page:
        page.goto(page_file.as_uri())
        cards = page.locator(".card")
        assert cards.count() == 5
        image = "return getComputedStyle(document.querySelectorAll('.card img')[%d]).filter"
        looks = [page.evaluate(f"() => {{ {image % number} }}") for number in range(5)]
        assert all("blur" in look for look in looks)
        page.locator(".frame").first.click()
        assert page.evaluate(f"() => {{ {image % 0} }}") == "none"
        cards.first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press(" ")
        assert page.evaluate(f"() => {{ {image % 1} }}") == "none"
        page.keyboard.press("o")
        cards.nth(2).locator("[data-mark=uphold]").click()
        command = page.locator("#commands").input_value()
        assert f"--overturn {ids[3][:12]} --uphold {ids[2][:12]}" in command  # newest first
        page.keyboard.press("Escape")
        assert "blur" in page.evaluate(f"() => {{ {image % 0} }}")
        assert PROMPT in page.inner_text("body") and "1 of 1 decided" in page.inner_text("body")
        assert page.requested == [page_file.as_uri()]
