"""DINOv2 features against transformers' own pipeline, on small random weights of the real class."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modelops.base.errors import IntegrityError, MissingWeightsError
from modelops.metrics.dinov2 import Dinov2Extractor


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    directory = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, initializer_range=0.5,
        )
    ).save_pretrained(directory)  # fmt: skip
    BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(directory)
    return directory


def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = [(28, 28), (40, 64), (100, 30), (17, 17), (64, 64)]
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def test_features_are_those_of_transformers_one_by_one(weights: Path) -> None:
    from transformers import AutoImageProcessor, Dinov2Model

    model = Dinov2Model.from_pretrained(weights).eval()
    processor = AutoImageProcessor.from_pretrained(weights)
    expected = []
    for picture in pictures():
        with torch.no_grad():
            inputs = processor(Image.fromarray(picture), return_tensors="pt")
            expected.append(model(**inputs).pooler_output[0].numpy())
    extractor = Dinov2Extractor(weights, batch_size=2)
    counted: list[int] = []
    features = extractor.images_to_features(iter(pictures()), on_progress=counted.append)
    assert features.shape == (5, extractor.dim) and features.dtype == np.float32
    assert features == pytest.approx(np.array(expected), rel=1e-4, abs=1e-4)
    assert np.ptp(features, axis=0).max() > 0.1, "images differ"
    assert counted == [2, 4, 5]
    assert Dinov2Extractor(weights).images_to_features([]).shape == (0, extractor.dim)


def test_what_is_not_whole_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="no such directory"):
        Dinov2Extractor(tmp_path / "none")
    with pytest.raises(MissingWeightsError, match="no weights"):
        Dinov2Extractor(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    tensors = load_file(weights / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="missing keys"):
        Dinov2Extractor(tmp_path)


def test_files_that_are_overwritten_later_change_no_feature(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "own")
    extractor = Dinov2Extractor(tmp_path / "own")
    before = extractor.images_to_features(pictures())
    path = tmp_path / "own" / "model.safetensors"
    with path.open("r+b") as stream:  # in place, as rsync --inplace writes
        stream.seek(path.stat().st_size // 2)
        stream.write(bytes(1000))
    assert (extractor.images_to_features(pictures()) == before).all()
    assert Dinov2Extractor(tmp_path / "own").protocol != extractor.protocol
