"""Context of the model card's template, from records. Only here do numbers get their words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from markupsafe import Markup

from modelops.base.errors import UsageError
from modelops.base.files import read_json
from modelops.cards.about import parse_about
from modelops.cards.escape import code, markdown, number
from modelops.cards.numbers import (
    Measured,
    copying_lines,
    interval,
    measurement_in,
    measurements_table,
    record_link,
    slice_rows,
    tables_by_part,
)
from modelops.cards.sources import CardSources
from modelops.evaluation.report.words import words_of
from modelops.export.artifact.layers import searched_layers
from modelops.records.base import InputRef, Record
from modelops.records.data import DedupReport, SplitReport
from modelops.records.evaluation import EvaluationRecord
from modelops.records.export import ArtifactRecord
from modelops.records.read import RecordT, read_record
from modelops.records.release import Verdict
from modelops.records.train import TrainRecord

GLANCE = (  # what a reader wants to know first
    "frechet_distance_lite0", "lit_alignment_gain", "nearest_train_distance_gap", "unsafe_rate",
)  # fmt: skip
BASELINE = "early"  # an evaluation of this name is there to compare with, not to advertise


def read_input(sources: CardSources, folder: Path, role: str, kind: type[RecordT]) -> RecordT:
    """One of the records a card is rendered from."""
    return read_record(folder / sources.inputs[role].path, kind)


def roles(sources: CardSources, group: str) -> Iterator[tuple[str, str, InputRef]]:
    """Return (role, name, file) of inputs whose role is `group:name`."""
    for role, file in sources.inputs.items():
        if role.startswith(f"{group}:"):
            yield role, role.removeprefix(f"{group}:"), file


def evaluations_of(sources: CardSources, folder: Path) -> list[Measured]:
    """The evaluations, in the order they were given."""
    return [
        Measured(name=name, record=read_input(sources, folder, role, EvaluationRecord), file=file)
        for role, name, file in roles(sources, "evaluation")
    ]


def released_evaluations(evaluations: list[Measured]) -> list[Measured]:
    """Return all evaluations but the baseline."""
    return [item for item in evaluations if item.name != BASELINE]


def model_context(sources: CardSources, folder: Path) -> dict[str, Any]:
    """Return every value that model_card.md.j2 uses.

    Raises:
        UsageError: a record is missing or of another kind.
    """
    train = read_input(sources, folder, "train", TrainRecord)
    if train.status != "ok":
        raise UsageError(f"the training record says {train.status}: {train.error}")
    evaluations = evaluations_of(sources, folder)
    artifacts = [
        (name, file, read_input(sources, folder, role, ArtifactRecord))
        for role, name, file in roles(sources, "artifact")
    ]
    verdict = _optional(sources, folder, "verdict", Verdict)
    records: list[Record] = [train, *(item.record for item in evaluations)]
    records += [record for _, _, record in artifacts]
    parts = tables_by_part(evaluations)
    return {
        "about": parse_about(sources.about, source="about"),
        "train": train,
        "train_file": sources.inputs["train"],
        "settings": _settings(sources, folder, train),
        "compute": _compute(train),
        "evaluations": [_column(item, train) for item in evaluations],
        "parts": parts,
        "all_rows": [row for table in parts.values() for row in table.rows],
        "unlike": [row for table in parts.values() for row in table.rows if not row.alike],
        "samplings": _samplings(evaluations),
        "glance": _glance(evaluations),
        "slices": slice_rows(released_evaluations(evaluations)),
        "copying": copying_lines(released_evaluations(evaluations)),
        "artifacts": [_artifact(name, file, record) for name, file, record in artifacts],
        "verdict": _verdict(verdict, sources) if verdict else None,
        "verdict_file": sources.inputs.get("verdict"),
        "split": _optional(sources, folder, "split", SplitReport),
        "split_file": sources.inputs.get("split"),
        "dedup": _optional(sources, folder, "dedup", DedupReport),
        "dedup_file": sources.inputs.get("dedup"),
        "pictures": sources.pictures,
        "dataset_card": sources.options.get("dataset_card", ""),
        "checkpoint": _checkpoint(evaluations, train, sources.inputs["train"]),
        "inputs": sources.inputs,
        "origins": _origins(records),
        "packages": _packages(train),
    }


def _optional(sources: CardSources, folder: Path, role: str, kind: type[RecordT]) -> RecordT | None:
    return read_input(sources, folder, role, kind) if role in sources.inputs else None


def _settings(sources: CardSources, folder: Path, train: TrainRecord) -> list[tuple[str, Markup]]:
    """The frozen config as (section.key, value), in its own order.

    Raises:
        UsageError: it is another run's config.
    """
    if "config" not in sources.inputs:
        return []
    path = folder / sources.inputs["config"].path
    data = read_json(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a frozen config")
    stated = data.get("config_sha256", train.config_sha256)
    if stated != train.config_sha256:
        raise UsageError(f"{path}: not the config of the run that {train.run_name} recorded")
    return list(_flat(data["config"] if isinstance(data.get("config"), dict) else data))


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Markup]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        elif inner is not None and inner != []:
            text = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            yield f"{prefix}{key}", code(text)


def _compute(train: TrainRecord) -> dict[str, str]:
    environment = train.environment
    rate = train.images_seen / train.training_seconds if train.training_seconds > 0 else 0.0
    hardware = "not recorded"
    if environment:
        devices = ", ".join(environment.accelerators)
        memory = f", {environment.memory_gb:g} GB" if environment.memory_gb else ""
        cpu = f"{environment.cpu or 'unknown CPU'}, {environment.cores or '?'} cores{memory}"
        hardware = f"{devices}; {cpu}" if devices else f"{cpu}, no accelerator"
    return {"hardware": hardware, "rate": f"{number(rate)} pictures/s"}


def _column(item: Measured, train: TrainRecord) -> dict[str, Any]:
    """Return an evaluation's column head in the tables: the source that was measured."""
    record, source = item.record, item.record.source
    step = next((c.step for c in train.checkpoints if c.sha256 == source.sha256), None)
    if step is not None:
        what = Markup(f"checkpoint at step {step:,}")
    elif source.kind == "checkpoint":
        what = Markup("⚠ a checkpoint that the run does not list")
    else:
        what = markdown(source.kind)
    runtime = " ".join(part for part in (source.runtime, source.precision) if part)
    return {
        "name": item.name, "file": item.file, "what": what, "runtime": runtime or "not recorded",
        "digest": source.sha256 or "not recorded", "status": record.status,
        "failed_images": record.n_failed_images, "duration": record.duration_s,
    }  # fmt: skip


def _samplings(evaluations: list[Measured]) -> list[tuple[str, str]]:
    """Return (how images were sampled, which evaluations), grouped."""
    groups: dict[str, list[str]] = {}
    for item in evaluations:
        s = item.record.sampling
        text = "sampling not recorded"
        if s:
            text = (
                f"{s.n_prompts:,} prompts × {s.replicates}, {s.height} × {s.width} pixels, "
                f"{s.scheduler} with {s.steps} steps at guidance {s.guidance:g}, seed {s.seed}"
            )
        groups.setdefault(text, []).append(item.name)
    return [(text, ", ".join(names)) for text, names in groups.items()]


def _glance(evaluations: list[Measured]) -> list[tuple[Markup, Markup, Markup]]:
    """Return (metric, value [low, high], record) of the last released evaluation that has it."""
    rows = []
    for key in GLANCE:
        for item in reversed(released_evaluations(evaluations)):
            measured = measurement_in(item, key)
            if measured.value is not None:
                title = Markup(words_of(key).title)
                rows.append((title, interval(measured), record_link(item.file)))
                break
    return rows


MORE_IS_BETTER = ("psnr_db", "ssim")  # among parity's measures


def _artifact(name: str, file: InputRef, record: ArtifactRecord) -> dict[str, Any]:
    share = record.bytes_total / record.source_bytes_total if record.source_bytes_total else None
    return {
        "name": name,
        "file": file,
        "record": record,
        "refusal": (record.error or "").partition("\n")[0],  # below it, a row for each layer
        "share": f"({share * 100:.0f} % of its source)" if share else "",
        "parity": [
            {
                "name": check.name,
                "measure": check.measure.replace("_", " "),
                "value": number(check.value),
                "bound": f"{'≥' if check.measure in MORE_IS_BETTER else '≤'} {number(check.bound)}",
                "answer": "passed" if check.passed else "**failed**",
                "n": check.n,
            }
            for check in record.parity
        ],
        "reproduced": [
            {
                "processor": one.processor + (" (imitated)" if one.imitated_by else ""),
                "runtime": one.runtime,
                "error": "" if one.fault else number(one.error),
                "bound": "" if one.fault else number(one.bound),
                "answer": "the same"
                if one.passed
                else f"**{one.fault or 'others'}: not served there**",
                "n": one.n,
            }
            for one in record.reproduced
        ],
        "speed": measurements_table(record.speed),
        "noise": [
            {
                "level": f"{band['sigma_low']:.2f} to {band['sigma_high']:.2f}",
                "rms": number(band["rms"]),
                "largest": number(band["max"]),
                "n": int(band["n"]),
            }
            for band in record.error_by_noise
        ],
        "layers": _layers(record),
    }


def _layers(record: ArtifactRecord) -> dict[str, Any] | None:
    """Return the precision of each group of layers and its reason; None if no search was made."""
    search = record.calibration.get("search")
    if not search:
        return None
    rows = [
        {
            **row,
            "error": number(max(row["error"], 0.0)),
            "saved": "not timed" if row["ms_saved"] is None else number(row["ms_saved"]),
        }
        for row in searched_layers(record)
    ]
    return {"rows": rows, "error": number(search["error"]), "budget": number(search["budget"])}


def _verdict(verdict: Verdict, sources: CardSources) -> dict[str, Any]:
    seen = {reference.sha256 for reference in verdict.inputs.values()}
    printed = {
        role: file.sha256
        for role, file in sources.inputs.items()
        if role.startswith(("evaluation:", "artifact:"))
    }
    others = [role for role, digest in printed.items() if digest not in seen]
    return {
        "answer": verdict.answer,
        "subject": (verdict.subject_sha256 or "unknown")[:12],
        "policy": verdict.policy_sha256[:12],
        "not_judged": ", ".join(role.replace(":", " ") for role in others),
        "criteria": [
            {
                "name": c.name, "bound": c.bound, "answer": c.answer,
                "value": _criterion_value(c.value, c.low, c.high),
                "reason": c.reason if c.answer != "pass" else "",
                "evidence": PurePosixPath(c.evidence).name, "metric": c.metric,
            }
            for c in verdict.criteria
        ],
    }  # fmt: skip


def _criterion_value(value: float | str | None, low: float | None, high: float | None) -> Markup:
    if value is None:
        return Markup("–")
    if isinstance(value, str):
        return markdown(value)
    if low is None or high is None:
        return Markup(number(value))
    return Markup(f"{number(value)} \\[{number(low)}, {number(high)}\\]")


def _checkpoint(evaluations: list[Measured], train: TrainRecord, file: InputRef) -> str:
    """Path of the released checkpoint for a snippet, from the project; never of one machine."""
    run = PurePosixPath(*(part for part in PurePosixPath(file.path).parent.parts if part != ".."))
    for item in released_evaluations(evaluations):
        source = item.record.source
        if source.kind == "checkpoint":
            listed = (str(run / c.path) for c in train.checkpoints if c.sha256 == source.sha256)
            path = next(listed, source.uri)
            return PurePosixPath(path).name if PurePosixPath(path).is_absolute() else path
    return str(run / train.checkpoints[-1].path) if train.checkpoints else "path/to/checkpoint"


def _origins(records: list[Record]) -> list[str]:
    """`modelops 0.1.0 at commit abc (with uncommitted changes)`, each once."""
    found = []
    for record in records:
        environment = record.environment
        if environment is None:
            text = "a record without environment"
        else:
            commit = f" at commit {environment.commit[:12]}" if environment.commit else ""
            dirty = " with uncommitted changes" if environment.dirty else ""
            text = (
                f"modelops {environment.modelops}{commit}{dirty}, Python {environment.python}, "
                f"{environment.platform}"
            )
        if text not in found:
            found.append(text)
    return found


def _packages(train: TrainRecord) -> str:
    packages = train.environment.packages if train.environment else {}
    return ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
