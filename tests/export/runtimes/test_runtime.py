"""An exported artifact makes the checkpoint's images, and refuses to be anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from modelops.base.errors import (
    ExportError,
    IntegrityError,
    MissingExtraError,
    NotReproducedError,
    UsageError,
)
from modelops.base.files import sha256_tree
from modelops.export.artifact import choice
from modelops.export.artifact.choice import choose_runtime
from modelops.export.artifact.directory import GRAPH, denoiser_of, read_artifact
from modelops.export.artifact.open import _placed, open_artifact
from modelops.export.graphs.graph import available_runtimes
from modelops.export.runtimes.onnxruntime import OrtGraph
from modelops.export.runtimes.open import open_graph
from modelops.export.runtimes.openvino import batch_bucket
from modelops.export.runtimes.probe import PROBE
from modelops.export.source import load_source
from modelops.export.to_onnx import export_onnx
from modelops.models.request import ImageRequest
from modelops.models.sources import open_checkpoint

REQUESTS = [
    ImageRequest(prompt=text, seed=seed, steps=3) for seed, text in enumerate(["red heart", "dog"])
]


def copy_of(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_same_pictures_as_the_checkpoint(
    onnx_artifact: Path, tiny_checkpoint: Path, runtime: str
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    expected = open_checkpoint(tiny_checkpoint, batch_size=2).generate(REQUESTS)
    source = open_artifact(onnx_artifact, runtime=runtime, batch_size=2)
    images = source.generate(REQUESTS)
    assert source.info.runtime.startswith(runtime)
    assert source.info.precision == "float32"
    assert source.defaults.height == 32
    for image, reference in zip(images, expected, strict=True):
        assert np.abs(image.astype(int) - reference.astype(int)).max() <= 1


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_in_numpy_have_the_bits_of_steps_in_torch(
    onnx_artifact: Path, prediction: str, guidance: float
) -> None:
    pipeline = open_artifact(onnx_artifact, runtime="onnxruntime").pipeline
    pipeline.register_to_config(prediction=prediction)
    steps: list[int] = []

    def make(**options: object) -> np.ndarray:
        generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipeline(
            ["red heart", "dog"], num_inference_steps=4, guidance_scale=guidance,
            negative_prompt="blue", generator=generator, output_type="np", **options,
        ).images  # fmt: skip

    def listen(pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        steps.append(step)
        return tensors

    in_numpy, in_torch = make(), make(callback_on_step_end=listen)
    assert steps == [0, 1, 2, 3]  # who listens to steps is given torch's
    assert np.array_equal(in_numpy, in_torch)


def test_an_exported_pipeline_says_where_its_graphs_compute(onnx_artifact: Path) -> None:
    """diffusers asks torch modules, of which it has none; latents would be made on the CPU."""
    pipeline = open_artifact(onnx_artifact, runtime="onnxruntime").pipeline
    assert pipeline._execution_device == torch.device("cpu")
    kind = type(pipeline)
    placed = _placed(pipeline, "meta")
    assert placed._execution_device == placed.device == torch.device("meta")
    assert isinstance(placed, kind) and type(placed).__name__ == kind.__name__


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_rows_at_different_noise_levels_do_not_see_each_other(
    onnx_artifact: Path, runtime: str
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    pipeline = open_artifact(onnx_artifact, runtime=runtime).pipeline
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 12, 16, 16, generator=generator)  # 5 rows are filled up to 6
    sigmas = torch.tensor([0.05, 0.3, 0.5, 0.8, 1.0])
    pooled, _, _ = pipeline.encode_prompt(["a", "b", "", "red heart", "d"])
    together = pipeline.predict_velocity(latents, sigmas, pooled)
    for row in range(5):
        alone = pipeline.predict_velocity(
            latents[row : row + 1], sigmas[row : row + 1], pooled[row : row + 1]
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_height_and_width_are_dynamic(onnx_artifact: Path, tiny_checkpoint: Path) -> None:
    request = [ImageRequest(prompt="dog", seed=3, steps=2, height=48, width=64)]
    image = open_artifact(onnx_artifact, runtime="onnxruntime", batch_size=1).generate(request)[0]
    expected = open_checkpoint(tiny_checkpoint, batch_size=1).generate(request)[0]
    assert image.shape == (48, 64, 3)
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1


def test_the_record_describes_the_directory(onnx_artifact: Path, tiny_checkpoint: Path) -> None:
    record = read_artifact(onnx_artifact)
    denoiser = denoiser_of(record)
    assert denoiser.attribute == "unet"
    assert [(c.name, c.role) for c in record.components] == [
        ("unet", "denoiser"), ("text_encoder", "text_encoder"),
    ]  # fmt: skip
    assert record.format == "onnx"
    assert denoiser.opset is not None
    assert denoiser.opset <= 20
    assert {"sample[0]=batch", "sample[2]=height", "timestep[0]=batch"} <= set(
        denoiser.dynamic_axes
    )
    assert record.inputs["checkpoint"].sha256 == sha256_tree(tiny_checkpoint)
    assert not Path(record.inputs["checkpoint"].path).is_absolute()
    assert all(check.passed for check in record.parity)
    names = {check.name.split("/")[1] for check in record.parity if "unet" in check.name}
    assert names == {"batch1", "batch2", "batch8"}
    relative = [c.value for c in record.parity if c.measure == "max_relative_error"]
    assert max(relative) <= 1e-4
    assert open_artifact(onnx_artifact).info.sha256 == sha256_tree(onnx_artifact)


def test_no_path_of_this_machine_is_in_a_graph(onnx_artifact: Path) -> None:
    for graph in onnx_artifact.rglob(GRAPH):
        assert str(Path(torch.__file__).parent).encode() not in graph.read_bytes()
        assert b"stack_trace" not in graph.read_bytes()


@pytest.mark.parametrize(
    "victim", ["unet/model.onnx", "tokenizer/tokenizer.json", "model_index.json", "pipeline.py"]
)
def test_one_changed_byte_is_refused(onnx_artifact: Path, tmp_path: Path, victim: str) -> None:
    artifact = copy_of(onnx_artifact, tmp_path / "artifact")
    path = artifact / victim
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="differs from its digest"):
        open_artifact(artifact)


def test_added_and_missing_files_are_refused(onnx_artifact: Path, tmp_path: Path) -> None:
    artifact = copy_of(onnx_artifact, tmp_path / "artifact")
    (artifact / "extra.py").write_text("")
    with pytest.raises(IntegrityError, match="is not in"):
        open_artifact(artifact)
    (artifact / "extra.py").unlink()
    (artifact / "unet" / "config.json").unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        open_artifact(artifact)


def test_an_unfinished_artifact_is_refused(onnx_artifact: Path, tmp_path: Path) -> None:
    artifact = copy_of(onnx_artifact, tmp_path / "artifact")
    (artifact / "artifact.json").unlink()
    with pytest.raises(UsageError, match="unfinished"):
        open_artifact(artifact)


def test_a_record_that_leads_outside_is_refused(onnx_artifact: Path, tmp_path: Path) -> None:
    artifact = copy_of(onnx_artifact, tmp_path / "artifact")
    record = json.loads((artifact / "artifact.json").read_text())
    record["components"][0]["file"] = "../secret"
    (artifact / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="outside"):
        open_artifact(artifact)


def test_bad_arguments(onnx_artifact: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batch size"):
        open_artifact(onnx_artifact, batch_size=0)
    with pytest.raises(UsageError, match="unknown runtime"):
        open_artifact(onnx_artifact, runtime="tensorflow")
    with pytest.raises(UsageError, match="as the graph says"):
        open_artifact(onnx_artifact, runtime="onnxruntime", precision="bfloat16")
    with pytest.raises(UsageError, match="does not run artifacts in onnx"):
        open_artifact(onnx_artifact, runtime="tensorrt")
    with pytest.raises(UsageError, match="no such directory"):
        open_artifact(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="already exists"):
        export_onnx(tiny_checkpoint, onnx_artifact)
    with pytest.raises(UsageError, match="not overwritten"):
        export_onnx(tiny_checkpoint, tiny_checkpoint, overwrite=True)
    with pytest.raises(UsageError, match="exported artifact"):
        export_onnx(onnx_artifact, tmp_path / "again")
    with pytest.raises(UsageError, match="not a diffusers checkpoint"):
        export_onnx(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="opset"):
        export_onnx(tiny_checkpoint, tmp_path / "out", opset=21)
    with pytest.raises(UsageError, match="no prompts"):
        export_onnx(tiny_checkpoint, tmp_path / "out", prompts=[])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = copy_of(tiny_checkpoint, tmp_path / "broken")
    weights = next((broken / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"not finite: conv_in\.weight"):
        load_source(broken)


def test_a_graph_that_is_not_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / GRAPH
    path.write_bytes(b"not a graph")
    with pytest.raises(ExportError, match="onnxruntime refuses"):
        OrtGraph(path)


def test_openvino_missing_names_the_way_out(
    onnx_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError) as caught:
        open_graph(onnx_artifact / "unet" / GRAPH, "openvino")
    assert "pip install" in (caught.value.hint or "")


def test_auto_takes_a_runtime_that_gives_the_numbers_here_and_stays_with_it(
    onnx_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    record = read_artifact(onnx_artifact)
    chosen = choose_runtime(onnx_artifact, record, "digest")
    assert chosen.runtime in available_runtimes()
    assert "parity" in chosen.reason
    assert chosen.error <= chosen.bound
    assert len(list((tmp_path / "cache/runtimes").iterdir())) == 1
    monkeypatch.setattr(choice, "_measure", lambda *a: pytest.fail("measured again"))
    assert choose_runtime(onnx_artifact, record, "digest") == chosen
    machine = choice.current_environment().model_copy(update={"accelerators": ["a new GPU"]})
    monkeypatch.setattr(choice, "current_environment", lambda: machine)
    with pytest.raises(pytest.fail.Exception, match="measured again"):  # another machine now
        choose_runtime(onnx_artifact, record, "digest")


def test_auto_refuses_when_no_runtime_gives_the_numbers(
    onnx_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    artifact = copy_of(onnx_artifact, tmp_path / "artifact")
    path = artifact / "unet" / PROBE
    arrays = load_file(path)
    save_file({**arrays, "output": arrays["output"] * 1.01}, path)
    with pytest.raises(NotReproducedError, match=r"off by 0\.0099"):
        choose_runtime(artifact, read_artifact(artifact), "other digest")


def test_the_runtime_it_was_made_for_is_left_only_for_a_clearly_faster_one() -> None:
    import time

    def waits(seconds: float) -> Callable[[], None]:
        return lambda: time.sleep(seconds)

    near = {"onnxruntime": waits(0.0105), "openvino": waits(0.010)}
    assert choice._fastest(near, "onnxruntime", [])[0] == "onnxruntime"
    far = {"onnxruntime": waits(0.03), "openvino": waits(0.005)}
    assert choice._fastest(far, "onnxruntime", [])[0] == "openvino"


def test_batches_are_filled_up_by_a_third_at_most() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17)] == [
        1, 2, 3, 4, 6, 8, 12, 16, 24,
    ]  # fmt: skip
    assert all(n <= batch_bucket(n) <= max(n, 1.5 * n) for n in range(1, 300))
