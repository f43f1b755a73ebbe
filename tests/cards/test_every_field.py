"""What a record holds is on the card, or the card names it: every field of each is tried."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from modelops.base.environment import Environment
from modelops.base.files import write_json
from modelops.cards.about import openmoji_about
from modelops.cards.context import model_context
from modelops.cards.dataset import render_dataset_card, write_dataset_card
from modelops.cards.model import write_model_card
from modelops.cards.render import render_template
from modelops.cards.sources import CardSources, read_sources
from modelops.cards.unprinted import STRUCTURE, UNPRINTED
from modelops.records.base import InputRef, Measurement, Record
from modelops.records.data import DedupReport, DuplicateCluster, SmokeReport, SplitReport
from modelops.records.evaluation import (
    CopyingTest,
    EvaluationRecord,
    MemorizationVerdict,
    OverfittingNote,
    SafetySweep,
    SafetySweepPoint,
    Sampling,
    SliceMeasurement,
    SourceInfo,
)
from modelops.records.export import (
    ArtifactRecord,
    ExportedComponent,
    ParityCheck,
    ReproductionCheck,
)
from modelops.records.read import RECORD_KINDS
from modelops.records.release import Criterion, Verdict
from modelops.records.train import CaptionLengths, CheckpointRef, TrainRecord

DIGEST = "a" * 64
COMMON: dict[str, Any] = {
    "inputs": {"thing": InputRef(path="data/thing", sha256=DIGEST)},
    "seeds": {"draw": 7},
    "environment": Environment(
        modelops="0.0.9", python="3.11.9", platform="Linux x86_64", packages={"torch": "2.6.0"},
        commit="b" * 40, dirty=False, cpu="A CPU", cores=2, memory_gb=8.0, accelerators=["A GPU"],
    ),
    "started_at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    "duration_s": 12.0,
}  # fmt: skip


def measured(**more: Any) -> Measurement:
    values: dict[str, Any] = {
        "value": 0.5, "low": 0.25, "high": 0.75, "confidence": 0.9, "method": "bootstrap", "n": 40,
        "unit": "cosine", "higher_is_better": True, "protocol": DIGEST, "warnings": ["few"],
        "details": {"chance": 0.125},
    }  # fmt: skip
    return Measurement(**{**values, **more})


def full_records() -> dict[str, Record]:
    """One record of each kind that a card prints, with every field filled."""
    point = SafetySweepPoint(threshold=0.5, rate=0.2, low=0.1, high=0.3)
    return {
        "train": TrainRecord(
            run_name="pilot", parameters=4_412_345, effective_batch=64, steps=2000,
            images_seen=128_000, final_train_loss=0.1834, final_validation_loss=0.2011,
            final_train_probe_loss=0.1777, overfitting_since_step=1500, loss_trend="down",
            training_seconds=580.0, setup_seconds=10.0, time_limit_seconds=600.0,
            checkpoints=[CheckpointRef(step=2000, images_seen=1, path="c", sha256="e" * 64)],
            config_sha256="d" * 64, planned_steps=2100, stop_reason="time is up", sessions=2,
            processes=3, device="cpu", precision="bf16", precision_reason="it is fast",
            precision_images_per_second={"fp32": 20.0, "fp16": None}, images_per_second=33.0,
            peak_memory_gb=1.25, n_train_images=3163, n_validation_images=128,
            quarantined={"9": "truncated"}, warnings=["overfitting"],
            captions=CaptionLengths(
                max_tokens=32, n=3, n_cut=1, n_made_equal=0, longest={"1": 40}
            ),
            **COMMON,
        ),
        "evaluation": EvaluationRecord(
            error="a remark",
            source=SourceInfo(kind="checkpoint", uri="runs/c", sha256="e" * 64, runtime="torch",
                              precision="float32", details={"threads": 2}),
            sampling=Sampling(seed=7, scheduler="Euler", steps=24, guidance=3.0, height=32,
                              width=48, n_prompts=395, replicates=2, prompts_sha256="1" * 64),
            reference=InputRef(path="data/m.csv#val", sha256="2" * 64),
            metrics={"lit_alignment_gain": measured()},
            protocols={DIGEST: {"n": 40}}, files={"grid": InputRef(path="g", sha256=DIGEST)},
            n_failed_images=3, n_reused_images=4,
            memorization=MemorizationVerdict(
                answer="cannot tell", reason="few images", rule="a rule", alpha=0.05,
                tests=[CopyingTest(name="closer", hits=2, n=395, heldout_hits=1, n_heldout=396,
                                   method="exact", p_value=0.5, p_adjusted=0.75, found=False)],
                detectable_rate=0.031, known_copies=11, known_copies_found=10, caveats=["a caveat"],
                overfitting=OverfittingNote(
                    answer="cannot tell", reason="one loss", closer_to_training=True,
                    since_step=1400, step=2000, train_loss=0.18, validation_loss=0.21,
                ),
            ),
            safety_sweep=SafetySweep(
                filter="open_nsfw", protocol="3" * 64, method="Clopper-Pearson", n=395,
                generated=[point], highest=0.44, n_real=396, highest_real=0.43,
                real=[point.model_copy(update={"rate": 0.22})],
            ),
            slices=[SliceMeasurement(
                by="words", value="hand", metric="lit_alignment_gain", verdict="differs",
                n_groups=12, n_prompts=95, inside=measured(), rest=measured(),
                difference=measured(), p_value=0.01, p_corrected=0.02, n_comparisons=5,
            )],
            **COMMON,
        ),
        "artifact": ArtifactRecord(
            error="not faster, kept by --allow\nand a table", format="int8", precision="int8",
            runtime="openvino",
            components=[ExportedComponent(
                name="unet", attribute="unet", role="denoiser", file="unet.onnx", sha256="4" * 64,
                bytes=4_400_000, precision="int8", opset=20, dynamic_axes=["batch"],
                quantized_nodes=30, total_nodes=200, data=InputRef(path="d", sha256=DIGEST),
                shapes={"sample": [1, 2]}, axis_multiples={"height": 4},
            )],
            parity=[ParityCheck(name="images", measure="psnr_db", value=34.0, bound=25.0,
                                passed=True, n=16)],
            calibration={"search": {
                "error": 0.02, "budget": 0.05, "precision": "float32",
                "table": [{"group": "conv", "nodes": 3, "error": 0.01, "ms_saved": 1.5,
                           "decision": "int8", "why": "fast"}],
            }},
            bytes_total=5_400_000, source_bytes_total=17_600_000, speed={"batch8": measured()},
            error_by_noise=[{"sigma_low": 0.1, "sigma_high": 0.2, "rms": 0.03, "max": 0.04,
                             "n": 4.0}],
            pipeline="Flow", size=[32, 48], omitted=["safety_checker"], lora={"scale": 0.8},
            conversion={"kept": 1}, execution={"onnxruntime": {"int8_layers": 2}},
            files={"x": InputRef(path="x", sha256=DIGEST)},
            reproduced=[ReproductionCheck(
                processor="AVX2", runtime="onnxruntime", precision="float32", error=0.01,
                bound=0.02, passed=True, n=8, imitated_by="ORT_ISA",
            )],
            **COMMON,
        ),
        "split": SplitReport(
            counts={"train": 3030, "val": 378}, n_groups=1800, leakage={"val_in_train": measured()},
            fractions={"train": 0.8, "val": 0.1}, group_counts={"train": 1400, "val": 200},
            strategy="by groups", warnings=["uneven"],
            files={"splits": InputRef(path="s", sha256=DIGEST)}, **COMMON,
        ),
        "dedup": DedupReport(
            extractor="lite0", weights_sha256="5" * 64, threshold=0.95, neighbours=5, n_images=3786,
            n_candidate_pairs=5000, n_exact_duplicates=3,
            clusters=[DuplicateCluster(keeper="1", members=["2"], kind="embedding",
                                       min_similarity=0.96, reason="first")],
            quarantined={"9": "truncated"}, removable=["2"], components=[["1", "2"]],
            chaining={"largest": 100}, calibration={"recall": measured()},
            files={"png": InputRef(path="p", sha256=DIGEST)}, warnings=["loose"], **COMMON,
        ),
        "smoke": SmokeReport(
            verdict="pass", reasons=["fine"], n_samples=3786, n_shards=3, images_per_second=900.0,
            slowest_batch_over_median=1.4, measurements={"rate": measured()}, **COMMON,
        ),
        "verdict": Verdict(
            answer="undecided", policy_sha256="6" * 64, subject_sha256="7" * 64,
            criteria=[Criterion(name="learns", evidence="e/final.json", metric="gain", bound="> 0",
                                value=0.5, low=0.25, high=0.75, answer="undecided",
                                reason="too low")],
            **COMMON,
        ),
    }  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the values of a record's JSON, in which every field is filled."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    elif value not in (None, [], {}, "") and path[0] not in (*STRUCTURE, "status"):
        yield path


OTHERS = (
    "fail", "pass", "undecided", "up", "differs", "within noise", "copies", "overfitting",
    "checkpoint", "artifact", "near_copies", "encoder", "ssim", "max_abs_error", "int8", "onnx",
    "bytes",
)  # fmt: skip


def changed(record: Record, path: tuple[Any, ...]) -> dict[str, Any]:
    """The record's JSON with one other value that its schema accepts."""
    data = record.model_dump(mode="json")
    *way, last = path
    place: Any = data
    for key in way:
        place = place[key]
    old = place[last]
    if isinstance(old, bool):
        candidates: list[Any] = [not old, None]
    elif isinstance(old, int | float):
        candidates = [old * 2 + 1, old + 1, old + 0.011, old - 0.011]
    elif isinstance(old, str):
        candidates = [f"9{old[1:]}" if len(old) == 64 else f"9 {old}", *OTHERS, f"2031{old[4:]}"]
    else:
        raise AssertionError(f"{path}: {old!r} is not filled")
    kind = RECORD_KINDS[record.kind]
    for candidate in candidates:
        if candidate == old:
            continue
        place[last] = candidate
        try:
            kind.model_validate_json(json.dumps(data), strict=True)
        except ValidationError:
            continue
        return copy.deepcopy(data)
    raise AssertionError(f"{record.kind}: no other value for {path}")


def card_of(kind: str, folder: Path) -> tuple[CardSources, Any]:
    """The sources of a card of all records in a folder, and the function that renders it."""
    files = {name: folder / f"{name}.json" for name in full_records()}
    if kind == "model":
        card = write_model_card(
            folder / "model_card.md", train=files["train"],
            evaluations={"final": files["evaluation"]}, artifacts={"int8": files["artifact"]},
            verdict=files["verdict"], split=files["split"], dedup=files["dedup"],
            about=openmoji_about(),
        )  # fmt: skip
        return read_sources(card), lambda sources: render_template(
            "model_card.md.j2", model_context(sources, folder)
        )
    card = write_dataset_card(
        folder / "dataset_card.md", dedup=files["dedup"],
        statistics={"samples": 3, "captions_of_late": {"mean": 3}},
        split=files["split"], smoke=files["smoke"], about=openmoji_about(),
    )  # fmt: skip
    return read_sources(card), lambda sources: render_dataset_card(sources, folder)


CARDS = [
    *(("model", name) for name in ("train", "evaluation", "artifact", "split", "dedup", "verdict")),
    *(("dataset", name) for name in ("dedup", "split", "smoke")),
]


@pytest.mark.parametrize(("card", "name"), CARDS)
def test_every_field_is_printed_or_named(tmp_path: Path, card: Any, name: str) -> None:
    records = full_records()
    for kind, record in records.items():
        record.write(tmp_path / f"{kind}.json")
    sources, render = card_of(card, tmp_path)
    text = render(sources)
    record = records[name]
    known = UNPRINTED[card, name]
    silent = set()
    for path in leaves(record.model_dump(mode="json")):
        write_json(tmp_path / f"{name}.json", changed(record, path))
        if render(sources) == text:
            silent.add(".".join(str(part) for part in path if not isinstance(part, int)))
    named = {field for fields in known.values() for field in fields}
    unnamed = {path for path in silent if not any(f"{path}.".startswith(f"{f}.") for f in named)}
    assert not unnamed
    assert card == "model" or "captions of late" in text
    printed = {f for f in named if not any(f"{path}.".startswith(f"{f}.") for path in silent)}
    assert not printed
    row = next(line for line in text.splitlines() if f"[{name}.json]" in line and DIGEST not in line
               and line.startswith("| ") and " UTC, " in line)  # fmt: skip
    assert all(words in row for words in known)


def test_every_field_is_filled() -> None:
    for record in full_records().values():
        plain = {
            name
            for name, value in record.model_dump(mode="json").items()
            if value in (None, {}, [])
        }
        assert plain <= {"error"}
