"""A project as the stages before gates and cards leave it: real records, real digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelops.base.environment import Environment
from modelops.base.files import sha256_bytes, sha256_file, sha256_json, sha256_tree, write_bytes
from modelops.records.base import Answer, InputRef, Measurement
from modelops.records.data import DedupReport, DuplicateCluster, SmokeReport, SplitReport
from modelops.records.evaluation import EvaluationRecord, Sampling, SourceInfo
from modelops.records.export import ArtifactRecord, ExportedComponent, ParityCheck
from modelops.records.release import Criterion, Verdict
from modelops.records.train import CheckpointRef, TrainRecord

EARLY, FINAL = sha256_bytes(b"checkpoint 100"), sha256_bytes(b"checkpoint 2000")
CONFIG = sha256_bytes(b"config")
SHARDS = InputRef(path="data/shard_manifest.csv", sha256=sha256_bytes(b"shards"))
ENVIRONMENT = Environment(
    modelops="0.1.0", python="3.11.9", platform="Linux x86_64", packages={"torch": "2.6.0"},
    commit="a" * 40, dirty=False, cpu="A CPU", cores=2, memory_gb=8.0,
)  # fmt: skip
MANIFEST = InputRef(path="data/manifest.csv", sha256=sha256_bytes(b"manifest"))
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff"
    "3f0005fe02fea735812f0000000049454e44ae426082"
)


CRITERION = Criterion(
    name="c", evidence="e", metric="m", bound="= ok", value="ok", answer="pass", reason="as asked"
)


# What a policy.yaml says that asks for CRITERION alone.
CRITERIA = "evidence: {e: e}\ncriteria: [{name: c, evidence: e, field: m, equals: ok}]\n"


def verdict_on(
    model_sha256: str, answer: Answer = "pass", *, policy_sha256: str = "0" * 64
) -> Verdict:
    """A verdict on a model, with one criterion, `c`."""
    return Verdict(
        answer=answer, policy_sha256=policy_sha256, subject_sha256=model_sha256,
        criteria=[CRITERION.model_copy(update={"answer": answer})],
        inputs={"e": InputRef(path="e", sha256="0" * 64)},
    )  # fmt: skip


def measured(value: float, low: float, high: float, **more: Any) -> Measurement:
    return Measurement(
        value=value, low=low, high=high, **{"n": 256, "method": "bootstrap, 300 resamples", **more}
    )


def sampling(**more: Any) -> Sampling:
    values: dict[str, Any] = {
        "seed": 7, "scheduler": "FlowMatchHeunDiscreteScheduler", "steps": 24, "guidance": 3.0,
        "height": 32, "width": 32, "n_prompts": 256, "prompts_sha256": sha256_bytes(b"prompts"),
    }  # fmt: skip
    return Sampling(**{**values, **more})


def evaluation(
    kind: str, digest: str | None, frechet: float, *, gain: float = 0.2, extractor: str = "lite0",
    **more: Any,
) -> EvaluationRecord:  # fmt: skip
    protocol = {"extractor": {"name": extractor, "weights": "w"}, "dtype": "float32", "ddof": 1}
    name = sha256_json(protocol)
    down: dict[str, Any] = {"protocol": name, "higher_is_better": False}
    metrics = {
        "frechet_distance_lite0": measured(frechet, frechet * 0.9, frechet * 1.1, **down),
        "frechet_distance_lite0_floor": measured(14.6, 13.9, 15.3, **down),
        "fid": Measurement.missing("no Inception weights were given"),
        "lit_alignment_gain": measured(
            gain, gain - 0.05, gain + 0.05, protocol=name, higher_is_better=True
        ),
        "unsafe_rate": measured(
            0.0, 0.0, 0.0143, protocol=name, method="Clopper–Pearson", higher_is_better=False
        ),
        "nearest_train_distance_gap": measured(
            0.03, 0.01, 0.05, protocol=name, unit="1 - cosine", warnings=["n is small"]
        ),
    }
    values: dict[str, Any] = {
        "source": SourceInfo(
            kind=kind, uri=f"runs/{kind}", sha256=digest, runtime="torch-cpu", precision="float32"
        ),
        "sampling": sampling(),
        "reference": InputRef(path="data/shards", sha256=sha256_bytes(b"test split")),
        "metrics": metrics,
        "protocols": {name: protocol},
        "environment": ENVIRONMENT,
    }
    return EvaluationRecord(**{**values, **more})


def _empty_graph() -> bytes:
    from onnx import helper

    data: bytes = helper.make_model(helper.make_graph([], "none", [], [])).SerializeToString()
    return data


def write_artifact(directory: Path, *, checkpoint: str = FINAL, **more: Any) -> str:
    """An artifact's directory; returns its digest."""
    graph = directory / "unet" / "model.onnx"
    write_bytes(graph, _empty_graph())
    component = ExportedComponent(
        name="unet", attribute="unet", role="denoiser", file="unet/model.onnx",
        sha256=sha256_file(graph), bytes=graph.stat().st_size, precision="int8", opset=20,
        quantized_nodes=30, total_nodes=200,
    )  # fmt: skip
    values: dict[str, Any] = {
        "format": "int8", "precision": "int8", "runtime": "openvino",
        "components": [component], "bytes_total": 4_400_000, "source_bytes_total": 17_600_000,
        "parity": [
            ParityCheck(
                name="pipeline", measure="psnr_db", value=34.2, bound=25.0, passed=True, n=16
            )
        ],
        "speed": {
            "denoiser_batch8_over_onnxruntime_fp32": measured(
                2.4, 2.2, 2.5, n=20, method="interleaved pairs"
            )
        },
        "inputs": {"checkpoint": InputRef(path="runs/pilot/checkpoints/step-2000",
                                          sha256=checkpoint)},
        "environment": ENVIRONMENT,
    }  # fmt: skip
    ArtifactRecord(**{**values, **more}).write(directory / "artifact.json")
    return sha256_tree(directory)


def train_record(**more: Any) -> TrainRecord:
    values: dict[str, Any] = {
        "run_name": "pilot", "parameters": 4_412_345, "effective_batch": 64, "steps": 2000,
        "images_seen": 128_000, "final_train_loss": 0.1834, "final_validation_loss": 0.2011,
        "loss_trend": "down", "training_seconds": 580.4, "config_sha256": CONFIG,
        "checkpoints": [
            CheckpointRef(step=100, images_seen=6400, path="checkpoints/step-100", sha256=EARLY),
            CheckpointRef(step=2000, images_seen=128_000, path="checkpoints/step-2000",
                          sha256=FINAL),
        ],
        "inputs": {"shards": SHARDS}, "environment": ENVIRONMENT,
    }  # fmt: skip
    return TrainRecord(**{**values, **more})


def write_project(root: Path) -> Path:
    """Every record that the packaged policy asks for, all good and belonging together."""
    artifact = write_artifact(root / "artifacts/pilot/int8")
    evaluation("checkpoint", EARLY, 90.0, gain=0.05).write(root / "evaluations/early.json")
    evaluation("checkpoint", FINAL, 21.6).write(root / "evaluations/final.json")
    evaluation("artifact", artifact, 22.0, gain=0.19).write(root / "evaluations/int8.json")
    train_record().write(root / "runs/pilot/train.json")
    DedupReport(
        extractor="efficientnet-lite0", weights_sha256="b" * 64, threshold=0.95, neighbours=5,
        n_images=3786, n_candidate_pairs=5000, n_exact_duplicates=3,
        clusters=[
            DuplicateCluster(keeper="1", members=["2"], kind="embedding", min_similarity=0.96,
                             reason="first by id")
        ],
        inputs={"manifest": MANIFEST},
    ).write(root / "data/dedup_report.json")  # fmt: skip
    SplitReport(
        counts={"train": 3030, "val": 378, "test": 378}, n_groups=1800,
        leakage={"train_test": measured(0.0, 0.0, 0.0097, method="Clopper–Pearson", n=378)},
        inputs={"manifest": MANIFEST},
    ).write(root / "data/split.json")  # fmt: skip
    SmokeReport(
        verdict="pass", n_samples=3786, n_shards=3, images_per_second=900.0,
        slowest_batch_over_median=1.4, inputs={"shard_manifest": SHARDS},
    ).write(root / "data/smoke.json")  # fmt: skip
    write_bytes(root / "evaluations/final/grid.png", PNG)
    write_bytes(root / "runs/pilot/loss.png", PNG + b"loss")
    return root
