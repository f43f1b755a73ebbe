"""The watermark is found again where it is, never where it is not, and receipts say so."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import skimage.data
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import live_node
from modelops.base.errors import UsageError
from modelops.base.pixels import pixels_sha256
from modelops.cli.main import main
from modelops.data.corpora.openmoji import render_drawing
from modelops.serving.provenance.manifests import read_mark
from modelops.serving.provenance.receipts import verify_receipt
from modelops.serving.provenance.signing import find_verifying_key
from modelops.serving.provenance.watermark import METHOD, Watermark, make_key, open_watermark
from modelops.serving.settings import NodeSettings

Pixels = npt.NDArray[np.uint8]
KEY, OTHER = Watermark(b"k" * 32), Watermark(b"o" * 32)


def drawing(size: int, name: str = "1F349") -> Pixels:
    return np.asarray(Image.open(io.BytesIO(render_drawing(name, size))).convert("RGB"))


def photograph(size: int) -> Pixels:
    return np.asarray(Image.fromarray(skimage.data.astronaut()).resize((size, size)))


def through(pixels: Pixels, name: str, **options: Any) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return np.asarray(Image.open(buffer).convert("RGB"))


def resized(pixels: Pixels, factor: float) -> Pixels:
    height, width = pixels.shape[:2]
    return np.asarray(
        Image.fromarray(pixels).resize((round(width * factor), round(height * factor)))
    )


@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("picture", [drawing, photograph])
def test_it_is_found_and_hardly_seen(picture: Any, size: int) -> None:
    original = picture(size)
    made = KEY.embed(original)
    assert peak_signal_noise_ratio(original, made.pixels) == pytest.approx(made.psnr_db)
    assert made.psnr_db >= 40.0
    found = KEY.detect(made.pixels)
    assert found == made.detection and found.found and found.z > 12
    assert np.array_equal(KEY.embed(original).pixels, made.pixels)
    assert not KEY.detect(original).found
    assert not OTHER.detect(made.pixels).found


@pytest.mark.parametrize("level", [0, 128, 255])
def test_even_a_plain_picture_has_room(level: int) -> None:
    made = KEY.embed(np.full((64, 48, 3), level, np.uint8))
    assert made.psnr_db >= 40.0 and made.detection.found


@pytest.mark.parametrize("picture", [drawing, photograph])
def test_it_survives_what_strips_a_manifest(picture: Any) -> None:
    small, large = KEY.embed(picture(64)).pixels, KEY.embed(picture(256)).pixels
    noise = np.random.default_rng(0).normal(0, 5, large.shape)
    for attacked in (
        through(small, "JPEG", quality=90), resized(small, 2), resized(small, 1.5),
        through(large, "JPEG", quality=50), through(large, "WEBP", quality=75),
        resized(large, 0.5), resized(large, 2), resized(large, 1.37),
        (large * 0.8).astype(np.uint8), np.clip(large + noise, 0, 255).astype(np.uint8),
        np.asarray(Image.fromarray(large).convert("L").convert("RGB")),
    ):  # fmt: skip
        assert KEY.detect(attacked).found
        assert not OTHER.detect(attacked).found


def test_a_crop_takes_it_off() -> None:
    """Stated in the docstring; if this fails, say that it survives."""
    assert not KEY.detect(KEY.embed(photograph(256)).pixels[32:, 32:]).found


@pytest.mark.parametrize("picture", [drawing(32), photograph(64), drawing(64, "2B1C")])
def test_false_alarms_stay_below_the_bound(picture: Pixels) -> None:
    """150 keys: the worst z of `looks` looks is above s at most 150 looks exp(-s^2 / 2) times."""
    found = [Watermark(number.to_bytes(32, "big")).detect(picture) for number in range(150)]
    for level in (3.5, 4.0, 4.5, 5.0):
        expected = 150 * found[0].looks * math.exp(-(level**2) / 2)
        assert sum(one.z >= level for one in found) <= expected + 3 * math.sqrt(expected)
    assert not any(one.found for one in found)
    assert sum(one.p_value <= 0.1 for one in found) <= 15 + 3 * math.sqrt(15)


def test_one_look_has_mean_0_and_variance_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an image full of structure, over keys; this is what the bound stands on."""
    monkeypatch.setattr("modelops.serving.provenance.watermark._STEPS", np.array([0.5]))
    monkeypatch.setattr("modelops.serving.provenance.watermark._CUTS", (96.0,))
    picture = drawing(32)
    z = np.array([Watermark(n.to_bytes(32, "big")).detect(picture).z for n in range(600)])
    assert abs(z.mean()) < 4 / math.sqrt(600)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / 600)
    assert z.max() < 5


def test_tiny_and_odd_pictures(tmp_path: Path) -> None:
    for shape in ((1, 1, 3), (2, 300, 3), (8, 8, 3)):
        assert not KEY.embed(np.full(shape, 100, np.uint8)).detection.found
    wide = np.asarray(Image.fromarray(photograph(256)).resize((300, 128)))
    assert KEY.detect(KEY.embed(wide).pixels).found
    for bad in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))):
        with pytest.raises(UsageError):
            KEY.detect(bad)  # type: ignore[arg-type]


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "watermark.key"
    assert main(["watermark", "key", str(path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert path.stat().st_mode & 0o777 == 0o600
    assert open_watermark(path).key_id == made["key_id"]
    assert made["key_id"] not in path.read_text() and path.read_text()[-65:-1] not in str(made)
    assert main(["watermark", "key", str(path)]) == 2  # a lost key cannot be made again
    path.chmod(0o640)
    with pytest.raises(UsageError, match="others can read"):
        open_watermark(path)
    path.write_text("secret")
    with pytest.raises(UsageError, match="no watermark key"):
        open_watermark(path)


def test_of_many_that_make_a_key_at_once_one_does(tmp_path: Path) -> None:
    """A key that was replaced cannot be made again, and its images are never found again."""
    path, together = tmp_path / "key", threading.Barrier(8)
    made: list[str] = []
    refused: list[UsageError] = []

    def make() -> None:
        together.wait()
        try:
            made.append(make_key(path))
        except UsageError as error:
            refused.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(refused) == 7
    assert open_watermark(path).key_id == made[0]
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_mode & 0o777 == 0o600


@dataclass(frozen=True)
class Served:
    """PNG and JPEG of a node with a watermark, with receipts, and its key."""

    release: Path
    folder: Path

    def picture(self, name: str) -> Path:
        return self.folder / f"picture.{name}"

    def receipt(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return found


PROMPT = "a red heart for Zoë"


@pytest.fixture(scope="module")
def made(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("watermark")
    make_key(folder / "key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELOPS_CACHE", str(folder / "cache"))
        patch.delenv("MODELOPS_SIGNING_CHAIN", raising=False)
        settings = NodeSettings(profile_s=0, watermark_key=str(folder / "key"))
        with live_node.served(tiny_release, settings) as live, live.client() as client:
            for name in ("png", "jpeg", "webp"):
                (item,) = client.images.generate(
                    prompt=PROMPT, output_format=name,  # type: ignore[call-overload]
                    extra_body={"seed": 3, "steps": 2},
                ).data  # fmt: skip
                (folder / f"picture.{name}").write_bytes(base64.b64decode(item.b64_json))
                (folder / f"{name}.json").write_text(json.dumps(item.model_extra["x_modelops"]))
        yield Served(tiny_release, folder)


def test_a_served_picture_says_and_carries_it(made: Served) -> None:
    for name in ("png", "jpeg", "webp"):
        receipt = verify_receipt(made.receipt(name), find_verifying_key(None))
        said = receipt.watermark
        assert said is not None and said.method == METHOD and said.found and said.psnr_db >= 40
        mark = open_watermark(made.folder / "key")
        assert said.key_id == mark.key_id
        pixels = np.asarray(Image.open(made.picture(name)).convert("RGB"))
        assert mark.detect(pixels).found
        assert (pixels_sha256(pixels) == said.pixels_sha256) == (name != "jpeg")
        assert receipt.pixels_sha256 != said.pixels_sha256
        data = made.picture(name).read_bytes()
        assert read_mark(data, name).generation["watermark"] == said.model_dump()
        assert b"c2pa.watermarked.unbound" in data


def test_replay_compares_the_models_pixels(
    made: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    release = ("--release", str(made.release), "--prompt", PROMPT)
    for name, source in (
        ("png", made.folder / "png.json"), ("jpeg", made.folder / "jpeg.json"),
        ("webp", made.picture("webp")),
    ):  # fmt: skip
        image = ("--image", str(made.picture(name)))
        assert main(["replay", str(source), *release, *image]) == 0
        assert capsys.readouterr().out == "equal: the same pixels\n"
    changed = made.receipt("png")
    changed["watermark"]["found"] = False
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    assert main(["replay", str(tmp_path / "changed.json"), *release]) == 1


def test_detect_answers_by_exit_code(made: Served, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [str(made.picture(name)) for name in ("png", "jpeg", "webp")]
    key = ("--key", str(made.folder / "key"))
    assert main(["watermark", "detect", *pictures, *key]) == 0
    assert capsys.readouterr().out.count("yes") == 3
    golden = str(made.release / "golden.png")
    assert main(["watermark", "detect", pictures[0], golden, *key, "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert [entry["found"] for entry in result["images"]] == [True, False]
    assert result["images"][0]["p"] <= 1e-6 < result["images"][1]["p"]
    assert main(["watermark", "detect", str(made.folder / "key"), *key]) == 2
    assert main(["watermark", "detect", golden, "--key", golden]) == 2


def test_without_a_key_nothing_is_said(tiny_release: Path) -> None:
    with live_node.served(tiny_release, NodeSettings(profile_s=0)) as live, live.client() as client:
        (item,) = client.images.generate(prompt=PROMPT, extra_body={"steps": 1}).data
    assert "watermark" not in item.model_extra["x_modelops"]
    assert b"watermark" not in base64.b64decode(item.b64_json)
