"""INT8: the rules of the graph, the images, the proof, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from modelops.base.errors import ExportError, IntegrityError, UsageError
from modelops.export.artifact.directory import GRAPH, denoiser_of, read_artifact
from modelops.export.artifact.layers import searched_layers
from modelops.export.artifact.open import open_artifact
from modelops.export.calibration import collect_rows
from modelops.export.int8 import job, ortcpu
from modelops.export.int8.accept import require_faster
from modelops.export.int8.lint import lint_qdq
from modelops.export.int8.qdq import quantize_graph
from modelops.export.int8.ranges import Calibration
from modelops.export.int8.search import Decision, GroupCost
from modelops.export.parity import BOUNDS, psnr_db, require_parity
from modelops.export.source import component_from, load_source
from modelops.export.to_int8 import Int8Options, export_int8, refused_record
from modelops.models.request import ImageRequest
from modelops.models.sources import open_checkpoint
from modelops.records.base import Measurement
from modelops.records.export import ArtifactRecord, ParityCheck
from modelops.records.read import read_record


def test_the_graph_keeps_every_rule(int8_artifact: Path) -> None:
    path = int8_artifact / "unet" / GRAPH
    onnx.checker.check_model(str(path), full_check=True)
    assert lint_qdq(path) == []
    component = next(c for c in read_artifact(int8_artifact).components if c.name == "unet")
    assert component.quantized_nodes > 10
    assert component.precision == "int8"


def test_a_table_says_what_each_layer_runs_in(int8_artifact: Path) -> None:
    record = read_artifact(int8_artifact)
    search, kept = record.calibration["search"], record.calibration["keep_fp32"]
    rows = searched_layers(record)
    rest = {"float32": "fp32", "bfloat16": "bf16"}[search["precision"]]
    assert [row["group"] for row in rows] == [row["group"] for row in search["table"]]
    assert [row["group"] for row in rows if row["runs_in"] == rest] == kept
    assert {row["runs_in"] for row in rows} <= {"int8", rest}
    late = next(row["group"] for row in rows if row["runs_in"] == "int8")
    calibration = {**record.calibration, "keep_fp32": [*kept, late]}
    given_up = searched_layers(record.model_copy(update={"calibration": calibration}))
    changed = [(one, other) for one, other in zip(rows, given_up, strict=True) if one != other]
    assert [(one["group"], other["runs_in"], other["why"]) for one, other in changed] == [
        (late, rest, "given up for parity")
    ]
    assert searched_layers(record.model_copy(update={"calibration": {}})) == []


def test_weights_are_stored_in_a_byte(int8_artifact: Path, onnx_artifact: Path) -> None:
    record, fp32 = read_artifact(int8_artifact), read_artifact(onnx_artifact)
    size = {c.name: c.bytes for c in record.components}
    assert size["unet"] < 0.5 * {c.name: c.bytes for c in fp32.components}["unet"]
    text = int8_artifact / "text_encoder" / GRAPH
    assert text.read_bytes() == (onnx_artifact / "text_encoder" / GRAPH).read_bytes()


def test_the_record_says_what_was_measured(int8_artifact: Path) -> None:
    record = read_artifact(int8_artifact)
    assert record.format == "int8"
    assert record.calibration["timesteps"] == 6
    groups = {row["group"]: row for row in record.calibration["search"]["table"]}
    kept = [name for name, row in groups.items() if row["decision"] == "fp32"]
    assert set(kept) <= set(record.calibration["keep_fp32"]) < set(groups)
    assert set(record.calibration["sensitivity"]["groups"]) <= set(groups)
    assert (int8_artifact / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    assert len(record.error_by_noise) >= 4
    assert record.calibration["sigma_max"] > 0.9
    assert record.calibration["sigma_min"] < 0.3
    assert record.execution[record.runtime]["int8_layers"] > 0
    pictures = [c for c in record.parity if c.measure == "psnr_db"]
    assert pictures
    assert all(c.passed and c.value >= 28 for c in pictures)
    for measurement in record.speed.values():
        assert measurement.low is not None
        assert measurement.value is not None
        assert measurement.low <= measurement.value
    assert {"denoiser_batch1_over_torch_eager", "denoiser_batch8_over_onnxruntime_fp32"} <= set(
        record.speed
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_pictures_in_both_runtimes(
    int8_artifact: Path, tiny_checkpoint: Path, runtime: str
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    requests = [ImageRequest(prompt=text, seed=7, steps=4) for text in ("a fish", "green apple")]
    expected = open_checkpoint(tiny_checkpoint, batch_size=2).generate(requests)
    source = open_artifact(int8_artifact, runtime=runtime, batch_size=2)
    images = source.generate(requests)
    assert source.info.precision.startswith("int8+")
    assert psnr_db(np.stack(expected) / 255, np.stack(images) / 255) >= 28


def test_an_image_does_not_depend_on_its_company(int8_artifact: Path) -> None:
    source = open_artifact(int8_artifact, batch_size=4)
    one = ImageRequest(prompt="dog", seed=1, steps=2)
    two = ImageRequest(prompt="house", seed=2, steps=2)
    alone = source.generate([one])[0]
    assert np.array_equal(source.generate([two, one, two])[1], alone)


def test_refusals(
    int8_artifact: Path, onnx_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no prompts"):
        export_int8(onnx_artifact, tiny_checkpoint, out, prompts=[])
    with pytest.raises(UsageError, match="blank"):
        export_int8(onnx_artifact, tiny_checkpoint, out, prompts=["a", "  "])
    with pytest.raises(UsageError, match="int8 artifact"):
        export_int8(int8_artifact, tiny_checkpoint, out)
    with pytest.raises(UsageError, match="already exists"):
        export_int8(onnx_artifact, tiny_checkpoint, int8_artifact)
    with pytest.raises(UsageError, match="unknown method"):
        Int8Options(method="guess")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="error budget"):
        Int8Options(error_budget=1.5)
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    (other / "note.txt").write_text("another checkpoint")
    with pytest.raises(IntegrityError, match="was not exported from"):
        export_int8(onnx_artifact, other, out)
    assert not out.exists()


@pytest.mark.slow
def test_layers_are_given_up_until_the_outputs_are_within_bounds(
    int8_artifact: Path,
    onnx_artifact: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def worst(record: ArtifactRecord) -> float:
        return max(c.value for c in record.parity if c.measure == "max_relative_error")

    before = read_artifact(int8_artifact)
    tighter = dataclasses.replace(BOUNDS["int8"], relative=0.7 * worst(before))
    monkeypatch.setattr(job, "available_runtimes", lambda: ["onnxruntime"])  # opens in no time
    monkeypatch.setitem(BOUNDS, "int8", tighter)
    after = export_int8(
        onnx_artifact, tiny_checkpoint, tmp_path / "int8",
        options=Int8Options(
            steps=4, rows=16, speed_rounds=0, search_seconds=2, ort_cpu=False
        ),
        allow=True,  # its speed is not measured
    )  # fmt: skip
    assert "outside parity" not in (after.error or "")
    assert worst(after) <= tighter.relative
    assert len(after.calibration["keep_fp32"]) > len(before.calibration["keep_fp32"])


@pytest.mark.slow
def test_int8_that_no_runtime_here_runs_is_refused(
    onnx_artifact: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"int8_layers": 0, "layers_total": 9, "layers": {"Conv": 9}, "float_layers": []}
    monkeypatch.setattr(job, "available_runtimes", lambda: ["onnxruntime"])
    monkeypatch.setattr(job, "onnxruntime_execution", lambda path: nothing)  # as of all-Conv nets
    options = Int8Options(steps=2, rows=8, speed_rounds=0, search_seconds=0, ort_cpu=False)
    with pytest.raises(ExportError, match="onnxruntime runs no layer"):
        export_int8(onnx_artifact, tiny_checkpoint, tmp_path / "int8", options=options, allow=True)
    assert not (tmp_path / "int8").exists()


@pytest.mark.slow
def test_what_onnxruntime_opens_is_what_was_compared_in_it(
    onnx_artifact: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_it(variants: Any, target: Path, calibration: Calibration, **more: Any) -> Any:
        ortcpu.write_ort_cpu(variants.source, target, calibration)
        return {"kept": "conv+matmul", "why": "kept whatever it costs", "kinds": {}}

    monkeypatch.setattr(job, "available_runtimes", lambda: ["onnxruntime"])
    monkeypatch.setattr(ortcpu, "judge_ort_cpu", keep_it)  # so small a network decides by luck
    options = Int8Options(steps=4, rows=16, speed_rounds=0, search_seconds=2)
    out = tmp_path / "int8"
    record = export_int8(onnx_artifact, tiny_checkpoint, out, options=options, allow=True)
    assert record.runtime == "onnxruntime"
    assert record.execution["onnxruntime"]["int8_layers"] > 0
    assert "unet/model.ort-cpu.onnx" in record.files
    assert {c.name for c in record.parity} >= {"images/onnxruntime", "unet/batch8/onnxruntime"}
    assert open_artifact(out, runtime="onnxruntime").info.precision == "int8+float32"


def test_an_error_above_its_budget_is_refused(
    onnx_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = Int8Options(
        steps=2, rows=8, speed_rounds=0, search_seconds=0, error_budget=1e-6, ort_cpu=False
    )
    with pytest.raises(ExportError, match="above the budget of 1e-06") as caught:
        export_int8(
            onnx_artifact, tiny_checkpoint, tmp_path / "int8", prompts=["dog"], options=options
        )
    assert "not timed" in caught.value.message  # the table of why
    assert not (tmp_path / "int8").exists()
    record = read_record(refused_record(tmp_path / "int8"), ArtifactRecord)  # what was measured
    assert record.status == "refused"
    assert record.error == caught.value.message
    assert record.calibration["error"] > 1e-6
    assert record.calibration["search"]["table"]
    assert {check.measure for check in record.parity} >= {"max_relative_error", "psnr_db"}
    assert record.inputs["checkpoint"].sha256 == read_artifact(onnx_artifact).inputs[
        "checkpoint"
    ].sha256  # fmt: skip


def ratio(value: float, low: float, high: float) -> Measurement:
    return Measurement(value=value, low=low, high=high, n=9)


def test_int8_that_is_not_surely_faster_is_refused() -> None:
    table = [Decision(GroupCost("resnets", 3, 0.04, 0.5, 0.4, 0.6), int8=True, why="faster")]
    fast, unsure, slow = ratio(2.0, 1.8, 2.2), ratio(1.1, 0.8, 1.5), ratio(0.7, 0.6, 0.8)
    speed = {
        "denoiser_batch1_over_onnxruntime_fp32": unsure,  # at one row it may be level
        "denoiser_batch8_over_onnxruntime_fp32": fast,
        "denoiser_batch8_over_openvino_fp32": fast,
        "denoiser_batch8_over_openvino_bf16": slow,  # not what it replaces
    }
    assert require_faster(speed, table, allow=False) is None
    for batch, ratio_there in ((8, unsure), (8, slow), (1, slow)):
        name = f"denoiser_batch{batch}_over_onnxruntime_fp32"
        with pytest.raises(ExportError, match=f"onnxruntime_fp32 at batch {batch}") as caught:
            require_faster(speed | {name: ratio_there}, table, allow=False)
        assert "resnets" in caught.value.message
        waived = require_faster(speed | {name: ratio_there}, table, allow=True)
        assert waived is not None
        assert f"at batch {batch}, kept by --allow" in waived
    with pytest.raises(ExportError, match="its speed was not measured"):
        require_faster({}, table, allow=False)


def test_parity_fails_closed() -> None:
    failed = ParityCheck(name="images/x", measure="psnr_db", value=20, bound=28, passed=False, n=4)
    with pytest.raises(ExportError, match="images/x psnr_db 20"):
        require_parity([failed], allow=False)
    assert "--allow" in (require_parity([failed], allow=True) or "")
    assert require_parity([failed.model_copy(update={"passed": True})], allow=False) is None


def test_calibration_rows_depend_on_the_seed_alone(
    onnx_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pipeline = load_source(tiny_checkpoint).pipeline
    unet = denoiser_of(read_artifact(onnx_artifact))
    denoiser = component_from(pipeline, onnx_artifact / "unet", unet)
    first, again, other = (
        collect_rows(pipeline, denoiser, prompts=["dog", "red heart"], seed=seed, steps=4, rows=16)
        for seed in (0, 0, 1)
    )
    assert first.record == again.record
    assert first.record["inputs_sha256"] != other.record["inputs_sha256"]
    assert len(first) == 16
    counts = np.unique(first.sigmas, return_counts=True)[1]
    assert counts.tolist() == [4, 4, 4, 4]
    seen = {float(s) for feed in first.batches(4) for s in feed["timestep"]}
    assert len(seen) == 4
    # the same rows give the same graph, byte for byte, with and without the table at hand
    source, table = onnx_artifact / "unet" / GRAPH, tmp_path / "table.json"
    for name in ("a.onnx", "b.onnx"):
        quantize_graph(source, tmp_path / name, Calibration(first, table))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def _break(model: Any, what: str) -> None:
    graph = model.graph
    arrays = {item.name: item for item in graph.initializer}
    first = next(n for n in graph.node if n.op_type == "QuantizeLinear")
    weight = next(n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in arrays)
    if what == "zero point":
        arrays[first.input[2]].CopyFrom(
            onnx.numpy_helper.from_array(np.array(3, np.int8), first.input[2])
        )
    elif what == "scale":
        arrays[first.input[1]].CopyFrom(
            onnx.numpy_helper.from_array(np.array(0, np.float32), first.input[1])
        )
    elif what == "axis":
        next(a for a in weight.attribute if a.name == "axis").i = 1
    elif what == "output":
        pair = next(n for n in graph.node if n.op_type == "DequantizeLinear" and n is not weight
                    and n.input[0] not in arrays)  # fmt: skip
        graph.node.append(onnx.helper.make_node("Relu", [pair.output[0]], ["r"], name="relu"))
    elif what == "opset":
        next(entry for entry in model.opset_import if not entry.domain).version = 21


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("zero point", "zero point is not 0"),
        ("scale", "not finite and positive"),
        ("axis", "wrong axis|every output channel"),
        ("output", "not quantised"),
        ("opset", "above 20"),
    ],
)
def test_the_lint_sees_each_broken_rule(
    int8_artifact: Path, tmp_path: Path, what: str, message: str
) -> None:
    import re

    model = onnx.load(str(int8_artifact / "unet" / GRAPH))
    _break(model, what)
    onnx.save(model, str(tmp_path / "broken.onnx"))
    faults = lint_qdq(tmp_path / "broken.onnx")
    assert faults
    assert any(re.search(message, fault) for fault in faults)


def test_auto_takes_a_runtime_that_gives_the_numbers(int8_artifact: Path) -> None:
    info = open_artifact(int8_artifact, batch_size=1).info
    record = read_artifact(int8_artifact)
    right = {f"{one.runtime}-cpu" for one in record.reproduced if one.passed}
    assert info.runtime in right
    assert info.precision.startswith("int8+")
