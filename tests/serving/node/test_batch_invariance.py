"""What a release states of images made in batches is what its engine does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modelops.base.pixels import pixels_sha256
from modelops.serving.node.batch_invariance import measure_batch_invariance, release_proofs
from modelops.serving.node.golden import golden_request
from zoo.all import family


def test_batches_are_measured_beside_alone_and_offline(tiny_checkpoint: Path) -> None:
    said = measure_batch_invariance(tiny_checkpoint, pictures=6)
    assert said["runtime"] == "torch-cpu"
    assert said["pictures"] == 6
    assert said["widest_rows"] >= 6  # three guided images take two rows each
    for beside in ("company", "offline"):
        assert said[beside]["max_difference"] <= 2
        assert (said[beside]["identical"] == 6) == (said[beside]["max_difference"] == 0)


def test_a_pipeline_that_depends_on_its_batch_is_found_out(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelops.models.pipeline import PixelFlowPipeline

    inner = PixelFlowPipeline.predict_velocity

    def depends(self: PixelFlowPipeline, latents: object, *rest: object) -> object:
        return inner(self, latents, *rest) * (1.0 + 0.02 * len(latents))  # type: ignore[arg-type]

    monkeypatch.setattr(PixelFlowPipeline, "predict_velocity", depends)
    said = measure_batch_invariance(tiny_checkpoint, pictures=4)
    assert said["company"]["identical"] < 4
    assert said["company"]["max_difference"] > 2


def test_release_proofs_follow_the_defaults(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said, files = release_proofs(tiny_checkpoint, tmp_path, steps=3, guidance=2.0)
    assert set(said) == {"golden", "company"}
    picture = np.asarray(Image.open(files["golden.png"]).convert("RGB"))
    assert pixels_sha256(picture) == said["golden"]["pixels_sha256"]
    request = golden_request({"golden": said["golden"], "steps": 3, "guidance": 2.0})
    assert (request.steps, request.guidance) == (3, 2.0)


def test_a_pipeline_of_classes_has_a_golden_image_of_a_class(tmp_path: Path) -> None:
    family("DiT").make().save_pretrained(tmp_path / "dit")
    said, _ = release_proofs(tmp_path / "dit", tmp_path, steps=2)
    assert said["golden"]["prompt"] == "0"
    assert said["company"]["company"]["max_difference"] <= 1
