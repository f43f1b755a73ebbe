"""Inception against clean-fid's and torch-fidelity's own code, on one random set of weights."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import inception_peers as peers
from modelops.base.errors import EvaluationError, IntegrityError, MissingWeightsError, UsageError
from modelops.evaluation.settings import EXTRACTOR_DTYPES, FID_MODES
from modelops.metrics.features import in_threads
from modelops.metrics.frechet import features_to_frechet_distance
from modelops.metrics.inception import DTYPES, InceptionExtractor, logits_to_inception_score
from modelops.metrics.inception_resize import MODES, clean, legacy_pytorch, legacy_tensorflow
from modelops.metrics.kernel import kernel_distance
from modelops.metrics.prdc import prdc

COUNT = 4


@dataclass(frozen=True)
class Lab:
    weights: Path
    first: Path
    second: Path

    def features(self, folder: Path, count: int | None = None, **settings: Any) -> Any:
        files = peers.picture_files(folder)[:count]
        extractor = InceptionExtractor(self.weights, **settings)
        return extractor.images_to_features(peers.read_as_peers(path) for path in files)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Random weights, and two folders of drawings: mixed sizes, RGBA, grey, PNG and JPEG."""
    root = tmp_path_factory.mktemp("inception")
    first = peers.write_pictures(root / "first", COUNT)
    second = peers.write_pictures(root / "second", COUNT, offset=1000)
    chosen = peers.picture_files(first)[::2] + peers.picture_files(second)[1:2]
    return Lab(peers.random_weights(root / "weights", calibration=chosen), first, second)


def assert_features_agree(ours: Any, theirs: Any) -> None:
    """To float32's rounding, carried through 94 layers of random weights."""
    assert ours.shape == theirs.shape
    assert theirs.std(axis=0).mean() > 0.01  # images differ, so there is something to get wrong
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=5e-4)


def test_the_clean_mode_agrees_with_clean_fid(lab: Lab, tmp_path: Path) -> None:
    from cleanfid.fid import kernel_distance as their_kernel_distance

    archive = peers.write_torchscript(lab.weights, tmp_path)
    model = peers.cleanfid_model("clean", lab.weights, archive)
    x, y = lab.features(lab.first), lab.features(lab.second)
    their_x, their_y = (
        peers.cleanfid_features(folder, "clean", model, batch_size=4)
        for folder in (lab.first, lab.second)
    )
    assert_features_agree(x, their_x)
    assert_features_agree(y, their_y)
    some = slice(None, None, 512)  # four columns: their sqrtm wants more images than dimensions
    ours = features_to_frechet_distance(x[:, some], y[:, some])
    assert ours == pytest.approx(
        peers.cleanfid_frechet(their_x[:, some], their_y[:, some]), rel=1e-4
    )
    theirs = their_kernel_distance(their_x.astype(float), their_y.astype(float), num_subsets=1)
    assert kernel_distance(x, y).value == pytest.approx(theirs, rel=1e-4, abs=1e-5)

    # clean-fid's archive in our hands: the same features, and the same classifier.
    from_archive = InceptionExtractor(archive)
    few = peers.picture_files(lab.first)[:1]
    made = from_archive.images_to_features(peers.read_as_peers(path) for path in few)
    np.testing.assert_allclose(made, x[:1], rtol=1e-3, atol=5e-4)
    np.testing.assert_array_equal(
        from_archive.features_to_logits(x), InceptionExtractor(lab.weights).features_to_logits(x)
    )


def test_the_pytorch_mode_agrees_with_clean_fid(lab: Lab, tmp_path: Path) -> None:
    few = peers.write_pictures(tmp_path, 2, offset=300)
    model = peers.cleanfid_model("legacy_pytorch", lab.weights)
    theirs = peers.cleanfid_features(few, "legacy_pytorch", model)
    ours = lab.features(few, mode="legacy_pytorch")
    assert_features_agree(ours, theirs)


def test_the_tensorflow_mode_agrees_with_torch_fidelity(lab: Lab) -> None:
    pytest.importorskip("torch_fidelity")
    theirs = peers.fidelity_metrics(
        lab.first, lab.second, lab.weights, isc=True, isc_splits=2, kid=True, kid_subsets=1,
        kid_subset_size=COUNT, prc=True, prc_neighborhood=3, save_cpu_ram=True,
    )  # fmt: skip
    generated = lab.features(lab.first, mode="legacy_tensorflow")
    real = lab.features(lab.second, mode="legacy_tensorflow")
    kid = kernel_distance(generated, real).value
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4, abs=1e-5)
    spheres = prdc(real, generated, seed=0, neighbours=3)
    assert spheres["precision"].value == pytest.approx(theirs["precision"])
    assert spheres["recall"].value == pytest.approx(theirs["recall"])
    extractor = InceptionExtractor(lab.weights)
    score = logits_to_inception_score(
        extractor.features_to_logits(generated), splits=2,
        order=np.random.RandomState(2020).permutation(COUNT),
    )  # fmt: skip
    assert score.value == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


@pytest.mark.slow
def test_fid_agrees_with_torch_fidelity(lab: Lab) -> None:
    pytest.importorskip("torch_fidelity")
    theirs = peers.fidelity_metrics(
        lab.first, lab.second, lab.weights, fid=True, save_cpu_ram=True
    )  # fmt: skip
    ours = features_to_frechet_distance(
        lab.features(lab.first, mode="legacy_tensorflow"),
        lab.features(lab.second, mode="legacy_tensorflow"),
    )
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_batches_and_file_formats_do_not_change_the_network(lab: Lab, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = lab.features(lab.first, 2)
    np.testing.assert_allclose(
        lab.features(lab.first, 2, batch_size=1), whole, rtol=1e-3, atol=5e-4
    )
    copy = tmp_path / "inception.safetensors"
    save_file(torch.load(lab.weights, weights_only=True), copy)
    first = peers.read_as_peers(peers.picture_files(lab.first)[0])
    plain = InceptionExtractor(lab.weights).images_to_features([first])
    np.testing.assert_array_equal(InceptionExtractor(copy).images_to_features([first]), plain)
    assert InceptionExtractor(lab.weights).images_to_features([]).shape == (0, 2048)


@pytest.mark.slow
def test_double_precision_audits_single(lab: Lab) -> None:
    single = lab.features(lab.first, 2)
    double = lab.features(lab.first, 2, dtype="float64")
    assert double.dtype == np.float32
    assert 0 < np.abs(double - single).max() < 1e-3


def test_batch_norms_are_folded_exactly() -> None:
    """In float64 the folded network is the plain one."""
    from torchvision.models.inception import BasicConv2d

    from modelops.metrics.inception import fold_batch_norms

    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        BasicConv2d(3, 8, kernel_size=3), BasicConv2d(8, 4, kernel_size=1)
    ).double()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.2, 2.0)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.1, 3.0)
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        before = plain.eval()(images)
        fold_batch_norms(plain)
        torch.testing.assert_close(plain(images), before, rtol=1e-12, atol=1e-12)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())


@pytest.mark.parametrize("shape", [(31, 47), (299, 299), (640, 410), (1, 1)])
def test_resizing_is_that_of_the_references(shape: tuple[int, int]) -> None:
    from cleanfid.resize import build_resizer

    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(clean(image), build_resizer("clean")(image).transpose(2, 0, 1))
    with peers.quiet():
        theirs = build_resizer("legacy_pytorch")(image).transpose(2, 0, 1)
    np.testing.assert_allclose(legacy_pytorch(image), theirs, atol=2e-3)


def test_a_ramp_shows_where_the_samples_lie() -> None:
    """On a ramp, bilinear resampling returns the positions themselves."""
    width = 64
    ramp = np.repeat(np.arange(width, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(5, axis=0)
    places = np.arange(299)
    corner = np.minimum(places * width / 299, width - 1)
    centre = np.clip((places + 0.5) * width / 299 - 0.5, 0, width - 1)
    np.testing.assert_allclose(legacy_tensorflow(ramp)[1, 100], corner, atol=1e-4)
    np.testing.assert_allclose(legacy_pytorch(ramp)[2, 299 - 1], centre, atol=1e-4)


def test_the_inception_score_of_known_distributions() -> None:
    sharp = np.full((40, 8), -60.0)
    sharp[np.arange(40), np.arange(40) % 8] = 60.0
    assert logits_to_inception_score(sharp, splits=5).value == pytest.approx(8)
    assert logits_to_inception_score(np.zeros((40, 8)), splits=5).value == pytest.approx(1)
    # One confident class everywhere has no diversity.
    assert logits_to_inception_score(sharp[:1].repeat(40, 0), splits=5).value == pytest.approx(1)
    # p(y|x) over two classes: half the images say (3/4, 1/4), half the reverse.
    soft = np.log(np.array([[0.75, 0.25], [0.25, 0.75]] * 20))
    divergence = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    found = logits_to_inception_score(soft, splits=10)
    assert found.value == pytest.approx(np.exp(divergence), rel=1e-12)
    assert found.low == pytest.approx(found.high)
    with pytest.raises(EvaluationError, match="19 images are too few for 10 splits"):
        logits_to_inception_score(np.zeros((19, 8)))
    with pytest.raises(EvaluationError, match="finite"):
        logits_to_inception_score(np.full((40, 8), np.nan))


def test_the_interval_of_the_score_is_that_of_the_mean_of_its_splits() -> None:
    from scipy.stats import t

    logits = np.random.default_rng(1).normal(size=(200, 12)) * 2
    scores = [
        logits_to_inception_score(logits[i : i + 20], splits=1).value for i in range(0, 200, 20)
    ]
    found = logits_to_inception_score(logits)
    low, high = t.interval(0.95, 9, loc=np.mean(scores), scale=np.std(scores, ddof=1) / 10**0.5)
    assert found.value == pytest.approx(np.mean(scores))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_weights_that_are_not_these_are_refused(lab: Lab, tmp_path: Path) -> None:
    image = [np.zeros((8, 8, 3), np.uint8)]
    with pytest.raises(MissingWeightsError, match="no such file"):
        InceptionExtractor(tmp_path / "absent.pth")
    state = torch.load(lab.weights, weights_only=True)
    cases: dict[str, Any] = {
        "lacks fc.bias": {k: v for k, v in state.items() if k != "fc.bias"},
        "has another.weight": state | {"another.weight": torch.zeros(1)},
        "size mismatch": state | {"fc.weight": torch.zeros(1000, 2048)},
        "not a state dict": {"weights": [1, 2]},
    }
    for message, content in cases.items():
        path = tmp_path / "inception.pth"
        torch.save(content, path)
        with pytest.raises(MissingWeightsError, match=message):
            InceptionExtractor(path).images_to_features(image)
    for name in ("inception-2015-12-05.pt", "inception.safetensors"):
        fake = tmp_path / name
        fake.write_bytes(b"not weights")
        with pytest.raises(MissingWeightsError, match="not the Inception"):
            InceptionExtractor(fake).images_to_features(image)
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    named.write_bytes(b"cut short")
    with pytest.raises(IntegrityError, match="expected 6726825d"):
        InceptionExtractor(named)
    with pytest.raises(IntegrityError, match="expected 000000"):
        InceptionExtractor(lab.weights, sha256="0" * 64)
    with pytest.raises(UsageError, match="'cleaner': one of clean, legacy_pytorch"):
        InceptionExtractor(lab.weights, mode="cleaner")
    with pytest.raises(UsageError, match="'bfloat16': one of float32, float64"):
        InceptionExtractor(lab.weights, dtype="bfloat16")


def test_an_extractor_names_all_that_its_features_depend_on(lab: Lab) -> None:
    protocols = [InceptionExtractor(lab.weights, mode=mode).protocol for mode in MODES]
    assert len({protocol["resize"] for protocol in protocols}) == 3
    assert InceptionExtractor(lab.weights, dtype="float64").protocol != protocols[0]
    assert {protocol["normalisation"] for protocol in protocols} == {
        "(x - 128) / 128", "2 x / 255 - 1",
    }  # fmt: skip
    assert "none of the published files" in InceptionExtractor(lab.weights).warnings[0]
    assert tuple(MODES) == FID_MODES
    assert DTYPES == EXTRACTOR_DTYPES


def test_threads_keep_the_order_and_do_not_run_ahead() -> None:
    taken = 0
    lock = threading.Lock()

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(50):
            with lock:
                taken += 1
            yield item

    made = in_threads(lambda x: x * x, items(), workers=3, ahead=5)
    for expected in range(50):
        assert next(made) == expected**2
        assert taken <= expected + 5
    with pytest.raises(StopIteration):
        next(made)

    def broken(item: int) -> int:
        raise EvaluationError(f"image {item}")

    with pytest.raises(EvaluationError, match="image 0"):
        list(in_threads(broken, range(9), workers=2, ahead=4))
