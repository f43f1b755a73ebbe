"""Checkpoints open without running what lies in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_pipelines
from modelops.base.errors import UsageError
from modelops.base.files import sha256_bytes
from modelops.models import sources
from modelops.models.pipeline import PixelFlowPipeline
from modelops.models.pipelines.signatures import Signature
from modelops.models.request import ImageRequest
from modelops.models.sources import (
    CPU_ROWS,
    PipelineSource,
    load_checkpoint,
    open_checkpoint,
    pipeline_code,
)
from modelops.records.evaluation import SourceInfo

HARMFUL = b"raise SystemExit('the directory was run')\n"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_other_code_is_refused(checkpoint: Path) -> None:
    (checkpoint / "pipeline.py").write_bytes(HARMFUL)
    with pytest.raises(UsageError, match="custom code that this modelops did not write"):
        load_checkpoint(checkpoint)


def test_an_earlier_pipelines_checkpoint_runs_this_ones(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "pipeline.py").write_bytes(HARMFUL)
    monkeypatch.setattr(sources, "EARLIER_PIPELINES", (sha256_bytes(HARMFUL),))
    assert type(load_checkpoint(checkpoint)) is PixelFlowPipeline


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_said_in_one_line(checkpoint: Path, part: str) -> None:
    shutil.rmtree(checkpoint / part)
    with pytest.raises(UsageError, match="cannot be loaded as a checkpoint") as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"unet": ["os", "system"]}', '{"unet": ["diffusers", "no"]}']
)
def test_a_spoilt_index_is_said_in_one_line(checkpoint: Path, index: str) -> None:
    (checkpoint / "model_index.json").write_text(index)
    with pytest.raises(UsageError, match=r"cannot be loaded as a checkpoint|index\.json: not JSON"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("guidance", [-3.0, -1e-9, 0.01, 0.5, 0.999, float("nan"), float("inf")])
def test_guidance_that_means_nothing_is_refused(guidance: float) -> None:
    with pytest.raises(UsageError, match="guidance"):
        ImageRequest(prompt="x", seed=0, guidance=guidance)


def test_guidance_has_decimals_that_every_reader_keeps() -> None:
    request = ImageRequest(prompt="x", seed=0, guidance=7.9338529193622715)  # a 503, once
    assert request.guidance == 7.933853
    assert ImageRequest(prompt="x", seed=0, guidance=4).guidance == 4.0


def test_guidance_0_and_1_are_both_off(tiny_checkpoint: Path) -> None:
    source = open_checkpoint(tiny_checkpoint)
    off, one, on = (
        source.generate([ImageRequest(prompt="red heart", seed=3, steps=2, guidance=value)])[0]
        for value in (0.0, 1.0, 4.0)
    )
    assert np.array_equal(off, one)
    assert not np.array_equal(off, on)


def test_the_own_pipeline_has_the_same_rule_for_guidance(tiny_checkpoint: Path) -> None:
    pipeline = load_checkpoint(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)

    def make(scale: float) -> np.ndarray:
        noise = torch.Generator("cpu").manual_seed(3)
        return pipeline(
            "red heart", guidance_scale=scale, num_inference_steps=2, generator=noise,
            output_type="np",
        ).images  # fmt: skip

    assert np.array_equal(make(0), make(1))
    assert not np.array_equal(make(0), make(4))
    for scale in (-3, 0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"guidance_scale {scale}: must be 0 or 1"):
            make(scale)


def test_checkpoints_of_the_last_pipeline_still_open() -> None:
    """Their digest is known, and the present pipeline has another."""
    assert sha256_bytes(pipeline_code()) not in sources.EARLIER_PIPELINES
    assert "d2c54cecae40645b5c946dcf403734c11ddf5a2965370693ef0b5e065d3214d4" in (
        sources.EARLIER_PIPELINES
    )


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_an_image_is_diffusers_own_of_the_same_call(family: str) -> None:
    """What the user did not give is not passed: SDXL takes zeros for no negative prompt."""
    pipeline = tiny_pipelines.make(family)
    info = SourceInfo(kind="checkpoint", uri=family, runtime="torch-cpu")
    source = PipelineSource(pipeline, info)
    request = ImageRequest(prompt="red heart", seed=5, steps=2, guidance=5.0, height=32, width=32)
    made = source.generate([request])[0]
    expected = pipeline(
        ["red heart"] * CPU_ROWS, num_inference_steps=2, guidance_scale=5.0, height=32, width=32,
        generator=[torch.Generator("cpu").manual_seed(5) for _ in range(CPU_ROWS)],
        output_type="np",
    ).images[0]  # fmt: skip
    # A grey level where threads sum in another order; another call was 28 to 49 levels away.
    assert np.abs(made.astype(int) - np.rint(expected * 255)).max() <= 1


@pytest.mark.parametrize(
    ("family", "side", "said"),
    [
        ("sd", 28, "divisible by 8"),
        ("sd3", 104, "pos_embed_max_size"),
        ("flux", 30, "28x28 where 30x30|28x28 pixels where 30x30"),
    ],
)
def test_a_size_that_a_model_cannot_have_is_said_in_one_line(
    family: str, side: int, said: str
) -> None:
    pipeline = tiny_pipelines.make(family)
    source = PipelineSource(pipeline, SourceInfo(kind="checkpoint", uri=family, runtime="cpu"))
    request = ImageRequest(prompt="red heart", seed=5, steps=1, height=side, width=side)
    with pytest.raises(UsageError, match=said) as caught:
        source.generate([request])
    assert "\n" not in caught.value.message and f"{side}x{side}" in caught.value.message


def test_the_size_that_was_asked_for_is_made_without_binning() -> None:
    pipeline = tiny_pipelines.make("pixart")
    source = PipelineSource(pipeline, SourceInfo(kind="checkpoint", uri="pixart", runtime="cpu"))
    request = ImageRequest(prompt="red heart", seed=5, steps=1, height=48, width=32)
    assert source.generate([request])[0].shape == (48, 32, 3)


def test_an_exported_table_of_positions_has_an_end() -> None:
    from modelops.export.runtimes.modules import ExportedModule

    class Doubling:
        device = "cpu"

        def run_all(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [2 * feed["sample"]]

    signature = Signature(
        method="forward", parameters=["sample"], arguments={"sample": {"tensor": "sample"}},
        output={"tensor": "output"}, inputs=["sample"], outputs=["output"], integers=[],
        booleans=[], batch=["sample"],
    )  # fmt: skip
    network = ExportedModule(
        {"forward": (Doubling(), signature)}, {"pos_embed_max_size": 24, "patch_size": 2},
        class_name="SD3Transformer2DModel",
    )  # fmt: skip
    assert network(torch.ones(1, 4, 48, 8)).shape == (1, 4, 48, 8)
    with pytest.raises(UsageError, match="25 patches on a side; SD3Transformer2DModel has 24"):
        network(torch.ones(1, 4, 8, 50))
