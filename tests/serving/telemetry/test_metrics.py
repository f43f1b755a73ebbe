"""What a node counts: fixed labels, series that exist from the start, and a Prometheus' opinion."""

from __future__ import annotations

import ast
import json
import math
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import modelops.serving
from modelops.base.files import sha256_tree, write_json
from modelops.records.evaluation import EvaluationRecord, SourceInfo
from modelops.records.release import ReleaseRecord
from modelops.serving.engine.jobs import StepReport
from modelops.serving.failures import EngineError, NodeError
from modelops.serving.telemetry.metrics import (
    CODES,
    FAULT_CODES,
    GpuMemory,
    NodeMetrics,
    evaluation_time,
)


def samples(metrics: NodeMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: NodeMetrics, series: str, /, **labels: str) -> float:
    return samples(metrics)[series, frozenset(labels.items())]


def test_no_input_makes_a_series() -> None:
    """Whatever arrives as a code, a reason, a phase or a format: the number of series stays."""
    metrics = NodeMetrics({"prompt": "words", "image": "open_nsfw"})

    def use(text: str) -> None:
        metrics.on_error(text)
        metrics.on_rejected(text)
        metrics.on_wasted(1, text)
        metrics.on_images(text, 1)
        metrics.on_phase(text, 0.1)

    use("first")
    before = len(samples(metrics))
    for number in range(200):
        use(f"made up {number}")
    assert len(samples(metrics)) == before
    assert value(metrics, "modelops_errors_total", code="other") == 201


def test_every_code_that_the_sources_raise_is_known() -> None:
    """An ApiError with a code of its own would be counted as `other` and escape its alert."""
    found = {NodeError.code, *(kind.code for kind in NodeError.__subclasses__())}
    found |= {kind.code for kind in EngineError.__subclasses__()}
    for path in Path(modelops.serving.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError":
                code = node.args[1] if len(node.args) > 1 else None
                found.update(_literals(code))
    assert {"rate_limit_exceeded", "generation_failed"} <= found <= CODES, found - CODES
    assert set(FAULT_CODES) <= found


def _literals(node: ast.AST | None) -> set[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.IfExp):
        return _literals(node.body) | _literals(node.orelse)
    return set()


def test_series_start_at_zero() -> None:
    """`increase()` does not see the first event of a series that appears together with it."""
    metrics = NodeMetrics({"prompt": "words", "image": "open_nsfw"})
    for name, labels in {
        "modelops_errors_total": {"code": "generation_failed"},
        "modelops_rejected_total": {"reason": "queue_full"},
        "modelops_wasted_steps_total": {"reason": "cancelled"},
        "modelops_filter_triggers_total": {"filter": "prompt", "name": "words"},
        "modelops_filter_failures_total": {"filter": "image", "name": "open_nsfw"},
        "modelops_images_total": {"output_format": "webp"},
        "modelops_log_lines_lost_total": {},
        "modelops_phase_seconds_count": {"phase": "decode"},
    }.items():
        assert value(metrics, name, **labels) == 0


def test_counts() -> None:
    metrics = NodeMetrics({"prompt": "words", "image": "open_nsfw"})
    metrics.on_step(StepReport(rows=6, requests=4, waiting=1, seconds=0.02))
    metrics.on_step(StepReport(rows=2, requests=1, waiting=0, seconds=0.02))
    metrics.on_filter("image", 3, blocked=True)
    assert value(metrics, "modelops_steps_total") == 5
    assert value(metrics, "modelops_batch_rows_sum") == 8
    assert value(metrics, "modelops_batch_rows_bucket", le="2.0") == 1
    image = {"filter": "image", "name": "open_nsfw"}
    assert value(metrics, "modelops_filter_checks_total", **image) == 3
    assert value(metrics, "modelops_filter_triggers_total", **image) == 1
    assert value(metrics, "process_resident_memory_bytes") > 1e7


def test_a_gauge_that_cannot_be_read_does_not_hide_the_others() -> None:
    class Broken:
        class settings:  # noqa: N801
            queue_limit = 7

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    metrics = NodeMetrics()
    metrics.watch(Broken())
    assert value(metrics, "modelops_queue_limit") == 7
    depth = value(metrics, "modelops_queue_depth")
    assert math.isnan(depth)


def test_promtool_finds_nothing_to_complain_about() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here (Debian: prometheus)")
    metrics = NodeMetrics()
    metrics.evaluated(1.0, every_days=30)
    done = subprocess.run(
        [promtool, "check", "metrics"], input=metrics.text(), capture_output=True, check=False
    )
    # "no help text" and the like go to stderr with exit code 3.
    assert done.returncode == 0, done.stdout + done.stderr


def test_gpu_series_are_absent_without_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert list(GpuMemory().collect()) == []


@pytest.mark.gpu
def test_gpu_memory() -> None:
    import torch

    held = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:0")
    (family,) = GpuMemory().collect()
    found = {sample.labels["kind"]: sample.value for sample in family.samples}
    assert held.numel() <= found["allocated"] <= found["reserved"] <= found["used"] < found["total"]


def _evaluation(path: Path, model: str, started: str, **fields: Any) -> str:
    record = EvaluationRecord(
        source=SourceInfo(kind="checkpoint", uri="model", sha256=model),
        started_at=datetime.fromisoformat(started), duration_s=60.0, **fields,
    )  # fmt: skip
    record.write(path)
    return path.name


def test_evaluation_time_is_of_this_very_model(tmp_path: Path, tiny_release: Path) -> None:
    """Another model's evaluation, a failed one and other files do not count."""
    release = ReleaseRecord.model_validate_json((tiny_release / "release.json").read_text())
    assert release.model_sha256 == sha256_tree(tiny_release / "model")
    assert evaluation_time(tiny_release, release) is None
    own = release.model_sha256
    names = [
        _evaluation(tmp_path / "old.json", own, "2026-01-01T00:00:00Z"),
        _evaluation(tmp_path / "new.json", own, "2026-02-01T00:00:00Z"),
        _evaluation(tmp_path / "other.json", "f" * 64, "2026-03-01T00:00:00Z"),
        _evaluation(tmp_path / "failed.json", own, "2026-04-01T00:00:00Z",
                    status="failed", error="no disk"),
    ]  # fmt: skip
    write_json(tmp_path / "list.json", [1])
    (tmp_path / "broken.json").write_text("{")
    record = release.model_copy(
        update={"files": dict.fromkeys([*names, "list.json", "broken.json", "gone.json"])}
    )
    assert evaluation_time(tmp_path, record) == pytest.approx(1769904000 + 60)
    assert json.loads((tmp_path / "new.json").read_text())["kind"] == "evaluation"
