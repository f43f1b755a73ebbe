"""PSNR, SSIM and LPIPS against closed forms and the packages they come from; pairs of records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("skimage")

from modelops.abtest.pairs import open_side
from modelops.base.errors import EvaluationError, IntegrityError, MissingWeightsError
from modelops.base.images import encode_png, read_image
from modelops.cli.main import main
from modelops.data.corpora.openmoji import build_corpus
from modelops.evaluation.compare.agreement import compare_images, pair_images, pairwise_measures
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.open import open_source
from modelops.metrics.images import LPIPS_NETS, Lpips, psnr, ssim
from modelops.records.comparison import ComparisonRecord
from modelops.records.read import read_record


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Six drawings of 48 x 48."""
    manifest = build_corpus(tmp_path_factory.mktemp("drawn"), resolution=48, limit=6, seed=0)
    return [read_image(path) for path in sorted(manifest.parent.rglob("*.png"))]


def test_psnr_closed_forms() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    assert psnr(black, black + 255) == pytest.approx(0.0)
    assert psnr(black, black + 1) == pytest.approx(20 * np.log10(255))
    assert psnr(black, black) == np.inf


def test_ssim_closed_forms(pictures: list[Any]) -> None:
    assert ssim(pictures[0], pictures[0]) == pytest.approx(1.0)
    # Flat images differ in luminance alone: (2ab + c) / (a^2 + b^2 + c), c = (0.01 * 255)^2.
    a, b, c = 50, 200, 2.55**2
    flat = (np.full((16, 16, 3), a, np.uint8), np.full((16, 16, 3), b, np.uint8))
    assert ssim(*flat) == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=1e-9)
    assert ssim(pictures[0], pictures[1]) == pytest.approx(ssim(pictures[1], pictures[0]))


def test_ssim_is_the_papers_formula(pictures: list[Any]) -> None:
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(0).integers(-40, 40, pictures[0].shape)
    other = np.clip(pictures[0] + noise, 0, 255).astype(np.uint8)

    def window(values: np.ndarray) -> np.ndarray:
        return np.asarray(gaussian_filter(values, 1.5, radius=5, axes=(0, 1)))

    x, y = pictures[0].astype(float), other.astype(float)
    mean_x, mean_y = window(x), window(y)
    var_x, var_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    covariance = window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    local = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    local /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    whole_windows = local[5:-5, 5:-5]
    assert ssim(pictures[0], other) == pytest.approx(float(whole_windows.mean()), abs=1e-9)


def test_sizes_must_agree() -> None:
    small, large = np.zeros((12, 12, 3), np.uint8), np.zeros((12, 14, 3), np.uint8)
    for measure in (psnr, ssim):
        with pytest.raises(EvaluationError, match="not compared"):
            measure(small, large)
    with pytest.raises(EvaluationError, match="11 pixels"):
        ssim(small[:8], small[:8])


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AlexNet in torchvision's format, without its large classifier."""
    import torch
    from torchvision.models.alexnet import AlexNet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    state = AlexNet().state_dict()
    torch.save({key: value for key, value in state.items() if key.startswith("features")}, path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_lpips_is_the_packages_on_the_same_weights(pictures: list[Any], alexnet: Path) -> None:
    lpips = pytest.importorskip("lpips")
    import torch

    ours = Lpips(alexnet)
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(alexnet, weights_only=True)
    slices = [getattr(reference.net, f"slice{part}") for part in range(1, 6)]
    layers = {f"features.{name}": module for s in slices for name, module in s.named_children()}
    for name, module in layers.items():
        if f"{name}.weight" in state:
            module.load_state_dict({k: state[f"{name}.{k}"] for k in ("weight", "bias")})
    made = ours.distances(pictures[:3], pictures[3:])
    expected = [
        float(reference(*(lpips.im2tensor(image) for image in pair)))
        for pair in zip(pictures[:3], pictures[3:], strict=True)
    ]
    assert made == pytest.approx(expected, abs=1e-5) and min(made) > 1e-4
    assert ours.distances(pictures[:1], pictures[:1]) == pytest.approx([0.0], abs=1e-7)
    assert len(ours.protocol["weights_sha256"]) == 64


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_images_that_are_too_small_for_lpips_are_told_by_their_size(
    net: str, tmp_path: Path
) -> None:
    pytest.importorskip("lpips")
    import torch
    from torchvision import models

    bodies = {"alex": models.alexnet, "vgg": models.vgg16, "squeeze": models.squeezenet1_1}
    layers = bodies[net](weights=None, num_classes=2).features.state_dict()
    torch.save({f"features.{key}": value for key, value in layers.items()}, tmp_path / "w.pth")
    ours, least = Lpips(tmp_path / "w.pth", net), LPIPS_NETS[net]
    image = np.random.default_rng(0).integers(0, 256, (least, 40, 3), np.uint8)
    assert np.isfinite(ours.distances([image], [255 - image])).all()
    with pytest.raises(EvaluationError, match=f"one is 40x{least - 1}"):
        ours.distances([image[1:]], [image[1:]])
    tensor = torch.zeros(1, 3, least - 1, 40)
    with pytest.raises(RuntimeError, match="too small"):  # the table is the network's own limit
        ours.model(tensor, tensor)


def test_other_weights_than_the_backbones_are_refused(alexnet: Path, tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    with pytest.raises(MissingWeightsError, match="not torchvision's weights of squeeze"):
        Lpips(alexnet, "squeeze")
    with pytest.raises(MissingWeightsError, match="no such file"):
        Lpips(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(MissingWeightsError, match="not a file of tensors"):
        Lpips(tmp_path / "text.pth")
    with pytest.raises(EvaluationError, match="one of alex"):
        Lpips(alexnet, "resnet")


@pytest.fixture(scope="module")
def records(pictures: list[Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two evaluations of folders of 6 images for 3 prompts: one image is brighter by one level
    in the second, one has another drawing."""
    root = tmp_path_factory.mktemp("records")
    (root / "prompts.txt").write_text("one\ntwo\nthree\n")
    others = [pictures[0], pictures[1] // 2 + 1, pictures[3], *pictures[3:]]
    found = []
    for name, images in (("a", [pictures[0], pictures[1] // 2, *pictures[2:]]), ("b", others)):
        (root / name).mkdir()
        for index, image in enumerate(images):
            (root / name / f"{index // 2}-{index % 2}.png").write_bytes(encode_png(image))
        settings = EvaluationSettings(
            prompts_file=root / "prompts.txt", n=6, safety="none", resamples=50
        )
        evaluate(open_source(str(root / name)), settings, out_path=root / f"{name}.json")
        found.append(root / f"{name}.json")
    return found[0], found[1]


def test_pairs_are_measured_with_intervals_over_prompts(
    records: tuple[Path, Path], pictures: list[Any], alexnet: Path
) -> None:
    pytest.importorskip("lpips")
    made = pairwise_measures(*records, lpips_weights=alexnet, resamples=50)
    assert compare_images(*records).identical == 4
    rate = made["pair_identical_rate"]
    assert rate.value == pytest.approx(np.mean([1.0, 0.5, 0.5])) and rate.n == 6
    differing = [20 * np.log10(255), psnr(pictures[2], pictures[3])]
    assert made["pair_psnr"].value == pytest.approx(np.mean(differing))
    assert made["pair_psnr"].n == 2
    each = [
        1,
        ssim(pictures[1] // 2, pictures[1] // 2 + 1),
        ssim(pictures[2], pictures[3]),
        1,
        1,
        1,
    ]
    assert made["pair_ssim"].value == pytest.approx(np.mean(each))
    for key in ("pair_ssim", "pair_cosine_lite0", "pair_lpips"):
        m = made[key]
        assert m.value is not None and m.low is not None and m.high is not None
        assert m.low < m.value < m.high and m.protocol and m.details["pairs"] == 6


def test_compare_measures_lpips_when_its_weights_are_given(
    records: tuple[Path, Path], alexnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lpips")
    out = tmp_path / "comparison.json"
    files = [str(path) for path in records]
    main(["compare", *files, "--lpips-weights", str(alexnet), "--resamples", "50",
          "--out", str(out)])  # fmt: skip
    record = read_record(out, ComparisonRecord)
    expected = pairwise_measures(*records, lpips_weights=alexnet)["pair_lpips"]
    assert record.images["pair_lpips"] == expected and expected.value
    assert record.inputs["lpips"].sha256 == expected.details["weights_sha256"]
    assert "pair_lpips" in capsys.readouterr().out
    for weights, net in ((tmp_path / "none.pth", "alex"), (alexnet, "vgg")):
        arguments = ["--lpips-weights", str(weights), "--lpips-net", net]
        assert main(["compare", *files, *arguments]) == 1
        shown = capsys.readouterr()
        assert f"error: {weights}" in shown.err and shown.out == ""


def test_equal_pictures_and_missing_weights_say_so(records: tuple[Path, Path]) -> None:
    made = pairwise_measures(records[0], records[0], resamples=50)
    assert made["pair_identical_rate"].value == 1.0
    assert made["pair_psnr"].not_measured == "all 6 pairs are identical"
    assert "weights" in (made["pair_lpips"].not_measured or "")
    assert made["pair_cosine_lite0"].value == pytest.approx(1.0)


def test_features_and_images_are_those_that_were_measured(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in records:
        shutil.copy(path, tmp_path / path.name)
        shutil.copytree(path.with_suffix(""), tmp_path / path.stem)
        (tmp_path / path.stem / "features.npz").unlink()
    again = pairwise_measures(tmp_path / "a.json", tmp_path / "b.json", resamples=50)
    kept = pairwise_measures(*records, resamples=50)
    assert again["pair_cosine_lite0"].value == pytest.approx(
        kept["pair_cosine_lite0"].value, abs=1e-5
    )
    replaced = next((tmp_path / "b" / "samples").rglob("*.png"))
    kept_bytes = replaced.read_bytes()
    replaced.write_bytes(encode_png(np.zeros((32, 32, 3), np.uint8)))
    for measure in (pair_images, pairwise_measures, compare_images, open_side):
        with pytest.raises(IntegrityError, match=f"{replaced.name}: changed since it was measured"):
            measure(*[tmp_path / "b.json"] * (1 if measure is open_side else 2))
    both = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert main(["compare", *both]) == 1
    assert main(["abtest", "build", *both, "--out", str(tmp_path / "study")]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("changed since it was measured") == 2 and not shown.out
    assert not (tmp_path / "study").exists()
    replaced.write_bytes(kept_bytes)
    gone = next((tmp_path / "a" / "samples").rglob("*.png"))
    gone.unlink()
    with pytest.raises(EvaluationError, match=r"\.png: an image of .* is gone"):
        pair_images(tmp_path / "a.json", tmp_path / "b.json")
